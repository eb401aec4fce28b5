"""DAC: a convolutional waveform autoencoder with residual vector quantisation (Kumar et al., arXiv 2306.06546;
descript-audio-codec 1.0.0). One network codes mono sound of any kind; the first n codes of a frame decode too.

    samples [B, 1, L] ─ encoder ─▶ latents [B, D, T] ─ N codebooks ─▶ codes [B, N, T] ─ Σ ─▶ decoder ─▶ [B, 1, L']

- `encode` is the published `encode`: one pass over the whole signal, padded on the right to whole frames, no loudness
  normalisation. The published `compress` (1 s windows, -16 dB) gives other codes and is not followed.
- A stride of 5 (the 16 and 24 kHz models) makes the decoder lose samples: one at its level, 8 at the end. `detokenize`
  returns what the network gives, T · hop - 8; `decode` restores the source's length with zeros where that is short.
- Any rate is resampled to the model's and back; several channels are mixed, or coded one by one (`AudioOptions`).
- Sound longer than a window goes through `encoder_stream`, whose windows overlap by what the network can see.

Letters: B batch, L samples, T frames, D latent width, N codebooks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..layers.conv import (
    Chain,
    Conv1d,
    ConvTranspose1d,
    Pair,
    Snake,
    fuse_weight_norm,
)
from ..published import Weights, WeightsError, load_into
from ..quantizers.rvq import ResidualVQ
from .residual import ResidualCodec, residual_spec
from .windows import reach

if TYPE_CHECKING:
    from ..registry import Entry

DILATIONS = (1, 3, 9)
# The Hugging Face port's names of a block's layers, in our order.
_UNIT = ("snake1", "conv1", "snake2", "conv2")
_LAYERS = {
    "encoder": ("res_unit1", "res_unit2", "res_unit3", "snake1", "conv1"),
    "decoder": ("snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3"),
}


@dataclass(frozen=True, kw_only=True)
class DACConfig:
    """Sizes of a DAC; all but `sample_rate` can be read off the weights (`infer_config`)."""

    sample_rate: int = 16_000
    encoder_dim: int = 64
    encoder_rates: tuple[int, ...] = (2, 4, 5, 8)
    decoder_dim: int = 1536
    decoder_rates: tuple[int, ...] = (8, 5, 4, 2)
    latent_dim: int = 1024
    codebooks: int = 12
    codebook_size: int = 1024
    codebook_dim: int = 8

    def __post_init__(self):
        object.__setattr__(self, "encoder_rates", tuple(self.encoder_rates))
        object.__setattr__(self, "decoder_rates", tuple(self.decoder_rates))
        if prod(self.encoder_rates) != prod(self.decoder_rates):
            raise ValueError(
                f"encoder_rates {self.encoder_rates} and decoder_rates {self.decoder_rates} "
                "multiply to different hops"
            )

    @property
    def hop(self) -> int:
        """Samples in a frame."""
        return prod(self.encoder_rates)


class DAC(ResidualCodec):
    """Sound to N codes a frame and back."""

    system = "dac"

    def __init__(
        self,
        config: DACConfig,
        *,
        name: str = "dac/custom",
        licences: tuple[str, str] = ("Apache-2.0", "unknown"),
    ):
        super().__init__()
        self.config = c = config
        self.encoder = Encoder(c)
        self.quantizer = ResidualVQ(
            c.latent_dim, stages=c.codebooks, size=c.codebook_size, dim=c.codebook_dim
        )
        self.decoder = Decoder(c)
        self.spec = residual_spec(config, name, licences)

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, object] | None = None,
        *,
        name: str = "dac/custom",
        licences: tuple[str, str] = ("MIT", "MIT"),
        source: str = "<memory>",
    ) -> DAC:
        """From the official file's tensors or the Hugging Face port's, weight-normed or fused.

        Args:
            config: {"sample_rate": ...}, which the tensors do not say; 44,100 where missing.
        """
        tensors = fuse_weight_norm(state_dict)
        if "encoder.conv1.weight" in tensors:
            blocks = len({k.split(".")[2] for k in tensors if k.startswith("encoder.block.")})
            tensors = {_official_name(key, blocks): value for key, value in tensors.items()}
        rate = int((config or {}).get("sample_rate", 44_100))  # type: ignore[call-overload]
        codec = cls(infer_config(tensors, rate), name=name, licences=licences)
        codec.to(tensors["encoder.block.0.weight"].dtype)
        load_into(codec, tensors, source=source)
        return codec.eval()

    def tokenize(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Samples [B, 1, L] to codes [B, n, T], T = ⌈L / hop⌉; n = `depth`, or all N."""
        latents, _ = self.encoder(self.pad(x))
        return self.quantizer.encode(latents, self.depth(depth))

    def detokenize(self, codes: Tensor) -> Tensor:
        """Codes [B, n, T] of any depth n to samples [B, 1, L'] in [-1, 1]; L' = T · hop less what odd strides lose."""
        return self.decoder(self.quantizer.decode(codes))[0]

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """The projected codebook rows [V, D] of a depth; a frame's latent is their sum over depths."""
        return self.quantizer.vectors(depth)

    def encode_rows(self, rows: list[Tensor]) -> list[Tensor]:
        """Samples [L_i] to codes [T_i, N], in one batch."""
        hop = self.config.hop
        frames = [ceil(len(row) / hop) for row in rows]
        x = torch.stack([F.pad(row, (0, max(frames) * hop - len(row))) for row in rows])
        n = torch.tensor([t * hop for t in frames], device=self.device) if len(rows) > 1 else None
        latents, _ = self.encoder(x[:, None].to(self.device, self.dtype), n)
        codes = self.quantizer.encode(latents)
        return [rearrange(c[:, :t], "n t -> t n").cpu() for c, t in zip(codes, frames)]

    def decode_rows(self, rows: list[Tensor]) -> list[Tensor]:
        """Codes [T_i, n_i] to samples [L_i], in one batch."""
        latents = [
            self.quantizer.decode(rearrange(row, "t n -> 1 n t").to(self.device))[0] for row in rows
        ]
        frames = [len(row) for row in rows]
        z = torch.stack([F.pad(row, (0, max(frames) - row.shape[1])) for row in latents])
        n = torch.tensor(frames, device=self.device) if len(rows) > 1 else None
        x, n = self.decoder(z, n)
        ends = [None] * len(rows) if n is None else n.tolist()
        return [wave[0, :end].float().cpu() for wave, end in zip(x, ends)]

    def margins(self) -> tuple[int, int]:
        """How many frames to either side a code, and a sample, depends on."""
        hop = self.config.hop
        encoder, decoder = reach(self.encoder, 1), reach(self.decoder, hop)
        return ceil(encoder / hop) + 1, ceil(decoder / hop) + 1


