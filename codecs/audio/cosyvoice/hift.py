"""HiFT: mel spectra to samples (HiFTNet, arXiv 2309.09493; CosyVoice 1, 2, 3).

A neural source filter: pitch is predicted from the mel, sines of it and of its overtones are the source, and a network
shapes the source's short spectrum, which an inverse transform turns into samples.

    mel [M, T] ─ f0 ─▶ [T] ─ sines, noise ─▶ source [L] ─ STFT ─▶ [18, L / 4 + 1] ─────┐ added at every rate
    mel [M, T] ─ conv ─▶ [C, T] ─ up, residual blocks ─▶ … ─▶ [18, L / 4 + 1] ◀────────┘
    9 log magnitudes and 9 phases ─ inverse STFT ─▶ samples [L], L = T · hop

| version | rate | hop | ups | phase between frames | noise of the source | convolutions |
|---|---|---|---|---|---|---|
| v1 | 22,050 | 256 | 8 · 8 | summed over samples | Gaussian | both ways |
| v2 | 24,000 | 480 | 8 · 5 · 3 | linear | Gaussian | both ways |
| v3 | 24,000 | 480 | 8 · 5 · 3 | constant steps | one fixed uniform table | look 7 frames ahead, else back |

- The published sum of phases runs in float32, a hundred thousand radians after a minute; here it runs in float64 and
  whole turns are taken out. Published numbers agree to within their own rounding.
- v3 predicts pitch in float64, as published: what is final of a stream must not depend on what follows.
- Reflection, transforms and lengths are a row's own: a batch of unequal lengths equals the single calls.
- In half precision pitch would be wrong audibly, so the weights stay float32 whatever type a codec is cast to.

Letters: B batch, M mel bands, T frames, C channels, L samples, H = 9 the fundamental and its overtones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from ...layers.conv import Conv1d, ConvTranspose1d, Pair, cut, fuse_weight_norm, snake
from ...published import WeightsError, load_into

N_FFT, HOP = 16, 4  # of the short transform
BINS = N_FFT // 2 + 1
KERNELS, DILATIONS = (3, 7, 11), (1, 3, 5)  # of the residual blocks
SLOPE, LAST_SLOPE = 0.1, 0.01  # of the rectifiers
LIMIT = 0.99  # samples are clipped to
LOUDEST = 100.0  # magnitudes are clipped to
SINE, VOICED_NOISE, VOICED = (
    0.1,
    0.003,
    10.0,
)  # sine amplitude, noise beside it, Hz above which speech is voiced
F0_AHEAD, PRE_AHEAD = 3, 4  # frames that v3 looks ahead


@dataclass(frozen=True, kw_only=True)
class HiFTConfig:
    """Sizes of a vocoder, those of v2 if nothing is said.

    Args:
        version: which source and which convolutions (see the module).
        rate: samples a second.
        mels: M.
        channels: after the first convolution; halved at every stage.
        f0_channels: of the pitch predictor.
        ups: how often each stage repeats a position.
        up_kernels: of the stages' convolutions.
        source_kernels: of the residual block that the source goes through at each stage.
        harmonics: overtones beside the fundamental.
    """

    version: Literal["v1", "v2", "v3"] = "v2"
    rate: int = 24_000
    mels: int = 80
    channels: int = 512
    f0_channels: int = 512
    ups: tuple[int, ...] = (8, 5, 3)
    up_kernels: tuple[int, ...] = (16, 11, 7)
    source_kernels: tuple[int, ...] = (7, 7, 11)
    harmonics: int = 8

    def __post_init__(self):
        if self.version not in ("v1", "v2", "v3"):
            raise ValueError(f"version is {self.version!r}, expected v1, v2 or v3")
        if not len(self.ups) == len(self.up_kernels) == len(self.source_kernels):
            raise ValueError(
                f"ups {self.ups}, up_kernels {self.up_kernels} and source_kernels "
                f"{self.source_kernels} differ in length"
            )
        if self.channels % 2 ** len(self.ups):
            raise ValueError(
                f"channels is {self.channels}, expected a multiple of {2 ** len(self.ups)}"
            )

    @property
    def hop(self) -> int:
        """Samples of a mel frame."""
        return math.prod(self.ups) * HOP

    @property
    def causal(self) -> bool:
        """Whether convolutions look back only."""
        return self.version == "v3"


V1 = HiFTConfig(version="v1", rate=22_050, ups=(8, 8), up_kernels=(16, 16), source_kernels=(7, 11))
V2 = HiFTConfig()
V3 = HiFTConfig(version="v3")
PUBLISHED = {"v1": V1, "v2": V2, "v3": V3}


@dataclass(frozen=True)
class Noise:
    """The chance in a source: `phase` [B, H] in radians (v1 alone uses it), and `samples` [B, L, H]."""

    phase: Tensor
    samples: Tensor


class HiFT(nn.Module):
    """Mel spectra to samples."""

    def __init__(self, config: HiFTConfig = V2):
        super().__init__()
        self.config = c = config
        self.f0_predictor = PitchPredictor(c)
        self.m_source = nn.Module()
        self.m_source.l_linear = nn.Linear(c.harmonics + 1, 1)
        self.conv_pre = (
            Causal(c.mels, c.channels, PRE_AHEAD + 1, ahead=True)
            if c.causal
            else Conv1d(c.mels, c.channels, 7, padding=3)
        )
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        self.source_resblocks, self.resblocks = nn.ModuleList(), nn.ModuleList()
        width = c.channels
        for i, (up, kernel) in enumerate(zip(c.ups, c.up_kernels)):
            self.ups.append(up_conv(width, width // 2, kernel, up, c.causal))
            width //= 2
            later = math.prod(c.ups[i + 1 :])
            self.source_downs.append(down_conv(2 * BINS, width, later, c.causal))
            self.source_resblocks.append(ResBlock(width, c.source_kernels[i], c.causal))
            self.resblocks.extend(ResBlock(width, kernel, c.causal) for kernel in KERNELS)
        self.conv_post = conv(width, 2 * BINS, 7, 1, c.causal)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, object] | None = None,
        *,
        source: str = "<memory>",
    ) -> HiFT:
        """From `hift.pt`, with weight norm in any of its spellings, with or without `generator.` before the names.

        Args:
            config: what the tensors do not say, where it is not as published: {"rate": ..., "ups": ...}.

        Raises:
            WeightsError: another model's tensors.
        """
        state = {
            k.removeprefix("module.").removeprefix("generator."): v for k, v in state_dict.items()
        }
        state = fuse_weight_norm({k: v for k, v in state.items() if k not in ("epoch", "step")})
        model = cls(infer_config(state, config or {}, source))
        state = {k: v.float() if v.dtype == torch.float64 else v for k, v in state.items()}
        load_into(model, state, source=source)
        return model.eval()

    def forward(self, mel: Tensor, noise: Noise, n: Tensor | None = None) -> Tensor:
        """Mels [B, M, T], of which n [B] frames count (None: all), to samples [B, L], silent beyond a row's own."""
        return self.decode(mel, self.source(self.pitch(mel, n), noise), n)

    def pitch(self, mel: Tensor, n: Tensor | None = None) -> Tensor:
        """Mels [B, M, T] to pitch in Hz [B, T]; 0 beyond n."""
        if not self.config.causal:
            return self.f0_predictor(mel, n)
        wide = {k: v.double() for k, v in self.f0_predictor.state_dict(keep_vars=True).items()}
        return functional_call(self.f0_predictor, wide, (mel.double(), n)).to(mel.dtype)

    def source(self, f0: Tensor, noise: Noise) -> Tensor:
        """Pitch [B, T] in Hz to the source signal [B, L]."""
        return self.excite(f0, self.phases(f0, noise.phase), noise.samples)

    def phases(self, f0: Tensor, start: Tensor, before: Tensor | float = 0.0) -> Tensor:
        """Phases [B, L, H] in radians, whole turns taken out, of pitch [B, T].

        Args:
            start: phases [B, H] at the beginning of the item (v1; elsewhere the published code draws one that falls
                between the samples that it keeps).
            before: turns [B, H] (float64) that were made before the first frame.
        """
        steps, hop = self.steps(f0), self.config.hop
        if self.config.version == "v1":
            turns = before + steps.repeat_interleave(hop, 1).cumsum(1, dtype=torch.float64)
            return 2 * math.pi * (turns % 1).to(f0.dtype) + start[:, None]
        turns = before + hop * steps.cumsum(1, dtype=torch.float64)
        if self.config.causal:
            turns = turns.repeat_interleave(hop, 1)
        else:
            turns = F.interpolate(turns.mT, scale_factor=float(hop), mode="linear").mT
        return 2 * math.pi * (turns % 1).to(f0.dtype)

    def steps(self, f0: Tensor) -> Tensor:
        """Pitch [B, T] to turns a sample [B, T, H]."""
        order = torch.arange(1, self.config.harmonics + 2, device=f0.device)
        steps = f0[..., None] * order / self.config.rate
        return steps if self.config.version == "v1" else steps % 1

    def excite(self, f0: Tensor, phases: Tensor, noise: Tensor) -> Tensor:
        """Pitch [B, T], phases and noise [B, L, H] to the source [B, L]: sines where voiced, noise everywhere."""
        voiced = (f0 > VOICED).to(f0.dtype).repeat_interleave(self.config.hop, 1)[..., None]
        loudness = voiced * VOICED_NOISE + (1 - voiced) * SINE / 3
        waves = SINE * phases.sin() * voiced + loudness * noise
        return self.m_source.l_linear(waves)[..., 0].tanh()

    def decode(self, mel: Tensor, source: Tensor, n: Tensor | None = None) -> Tensor:
        """Mels [B, M, T] and source [B, L] to samples [B, L]."""
        c = self.config
        lengths = None if n is None else n * c.hop
        s, s_n = self._spectrum(source, lengths)
        x, n = self.conv_pre(mel if n is None else cut(mel, n), n)
        for i, (up, down, block) in enumerate(
            zip(self.ups, self.source_downs, self.source_resblocks)
        ):
            x, n = up(F.leaky_relu(x, SLOPE), n)
            if i == len(self.ups) - 1:
                x, n = F.pad(x, (1, 0), mode="reflect"), None if n is None else n + 1
            x = x + block(*down(s, s_n))[0]
            blocks = self.resblocks[i * len(KERNELS) : (i + 1) * len(KERNELS)]
            x = sum(other(x, n)[0] for other in blocks) / len(KERNELS)
        x, n = self.conv_post(F.leaky_relu(x, LAST_SLOPE), n)
        return self._samples(x, n).clamp(-LIMIT, LIMIT)

    def draw(self, frames: int, rng: torch.Generator) -> Noise:
        """Noise for `frames` frames of one item, B = 1, v3's from its fixed table where `rng` is at its start."""
        stream = SourceNoise(self.config, rng)
        return Noise(stream.phase[None], stream.draw(frames)[None])

    def stream(self, rng: torch.Generator | None = None) -> HiFTStream:
        """A vocoder for one mel that arrives in pieces."""
        return HiFTStream(self, SourceNoise(self.config, rng))

    def _spectrum(self, source: Tensor, n: Tensor | None) -> Pair:
        """Source [B, L] to real and imaginary parts [B, 18, L / 4 + 1]; each row reflected at its own end."""
        if n is None:
            parts = torch.view_as_real(self._stft(source))
            return rearrange(parts, "b k t two -> b (two k) t"), None
        rows = [self._stft(row[:length]) for row, length in zip(source, n.tolist())]
        rows = [rearrange(torch.view_as_real(row), "k t two -> t (two k)") for row in rows]
        return pad_sequence(rows, batch_first=True).mT, n // HOP + 1

    def _stft(self, x: Tensor) -> Tensor:
        return torch.stft(x, N_FFT, HOP, window=self.window, return_complex=True)

    def _samples(self, x: Tensor, n: Tensor | None) -> Tensor:
        """Log magnitudes and phases [B, 18, frames] to samples [B, L]."""
        size, angle = x.split(BINS, 1)
        spectrum = torch.polar(size.exp().clamp(max=LOUDEST), angle.sin())
        if n is None:
            return torch.istft(spectrum, N_FFT, HOP, window=self.window)
        rows = [
            torch.istft(row[:, :length], N_FFT, HOP, window=self.window)
            for row, length in zip(spectrum, n.tolist())
        ]
        return pad_sequence(rows, batch_first=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HiFT:
        def keep(t: Tensor) -> Tensor:
            moved = fn(t)
            narrow = moved.is_floating_point() and moved.dtype.itemsize < 4
            return t.to(moved.device) if narrow else moved

        return super()._apply(keep, recurse)


class SourceNoise:
    """The noise of one item's source, frame by frame, so that pieces equal the whole.

    Args:
        config: the vocoder's.
        rng: where it comes from; None is, for v3, the published table, and for others a generator of seed 0.
    """

    def __init__(self, config: HiFTConfig, rng: torch.Generator | None):
        self.config = config
        size = config.harmonics + 1
        if rng is None and config.version == "v3":
            rng = table_generator()
        self._rng = torch.Generator().manual_seed(0) if rng is None else rng
        self.phase = torch.zeros(size)
        if config.version == "v1":
            self.phase[1:] = (torch.rand(size, generator=self._rng)[1:] * 2 - 1) * math.pi

    def draw(self, frames: int) -> Tensor:
        """The next frames' noise [frames · hop, H]."""
        shape = (self.config.hop, self.config.harmonics + 1)
        kind = torch.rand if self.config.version == "v3" else torch.randn
        parts = [
            kind(shape, generator=self._rng, device=self._rng.device).cpu() for _ in range(frames)
        ]
        return torch.cat(parts) if parts else torch.empty(0, shape[1])


class HiFTStream:
    """A vocoder for one mel that arrives in pieces: memory stays constant, and the pieces join to `forward`'s result.

    A piece of sound is final as soon as nothing that can still come reaches it: 21 frames later in v2, 8 in v3.

    Args:
        vocoder: the network.
        noise: of the source.
    """

    def __init__(self, vocoder: HiFT, noise: SourceNoise):
        self._net, self._noise = vocoder, noise
        self._f0_reach, self._reach = f0_reach(vocoder.config), reach(vocoder.config)
        like = vocoder.conv_pre.weight
        self._mel = like.new_empty(1, vocoder.config.mels, 0)
        self._f0, self._source = like.new_empty(1, 0), like.new_empty(1, 0)
        self._base = 0  # the frame at which the buffers begin
        self._heard = self._f0_done = self._source_done = self._given = 0  # frames
        self._turns = torch.zeros(1, vocoder.config.harmonics + 1, dtype=torch.float64)

    @torch.no_grad()
    def push(self, mel: Tensor) -> Tensor:
        """Take frames [M, T]; return the samples [L] that have become final, maybe none."""
        self._mel = torch.cat([self._mel, mel[None].to(self._mel)], -1)
        self._heard += mel.shape[-1]
        return self._advance(last=False)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The rest [L]."""
        return self._advance(last=True)

    def _advance(self, *, last: bool) -> Tensor:
        self._predict(last)
        self._excite(last)
        left, right = self._reach
        stop = self._source_done - (0 if last else right)
        if stop <= self._given:
            return self._source.new_empty(0)
        hop, base = self._net.config.hop, self._base
        first = max(base, self._given - left)
        mel = self._mel[..., first - base : self._source_done - base]
        y = self._net.decode(mel, self._source[:, (first - base) * hop :])[0]
        y = y[(self._given - first) * hop : (stop - first) * hop]
        self._given = stop
        self._forget(max(0, stop - max(left, self._f0_reach[0], 1)))
        return y

    def _predict(self, last: bool) -> None:
        """Pitch, as far as it is final."""
        left, right = self._f0_reach
        stop = self._heard - (0 if last else right)
        if stop <= self._f0_done:
            return
        first = max(self._base, self._f0_done - left)
        f0 = self._net.pitch(self._mel[..., first - self._base :])
        self._f0 = torch.cat([self._f0, f0[:, self._f0_done - first : stop - first]], 1)
        self._f0_done = stop

    def _excite(self, last: bool) -> None:
        """The source, as far as it is final: between two frames a phase may need both."""
        ahead = 0 if last or self._net.config.version != "v2" else 1
        done, stop = self._source_done, self._f0_done - ahead
        if stop <= done:
            return
        first, hop = max(0, done - 1), self._net.config.hop
        f0 = self._f0[:, first - self._base :]
        noise = self._noise.draw(stop - done)[None].to(f0)
        start, before = self._noise.phase[None].to(f0), self._turns.to(f0.device)
        phases = self._net.phases(f0, start, before)
        phases = phases[:, (done - first) * hop : (stop - first) * hop]
        fresh = self._net.excite(f0[:, done - first : stop - first], phases, noise)
        self._source = torch.cat([self._source, fresh], 1)
        steps = self._net.steps(f0[:, : max(0, stop - 1) - first])
        self._turns = (before + hop * steps.sum(1, dtype=torch.float64)).cpu() % 1
        self._source_done = stop

    def _forget(self, first: int) -> None:
        """Drop what lies before a frame."""
        gone = first - self._base
        self._mel, self._f0 = self._mel[..., gone:].clone(), self._f0[:, gone:].clone()
        self._source = self._source[:, gone * self._net.config.hop :].clone()
        self._base = first


class PitchPredictor(nn.Module):
    """Mels [B, M, T] to Hz [B, T]."""

    def __init__(self, config: HiFTConfig):
        super().__init__()
        width, layers = config.f0_channels, []
        for i in range(5):
            before = width if i else config.mels
            if config.causal and not i:
                layers += [Causal(before, width, F0_AHEAD + 1, ahead=True), nn.ELU()]
            else:
                layers += [conv(before, width, 3, 1, config.causal), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, 1)

    def forward(self, x: Tensor, n: Tensor | None = None) -> Tensor:
        """0 beyond n."""
        x = x if n is None else cut(x, n)
        for layer in self.condnet:
            if isinstance(layer, nn.ELU):
                x = layer(x)
            else:
                x, n = layer(x, n)
        f0 = self.classifier(x.mT)[..., 0].abs()
        return f0 if n is None else cut(f0[:, None], n)[:, 0]


class ResBlock(nn.Module):
    """Three times two convolutions, the first of them dilated, plus the input: [B, C, L] -> [B, C, L]."""

    def __init__(self, channels: int, kernel: int, causal: bool):
        super().__init__()
        self.convs1 = nn.ModuleList(conv(channels, channels, kernel, d, causal) for d in DILATIONS)
        self.convs2 = nn.ModuleList(conv(channels, channels, kernel, 1, causal) for _ in DILATIONS)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in DILATIONS)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in DILATIONS)

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:
        """Lengths stay."""
        layers = (self.convs1, self.convs2, self.activations1, self.activations2)
        for conv1, conv2, act1, act2 in zip(*layers):
            y, _ = conv1(act1(x), n)
            y, _ = conv2(act2(y), n)
            x = x + y
        return x, n


class Snake(nn.Module):
    """x + sin²(alpha x) / alpha with alpha [C] of each channel; zeros stay zeros."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L], any L."""
        return snake(x, self.alpha[:, None])


class Causal(nn.Conv1d):
    """A convolution on `(x, n)` that looks back only, or ahead only; lengths stay."""

    def __init__(
        self, channels: int, out: int, kernel: int, *, dilation: int = 1, ahead: bool = False
    ):
        super().__init__(channels, out, kernel, dilation=dilation)
        room = (kernel - 1) * dilation
        self.room = (0, room) if ahead else (room, 0)

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:  # type: ignore[override]
        """[B, C, L] to [B, C', L]."""
        y = super().forward(F.pad(x, self.room))
        return (y, None) if n is None else (cut(y, n), n)


class CausalUp(nn.Conv1d):
    """Each position repeated, then a convolution that looks back only."""

    def __init__(self, channels: int, out: int, kernel: int, factor: int):
        super().__init__(channels, out, kernel)
        self.factor = factor

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:  # type: ignore[override]
        """[B, C, L] to [B, C', L · factor]."""
        x = x.repeat_interleave(self.factor, -1)
        y = super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))
        return (y, None) if n is None else (cut(y, n * self.factor), n * self.factor)


