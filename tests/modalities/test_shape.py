import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anytok.modalities import MediaError, Shape, meshfile
from tests.modalities.conftest import cube

FORMATS = [".obj", ".ply", ".stl", ".off", ".glb"]
COORDINATES = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@pytest.mark.parametrize("suffix", FORMATS)
def test_meshes_come_back(tmp_path, suffix):
    cube().save(tmp_path / f"a{suffix}")
    back = Shape.load(tmp_path / f"a{suffix}")
    assert back.vertices.shape == (8, 3)
    assert torch.equal(back.triangles(), cube().triangles())
    assert back.is_watertight
    assert back.normals is None


@given(hnp.arrays(np.float32, (9, 3), elements=COORDINATES))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("suffix", FORMATS)
def test_coordinates_are_exact(tmp_path_factory, suffix, corners):
    path = tmp_path_factory.getbasetemp() / f"exact{suffix}"
    shape = Shape.from_numpy(corners, np.arange(9).reshape(3, 3))
    shape.save(path)
    assert torch.equal(Shape.load(path, merge=False).triangles(), shape.triangles())


def test_oriented_clouds_come_back(tmp_path):
    cloud = cube().sample(100)
    cloud.save(tmp_path / "a.ply")
    back = Shape.load(tmp_path / "a.ply")
    assert back.faces is None
    assert torch.equal(back.vertices, cloud.vertices)
    assert torch.equal(back.normals, cloud.normals)
    for suffix in (".obj", ".stl", ".off", ".glb"):
        with pytest.raises(ValueError, match="save it as PLY"):
            cloud.save(tmp_path / f"a{suffix}")


def test_text_formats(files):
    for name in ("text.stl", "text.ply"):
        assert torch.equal(Shape.load(files[name]).triangles(), cube().triangles())


def test_obj_polygons_seams_and_foreign_letters(tmp_path):
    # A quad and a triangle; texture seams split corner 1; the comment is Latin-1.
    (tmp_path / "a.obj").write_bytes(
        b"# gr\xfc\xdfe\nmtllib no.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 0 0 1\n"
        b"vt 0 0\nvt 1 1\nvn 0 0 1\nf 1/1/1 2/1/1 3/1/1 4/1/1\nf 1/2/1 5/1/1 -4/1/1\n"
    )
    shape = Shape.load(tmp_path / "a.obj")
    assert shape.vertices.shape == (5, 3)
    assert shape.faces.shape == (3, 3)


def test_merging_joins_places_and_drops_what_closes_up():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [-0.0, 0, 0], [1, 0, 0]])
    content = meshfile.write(
        meshfile.Arrays(vertices.astype(np.float32), np.array([[0, 1, 2], [3, 1, 4]]), None), "ply"
    )
    merged = Shape.load(content)
    assert merged.vertices.shape == (3, 3)
    assert merged.faces.tolist() == [[0, 1, 2]]
    assert Shape.load(content, merge=False).vertices.shape == (5, 3)


def test_watertight_means_two_faces_in_opposite_directions():
    closed = cube()
    assert closed.is_watertight
    assert closed.volume() == pytest.approx(1)
    faces = closed.faces.clone()
    assert not Shape(closed.vertices, faces[1:]).is_watertight
    assert not Shape(closed.vertices, torch.cat([faces, faces[:1]])).is_watertight
    faces[0] = faces[0].flip(0)
    assert not Shape(closed.vertices, faces).is_watertight
    assert not cube().sample(10).is_watertight
    assert Shape(closed.vertices, closed.faces.flip(1)).volume() == pytest.approx(-1)


def test_samples_lie_evenly_on_the_surface():
    rng = torch.Generator().manual_seed(3)
    stretched = Shape(cube().vertices * torch.tensor([4.0, 1.0, 1.0]), cube().faces)
    cloud = stretched.sample(60_000, rng)
    scaled = cloud.vertices / torch.tensor([4.0, 1.0, 1.0])
    side = ((scaled.abs() < 1e-6) | ((scaled - 1).abs() < 1e-6)).float()
    assert (side.sum(dim=1) >= 1).all()
    # Areas: two ends of 1, four sides of 4.
    assert side[:, 0].mean().item() == pytest.approx(2 / 18, abs=0.005)
    assert cloud.vertices[:, 0].mean().item() == pytest.approx(2, abs=0.02)
    outwards = (scaled - 0.5) * cloud.normals
    assert outwards.sum(dim=1).sub(0.5).abs().max() < 1e-5
    assert torch.equal(cube().sample(5).vertices, cube().sample(5).vertices)


