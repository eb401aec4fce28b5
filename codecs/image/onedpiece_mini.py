"""onedpiece/mini: One-D-Piece's contract (ordered tokens, any prefix decodes) on an analytic basis, for 64 x 64 pixels.

A ViT tokenizer trained for minutes stays below PCA, so this one starts there and learns only what PCA cannot do:

- Head, tokens 0...31: a PCA space of low-frequency DCT coefficients of opponent colours, cut into groups of
  neighbouring components, a few large ones first and many small ones last. Each token codes one group against a table
  of its own, so the first tokens carry layout and colour. No token refines another: what a token says of the picture
  does not depend on the ones before it, which makes the stream easy to predict (a residual stack is not: its codes
  mean what earlier codes left over).
- Tail, 64 tokens a stage: one code for each 8 x 8 block of what is still missing (a local basis, three stages).
- A small convolutional network with one attention layer repairs the sum; it knows how many tokens each block has. It is
  trained with One-D-Piece's tail drop: one k for each forward pass.

Tables are int8 with a scale, so that the whole codec stays below 4 MB.
Shapes: B batch, k tokens, K DCT coefficients, P components, T head tokens, d dimensions a token, V codes, n blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ...modalities.image import Image
from ..codec import CodecSpec, Rng
from ..layers.attention import Block
from ..layers.resnet import ResidualBlock
from ..layout import Prefix
from ..published import load_into
from ..quantizers.table import Table, nearest
from ..stream import TokenStream
from .fitting import PictureCodec, PictureOptions, fit_pictures

# Rows: grey, red - blue, green against both; orthonormal, so squared errors are those of RGB.
OPPONENT = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class OneDPieceMiniConfig:
    """Sizes.

    Args:
        image_size: side of the square picture.
        coefficients: DCT coefficients that the head's basis sees.
        components: columns of the head's basis.
        head_tokens: tokens of the head, each of which codes some of the components.
        block, block_width, stages: side of the tail's blocks, dimensions of their basis, codes a block.
        codes: rows of every table.
        widths: channels of the repairing network at 1/2, 1/4 and 1/8 of the size.
    """

    image_size: int = 64
    coefficients: int = 1536
    components: int = 340
    head_tokens: int = 32
    block: int = 8
    block_width: int = 64
    stages: int = 3
    codes: int = 4096
    widths: tuple[int, int, int] = (32, 48, 96)

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        if self.image_size % 8 or self.image_size % self.block:
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of 8 and of block = {self.block}"
            )
        if not self.head_tokens <= self.components <= self.coefficients:
            raise ValueError("expected head_tokens <= components <= coefficients")

    @property
    def blocks(self) -> int:
        """Tail tokens a stage."""
        return (self.image_size // self.block) ** 2

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.head_tokens + self.stages * self.blocks


class Repair(nn.Module):
    """Adds what linear decoding misses: pixels [B, 3, S, S] and counts [B, 2, S, S] to pixels [B, 3, S, S].

    The last layer begins at zero, so an untrained codec decodes as its basis does.
    """

    def __init__(self, widths: tuple[int, int, int]):
        super().__init__()
        fine, middle, coarse = widths
        self.conv_in = nn.Conv2d(4 * 5, fine, 3, padding=1)
        self.fine = ResidualBlock(fine, groups=8)
        self.down1 = nn.Conv2d(fine, middle, 3, stride=2, padding=1)
        self.middle = ResidualBlock(middle, groups=8)
        self.down2 = nn.Conv2d(middle, coarse, 3, stride=2, padding=1)
        self.coarse = Block(coarse, coarse // 32, mlp_ratio=2)
        self.position = nn.Parameter(torch.zeros(1, coarse, 8, 8))
        self.up2 = nn.Conv2d(coarse, middle, 3, padding=1)
        self.merge2 = ResidualBlock(middle, groups=8)
        self.up1 = nn.Conv2d(middle, fine, 3, padding=1)
        self.merge1 = ResidualBlock(fine, groups=8)
        self.conv_out = nn.Conv2d(fine, 4 * 3, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, pixels: Tensor, counts: Tensor) -> Tensor:
        """A U-Net at 1/2, 1/4 and 1/8 of the size; attention over all positions at 1/8."""
        x = F.pixel_unshuffle(torch.cat([pixels - 0.5, counts], dim=1), 2)
        fine = self.fine(self.conv_in(x))
        middle = self.middle(self.down1(fine))
        x = self.down2(middle)
        x = x + F.interpolate(self.position, size=x.shape[-2:], mode="bilinear")
        h = x.shape[2]
        x = rearrange(
            self.coarse(rearrange(x, "b c h w -> b (h w) c")), "b (h w) c -> b c h w", h=h
        )
        x = self.merge2(middle + F.interpolate(self.up2(x), scale_factor=2.0))
        x = self.merge1(fine + F.interpolate(self.up1(x), scale_factor=2.0))
        return pixels + F.pixel_shuffle(self.conv_out(F.silu(x)), 2)


class OneDPieceMini(PictureCodec):
    """Pictures to at most `config.tokens` ordered ids and back; `stream[:k]` decodes for every k."""

    system = "onedpiece"

    def __init__(self, config: OneDPieceMiniConfig | None = None, *, name: str = "onedpiece/mini"):
        super().__init__()
        self.config = config = config or OneDPieceMiniConfig()
        head = config.head_tokens
        pixels = 3 * config.block**2
        self.register_buffer("index", torch.arange(config.coefficients))  # flat DCT positions [K]
        self.register_buffer("mean", torch.zeros(config.coefficients))
        self.basis = Table(config.coefficients, config.components)
        ends = torch.arange(1, head + 1) * config.components // head
        self.register_buffer("ends", ends)  # token t codes components ends[t - 1] ... ends[t] - 1
        self.head = Table(config.codes, config.components)  # the tables side by side
        self.block_basis = Table(pixels, config.block_width)
        self.register_buffer("order", torch.arange(config.blocks))  # which block comes when
        self.tail = Table(config.stages, config.codes, config.block_width)
        self.repair = Repair(config.widths)
        self.register_buffer("dct", dct_matrix(config.image_size), persistent=False)
        opponent = F.normalize(torch.tensor(OPPONENT), dim=1)
        self.register_buffer("opponent", opponent, persistent=False)
        self.spec = CodecSpec(
            name=name,
            modality="image",
            vocab=((config.codes,),),
            layout=Prefix(config.tokens),
            prefix_step=1,
            position_tables=config.head_tokens,
            fit="resize",
            size=(config.image_size, config.image_size),
            weights_licence="Apache-2.0",
        )

    def load_weights(self, tensors: Mapping[str, Tensor], *, source: str) -> None:
        """Load what `save_codec` wrote, strictly."""
        load_into(self, tensors, source=source)

    # pixels <-> coefficients

    def spectrum(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] to DCT coefficients of opponent colours [B, 3 * S * S]."""
        dct = self.dct.float()
        x = torch.einsum("dc,bchw->bdhw", self.opponent.float(), pixels.float() - 0.5)
        return (dct @ x @ dct.T).flatten(1)

    def pixels(self, spectrum: Tensor) -> Tensor:
        """The inverse of `spectrum`."""
        dct, size = self.dct.float(), self.config.image_size
        x = dct.T @ rearrange(spectrum, "b (c h w) -> b c h w", h=size, w=size) @ dct
        return torch.einsum("dc,bdhw->bchw", self.opponent.float(), x) + 0.5

    def components(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] to components of the head's basis [B, P]."""
        return (self.spectrum(pixels)[:, self.index] - self.mean.float()) @ self.basis()

    def coarse(self, components: Tensor) -> Tensor:
        """Components [B, P] to pixels [B, 3, S, S]."""
        spectrum = components.new_zeros(len(components), 3 * self.config.image_size**2)
        spectrum[:, self.index] = components @ self.basis().T + self.mean.float()
        return self.pixels(spectrum)

    def to_blocks(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] to blocks [B, n, pixels a block], in token order."""
        p = self.config.block
        blocks = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return blocks[:, self.order]

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """The inverse of `to_blocks`; any channels."""
        p, h = self.config.block, self.config.image_size // self.config.block
        grid = torch.empty_like(blocks)
        grid[:, self.order] = blocks
        return rearrange(grid, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=p, q=p)

    # codes

    def tokenize(self, pixels: Tensor, length: int | None = None) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] to the first `length` ids [B, length] (all of them by default)."""
        length = self.config.tokens if length is None else length
        ids = self.tokenize_head(self.components(pixels), min(length, self.config.head_tokens))
        if length <= self.config.head_tokens:
            return ids
        blocks = self.to_blocks(pixels.float() - self.coarse(self.decode_head(ids)))
        return torch.cat([ids, self.tokenize_tail(blocks)], dim=1)[:, :length]

    def groups(self) -> list[slice]:
        """The components of each head token."""
        ends = self.ends.tolist()
        return [slice(start, stop) for start, stop in zip([0, *ends], ends)]

    def tokenize_head(self, components: Tensor, length: int) -> Tensor:
        """Components [B, P] to ids [B, length]."""
        table = self.head()
        groups = self.groups()[:length]
        return torch.stack([nearest(components[:, g], table[:, g]) for g in groups], dim=1)

    def tokenize_tail(self, blocks: Tensor) -> Tensor:
        """What the head misses, blocks [B, n, pixels], to ids [B, stages * n], stage after stage."""
        residual, ids = blocks @ self.block_basis(), []
        for s in range(self.config.stages):
            table = self.tail(s)
            ids.append(nearest(residual.flatten(0, 1), table).reshape(residual.shape[:2]))
            residual = residual - table[ids[-1]]
        return torch.cat(ids, dim=1)

    def decode_head(self, ids: Tensor) -> Tensor:
        """Ids [B, k], k <= T, to components [B, P]."""
        components = torch.zeros(len(ids), self.config.components, device=ids.device)
        table = self.head()
        for t, group in enumerate(self.groups()[: ids.shape[1]]):
            components[:, group] = table[ids[:, t], group]
        return components

    def decode_tail(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, m], m < stages * n, to blocks [B, n, pixels], and how many codes each block has [n]."""
        n = self.config.blocks
        coded = torch.zeros(len(ids), n, self.config.block_width, device=ids.device)
        counts = torch.zeros(n, device=ids.device)
        for s, part in enumerate(ids.split(n, dim=1)):
            coded[:, : part.shape[1]] += self.tail(s)[part]
            counts[: part.shape[1]] += 1
        return coded @ self.block_basis().T, counts

    def linear(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, k] to pixels without repair [B, 3, S, S], and the counts that `repair` takes [B, 2, S, S]."""
        head = self.config.head_tokens
        pixels = self.coarse(self.decode_head(codes[:, :head]))
        blocks, counts = self.decode_tail(codes[:, head:])
        pixels = pixels + self.from_blocks(blocks)
        share = min(codes.shape[1], head) / head
        planes = repeat(
            counts / self.config.stages, "n -> b n p", b=len(codes), p=self.config.block**2
        )
        tail = self.from_blocks(planes)
        return pixels, torch.cat([torch.full_like(tail, share), tail], dim=1)

    def detokenize(self, codes: Tensor) -> Tensor:
        """Ids [B, k], 1 <= k <= tokens, to pixels [B, 3, S, S], not clamped."""
        pixels, counts = self.linear(codes)
        return self.repair(pixels.to(self.dtype), counts.to(self.dtype))

    def position_vectors(self, position: int) -> Tensor:
        """What code v of a head token adds to the components: [V, P]."""
        vectors = torch.zeros(self.config.codes, self.config.components, device=self.device)
        group = self.groups()[position]
        vectors[:, group] = self.head()[:, group]
        return vectors

    # media

    @torch.no_grad()
    def encode(
        self,
        media: Sequence[Image],
        *,
        options: PictureOptions | None = None,
        rng: Rng | None = None,
    ) -> list[TokenStream]:
        """Pictures to streams of all tokens; nothing is random."""
        if not media:
            return []
        fit = (options and options.fit) or self.spec.fit
        pixels, metas = fit_pictures(media, self.config.image_size, fit)
        codes = self.tokenize(pixels.to(self.device))
        return [self.stream(row, meta=meta) for row, meta in zip(codes, metas)]


def dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II: [frequency, position]."""
    k, i = torch.arange(size)[:, None].double(), torch.arange(size)[None].double()
    matrix = torch.cos(math.pi * (2 * i + 1) * k / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
