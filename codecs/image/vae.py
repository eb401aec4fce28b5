"""AutoencoderKL (arXiv 2112.10752), the f8 VAE of Stable Diffusion XL, with the key names of `diffusers`.

- FlexTok's three VAEs (`EPFL-VILAB/flextok_vae_c4`, `_c8`, `_c16`) and SDXL's own have this layout; they differ in the
  number of latent channels and in `scaling_factor`, which no tensor says.
- Down by a 3x3 convolution of stride 2 that is padded on the right and at the bottom only; up by nearest neighbour and
  a 3x3 convolution. One attention head in the middle of each side. Pixels in [-1, 1].

Shapes: B batch, C latent channels, H W pixels, h w = H / f, W / f latents; f = 8 with four levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..codec import Rng, item_rngs
from ..published import WeightsError, load_into

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Fields of a published config.json that shapes say better, or that have no bearing on the numbers.
PUBLISHED_KEYS = (
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "in_channels",
    "out_channels",
    "sample_size",
    "force_upcast",
    "down_block_types",
    "up_block_types",
)
PUBLISHED_FIXED = {"act_fn": ("silu",), "mid_block_add_attention": (True,)} | {
    name: (None,) for name in ("latents_mean", "latents_std", "shift_factor")
}


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes; the defaults are the published ones with 16 channels.

    Args:
        scaling_factor: latents are multiplied by it, so that their variance is near one; differs between checkpoints.
        latent_channels: C.
        channels: width of each level, full resolution first.
        blocks: residual blocks a level (the decoder has one more).
        groups: of every group norm.
        autocast: "bfloat16" or "float16" where the published model runs in it, None for its own type.
    """

    scaling_factor: float
    latent_channels: int = 16
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    autocast: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))
        if any(width % self.groups for width in self.channels):
            raise ValueError(f"channels are {self.channels}, expected multiples of {self.groups}")
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}, expected more than 0")
        if self.autocast is not None and self.autocast not in AUTOCAST:
            raise ValueError(f"autocast is {self.autocast!r}, expected {', '.join(AUTOCAST)}")

    @property
    def stride(self) -> int:
        """Pixels along one side of a latent, f."""
        return 2 ** (len(self.channels) - 1)


class _Residual(nn.Module):
    """GroupNorm-SiLU-conv3x3 twice, plus the input: [B, C_in, H, W] -> [B, C_out, H, W]."""

    def __init__(self, channels: int, out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.conv_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class _Attention(nn.Module):
    """One head over all positions, plus the input: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + rearrange(self.to_out(h), "b 1 (h w) c -> b c h w", h=x.shape[2])


class _Middle(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Down(nn.Module):
    """Half the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Up(nn.Module):
    """Twice the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class _Level(nn.Module):
    """The residual blocks of one resolution, and the way to the next (`downsamplers` or `upsamplers`)."""

    def __init__(self, widths: Sequence[int], groups: int, way: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(a, b, groups) for a, b in pairwise(widths))
        if isinstance(way, _Down):
            self.downsamplers = nn.ModuleList([way])
        elif isinstance(way, _Up):
            self.upsamplers = nn.ModuleList([way])

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            for layer in child:
                x = layer(x)
        return x


class _Encoder(nn.Module):
    """Pixels [B, 3, H, W] to [B, 2C, h, w], before `quant_conv`."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, last = config.channels, len(config.channels) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level([a] + [b] * config.blocks, config.groups, _Down(b) if i < last else None)
            for i, (a, b) in enumerate(zip((widths[0], *widths), widths))
        )
        self.mid_block = _Middle(widths[-1], config.groups)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nn.Module):
    """Latents [B, C, h, w], after `post_quant_conv`, to pixels [B, 3, H, W]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, last = config.channels[::-1], len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0], config.groups)
        self.up_blocks = nn.ModuleList(
            _Level([a] + [b] * (config.blocks + 1), config.groups, _Up(b) if i < last else None)
            for i, (a, b) in enumerate(zip((widths[0], *widths), widths))
        )
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Pixels to Gaussian latents and back: a `LatentCodec`."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        source: str = "state dict",
    ) -> AutoencoderKL:
        """The VAE of a published state dict, sizes inferred from its shapes.

        Args:
            config: the content of the `config.json` beside the weights; `scaling_factor` must be in it.

        Raises:
            WeightsError: keys or shapes are another model's, or the config says what this VAE does not do.
        """
        model = cls(_published(state_dict, config, source))
        load_into(model, state_dict, source=source)
        return model.eval()

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to mean and log variance of unscaled latents, each [B, C, h, w].

        Raises:
            ValueError: a side is not a multiple of f.
        """
        stride = self.config.stride
        if x.shape[2] % stride or x.shape[3] % stride:
            raise ValueError(
                f"pixels are {x.shape[2]} x {x.shape[3]}, expected multiples of {stride}"
            )
        with self._precision(x):
            mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode_latents(self, x: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to scaled latents [B, C, h, w]; the mean where rng is None, else a sample."""
        mean, logvar = self.moments(x)
        if rng is not None:
            mean = mean + (0.5 * logvar).exp() * draw(rng, mean)
        return mean * self.config.scaling_factor

    def decode_latents(self, z: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] to pixels [B, 3, H, W] in [-1, 1], not clamped."""
        with self._precision(z):
            return self.decoder(self.post_quant_conv(z / self.config.scaling_factor))

    def _precision(self, x: Tensor) -> torch.autocast:
        dtype = AUTOCAST.get(self.config.autocast or "")
        return torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None)