def test_samples_of_a_cloud_are_a_subset():
    cloud = cube().sample(50)
    part = cloud.sample(20)
    rows = {tuple(row) for row in cloud.vertices.tolist()}
    drawn = [tuple(row) for row in part.vertices.tolist()]
    assert len(set(drawn)) == 20
    assert set(drawn) <= rows
    assert cloud.sample(80).vertices.shape == (80, 3)


@given(hnp.arrays(np.float32, (6, 3), elements=st.floats(-100, 100, width=32)), st.floats(0.1, 10))
@settings(max_examples=50, deadline=None)
def test_normalized_is_undone(corners, extent):
    shape = Shape.from_numpy(corners)
    if not np.ptp(corners, axis=0).max() > 1e-2:
        return
    small, center, scale = shape.normalized(extent)
    low, high = small.bounds
    assert (high - low).max().item() == pytest.approx(extent, rel=1e-4)
    assert (high + low).abs().max().item() < 1e-3 * extent + 1e-3
    back = small.transformed(center, scale)
    assert (back.vertices - shape.vertices).abs().max() < 1e-4


TRIANGLE = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shape(torch.zeros(3, 2)), r"expected \[V, 3\]"),
        (lambda: Shape(torch.zeros(0, 3)), r"expected \[V, 3\]"),
        (lambda: Shape(TRIANGLE.double()), "float64"),
        (lambda: Shape(TRIANGLE * torch.nan), "NaN"),
        (lambda: Shape(TRIANGLE, torch.tensor([[0, 1, 3]])), "vertices 0 … 3, expected 0 … 2"),
        (lambda: Shape(TRIANGLE, torch.tensor([[0, 1, 2]], dtype=torch.int32)), "int64"),
        (lambda: Shape(TRIANGLE, None, TRIANGLE[:2]), r"expected \(3, 3\)"),
        (lambda: Shape(TRIANGLE).triangles(), "point cloud"),
        (lambda: Shape(TRIANGLE, torch.tensor([[0, 1, 1]])).sample(3), "no area"),
        (lambda: Shape(TRIANGLE).sample(0), "at least 1"),
        (lambda: Shape(TRIANGLE[:1]).normalized(), "no extent"),
        (lambda: Shape(TRIANGLE).transformed(TRIANGLE[0], 0.0), "more than 0"),
        (lambda: Shape(TRIANGLE).save("a.fbx"), "'.fbx', expected"),
    ],
)
def test_wrong_use_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def glb(scene: dict, body: bytes = b"") -> bytes:
    """A GLB around any JSON."""
    text = json.dumps({"asset": {"version": "2.0"}, **scene}).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(body), b"BIN\0") + body
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def triangle_scene(nodes: list[dict], count: int = 3) -> dict:
    return {
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": nodes,
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "type": "VEC3", "count": count}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "buffers": [{"byteLength": 36}],
    }


BODY = TRIANGLE.numpy().tobytes()


def test_glb_nodes_move_their_meshes():
    shape = Shape.load(glb(triangle_scene([{"mesh": 0, "translation": [5, 0, 0]}]), BODY))
    assert torch.equal(shape.vertices, TRIANGLE + torch.tensor([5.0, 0, 0]))


def doubling(levels: int) -> list[dict]:
    """Each level shows the next one twice: 2^levels triangles from a kilobyte."""
    return [{"children": [k + 1, k + 1]} for k in range(levels)] + [{"mesh": 0}]


