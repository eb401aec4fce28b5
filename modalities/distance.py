"""Signed distance from points to a watertight mesh, exact up to rounding.

- Few triangles: every point against every triangle. The squared distance is the plane's where the foot of the
  perpendicular lies inside, else the nearest edge's; both are polynomials of the point: matrix products give them.
- Many: they are cut until each piece lies within a radius r of its middle (about 1/100 of the model), and a KD-tree
  holds the middles. The triangles of the nearest middles are candidates; where these do not reach out to the distance
  found plus r, all that do are asked.
- The sign is the winding number's (`inside.winding`): right where parts overlap, which the direction to the nearest
  triangle is not.
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

from .inside import winding
from .shape import Shape

_PAIRS_AT_ONCE = 200_000  # of a point and a candidate
_FEW = 1024  # triangles that are all asked
_CANDIDATES = (8, 32)
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
        limit: beyond it the distance is ± `limit` and the gradient zero; with many triangles, far points then cost
            little.

    Raises:
        ValueError: a mesh that is not watertight (see `watertight.make_watertight`), points that are not finite, or a
            limit that is not above 0.
    """
    if not shape.is_watertight:
        raise ValueError("the mesh is not watertight; make it so with make_watertight(shape).shape")
    if points.ndim != 2 or points.shape[1] != 3 or not torch.isfinite(points).all():
        raise ValueError(f"points are {tuple(points.shape)}, expected [N, 3], all finite")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit is {limit}, expected above 0")
    queries = points.detach().double().cpu().numpy()
    corners = shape.triangles().detach().double().cpu().numpy()  # [F, 3, 3]
    cross = _cross(corners)
    area = np.linalg.norm(cross, axis=1)
    # A face without area has no normal; its edges are its neighbours' too.
    real = area > 0
    place, face = nearest(corners[real], queries, limit)
    normal = (cross[real] / area[real][:, None])[face]
    away = queries - place
    length = np.linalg.norm(away, axis=1)
    sign = np.where(winding(corners, queries) != 0, -1.0, 1.0)
    direction = away * (sign / np.maximum(length, 1e-300))[:, None]
    on = length <= _ON_SURFACE * shape.diagonal
    gradient = np.where(on[:, None], normal, direction)
    if limit is not None:
        gradient[length >= limit] = 0
        length = np.minimum(length, limit)
    found = np.concatenate([(sign * length)[:, None], gradient], axis=1)
    result = torch.from_numpy(found).to(torch.float32).to(points.device)
    return SignedDistance(result[:, 0], result[:, 1:])


def udf(shape: Shape, points: Tensor, *, limit: float) -> Tensor:
    """Unsigned distance [N] of points [N, 3] to any mesh; `limit` where it is larger."""
    queries = points.detach().double().cpu().numpy()
    corners = shape.triangles().detach().double().cpu().numpy()
    place, _ = nearest(corners, queries, limit)
    length = np.linalg.norm(queries - place, axis=1)
    return torch.from_numpy(np.minimum(length, limit)).to(torch.float32).to(points.device)