def draw(rng: Rng, like: Tensor) -> Tensor:
    """Normal noise like `like` [B, ...]; row i is drawn from rng[i], on that generator's device."""
    rows = [
        torch.randn(like.shape[1:], generator=g, device=g.device) for g in item_rngs(rng, len(like))
    ]
    return torch.stack([row.to(like.device) for row in rows]).to(like.dtype)


def infer_autoencoder(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Sizes, as fields of `AutoencoderConfig`, from the shapes of the keys below `prefix`.

    Raises:
        WeightsError: the keys are not those of an AutoencoderKL.
    """
    start = f"{prefix}encoder.down_blocks."
    names = [k.removeprefix(start).split(".") for k in state if k.startswith(start)]
    latent = state.get(f"{prefix}post_quant_conv.weight")
    if not names or latent is None:
        raise WeightsError(
            f"not an AutoencoderKL: no '{start}*' or no '{prefix}post_quant_conv.weight'"
        )
    levels = 1 + max(int(name[0]) for name in names)
    blocks = 1 + max(int(name[2]) for name in names if name[1] == "resnets")
    firsts = [f"{start}{i}.resnets.0.conv1.weight" for i in range(levels)]
    if missing := [key for key in firsts if key not in state]:
        raise WeightsError(f"not an AutoencoderKL: {', '.join(missing)} missing")
    return {
        "channels": tuple(len(state[key]) for key in firsts),
        "blocks": blocks,
        "latent_channels": len(latent),
    }


def _published(
    state: Mapping[str, Tensor], config: Mapping[str, Any], source: str
) -> AutoencoderConfig:
    own = {"scaling_factor", "norm_num_groups", *PUBLISHED_KEYS, *PUBLISHED_FIXED}
    unknown = [key for key in config if key not in own and not key.startswith("_")]
    other = [k for k, values in PUBLISHED_FIXED.items() if k in config and config[k] not in values]
    if unknown or other:
        said = ", ".join(f"{key} = {config[key]!r}" for key in [*unknown, *other])
        raise WeightsError(f"{source}: its config says {said}, which this VAE does not know")
    if config.get("scaling_factor") is None:
        raise WeightsError(f"{source}: its config gives no scaling_factor, and no tensor says it")
    return AutoencoderConfig(
        **infer_autoencoder(state),
        scaling_factor=config["scaling_factor"],
        groups=config.get("norm_num_groups", 32),
    )
