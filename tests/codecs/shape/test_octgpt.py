"""The codec with untrained networks (its grid, frame, layout, errors); quality is measured in benchmarks/."""

import logging
from dataclasses import replace

import pytest
import torch

from anytok.codecs import load_codec
from anytok.codecs.published import save_codec
from anytok.codecs.shape import vqvae
from anytok.codecs.shape.octgpt import MINI_CODEC, OctGPT, ShapeOptions
from anytok.codecs.shape.octree import Points, build_octree, decode_keys
from anytok.codecs.shape.surface import Field, GridConfig, dense, mesh, sparse
from anytok.codecs.stream import Part, StreamError, TokenStream
from anytok.modalities.shape import Shape
from tests.golden.load import load_golden

BOX = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1.0, 1) for z in (-1.0, 1)])
FACES = torch.tensor(
    [
        *[[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1]],
        *[[2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]],
    ]
)


def box(size=(1.0, 0.6, 0.3), at=(0.0, 0.0, 0.0)) -> Shape:
    return Shape(BOX * torch.tensor(size) / 2 + torch.tensor(at), FACES)


@pytest.fixture(scope="module")
def codec() -> OctGPT:
    torch.manual_seed(0)
    return OctGPT(replace(MINI_CODEC, points=8000, grid=32), name="octgpt/test").eval()


@pytest.fixture(scope="module")
def stream(codec) -> TokenStream:
    return codec.encode([box()])[0]


def test_a_stream_has_split_bits_codes_and_a_frame(codec, stream):
    first, second, codes = (part.codes for part in stream.parts)
    assert len(first) == 64
    assert len(second) == 8 * int(first.sum())
    assert len(codes) == 8 * int(second.sum())
    assert stream.parts[2].vocab == (2,) * 12
    assert stream.side["frame"].tolist() == pytest.approx([0, 0, 0, 1 / 1.6])
    assert stream.bits == 64 + len(second) + 12 * len(codes) + 4 * 32


def test_the_same_shape_gives_the_same_stream_alone_and_in_a_batch(codec, stream):
    other = box((0.4, 0.4, 0.4))
    alone = codec.encode([other])[0]
    both = codec.encode([box(), other])
    for one, again in ((stream, both[0]), (alone, both[1])):
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(one.parts, again.parts))


def test_the_stream_survives_its_file(codec, stream, tmp_path):
    stream.save(tmp_path / "box.tok")
    again = TokenStream.load(tmp_path / "box.tok")
    codec.check(again)
    assert torch.equal(again.parts[2].codes, stream.parts[2].codes)
    size = (tmp_path / "box.tok").stat().st_size
    assert size < stream.bits / 8 + 250


def test_decoding_restores_place_and_size(codec, stream):
    near, far = codec.decode([stream, moved(stream, [3.0, -2, 1, 10])])
    torch.testing.assert_close(far.vertices, near.vertices * 16 + torch.tensor([3.0, -2, 1]))
    assert near.is_watertight
    assert near.volume() > 0


def moved(stream: TokenStream, frame: list[float]) -> TokenStream:
    return replace(stream, side={"frame": torch.tensor(frame)})


def test_far_from_the_origin_and_tiny(codec, stream):
    far = codec.encode([box(at=(1000.0, -2000.0, 500.0))])[0]
    assert far.side["frame"][:3].tolist() == pytest.approx([1000, -2000, 500])
    tiny = codec.encode([Shape(box().vertices * 1e-6, FACES)])[0]
    for part, again in zip(stream.parts, tiny.parts):
        assert len(part.codes) == len(again.codes)


def test_much_surface_is_scaled_down_to_the_limit():
    torch.manual_seed(0)
    config = replace(MINI_CODEC, points=8000)
    free = OctGPT(replace(config, max_codes=0)).encode([box((1, 1, 1))])[0]
    limited = OctGPT(replace(config, max_codes=800)).encode([box((1, 1, 1))])[0]
    assert len(free.parts[2].codes) > 800 >= len(limited.parts[2].codes)
    assert limited.side["frame"][3] > free.side["frame"][3]


def test_point_clouds_with_normals_encode(codec):
    cloud = box().sample(4000)
    stream = codec.encode([cloud])[0]
    assert len(stream.parts[2].codes) > 100
    with pytest.raises(ValueError, match="point cloud has no normals"):
        codec.encode([Shape(cloud.vertices)])


def test_an_inside_out_mesh_is_turned(codec, stream, caplog):
    with caplog.at_level(logging.WARNING):
        again = codec.encode([Shape(box().vertices, FACES.flip(1))])[0]
    assert "looked inwards" in caplog.text
    assert torch.equal(again.parts[2].codes, stream.parts[2].codes)


def test_an_open_mesh_is_closed_or_taken_as_it_is(codec, caplog):
    # a box without its top: two faces are missing
    open_box = Shape(box().vertices, FACES[:-2])
    with caplog.at_level(logging.WARNING):
        codec.encode([open_box])
    assert "not watertight" in caplog.text
    caplog.clear()
    codec.encode([open_box], options=ShapeOptions(repair=False))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(torch.ones(8, 3), FACES), "no extent"),
        (Shape(BOX, torch.zeros(0, 3, dtype=torch.long)), "no faces|with faces"),
        (Shape(BOX * 3e38, FACES), "beyond float32"),
        (Shape(BOX * 1e-38, FACES), "too small"),
    ],
)
def test_shapes_that_hold_nothing_are_refused(codec, shape, message):
    with pytest.raises(ValueError, match=message):
        codec.encode([shape])


