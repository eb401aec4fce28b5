"""FlexTok's layers (arXiv 2502.13967): transformer blocks on one matrix of tokens of all rows, embeddings, heads.

- muP attention: queries and keys are normalised per head, the scale is 8 / head width. No norm has weights, no linear
  layer of a block a bias.
- A `Pattern` says who attends to whom, by index. Rows of unequal length need no padding, every linear layer sees one
  matrix, and a token that stands for many equal ones is computed once and repeated only as a key.
- The last block of a trunk computes only the tokens that its head reads.

Shapes: n tokens of all rows, R rows, D width, H heads, e head width, P patches, N registers, S times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

HEAD_WIDTH = 64  # in every published size
ATTENTION_SCALE = 8 / HEAD_WIDTH  # muP: 1/e, made equal to 1/sqrt(e) at 64
TIME_PERIOD = 256  # the longest period of the time embedding


class Look(NamedTuple):
    """Tokens `queries` [R, q] attend to tokens `keys` [R, k]; `mask` [q, k] (True = may look) where not to all."""

    queries: Tensor
    keys: Tensor
    mask: Tensor | None = None


class Pattern:
    """Attention among tokens [n, D] of all rows.

    Args:
        looks: their queries are, together, the first `outputs` tokens, each once.
        split: how many of the tokens are patches, where those come first (for `AdaBlock`).
    """

    def __init__(self, looks: Sequence[Look], split: int = 0):
        self.looks, self.split = tuple(looks), split
        order = torch.cat([look.queries.flatten() for look in self.looks])
        self.outputs = len(order)
        self.order = order.argsort()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [outputs, H, e], k and v [n, H, e] to [outputs, H * e]."""
        parts = []
        for queries, keys, mask in self.looks:
            row_q, row_k, row_v = (_rows(t, i) for t, i in ((q, queries), (k, keys), (v, keys)))
            y = F.scaled_dot_product_attention(
                row_q, row_k, row_v, attn_mask=mask, scale=ATTENTION_SCALE
            )
            parts.append(rearrange(y, "r h t e -> (r t) (h e)"))
        return torch.cat(parts).index_select(0, self.order)


def encoder_patterns(
    rows: int, patches: int, registers: int, device: torch.device
) -> tuple[Pattern, Pattern]:
    """Patterns of all blocks but the last, and of the last; tokens are [registers of all rows, patches of all rows]."""
    row = torch.arange(rows, device=device)[:, None]
    own = row * registers + torch.arange(registers, device=device)
    seen = rows * registers + row * patches + torch.arange(patches, device=device)
    causal = torch.ones(registers, registers, dtype=torch.bool, device=device).tril()
    mask = torch.cat([causal.new_ones(registers, patches), causal], dim=1)
    ordered = Look(own, torch.cat([seen, own], dim=1), mask)
    return Pattern([ordered, Look(seen, seen)]), Pattern([ordered])


def decoder_patterns(
    kept: Sequence[int], patches: int, registers: int, device: torch.device
) -> tuple[Pattern, Pattern]:
    """Patterns of all blocks but the last, and of the last; tokens are [patches of all rows, registers row by row].

    Row i has kept[i] registers and, where that is fewer than all, one more that stands for the rest of them: it is one
    query, and as many keys as it stands for.
    """
    sizes = register_counts(kept, registers, device)
    starts = len(kept) * patches + sizes.cumsum(0) - sizes
    whole, last = [], []
    for size in sizes.unique().tolist():
        rows = (sizes == size).nonzero()
        seen = rows * patches + torch.arange(patches, device=device)
        own = starts[rows] + torch.arange(registers, device=device).clamp(max=size - 1)
        keys = torch.cat([seen, own], dim=1)
        whole.append(Look(torch.cat([seen, own[:, :size]], dim=1), keys))
        last.append(Look(seen, keys))
    split = len(kept) * patches
    return Pattern(whole, split), Pattern(last, split)


