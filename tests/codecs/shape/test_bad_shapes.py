"""Meshes as people have them: whatever can be repaired becomes a stream, with a word about it; the rest is refused."""

import logging
from dataclasses import replace

import pytest
import torch

from anytok.codecs.shape import octgpt
from anytok.codecs.shape.octgpt import MINI_CODEC, OctGPT
from anytok.modalities.shape import Shape
from tests.codecs.shape.test_octgpt import FACES, box


@pytest.fixture(scope="module")
def codec() -> OctGPT:
    torch.manual_seed(0)
    return OctGPT(replace(MINI_CODEC, points=6000, grid=32), name="octgpt/test").eval()


def joined(*shapes: Shape) -> Shape:
    faces, start = [], 0
    for one in shapes:
        faces.append(one.faces + start)
        start += len(one.vertices)
    return Shape(torch.cat([one.vertices for one in shapes]), torch.cat(faces))


def edge_to_edge() -> Shape:
    """Two boxes that share the two corners of an edge: four faces meet there."""
    two = joined(box((1, 1, 1)), box((1, 1, 1), at=(1, 1, 0)))
    faces = two.faces.clone()
    for a, row in enumerate(two.vertices):
        same = (two.vertices == row).all(1).nonzero()[0]
        faces[faces == a] = int(same)
    return Shape(two.vertices, faces)


BROKEN = {
    "non-manifold": edge_to_edge(),
    "a face twice": Shape(box().vertices, torch.cat([FACES, FACES[:1]])),
    "faces without area": Shape(box().vertices, torch.cat([FACES, torch.tensor([[0, 1, 1]])])),
    "one triangle": Shape(box().vertices, FACES[:1]),
    "half turned": Shape(box().vertices, torch.cat([FACES[:6], FACES[6:].flip(1)])),
    "inside out": Shape(box().vertices, FACES.flip(1)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_meshes_become_streams_with_a_notice(codec, name, caplog):
    with caplog.at_level(logging.WARNING):
        (stream,) = codec.encode([BROKEN[name]])
    codec.check(stream)
    assert stream.side["frame"].isfinite().all()
    assert "before encoding" in caplog.text


def test_parts_that_overlap_are_taken_as_they_are(codec, caplog):
    with caplog.at_level(logging.WARNING):
        (stream,) = codec.encode([joined(box(), box(at=(0.3, 0.1, 0.05)))])
    codec.check(stream)
    assert caplog.text == ""


@pytest.mark.parametrize("at", [1e4, -1e6])
def test_far_from_the_origin(codec, at):
    (stream,) = codec.encode([box((40.0, 30.0, 20.0), at=(at, 0.0, at))])
    (near,) = codec.encode([box((40.0, 30.0, 20.0))])
    assert stream.side["frame"][:3].tolist() == pytest.approx([at, 0, at], rel=1e-6)
    assert abs(len(stream) - len(near)) <= 0.2 * len(near)


def test_numbers_that_are_none_are_refused_at_once():
    vertices = box().vertices.clone()
    vertices[3, 1] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        Shape(vertices, FACES)
    with pytest.raises(ValueError, match="faces"):
        Shape(box().vertices, FACES + 3)


def test_more_faces_than_the_limit_are_refused_before_any_work(codec, monkeypatch):
    monkeypatch.setattr(octgpt, "MAX_FACES", 11)
    with pytest.raises(ValueError, match=r"has 12 faces, expected at most 11; simplify it"):
        codec.encode([box()])
    (stream,) = codec.encode([box().sample(5000)])
    codec.check(stream)


def test_a_hundred_thousand_faces_pass(codec):
    side = torch.linspace(0, 1, 225)
    x, y = torch.meshgrid(side, side, indexing="ij")
    top = torch.stack([x, y, 0.2 + 0.05 * (9 * x).sin() * (7 * y).cos()], -1).reshape(-1, 3)
    at = torch.arange(225 * 225).view(225, 225)
    a, b, c, d = (at[:-1, :-1], at[1:, :-1], at[1:, 1:], at[:-1, 1:])
    faces = torch.cat([torch.stack(f, -1).reshape(-1, 3) for f in ((a, b, c), (a, c, d))])
    assert len(faces) > 100_000
    normals = torch.tensor([0.0, 0, 1]).expand(len(top), 3)
    (stream,) = codec.encode([Shape(top, faces)], options=octgpt.ShapeOptions(repair=False))
    codec.check(stream)
    (cloud,) = codec.encode([Shape(top, None, normals)])
    assert len(cloud) == pytest.approx(len(stream), rel=0.25)
