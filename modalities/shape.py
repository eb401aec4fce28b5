"""Shapes: triangle meshes and oriented point clouds, read from and written to OBJ, PLY, STL, OFF and GLB.

STL has no shared vertices, OBJ and GLB split them along texture seams; on reading, vertices at exactly the same place
become one again, because a mesh that falls apart at its seams encloses nothing.

Letters: V vertices, F faces.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from . import meshfile
from .files import Source, format_of, write_bytes

SAVE_SUFFIXES = {f".{kind}": kind for kind in meshfile.KINDS}


@dataclass(frozen=True, eq=False)
class Shape:
    """A triangle mesh, or a point cloud where `faces` is None.

    Attributes:
        vertices: [V, 3] float32, finite.
        faces: [F, 3] int64 rows of vertex numbers, counter-clockwise seen from outside; None for a point cloud.
        normals: [V, 3] float32 outward unit vectors, or None.
    """

    vertices: Tensor
    faces: Tensor | None = None
    normals: Tensor | None = None
    modality: ClassVar[str] = "shape"

    def __post_init__(self) -> None:
        _check_points("vertices", self.vertices)
        if self.normals is not None:
            _check_points("normals", self.normals)
            if self.normals.shape != self.vertices.shape:
                raise ValueError(
                    f"normals are {tuple(self.normals.shape)}, expected {tuple(self.vertices.shape)}"
                )
        if self.faces is not None:
            _check_faces(self.faces, len(self.vertices))

    @classmethod
    def load(cls, source: Source, *, merge: bool = True) -> Shape:
        """Read a mesh or a point cloud, from a path or from bytes.

        A point cloud's normals come from PLY. Quads and larger polygons are split into triangles.

        Args:
            source: where from.
            merge: make one of vertices at exactly the same place, and drop faces that this closes up.

        Raises:
            MediaError: not one of the five kinds, cut short, above the limits of `meshfile`, or not finite.
        """
        arrays = meshfile.read(source)
        vertices, faces = arrays.vertices, arrays.faces
        if merge and faces is not None:
            vertices, faces = _merged(vertices, faces)
        return cls(
            torch.from_numpy(vertices),
            None if faces is None else torch.from_numpy(faces),
            None if arrays.normals is None else torch.from_numpy(arrays.normals),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write OBJ, PLY, STL, OFF or GLB, as the extension says; float32 coordinates come back exactly.

        Normals are kept by PLY alone.

        Raises:
            MediaError: unknown extension, or the folder cannot be written.
            ValueError: a point cloud in a format that would lose its normals.
        """
        kind = format_of(path, SAVE_SUFFIXES)
        arrays = meshfile.Arrays(
            self.vertices.detach().cpu().numpy(), _numpy(self.faces), _numpy(self.normals)
        )
        write_bytes(path, meshfile.write(arrays, kind))

    @classmethod
    def from_numpy(
        cls,
        vertices: np.ndarray,
        faces: np.ndarray | None = None,
        normals: np.ndarray | None = None,
    ) -> Shape:
        """From [V, 3] coordinates, [F, 3] integers and [V, 3] normals of any precision."""
        return cls(
            torch.from_numpy(np.array(vertices, np.float32)),
            None if faces is None else torch.from_numpy(np.array(faces, np.int64)),
            None if normals is None else torch.from_numpy(np.array(normals, np.float32)),
        )

    @cached_property
    def is_watertight(self) -> bool:
        """Whether each edge joins exactly two faces that run along it in opposite directions."""
        if self.faces is None or len(self.faces) == 0:
            return False
        start = self.faces[:, [0, 1, 2]].reshape(-1)
        stop = self.faces[:, [1, 2, 0]].reshape(-1)
        if (start == stop).any():
            return False
        count = len(self.vertices)
        there, back = (start * count + stop).sort().values, (stop * count + start).sort().values
        return bool((there[1:] != there[:-1]).all() and torch.equal(there, back))

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest corner of the bounding box, [3] each."""
        return self.vertices.amin(dim=0), self.vertices.amax(dim=0)

    @property
    def diagonal(self) -> float:
        """The length of the bounding box's diagonal."""
        low, high = self.bounds
        return (high - low).norm().item()

    def face_cross(self) -> Tensor:
        """[F, 3]: for each face its outward normal times twice its area."""
        a, b, c = self.triangles().unbind(dim=1)
        return torch.linalg.cross(b - a, c - a)

    def triangles(self) -> Tensor:
        """[F, 3 corners, 3 coordinates]; `ValueError` for a point cloud."""
        if self.faces is None:
            raise ValueError("this shape is a point cloud, expected a mesh with faces")
        return self.vertices[self.faces]

    def volume(self) -> float:
        """The enclosed volume by the divergence theorem; negative where the faces look inwards."""
        a, b, c = self.triangles().to(torch.float64).unbind(dim=1)
        return ((a * torch.linalg.cross(b, c)).sum() / 6).item()

    def sample(self, count: int, rng: torch.Generator | None = None) -> Shape:
        """`count` points spread evenly over the surface, with the normals of their faces.

        Of a point cloud: a random subset, without repetition while there are enough points.

        Args:
            count: number of points.
            rng: source of randomness; None draws from seed 0.

        Raises:
            ValueError: a mesh without area, or a `count` below 1.
        """
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1")
        rng = torch.Generator().manual_seed(0) if rng is None else rng
        if self.faces is None:
            return self._subset(count, rng)
        cross = self.face_cross()
        cumulative = cross.to(torch.float64).norm(dim=1).cumsum(dim=0)
        if len(cumulative) == 0 or not cumulative[-1] > 0:
            raise ValueError("the mesh has no area to sample from")
        draw = torch.rand(count, 3, generator=rng, dtype=torch.float64).to(cumulative.device)
        face = torch.searchsorted(cumulative, draw[:, 0] * cumulative[-1], right=True)
        face = face.clamp(max=len(cumulative) - 1)
        # Fold the unit square onto the triangle, so that the points are even.
        weights = torch.where(draw[:, 1:].sum(1, keepdim=True) > 1, 1 - draw[:, 1:], draw[:, 1:])
        u, v = weights.to(torch.float32).unbind(dim=1)
        a, b, c = self.triangles()[face].unbind(dim=1)
        points = a + u[:, None] * (b - a) + v[:, None] * (c - a)
        return Shape(points, None, torch.nn.functional.normalize(cross[face], dim=1, eps=1e-30))

    def _subset(self, count: int, rng: torch.Generator) -> Shape:
        total = len(self.vertices)
        if count <= total:
            index = torch.randperm(total, generator=rng)[:count]
        else:
            index = torch.randint(total, (count,), generator=rng)
        index = index.to(self.vertices.device)
        return Shape(
            self.vertices[index], None, None if self.normals is None else self.normals[index]
        )

    def normalized(self, extent: float = 1.6) -> tuple[Shape, Tensor, float]:
        """Move the middle of the bounding box to 0 and make its longest side `extent`.

        The default fills 80 % of the cube [−1, 1]³, as OctGPT's data do.

        Returns:
            The shape, and the `center` [3] and `scale` with which `transformed` undoes it.

        Raises:
            ValueError: all vertices are at one place.
        """
        low, high = self.bounds
        longest = (high - low).max().item()
        if not longest > 0:
            raise ValueError("the shape has no extent: all its vertices are at one place")
        center, scale = (low + high) / 2, longest / extent
        return Shape((self.vertices - center) / scale, self.faces, self.normals), center, scale

    def transformed(self, center: Tensor, scale: float) -> Shape:
        """`vertices * scale + center`: what undoes `normalized`. Normals stay as they are."""
        if not scale > 0:
            raise ValueError(f"scale is {scale}, expected more than 0")
        return Shape(self.vertices * scale + center, self.faces, self.normals)


def _merged(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One vertex per place, in order of first appearance; faces that close up are dropped."""
    clean = vertices + np.float32(0)  # −0 and +0 are one place
    rows = np.ascontiguousarray(clean).view(np.dtype((np.void, 12))).reshape(-1)
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    merged = rank[inverse.reshape(-1)][faces]
    a, b, c = merged.T
    return clean[first[order]], merged[(a != b) & (b != c) & (c != a)]


def _check_points(name: str, points: Tensor) -> None:
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"{name} are {tuple(points.shape)}, expected [V, 3]")
    if points.dtype != torch.float32:
        raise ValueError(f"{name} are {points.dtype}, expected torch.float32")
    if not torch.isfinite(points).all():
        raise ValueError(f"{name} hold NaN or infinite values")


def _check_faces(faces: Tensor, count: int) -> None:
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype != torch.int64:
        raise ValueError(f"faces are {tuple(faces.shape)} {faces.dtype}, expected [F, 3] int64")
    if len(faces) and not (faces.min() >= 0 and faces.max() < count):
        raise ValueError(
            f"faces name vertices {faces.min()} … {faces.max()}, expected 0 … {count - 1}"
        )


def _numpy(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().cpu().numpy()