HOSTILE_SCENES = {
    "doubling": (triangle_scene(doubling(40)), "two parents"),
    "cycle": (triangle_scene([{"children": [1]}, {"children": [0]}]), "own ancestor"),
    "deep": (
        triangle_scene([{"children": [k + 1]} for k in range(5000)] + [{"mesh": 0}]),
        "deeper",
    ),
    "many": (triangle_scene([{"mesh": 0} for _ in range(20_000)]), "20000 nodes"),
    "count": (triangle_scene([{"mesh": 0}], count=2**40), "vertices"),
    "negative": (triangle_scene([{"mesh": 0}], count=-1), "cannot be read|vertices"),
    "zeros": (
        {
            **triangle_scene([{"mesh": 0}]),
            "accessors": [{"componentType": 5126, "type": "VEC3", "count": 10**9}],
        },
        "vertices",
    ),
    "instances": (
        {
            **triangle_scene([{"mesh": 0} for _ in range(9000)]),
            "accessors": [{"componentType": 5126, "type": "VEC3", "count": 10**6}],
        },
        "vertices",
    ),
    "outside": (
        {**triangle_scene([{"mesh": 0}]), "buffers": [{"uri": "file:///etc/passwd"}]},
        "outside",
    ),
    "packed": (
        {**triangle_scene([{"mesh": 0}]), "extensionsUsed": ["KHR_draco_mesh_compression"]},
        "KHR_draco_mesh_compression",
    ),
    "child": (triangle_scene([{"mesh": 0, "children": [7]}]), "cannot be read"),
    "types": ({"nodes": "x", "meshes": 3, "accessors": None}, "cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE_SCENES)
def test_hostile_glb_scenes(name):
    scene, cause = HOSTILE_SCENES[name]
    with pytest.raises(MediaError, match=cause):
        Shape.load(glb(scene, BODY))


def test_deeply_nested_json():
    text = b"[" * 100_000
    chunk = struct.pack("<I4s", len(text), b"JSON") + text
    with pytest.raises(MediaError, match="GLB"):
        Shape.load(struct.pack("<4sII", b"glTF", 2, 12 + len(chunk)) + chunk)


PLY = (
    "ply\nformat {}\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\n"
    "element face {}\nproperty list uchar int vertex_indices\nend_header\n"
)
HOSTILE_TEXT = {
    "huge.ply": PLY.format("binary_little_endian 1.0", 4_000_000_000, 1),
    "huge.off": "OFF\n4000000000 4000000000 0\n0 0 0\n",
    "negative.off": "OFF\n-5 -5 0\n",
    "nan.off": "OFF\n3 1 0\n0 0 0\nnan 0 0\n0 1 0\n3 0 1 2\n",
    "inf.obj": "v 0 0 0\nv 1e39 0 0\nv 0 1 0\nf 1 2 3\n",
    "nan.ply": PLY.format("ascii 1.0", 3, 1) + "0 0 0\n1 nan 0\n0 1 0\n3 0 1 2\n",
    "range.off": "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n",
    "range.obj": "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n",
    "range.ply": PLY.format("ascii 1.0", 3, 1) + "0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n",
    "negative.ply": PLY.format("ascii 1.0", 3, 1) + "0 0 0\n1 0 0\n0 1 0\n3 0 1 -7\n",
    "empty.obj": "# nothing\n",
    "empty.off": "OFF\n0 0 0\n",
    "words.stl": "solid of words, no mesh\n" * 20,
    "words.obj": "Once upon a time\nthere was a file\n",
    "short.stl": "solid x\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\n",
}


@pytest.mark.parametrize("name", HOSTILE_TEXT)
def test_hostile_text_meshes(tmp_path, name):
    (tmp_path / name).write_text(HOSTILE_TEXT[name])
    with pytest.raises(MediaError, match=name):
        Shape.load(tmp_path / name)


def test_stl_that_announces_billions_of_triangles():
    with pytest.raises(MediaError, match="cut short or no STL"):
        Shape.load(_named_stl(bytes(80) + struct.pack("<I", 2**32 - 1) + bytes(500)))


def _named_stl(content: bytes) -> bytes:
    return b"solid " + content[6:]  # bytes have no extension; the word makes the reader try STL
