"""S3 tokens: speech as 25 (or 50) supervised semantic tokens a second (CosyVoice 1, 2 and 3: arXiv 2407.05407,
2412.10117, 2505.17589; s3tokenizer 0.3.0 is the published PyTorch form).

The encoder half of a speech recogniser with a quantiser inside; the half that recognised is not published.

    samples [N] at 16 kHz ─ log-mel ─▶ [M, T] ─ two convolutions ─▶ [T', D] ─ blocks ─▶ [T', D] ─ quantiser ─▶ ids [T']

| version | blocks | positions | memory | quantiser |
|---|---|---|---|---|
| v1 (50 or 25 Hz) | 6 | sinusoids, added once | - | nearest of 4,096 rows, to the unit vector |
| v2 | 6 | rotated queries and keys | FSMN | 8 digits of 3 levels: 6,561 ids |
| v3 | 12 | as v2 | FSMN | as v2 |

- The first norm's epsilon is 1e-5 in s3tokenizer 0.3.0 and was 1e-6 for v2 in 0.2.0; an ONNX file tells its own.
- The log-mel's floor hangs on the loudest bin of the item, so features are computed item by item, then padded.
- A batch of unequal lengths equals the single calls: convolutions, memory and attention see no padding.
- Sound beyond 30 s goes through windows of 30 s that overlap by 4 s; at an inner edge 2 s of either window are dropped.
  Published code also starts a window that the one before it has covered already, and then loses up to 2 s of tokens at
  the end; here there is no such window. Otherwise the tokens are the same.
- There is no way back from a token: `cosyvoice/v2` makes speech of it with a voice, a flow and a vocoder.

Letters: B batch, N samples, M mel bands, T mel frames, T' tokens, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ....modalities.audio import Audio
from ....modalities.features import WhisperMel, whisper_mel
from ...codec import Codec, CodecSpec, CodecUnavailable, Rng
from ...layers.conv import Conv1d
from ...layout import Frames
from ...published import Weights, WeightsError, load_into
from ...quantizers.fsq import FSQ
from ...stream import TokenStream
from ..waveform import BATCH_WINDOWS, AudioOptions, in_batches, rows_of, source_meta
from .graph import constants, is_graph, s3_epsilon, s3_state_dict

if TYPE_CHECKING:
    from ...registry import Entry

RATE, HOP = 16_000, 160  # samples a second, samples a mel frame
SHORTEST = 201  # samples: the log-mel reflects half a window at either end
WINDOW, OVERLAP = 3000, 400  # mel frames: 30 s and 4 s
PADDING = 1.15  # a batch's longest to its shortest: time on a CPU goes with padded length
MEMORY = 31  # tokens that the FSMN's kernel spans
# tanh times this; the published constant is 0.999 in float32, written out.
BOUND = 0.9990000128746033
LAYERS = {"v1": 6, "v2": 6, "v3": 12}  # of the published models
PUBLISHED_WIDTH = 1280


@dataclass(frozen=True, kw_only=True)
class S3Config:
    """Sizes of an S3 tokenizer, those of v2 if nothing is said.

    Args:
        version: which network (see the module).
        mels: M.
        width: D.
        heads: H.
        layers: blocks.
        rate: tokens a second, 25 or 50.
        codes: vocabulary; a power of 3 but for v1.
        positions: rows of v1's table of sinusoids.
        attn_eps: of the norm before attention.
    """

    version: Literal["v1", "v2", "v3"] = "v2"
    mels: int = 128
    width: int = 1280
    heads: int = 20
    layers: int = 6
    rate: int = 25
    codes: int = 6561
    positions: int = 1500
    attn_eps: float = 1e-5

    def __post_init__(self):
        if self.version not in LAYERS:
            raise ValueError(f"version is {self.version!r}, expected one of {', '.join(LAYERS)}")
        if self.rate not in (25, 50):
            raise ValueError(f"rate is {self.rate}, expected 25 or 50 tokens a second")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width is {self.width}, expected a multiple of 2 · heads = {2 * self.heads}"
            )
        if self.version != "v1" and 3**self.digits != self.codes:
            raise ValueError(f"codes is {self.codes}, expected a power of 3 for {self.version}")
        if self.version == "v1" and self.positions < 30 * self.rate:
            raise ValueError(
                f"positions is {self.positions}, expected {30 * self.rate} or more for 30 s"
            )

    @property
    def digits(self) -> int:
        """Numbers a code of v2 and v3."""
        return round(math.log(self.codes, 3))


V1 = S3Config(version="v1", rate=50, codes=4096)
V1_25HZ = S3Config(version="v1", codes=4096)
V2 = S3Config(version="v2")
V3 = S3Config(version="v3", layers=12)


class S3Tokenizer(Codec):
    """Speech to tokens; it does not decode."""

    system = "cosyvoice-s3"

    def __init__(
        self,
        config: S3Config,
        *,
        name: str = "cosyvoice/s3-custom",
        licences: tuple[str, str] = ("Apache-2.0", "unknown"),
    ):
        super().__init__()
        self.config = c = config
        self.encoder = Encoder(c)
        self.quantizer = Nearest(c) if c.version == "v1" else Digits(c)
        self.spec = CodecSpec(
            name=name,
            modality="audio",
            vocab=((c.codes,),),
            layout=Frames(),
            decodes=False,
            rate=float(c.rate),
            size=(RATE,),
            code_licence=licences[0],
            weights_licence=licences[1],
        )

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, object] | None = None,
        *,
        name: str = "cosyvoice/s3-custom",
        licences: tuple[str, str] = ("Apache-2.0", "unknown"),
        source: str = "<memory>",
    ) -> S3Tokenizer:
        """From the published state dict.

        Args:
            config: what the tensors do not say: {"rate": 25 or 50} for v1; "version", where the depth is not a
                published one; "attn_eps".

        Raises:
            WeightsError: another model's tensors, or another version's.
        """
        c = infer_config(state_dict, config or {}, source)
        codec = cls(c, name=name, licences=licences)
        codec.to(state_dict["encoder.conv1.weight"].dtype)
        fixed = {k: v for k, v in codec.state_dict().items() if k.endswith("positional_embedding")}
        load_into(codec, {**fixed, **state_dict}, source=source)
        return codec.eval()

    @torch.no_grad()
    def encode(
        self,
        media: Sequence[Audio],
        *,
        options: None = None,
        rng: Rng | None = None,
    ) -> list[TokenStream]:
        """Sounds to streams of one token each 40 (or 20) ms.

        Channels are averaged, any rate is resampled to 16 kHz, and a sound below 13 ms is filled up with silence.

        Raises:
            ValueError: an empty sound, or NaN or infinite samples.
        """
        rows = [self._row(item) for item in media]
        codes = in_batches(rows, self._encode_rows, self._encode_long, (WINDOW + 1) * HOP - 1)
        return [
            self.stream(ids, grid=(len(ids),), meta=source_meta(item, 1))
            for item, ids in zip(media, codes)
        ]

    def decode(
        self, streams: Sequence[TokenStream], *, options: None = None, rng: Rng | None = None
    ) -> list[Audio]:
        """Always CodecUnavailable: the tokens have no dequantiser."""
        whole = f"cosyvoice/{self.config.version}"
        raise CodecUnavailable(
            f"'{self.spec.name}' only encodes: S3 tokens have no dequantiser; "
            f"the model directory '{whole}' decodes them with a voice (as 'cosyvoice/v2' does for v2)"
        )

    def tokenize(self, x: Tensor, n: Tensor | None = None) -> Tensor:
        """Log-mels [B, M, T] with n [B] valid frames (None: all) to ids [B, T'], of which `tokens(n)` count."""
        if x.shape[-1] <= WINDOW:
            return self.quantizer.ids(self.encoder(x, n)[0])
        ends = [x.shape[-1]] * len(x) if n is None else n.tolist()
        rows = [self._windows(mel[:, :end], end) for mel, end in zip(x, ends)]
        return pad_sequence(rows, batch_first=True).to(x.device)

    def tokens(self, frames: int) -> int:
        """T' of T mel frames."""
        for conv in (self.encoder.conv1, self.encoder.conv2):
            frames = (frames - 1) // conv.stride[0] + 1
        return frames

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """The quantiser's own vectors, since nothing published decodes: rows [V, D] of v1, digits [V, 8] of v2, v3."""
        return self.quantizer.vectors()

    def _row(self, audio: Audio) -> Tensor:
        """Mono samples [N] at 16 kHz, N ≥ SHORTEST."""
        (row,) = rows_of(audio, RATE, AudioOptions())
        return F.pad(row, (0, max(0, SHORTEST - len(row))))

    def _encode_rows(self, rows: list[Tensor]) -> list[Tensor]:
        """Samples [N_i] to ids [T'_i], in one batch."""
        mels = [whisper_mel(row, WhisperMel(n_mels=self.config.mels)) for row in rows]
        return self._tokenize_rows(mels)

    def _encode_long(self, row: Tensor) -> Tensor:
        mel = LongMel(row, self.config.mels)
        return self._windows(mel, mel.frames)

    def _tokenize_rows(self, mels: list[Tensor]) -> list[Tensor]:
        """Log-mels [M, T_i] to ids [T'_i] on the CPU, neighbours of about one length in a pass."""
        ids: list[Tensor] = []
        while group := alike(mels[len(ids) :]):
            x = pad_sequence([mel.T for mel in group], batch_first=True).mT
            frames = [mel.shape[1] for mel in group]
            n = None if len(set(frames)) == 1 else torch.tensor(frames, device=self.device)
            rows = self.tokenize(x.to(self.device, self.dtype), n)
            ids += [row[: self.tokens(t)].cpu() for row, t in zip(rows, frames)]
        return ids

    def _windows(self, mel: Tensor | LongMel, frames: int) -> Tensor:
        """A log-mel of more than 30 s, sliced by `mel[:, start:stop]`, to ids [T']."""
        starts = window_starts(frames)
        kept = []
        for group in (starts[i : i + BATCH_WINDOWS] for i in range(0, len(starts), BATCH_WINDOWS)):
            windows = [mel[:, start : min(start + WINDOW, frames)] for start in group]
            kept += self._tokenize_rows(windows)
        return join_windows(kept, self.config.rate * OVERLAP * HOP // RATE // 2)


def alike(mels: Sequence[Tensor]) -> list[Tensor]:
    """The first of `mels` [M, T_i] and those right after it that hardly need padding beside it."""
    group: list[Tensor] = []
    for mel in mels:
        lengths = [mel.shape[1], *(m.shape[1] for m in group)]
        if max(lengths) > PADDING * min(lengths) + 50:
            break
        group.append(mel)
    return group


def window_starts(frames: int) -> list[int]:
    """First frames of the windows that a log-mel of so many frames takes."""
    return list(range(0, max(1, frames - OVERLAP), WINDOW - OVERLAP))


def join_windows(ids: Sequence[Tensor], edge: int) -> Tensor:
    """Ids of overlapping windows to one row, `edge` tokens dropped on either side of each inner edge."""
    last = len(ids) - 1
    return torch.cat([x[edge * (i > 0) : len(x) - edge * (i < last)] for i, x in enumerate(ids)])


class LongMel:
    """Whisper's log-mel of a long sound, made where it is sliced: `mel[:, start:stop]`.

    Two passes over the samples, the first for the loudest bin of the whole; never more than a window in memory.
    """

    def __init__(self, samples: Tensor, mels: int):
        self.samples = samples
        self.frames = len(samples) // HOP
        self._config = WhisperMel(n_mels=mels)
        self._open = WhisperMel(n_mels=mels, dynamic_range=math.inf)
        spans = (slice(t, min(t + WINDOW, self.frames)) for t in range(0, self.frames, WINDOW))
        self._peak = max(self._raw(span).max() for span in spans)

    def __getitem__(self, where: tuple[slice, slice]) -> Tensor:
        # Features are (log + 4) / 4, so the range counts a quarter.
        return self._raw(where[1]).clamp(min=self._peak - self._config.dynamic_range / 4)

    def _raw(self, span: slice) -> Tensor:
        """Frames of the log-mel without its floor; two more on either side hold what reflection would touch."""
        first = max(0, span.start - 2)
        piece = self.samples[first * HOP : (span.stop + 2) * HOP]
        piece = F.pad(piece, (0, max(0, SHORTEST - len(piece))))
        return whisper_mel(piece, self._open)[:, span.start - first : span.stop - first]


class Encoder(nn.Module):
    """Log-mels [B, M, T] to hidden states [B, T', D]; there is no final norm."""

    def __init__(self, config: S3Config):
        super().__init__()
        c = config
        self.conv1 = Conv1d(c.mels, c.width, 3, stride=50 // c.rate, padding=1)
        self.conv2 = Conv1d(c.width, c.width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        if c.version == "v1":
            self.register_buffer("positional_embedding", sinusoids(c.positions, c.width))
        else:
            self.positional_embedding = None
        self.head_width = c.width // c.heads

    def forward(self, x: Tensor, n: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Also n [B]: valid frames in, valid hidden states out (None: all)."""
        if n is not None:
            x = x.masked_fill(_beyond(x.shape[-1], n)[:, None], 0)
        for conv in (self.conv1, self.conv2):
            x, n = conv(x, n)
            x = F.gelu(x)
        x = x.mT
        length = x.shape[1]
        beyond = None if n is None else _beyond(length, n)
        rotation = None
        if self.positional_embedding is None:
            rotation = rotary(length, self.head_width, x)
        else:
            x = x + self.positional_embedding[:length].to(x.dtype)
        for block in self.blocks:
            x = block(x, beyond, rotation)
        return x, n


class Block(nn.Module):
    """Pre-norm transformer block [B, T', D] -> [B, T', D]."""

    def __init__(self, config: S3Config):
        super().__init__()
        c = config
        self.attn_ln = nn.LayerNorm(c.width, eps=c.attn_eps)
        self.attn = Attention(c) if c.version == "v1" else MemoryAttention(c)
        self.mlp_ln = nn.LayerNorm(c.width)
        self.mlp = nn.Sequential(
            nn.Linear(c.width, 4 * c.width), nn.GELU(), nn.Linear(4 * c.width, c.width)
        )

    def forward(self, x: Tensor, beyond: Tensor | None, rotation: Tensor | None) -> Tensor:
        """`beyond` [B, T'] is True on padding; `rotation` as `rotary` makes it."""
        x = x + self.attn(self.attn_ln(x), beyond, rotation)
        return x + self.mlp(self.mlp_ln(x))


class Attention(nn.Module):
    """Whisper's: the key projection has no bias."""

    def __init__(self, config: S3Config):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, beyond: Tensor | None, rotation: Tensor | None) -> Tensor:
        """[B, T', D] -> [B, T', D]."""
        return self.out(self._attend(x, self.value(x), beyond, rotation))

    def _attend(
        self, x: Tensor, v: Tensor, beyond: Tensor | None, rotation: Tensor | None
    ) -> Tensor:
        q, k, v = (
            rearrange(y, "b t (h d) -> b h t d", h=self.heads)
            for y in (self.query(x), self.key(x), v)
        )
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mask = None if beyond is None else ~beyond[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return rearrange(y, "b h t d -> b t (h d)")


class MemoryAttention(Attention):
    """With a feedforward sequential memory (FSMN, arXiv 1512.08301): values filtered over time, channel by channel."""

    def __init__(self, config: S3Config):
        super().__init__(config)
        width = config.width
        self.fsmn_block = nn.Conv1d(
            width, width, MEMORY, padding=MEMORY // 2, groups=width, bias=False
        )

    def forward(self, x: Tensor, beyond: Tensor | None, rotation: Tensor | None) -> Tensor:
        """[B, T', D] -> [B, T', D]."""
        v = self.value(x)
        attended = self.out(self._attend(x, v, beyond, rotation))
        v = v if beyond is None else v.masked_fill(beyond[..., None], 0)
        memory = self.fsmn_block(v.mT).mT + v
        # What the kernel carries into the padding need not be cut: nothing reads it.
        return attended + memory


class Nearest(nn.Module):
    """v1: the row of a codebook that is nearest to the hidden state's direction."""

    def __init__(self, config: S3Config):
        super().__init__()
        self._codebook = nn.Module()
        rows = torch.randn(config.codes, config.width) / config.width**0.5
        self._codebook.register_buffer("embed", rows)

    def ids(self, x: Tensor) -> Tensor:
        """[..., D] to ids [...]; of equal distances the first."""
        x, rows = F.normalize(x.float(), dim=-1), self._codebook.embed.float()
        squares = x.square().sum(-1, keepdim=True) + rows.square().sum(1)
        return (squares - 2 * x @ rows.T).argmin(-1)

    def vectors(self) -> Tensor:
        """[V, D]."""
        return self._codebook.embed


class Rounding(FSQ):
    """FSQ with S3's bound, whose thresholds are others than the paper's: 0.999 · tanh."""

    def bound(self, z: Tensor) -> Tensor:
        """Squash [..., d] (float32)."""
        return torch.tanh(z) * BOUND


class Digits(nn.Module):
    """v2, v3: a projection, and each number of it rounded to -1, 0 or 1; the first is the least digit of the id."""

    def __init__(self, config: S3Config):
        super().__init__()
        self._codebook = nn.Module()
        self._codebook.project_down = nn.Linear(config.width, config.digits)
        self.rounding = Rounding([3] * config.digits)

    def project(self, x: Tensor) -> Tensor:
        """[..., D] to the numbers that are rounded, before the bound: [..., 8]."""
        return self._codebook.project_down(x)

    def ids(self, x: Tensor) -> Tensor:
        """[..., D] to ids [...]."""
        return self.rounding.ids(self.project(x))

    def vectors(self) -> Tensor:
        """[V, 8] of -1, 0, 1."""
        return self.rounding.vectors(
            torch.arange(self.rounding.size, device=self._codebook.project_down.weight.device)
        )


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper's table [length, width]: sines of all frequencies, then cosines."""
    step = math.log(10_000) / (width // 2 - 1)
    frequencies = torch.exp(-step * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def rotary(length: int, width: int, like: Tensor) -> Tensor:
    """Cosines and sines of each position's angles, [2, T', width], both halves alike."""
    frequencies = 10_000 ** -(torch.arange(0, width, 2, device=like.device) / width)
    angles = torch.arange(length, device=like.device)[:, None] * frequencies
    angles = torch.cat([angles, angles], 1)
    return torch.stack([angles.cos(), angles.sin()]).to(like.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn [..., T', d] in the planes of channels i and i + d / 2."""
    cos, sin = rotation
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def infer_config(
    tensors: Mapping[str, Tensor], config: Mapping[str, object], source: str = "<memory>"
) -> S3Config:
    """The config of a published state dict; `config` says what the tensors do not (see `from_published`)."""
    conv, book = tensors.get("encoder.conv1.weight"), tensors.get("quantizer._codebook.embed")
    down = tensors.get("quantizer._codebook.project_down.weight")
    blocks = {k.split(".")[2] for k in tensors if k.startswith("encoder.blocks.")}
    if conv is None or not blocks or (book is None and down is None):
        raise WeightsError(
            f"{source}: not an S3 tokenizer: encoder.conv1.weight, encoder.blocks and quantizer._codebook expected"
        )
    width, mels = conv.shape[0], conv.shape[1]
    version = "v1" if book is not None else "v3" if len(blocks) == LAYERS["v3"] else "v2"
    wanted = str(config.get("version", version))
    other_quantizer = (wanted == "v1") != (version == "v1")
    # v2 and v3 differ in depth alone.
    other_depth = width == PUBLISHED_WIDTH and len(blocks) != LAYERS.get(wanted)
    if other_quantizer or other_depth:
        raise WeightsError(
            f"{source}: {len(blocks)} blocks of an S3 {version}, expected an S3 {wanted}"
        )
    table = tensors.get("encoder.positional_embedding")
    rate = config.get("rate", 50 if version == "v1" else 25)
    return S3Config(
        version=wanted,  # type: ignore[arg-type]
        mels=mels,
        width=width,
        heads=width // 64,
        layers=len(blocks),
        rate=int(rate),  # type: ignore[call-overload]
        codes=book.shape[0] if book is not None else 3 ** down.shape[0],  # type: ignore[union-attr]
        positions=1500 if table is None else table.shape[0],
        attn_eps=float(config.get("attn_eps", 1e-5)),  # type: ignore[arg-type]
    )


def build(files: Mapping[str, Weights], entry: Entry) -> S3Tokenizer:
    """The codec of a registry row, or of a file that `save_codec` wrote."""
    weights = files["weights"]
    licences = (entry.code_licence, entry.weights_licence)
    if weights.config:
        codec = S3Tokenizer(S3Config(**entry.config), name=entry.name, licences=licences)
        load_into(codec, weights.tensors, source=weights.source)
        return codec.eval()
    tensors, config = weights.tensors, dict(entry.config)
    if is_graph(weights):
        graph = constants(tensors)
        tensors = s3_state_dict(graph)
        config.update(s3_epsilon(graph))
    return S3Tokenizer.from_published(
        tensors, config, name=entry.name, licences=licences, source=weights.source
    )


def _beyond(length: int, n: Tensor) -> Tensor:
    """[B, length], True from n on."""
    return torch.arange(length, device=n.device) >= n[:, None]
