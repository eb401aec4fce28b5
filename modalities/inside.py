"""Which points lie inside a mesh, by counting how often a line crosses it.

A line along z through each point, or each column of a grid, crosses the surface at heights that are found exactly; the
sum of the crossings' directions above a point is its winding number. Work grows with the number of columns that each
triangle covers, not with points × triangles. Where parts of a mesh overlap, a point in either is inside.

Letters: X Y Z grid points per axis, N points, F faces, P pairs of a face and a column or point under it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .shape import Shape

_PAIRS_AT_ONCE = 2_000_000
# Columns are moved off round coordinates by an odd fraction of a step, so that none runs along an edge of a model.
_OFFSET = (0.481_327, 0.517_893, 0.5)


@dataclass(frozen=True)
class Grid:
    """A regular grid of points.

    Attributes:
        origin: the first point, x y z.
        step: distance of neighbours.
        counts: number of points along x, y and z.
    """

    origin: tuple[float, float, float]
    step: float
    counts: tuple[int, int, int]

    @classmethod
    def around(cls, shapes: Sequence[Shape], resolution: int) -> Grid:
        """A grid over the common bounding box with `resolution` points along its longest side."""
        if resolution < 2:
            raise ValueError(f"resolution is {resolution}, expected at least 2")
        low = torch.stack([shape.bounds[0] for shape in shapes]).amin(dim=0).double()
        high = torch.stack([shape.bounds[1] for shape in shapes]).amax(dim=0).double()
        step = (high - low).max().item() / resolution
        if not step > 0:
            raise ValueError("the shapes have no extent: all vertices are at one place")
        counts = [max(1, int(np.ceil(side / step))) for side in (high - low).tolist()]
        origin = [start + part * step for start, part in zip(low.tolist(), _OFFSET)]
        return cls((origin[0], origin[1], origin[2]), step, (counts[0], counts[1], counts[2]))


def inside(shape: Shape, grid: Grid) -> Tensor:
    """[X, Y, Z] bool: whether each grid point has a winding number other than 0."""
    triangles = shape.triangles().detach().double().cpu().numpy()
    triangles = (triangles - np.array(grid.origin)) / grid.step  # in grid units
    x_count, y_count, z_count = grid.counts
    change = np.zeros((x_count * y_count, z_count + 1), np.int32)
    for face, column_x, column_y in _columns(triangles, x_count, y_count):
        sign, height = _crossings(triangles[face], column_x, column_y)
        hit = sign != 0
        # A crossing at height h counts for all points below it: those with index < h.
        level = np.clip(np.ceil(height[hit]), 0, z_count).astype(np.int64)
        np.add.at(change, ((column_x * y_count + column_y)[hit], level), sign[hit])
    # Above the highest crossing the number is 0; going down, each crossing is met in turn.
    winding = change[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    return torch.from_numpy(winding != 0).reshape(x_count, y_count, z_count)


def winding(triangles: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How often closed triangles [F, 3, 3] wind around each point [N, 3]: 1 inside, 0 outside, 2 in an overlap."""
    low = triangles[:, :, :2].min(axis=(0, 1))
    side = max(float((triangles[:, :, :2].max(axis=(0, 1)) - low).max()), 1e-300)
    cells, offsets, faces = _buckets(triangles, low, side)
    place = np.floor((points[:, :2] - low) / side * cells).astype(np.int64)
    within = ((place >= 0) & (place < cells)).all(axis=1)
    bucket = np.where(within, place[:, 0] * cells + place[:, 1], cells * cells)
    counts = offsets[bucket + 1] - offsets[bucket]
    out = np.zeros(len(points), np.int64)
    groups = np.cumsum(counts) // _PAIRS_AT_ONCE
    for group in np.unique(groups):
        part = np.flatnonzero(groups == group)
        point = np.repeat(part, counts[part])  # [P]
        first = np.cumsum(counts[part]) - counts[part]
        nth = np.arange(len(point)) - np.repeat(first, counts[part])
        face = faces[offsets[bucket[point]] + nth]
        sign, height = _crossings(triangles[face], points[point, 0], points[point, 1])
        np.add.at(out, point, np.where(height > points[point, 2], sign, 0))
    return out


