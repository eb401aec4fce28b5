"""rvq/mini: DAC's contract (residual codes, the first n of a frame decode too) on an analytic basis, for 16 kHz speech.

A DAC that is trained for minutes on a CPU does not find a transform that keeps phase. This one starts from two:

- Loudness: the log power in mel bands, every 10 ms.
- Shape: the coefficients of a modified discrete cosine transform (MDCT, Princen and Bradley 1986), divided by a power
  of that loudness, so that quiet sounds count too, but less.

Both are cut to their principal components, laid side by side for 20 ms, and coded by residual vector quantisation:
plain distances as in EnCodec, tables from k-means, and a search that keeps a few paths. The weight between the two is
such that the first codes of a frame carry loudness and the later ones phase. Nothing of this is trained by gradients.

The decoder is. Linear decoding gives loudness and shape; a ConvNeXt at 100 frames a second, all of whose layers work at
that rate (as in Vocos, Siuzdak, arXiv 2306.00814), adds what shape lacks, in units of the loudness; the inverse MDCT
is the one step to the sample rate. A second of sound costs 0.3 GFLOP.

Letters: B batch, L samples, T frames, S subframes, K MDCT coefficients, M mel bands, D latent width, N codebooks,
V rows of each, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ...modalities.features import mel_filters
from ..layers.conv import Conv1d, Pair, cut
from ..published import Weights, load_into
from ..quantizers.table import Exact, Table
from .residual import ResidualCodec, residual_spec

if TYPE_CHECKING:
    from ..registry import Entry

QUIET = 1e-8  # power that counts as silence: -80 dB of full scale
LOUD = 6.0  # natural log of power that no sound exceeds: a full-scale sine in one band


@dataclass(frozen=True, kw_only=True)
class RVQMiniConfig:
    """Sizes.

    Args:
        sample_rate: of the sound that is coded.
        hop: samples in a frame.
        subframes: MDCT blocks in a frame.
        bands: mel bands of the loudness, in every subframe.
        coefficients: lowest MDCT coefficients of a subframe whose shape is coded.
        loudness_width, shape_width: principal components of either in a frame.
        flatten: the power of the loudness that shape is divided by; 1 makes all sounds equally important.
        loudness_weight: what a nat of loudness counts against a unit of shape.
        codebooks, codebook_size: N, V.
        search: how many paths through the codebooks the encoder keeps.
        channels, blocks, expansion: of the decoder.
    """

    sample_rate: int = 16_000
    hop: int = 320
    subframes: int = 2
    bands: int = 40
    coefficients: int = 80
    loudness_width: int = 32
    shape_width: int = 64
    flatten: float = 0.7
    loudness_weight: float = 0.12
    codebooks: int = 12
    codebook_size: int = 1024
    search: int = 4
    channels: int = 192
    blocks: int = 5
    expansion: int = 3

    def __post_init__(self):
        if self.hop % self.subframes or self.step % 4:
            raise ValueError(
                f"hop is {self.hop}, expected a multiple of 4 x subframes = {4 * self.subframes}"
            )
        if self.coefficients > self.step:
            raise ValueError(f"coefficients is {self.coefficients}, a subframe has {self.step}")

    @property
    def step(self) -> int:
        """Samples in a subframe, which is also its number of coefficients."""
        return self.hop // self.subframes

    @property
    def width(self) -> int:
        """Of a latent: D."""
        return self.loudness_width + self.shape_width


class Transform(Exact):
    """Samples to MDCT coefficients and loudness, and coefficients to samples. No weights."""

    def __init__(self, config: RVQMiniConfig):
        super().__init__()
        self.step, self.window = config.step, 5 * config.step // 2
        self.register_buffer("basis", mdct(self.step, self.step), persistent=False)
        size = 1 << (self.window - 1).bit_length()
        angle = torch.arange(size // 2 + 1)[:, None] * torch.arange(self.window)
        angle = 2 * torch.pi / size * angle.double()
        hann = torch.hann_window(self.window, dtype=torch.double)
        waves = torch.cat([angle.cos(), angle.sin()]) * hann / hann.square().sum().sqrt()
        self.register_buffer("waves", waves.float(), persistent=False)
        bank = mel_filters(config.sample_rate, size, config.bands)
        self.register_buffer("bank", bank / bank.sum(1, keepdim=True), persistent=False)
        bins = torch.linspace(0, config.sample_rate / 2, size // 2 + 1)
        centres = self.bank @ bins
        places = (torch.arange(self.step) + 0.5) * config.sample_rate / (2 * self.step)
        self.register_buffer("spread", interpolation(centres, places), persistent=False)

    def coefficients(self, x: Tensor) -> Tensor:
        """Samples [B, S · step] to MDCT coefficients [B, step, S]; a window is two steps, around its own."""
        x = F.pad(x, (self.step // 2, self.step // 2))
        return F.conv1d(x[:, None], self.basis[:, None], stride=self.step)

    def samples(self, coefficients: Tensor) -> Tensor:
        """The inverse of `coefficients`, but for half a step at either end, where no second window overlaps."""
        x = F.conv_transpose1d(coefficients, self.basis[:, None], stride=self.step)
        return x[:, 0, self.step // 2 : -(self.step // 2)]

    def loudness(self, x: Tensor) -> Tensor:
        """Samples [B, S · step] to the log of the mean power in each band [B, M, S]."""
        around = self.window - self.step
        x = F.pad(x, (around // 2, around - around // 2))
        waves = F.conv1d(x[:, None], self.waves[:, None], stride=self.step)
        power = reduce(waves.square(), "b (two f) s -> b f s", "sum", two=2)
        return (self.bank @ power + QUIET).log()

    def level(self, loudness: Tensor) -> Tensor:
        """Loudness [B, M, S] to that of each coefficient [B, step, S]."""
        return (self.spread @ loudness).clamp(max=LOUD)


class ConvBlock(nn.Module):
    """x + a depthwise convolution k7, layer norm over channels, and a perceptron of one hidden layer."""

    def __init__(self, channels: int, expansion: int):
        super().__init__()
        self.mix = Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, expansion * channels)
        self.down = nn.Linear(expansion * channels, channels)

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:
        """[B, C, S], same length."""
        y, _ = self.mix(x, n)
        y = self.down(F.gelu(self.up(self.norm(rearrange(y, "b c s -> b s c")))))
        x = x + rearrange(y, "b s c -> b c s")
        return (x if n is None else cut(x, n)), n


class Decoder(nn.Module):
    """Latents [B, D, T] and their depths [B] to what shape lacks, in units of loudness: [B, step, S]."""

    def __init__(self, config: RVQMiniConfig):
        super().__init__()
        self.subframes = config.subframes
        self.inward = Conv1d(config.width, config.subframes * config.channels, 3, padding=1)
        self.depth = nn.Embedding(config.codebooks, config.channels)
        self.blocks = nn.ModuleList(
            ConvBlock(config.channels, config.expansion) for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(config.channels)
        self.outward = nn.Linear(config.channels, config.step)
        nn.init.zeros_(self.depth.weight)
        for block in self.blocks:
            nn.init.normal_(block.down.weight, std=0.02)

    def forward(self, z: Tensor, depths: Tensor, n: Tensor | None = None) -> Tensor:
        """n [B]: how many frames of each item are valid; None for all."""
        x, n = self.inward(z, n)
        x = (
            rearrange(x, "b (c s) t -> b c (t s)", s=self.subframes)
            + self.depth(depths - 1)[:, :, None]
        )
        n = None if n is None else n * self.subframes
        x = x if n is None else cut(x, n)
        for block in self.blocks:
            x, n = block(x, n)
        y = rearrange(self.outward(self.norm(rearrange(x, "b c s -> b s c"))), "b s k -> b k s")
        return y if n is None else cut(y, n)


class Latents(Exact):
    """Loudness and shape of a frame to a latent vector and back: two sets of principal components."""

    def __init__(self, config: RVQMiniConfig):
        super().__init__()
        self.config = c = config
        self.register_buffer("mean", torch.zeros(c.subframes * c.bands))
        self.register_buffer("loudness", torch.zeros(c.subframes * c.bands, c.loudness_width))
        self.register_buffer("shape", torch.zeros(c.subframes * c.coefficients, c.shape_width))

    def join(self, loudness: Tensor, shape: Tensor) -> Tensor:
        """Loudness [B, M, S] and shape [B, K, S] to latents [B, D, T]."""
        s = self.config.subframes
        loudness = rearrange(loudness, "b m (t s) -> b t (s m)", s=s) - self.mean
        shape = rearrange(shape, "b k (t s) -> b t (s k)", s=s)
        parts = loudness @ self.loudness, shape @ self.shape
        return rearrange(
            torch.cat([self.config.loudness_weight * parts[0], parts[1]], -1), "b t d -> b d t"
        )

    def part(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, D, T] to loudness [B, M, S] and shape [B, K, S]."""
        s, width = self.config.subframes, self.config.loudness_width
        z = rearrange(z, "b d t -> b t d")
        loudness = z[..., :width] / self.config.loudness_weight @ self.loudness.T + self.mean
        shape = z[..., width:] @ self.shape.T
        return (
            rearrange(loudness, "b t (s m) -> b m (t s)", s=s),
            rearrange(shape, "b t (s k) -> b k (t s)", s=s),
        )