def test_streams_that_do_not_fit_are_refused(codec, stream):
    first, second, codes = stream.parts
    shorter = replace(stream, parts=(first, second, Part(codes.codes[:-8], codes.vocab)))
    with pytest.raises(StreamError, match=r"part 2 has .* but the split bits above ask for"):
        codec.decode([shorter])
    flipped = first.codes.clone()
    flipped[0] = 1 - flipped[0]
    with pytest.raises(StreamError, match="part 1"):
        codec.decode([replace(stream, parts=(Part(flipped, (2,)), second, codes))])
    nothing = (
        Part(torch.zeros(64, 1, dtype=torch.long), (2,)),
        Part(torch.zeros(0, 1, dtype=torch.long), (2,)),
        Part(torch.zeros(0, 12, dtype=torch.long), codes.vocab),
    )
    with pytest.raises(StreamError, match="the shape is empty"):
        codec.decode([replace(stream, parts=nothing)])
    with pytest.raises(StreamError, match="expected centre"):
        codec.decode([moved(stream, [0, 0, 0, -1.0])])
    with pytest.raises(StreamError, match="expected centre"):
        codec.decode([moved(stream, [float("nan"), 0, 0, 1])])
    with pytest.raises(StreamError, match="was written by codec 'other/codec"):
        codec.decode([replace(stream, codec="other/codec@12345678")])


def test_codes_without_a_surface_are_refused(codec, stream, monkeypatch):
    nothing = torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long)
    monkeypatch.setattr(codec, "mesh", lambda field, size=None: nothing)
    with pytest.raises(StreamError, match="describes no surface"):
        codec.decode([stream])


def test_codes_that_ask_for_too_much_are_refused(codec, stream, monkeypatch):
    monkeypatch.setattr(vqvae, "MAX_NODES", 64)
    with pytest.raises(StreamError, match="nodes at depth 4, expected at most 8"):
        codec.decode([stream])


def test_a_saved_codec_is_the_same_codec(codec, stream, tmp_path):
    save_codec(codec, tmp_path / "codec.safetensors", name="octgpt/test")
    again = load_codec(tmp_path / "codec.safetensors")
    assert again.config == codec.config
    other = again.encode([box()])[0]
    assert torch.equal(other.parts[2].codes, stream.parts[2].codes)


def test_published_files_load_by_name(tmp_path):
    state = load_golden("shape3d_vqvae")["state_dict"]
    torch.save(state, tmp_path / "vqvae_large_im5_uncond_bsq32.pth")
    codec = load_codec("octgpt/large", tmp_path)
    assert codec.spec.layout.full_depth == 3
    assert codec.config.network.code_bits == 6
    stream = codec.encode([box()], options=ShapeOptions(points=2000))[0]
    assert codec.decode([stream], options=ShapeOptions(grid=24))[0].is_watertight


def test_code_vectors_are_the_two_signs(codec):
    assert codec.code_vectors()[:, 0].tolist() == pytest.approx([-(12**-0.5), 12**-0.5])
    codes = codec.vqvae.quantizer.codes(torch.tensor([[0, 1] * 6]))
    assert set(codes[0].tolist()) == set(codec.code_vectors()[:, 0].tolist())


def sphere(depth: int = 5, radius: float = 0.5) -> Field:
    """A field with the exact plane of a sphere at each node."""
    rng = torch.Generator().manual_seed(0)
    normals = torch.nn.functional.normalize(torch.randn(20000, 3, generator=rng), dim=-1)
    tree = build_octree([Points(normals * radius, normals)], depth=depth, full_depth=2)
    planes = []
    for d in range(2, depth + 1):
        centre = (decode_keys(tree.keys[d])[0] + 0.5) / 2 ** (d - 1) - 1
        length = centre.norm(dim=-1, keepdim=True)
        plane = torch.cat([centre / length, length - radius], -1)
        planes.append(plane if d == depth else plane * ~tree.nonempty(d)[:, None])
    return Field(tree, depth, torch.cat(planes))


def test_the_sparse_grid_gives_the_mesh_of_the_dense_one():
    field, grid = sphere(), GridConfig(size=64, level=0.0)
    full = mesh(dense(field, grid, field.planes.device), grid)
    quick = mesh(sparse(field, grid), grid)
    assert torch.equal(full[0], quick[0])
    assert torch.equal(full[1], quick[1])
    shape = Shape(*quick)
    assert shape.is_watertight
    assert shape.volume() == pytest.approx(4 / 3 * torch.pi * 0.5**3, rel=0.05)


def test_the_sparse_grid_evaluates_few_samples():
    field, grid = sphere(depth=6), GridConfig(size=128)
    asked = 0

    class Counting(Field):
        def __call__(self, points, batch=None):
            nonlocal asked
            asked += len(points)
            return super().__call__(points, batch)

    sparse(Counting(field.tree, field.depth, field.planes), grid)
    assert asked < 0.3 * 128**3


def test_a_surface_that_leaves_the_grid_is_closed():
    field = sphere(radius=0.6)
    shape = Shape(*mesh(sparse(field, GridConfig(size=32, box=0.5)), GridConfig(size=32, box=0.5)))
    assert shape.is_watertight


def test_a_field_of_one_sign_has_no_mesh():
    field = sphere()
    outside = Field(
        field.tree,
        field.depth,
        field.planes.new_tensor([0, 0, 0, 1.0]).expand(len(field.planes), 4),
    )
    vertices, faces = mesh(sparse(outside, GridConfig(size=32)), GridConfig(size=32))
    assert len(vertices) == len(faces) == 0