class Encoder(nn.Module):
    """[B, 1, L] to [B, D, L / hop]: a convolution, a block a stride (channels double), a convolution."""

    def __init__(self, config: DACConfig):
        super().__init__()
        channels = config.encoder_dim
        layers: list[nn.Module] = [Conv1d(1, channels, 7, padding=3)]
        for stride in config.encoder_rates:
            layers.append(EncoderBlock(channels, stride))
            channels *= 2
        layers += [Snake(channels), Conv1d(channels, config.latent_dim, 3, padding=1)]
        self.block = Chain(*layers)

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:
        """Samples and their valid lengths to latents and theirs."""
        return self.block(x, n)


class Decoder(nn.Module):
    """[B, D, T] to [B, 1, T · hop] in [-1, 1]: the encoder's mirror, channels halve at each stride."""

    def __init__(self, config: DACConfig):
        super().__init__()
        channels = config.decoder_dim
        layers: list[nn.Module] = [Conv1d(config.latent_dim, channels, 7, padding=3)]
        for stride in config.decoder_rates:
            layers.append(DecoderBlock(channels, stride))
            channels //= 2
        layers += [Snake(channels), Conv1d(channels, 1, 7, padding=3)]
        self.model = Chain(*layers)

    def forward(self, z: Tensor, n: Tensor | None = None) -> Pair:
        """Latents and their valid lengths to samples and theirs."""
        x, n = self.model(z, n)
        return torch.tanh(x), n


