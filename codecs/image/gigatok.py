"""GigaTok (arXiv 2504.08736, SilentView/GigaTok): a picture as 256 ids, by Q-Formers between two convolutional nets.

- Encoder: convolutions to a 16 x 16 grid; a transformer whose 256 queries start as averages of that grid at nine
  levels of detail (1, 1, 2, 4 ... 128 cells; the whole mean stands there twice, as published) and look at it by
  cross-attention; one code of 8 numbers, a unit vector, leaves each query.
- Decoder: a transformer whose 16 x 16 queries all start as the first code's embedding and look at the 256 codes; then
  convolutions in which every level is first normalised and restyled by the mean and deviation of the grid.
- The tokens look ordered and are not: no prefix was trained to decode.
- The published encoder passes vectors through a rotation formula that moves them off the table in the last bits. Ids
  are the exact path, and the only one here.
- `distill_mlp` predicts a teacher's features (DINOv2-B) from the decoder's third layer: the semantic loss. Files may
  lack it; inference does not use it.

Shapes: B batch, N codes, P = h * w grid positions, D width of a transformer, d code width, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..codec import CodecSpec
from ..layers.attention import SelfAttention
from ..layers.resnet import ResidualBlock
from ..layout import Fixed
from ..published import Weights, load_into
from ..quantizers.vq import VectorQuantizer
from .fitting import PictureCodec
from .kl16 import PyramidConfig, require
from .llamagen import GridEncoder, infer_grid_pyramid, middle

if TYPE_CHECKING:
    from ..registry import Entry

HEAD_WIDTH = 64  # in every published size: 512/8, 768/12, 1024/16, 1280/20, 1536/24
IGNORED = ("quantize.codebook_used",)  # a record of recent ids, for the training log
DISTILL = "s1to2decoder.distill_mlp."
NEEDED = (
    "encoder.conv_out.weight",
    "quantize.embedding.weight",
    "s2to1encoder.positional_embedding",
    "s2to1encoder.latent_token_positional_embedding",
    "s1to2decoder.positional_embedding",
    "decoder.adaptive.0.gamma.weight",
)


@dataclass(frozen=True, kw_only=True)
class GigaTokConfig(PyramidConfig):
    """Sizes, as `PyramidConfig` for the convolutions; the defaults are S-S.

    Args:
        image_size: side of the square picture.
        latent_channels: C, channels between convolutions and transformers.
        tokens: N, a power of two.
        codes: rows of the codebook.
        code_width: d.
        encoder, decoder: (width, layers) of the two transformers; heads are 64 wide.
        teacher_width: features of the teacher that `distill_mlp` predicts; 0 for none.
        teacher_layer: the decoder layer after which it reads.
    """

    image_size: int = 256
    latent_channels: int = 256
    tokens: int = 256
    codes: int = 16384
    code_width: int = 8
    encoder: tuple[int, int] = (512, 6)
    decoder: tuple[int, int] = (512, 6)
    teacher_width: int = 768
    teacher_layer: int = 3

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "encoder", tuple(self.encoder))
        object.__setattr__(self, "decoder", tuple(self.decoder))
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of {self.stride}"
            )
        if self.tokens < 2 or self.tokens & (self.tokens - 1):
            raise ValueError(f"tokens is {self.tokens}, expected a power of two")
        for width, _ in (self.encoder, self.decoder):
            if width % HEAD_WIDTH:
                raise ValueError(f"width is {width}, expected a multiple of {HEAD_WIDTH}")

    @property
    def grid(self) -> int:
        """Positions along one side."""
        return self.image_size // self.stride


class _Attention(SelfAttention):
    """Multi-head attention with its own input for each role; keys of `nn.MultiheadAttention`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query [B, T, D] looks at key and value [B, S, D]; no mask."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            rearrange(F.linear(x, w, b), "b t (h d) -> b h t d", h=self.heads)
            for x, w, b in zip((query, key, value), weights, biases)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(rearrange(y, "b h t d -> b t (h d)"))