class RVQMini(ResidualCodec):
    """Speech to N codes a frame and back."""

    system = "rvq"

    def __init__(
        self,
        config: RVQMiniConfig | None = None,
        *,
        name: str = "rvq/mini",
        licences: tuple[str, str] = ("Apache-2.0", "Apache-2.0"),
    ):
        super().__init__()
        self.config = c = config or RVQMiniConfig()
        self.transform = Transform(c)
        self.latents = Latents(c)
        self.tables = Table(c.codebooks, c.codebook_size, c.width)
        self.decoder = Decoder(c)
        self.spec = residual_spec(c, name, licences)

    # sound <-> latents

    def analyse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Samples [B, L] to loudness [B, M, S] and shape [B, K, S]."""
        loudness = self.transform.loudness(x)
        level = self.transform.level(loudness)
        shape = self.transform.coefficients(x) * torch.exp(-self.config.flatten / 2 * level)
        return loudness, shape[:, : self.config.coefficients]

    def encode_latents(self, x: Tensor) -> Tensor:
        """Samples [B, 1, L], whole frames, to latents [B, D, T]."""
        return self.latents.join(*self.analyse(x[:, 0].float()))

    # latents <-> codes

    def quantise(self, z: Tensor, depth: int, search: int | None = None) -> Tensor:
        """Latents [B, D, T] to codes [B, depth, T], `search` paths wide (by default as configured)."""
        search = self.config.search if search is None else search
        frames = rearrange(z, "b d t -> (b t) d")
        tables = [self.tables(i) for i in range(depth)]
        codes = torch.cat([best_path(part, tables, search) for part in frames.split(1024)])
        return rearrange(codes, "(b t) n -> b n t", b=len(z))

    def dequantise(self, codes: Tensor, keep: Tensor | None = None) -> Tensor:
        """Codes [B, n, T] to the sum of their vectors [B, D, T]; of item b only its first keep[b]."""
        total = torch.zeros((), device=codes.device)
        for i, part in enumerate(codes.unbind(1)):
            used = 1.0 if keep is None else (keep > i).float()[:, None, None]
            total = total + self.tables(i)[part] * used
        return rearrange(total, "b t d -> b d t")

    # latents to sound

    def spectrum(self, z: Tensor, depths: Tensor, n: Tensor | None = None) -> Tensor:
        """Latents [B, D, T] of depths [B] to MDCT coefficients [B, step, S]."""
        loudness, shape = self.latents.part(z.float())
        level = self.transform.level(loudness)
        known = shape * torch.exp((self.config.flatten - 1) / 2 * level[:, : shape.shape[1]])
        known = F.pad(known, (0, 0, 0, level.shape[1] - known.shape[1]))
        lacking = self.decoder(z.to(self.decoder.outward.weight.dtype), depths, n)
        return (known + lacking.float()) * torch.exp(level / 2)

    def synthesise(self, z: Tensor, depths: Tensor, n: Tensor | None = None) -> Tensor:
        """Latents [B, D, T] of depths [B] to samples [B, 1, L]."""
        spectrum = self.spectrum(z, depths, n)
        if n is not None:
            spectrum = cut(spectrum, n * self.config.subframes)
        return self.transform.samples(spectrum)[:, None].clamp(-1, 1)

    # the codec

    def tokenize(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Samples [B, 1, L] to codes [B, n, T], T = ⌈L / hop⌉; n = `depth`, or all N."""
        return self.quantise(self.encode_latents(self.pad(x)), self.depth(depth))

    def detokenize(self, codes: Tensor) -> Tensor:
        """Codes [B, n, T] of any depth n to samples [B, 1, T · hop] in [-1, 1]."""
        if not 1 <= codes.shape[1] <= self.config.codebooks:
            raise ValueError(
                f"codes are {codes.shape[1]} deep, expected 1 to {self.config.codebooks}"
            )
        depths = torch.full((len(codes),), codes.shape[1], device=codes.device)
        return self.synthesise(self.dequantise(codes), depths)

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """What each code of a depth adds to the latent: [V, D]."""
        return self.tables(depth)

    def encode_rows(self, rows: list[Tensor]) -> list[Tensor]:
        """Samples [L_i] to codes [T_i, N]; behind its end every row sees silence, alone or not."""
        hop = self.config.hop
        frames = [ceil(len(row) / hop) for row in rows]
        x = torch.stack([F.pad(row, (0, max(frames) * hop - len(row))) for row in rows])
        codes = self.tokenize(x[:, None].to(self.device))
        return [rearrange(c[:, :t], "n t -> t n").cpu() for c, t in zip(codes, frames)]

    def decode_rows(self, rows: list[Tensor]) -> list[Tensor]:
        """Codes [T_i, n_i] to samples [L_i], in one batch."""
        frames = torch.tensor([len(row) for row in rows], device=self.device)
        depths = torch.tensor([row.shape[1] for row in rows], device=self.device)
        z = [self.dequantise(rearrange(row, "t n -> 1 n t").to(self.device))[0] for row in rows]
        z = torch.stack([F.pad(row, (0, int(frames.max()) - row.shape[1])) for row in z])
        waves = self.synthesise(z, depths, frames if len(rows) > 1 else None)
        ends = (frames * self.config.hop).tolist()
        return [wave[0, :end].float().cpu() for wave, end in zip(waves, ends)]

    def margins(self) -> tuple[int, int]:
        """How many frames to either side a code, and a sample, depends on."""
        c = self.config
        around = (self.transform.window - c.step) / 2
        network = 1 + (3 * c.blocks + 1) / c.subframes
        return ceil(around / c.hop) + 1, ceil(network) + 1