def register_counts(kept: Sequence[int], registers: int, device: torch.device) -> Tensor:
    """Register tokens of each row, [R]: those kept, and one for the rest."""
    return torch.tensor([k + (k < registers) for k in kept], device=device)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [n, H, e] at `index` [R, t] as [R, H, t, e]."""
    return rearrange(tokens.index_select(0, index.flatten()), "(r t) h e -> r h t e", r=len(index))


def norm(x: Tensor) -> Tensor:
    """Layer norm over the last dimension, without weights; statistics in float32."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys, no biases: [n, D] -> [outputs, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, pattern: Pattern) -> Tensor:
        """Queries are the first `pattern.outputs` tokens."""
        q, k, v = self.wq(x[: pattern.outputs]), self.wk(x), self.wv(x)
        q, k, v = (rearrange(t, "n (h e) -> n h e", e=HEAD_WIDTH) for t in (q, k, v))
        return self.proj(pattern.attend(norm(q), norm(k), v))


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1 x) · fc3 x), no biases: [n, D] -> [n, D]."""

    def __init__(self, width: int):
        super().__init__()
        hidden = int(2 * (4 * width) / 3)  # truncated, not rounded to a multiple: 4778 at 1792
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)
        self.fc3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Every token by itself."""
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    """Pre-norm transformer block [n, D] -> [outputs, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.attn = Attention(width)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, pattern: Pattern) -> Tensor:
        """The last block of a trunk gives fewer tokens than it takes."""
        x = x[: pattern.outputs] + self.attn(norm(x), pattern)
        return x + self.mlp(norm(x))


class Halves(NamedTuple):
    """One thing for patch tokens and one for register tokens, of any of the shapes [..., 1 | tokens, D]."""

    patches: Tensor
    registers: Tensor


class AdaBlock(Block):
    """`Block` whose norms and residuals are scaled, shifted and gated by the time."""

    def __init__(self, width: int):
        super().__init__(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(width, 12 * width))

    def modulation(self, time: Tensor) -> Halves:
        """Time embeddings [S, D] to both halves, [6, S, D] each."""
        both = self.adaLN_modulation(time)
        return Halves(*rearrange(both, "s (half six d) -> half six s d", half=2, six=6))

    def forward(self, x: Tensor, pattern: Pattern, halves: Halves) -> Tensor:  # type: ignore[override]
        """Gates come first in the published order."""
        chunks = (Halves(*pair) for pair in zip(halves.patches, halves.registers))
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = chunks
        h = modulate(norm(x), shift_attn, scale_attn, pattern.split)
        x = x[: pattern.outputs] + gate(self.attn(h, pattern), gate_attn, pattern.split)
        h = modulate(norm(x), shift_mlp, scale_mlp, pattern.split)
        return x + gate(self.mlp(h), gate_mlp, pattern.split)


def modulate(x: Tensor, shift: Halves, scale: Halves, split: int) -> Tensor:
    """x (1 + scale) + shift, by one half for the first `split` tokens of [n, D] and by the other for the rest."""
    rest = len(x) - split  # 0 after the last block's attention
    return torch.cat(
        [
            torch.addcmul(shift.patches, x[:split], 1 + scale.patches),
            torch.addcmul(shift.registers[:rest], x[split:], 1 + scale.registers[:rest]),
        ]
    )


def gate(x: Tensor, by: Halves, split: int) -> Tensor:
    """x · by, by one half for the first `split` tokens of [n, D] and by the other for the rest."""
    rest = len(x) - split
    return torch.cat([x[:split] * by.patches, x[split:] * by.registers[:rest]])


class Trunk(nn.Module):
    """Blocks in a row: [n, D] -> [outputs of `last`, D]."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor, whole: Pattern, last: Pattern) -> Tensor:
        """`whole` for all blocks but the last."""
        for i, block in enumerate(self.blocks, 1):
            x = block(x, last if i == len(self.blocks) else whole)
        return x


class AdaTrunk(nn.Module):
    """`Trunk` modulated by the time."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(AdaBlock(width) for _ in range(depth))

    def modulation(self, time: Tensor) -> tuple[Halves, ...]:
        """Time embeddings [S, D] to every block's halves, [6, S, D]."""
        return tuple(cast(AdaBlock, block).modulation(time) for block in self.blocks)

    def forward(
        self, x: Tensor, whole: Pattern, last: Pattern, modulation: Sequence[Halves]
    ) -> Tensor:
        """`whole` for all blocks but the last; `modulation` one a block."""
        for i, (block, halves) in enumerate(zip(self.blocks, modulation), 1):
            x = block(x, last if i == len(self.blocks) else whole, halves)
        return x


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, as the heads and the modulations do."""

    def reset_parameters(self) -> None:
        """Weights and biases to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Projection(nn.Module):
    """A linear layer under the key `proj`: [..., a] -> [..., b]."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        """Every vector by itself."""
        return self.proj(x)


class Registers(nn.Module):
    """The learned start of every register, [N, D]."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.registers = nn.Parameter(0.02 * torch.randn(count, width))


