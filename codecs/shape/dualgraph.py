"""Dual octree graphs: the leaves of an octree tile the cube; a graph joins those that share a face.

- The graph of depth d has the leaves of levels full_depth ... d - 1, in order, and then every node of level d.
- A row has six directions (+z, -z, +y, -y, +x, -x). In each there is one neighbour of its own size or coarser, or none,
  or, for a leaf beside a finer region, several. A graph convolution takes each direction's mean, and the row itself.
- Neighbours come down the tree: a node without a neighbour of its own size takes its parent's. Nothing is searched.
- The means of the few rows with several neighbours are computed first and appended to the features; after that a
  convolution is one gather of seven taps (`octree.gather_matmul`).
- A node's type (its depth) enters as a one-hot vector beside the features. Its seven means depend on the graph alone,
  so they are kept.

DualOctreeGNN (Wang et al., SIGGRAPH 2022; github.com/octree-nn/ognn-pytorch) is the source of the layout.
Letters: N rows, C and O channels, T node types, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .octree import FACE_TAPS, NodeNorm, Octree, gather_matmul

DIRECTIONS = 6
TAPS = 7


@dataclass
class DualGraph:
    """The graph of one depth.

    Args:
        depth, full_depth, batch_size: as in the octree.
        rows: the octree node of each row, numbered through levels full_depth ... depth [N].
        node_type: depth of each row's node minus full_depth [N].
        batch: batch row of each row [N].
        leaves: how many rows are coarser than `depth`; they come first.
        table: row to gather per direction and for the row itself [N, 7]; N + g is the mean of group g, N + G is zero.
        group, member: which rows each group averages, both [M].
        group_size: rows in each group [G].
    """

    depth: int
    full_depth: int
    batch_size: int
    rows: Tensor
    node_type: Tensor
    batch: Tensor
    leaves: int
    table: Tensor
    group: Tensor
    member: Tensor
    group_size: Tensor
    _type_taps: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    def extend(self, x: Tensor) -> Tensor:
        """Features [N, C], the groups' means, and a row of zeros: [N + G + 1, C], what `table` points into."""
        sums = x.new_zeros(len(self.group_size), x.shape[1])
        means = sums.index_add(0, self.group, x[self.member]) / self.group_size[:, None].to(x)
        return torch.cat([x, means, x.new_zeros(1, x.shape[1])])

    def type_taps(self, types: int, dtype: torch.dtype) -> Tensor:
        """The seven means of the one-hot node types [N, 7 * T]."""
        if (types, dtype) not in self._type_taps:
            onehot = F.one_hot(self.node_type, types).to(dtype)
            self._type_taps[types, dtype] = self.extend(onehot)[self.table.long()].flatten(1)
        return self._type_taps[types, dtype]

    def edges(self) -> tuple[Tensor, Tensor]:
        """All edges as (row, neighbour) [2, E] and their direction [E]; for tests and for other graph libraries."""
        n = len(self)
        row, direction = (self.table[:, :DIRECTIONS] < n).nonzero().unbind(1)
        single = self.table[row, direction].long()
        slot = self.table[:, :DIRECTIONS] - n
        grouped = (slot >= 0) & (slot < len(self.group_size))
        owner = torch.empty(len(self.group_size), 2, dtype=torch.long, device=row.device)
        owner[slot[grouped].long()] = grouped.nonzero()
        many = owner[self.group]
        edge = torch.stack([torch.cat([row, many[:, 0]]), torch.cat([single, self.member])])
        return edge, torch.cat([direction, many[:, 1]])


def build_graphs(tree: Octree, first: int, last: int) -> dict[int, DualGraph]:
    """The dual graphs of depths `first` ... `last`; `first` is full_depth or more."""
    levels = range(tree.full_depth, last + 1)
    start = _level_starts(tree, last)
    adjacent = [_complete_adjacency(tree)]
    for d in levels[1:]:
        adjacent.append(_adjacency(tree, d, start[d], adjacent[-1]))
    return {d: _graph(tree, d, start, adjacent) for d in range(first, last + 1)}


def _level_starts(tree: Octree, last: int) -> dict[int, int]:
    """The number of each level's first node, counted from full_depth on."""
    start, total = {}, 0
    for d in range(tree.full_depth, last + 1):
        start[d], total = total, total + tree.count(d)
    start[last + 1] = total
    return start