def best_path(x: Tensor, tables: Sequence[Tensor], width: int) -> Tensor:
    """Codes [n, N] whose rows sum to x [n, d]: the best of the `width` paths that are kept after every table [V, d].

    One path is the usual greedy choice; four leave 13 % less of x at twelve tables.
    """
    residual = x[:, None]  # [n, paths, d]
    codes = torch.zeros(len(x), 1, 0, dtype=torch.long, device=x.device)
    for table in tables:
        paths = residual.shape[1]
        distance = table.square().sum(1) - 2 * (residual.flatten(0, 1) @ table.T)
        distance = distance.view(len(x), paths, -1) + residual.square().sum(-1, keepdim=True)
        best = distance.flatten(1).topk(min(width, paths * len(table)), largest=False).indices
        path, code = best // len(table), best % len(table)
        residual = torch.take_along_dim(residual, path[..., None], 1) - table[code]
        codes = torch.cat([torch.take_along_dim(codes, path[..., None], 1), code[..., None]], -1)
    return codes[:, 0]


def mdct(step: int, count: int) -> Tensor:
    """The lowest `count` basis functions of the MDCT with a sine window, orthonormal: [count, 2 · step]."""
    n, k = torch.arange(2 * step) + 0.5, torch.arange(count)[:, None] + 0.5
    window = torch.sin(torch.pi * n / (2 * step))
    return (2 / step) ** 0.5 * window * torch.cos(torch.pi / step * (n + step / 2) * k)


def interpolation(known: Tensor, wanted: Tensor) -> Tensor:
    """The matrix [wanted, known] that interpolates linearly between rising places, and holds the ends."""
    right = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
    left = right - 1
    share = ((wanted - known[left]) / (known[right] - known[left])).clamp(0, 1)
    matrix = torch.zeros(len(wanted), len(known))
    rows = torch.arange(len(wanted))
    matrix[rows, left] += 1 - share
    matrix[rows, right] += share
    return matrix


def build(files: Mapping[str, Weights], entry: Entry) -> RVQMini:
    """The codec of a registry row, or of a file that `save_codec` wrote."""
    weights = files["weights"]
    licences = (entry.code_licence, entry.weights_licence)
    codec = RVQMini(RVQMiniConfig(**entry.config), name=entry.name, licences=licences)  # type: ignore[arg-type]
    load_into(codec, weights.tensors, source=weights.source)
    return codec
