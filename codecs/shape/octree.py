"""Octrees as tensors: keys, children, neighbours, features, and convolutions on them.

- The cube [-1, 1]^3 is a grid of 2**depth cells a side. A cell's key interleaves the bits of x, y, z (x highest), with
  the batch row from bit 48 up: sorting by key is batch-major z-order, and a parent's key is the child's shifted by 3.
- Levels 0 ... full_depth are complete grids. Below, each non-empty node owns exactly eight consecutive rows of the next
  level. `children[d]` is -1 for an empty node, else its running number among the non-empty ones.
- Neighbours are a table [N, 27] over (dx, dy, dz) in {-1, 0, 1}, dz fastest, -1 where there is none. They follow from
  the parents' neighbours, so nothing is searched.
- A convolution gathers its taps in blocks that stay in the cache and multiplies each block at once: the [N, 27 C]
  matrix of the textbook form never exists, forward or backward.

The layout is that of O-CNN (Wang et al., SIGGRAPH 2017; github.com/octree-nn/ocnn-pytorch): published weights apply.
Letters: N nodes, K taps, C and O channels, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

BATCH_BIT = 48
KEY_MASK = (1 << BATCH_BIT) - 1
MAX_DEPTH = 16
# A gathered block on a CPU should stay in its second-level cache; elsewhere a launch must be worth its while.
CPU_BLOCK = 1 << 19
DEVICE_BLOCK = 1 << 26


def encode_keys(xyz: Tensor, batch: Tensor | int = 0) -> Tensor:
    """Keys [N] of integer cells [N, 3] in batch rows [N]."""
    x, y, z = (_spread(c) for c in xyz.long().unbind(-1))
    batch = torch.as_tensor(batch, device=xyz.device).long()
    return (x << 2) | (y << 1) | z | (batch << BATCH_BIT)


def decode_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Integer cells [N, 3] and batch rows [N] of keys [N]."""
    inner = keys & KEY_MASK
    return torch.stack([_gather_bits(inner >> s) for s in (2, 1, 0)], -1), keys >> BATCH_BIT


def parent_keys(keys: Tensor) -> Tensor:
    """Keys one level up."""
    return ((keys & KEY_MASK) >> 3) | (keys & ~KEY_MASK)


def _spread(x: Tensor) -> Tensor:
    """Put bit i of a 16-bit number at bit 3 i."""
    for shift, mask in (
        (16, 0x0000FF0000FF),
        (8, 0x00F00F00F00F),
        (4, 0x0C30C30C30C3),
        (2, 0x249249249249),
    ):
        x = (x | (x << shift)) & mask
    return x


def _gather_bits(x: Tensor) -> Tensor:
    """Undo `_spread`."""
    x = x & 0x249249249249
    for shift, mask in (
        (2, 0x0C30C30C30C3),
        (4, 0x00F00F00F00F),
        (8, 0x0000FF0000FF),
        (16, 0xFFFF),
    ):
        x = (x | (x >> shift)) & mask
    return x


def _tap_tables() -> tuple[Tensor, Tensor]:
    """Per child slot and tap: which of the parent's 27 neighbours holds the cell, and its slot there; both [8, 27]."""
    slots = torch.stack(torch.meshgrid(*[torch.arange(2)] * 3, indexing="ij"), -1).reshape(8, 1, 3)
    taps = torch.stack(torch.meshgrid(*[torch.arange(-1, 2)] * 3, indexing="ij"), -1)
    cell = slots + taps.reshape(1, 27, 3)
    parent = torch.div(cell, 2, rounding_mode="floor") + 1
    slot = cell % 2
    nines, fours = torch.tensor([9, 3, 1]), torch.tensor([4, 2, 1])
    return (parent * nines).sum(-1), (slot * fours).sum(-1)


PARENT_TAP, CHILD_SLOT = _tap_tables()
# Columns of the 27 taps that lie across a face, in the order +z, -z, +y, -y, +x, -x.
FACE_TAPS = (14, 12, 16, 10, 22, 4)


@dataclass(frozen=True)
class Points:
    """Oriented points of one shape in [-1, 1]^3: both [n, 3]."""

    points: Tensor
    normals: Tensor


