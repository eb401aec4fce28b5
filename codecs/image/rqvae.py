"""RQ-VAE (arXiv 2203.01941, kakaobrain/rq-vae-transformer): a picture as a small grid of codes, several deep.

- A VQGAN at stride 32 (`kl16.py` has its convolutions): 8 x 8 positions of 256 numbers. Each position is quantised
  `depth` times, every time what the codes before left over; the decoder gets their sum, so the first n depths alone
  decode too.
- One codebook for all depths where `shared`; published files repeat it under the name of each depth. Its last row is
  padding and no code.
- The published files' `*_ema` buffers belong to training and are not loaded.

Shapes: B batch, N = h * w positions, n <= D depths, d code width, V codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..codec import CodecSpec
from ..layout import Grid
from ..published import Weights, WeightsError, load_into
from .fitting import PictureCodec
from .kl16 import PyramidConfig, PyramidDecoder, PyramidEncoder, infer_pyramid, require

if TYPE_CHECKING:
    from ..registry import Entry

BOOKS = "quantizer.codebooks."
EMA = ("cluster_size_ema", "embed_ema")


@dataclass(frozen=True, kw_only=True)
class RQVAEConfig(PyramidConfig):
    """Sizes, as `PyramidConfig`; the defaults are the published 8 x 8 x 4 model of ImageNet.

    Args:
        image_size: side of the square picture.
        latent_channels: width between the convolutions and the two projections around the quantiser.
        code_width: d.
        codes: V.
        depth: D.
        shared: one codebook for all depths.
    """

    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    image_size: int = 256
    latent_channels: int = 256
    code_width: int = 256
    codes: int = 16384
    depth: int = 4
    shared: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.image_size < self.stride or self.image_size % self.stride:
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of {self.stride}"
            )
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth}, expected 1 or more")

    @property
    def grid(self) -> int:
        """Positions along one side."""
        return self.image_size // self.stride


class ResidualCodebooks(nn.Module):
    """Plain residual quantisation: nearest row, subtract, again.

    Args:
        codes: V; each book has one row more, padding.
        width: d.
        depth: D.
        shared: one book serves all depths.
    """

    def __init__(self, codes: int, width: int, depth: int, *, shared: bool):
        super().__init__()
        self.depth = depth
        self.codebooks = nn.ModuleList(
            nn.Embedding(codes + 1, width, padding_idx=codes) for _ in range(1 if shared else depth)
        )

    def table(self, depth: int) -> Tensor:
        """What each code of a depth adds: [V, d]."""
        return self.codebooks[depth % len(self.codebooks)].weight[:-1]

    def ids(self, z: Tensor) -> Tensor:
        """Vectors [..., d] to codes [..., D]; always in float32, where published codes were computed."""
        with torch.autocast(z.device.type, enabled=False):
            residual = z.float().reshape(-1, z.shape[-1])
            codes = []
            for depth in range(self.depth):
                table = self.table(depth).float()
                norms = residual.square().sum(1, keepdim=True) + table.square().sum(1)
                nearest = torch.addmm(norms, residual, table.T, alpha=-2.0).argmin(1)
                residual = residual - table[nearest]
                codes.append(nearest)
            return torch.stack(codes, 1).reshape(*z.shape[:-1], self.depth)

    def vectors(self, codes: Tensor) -> Tensor:
        """Codes [..., n] of the first n depths to the sum of their rows, [..., d]."""
        n = codes.shape[-1]
        if not 1 <= n <= self.depth:
            raise ValueError(f"codes have {n} depths, expected 1 to {self.depth}")
        rows = [F.embedding(codes[..., i], self.table(i)) for i in range(n)]
        return torch.stack(rows).sum(0)


class RQVAE(PictureCodec):
    """Pictures to codes [N, D] and back; any first n depths decode."""

    system = "rqvae"

    def __init__(self, config: RQVAEConfig | None = None, *, name: str = "rqvae/custom"):
        super().__init__()
        self.config = config = config or RQVAEConfig()
        channels, width = config.latent_channels, config.code_width
        self.encoder = PyramidEncoder(config, channels)
        self.decoder = PyramidDecoder(config, channels, attention=True)
        self.quantizer = ResidualCodebooks(config.codes, width, config.depth, shared=config.shared)
        self.quant_conv = nn.Conv2d(channels, width, 1)
        self.post_quant_conv = nn.Conv2d(width, channels, 1)
        self.spec = CodecSpec(
            name=name,
            modality="image",
            vocab=((config.codes,) * config.depth,),
            layout=Grid((config.grid, config.grid)),
            compose="sum",
            depth_prefix=True,
            fit="crop",
            size=(config.image_size, config.image_size),
        )

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        name: str = "rqvae/custom",
        source: str = "state dict",
    ) -> RQVAE:
        """The codec of a published state dict, sizes inferred from its shapes.

        Args:
            config: what shapes do not say; fields of `RQVAEConfig`. Whether the codebook is shared, and how deep codes
                are, is read from the names of the codebooks where `config` does not say.
        """
        sizes = replace(infer_config(state_dict, source), **(config or {}))
        codec = cls(sizes, name=name)
        load_into(codec, _own_keys(state_dict, sizes, source), source=source)
        return codec.eval()

    def latents(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] to unquantised codes [B, N, d], row-major."""
        self.config.check_pixels(x)
        return rearrange(self.quant_conv(self.encoder(x)), "b d h w -> b (h w) d")

    def tokenize(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] to codes [B, N, D]."""
        return self.quantizer.ids(self.latents(2 * pixels - 1))

    def detokenize(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes [B, N, n] of the first n depths to pixels [B, 3, S, S], not clamped; `grid` is (h, w)."""
        h = grid[0] if grid else self.config.grid
        z = rearrange(self.quantizer.vectors(codes), "b (h w) d -> b d h w", h=h)
        return self.decoder(self.post_quant_conv(z)) / 2 + 0.5

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """What each code of a depth adds to the vector that the decoder receives: [V, d]."""
        if not 0 <= depth < self.config.depth:
            raise ValueError(f"depth is {depth}, expected 0 to {self.config.depth - 1}")
        return self.quantizer.table(depth)

    def grid(self, side: int) -> tuple[int, ...]:
        """Rows and columns of positions."""
        return (self.config.grid, self.config.grid)


