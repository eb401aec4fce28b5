"""Make any mesh watertight, so that it has an inside, a volume and a signed distance.

Most meshes from the web are soups: open sheets, overlapping parts, faces turned the wrong way. The repair keeps what it
can and says what it did:

1. a watertight mesh is returned as it is (its faces turned outwards, if it was inside out);
2. a closed mesh whose faces disagree about the outside gets them turned;
3. everything else becomes the surface at half a voxel's distance from it, with all that cannot be reached from the
   outside filled in: by mesh2sdf (https://github.com/wang-ps/mesh2sdf, as OctGPT's data were made) where it is
   installed, else by the same construction here, which needs no compiler.

Two voxel corners on either side of the surface are never both further than half a voxel from it; so the shell
that separates inside from outside has no holes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .distance import SignedDistance, sdf, udf
from .shape import Shape

__all__ = ["SignedDistance", "Watertight", "make_watertight", "sdf", "udf"]

Remeshing: TypeAlias = Literal["mesh2sdf", "voxels"]
MAX_RESOLUTION = 512
_EXTENT = 1.6  # of the shape within the cube [−1, 1]³: 80 %, OctGPT's margin


@dataclass(frozen=True)
class Watertight:
    """A watertight mesh and how it came about.

    Attributes:
        shape: the mesh, in the coordinates of the original.
        method: `unchanged`, `turned` (some or all faces), `mesh2sdf` or `voxels`.
        offset: how far the new surface lies outside the old one, 0 for the first two.
    """

    shape: Shape
    method: Literal["unchanged", "turned", "mesh2sdf", "voxels"]
    offset: float


def make_watertight(
    shape: Shape, *, resolution: int = 128, remeshing: Remeshing | None = None
) -> Watertight:
    """A watertight mesh that looks like `shape`, faces outwards.

    Args:
        shape: a mesh.
        resolution: voxels along the cube in which the longest side takes 80 %; for the last resort only.
        remeshing: which last resort; None takes mesh2sdf where it is installed.

    Raises:
        ValueError: a point cloud, a mesh without extent, or a resolution outside 16 … 512.
    """
    if shape.faces is None or len(shape.faces) == 0:
        raise ValueError("this shape is a point cloud, expected a mesh with faces")
    if not 16 <= resolution <= MAX_RESOLUTION:
        raise ValueError(f"resolution is {resolution}, expected 16 … {MAX_RESOLUTION}")
    if shape.is_watertight:
        if shape.volume() >= 0:
            return Watertight(shape, "unchanged", 0.0)
        return Watertight(Shape(shape.vertices, shape.faces.flip(1)), "turned", 0.0)
    if _is_closed(shape.faces):
        turned = _turned(shape)
        if turned.is_watertight and turned.volume() > 0:
            return Watertight(turned, "turned", 0.0)
    if remeshing is None:
        remeshing = "mesh2sdf" if importlib.util.find_spec("mesh2sdf") else "voxels"
    small, center, scale = shape.normalized(_EXTENT)
    solid = (
        _by_mesh2sdf(small, resolution)
        if remeshing == "mesh2sdf"
        else _by_voxels(small, resolution)
    )
    offset = scale / resolution
    return Watertight(solid.transformed(center, scale), remeshing, offset)


def _is_closed(faces: Tensor) -> bool:
    """Whether every edge has two faces, whichever way they run."""
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(dim=1).values
    _, uses = edges.unique(dim=0, return_counts=True)
    return bool((uses == 2).all())


def _turned(shape: Shape) -> Shape:
    """The same faces, turned so that neighbours agree and each body's volume is positive."""
    import trimesh

    assert shape.faces is not None, "point clouds are refused above"
    mesh = trimesh.Trimesh(shape.vertices.cpu().numpy(), shape.faces.cpu().numpy(), process=False)
    trimesh.repair.fix_normals(mesh, multibody=True)
    return Shape(shape.vertices.cpu(), torch.from_numpy(np.array(mesh.faces, np.int64)))


def _by_mesh2sdf(shape: Shape, resolution: int) -> Shape:
    try:
        import mesh2sdf
    except ImportError as error:
        raise ImportError("mesh2sdf is not installed: pip install 'anytok[watertight]'") from error
    _, mesh = mesh2sdf.compute(
        shape.vertices.cpu().numpy(),
        shape.faces.cpu().numpy(),  # type: ignore[union-attr]
        size=resolution,
        fix=True,
        level=1 / resolution,
        return_mesh=True,
    )
    return _outwards(np.asarray(mesh.vertices), np.asarray(mesh.faces))


def _by_voxels(shape: Shape, resolution: int) -> Shape:
    """The level set at half a voxel of a distance that is negative wherever the outside does not reach."""
    from skimage.measure import label, marching_cubes

    step = 2 / resolution
    level = step / 2
    band = _band(shape, resolution)
    field = torch.full(band.shape, 2 * step)
    places = band.nonzero()  # x y z
    field[band] = udf(shape, places * step - 1, limit=2 * step)
    free = (field > level).numpy()
    # Joined through faces alone: that is what a shell of half a voxel seals.
    regions = np.asarray(label(free, connectivity=1))
    outside = regions == regions[0, 0, 0]
    signed = (field - level).numpy()
    signed = np.where(free & ~outside, -signed, signed)
    # A value of exactly 0 would put several vertices of the new mesh into one place.
    signed[np.abs(signed) < 1e-3 * step] = -1e-3 * step
    surface = marching_cubes(signed, 0.0)  # vertices, faces, normals, values
    return _outwards(surface[0] * step - 1, surface[1])


def _band(shape: Shape, resolution: int) -> Tensor:
    """[R, R, R] bool: the grid points within some two voxels of the surface."""
    from scipy import ndimage

    area = shape.face_cross().double().norm(dim=1).sum().item() / 2
    step = 2 / resolution
    # Thirty points per voxel of surface, and the edges of needles, which have no area to be drawn from.
    count = max(1000, int(30 * area / step**2))
    rims = _along(
        shape.triangles().reshape(-1, 3), shape.triangles().roll(-1, 1).reshape(-1, 3), step
    )
    points = torch.cat([shape.sample(count).vertices, rims]) if area > 0 else rims
    near = torch.zeros(resolution, resolution, resolution, dtype=torch.bool)
    near[tuple(((points + 1) / step).round().long().clamp(0, resolution - 1).T)] = True
    ball = ndimage.generate_binary_structure(3, 3)
    return torch.from_numpy(ndimage.binary_dilation(near.numpy(), ball, iterations=2))


def _along(start: Tensor, stop: Tensor, step: float) -> Tensor:
    """Points on the lines from `start` to `stop` [E, 3], at most `step` apart, both ends included."""
    pieces = ((stop - start).norm(dim=1) / step).ceil().long().clamp(min=1)
    line = torch.arange(len(start)).repeat_interleave(pieces + 1)
    first = ((pieces + 1).cumsum(0) - pieces - 1)[line]
    share = (torch.arange(len(line)) - first) / pieces[line]
    return start[line] + share[:, None] * (stop - start)[line]


def _outwards(vertices: np.ndarray, faces: np.ndarray) -> Shape:
    shape = Shape.from_numpy(vertices, faces)
    if shape.faces is not None and shape.volume() < 0:
        shape = Shape(shape.vertices, shape.faces.flip(1))
    return shape