class CausalDown(nn.Conv1d):
    """A strided convolution that looks back, and half a kernel ahead."""

    def __init__(self, channels: int, out: int, factor: int):
        super().__init__(channels, out, 2 * factor, stride=factor)

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:  # type: ignore[override]
        """[B, C, k · factor + 1] to [B, C', k]."""
        factor = self.stride[0]
        y = super().forward(F.pad(x, (factor - 1, 0)))
        if n is None:
            return y, None
        n = (n - 1) // factor
        return cut(y, n), n


def conv(channels: int, out: int, kernel: int, dilation: int, causal: bool) -> nn.Conv1d:
    """A convolution of either kind that keeps lengths."""
    if causal:
        return Causal(channels, out, kernel, dilation=dilation)
    return Conv1d(channels, out, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)


def up_conv(channels: int, out: int, kernel: int, factor: int, causal: bool) -> nn.Module:
    """Between two rates: [B, C, L] -> [B, C', L · factor]."""
    if causal:
        return CausalUp(channels, out, kernel, factor)
    return ConvTranspose1d(channels, out, kernel, factor, padding=(kernel - factor) // 2)


def down_conv(channels: int, out: int, factor: int, causal: bool) -> nn.Conv1d:
    """The source's spectrum at a stage's rate."""
    if factor == 1:
        return Causal(channels, out, 1) if causal else Conv1d(channels, out, 1)
    if causal:
        return CausalDown(channels, out, factor)
    return Conv1d(channels, out, 2 * factor, stride=factor, padding=factor // 2)


def f0_reach(config: HiFTConfig) -> tuple[int, int]:
    """Frames before and after one on which its pitch depends."""
    return (8, F0_AHEAD) if config.causal else (5, 5)


def reach(config: HiFTConfig) -> tuple[int, int]:
    """Frames before and after one on which its samples depend, given the source; never too few."""
    c = config
    half = (sum(DILATIONS) + len(DILATIONS)) / 2  # of a residual block, a position of its kernel
    frames, rate = 0.0, 1
    for i, (up, kernel, source_kernel) in enumerate(zip(c.ups, c.up_kernels, c.source_kernels)):
        rate *= up
        later = math.prod(c.ups[i + 1 :])
        source = 2 * later * HOP / c.hop + half * (source_kernel - 1) / rate
        frames = max(frames + kernel / rate, source) + half * (max(KERNELS) - 1) / rate
    frames += (7 * HOP + 2 * N_FFT) / c.hop
    if c.causal:
        return math.ceil(2 * frames), PRE_AHEAD + 1
    return math.ceil(frames + 3), math.ceil(frames + 3)


TABLE_SEED = 0


def table_generator() -> torch.Generator:
    """The generator from which the published v3 drew its table of noise, at the table's beginning.

    The table is no part of the checkpoint: it is what the constructors left of seed 0 after the flow's table, the
    flow's embedding and the pitch predictor had drawn theirs, and one start phase of each sine.
    """
    rng = torch.Generator()
    rng.set_state(_table_state())
    return rng


@cache
def _table_state() -> Tensor:
    rng = torch.Generator().manual_seed(TABLE_SEED)
    # A number costs the generator one step whatever its distribution is, so plain draws can stand for all.
    flow = 80 * 15_000 + 6561 * 80 + (192 + 1) * 80
    predictor = 512 * (80 * 4 + 1) + 4 * 512 * (512 * 3 + 1) + 512 + 1
    torch.rand(flow + predictor + 9, generator=rng)
    return rng.get_state()


def infer_config(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str = "<memory>"
) -> HiFTConfig:
    """The config of a state dict with plain weights; `config` says what is not as published."""
    keys = ("conv_pre.weight", "ups.0.weight", "f0_predictor.condnet.0.weight")
    if missing := [k for k in keys if k not in tensors]:
        raise WeightsError(f"{source}: not a HiFT vocoder, {', '.join(missing)} missing")
    pre, f0 = tensors[keys[0]], tensors[keys[2]]
    stages = sum(f"ups.{i}.weight" in tensors for i in range(16))
    version = "v3" if f0.shape[2] == F0_AHEAD + 1 else "v1" if stages == 2 else "v2"
    wanted = str(config.get("version", version))
    if wanted != version:
        raise WeightsError(f"{source}: a HiFT {version}, expected a HiFT {wanted}")
    published = PUBLISHED[version]
    kernels = [tensors[f"source_resblocks.{i}.convs1.0.weight"].shape[2] for i in range(stages)]
    return HiFTConfig(
        version=version,  # type: ignore[arg-type]
        rate=int(config.get("rate", published.rate)),
        mels=pre.shape[1],
        channels=pre.shape[0],
        f0_channels=f0.shape[0],
        ups=tuple(config.get("ups", published.ups)),
        up_kernels=tuple(tensors[f"ups.{i}.weight"].shape[2] for i in range(stages)),
        source_kernels=tuple(kernels),
        harmonics=tensors["m_source.l_linear.weight"].shape[1] - 1,
    )