def _complete_adjacency(tree: Octree) -> Tensor:
    """Face neighbours in the complete grid [N, 6], -1 at the border."""
    return tree.neighbours(tree.full_depth)[:, FACE_TAPS]


def _adjacency(tree: Octree, depth: int, start: int, above: Tensor) -> Tensor:
    """Per node and direction the neighbour of its own size, else the parent's: numbers [N_d, 6], -1 at the border."""
    same = tree.neighbours(depth)[:, FACE_TAPS]
    return torch.where(same >= 0, same + start, above[tree.parents(depth)])


def _graph(tree: Octree, depth: int, start: dict[int, int], adjacent: list[Tensor]) -> DualGraph:
    levels = range(tree.full_depth, depth + 1)
    kept = torch.cat(
        [~tree.nonempty(d) if d < depth else torch.ones_like(tree.nonempty(d)) for d in levels]
    )
    rows = kept.nonzero()[:, 0]
    number = torch.full_like(kept, -1, dtype=torch.long)
    number[rows] = torch.arange(len(rows), device=rows.device)
    # a missing neighbour (-1) reads the extra last entry; an internal one is -1 already
    target = F.pad(number, (0, 1), value=-1)[torch.cat(adjacent[: len(levels)])[rows]]
    level = torch.repeat_interleave(
        torch.arange(len(levels), device=rows.device),
        torch.tensor([tree.count(d) for d in levels], device=rows.device),
    )[rows]
    table, group, member, size = _groups(target, level)
    return DualGraph(
        depth=depth,
        full_depth=tree.full_depth,
        batch_size=tree.batch_size,
        rows=rows,
        node_type=level,
        batch=torch.cat([tree.batch(d) for d in levels])[rows],
        leaves=int((rows < start[depth]).sum()),
        table=table,
        group=group,
        member=member,
        group_size=size,
    )


def _groups(target: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The table of taps, and the groups: a leaf's finer neighbours are those nodes whose coarser neighbour it is."""
    n = len(target)
    finer, direction = ((target >= 0) & (level[target] < level[:, None])).nonzero().unbind(1)
    leaf = target[finer, direction]
    slot = leaf * DIRECTIONS + (direction ^ 1)
    owners, group, size = torch.unique(slot, return_inverse=True, return_counts=True)
    zero = n + len(owners)
    table = torch.where(target >= 0, target, zero)
    table.view(-1)[owners] = n + torch.arange(len(owners), device=target.device)
    own = torch.arange(n, device=target.device)[:, None]
    return torch.cat([table, own], 1).int(), group, finer, size


class GraphConv(nn.Module):
    """Convolution over a dual graph, no bias. Weights [7 * (C + T), O] as published; T = 0 where there is one type."""

    def __init__(self, in_channels: int, out_channels: int, node_types: int):
        super().__init__()
        self.node_types = node_types if node_types > 1 else 0
        width = TAPS * (in_channels + self.node_types)
        bound = (6.0 / (width + out_channels)) ** 0.5
        self.weights = nn.Parameter(torch.empty(width, out_channels).uniform_(-bound, bound))

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        """[N, C] to [N, O]."""
        weights = rearrange(self.weights, "(k c) o -> k c o", k=TAPS)
        c = x.shape[1]
        out = gather_matmul(graph.extend(x), graph.table, weights[:, :c].flatten(0, 1))
        if self.node_types:
            taps = graph.type_taps(self.node_types, x.dtype)
            out = out + taps @ weights[:, c:].flatten(0, 1)
        return out


class GraphNorm(nn.Module):
    """`NodeNorm` over the rows of a graph, one level down in the published names."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = NodeNorm(channels)

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        """Normalise [N, C]."""
        return self.norm(x, graph.batch, graph.batch_size)


class GraphLinear(nn.Module):
    """A linear map; one level down in the published names."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool):
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] to [N, O]."""
        return self.linear(x)


class GraphConvNorm(nn.Module):
    """Graph convolution and normalisation."""

    def __init__(self, in_channels: int, out_channels: int, node_types: int):
        super().__init__()
        self.conv = GraphConv(in_channels, out_channels, node_types)
        self.norm = GraphNorm(out_channels)

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        """[N, C] to [N, O]."""
        return self.norm(self.conv(x, graph), graph)


class GraphLinearNorm(nn.Module):
    """Linear map without bias, normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = GraphLinear(in_channels, out_channels, bias=False)
        self.norm = GraphNorm(out_channels)

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        """[N, C] to [N, O]."""
        return torch.relu(self.norm(self.conv(x), graph))