@dataclass
class Octree:
    """A batch of octrees. Levels are appended by `split` and `grow`, which return new octrees and share the old levels.

    Args:
        full_depth: levels up to here are complete grids.
        batch_size: B.
        keys: per level, sorted keys [N_d] (int64).
        children: per level, -1 or the running number among the non-empty nodes [N_d] (int64).
        points: mean point of each non-empty node of the deepest level, in its grid units [n, 3]; None when grown.
        normals: unit mean normal of the same [n, 3].
    """

    full_depth: int
    batch_size: int
    keys: list[Tensor]
    children: list[Tensor]
    points: Tensor | None = None
    normals: Tensor | None = None
    _neighbours: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _stencils: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def depth(self) -> int:
        """The deepest level."""
        return len(self.keys) - 1

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.keys[0].device

    def count(self, depth: int) -> int:
        """Nodes of a level, the empty ones included."""
        return len(self.keys[depth])

    def nonempty(self, depth: int) -> Tensor:
        """Which nodes of a level are not empty: bool [N_d]."""
        return self.children[depth] >= 0

    def batch(self, depth: int) -> Tensor:
        """The batch row of each node [N_d]."""
        return self.keys[depth] >> BATCH_BIT

    def split_bits(self, depth: int) -> Tensor:
        """1 where a node of the level is split (not empty), else 0: int64 [N_d]."""
        return self.nonempty(depth).long()

    def parents(self, depth: int) -> Tensor:
        """The row of each node's parent one level up [N_d]."""
        rows = self.nonempty(depth - 1).nonzero()[:, 0]
        return repeat(rows, "n -> (n 8)")

    def split(self, depth: int, labels: Tensor) -> Octree:
        """An octree that ends at `depth`, whose nodes there are split where `labels` [N_d] is not 0.

        Where no node is split, node 0 is, so that the next level exists (as published).
        """
        chosen = labels.bool()
        if not bool(chosen.any()):
            chosen = chosen.clone()
            chosen[0] = True
        running = chosen.long().cumsum(0) - 1
        children = torch.where(chosen, running, -1)
        return self._cut(depth, [*self.children[:depth], children])

    def grow(self) -> Octree:
        """One level more: the eight children of each non-empty node of the deepest level, all non-empty."""
        parents = self.keys[self.depth][self.nonempty(self.depth)]
        batch = parents & ~KEY_MASK
        slots = torch.arange(8, device=self.device)
        keys = (((parents & KEY_MASK) << 3) | batch)[:, None] + slots
        keys = keys.reshape(-1)
        grown = self._cut(self.depth, self.children)
        grown.keys.append(keys)
        grown.children.append(torch.arange(len(keys), device=self.device))
        return grown

    def _cut(self, depth: int, children: Sequence[Tensor]) -> Octree:
        return Octree(
            full_depth=self.full_depth,
            batch_size=self.batch_size,
            keys=self.keys[: depth + 1],
            children=list(children[: depth + 1]),
            _neighbours={d: t for d, t in self._neighbours.items() if d <= depth},
            _stencils={d: t for d, t in self._stencils.items() if d <= depth},
        )

    def neighbours(self, depth: int) -> Tensor:
        """The 27 neighbours of each node, -1 where there is none: int64 [N_d, 27]."""
        if depth not in self._neighbours:
            if depth == 0:
                table = torch.full((self.batch_size, 27), -1, device=self.device)
                table[:, 13] = torch.arange(self.batch_size, device=self.device)
            else:
                table = self._child_neighbours(depth)
            self._neighbours[depth] = table
        return self._neighbours[depth]

    def _child_neighbours(self, depth: int) -> Tensor:
        above = self.neighbours(depth - 1)[self.nonempty(depth - 1)]
        # one extra row, so that the neighbour -1 reads "no children"
        running = F.pad(self.children[depth - 1], (0, 1), value=-1)
        first = running[above][:, PARENT_TAP.to(self.device)]
        table = torch.where(first >= 0, first * 8 + CHILD_SLOT.to(self.device), -1)
        return rearrange(table, "n s k -> (n s) k")

    def stencil(self, depth: int) -> Tensor:
        """`neighbours` as a convolution reads it: N_d (a row of zeros) where there is none, int32 [N_d, 27]."""
        if depth not in self._stencils:
            table = self.neighbours(depth)
            self._stencils[depth] = torch.where(table < 0, len(table), table).int()
        return self._stencils[depth]

    def pad(self, x: Tensor, depth: int) -> Tensor:
        """Rows for the non-empty nodes [n, C] to rows for all, zeros for the empty ones [N_d, C]."""
        return F.pad(x, (0, 0, 0, 1))[self.children[depth]]

    def features(self) -> Tensor:
        """Normal and displacement of the deepest level's nodes ("ND"), zeros for the empty ones: [N, 4]."""
        if self.points is None or self.normals is None:
            raise ValueError("the octree was grown, not built from points: it has no features")
        displacement = ((self.points.frac() - 0.5) * self.normals).sum(-1, keepdim=True)
        return self.pad(torch.cat([self.normals, displacement], -1), self.depth)


