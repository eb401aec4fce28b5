"""A thousand clean little meshes: the procedural objects that pybullet ships (zlib licence).

Random compositions of boxes, cylinders and blobs without names; nearly all are watertight, so they
give clean distance fields. One in ten is `held`, by the hash of the packaged file.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from anytok.assets.recipes.dataset import OUT, Row, begin, finish, progress, save, split_by_hash
from anytok.assets.recipes.fetch import pip_wheel, unpack

PACKAGE = (
    "pybullet",
    "3.2.7",
    "5d858abf7c12a21ef3ed351cf81dac1b5e486ec25c9ab59bfc84beb89034edff",
)
TAGS = ("311", "cp311", "manylinux2014_x86_64")


def build(out: Path) -> Path:
    """Write the bare geometry to `out/shapes`; returns that folder."""
    folder = out / "shapes"
    if begin(folder, {"pin": "@".join(PACKAGE[:2])}):
        return folder
    wheel = pip_wheel(*PACKAGE, cache=out / ".packages", tags=TAGS)
    files = sorted(unpack(wheel, ("pybullet_data/random_urdfs/*.obj",)).rglob("*.obj"))
    rows = [_row(path, folder) for path in progress(files, "shapes", len(files))]
    return finish(folder, rows, f"{__doc__}\nFrom pybullet_data/random_urdfs, Bullet's authors.")


def geometry(obj: str, rotation: tuple[float, ...] = ()) -> str:
    """A Wavefront OBJ with nothing but positions and triangles; `rotation` is 3 × 3, row by row.

    Texture and normal indices go, polygons become fans, indices relative to the end become
    absolute. A file without faces, or with an index that has no vertex, is an error.
    """
    vertices: list[tuple[float, ...]] = []
    triangles: list[tuple[int, int, int]] = []
    for line in obj.splitlines():
        kind, *rest = line.split() or [""]
        if kind == "v":
            vertices.append(_turn(tuple(float(word) for word in rest[:3]), rotation))
        elif kind == "f":
            corners = [int(word.split("/")[0]) for word in rest]
            corners = [c if c > 0 else len(vertices) + 1 + c for c in corners]
            triangles += [(corners[0], a, b) for a, b in pairwise(corners[1:])]
    if not triangles or max(max(t) for t in triangles) > len(vertices):
        raise ValueError(f"OBJ with {len(vertices)} vertices has no faces or one beyond them")
    lines = ["v " + " ".join(f"{x:.6g}" for x in vertex) for vertex in vertices]
    lines += [f"f {a} {b} {c}" for a, b, c in triangles if len({a, b, c}) == 3]
    return "\n".join(lines) + "\n"


def _turn(vertex: tuple[float, ...], rotation: tuple[float, ...]) -> tuple[float, ...]:
    if not rotation:
        return vertex
    x, y, z = vertex
    rows = (rotation[0:3], rotation[3:6], rotation[6:9])
    return tuple(a * x + b * y + c * z for a, b, c in rows)


def _row(path: Path, folder: Path) -> Row:
    data = path.read_bytes()
    save(folder / path.name, geometry(data.decode("utf-8")).encode())
    return {
        "shape": path.name,
        "split": split_by_hash(data),
        "source": f"{PACKAGE[0]}@{PACKAGE[1]}",
        "licence": "Zlib",
        "name": path.stem,
    }


def main(
    out: Annotated[Path, typer.Option(help="folder of all data sets")] = OUT,
) -> None:
    """Extract pybullet's thousand procedural meshes (OBJ, geometry only)."""
    build(out)


if __name__ == "__main__":
    typer.run(main)