class _Resample(nn.Module):
    """Weights [C, C, 8] in the published order, whose flattening mixes child and channel as it does."""

    def __init__(self, channels: int):
        super().__init__()
        bound = (6.0 / (16 * channels)) ** 0.5
        self.weights = nn.Parameter(torch.empty(channels, channels, 8).uniform_(-bound, bound))


class GraphDown(nn.Module):
    """From the graph of depth d to that of d - 1: eight siblings to their parent; leaves pass through."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.downsample = _Resample(in_channels)
        self.conv1x1 = _change(in_channels, out_channels)

    def forward(self, x: Tensor, tree: Octree, graphs: dict[int, DualGraph], depth: int) -> Tensor:
        """[N_d, C] to [N_{d-1}, O]."""
        fine, coarse = graphs[depth], graphs[depth - 1]
        siblings = rearrange(x[fine.leaves :], "(n s) c -> n (s c)", s=8)
        merged = siblings @ self.downsample.weights.flatten(1).t()
        # rows of level d - 1: a leaf's row comes from the fine graph, where it stands behind the coarser leaves
        split = tree.nonempty(depth - 1)
        level = x.new_zeros(len(split), x.shape[1])
        level = level.index_put((split.nonzero()[:, 0],), merged)
        leaves = x[coarse.leaves : fine.leaves]
        level = level.index_put(((~split).nonzero()[:, 0],), leaves)
        out = torch.cat([x[: coarse.leaves], level])
        return out if self.conv1x1 is None else self.conv1x1(out, coarse)


class GraphUp(nn.Module):
    """From the graph of depth d to that of d + 1: a node to its eight children; leaves pass through."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.upsample = _Resample(in_channels)
        self.conv1x1 = _change(in_channels, out_channels)

    def forward(self, x: Tensor, tree: Octree, graphs: dict[int, DualGraph], depth: int) -> Tensor:
        """[N_d, C] to [N_{d+1}, O]."""
        coarse, fine = graphs[depth], graphs[depth + 1]
        level = x[coarse.leaves :]
        split = tree.nonempty(depth)
        children = level[split] @ self.upsample.weights.flatten(1)
        children = rearrange(children, "n (s c) -> (n s) c", s=8)
        out = torch.cat([x[: coarse.leaves], level[~split], children])
        return out if self.conv1x1 is None else self.conv1x1(out, fine)


def _change(in_channels: int, out_channels: int) -> GraphLinearNorm | None:
    return None if in_channels == out_channels else GraphLinearNorm(in_channels, out_channels)


class GraphResBlock(nn.Module):
    """Two convolutions with a shortcut; `bottleneck` narrows the middle."""

    def __init__(self, channels: int, node_types: int, bottleneck: int = 1):
        super().__init__()
        self.conva = GraphConvNorm(channels, channels // bottleneck, node_types)
        self.convb = GraphConvNorm(channels // bottleneck, channels, node_types)

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        """[N, C] to [N, C]."""
        return torch.relu(self.convb(torch.relu(self.conva(x, graph)), graph) + x)


class GraphStage(nn.Module):
    """Residual blocks at one depth."""

    def __init__(self, channels: int, blocks: int, node_types: int, bottleneck: int):
        super().__init__()
        self.resblks = nn.ModuleList(
            GraphResBlock(channels, node_types, bottleneck) for _ in range(blocks)
        )

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        """[N, C] to [N, C]."""
        for block in self.resblks:
            x = block(x, graph)
        return x


class GraphHead(nn.Module):
    """Two linear maps that read one number or more from each row."""

    def __init__(self, in_channels: int, out_channels: int, hidden: int = 64):
        super().__init__()
        self.conv1 = GraphLinearNorm(in_channels, hidden)
        self.conv2 = GraphLinear(hidden, out_channels, bias=True)

    def forward(self, x: Tensor, graph: DualGraph) -> Tensor:
        """[N, C] to [N, O]."""
        return self.conv2(self.conv1(x, graph))