def build_octree(clouds: Sequence[Points], *, depth: int, full_depth: int) -> Octree:
    """The octrees of point clouds in [-1, 1]^3, one a batch row.

    Points outside the cube are left out.

    Raises:
        ValueError: depth is not between full_depth and 16, or a cloud has no points inside the cube.
    """
    if not 0 < full_depth <= depth <= MAX_DEPTH:
        raise ValueError(f"depth is {depth}, expected full_depth = {full_depth} to {MAX_DEPTH}")
    device = clouds[0].points.device
    keys, grid, normals = [], [], []
    for row, cloud in enumerate(clouds):
        scaled = (cloud.points + 1.0) * 2 ** (depth - 1)
        inside = ((scaled >= 0) & (scaled < 2**depth)).all(-1)
        if not bool(inside.any()):
            raise ValueError(f"cloud {row} has no points inside [-1, 1]^3")
        grid.append(scaled[inside])
        normals.append(cloud.normals[inside])
        keys.append(encode_keys(grid[-1], row))
    occupied, member, size = torch.unique(torch.cat(keys), return_inverse=True, return_counts=True)
    mean = _sum_rows(torch.cat(grid), member, len(occupied)) / size[:, None]
    normal = F.normalize(_sum_rows(torch.cat(normals), member, len(occupied)), dim=-1)
    tree = _complete(full_depth, len(clouds), device)
    for d, level in enumerate(_occupied_levels(occupied, depth, full_depth), start=full_depth):
        tree = tree.split(d, torch.isin(tree.keys[d], level))
        if d < depth:
            tree = tree.grow()
    tree.points, tree.normals = mean, normal
    return tree


def _sum_rows(x: Tensor, member: Tensor, n: int) -> Tensor:
    return x.new_zeros(n, x.shape[1]).index_add_(0, member, x)


def _occupied_levels(occupied: Tensor, depth: int, full_depth: int) -> list[Tensor]:
    """Keys of the non-empty nodes of levels full_depth ... depth."""
    levels = [occupied]
    for _ in range(depth - full_depth):
        levels.append(torch.unique_consecutive(parent_keys(levels[-1])))
    return levels[::-1]


def full_octree(full_depth: int, batch_size: int = 1, device: torch.device | str = "cpu") -> Octree:
    """A complete octree down to `full_depth`: where decoding begins."""
    return _complete(full_depth, batch_size, torch.device(device))


def _complete(full_depth: int, batch_size: int, device: torch.device) -> Octree:
    roots = torch.arange(batch_size, device=device)
    tree = Octree(
        full_depth=full_depth, batch_size=batch_size, keys=[roots << BATCH_BIT], children=[roots]
    )
    for _ in range(full_depth):
        tree = tree.grow()
    return tree


def merge_octrees(trees: Sequence[Octree]) -> Octree:
    """One batch of several octrees of the same depths, rows in order.

    Raises:
        ValueError: their depths differ.
    """
    if len({(tree.full_depth, tree.depth) for tree in trees}) != 1:
        raise ValueError(
            f"octrees have depths {[(t.full_depth, t.depth) for t in trees]}, expected equal ones"
        )
    keys, children = [], []
    for d in range(trees[0].depth + 1):
        row, running, level_keys, level_children = 0, 0, [], []
        for tree in trees:
            level_keys.append(tree.keys[d] + (row << BATCH_BIT))
            child = tree.children[d]
            level_children.append(torch.where(child >= 0, child + running, -1))
            row += tree.batch_size
            running += int(tree.nonempty(d).sum())
        keys.append(torch.cat(level_keys))
        children.append(torch.cat(level_children))
    built = all(tree.points is not None for tree in trees)
    return Octree(
        full_depth=trees[0].full_depth,
        batch_size=sum(tree.batch_size for tree in trees),
        keys=keys,
        children=children,
        points=torch.cat([t.points for t in trees]) if built else None,
        normals=torch.cat([t.normals for t in trees]) if built else None,
    )


