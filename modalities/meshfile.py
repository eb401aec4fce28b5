"""Mesh files: OBJ, PLY, STL, OFF and GLB, as plain arrays.

trimesh parses; this file keeps it out of harm's way and adds what it leaves out:

- the counts that a header announces are held against the limits before anything is allocated, and a GLB's scene is
  walked, so that a graph in which each level shows the next one twice does not unfold into billions of triangles;
- nothing outside the file is opened: no material, no texture, no buffer by address;
- a list of vertices or faces that ends early is an error;
- normals of point clouds are kept, and float32 coordinates are written with all their digits.

Letters: V vertices, F faces.
"""

from __future__ import annotations

import io
import json
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import MediaError, translating
from .files import SUFFIXES, Source, describe, name_of, read_bytes, sniff, suffix_of

MAX_BYTES = 2**26  # 64 MiB of file; text formats grow about tenfold while being parsed
MAX_VERTICES = 4_000_000
MAX_FACES = 8_000_000
MAX_NODES = 10_000  # of a GLB's scene
MAX_DEPTH = 256  # of its tree
KINDS = ("obj", "ply", "stl", "off", "glb")
_PACKED = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "EXT_mesh_gpu_instancing")


@dataclass(frozen=True)
class Arrays:
    """What a mesh file holds.

    Attributes:
        vertices: [V, 3] float32.
        faces: [F, 3] int64, or None for a point cloud.
        normals: [V, 3] float32, or None.
    """

    vertices: np.ndarray
    faces: np.ndarray | None
    normals: np.ndarray | None


def read(source: Source) -> Arrays:
    """Parse a file.

    Raises:
        MediaError: not one of the five kinds, cut short, above a limit, or with impossible numbers.
    """
    content, name = read_bytes(source, MAX_BYTES), name_of(source)
    kind = _kind(content, source)
    with (
        translating(name, _trimesh_failures(), f"cannot be read as {kind.upper()}"),
        np.errstate(all="ignore"),  # impossible numbers are refused by name, not by a warning
    ):
        _CHECKS[kind](content)
        arrays = _parse(_plain(content, kind), kind)
        _check(arrays)
        if kind == "ply" and arrays.faces is None and _ply_counts(content).get(b"face"):
            raise ValueError("is cut short: faces are promised, none are there")
    return arrays


def write(arrays: Arrays, kind: str) -> bytes:
    """The content of a file of this kind; `ValueError` where it cannot hold a point cloud."""
    if kind == "ply":
        return _write_ply(arrays)
    if arrays.faces is None:
        raise ValueError(f"{kind.upper()} would lose a point cloud's normals; save it as PLY")
    if kind in ("obj", "off"):
        return _write_text(arrays, kind)
    import trimesh

    mesh = trimesh.Trimesh(arrays.vertices, arrays.faces, process=False)
    content = mesh.export(file_type=kind)
    assert isinstance(content, bytes), "STL and GLB are binary"
    return content


def _kind(content: bytes, source: Source) -> str:
    kind = sniff(content[:512])
    if kind not in (None, *KINDS):
        raise MediaError(name_of(source), f"is a {kind} file, expected OBJ, PLY, STL, OFF or GLB")
    kind = kind or SUFFIXES.get(suffix_of(source))
    if _is_binary_stl(content):
        return "stl"
    if kind not in KINDS:
        cause = f"begins {describe(content)}, which is no OBJ, PLY, STL, OFF or GLB"
        raise MediaError(name_of(source), cause)
    return kind


def _is_binary_stl(content: bytes) -> bool:
    """There is no magic number, but the number of triangles fits the length to the byte."""
    return len(content) >= 84 and len(content) == 84 + 50 * struct.unpack_from("<I", content, 80)[0]


def _plain(content: bytes, kind: str) -> bytes:
    """Text formats as UTF-8, and without an STL's normals, which trimesh reads, fails on, and does not need."""
    if kind not in ("obj", "off", "stl") or (kind == "stl" and _is_binary_stl(content)):
        return content
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        content = content.decode("latin-1").encode("utf-8")  # names of materials, comments
    return re.sub(rb"(?i)facet\s+normal[^\n]*", b"facet", content) if kind == "stl" else content


