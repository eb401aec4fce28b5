"""Signed distance from points to a watertight mesh.

- Triangles are cut until each piece lies within a radius r of its middle (about 1/100 of the model), and a KD-tree
  holds the middles. The triangles of the nearest middles are the candidates for the exact distance d.
- Where the candidates reach out to d + r, no other triangle can be nearer. Within 2 r of the surface, points for which
  they do not ask again for more. Further away d may be too large by r² / 2d, at most r / 4.
- The sign comes from the angle-weighted pseudonormal of the nearest corner, edge or face, which is right for every
  watertight mesh (Bærentzen and Aanæs 2005, https://doi.org/10.1109/TVCG.2005.49).
- With a `limit`, as training truncates distances, points beyond it are not searched for at all; their sign is that of
  the nearest point of a grid so fine that no surface can lie between.
- The gradient is the unit vector away from the nearest surface point (towards it inside), on the surface the
  face's normal.

Letters: N points, F faces, P pieces, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .inside import Grid, inside
from .shape import Shape

_PAIRS_AT_ONCE = 200_000  # of a point and a candidate
_CANDIDATES = (8, 32, 128)
_NEAR = 2.0  # radii
_FINEST = 512  # grid points along the longest side
_PIECES = 16_000  # about as many as this, however few and large the triangles
_ON_SURFACE = 1e-7  # of the diagonal: nearer than this, the direction to the surface is rounding


@dataclass(frozen=True)
class SignedDistance:
    """Signed distances and their gradients.

    Attributes:
        distance: [N] float32, negative inside.
        gradient: [N, 3] float32 unit vectors; zero beyond the limit, if there is one.
    """

    distance: Tensor
    gradient: Tensor


def sdf(shape: Shape, points: Tensor, *, limit: float | None = None) -> SignedDistance:
    """Signed distance and its gradient at points.

    Args:
        shape: a watertight mesh, faces outwards.
        points: [N, 3] float.
        limit: beyond it the distance is ± `limit` and the gradient zero; far points then cost nothing.

    Raises:
        ValueError: a mesh that is not watertight (see `watertight.make_watertight`), points that are not finite, or a
            limit below 1/512 of the shape's longest side.
    """
    if not shape.is_watertight:
        raise ValueError("the mesh is not watertight; make it so with make_watertight(shape).shape")
    if points.ndim != 2 or points.shape[1] != 3 or not torch.isfinite(points).all():
        raise ValueError(f"points are {tuple(points.shape)}, expected [N, 3], all finite")
    queries = points.detach().double().cpu().numpy()
    found = _Surface(shape).query(queries, limit)
    if limit is not None:
        far = np.abs(found[:, 0]) >= limit
        found[far] = 0
        found[far, 0] = limit * _far_sign(shape, queries[far], limit)
    result = torch.from_numpy(found).to(torch.float32).to(points.device)
    return SignedDistance(result[:, 0], result[:, 1:])


def udf(shape: Shape, points: Tensor, *, limit: float) -> Tensor:
    """Unsigned distance [N] of points [N, 3] to any mesh; `limit` where it is larger."""
    found = _Surface(shape).query(points.detach().double().cpu().numpy(), limit)[:, 0]
    return torch.from_numpy(np.minimum(np.abs(found), limit)).to(torch.float32).to(points.device)


def _far_sign(shape: Shape, points: np.ndarray, limit: float) -> np.ndarray:
    """−1 inside, 1 outside, for points at least `limit` away from the surface."""
    low, high = (corner.double().cpu().numpy() for corner in shape.bounds)
    # Grid points at a step of `limit` are nearer than `limit` to everything in the bounding box.
    resolution = max(2, int(np.ceil((high - low).max() / limit)))
    if resolution > _FINEST:
        raise ValueError(f"limit is {limit}, expected at least {(high - low).max() / _FINEST:g}")
    grid = Grid.around([shape], resolution)
    place = np.rint((points - np.array(grid.origin)) / grid.step).astype(np.int64)
    place = place.clip(0, np.array(grid.counts) - 1)
    within = ((points >= low) & (points <= high)).all(axis=1)
    return np.where(within & inside(shape, grid).numpy()[tuple(place.T)], -1.0, 1.0)


class _Surface:
    """A mesh prepared for queries."""

    def __init__(self, shape: Shape) -> None:
        from scipy.spatial import KDTree

        self.corners = shape.triangles().detach().double().cpu().numpy()  # [F, 3, 3]
        self.on_surface = _ON_SURFACE * shape.diagonal
        # [F, 7, 3]; without them (of an open mesh) the distance has no sign
        closed = shape.is_watertight
        self.normals = (
            _pseudonormals(shape, self.corners) if closed else np.zeros((len(self.corners), 7, 3))
        )
        middles, self.face_of, self.radius = _pieces(self.corners)
        self.tree = KDTree(middles)

    def query(self, points: np.ndarray, limit: float | None) -> np.ndarray:
        """[N, 4]: distance and gradient; beyond `limit` any distance that is not smaller."""
        out = np.empty((len(points), 4))
        asking = np.arange(len(points))
        bound = np.inf if limit is None else limit + self.radius
        for width in _CANDIDATES:
            width = min(width, self.tree.n)
            certain = np.empty(len(asking), bool)
            for start in range(0, len(asking), _PAIRS_AT_ONCE // width):
                part = slice(start, start + _PAIRS_AT_ONCE // width)
                out[asking[part]], certain[part] = self._ask(points[asking[part]], width, bound)
            near = np.abs(out[asking, 0]) < _NEAR * self.radius
            asking = asking[near & ~certain]
        return out

    def _ask(self, points: np.ndarray, width: int, bound: float) -> tuple[np.ndarray, np.ndarray]:
        """[N, 4] distance and gradient from `width` candidates, and whether no other can be nearer."""
        reach, piece = self.tree.query(points, k=width, distance_upper_bound=bound)
        reach, piece = reach.reshape(len(points), width), piece.reshape(len(points), width)
        piece[np.isinf(reach)] = 0  # none within the bound; any triangle serves as one too far away
        squared, nearest, normal = self._closest(points, self.face_of[piece])
        certain = np.sqrt(squared) + self.radius <= reach[:, -1]
        return self._signed(points, nearest, normal), certain

    def _closest(
        self, points: np.ndarray, faces: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of [N, K] candidate faces the nearest: squared distance [N], point [N, 3], pseudonormal [N, 3]."""
        count, width = faces.shape
        place, feature = _closest_on_triangles(
            np.repeat(points, width, axis=0), self.corners[faces.reshape(-1)]
        )
        squared = ((place - np.repeat(points, width, axis=0)) ** 2).sum(axis=1)
        best = squared.reshape(count, width).argmin(axis=1) + np.arange(count) * width
        return squared[best], place[best], self.normals[faces.reshape(-1)[best], feature[best]]

    def _signed(self, points: np.ndarray, nearest: np.ndarray, normal: np.ndarray) -> np.ndarray:
        away = points - nearest
        length = np.linalg.norm(away, axis=1)
        sign = np.where((away * normal).sum(axis=1) < 0, -1.0, 1.0)
        unit = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
        direction = away * (sign / np.maximum(length, 1e-30))[:, None]
        gradient = np.where((length > self.on_surface)[:, None], direction, unit)
        return np.concatenate([(sign * length)[:, None], gradient], axis=1)


