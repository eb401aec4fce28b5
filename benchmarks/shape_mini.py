"""How good `octgpt/mini` is on held-out meshes, beside voxels at the same bytes.

    python benchmarks/shape_mini.py --data /work/data [--weights FILE] [--count 60] [--sheet views.png]

Measures, per mesh: F-score at 1 % of the bounding box's diagonal, volume IoU, Chamfer distance (% of the diagonal),
whether the output is watertight, bits of the stream (frame included).

Floors at the same bytes: the mesh's occupancy on a grid of cubic voxels over its bounding box, as fine as the bytes
allow, once with one bit a voxel, once compressed by LZMA; smoothed, then marching cubes. They get the frame for free.
"""

from __future__ import annotations

import argparse
import lzma
import time
from collections.abc import Sequence
from math import prod
from statistics import mean

import numpy as np
from PIL import Image as Pil
from scipy.ndimage import gaussian_filter
from skimage.measure import marching_cubes

from anytok.codecs import load_codec
from anytok.codecs.training.data import find_rows
from anytok.codecs.training.octgpt import closed_shapes
from anytok.modalities.inside import Grid, inside
from anytok.modalities.measure import chamfer, f_score, volume_iou
from anytok.modalities.shape import Shape
from anytok.report import shaded

Measures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="/work/data")
    parser.add_argument("--weights", default="octgpt/mini", help="a codec's name or file")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--sheet", help="write shaded views of the first meshes here")
    given = parser.parse_args()
    rows = find_rows(given.data, ("shapes",), modality="shape", splits=("held",))
    shapes = closed_shapes(rows)[: given.count]
    quality_table(given.weights, shapes, given.sheet)


def quality_table(weights: str, shapes: Sequence[Shape], sheet: str | None) -> None:
    codec = load_codec(weights)
    start = time.process_time()
    streams = [codec.encode([shape])[0] for shape in shapes]
    encoding = time.process_time() - start
    start = time.process_time()
    ours = [codec.decode([stream])[0] for stream in streams]
    decoding = time.process_time() - start
    budgets = [-(-stream.bits // 8) for stream in streams]
    raw = [voxels(shape, size, packed=False) for shape, size in zip(shapes, budgets)]
    packed = [voxels(shape, size, packed=True) for shape, size in zip(shapes, budgets)]
    ids = [
        len(s.parts[0].codes) // 8 + len(s.parts[1].codes) // 8 + len(s.parts[2].codes)
        for s in streams
    ]
    print(f"`{codec.identity}`, {len(shapes)} held-out meshes (pybullet random_urdfs).")
    print(
        f"Bits a shape: mean {mean(s.bits for s in streams):.0f}, most {max(s.bits for s in streams)}."
    )
    print(f"Ids a shape, split bits packed by 8: mean {mean(ids):.0f}, most {max(ids)}.")
    print(
        f"CPU time: encoding {encoding / len(shapes):.2f} s, decoding {decoding / len(shapes):.2f} s a shape.\n"
    )
    print("| | F-score at 1 % | IoU | Chamfer (% of diagonal) | watertight |")
    print("|---|---|---|---|---|")
    row("octgpt/mini", shapes, ours)
    row("voxels, 1 bit each, same bytes", shapes, raw)
    row("voxels, LZMA, same bytes", shapes, packed)
    row("the mesh itself (the measures' ceiling)", shapes, shapes)
    scores = sorted(f_score(again, shape) for again, shape in zip(ours, shapes))
    n = len(scores)
    print(
        f"\nF-score of octgpt/mini: worst {scores[0]:.3f}, tenth {scores[n // 10]:.3f}, median {scores[n // 2]:.3f}."
    )
    if sheet:
        views([shapes, ours, packed, raw]).save(sheet)


def row(name: str, shapes: Sequence[Shape], others: Sequence[Shape]) -> None:
    found = [measure(other, shape) for shape, other in zip(shapes, others)]
    f, iou, distance, closed = (
        mean(m[k] for m in found) for k in ("f", "iou", "chamfer", "closed")
    )
    print(f"| {name} | {f:.3f} | {iou:.3f} | {100 * distance:.2f} | {100 * closed:.0f} % |")


def measure(again: Shape, shape: Shape) -> Measures:
    return {
        "f": f_score(again, shape),
        "iou": volume_iou(again, shape) if again.is_watertight else 0.0,
        "chamfer": chamfer(again, shape) / shape.diagonal,
        "closed": float(again.is_watertight),
    }


def voxels(shape: Shape, size: int, *, packed: bool) -> Shape:
    """The finest occupancy of at most `size` bytes as a mesh."""
    resolution = 4
    while prod(Grid.around([shape], resolution + 1).counts) <= 8 * size:
        resolution += 1
    if packed:
        low, high = resolution, 3 * resolution
        while low < high:
            middle = (low + high + 1) // 2
            fits = lzma_bytes(inside(shape, Grid.around([shape], middle)).numpy()) <= size
            low, high = (middle, high) if fits else (low, middle - 1)
        resolution = low
    grid = Grid.around([shape], resolution)
    return smooth_mesh(inside(shape, grid).numpy(), grid)


def lzma_bytes(occupied: np.ndarray) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    return len(lzma.compress(np.packbits(occupied).tobytes(), lzma.FORMAT_RAW, filters=filters))


def smooth_mesh(occupied: np.ndarray, grid: Grid) -> Shape:
    volume = np.pad(occupied.astype(np.float32), 3)
    # a little smoothing takes the steps off; more would lose thin parts
    volume = gaussian_filter(volume, 0.6)
    vertices, faces, _, _ = marching_cubes(volume, 0.5, gradient_direction="descent")
    shape = Shape.from_numpy((vertices - 3) * grid.step + np.array(grid.origin), faces)
    return Shape(shape.vertices, shape.faces.flip(1)) if shape.volume() < 0 else shape


def views(columns: Sequence[Sequence[Shape]], count: int = 10, size: int = 200) -> Pil.Image:
    """One row a mesh: original, ours, packed voxels, raw voxels."""
    sheet = Pil.new("RGB", (size * len(columns) * 2, size * (count // 2)), "white")
    for i in range(count):
        for j, column in enumerate(columns):
            at = ((i % 2) * len(columns) + j) * size, (i // 2) * size
            sheet.paste(shaded(column[i], size), at)
    return sheet


if __name__ == "__main__":
    main()
