"""Exact signed distances of closed meshes, for training: every point against every triangle, as matrix products.

- Distance: the squared distance to a triangle is the plane's where the foot of the perpendicular lies inside, else the
  nearest edge's. Every term is a polynomial of the point, so one product with a table of the triangles gives it; only
  the winning triangle is then computed exactly.
- Sign: the winding number, as the sum of solid angles (van Oosterom and Strackee 1983). Robust where parts overlap.

Meant for the hundreds to thousands of faces of small training meshes: work is points x faces.
Letters: P points, F faces.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAIRS_AT_ONCE = 1 << 17  # of a point and a face: the blocks stay in the cache


def signed_distance(triangles: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to a closed mesh, negative inside, and its gradient (a unit vector).

    Args:
        triangles: corners of outward-facing triangles [F, 3, 3].
        points: [P, 3].

    Returns:
        distance [P] and gradient [P, 3], float32; the gradient is 0 where the point lies on the surface.
    """
    triangles, points = triangles.double(), points.double()
    step = max(1, PAIRS_AT_ONCE // len(triangles))
    parts = [_block(triangles, points[i : i + step]) for i in range(0, len(points), step)]
    distance, gradient = (torch.cat(part) for part in zip(*parts))
    return distance.float(), gradient.float()


def _block(triangles: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    face = _squared_distances(triangles, points).argmin(1)
    away = points - closest_points(triangles[face], points)
    distance = away.norm(dim=1)
    sign = torch.where(winding_number(triangles, points) > 0.5, -1.0, 1.0).to(points)
    gradient = sign[:, None] * away / distance.clamp(min=1e-12)[:, None]
    return sign * distance, gradient


def _squared_distances(triangles: Tensor, points: Tensor) -> Tensor:
    """Squared distance of every point to every triangle [P, F]."""
    best = None
    normal = torch.linalg.cross(
        triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    )
    inside = torch.ones(len(points), len(triangles), dtype=torch.bool, device=points.device)
    for i in range(3):
        start = triangles[:, i]
        edge = triangles[:, (i + 1) % 3] - start
        length = (edge * edge).sum(1).clamp(min=1e-24)
        along = ((points @ edge.t()) - (start * edge).sum(1)) / length
        along = along.clamp_(0, 1)
        to_start = _from(points, start)
        # |p - a - t e|^2 = |p - a|^2 - 2 t (p - a).e + t^2 |e|^2
        dot = (points @ edge.t()) - (start * edge).sum(1)
        squared = to_start + along * (along * length - 2 * dot)
        best = squared if best is None else torch.minimum(best, squared)
        outward = torch.linalg.cross(edge, normal)
        inside &= (points @ outward.t()) <= (start * outward).sum(1)
    unit = normal / normal.norm(dim=1, keepdim=True).clamp(min=1e-24)
    height = (points @ unit.t()) - (triangles[:, 0] * unit).sum(1)
    flat = normal.norm(dim=1) < 1e-18
    return torch.where(inside & ~flat, height * height, best)


def _from(points: Tensor, start: Tensor) -> Tensor:
    """|p - a|^2 for all pairs [P, F]."""
    squares = (points * points).sum(1, keepdim=True) + (start * start).sum(1)
    return torch.addmm(squares, points, start.t(), alpha=-2)


def closest_points(triangles: Tensor, points: Tensor) -> Tensor:
    """The point of triangle i that is nearest to point i: [P, 3, 3] and [P, 3] to [P, 3]."""
    normal = torch.linalg.cross(
        triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    )
    area = (normal * normal).sum(1, keepdim=True)
    height = ((points - triangles[:, 0]) * normal).sum(1, keepdim=True) / area.clamp(min=1e-36)
    foot = points - height * normal
    inside = area[:, 0] > 1e-36
    best, nearest = torch.full_like(points[:, 0], float("inf")), foot
    for i in range(3):
        start = triangles[:, i]
        edge = triangles[:, (i + 1) % 3] - start
        inside = inside & ((torch.linalg.cross(edge, foot - start) * normal).sum(1) >= 0)
        length = (edge * edge).sum(1).clamp(min=1e-24)
        along = (((points - start) * edge).sum(1) / length).clamp(0, 1)
        candidate = start + along[:, None] * edge
        squared = (points - candidate).square().sum(1)
        nearest = torch.where((squared < best)[:, None], candidate, nearest)
        best = torch.minimum(best, squared)
    return torch.where(inside[:, None], foot, nearest)


def winding_number(triangles: Tensor, points: Tensor) -> Tensor:
    """How often the mesh winds around each point: 1 inside a closed outward-facing mesh, 0 outside [P]."""
    a, b, c = triangles.unbind(1)
    triple = torch.linalg.cross(a, b) + torch.linalg.cross(b, c) + torch.linalg.cross(c, a)
    volume = (a * torch.linalg.cross(b, c)).sum(1) - points @ triple.t()
    la, lb, lc = (_from(points, v).clamp(min=0).sqrt() for v in (a, b, c))
    square = (points * points).sum(1, keepdim=True)
    below = (
        la * lb * lc
        + _dot(points, square, a, b) * lc
        + _dot(points, square, b, c) * la
        + _dot(points, square, c, a) * lb
    )
    return torch.atan2(volume.float(), below.float()).sum(1) / (2 * torch.pi)


def _dot(points: Tensor, square: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(a - p).(b - p) for all pairs [P, F]."""
    return (a * b).sum(1) - points @ (a + b).t() + square