def _pieces(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Middles [P, 3] of small pieces that cover the triangles, the face of each, and the largest radius."""
    area = np.linalg.norm(_cross(corners), axis=1).sum() / 2
    # A piece of this radius covers at least about its square; so the number of pieces is bounded.
    radius = np.sqrt(area / _PIECES)
    faces = np.arange(len(corners))
    done: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while len(corners):
        middle = corners.mean(axis=1)
        reach = np.linalg.norm(corners - middle[:, None], axis=2).max(axis=1)
        small = reach <= max(radius, 1e-12)
        done.append((middle[small], faces[small], reach[small]))
        corners, faces = _halved(corners[~small], faces[~small])
        if sum(len(part[0]) for part in done) + len(corners) > 20 * _PIECES + len(done[0][0]):
            radius *= 2  # needles: long and without area
    middles, owners, reaches = (np.concatenate(part) for part in zip(*done))
    return middles, owners, float(reaches.max())


def _halved(corners: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut each triangle through the middle of its longest edge."""
    if len(corners) == 0:
        return corners, faces
    edges = np.linalg.norm(corners - np.roll(corners, -1, axis=1), axis=2)  # ab, bc, ca
    turn = (edges.argmax(axis=1)[:, None] + np.arange(3)) % 3
    a, b, c = np.take_along_axis(corners, turn[:, :, None], axis=1).transpose(1, 0, 2)
    middle = (a + b) / 2
    halves = [np.stack([a, middle, c], axis=1), np.stack([middle, b, c], axis=1)]
    return np.concatenate(halves), np.concatenate([faces, faces])


def _closest_on_triangles(points: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest point [N, 3] of each triangle [N, 3, 3], and where it lies.

    Returns:
        The points, and the feature: 0, 1, 2 = corner a, b, c; 3, 4, 5 = edge ab, bc, ca; 6 = the face.
    """
    a, b, c = corners.transpose(1, 0, 2)
    places, features = zip(
        _on_edge(points, a, b, (3, 0, 1)),
        _on_edge(points, b, c, (4, 1, 2)),
        _on_edge(points, c, a, (5, 2, 0)),
    )
    place, feature = np.stack(places), np.stack(features)  # [3, N, 3], [3, N]
    best = ((place - points) ** 2).sum(axis=2).argmin(axis=0)
    each = np.arange(len(points))
    on_plane, within = _on_face(points, a, b, c)
    return (
        np.where(within[:, None], on_plane, place[best, each]),
        np.where(within, 6, feature[best, each]),
    )


def _on_edge(
    points: np.ndarray, start: np.ndarray, stop: np.ndarray, names: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    edge = stop - start
    along = ((points - start) * edge).sum(1) / np.maximum((edge * edge).sum(1), 1e-300)
    feature = np.where(along <= 0, names[1], np.where(along >= 1, names[2], names[0]))
    return start + along.clip(0, 1)[:, None] * edge, feature


def _on_face(
    points: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The foot of each point on the triangle's plane, and whether it lies inside the triangle."""
    normal = np.cross(b - a, c - a)
    square = (normal * normal).sum(axis=1)
    foot = points - (((points - a) * normal).sum(1) / np.maximum(square, 1e-300))[:, None] * normal
    sides = [
        (np.cross(stop - start, foot - start) * normal).sum(axis=1)
        for start, stop in ((a, b), (b, c), (c, a))
    ]
    return foot, (np.stack(sides) > 0).all(axis=0) & (square > 0)


def _pseudonormals(shape: Shape, corners: np.ndarray) -> np.ndarray:
    """[F, 7, 3]: for each face those of its three corners, its three edges, and itself."""
    assert shape.faces is not None, "watertight shapes have faces"
    faces, count = shape.faces.cpu().numpy(), len(shape.vertices)
    cross = _cross(corners)
    normal = cross / np.maximum(np.linalg.norm(cross, axis=1, keepdims=True), 1e-300)  # [F, 3]
    at_vertex = np.zeros((count, 3))
    for corner in range(3):
        one = _unit(corners[:, (corner + 1) % 3] - corners[:, corner])
        two = _unit(corners[:, (corner + 2) % 3] - corners[:, corner])
        angle = np.arccos((one * two).sum(axis=1).clip(-1, 1))
        np.add.at(at_vertex, faces[:, corner], angle[:, None] * normal)
    start, stop = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    own, twin = start * count + stop, stop * count + start  # the same edge seen from both faces
    order = np.argsort(own)
    other = order[np.searchsorted(own[order], twin)] // 3
    at_edge = normal[:, None] + normal[other].reshape(-1, 3, 3)  # [F, 3, 3]
    return np.concatenate([at_vertex[faces], at_edge, normal[:, None]], axis=1)


def _cross(corners: np.ndarray) -> Any:
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)
