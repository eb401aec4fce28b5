"""KL-16 (arXiv 2112.10752, weights of LTH14/mar): a picture as 16 x 16 x 16 Gaussian latents, for TokenBridge and xAR.

- The latent-diffusion autoencoder at stride 16. Attention stands after each block of the encoder's last level and in
  the middle of both sides, but nowhere on the decoder's way up, where the stock design has it.
- Latents are multiplied by 0.2325, so that their variance is near one. They are no token stream: `encode_latents` and
  `decode_latents` are what this codec has (`LatentCodec`).
- `PyramidEncoder` and `PyramidDecoder` carry the latent-diffusion key names and serve the RQ-VAE too.

Shapes: B batch, C latent channels, H W pixels, h w = H / 16, W / 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codec import Codec, CodecSpec, CodecUnavailable, Rng, item_rngs
from ..layers.resnet import ResidualBlock
from ..layers.spatial import Downsample, SpatialAttention, Upsample
from ..layout import Grid
from ..published import Weights, WeightsError, load_into

if TYPE_CHECKING:
    from ..registry import Entry

IGNORED = ("loss.",)  # the discriminator and LPIPS that training checkpoints carry


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """Sizes of the convolutional encoder and decoder; the defaults are KL-16's.

    Args:
        channels: width at full resolution; level i has channels * multipliers[i].
        multipliers: one a level, full resolution first; the stride is 2 ** (levels - 1).
        blocks: residual blocks a level of the encoder; the decoder has one more.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple(self.multipliers))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def stride(self) -> int:
        """Pixels along one side of a position."""
        return 2 ** (len(self.multipliers) - 1)

    def check_pixels(self, x: Tensor) -> None:
        """Raise ValueError unless x is [B, 3, H, W] with sides that are multiples of the stride."""
        if x.ndim != 4 or x.shape[1] != 3 or any(n % self.stride or not n for n in x.shape[2:]):
            raise ValueError(
                f"pixels are {tuple(x.shape)}, expected [B, 3, H, W] with H, W multiples of {self.stride}"
            )


@dataclass(frozen=True, kw_only=True)
class KL16Config(PyramidConfig):
    """Sizes of the VAE, as `PyramidConfig`.

    Args:
        latent_channels: C.
        scale: latents are multiplied by it; no tensor says it.
    """

    latent_channels: int = 16
    scale: float = 0.2325

    def __post_init__(self):
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}, expected more than 0")