def nearest(
    corners: np.ndarray, points: np.ndarray, limit: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest place [N, 3] on triangles [F, 3, 3], and the face [N] it lies on.

    Beyond `limit` any place that is no nearer.
    """
    if len(corners) <= _FEW:
        step = max(1, _PAIRS_AT_ONCE // len(corners))
        blocks = [points[i : i + step] for i in range(0, len(points), step)] or [points]
        face = np.concatenate([_squared_distances(corners, b).argmin(axis=1) for b in blocks])
        return _on_triangles(points, corners[face]), face
    return _Pieces(corners).nearest(points, limit)


def _squared_distances(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Squared distance of every point to every triangle [N, F]."""
    # The middle of all is the origin: products of large coordinates would lose digits.
    middle = corners.reshape(-1, 3).mean(axis=0)
    corners, points = corners - middle, points - middle
    normal = _cross(corners)
    best = np.full((len(points), len(corners)), np.inf)
    within = np.ones(best.shape, bool)
    own = (points * points).sum(1)[:, None]
    for i in range(3):
        start = corners[:, i]
        edge = corners[:, (i + 1) % 3] - start
        length = (edge * edge).sum(1)
        dot = points @ edge.T - (start * edge).sum(1)  # (p - a).e
        along = (dot / np.maximum(length, 1e-300)).clip(0, 1)
        to_start = own + (start * start).sum(1) - 2 * (points @ start.T)
        # |p - a - t e|^2 = |p - a|^2 - 2 t (p - a).e + t^2 |e|^2
        np.minimum(best, to_start + along * (along * length - 2 * dot), out=best)
        outward = np.cross(edge, normal)
        within &= points @ outward.T < (start * outward).sum(1)
    size = np.linalg.norm(normal, axis=1)
    unit = normal / np.maximum(size, 1e-300)[:, None]
    height = points @ unit.T - (corners[:, 0] * unit).sum(1)
    return np.where(within & (size > 0), height * height, best)


class _Pieces:
    """Triangles prepared for queries."""

    def __init__(self, corners: np.ndarray) -> None:
        from scipy.spatial import KDTree

        self.corners = corners
        middles, self.face_of, self.radius = _pieces(corners)
        self.tree = KDTree(middles)

    def nearest(self, points: np.ndarray, limit: float | None) -> tuple[np.ndarray, np.ndarray]:
        """See `nearest`."""
        place, face = np.empty_like(points), np.zeros(len(points), np.int64)
        asking = np.arange(len(points))
        bound = np.inf if limit is None else limit + self.radius
        for width in _CANDIDATES:
            width = min(width, self.tree.n)
            certain = np.empty(len(asking), bool)
            for start in range(0, len(asking), _PAIRS_AT_ONCE // width):
                part = slice(start, start + _PAIRS_AT_ONCE // width)
                one = asking[part]
                place[one], face[one], certain[part] = self._ask(points[one], width, bound)
            asking = asking[~certain]
        self._ask_all(points, place, face, asking)
        return place, face

    def _ask(
        self, points: np.ndarray, width: int, bound: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nearest place and face among `width` candidates, and whether no other can be nearer."""
        reach, piece = self.tree.query(points, k=width, distance_upper_bound=bound)
        reach, piece = reach.reshape(len(points), width), piece.reshape(len(points), width)
        piece[np.isinf(reach)] = 0  # none within the bound; any triangle serves as one too far away
        faces = self.face_of[piece]
        places = _on_triangles(np.repeat(points, width, axis=0), self.corners[faces.reshape(-1)])
        squared = ((places - np.repeat(points, width, axis=0)) ** 2).sum(axis=1)
        best = squared.reshape(len(points), width).argmin(axis=1)
        at = best + np.arange(len(points)) * width
        certain = np.sqrt(squared[at]) + self.radius <= reach[:, -1]
        return places[at], faces.reshape(-1)[at], certain

    def _ask_all(
        self, points: np.ndarray, place: np.ndarray, face: np.ndarray, asking: np.ndarray
    ) -> None:
        """Improve `place` and `face` of some points by every piece that may hold a nearer one."""
        reach = np.linalg.norm(points[asking] - place[asking], axis=1) + self.radius
        counts = self.tree.query_ball_point(points[asking], reach, return_length=True)
        groups = np.cumsum(counts) // _PAIRS_AT_ONCE
        for group in np.unique(groups):
            part = groups == group
            one, count = asking[part], counts[part]
            pieces = self.tree.query_ball_point(points[one], reach[part])
            faces = self.face_of[np.concatenate(pieces).astype(np.int64)]
            each = np.repeat(points[one], count, axis=0)
            places = _on_triangles(each, self.corners[faces])
            squared = ((places - each) ** 2).sum(axis=1)
            first = np.cumsum(count) - count
            order = np.lexsort((squared, np.repeat(np.arange(len(one)), count)))
            place[one], face[one] = places[order[first]], faces[order[first]]


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


def _on_triangles(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """The point of triangle i that is nearest to point i: [N, 3] and [N, 3, 3] to [N, 3]."""
    a, b, c = corners.transpose(1, 0, 2)
    edges = np.stack([_on_edge(points, *pair) for pair in ((a, b), (b, c), (c, a))])  # [3, N, 3]
    best = ((edges - points) ** 2).sum(axis=2).argmin(axis=0)
    on_plane, within = _on_face(points, a, b, c)
    return np.where(within[:, None], on_plane, edges[best, np.arange(len(points))])


def _on_edge(points: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    edge = stop - start
    along = ((points - start) * edge).sum(1) / np.maximum((edge * edge).sum(1), 1e-300)
    return start + along.clip(0, 1)[:, None] * edge


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


def _cross(corners: np.ndarray) -> Any:
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
