"""LlamaGen's VQ-16 and VQ-8 (arXiv 2406.06525, FoundationVision/LlamaGen): a picture as a grid of ids.

- A VQGAN with attention after each block of the encoder's last level, of the decoder's first one, and in the middle.
- 16,384 codes of 8 numbers, compared and decoded as unit vectors; the stored rows are not normalised.
- Fully convolutional: the published models were used at 256, 384 and 512 pixels. `GridOptions(side=...)` picks one, and
  a stream carries its grid.
- `GridEncoder` serves GigaTok too, which has no attention. Levels of the decoder count from the lowest resolution.

Shapes: B batch, d code width, H W pixels, N = h * w positions, V codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..codec import CodecSpec
from ..layers.resnet import ResidualBlock
from ..layers.spatial import Downsample, SpatialAttention, Upsample
from ..layout import Grid
from ..published import Weights, load_into
from ..quantizers.vq import VectorQuantizer
from .fitting import PictureCodec, PictureOptions
from .kl16 import PyramidConfig, require

if TYPE_CHECKING:
    from ..registry import Entry

IGNORED = ("quantize.codebook_used",)  # a record of recent ids, for the training log
MAX_SIDE = 4096  # pixels along one side of what is encoded


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig(PyramidConfig):
    """Sizes, as `PyramidConfig`; the defaults are VQ-16's.

    Args:
        image_size: side of the square picture, where `GridOptions` does not say another.
        latent_channels: width between the convolutions and the two projections around the quantiser.
        codes: rows of the codebook.
        code_width: d.
    """

    image_size: int = 256
    latent_channels: int = 256
    codes: int = 16384
    code_width: int = 8


@dataclass(frozen=True, kw_only=True)
class GridOptions(PictureOptions):
    """Options of `encode` and `decode`, as `PictureOptions`.

    Args:
        side: side of the square that a picture is fitted to, in pixels; None for the codec's own. (encode)
    """

    side: int | None = None


class _Level(nn.Module):
    """Residual blocks of one resolution, attention after each where there is any, and the way to the next."""

    def __init__(
        self, channels: int, out: int, blocks: int, *, attention: bool, way: nn.Module | None = None
    ):
        super().__init__()
        self.res = nn.ModuleList(
            ResidualBlock(a, b) for a, b in pairwise([channels] + [out] * blocks)
        )
        self.attn = nn.ModuleList(SpatialAttention(out) for _ in range(blocks * attention))
        if isinstance(way, Downsample):
            self.downsample = way
        elif way is not None:
            self.upsample = way

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            return self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


def middle(channels: int, *, attention: bool) -> nn.Sequential:
    """Residual, attention where asked for, residual; numbered keys."""
    between = [SpatialAttention(channels)] if attention else []
    return nn.Sequential(ResidualBlock(channels), *between, ResidualBlock(channels))


class GridEncoder(nn.Module):
    """Pixels [B, 3, H, W] to [B, out, h, w]; with `attention`, in the last level and the middle."""

    def __init__(self, config: PyramidConfig, out: int, *, attention: bool):
        super().__init__()
        widths = config.widths
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            _Level(
                a,
                b,
                config.blocks,
                attention=attention and i == last,
                way=Downsample(b) if i < last else None,
            )
            for i, (a, b) in enumerate(zip((widths[0], *widths), widths))
        )
        self.mid = middle(widths[-1], attention=attention)
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """From the finest level to the coarsest."""
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class GridDecoder(nn.Module):
    """[B, C, h, w] to pixels [B, 3, H, W]; attention in the first level and the middle."""

    def __init__(self, config: PyramidConfig, channels: int):
        super().__init__()
        widths = config.widths[::-1]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], attention=True)
        self.conv_blocks = nn.ModuleList(
            _Level(
                a,
                b,
                config.blocks + 1,
                attention=i == 0,
                way=Upsample(b) if i < last else None,
            )
            for i, (a, b) in enumerate(zip((widths[0], *widths), widths))
        )
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """From the coarsest level to the finest; not clamped."""
        x = self.mid(self.conv_in(z))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LlamaGenVQ(PictureCodec):
    """Pictures to a grid of ids and back, with the published state-dict keys."""

    system = "llamagen"

    def __init__(self, config: LlamaGenConfig | None = None, *, name: str = "llamagen/custom"):
        super().__init__()
        self.config = config = config or LlamaGenConfig()
        width, channels = config.code_width, config.latent_channels
        self.encoder = GridEncoder(config, channels, attention=True)
        self.decoder = GridDecoder(config, channels)
        self.quantize = VectorQuantizer(config.codes, width, normalize=True)
        self.quant_conv = nn.Conv2d(channels, width, 1)
        self.post_quant_conv = nn.Conv2d(width, channels, 1)
        self.spec = CodecSpec(
            name=name,
            modality="image",
            vocab=((config.codes,),),
            layout=Grid(),
            fit="crop",
            size=(config.image_size, config.image_size),
        )

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        name: str = "llamagen/custom",
        source: str = "state dict",
    ) -> LlamaGenVQ:
        """The codec of a published state dict, sizes inferred from its shapes.

        Args:
            config: what shapes do not say; fields of `LlamaGenConfig`.
        """
        codec = cls(replace(infer_config(state_dict, source), **(config or {})), name=name)
        load_into(codec, state_dict, source=source, ignore=IGNORED)
        return codec.eval()

    def latents(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to unquantised codes [B, N, d], row-major."""
        self.config.check_pixels(x)
        return rearrange(self.quant_conv(self.encoder(x)), "b d h w -> b (h w) d")

    def paint(self, vectors: Tensor, grid: tuple[int, int]) -> Tensor:
        """Code vectors [B, N, d] to pixels [B, 3, H, W] in [-1, 1], not clamped."""
        z = rearrange(vectors, "b (h w) d -> b d h w", h=grid[0], w=grid[1])
        return self.decoder(self.post_quant_conv(z))

    def tokenize(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] to ids [B, N], row-major."""
        return self.quantize.ids(self.latents(2 * pixels - 1))

    def detokenize(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Ids [B, N] to pixels [B, 3, H, W], not clamped; `grid` is (h, w), a square where it is not given."""
        side = round(codes.shape[1] ** 0.5)
        return self.paint(self.quantize.vectors(codes), grid or (side, side)) / 2 + 0.5

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """The unit vectors that the decoder receives: [V, d]."""
        return self.quantize.table

    def grid(self, side: int) -> tuple[int, ...]:
        """Rows and columns of ids."""
        return (side // self.config.stride,) * 2

    def side(self, options: PictureOptions | None) -> int:
        """`GridOptions.side`, or the config's."""
        side = options.side if isinstance(options, GridOptions) else None
        side = self.config.image_size if side is None else side
        stride = self.config.stride
        if not stride <= side <= MAX_SIDE or side % stride:
            raise ValueError(
                f"side is {side}, expected a multiple of {stride} from {stride} to {MAX_SIDE}"
            )
        return side


def infer_config(state: Mapping[str, Tensor], source: str = "state dict") -> LlamaGenConfig:
    """Sizes from the shapes of a LlamaGen VQ state dict."""
    pyramid = infer_grid_pyramid(state, source)
    keys = ("quantize.embedding.weight", "quant_conv.weight", "encoder.mid.1.q.weight")
    require(state, keys, f"{source}: not a LlamaGen VQ model")
    codes, width = state["quantize.embedding.weight"].shape
    channels = state["quant_conv.weight"].shape[1]
    return LlamaGenConfig(**pyramid, latent_channels=channels, codes=codes, code_width=width)


def infer_grid_pyramid(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The fields of `PyramidConfig` from the shapes of a state dict with LlamaGen's keys."""
    first = ("encoder.conv_in.weight", "encoder.conv_blocks.0.res.0.conv1.weight")
    require(state, first, f"{source}: not an autoencoder with LlamaGen's keys")
    channels = state[first[0]].shape[0]
    widths = []
    while (key := f"encoder.conv_blocks.{len(widths)}.res.0.conv1.weight") in state:
        widths.append(state[key].shape[0])
    start = "encoder.conv_blocks.0.res."
    blocks = sum(k.startswith(start) and k.endswith(".conv1.weight") for k in state)
    multipliers = tuple(width // channels for width in widths)
    return {"channels": channels, "multipliers": multipliers, "blocks": blocks}


def build(files: Mapping[str, Weights], entry: Entry) -> LlamaGenVQ:
    """The codec of a registry row, or of a file that `save_codec` wrote."""
    weights = files["weights"]
    codec = LlamaGenVQ.from_published(
        weights.tensors, entry.config, name=entry.name, source=weights.source
    )
    codec.spec = replace(
        codec.spec, code_licence=entry.code_licence, weights_licence=entry.weights_licence
    )
    return codec