class _Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where there is any."""

    def __init__(self, channels: int, out: int, blocks: int, *, attention: bool):
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(a, b) for a, b in pairwise([channels] + [out] * blocks)
        )
        self.attn = nn.ModuleList(SpatialAttention(out) for _ in range(blocks * attention))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class _Down(_Level):
    """A level of the encoder; halves the resolution where it is not the last."""

    def __init__(self, channels: int, out: int, blocks: int, *, last: bool):
        super().__init__(channels, out, blocks, attention=last)
        if not last:
            self.downsample = Downsample(out)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class _Up(_Level):
    """A level of the decoder; doubles the resolution where it is not the finest."""

    def __init__(self, channels: int, out: int, blocks: int, *, attention: bool, finest: bool):
        super().__init__(channels, out, blocks, attention=attention)
        if not finest:
            self.upsample = Upsample(out)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class _Middle(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = ResidualBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class PyramidEncoder(nn.Module):
    """Pixels [B, 3, H, W] to [B, out, h, w]; attention in the last level."""

    def __init__(self, config: PyramidConfig, out: int):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            _Down(a, b, config.blocks, last=i == len(widths) - 1)
            for i, (a, b) in enumerate(zip((widths[0], *widths), widths))
        )
        self.mid = _Middle(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """From the finest level to the coarsest."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class PyramidDecoder(nn.Module):
    """[B, C, h, w] to pixels [B, 3, H, W]; `attention` in the coarsest level (RQ-VAE) or not (KL-16)."""

    def __init__(self, config: PyramidConfig, channels: int, *, attention: bool):
        super().__init__()
        widths = config.widths
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        self.up = nn.ModuleList(
            _Up(a, b, config.blocks + 1, attention=attention and i == last, finest=i == 0)
            for i, (a, b) in enumerate(zip((*widths[1:], widths[-1]), widths))
        )
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """From the coarsest level to the finest; not clamped."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class KL16(Codec):
    """Pixels to scaled Gaussian latents and back, a `LatentCodec`, with the published state-dict keys."""

    system = "kl16"

    def __init__(self, config: KL16Config | None = None, *, name: str = "kl16/custom"):
        super().__init__()
        self.config = config = config or KL16Config()
        channels = config.latent_channels
        self.encoder = PyramidEncoder(config, 2 * channels)
        self.decoder = PyramidDecoder(config, channels, attention=False)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.spec = CodecSpec(
            name=name,
            modality="image",
            vocab=(),
            layout=Grid(),
            encodes=False,
            decodes=False,
            fit="crop",
            size=(256, 256),
        )

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        name: str = "kl16/custom",
        source: str = "state dict",
    ) -> KL16:
        """The VAE of a published state dict, sizes inferred from its shapes.

        Args:
            config: what shapes do not say; fields of `KL16Config`.
        """
        codec = cls(replace(infer_config(state_dict, source), **(config or {})), name=name)
        load_into(codec, state_dict, source=source, ignore=IGNORED)
        return codec.eval()

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to mean and log variance [B, C, h, w], not scaled."""
        self.config.check_pixels(x)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode_latents(self, x: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to scaled latents [B, C, h, w].

        Args:
            rng: one generator a picture draws a sample of the posterior, as the published scripts do; None gives
                the mean.
        """
        mean, logvar = self.moments(x)
        if rng is not None:
            noise = [
                torch.randn(mean.shape[1:], generator=g, device=g.device).to(mean)
                for g in item_rngs(rng, len(mean))
            ]
            mean = mean + (0.5 * logvar).exp() * torch.stack(noise)
        return mean * self.config.scale

    def decode_latents(self, z: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] to pixels [B, 3, H, W] in [-1, 1], not clamped."""
        channels = self.config.latent_channels
        if z.ndim != 4 or z.shape[1] != channels:
            raise ValueError(f"latents are {tuple(z.shape)}, expected [B, {channels}, h, w]")
        return self.decoder(self.post_quant_conv(z / self.config.scale))

    def encode(self, media: Sequence[Any], *, options: Any = None, rng: Rng | None = None):
        """There are no tokens here; `encode_latents` gives latents, TokenBridge quantises them."""
        raise CodecUnavailable(_no_tokens(self.spec.name, "encode_latents"))

    def decode(self, streams: Sequence[Any], *, options: Any = None, rng: Rng | None = None):
        """There are no tokens here; `decode_latents` takes latents."""
        raise CodecUnavailable(_no_tokens(self.spec.name, "decode_latents"))


def _no_tokens(name: str, verb: str) -> str:
    return (
        f"'{name}' has continuous latents, no tokens: use {verb}, or 'tokenbridge/kl16-6bit', "
        "which quantises them"
    )


def infer_config(state: Mapping[str, Tensor], source: str = "state dict") -> KL16Config:
    """Sizes from the shapes of a KL-16 state dict."""
    pyramid = infer_pyramid(state, source)
    require(state, ("post_quant_conv.weight",), f"{source}: not a KL-16 VAE")
    return KL16Config(**pyramid, latent_channels=state["post_quant_conv.weight"].shape[0])


def infer_pyramid(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The fields of `PyramidConfig` from the shapes of a state dict with latent-diffusion keys."""
    first = ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight")
    require(state, first, f"{source}: not an autoencoder with latent-diffusion keys")
    channels = state[first[0]].shape[0]
    widths = []
    while (key := f"encoder.down.{len(widths)}.block.0.conv1.weight") in state:
        widths.append(state[key].shape[0])
    blocks = sum(
        k.startswith("encoder.down.0.block.") and k.endswith(".conv1.weight") for k in state
    )
    multipliers = tuple(width // channels for width in widths)
    return {"channels": channels, "multipliers": multipliers, "blocks": blocks}


def require(state: Mapping[str, Tensor], keys: Sequence[str], what: str) -> None:
    """Raise WeightsError, beginning with `what`, unless all `keys` are there."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise WeightsError(f"{what}: {', '.join(missing)} missing")


def build(files: Mapping[str, Weights], entry: Entry) -> KL16:
    """The VAE of a registry row, or of a file that `save_codec` wrote."""
    weights = files["weights"]
    codec = KL16.from_published(
        weights.tensors, entry.config, name=entry.name, source=weights.source
    )
    codec.spec = replace(
        codec.spec, code_licence=entry.code_licence, weights_licence=entry.weights_licence
    )
    return codec