def _parse(content: bytes, kind: str) -> Arrays:
    import trimesh

    scene = trimesh.load_scene(
        io.BytesIO(content), file_type=kind, process=False, skip_materials=True
    )
    parts: list[Any] = scene.dump()
    meshes = [part for part in parts if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    if meshes:
        mesh = trimesh.util.concatenate(meshes)
        # Shading normals of meshes are not kept: where a file splits vertices for them, seams are merged.
        return Arrays(_float32(mesh.vertices), np.array(mesh.faces, np.int64), None)
    clouds = [part for part in parts if len(getattr(part, "vertices", ()))]
    if not clouds:
        raise ValueError("holds neither triangles nor points")
    vertices = np.concatenate([_float32(cloud.vertices) for cloud in clouds])
    return Arrays(vertices, None, _ply_normals(clouds[0]) if len(clouds) == 1 else None)


def _ply_normals(cloud: Any) -> np.ndarray | None:
    raw = cloud.metadata.get("_ply_raw", {}).get("vertex", {}).get("data")
    names = raw.dtype.names if isinstance(raw, np.ndarray) else raw
    if raw is None or not all(axis in names for axis in ("nx", "ny", "nz")):
        return None
    return np.stack([_float32(raw[axis]).reshape(-1) for axis in ("nx", "ny", "nz")], axis=1)


def _float32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32)


def _check(arrays: Arrays) -> None:
    if arrays.vertices.ndim != 2 or arrays.vertices.shape[1] != 3:
        raise ValueError(
            f"its vertices have the form {arrays.vertices.shape}, expected three columns"
        )
    if arrays.faces is not None and (arrays.faces.ndim != 2 or arrays.faces.shape[1] != 3):
        raise ValueError(f"its faces have the form {arrays.faces.shape}, expected three columns")
    if arrays.normals is not None and arrays.normals.shape != arrays.vertices.shape:
        raise ValueError("has another number of normals than of vertices")
    _limit(len(arrays.vertices), 0 if arrays.faces is None else len(arrays.faces))
    for kind, values in (("vertices", arrays.vertices), ("normals", arrays.normals)):
        if values is not None and not np.isfinite(values).all():
            raise ValueError(f"{kind} hold NaN or infinite numbers")
    if arrays.faces is not None and (
        arrays.faces.min() < 0 or arrays.faces.max() >= len(arrays.vertices)
    ):
        raise ValueError(f"faces name vertices outside 0 … {len(arrays.vertices) - 1}")


def _limit(vertices: int, faces: int) -> None:
    if vertices > MAX_VERTICES or faces > MAX_FACES or min(vertices, faces) < 0:
        raise ValueError(
            f"announces {vertices} vertices and {faces} faces, more than {MAX_VERTICES} or {MAX_FACES}"
        )


def _check_obj(content: bytes) -> None:
    if b"\0" in content:
        raise ValueError("holds NUL bytes; OBJ is text")
    _limit(content.count(b"\nv "), content.count(b"\nf "))


def _check_off(content: bytes) -> None:
    """Trimesh takes the faces that are there; the header says how many there should be."""
    lines = [line.split(b"#")[0].split() for line in content.splitlines()]
    words = [line for line in lines if line]
    words[0] = words[0][1:]  # OFF or COFF; the counts may follow on the same line
    rows = [line for line in words if line]
    vertices, faces = int(rows[0][0]), int(rows[0][1])
    _limit(vertices, faces)
    if len(rows) - 1 < vertices + faces:
        raise ValueError(f"is cut short: {vertices + faces} rows promised, {len(rows) - 1} present")
    if faces:
        _require_whole_face(rows[vertices + faces])


def _require_whole_face(row: list[bytes]) -> None:
    if len(row) < 1 + int(row[0]):
        raise ValueError("is cut short within its last face")


