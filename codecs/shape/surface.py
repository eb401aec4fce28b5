"""From local planes on octree nodes to a mesh: the neural MPU, and marching cubes where the surface can be.

- Every leaf (and every node of the last depth) carries a plane: gradient and value at its centre. The field at a point
  is the weighted mean of the planes of the eight nearest cells of each depth; deeper cells weigh more (`mpu`).
- The eight nearest cells of a depth are children of the eight nearest of the depth above, so they are found by walking
  down the tree: one gather a level, no search.
- A dense grid of n^3 samples is nearly all empty space. `sparse` evaluates the blocks that hold occupied nodes or a
  change of sign, follows the surface where it leaves them, and gives the rest the sign of its block. Marching cubes
  then closes the surface by construction.

Multi-level partition of unity: Ohtake et al. 2003; the learnt form: Wang et al., Dual Octree Graph Networks, 2022.
Letters: P points, N nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .octree import Octree, decode_keys, encode_keys

POINTS_AT_ONCE = 1 << 16
CORNERS = torch.stack(torch.meshgrid(*[torch.arange(2)] * 3, indexing="ij"), -1).reshape(8, 3)


@dataclass(frozen=True)
class Field:
    """A signed distance field on one octree batch.

    Args:
        tree: the octree; levels full_depth ... depth are read.
        depth: the depth whose nodes all count, leaf or not.
        planes: gradient (3) and value (1) of every node of levels full_depth ... depth, zeros for internal ones [N, 4].
    """

    tree: Octree
    depth: int
    planes: Tensor

    def __call__(self, points: Tensor, batch: Tensor | None = None) -> Tensor:
        """The field at `points` [P, 3] in batch rows [P] (row 0 where None): [P]."""
        return mpu(self, points, batch)

    @cached_property
    def tables(self) -> list[Tensor]:
        """Per depth, each node's plane as a function of position: gradient, value at 0, and 1; [N_d + 1, 5].

        Zeros for nodes that do not count, and in the last row, which stands for "no node".
        """
        tables, start = [], 0
        for depth in range(self.tree.full_depth, self.depth + 1):
            stop = start + self.tree.count(depth)
            plane = self.planes[start:stop]
            centre = (decode_keys(self.tree.keys[depth])[0].to(plane) + 0.5) / 2 ** (depth - 1) - 1
            at_zero = plane[:, 3] - (plane[:, :3] * centre).sum(-1)
            table = torch.cat([plane[:, :3], at_zero[:, None], torch.ones_like(plane[:, :1])], -1)
            if depth < self.depth:
                table = table * ~self.tree.nonempty(depth)[:, None]
            tables.append(F.pad(table, (0, 0, 0, 1)))
            start = stop
        return tables


def mpu(field: Field, points: Tensor, batch: Tensor | None = None) -> Tensor:
    """Weighted mean of the planes around each point, differentiable in planes and points: [P].

    Weight: product over the axes of 1 - |distance in cells|, times depth^2 / 50. A plane is linear in the position, so
    the weighted sum over the eight cells is one trilinear interpolation of the planes' coefficients.
    """
    tree = field.tree
    mixed = points.new_zeros(len(points), 5)
    base, rows = None, None
    for depth, table in enumerate(field.tables, start=tree.full_depth):
        place = (points + 1) * 2 ** (depth - 1) - 0.5
        below, base = base, torch.floor(place.detach()).int()
        if rows is None or below is None:
            rows = _first_rows(tree, base, batch)
        else:
            rows = _child_rows(tree, depth, base, below, rows)
        fraction = place - base
        weight = _eight([torch.stack([1 - f, f]) for f in fraction.unbind(-1)], torch.mul)
        mixed = mixed + _interpolate(table, rows, weight * (depth**2 / 50))
    value = (mixed[:, :3] * points).sum(-1) + mixed[:, 3]
    return value / (mixed[:, 4] + 1e-8)


def _interpolate(table: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Sums of eight rows [8, P] of [N + 1, 5], weighted [8, P]: [P, 5]."""
    if torch.is_grad_enabled() and (weight.requires_grad or table.requires_grad):
        return (table[rows] * weight[..., None]).sum(0)
    # fused, but it has no second derivative
    rows, weight = rows.t().contiguous(), weight.t().contiguous()
    return F.embedding_bag(rows, table, per_sample_weights=weight, mode="sum")