def infer_config(state: Mapping[str, Tensor], source: str = "state dict") -> RQVAEConfig:
    """Sizes from the shapes of an RQ-VAE state dict; the picture's side is not among them."""
    pyramid = infer_pyramid(state, source)
    require(state, (f"{BOOKS}0.weight", "quant_conv.weight"), f"{source}: not an RQ-VAE")
    width, channels = state["quant_conv.weight"].shape[:2]
    books = [state[key] for key in _books(state)]
    first = books[0]
    repeated = all(b.shape == first.shape and torch.equal(b, first) for b in books)
    return RQVAEConfig(
        **pyramid,
        latent_channels=channels,
        code_width=width,
        codes=len(first) - 1,
        depth=len(books),
        shared=len(books) > 1 and repeated,
    )


def _books(state: Mapping[str, Tensor]) -> list[str]:
    return [k for k in state if k.startswith(BOOKS) and k.endswith(".weight")]


def _own_keys(state: Mapping[str, Tensor], config: RQVAEConfig, source: str) -> dict[str, Tensor]:
    """Without EMA buffers, and a shared codebook once."""
    first = state[f"{BOOKS}0.weight"]
    own = {}
    for key, value in state.items():
        if key.startswith(BOOKS):
            if key.endswith(EMA):
                continue
            if config.shared and key != f"{BOOKS}0.weight":
                if key.endswith(".weight") and not torch.equal(value, first):
                    raise WeightsError(f"{source}: {key} differs from the shared codebook 0")
                continue
        own[key] = value
    return own


def build(files: Mapping[str, Weights], entry: Entry) -> RQVAE:
    """The codec of a registry row, or of a file that `save_codec` wrote."""
    weights = files["weights"]
    codec = RQVAE.from_published(
        weights.tensors, entry.config, name=entry.name, source=weights.source
    )
    codec.spec = replace(
        codec.spec, code_licence=entry.code_licence, weights_licence=entry.weights_licence
    )
    return codec