class MaskToken(nn.Module):
    """What stands in place of an absent token, [D]."""

    def __init__(self, width: int):
        super().__init__()
        self.dropout_mask_token = nn.Parameter(0.02 * torch.randn(width))


class NullToken(nn.Module):
    """What stands in place of every token where there is no condition, [D]."""

    def __init__(self, width: int):
        super().__init__()
        self.nullcond = nn.Parameter(0.02 * torch.randn(width))


class PatchEmbed(nn.Module):
    """Latents [R, C, h, w] to patches [R, P, D]; numbers of a patch in the order row, column, channel."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.patch = patch
        self.patch_proj = nn.Linear(patch * patch * channels, width)

    def forward(self, latents: Tensor) -> Tensor:
        """Row-major."""
        order = "r c (y p) (x q) -> r (y x) (p q c)"
        return self.patch_proj(rearrange(latents, order, p=self.patch, q=self.patch))


class Positions(nn.Module):
    """A table of position vectors [positions, D] for sizes (n,) or (n, n)."""

    def __init__(self, kind: str, width: int, sizes: tuple[int, ...]):
        super().__init__()
        self.kind = kind
        if kind == "sincos" and len(sizes) == 2:
            # Frozen, yet a parameter: published files hold it.
            self.posembs = nn.Parameter(sincos_table(sizes[0], width), requires_grad=False)
        elif kind in ("learnable_sum", "learnable_prod"):
            self.posembs = nn.Parameter(0.02 * torch.randn(len(sizes), 1, width, sizes[0]))
        else:
            raise ValueError(f"positions are {kind!r} in {len(sizes)} dimensions, which is unknown")

    def forward(self) -> Tensor:
        """The whole table, row-major."""
        if self.kind == "sincos":
            return rearrange(self.posembs, "1 d h w -> (h w) d")
        if len(self.posembs) == 1:
            return rearrange(self.posembs, "1 1 d n -> n d")
        rows, columns = self.posembs[0, 0][:, :, None], self.posembs[1, 0][:, None, :]
        grid = rows * columns if self.kind == "learnable_prod" else rows + columns
        return rearrange(grid, "d h w -> (h w) d")


class TimeEmbedding(nn.Module):
    """Times [S] in [0, 1] to embeddings [S, D]."""

    def __init__(self, width: int, frequencies: int, max_timestep: float):
        super().__init__()
        self.frequencies, self.max_timestep = frequencies, max_timestep
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def waves(self, times: Tensor) -> Tensor:
        """[S] to cosines, then sines, [S, frequencies], in float32."""
        half = self.frequencies // 2
        powers = torch.arange(half, dtype=torch.float32, device=times.device) / half
        rates = torch.exp(-math.log(TIME_PERIOD) * powers) * (1000.0 / self.max_timestep)
        angles = times.float()[:, None] * rates
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, times: Tensor) -> Tensor:
        """Every time by itself."""
        return self.mlp(self.waves(times).to(next(self.parameters()).dtype))


class PatchHead(nn.Module):
    """Patch tokens [R * P, D] to latents [R, C, h, w], modulated by the time."""

    def __init__(self, width: int, channels: int, patch: int):
        super().__init__()
        self.patch = patch
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(width, 2 * width))
        self.proj = ZeroLinear(width, patch * patch * channels)

    def modulation(self, time: Tensor) -> Tensor:
        """Time embeddings [S, D] to shift and scale, [2, S, D]."""
        return rearrange(self.adaLN_modulation(time), "s (two d) -> two s d", two=2)

    def forward(self, x: Tensor, modulation: Tensor, rows: int) -> Tensor:
        """`modulation` [2, 1 | R * P, D]."""
        shift, scale = modulation
        x = self.proj(torch.addcmul(shift, norm(x), 1 + scale))
        side, p = math.isqrt(len(x) // rows), self.patch
        order = "(r y x) (p q c) -> r c (y p) (x q)"
        return rearrange(x, order, r=rows, y=side, p=p, q=p)


def sincos_table(side: int, width: int) -> Tensor:
    """[1, D, side, side]: sines and cosines of the row, then of the column, D / 4 frequencies each."""
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    angles = torch.arange(side, dtype=torch.float32)[:, None] * rates
    waves = rearrange([angles.sin(), angles.cos()], "two n d -> (two d) n")
    rows = repeat(waves, "d h -> d h w", w=side)
    columns = repeat(waves, "d w -> d h w", h=side)
    return torch.cat([rows, columns])[None]


def xavier(module: nn.Module) -> None:
    """Start a linear layer as the published code does; for `nn.Module.apply`."""
    if type(module) is nn.Linear:
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