def _eight(axes: list[Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Join what belongs to the two cells of each axis, three times [2, P], for the eight cells [8, P]."""
    x, y, z = axes
    return join(join(x[:, None, None], y[None, :, None]), z[None, None, :]).flatten(0, 2)


def _pairs(base: Tensor) -> list[Tensor]:
    """The two cells of each axis, three times [2, P]."""
    return [torch.stack([b, b + 1]) for b in base.unbind(-1)]


def _first_rows(tree: Octree, base: Tensor, batch: Tensor | None) -> Tensor:
    """Rows of the eight cells from `base` [P, 3] on at full_depth, where all exist; N outside the cube: [8, P]."""
    depth, count = tree.full_depth, tree.count(tree.full_depth)
    zero = torch.zeros_like(base[0, :1])
    axes = []
    for axis, cells in enumerate(_pairs(base)):
        line = torch.arange(2**depth, device=base.device)
        key = encode_keys(torch.stack([line if a == axis else 0 * line for a in range(3)], -1))
        key = F.pad(key.int(), (1, 1), value=-2 * count)
        axes.append(key[(cells + 1).clamp(0, 2**depth + 1)])
    rows = _eight(axes, torch.add)
    if batch is not None:
        rows = rows + batch.int() * 8**depth
    return torch.where(rows < 0, zero + count, rows)


def _child_rows(tree: Octree, depth: int, base: Tensor, above: Tensor, rows: Tensor) -> Tensor:
    """Rows of the eight cells from `base` on at `depth`, N where there is no node, given those one level up: [8, P].

    `above` is the base one level up: the parents of the eight cells are among the eight cells from there on.
    """
    fours = (4, 2, 1)
    cells = _pairs(base)
    which = [((c >> 1) - a) * n for c, a, n in zip(cells, above.unbind(-1), fours)]
    parent = rows.gather(0, _eight(which, torch.add).long())
    children = tree.children[depth - 1]
    # one extra entry: the row "no node" has no children
    first = F.pad(torch.where(children < 0, -1, children * 8).int(), (0, 1), value=-1)[parent]
    slot = _eight([(c & 1) * n for c, n in zip(cells, fours)], torch.add)
    return torch.where(first < 0, tree.count(depth), first + slot)


def evaluate(field: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """The field at many points, a bounded number at a time and without gradients: [P]."""
    with torch.no_grad():
        parts = [
            field(points[i : i + POINTS_AT_ONCE]) for i in range(0, len(points), POINTS_AT_ONCE)
        ]
    return torch.cat(parts) if parts else points.new_zeros(0)


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Where and how finely the field is sampled.

    Args:
        size: samples a side.
        box: the grid spans [-box, box), the right border left out (as published).
        level: the iso-value; slightly positive, so that thin parts survive.
        block: samples a side of the blocks that are kept or skipped.
    """

    size: int = 256
    box: float = 0.9
    level: float = 0.002
    block: int = 4

    @property
    def step(self) -> float:
        """Distance between samples."""
        return 2 * self.box / self.size


def dense(field: Callable[[Tensor], Tensor], grid: GridConfig, device: torch.device) -> Tensor:
    """The field at every sample: [size, size, size]. What the published code does; slow."""
    axis = torch.arange(grid.size, device=device) * grid.step - grid.box
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    return evaluate(field, points).view(grid.size, grid.size, grid.size)


def sparse(field: Field, grid: GridConfig) -> Tensor:
    """The field at the samples of every block that the surface crosses, the block's own sign elsewhere: [size]^3.

    First the blocks that an occupied node touches, or whose corners differ in sign. Then, as long as the surface leaves
    the evaluated blocks through a side, the blocks behind that side.
    """
    blocks = -(-grid.size // grid.block)
    coarse = _coarse(field, grid, blocks)
    wanted = _sign_changes(coarse, grid.level) | _occupied_blocks(field, grid, blocks)
    volume = coarse[:-1, :-1, :-1]
    for axis in range(3):
        volume = volume.repeat_interleave(grid.block, dim=axis)
    known = torch.zeros_like(wanted)
    while bool(wanted.any()):
        _fill(volume, field, grid, wanted)
        known |= wanted
        wanted = _behind(volume < grid.level, grid.block) & ~known
    return volume[: grid.size, : grid.size, : grid.size]


def _fill(volume: Tensor, field: Field, grid: GridConfig, blocks: Tensor) -> None:
    """Evaluate the field at all samples of some blocks."""
    inner = torch.arange(grid.block, device=volume.device)
    inner = torch.stack(torch.meshgrid(inner, inner, inner, indexing="ij"), -1).reshape(-1, 3)
    index = (blocks.nonzero()[:, None] * grid.block + inner).reshape(-1, 3)
    values = evaluate(field, index.to(field.planes) * grid.step - grid.box)
    volume[index[:, 0], index[:, 1], index[:, 2]] = values


def _behind(inside: Tensor, block: int) -> Tensor:
    """Blocks at whose sides the sign changes from one block to the next: bool [blocks]^3."""
    n = inside.shape[0] // block
    hit = torch.zeros(n, n, n, dtype=torch.bool, device=inside.device)
    for axis in range(3):
        lined = inside.movedim(axis, 0)
        differs = lined[block - 1 : -1 : block] != lined[block::block]
        side = rearrange(differs, "n (y a) (z b) -> n y z a b", a=block, b=block).any(-1).any(-1)
        along = hit.movedim(axis, 0)
        along[:-1] |= side
        along[1:] |= side
    return hit


def _coarse(field: Field, grid: GridConfig, blocks: int) -> Tensor:
    """The field at the blocks' corners: [blocks + 1]^3."""
    axis = torch.arange(blocks + 1, device=field.planes.device).to(field.planes)
    axis = (axis * grid.block * grid.step - grid.box).clamp(max=grid.box)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    return rearrange(
        evaluate(field, points.reshape(-1, 3)), "(x y z) -> x y z", x=blocks + 1, y=blocks + 1
    )


def _sign_changes(coarse: Tensor, level: float) -> Tensor:
    """Blocks whose eight corners differ in sign: bool [blocks]^3."""
    inside = (coarse < level).float()[None, None]
    some = F.max_pool3d(inside, 2, stride=1)
    every = -F.max_pool3d(-inside, 2, stride=1)
    return (some != every)[0, 0]


def _occupied_blocks(field: Field, grid: GridConfig, blocks: int) -> Tensor:
    """Blocks that an occupied node of the last depth touches: bool [blocks]^3."""
    tree = field.tree
    keys = tree.keys[field.depth][tree.nonempty(field.depth)]
    low = decode_keys(keys)[0].to(field.planes) / 2 ** (field.depth - 1) - 1
    keep = torch.zeros(blocks, blocks, blocks, dtype=torch.bool, device=low.device)
    size = 2.0 ** (1 - field.depth)
    for corner in CORNERS.to(low):
        at = (low + corner * size + grid.box) / (grid.step * grid.block)
        at = torch.floor(at).long().clamp(0, blocks - 1)
        keep[at[:, 0], at[:, 1], at[:, 2]] = True
    return keep


def mesh(volume: Tensor, grid: GridConfig) -> tuple[Tensor, Tensor]:
    """Marching cubes: vertices [V, 3] in the field's coordinates and faces [F, 3], closed, normals outwards.

    The volume is framed with "outside", so that a surface that meets the border is closed there. Both are empty where
    the field has one sign.
    """
    from skimage.measure import marching_cubes

    outside = grid.level + grid.step
    array = np.pad(volume.detach().float().cpu().numpy(), 1, constant_values=outside)
    if not array.min() < grid.level < array.max():
        return torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long)
    low, high = _bounding(array < grid.level)
    array = array[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    vertices, faces, _, _ = marching_cubes(array, grid.level, allow_degenerate=False)
    # skimage returns views with negative strides, and winds the faces towards the lower values
    vertices = torch.from_numpy(np.ascontiguousarray(vertices + low - 1, dtype=np.float32))
    faces = torch.from_numpy(np.ascontiguousarray(faces, dtype=np.int64))
    return vertices * grid.step - grid.box, faces


def _bounding(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The box of the true entries and one entry around it."""
    low, high = np.zeros(3, int), np.zeros(3, int)
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero(inside.any(axis=others))
        low[axis], high[axis] = hit[0] - 1, hit[-1] + 2
    return low, high