class _Layer(nn.Module):
    """A pre-norm DETR decoder layer; positions are added to queries and keys in every layer, never to values."""

    def __init__(self, width: int):
        super().__init__()
        self.self_attn = _Attention(width, width // HEAD_WIDTH)
        self.multihead_attn = _Attention(width, width // HEAD_WIDTH)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, keys: Tensor, memory: Tensor) -> Tensor:
        """x [B, T, D]; `keys` is memory [B, S, D] plus its positions, and memory itself is not normalised."""
        h = self.norm1(x)
        x = x + self.self_attn(h + position, h + position, h)
        x = x + self.multihead_attn(self.norm2(x) + position, keys, memory)
        return x + self.linear2(F.gelu(self.linear1(self.norm3(x))))


class _QFormer(nn.Module):
    """What both transformers share: positions of the grid and of the codes, layers, norms."""

    def __init__(self, config: GigaTokConfig, size: tuple[int, int]):
        super().__init__()
        width, layers = size
        scale = width**-0.5
        self.positional_embedding = nn.Parameter(scale * torch.randn(config.grid**2, 1, width))
        self.latent_token_positional_embedding = nn.Parameter(
            scale * torch.randn(config.tokens, 1, width)
        )
        self.ln_pre = nn.LayerNorm(config.latent_channels)
        self.transformer = nn.ModuleList(_Layer(width) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def run(
        self, x: Tensor, memory: Tensor, positions: tuple[Tensor, Tensor], layers: int
    ) -> Tensor:
        """Queries x [B, T, D] through the first `layers` layers; positions of queries and of memory, [T or S, 1, D]."""
        position, keys = (p.transpose(0, 1) for p in positions)
        keys = memory + keys
        for layer in self.transformer[:layers]:
            x = layer(x, position, keys, memory)
        return x


class QFormerEncoder(_QFormer):
    """A grid [B, C, h, w] to N vectors [B, N, C]."""

    def __init__(self, config: GigaTokConfig):
        super().__init__(config, config.encoder)
        width = config.encoder[0]
        self.encoder_embed = nn.Linear(config.latent_channels, width)
        self.global_proj = nn.Linear(width, width)
        self.conv_out = nn.Conv2d(width, config.latent_channels, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """The queries start as averages of the embedded grid."""
        h = grid.shape[2]
        memory = self.encoder_embed(self.ln_pre(rearrange(grid, "b c h w -> b (h w) c")))
        averages = level_means(
            rearrange(memory, "b (h w) d -> b d h w", h=h),
            len(self.latent_token_positional_embedding),
        )
        positions = (self.latent_token_positional_embedding, self.positional_embedding)
        x = self.run(self.global_proj(averages), memory, positions, len(self.transformer))
        x = rearrange(self.ln_post(x), "b n d -> b d 1 n")
        return rearrange(self.conv_out(x), "b c 1 n -> b n c")


class QFormerDecoder(_QFormer):
    """N vectors [B, N, C] to a grid [B, C, h, w]."""

    def __init__(self, config: GigaTokConfig):
        super().__init__(config, config.decoder)
        width = config.decoder[0]
        self.grid, self.teacher_layer = config.grid, config.teacher_layer
        self.decoder_embed = nn.Linear(config.latent_channels, width)
        self.conv_out = nn.Conv2d(width, config.latent_channels, 3, padding=1)
        if config.teacher_width:
            self.distill_mlp = nn.Sequential(
                nn.Linear(width, 4 * width),
                nn.SiLU(),
                nn.Linear(4 * width, 4 * width),
                nn.SiLU(),
                nn.Linear(4 * width, config.teacher_width),
            )

    def hidden(self, vectors: Tensor, layers: int) -> Tensor:
        """The grid's queries [B, P, D] after `layers` layers."""
        memory = self.decoder_embed(self.ln_pre(vectors))
        queries = repeat(memory[:, :1], "b 1 d -> b p d", p=self.grid**2)
        positions = (self.positional_embedding, self.latent_token_positional_embedding)
        return self.run(queries, memory, positions, layers)

    def forward(self, vectors: Tensor) -> Tensor:
        """All queries start as the first code's embedding."""
        x = self.ln_post(self.hidden(vectors, len(self.transformer)))
        return self.conv_out(rearrange(x, "b (h w) d -> b d h w", h=self.grid))

    def semantic(self, vectors: Tensor) -> Tensor:
        """What the semantic loss compares with a teacher's patch features: [B, P, teacher width]."""
        return self.distill_mlp(self.hidden(vectors, self.teacher_layer))


def level_means(grid: Tensor, tokens: int) -> Tensor:
    """Averages of a grid [B, D, h, w] over 1, 1, 2, 4 ... tokens / 2 cells, row-major: [B, tokens, D].

    Level l splits the width into 2**ceil(l / 2) and the height into 2**floor(l / 2).
    """
    levels = [
        F.adaptive_avg_pool2d(grid, (2 ** (i // 2), 2 ** ((i + 1) // 2)))
        for i in range(tokens.bit_length() - 1)
    ]
    return torch.cat([rearrange(x, "b d h w -> b (h w) d") for x in (levels[0], *levels)], dim=1)


class _Restyle(nn.Module):
    """Group norm whose scale and shift come from the deviation and mean of the grid over its positions."""

    def __init__(self, channels: int, style_channels: int):
        super().__init__()
        self.gamma = nn.Linear(style_channels, channels)
        self.beta = nn.Linear(style_channels, channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x [B, K, H, W], style [B, C, h, w]; the variance is the unbiased one."""
        scale = self.gamma((style.var(dim=(2, 3)) + 1e-6).sqrt())
        shift = self.beta(style.mean(dim=(2, 3)))
        return F.group_norm(x, 32, eps=1e-6) * scale[:, :, None, None] + shift[:, :, None, None]


class _DepthToSpace(nn.Module):
    """Double the resolution: 3x3 convolution to four times the channels, which are (row, column, channel)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.conv1(x), "b (r s c) h w -> b c (h r) (w s)", r=2, s=2)


class _Level(nn.Module):
    """The residual blocks of one resolution and the way to the next."""

    def __init__(self, channels: int, out: int, blocks: int, *, last: bool):
        super().__init__()
        self.res = nn.ModuleList(
            ResidualBlock(a, b) for a, b in pairwise([channels] + [out] * blocks)
        )
        if not last:
            self.upsample = _DepthToSpace(out)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.res:
            x = block(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class AdaptiveDecoder(nn.Module):
    """A grid [B, C, h, w] to pixels [B, 3, H, W]; levels count from the lowest resolution."""

    def __init__(self, config: GigaTokConfig):
        super().__init__()
        widths = config.widths[::-1]
        pairs = list(zip((widths[0], *widths), widths))
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], attention=False)
        self.adaptive = nn.ModuleList(_Restyle(a, config.latent_channels) for a, _ in pairs)
        self.conv_blocks = nn.ModuleList(
            _Level(a, b, config.blocks + 1, last=i == len(pairs) - 1)
            for i, (a, b) in enumerate(pairs)
        )
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, grid: Tensor) -> Tensor:
        """Every level is restyled by the same grid; not clamped."""
        x = self.mid(self.conv_in(grid))
        for restyle, level in zip(self.adaptive, self.conv_blocks):
            x = level(restyle(x, grid))
        return self.conv_out(F.silu(self.norm_out(x)))


class GigaTok(PictureCodec):
    """Pictures to 256 ids and back, with the published state-dict keys."""

    system = "gigatok"

    def __init__(self, config: GigaTokConfig | None = None, *, name: str = "gigatok/custom"):
        super().__init__()
        self.config = config = config or GigaTokConfig()
        channels, width = config.latent_channels, config.code_width
        self.encoder = GridEncoder(config, channels, attention=False)
        self.s2to1encoder = QFormerEncoder(config)
        self.quant_conv = nn.Conv2d(channels, width, 1)
        self.quantize = VectorQuantizer(config.codes, width, normalize=True)
        self.post_quant_conv = nn.Conv2d(width, channels, 1)
        self.s1to2decoder = QFormerDecoder(config)
        self.decoder = AdaptiveDecoder(config)
        self.spec = CodecSpec(
            name=name,
            modality="image",
            vocab=((config.codes,),),
            layout=Fixed(config.tokens),
            fit="crop",
            size=(config.image_size, config.image_size),
        )

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        name: str = "gigatok/custom",
        source: str = "state dict",
    ) -> GigaTok:
        """The codec of a published state dict, sizes inferred from its shapes.

        Args:
            config: what shapes do not say; fields of `GigaTokConfig`. `teacher_width=0` leaves `distill_mlp` out.
        """
        sizes = replace(infer_config(state_dict, source), **(config or {}))
        codec = cls(sizes, name=name)
        ignored = IGNORED if sizes.teacher_width else (*IGNORED, DISTILL)
        load_into(codec, state_dict, source=source, ignore=ignored)
        return codec.eval()

    def latents(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] to unquantised codes [B, N, d]."""
        side = self.config.image_size
        if x.shape[1:] != (3, side, side):
            raise ValueError(f"pixels are {tuple(x.shape)}, expected [B, 3, {side}, {side}]")
        return self.project(self.s2to1encoder(self.encoder(x)))

    def project(self, features: Tensor) -> Tensor:
        """What leaves the encoder's queries, [B, N, C], to unquantised codes [B, N, d]."""
        return pointwise(self.quant_conv, features)

    def embed(self, codes: Tensor) -> Tensor:
        """Ids [B, N] to the vectors [B, N, C] that the decoder's transformer looks at."""
        return pointwise(self.post_quant_conv, self.quantize.vectors(codes))

    def tokenize(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] to ids [B, N]."""
        return self.quantize.ids(self.latents(2 * pixels - 1))

    def detokenize(self, codes: Tensor) -> Tensor:
        """Ids [B, N] to pixels [B, 3, S, S], not clamped."""
        return self.decoder(self.s1to2decoder(self.embed(codes))) / 2 + 0.5

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """The unit vectors that the decoder receives: [V, d]."""
        return self.quantize.table


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution on a row of vectors: [B, N, C_in] -> [B, N, C_out]."""
    return F.linear(x, conv.weight[:, :, 0, 0], conv.bias)


def infer_config(state: Mapping[str, Tensor], source: str = "state dict") -> GigaTokConfig:
    """Sizes from the shapes of a GigaTok state dict."""
    pyramid = infer_grid_pyramid(state, source)
    require(state, NEEDED, f"{source}: not a GigaTok")
    codes, code_width = state["quantize.embedding.weight"].shape
    grid = round(len(state["s2to1encoder.positional_embedding"]) ** 0.5)
    teacher = state.get(f"{DISTILL}4.weight")
    return GigaTokConfig(
        **pyramid,
        image_size=grid * 2 ** (len(pyramid["multipliers"]) - 1),
        latent_channels=len(state["encoder.conv_out.weight"]),
        tokens=len(state["s2to1encoder.latent_token_positional_embedding"]),
        codes=codes,
        code_width=code_width,
        encoder=_transformer_size(state, "s2to1encoder."),
        decoder=_transformer_size(state, "s1to2decoder."),
        teacher_width=0 if teacher is None else len(teacher),
    )


def build(files: Mapping[str, Weights], entry: Entry) -> GigaTok:
    """The codec of a registry row, or of a file that `save_codec` wrote."""
    weights = files["weights"]
    codec = GigaTok.from_published(
        weights.tensors, entry.config, name=entry.name, source=weights.source
    )
    codec.spec = replace(
        codec.spec, code_licence=entry.code_licence, weights_licence=entry.weights_licence
    )
    return codec


def _transformer_size(state: Mapping[str, Tensor], prefix: str) -> tuple[int, int]:
    """(width, layers) of the transformer below `prefix`."""
    start = f"{prefix}transformer."
    layers = {k.removeprefix(start).split(".")[0] for k in state if k.startswith(start)}
    return state[f"{prefix}positional_embedding"].shape[2], len(layers)