def _check_ply(content: bytes) -> None:
    counts = _ply_counts(content)
    _limit(counts.get(b"vertex", 0), counts.get(b"face", 0))
    _limit(sum(counts.values()) // 2, 0)
    header, _, body = content.partition(b"end_header")
    if b"format ascii" in header:
        rows = [line.split() for line in body.splitlines()[1:] if line.strip()]
        total = sum(counts.values())
        if len(rows) < total:
            raise ValueError(f"is cut short: {total} rows promised, {len(rows)} present")
        if counts.get(b"face") and [*counts][-1] == b"face":
            _require_whole_face(rows[total - 1])


def _ply_counts(content: bytes) -> dict[bytes, int]:
    """Element name → how many the header promises."""
    header, found, _ = content[:65536].partition(b"end_header")
    if not found:
        raise ValueError("has no end_header")
    rows = [line.split() for line in header.splitlines()]
    return {words[1]: int(words[2]) for words in rows if words[:1] == [b"element"]}


def _check_stl(content: bytes) -> None:
    if _is_binary_stl(content):
        return _limit(0, struct.unpack_from("<I", content, 80)[0])
    if b"\0" in content[:512] or not content.lstrip()[:5].lower() == b"solid":
        raise ValueError("is cut short or no STL: its length does not fit its number of triangles")
    if b"endsolid" not in content[-4096:].lower():
        raise ValueError("is cut short: no endsolid at its end")
    return _limit(0, content.lower().count(b"facet"))


def _check_glb(content: bytes) -> None:
    magic, version, length, json_length, json_type = struct.unpack_from("<4sIII4s", content)
    if magic != b"glTF" or version != 2 or json_type != b"JSON":
        raise ValueError(f"is no glTF 2 (version {version}, first chunk {json_type!r})")
    if length > len(content) or 20 + json_length > length:
        raise ValueError(f"is cut short: {length} bytes promised, {len(content)} present")
    scene = json.loads(content[20 : 20 + json_length])
    packed = [name for name in scene.get("extensionsUsed", []) if name in _PACKED]
    if packed:
        raise ValueError(f"uses {', '.join(packed)}, which is not supported; save it uncompressed")
    if any("uri" in buffer for buffer in scene.get("buffers", [])):
        raise ValueError("refers to buffers outside itself; save it as one self-contained GLB")
    _limit_scene(scene)


def _limit_scene(scene: dict[str, Any]) -> None:
    """Count what would be drawn: each node once, each with all of its mesh."""
    counts = [int(accessor["count"]) for accessor in scene.get("accessors", [])]
    _limit(max(counts, default=0), max(counts, default=0) // 3)
    _limit(
        sum(counts) // 8, 0
    )  # positions, normals, two textures, colours, joints, weights, indices
    meshes = []
    for mesh in scene.get("meshes", []):
        parts = mesh["primitives"]
        vertices = sum(counts[part["attributes"]["POSITION"]] for part in parts)
        corners = sum(counts[part.get("indices", part["attributes"]["POSITION"])] for part in parts)
        meshes.append((vertices, corners // 3))
    nodes = scene.get("nodes", [])
    _limit_tree([node.get("children", []) for node in nodes])
    drawn = [meshes[node["mesh"]] for node in nodes if "mesh" in node]
    _limit(sum(vertices for vertices, _ in drawn), sum(faces for _, faces in drawn))


def _limit_tree(children: list[list[int]]) -> None:
    """A glTF scene is a forest; in a graph with two ways to a node, or a cycle, readers never come to an end."""
    if len(children) > MAX_NODES:
        raise ValueError(f"has {len(children)} nodes, more than {MAX_NODES}")
    owned = [child for row in children for child in row]
    if len(set(owned)) < len(owned):
        raise ValueError("has a node with two parents, which glTF forbids")
    level, seen, depth = sorted(set(range(len(children))) - set(owned)), 0, 0
    while level:
        depth, seen = depth + 1, seen + len(level)
        level = [child for node in level for child in children[node]]
        if depth > MAX_DEPTH:
            raise ValueError(f"has a scene deeper than {MAX_DEPTH} nodes")
    if seen < len(children):
        raise ValueError("has a node that is its own ancestor")


def _write_text(arrays: Arrays, kind: str) -> bytes:
    """OBJ or OFF; nine significant digits are what a float32 needs to come back exactly."""
    out = io.BytesIO()
    faces = arrays.faces
    assert faces is not None, "point clouds are refused by write()"
    if kind == "off":
        out.write(f"OFF\n{len(arrays.vertices)} {len(faces)} 0\n".encode())
        np.savetxt(out, arrays.vertices, "%.9g %.9g %.9g")
        np.savetxt(out, faces, "3 %d %d %d")
    else:
        np.savetxt(out, arrays.vertices, "v %.9g %.9g %.9g")
        np.savetxt(out, faces + 1, "f %d %d %d")
    return out.getvalue()


def _write_ply(arrays: Arrays) -> bytes:
    """Binary little-endian PLY with normals where there are any."""
    columns = [arrays.vertices] + ([] if arrays.normals is None else [arrays.normals])
    names = ["x", "y", "z", "nx", "ny", "nz"][: 3 * len(columns)]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(arrays.vertices)}"]
    header += [f"property float {name}" for name in names]
    body = np.concatenate(columns, axis=1).astype("<f4").tobytes()
    if arrays.faces is not None:
        header += [f"element face {len(arrays.faces)}", "property list uchar int vertex_indices"]
        rows = np.empty(len(arrays.faces), dtype=[("n", "u1"), ("corners", "<i4", 3)])
        rows["n"], rows["corners"] = 3, arrays.faces
        body += rows.tobytes()
    return "\n".join([*header, "end_header", ""]).encode() + body


def _trimesh_failures() -> tuple[type[BaseException], ...]:
    """What trimesh and NumPy raise on broken files."""
    return (
        ValueError,  # also json and Unicode decoding
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        AssertionError,
        NameError,
        NotImplementedError,
        ArithmeticError,  # overflow, division by zero
        RecursionError,
        EOFError,
        OSError,
        struct.error,
        np.linalg.LinAlgError,
        MemoryError,
    )


_CHECKS = {
    "obj": _check_obj,
    "off": _check_off,
    "ply": _check_ply,
    "stl": _check_stl,
    "glb": _check_glb,
}