class _GatherMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, weight: Tensor, mirrored: bool) -> Tensor:
        ctx.save_for_backward(x, table, weight)
        ctx.mirrored = mirrored
        return _forward(x, table, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, table, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = torch.zeros_like(weight)
            for rows in _blocks(table, x):
                grad_weight.addmm_(_taps(x, table[rows]).t(), grad[rows])
        if ctx.needs_input_grad[0]:
            grad_x = (_grad_mirrored if ctx.mirrored else _grad_scattered)(x, table, weight, grad)
        return grad_x, None, grad_weight, None


def gather_matmul(x: Tensor, table: Tensor, weight: Tensor, *, mirrored: bool = False) -> Tensor:
    """Gather K rows of x for each row of the table, side by side, times the weight.

    Args:
        x: [M, C]; a tap that is missing points at a row of zeros, by custom the last.
        table: integers [N, K], rows of x.
        weight: [K * C, O].
        mirrored: M = N + 1, and row i has j at tap k exactly where row j has i at tap K - 1 - k, as neighbours have.
            The gradient of x is then a gather too, which is several times faster than adding rows up.

    Returns:
        [N, O]
    """
    return _GatherMatmul.apply(x, table, weight, mirrored)


def _forward(x: Tensor, table: Tensor, weight: Tensor) -> Tensor:
    out = x.new_empty(len(table), weight.shape[1])
    for rows in _blocks(table, x):
        torch.mm(_taps(x, table[rows]), weight, out=out[rows])
    return out


def _grad_mirrored(x: Tensor, table: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    taps = rearrange(weight, "(k c) o -> k c o", c=x.shape[1]).flip(0)
    back = rearrange(taps, "k c o -> (k o) c").contiguous()
    return F.pad(_forward(F.pad(grad, (0, 0, 0, 1)), table, back), (0, 0, 0, 1))


def _grad_scattered(x: Tensor, table: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    grad_x = torch.zeros_like(x)
    for rows in _blocks(table, x):
        spread = (grad[rows] @ weight.t()).view(-1, x.shape[1])
        grad_x.index_add_(0, table[rows].reshape(-1), spread)
    return grad_x


def _blocks(table: Tensor, x: Tensor):
    budget = CPU_BLOCK if x.device.type == "cpu" else DEVICE_BLOCK
    step = max(64, budget // (table.shape[1] * x.shape[1]))
    for start in range(0, len(table), step):
        yield slice(start, start + step)


def _taps(x: Tensor, block: Tensor) -> Tensor:
    return x.index_select(0, block.reshape(-1)).view(len(block), -1)


class OctreeConv(nn.Module):
    """3x3x3 convolution over the nodes of a level, no bias: [N, C] to [N, O]. Weights [27, C, O] as published."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weights = nn.Parameter(_xavier(27, in_channels, out_channels))

    def forward(self, x: Tensor, tree: Octree, depth: int) -> Tensor:
        """Convolve level `depth`."""
        weight = self.weights.flatten(0, 1)
        return gather_matmul(F.pad(x, (0, 0, 0, 1)), tree.stencil(depth), weight, mirrored=True)


class OctreeDown(nn.Module):
    """2x2x2 convolution of stride 2: the eight children of each non-empty node side by side. Weights [8, C, O]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weights = nn.Parameter(_xavier(8, in_channels, out_channels))

    def forward(self, x: Tensor, tree: Octree, depth: int) -> Tensor:
        """Level `depth` [N_d, C] to level depth - 1 [N_{d-1}, O]; zeros for its empty nodes."""
        siblings = rearrange(x, "(n s) c -> n (s c)", s=8)
        return tree.pad(siblings @ self.weights.flatten(0, 1), depth - 1)


def _xavier(taps: int, in_channels: int, out_channels: int) -> Tensor:
    bound = (6.0 / (taps * (in_channels + out_channels))) ** 0.5
    return torch.empty(taps, in_channels, out_channels).uniform_(-bound, bound)


class NodeNorm(nn.Module):
    """Group normalisation over all nodes of each batch row; `weights` and `bias` [1, C] as published.

    32 groups, or a quarter of the channels where that is fewer. In float32: node counts exceed what half precision
    holds.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.groups = 32 if channels >= 128 else channels // 4
        self.weights = nn.Parameter(torch.ones(1, channels))
        self.bias = nn.Parameter(torch.zeros(1, channels))

    def forward(self, x: Tensor, batch: Tensor, batch_size: int) -> Tensor:
        """Normalise [N, C]; `batch` [N] says whose node each row is."""
        y = x.float()
        per_group = y.shape[1] // self.groups
        count = torch.bincount(batch, minlength=batch_size).to(y)[:, None] * per_group + 1e-5
        mean = self._spread(_batch_sum(y, batch, batch_size), count)
        y = y - _rows(mean, batch)
        var = self._spread(_batch_sum(y * y, batch, batch_size), count)
        scale = torch.rsqrt(var + 1e-5) * self.weights.float()
        return (y * _rows(scale, batch) + self.bias.float()).to(x.dtype)

    def _spread(self, sums: Tensor, count: Tensor) -> Tensor:
        """Channel sums [B, C] to group means, repeated over the group's channels [B, C]."""
        grouped = rearrange(sums, "b (g c) -> b g c", g=self.groups)
        mean = grouped.sum(-1) / count
        return repeat(mean, "b g -> b (g c)", c=grouped.shape[-1])


def _batch_sum(x: Tensor, batch: Tensor, batch_size: int) -> Tensor:
    if batch_size == 1:
        return x.sum(0, keepdim=True)
    return x.new_zeros(batch_size, x.shape[1]).index_add(0, batch, x)


def _rows(stats: Tensor, batch: Tensor) -> Tensor:
    """Statistics [B, C] for each node; one batch row broadcasts instead of being copied N times."""
    return stats if len(stats) == 1 else stats[batch]