class ResidualUnit(nn.Module):
    """x + Snake, dilated convolution k7, Snake, convolution k1."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.block = Chain(
            Snake(channels),
            Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            Snake(channels),
            Conv1d(channels, channels, 1),
        )

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:
        """[B, C, L], same length."""
        y, n = self.block(x, n)
        return x + y, n


class EncoderBlock(nn.Module):
    """Three residual units, then a strided convolution C -> 2C."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.block = Chain(
            *[ResidualUnit(channels, d) for d in DILATIONS],
            Snake(channels),
            Conv1d(channels, 2 * channels, 2 * stride, stride=stride, padding=ceil(stride / 2)),
        )

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:
        """[B, C, L] to [B, 2C, L / stride]."""
        return self.block(x, n)


class DecoderBlock(nn.Module):
    """A strided transposed convolution C -> C / 2, then three residual units."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        half = channels // 2
        self.block = Chain(
            Snake(channels),
            ConvTranspose1d(channels, half, 2 * stride, stride=stride, padding=ceil(stride / 2)),
            *[ResidualUnit(half, d) for d in DILATIONS],
        )

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:
        """[B, C, L] to [B, C / 2, L · stride], one sample less where the stride is odd."""
        return self.block(x, n)


def infer_config(tensors: Mapping[str, Tensor], sample_rate: int) -> DACConfig:
    """The config of a state dict with our (the official) names and plain weights."""

    def weight(pattern: str) -> list[Tensor]:
        found = [(re.fullmatch(pattern, k), v) for k, v in tensors.items()]
        return [v for m, v in sorted(((m, v) for m, v in found if m), key=lambda p: int(p[0][1]))]

    down = weight(r"encoder\.block\.(\d+)\.block\.4\.weight")
    up = weight(r"decoder\.model\.(\d+)\.block\.1\.weight")
    books = weight(r"quantizer\.quantizers\.(\d+)\.codebook\.weight")
    ends = [tensors.get(k) for k in ("encoder.block.0.weight", "decoder.model.0.weight")]
    if not (down and up and books) or ends[0] is None or ends[1] is None:
        raise WeightsError(
            f"not a DAC state dict: found {len(down)} encoder blocks, {len(up)} decoder blocks, {len(books)} codebooks"
        )
    return DACConfig(
        sample_rate=sample_rate,
        encoder_dim=ends[0].shape[0],
        encoder_rates=tuple(w.shape[2] // 2 for w in down),
        decoder_dim=ends[1].shape[0],
        decoder_rates=tuple(w.shape[2] // 2 for w in up),
        latent_dim=ends[1].shape[1],
        codebooks=len(books),
        codebook_size=books[0].shape[0],
        codebook_dim=books[0].shape[1],
    )


def build(files: Mapping[str, Weights], entry: Entry) -> DAC:
    """The codec of a registry row, or of a file that `save_codec` wrote."""
    weights = files["weights"]
    licences = (entry.code_licence, entry.weights_licence)
    if not weights.config:
        return DAC.from_published(
            weights.tensors,
            entry.config,
            name=entry.name,
            licences=licences,
            source=weights.source,
        )
    codec = DAC(DACConfig(**entry.config), name=entry.name, licences=licences)  # type: ignore[arg-type]
    load_into(codec, weights.tensors, source=weights.source)
    return codec


def _official_name(key: str, blocks: int) -> str:
    """The official name of a key of the Hugging Face port, for a model with so many encoder blocks."""
    side, *rest = key.split(".")
    if side not in _LAYERS:
        return key
    stem = "encoder.block" if side == "encoder" else "decoder.model"
    ends = {"conv1": 0, "snake1": blocks + 1, "conv2": blocks + 2}
    if rest[0] in ends:
        return ".".join([stem, str(ends[rest[0]]), *rest[1:]])
    _, index, layer, *tail = rest
    if layer.startswith("res_unit"):
        tail = ["block", str(_UNIT.index(tail[0])), *tail[1:]]
    place = _LAYERS[side].index(layer)
    return ".".join([stem, str(int(index) + 1), "block", str(place), *tail])