def _buckets(
    triangles: np.ndarray, low: np.ndarray, side: float
) -> tuple[int, np.ndarray, np.ndarray]:
    """Faces by the cells of a square grid over x and y that their bounding boxes touch.

    Returns:
        Cells a side, where each cell's faces begin [cells^2 + 2] (the last cell is "outside", without any), and faces.
    """
    cells = int(np.clip(np.sqrt(len(triangles)), 1, 1024))
    while True:
        corners = (triangles[:, :, :2] - low) / side * cells
        first = np.floor(corners.min(axis=1)).astype(np.int64).clip(0, cells - 1)
        last = np.floor(corners.max(axis=1)).astype(np.int64).clip(0, cells - 1)
        size = last - first + 1
        area = size.prod(axis=1)
        if cells == 1 or area.sum() <= 16 * len(triangles) + _PAIRS_AT_ONCE:
            break
        cells //= 2  # many large triangles
    face = np.repeat(np.arange(len(triangles)), area)
    nth = np.arange(len(face)) - np.repeat(np.cumsum(area) - area, area)
    x = first[face, 0] + nth // size[face, 1]
    bucket = x * cells + first[face, 1] + nth % size[face, 1]
    order = np.argsort(bucket, kind="stable")
    counts = np.bincount(bucket, minlength=cells * cells + 1)
    return cells, np.concatenate([[0], np.cumsum(counts)]), face[order]


def _columns(triangles: np.ndarray, x_count: int, y_count: int):  # type: ignore[no-untyped-def]
    """Yield (face, x, y) of the columns under each face's bounding box, some millions at a time."""
    low = np.ceil(triangles[:, :, :2].min(axis=1)).astype(np.int64).clip(0)  # [F, 2]
    high = np.floor(triangles[:, :, :2].max(axis=1)).astype(np.int64)
    high = np.minimum(high, [x_count - 1, y_count - 1])
    size = (high - low + 1).clip(0)
    area = size.prod(axis=1)
    faces = np.flatnonzero(area)
    groups = np.cumsum(area[faces]) // _PAIRS_AT_ONCE
    for group in np.unique(groups):
        part = faces[groups == group]
        face = np.repeat(part, area[part])  # [P]
        first = np.repeat(np.cumsum(area[part]) - area[part], area[part])
        place = np.arange(len(face)) - first
        yield face, low[face, 0] + place // size[face, 1], low[face, 1] + place % size[face, 1]


def _crossings(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For P triangles [P, 3, 3] and vertical lines: +1 where it faces up, −1 down, 0 missed; and the height."""
    point = np.stack([x, y], axis=1)[:, None, :]  # [P, 1, 2]
    here = corners[:, :, :2] - point  # [P, 3, 2]
    there = np.roll(here, -1, axis=1)
    # Twice the signed areas opposite to corners c, a, b; of one sign where the line passes through.
    areas = here[..., 0] * there[..., 1] - here[..., 1] * there[..., 0]  # [P, 3]
    total = areas.sum(axis=1)
    side = np.where(areas == 0, _side_of_tie(there - here), np.sign(areas))
    sign = np.where((side > 0).all(axis=1), 1, np.where((side < 0).all(axis=1), -1, 0))
    weights = np.roll(areas, -1, axis=1)  # of corners a, b, c
    height = (weights * corners[:, :, 2]).sum(axis=1) / np.where(total == 0, 1, total)
    return sign.astype(np.int32), height


def _side_of_tie(edge: np.ndarray) -> np.ndarray:
    """Where a line runs exactly through an edge: on which side it would be if it were moved by nothing.

    The two faces of the edge get opposite answers, so that the line crosses exactly one of them.
    """
    forward = (edge[..., 1] > 0) | ((edge[..., 1] == 0) & (edge[..., 0] > 0))
    return np.where(forward, 1, -1)
