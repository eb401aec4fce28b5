"""MaskGIT-VQGAN (arXiv 2202.04200): 16 x 16 codes of a picture; TiTok's stage-1 target and pixel decoder.

- Residual blocks without biases, no attention; where the width changes, the published 1x1 shortcut is applied to the
  block's own output and the input is dropped. Weights depend on it, so it stays (`OutputShortcutBlock`).
- Down by 2x2 mean, up by nearest neighbour and a 3x3 convolution. Pixels in [0, 1].

Shapes: B batch, C channels, H W pixels, h w = H/16, W/16 positions, d code width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..layers.resnet import ResidualBlock
from ..published import load_into
from ..quantizers.vq import VectorQuantizer


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Sizes; the defaults are the published f16 model.

    Args:
        channels: width at full resolution; level i has channels * multipliers[i].
        blocks: residual blocks a level, and in the middle.
        code_width: numbers a code.
        codes: rows of the codebook.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    code_width: int = 256
    codes: int = 1024

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple(self.multipliers))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(self.channels * m for m in self.multipliers)


class OutputShortcutBlock(ResidualBlock):
    """Residual block whose width-changing shortcut reads the block's output h: h + W h; the input is discarded."""

    def __init__(self, channels: int, out: int | None = None):
        super().__init__(channels, out, bias=False)

    def _shortcut(self, channels: int, out: int, bias: bool) -> nn.Module:
        return nn.Conv2d(out, out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        h = self.residual(x)
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


class _Level(nn.Module):
    """The residual blocks of one resolution; when going up, the convolution after the upsampling too."""

    def __init__(self, channels: int, out: int, blocks: int, *, upsample: bool = False):
        super().__init__()
        widths = [channels] + [out] * blocks
        self.block = nn.ModuleList(OutputShortcutBlock(a, b) for a, b in pairwise(widths))
        if upsample:
            self.upsample_conv = nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "upsample_conv"):
            x = self.upsample_conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return x


class PixelEncoder(nn.Module):
    """Pixels [B, 3, H, W] to unquantised codes [B, d, h, w]."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            _Level(a, b, config.blocks) for a, b in zip((widths[0], *widths), widths)
        )
        self.mid = nn.ModuleList(OutputShortcutBlock(widths[-1]) for _ in range(config.blocks))
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.code_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Halved after every level but the last."""
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(F.avg_pool2d(x, 2) if i else x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class PixelDecoder(nn.Module):
    """Code vectors [B, d, h, w] to pixels [B, 3, H, W]."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.code_width, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(OutputShortcutBlock(widths[-1]) for _ in range(config.blocks))
        self.up = nn.ModuleList(
            _Level(a, b, config.blocks, upsample=i > 0)
            for i, (a, b) in enumerate(zip((*widths[1:], widths[-1]), widths))
        )
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """From the coarsest level to the finest; not clamped."""
        x = self.conv_in(z)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MaskGitVQGAN(nn.Module):
    """Pixels to a grid of ids and back; keys of `maskgit-vqgan-imagenet-f16-256.bin`."""

    def __init__(self, config: VQGANConfig | None = None):
        super().__init__()
        self.config = config or VQGANConfig()
        self.encoder = PixelEncoder(self.config)
        self.quantize = VectorQuantizer(self.config.codes, self.config.code_width)
        self.decoder = PixelDecoder(self.config)

    @classmethod
    def from_published(
        cls, state_dict: Mapping[str, Tensor], config: VQGANConfig | None = None
    ) -> MaskGitVQGAN:
        """The model of a published state dict, sizes inferred from its shapes."""
        config = config or infer_vqgan(state_dict, "decoder.", "quantize.")
        model = cls(config)
        load_into(model, state_dict, source="MaskGIT-VQGAN")
        return model.eval()

    def tokenize(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] to ids [B, h * w], row-major."""
        return self.quantize.ids(rearrange(self.encoder(x), "b d h w -> b (h w) d"))

    def detokenize(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Ids [B, h * w] to pixels [B, 3, H, W]; `grid` is (h, w), a square where it is not given."""
        h = grid[0] if grid else round(ids.shape[1] ** 0.5)
        return self.decoder(rearrange(self.quantize.vectors(ids), "b (h w) d -> b d h w", h=h))


def infer_vqgan(state: Mapping[str, Tensor], decoder: str, quantize: str) -> VQGANConfig:
    """Sizes from the shapes of a state dict; `decoder` and `quantize` are the prefixes of their keys."""
    channels = state[f"{decoder}norm_out.weight"].numel()
    levels = 1 + max(
        int(k[len(f"{decoder}up.") :].split(".")[0]) for k in state if k.startswith(f"{decoder}up.")
    )
    widths = [state[f"{decoder}up.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    blocks = sum(k.startswith(f"{decoder}mid.") and k.endswith(".conv1.weight") for k in state)
    codes, width = state[f"{quantize}embedding.weight"].shape
    return VQGANConfig(
        channels=channels,
        multipliers=tuple(w // channels for w in widths),
        blocks=blocks,
        code_width=width,
        codes=codes,
    )
