"""From OctGPT's local planes to a mesh: the sparse grid beside a dense query, ours and the official one (ognn).

    python benchmarks/surface_speed.py [--size 256] [--depth 8] [--whole] [--reference FOLDER]

The field is a torus with exact planes on an octree of OctGPT's depth: no network has to be run. FOLDER holds the
official packages (`pip install --target FOLDER --no-deps ognn ocnn easydict`). Dense queries are timed on `--slabs` of
the grid's layers, evenly spread, and scaled up; with `--whole` ours also runs on all, and the meshes are compared.
Times are CPU seconds of this process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import typer
from torch import Tensor

from anytok.codecs.shape.octree import Points, build_octree, decode_keys
from anytok.codecs.shape.surface import Field, GridConfig, dense, evaluate, mesh, sparse
from anytok.modalities.measure import chamfer
from anytok.modalities.shape import Shape

T = TypeVar("T")
MAJOR, MINOR = 0.55, 0.25


def main(
    size: int = 256,
    depth: int = 8,
    slabs: int = 4,
    whole: bool = False,
    reference: Path | None = None,
) -> None:
    """Print a table."""
    cloud = torus(400_000)
    field, grid = torus_field(cloud, depth), GridConfig(size=size)
    layers = [layer(grid, i * (size - 1) // max(1, slabs - 1)) for i in range(slabs)]
    volume, sparse_seconds = timed(lambda: sparse(field, grid))
    made, cubes = timed(lambda: Shape(*mesh(volume, grid)))
    queries = {"dense query": lambda points: evaluate(field, points)}
    if reference is not None:
        queries["official dense query"] = official(cloud, field, depth, reference)
    values, rows = {}, [("sparse grid", sparse_seconds)]
    for name, query in queries.items():
        values[name], seconds = timed(lambda q=query: torch.stack([q(points) for points in layers]))
        rows.append((f"{name} ({slabs} layers)", seconds * size / slabs))
    if whole:
        full, seconds = timed(lambda: dense(field, grid, torch.device("cpu")))
        rows.append(("dense query (whole)", seconds))
    print(
        f"Depth {depth}, {size}^3 samples, {torch.get_num_threads()} thread(s), {field.tree.count(depth)} nodes; "
        f"marching cubes {cubes:.2f} s.\n"
    )
    print("| field at the samples | CPU s | times the sparse grid |\n|---|---|---|")
    for name, seconds in rows:
        print(f"| {name} | {seconds:.2f} | {seconds / sparse_seconds:.1f} |")
    if reference is None:
        print("| official dense query | not run | (--reference) |")
    else:
        ours, theirs = values.values()
        print(
            f"\nLargest difference of ours to the official field: {float((ours - theirs).abs().max()):.1g}."
        )
    print(f"\nWatertight: {made.is_watertight}.")
    if whole:
        other = Shape(*mesh(full, grid))
        print(f"Chamfer to the dense query's mesh: {chamfer(made, other):.2g} of the diagonal.")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """A result and the CPU seconds it took."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def layer(grid: GridConfig, x: int) -> Tensor:
    """The samples [size^2, 3] of one x."""
    axis = torch.arange(grid.size) * grid.step - grid.box
    return torch.stack(torch.meshgrid(axis[x : x + 1], axis, axis, indexing="ij"), -1).reshape(
        -1, 3
    )


def torus(points: int) -> Points:
    """Points on a torus, with normals."""
    rng = torch.Generator().manual_seed(0)
    u, v = 2 * torch.pi * torch.rand(2, points, generator=rng)
    normals = torch.stack([v.cos() * u.cos(), v.cos() * u.sin(), v.sin()], -1)
    centres = MAJOR * torch.stack([u.cos(), u.sin(), torch.zeros_like(u)], -1)
    return Points(centres + MINOR * normals, normals)


def torus_field(cloud: Points, depth: int) -> Field:
    """The torus' own distance and gradient at the centres of an octree's nodes."""
    tree = build_octree([cloud], depth=depth, full_depth=3)
    planes = []
    for d in range(3, depth + 1):
        cell = (decode_keys(tree.keys[d])[0] + 0.5) / 2 ** (d - 1) - 1
        ring = cell[:, :2].norm(dim=1, keepdim=True).clamp(min=1e-6)
        outwards = torch.cat([cell[:, :2] * (1 - MAJOR / ring), cell[:, 2:]], -1)
        length = outwards.norm(dim=1, keepdim=True).clamp(min=1e-6)
        plane = torch.cat([outwards / length, length - MINOR], -1)
        planes.append(plane if d == depth else plane * ~tree.nonempty(d)[:, None])
    return Field(tree, depth, torch.cat(planes))


def official(cloud: Points, field: Field, depth: int, folder: Path) -> Callable[[Tensor], Tensor]:
    """The field as the published packages compute it, on their octree of the same points."""
    sys.path.insert(0, str(folder))
    import ocnn
    from ognn.mpu import NeuralMPU

    tree = ocnn.octree.Octree(depth=depth, full_depth=3)
    tree.build_octree(ocnn.octree.Points(cloud.points, cloud.normals))
    query = NeuralMPU({depth: field.planes}, tree, depth)
    batch = torch.zeros(1, 1)

    def at(points: Tensor) -> Tensor:
        rows = torch.cat([points, batch.expand(len(points), 1)], 1)
        with torch.no_grad():
            return torch.cat([query(part)[depth] for part in rows.split(64**2 * 16)])

    return at


if __name__ == "__main__":
    typer.run(main)
