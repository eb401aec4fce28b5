"""Shapes through the shared backbone: what the grammar lets a model write, `octgpt/mini` decodes to a closed mesh."""

import random

import pytest
import torch

from anytok.backbone.grammar import Grammar
from anytok.backbone.interleave import Interleaver
from anytok.backbone.rules import Rule
from anytok.codecs import load_codec
from anytok.codecs.shape.octgpt import OctGPT, ShapeOptions
from tests.codecs.shape.test_octgpt import box


@pytest.fixture(scope="module")
def codec() -> OctGPT:
    return load_codec("octgpt/mini")


def test_a_shape_takes_about_a_thousand_ids(codec):
    rule = Rule.of(codec)
    interleaver = Interleaver.build([rule])
    (stream,) = codec.encode([box((1.0, 1.0, 1.0))], options=ShapeOptions(points=8000))
    ids = interleaver.ids(stream)
    assert len(ids) == 8 + len(stream.parts[1].codes) // 8 + len(stream.parts[2].codes)
    assert len(ids) <= 8 + 64 + codec.config.max_codes
    again = interleaver.stream(ids, "shape")
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(stream.parts, again.parts))
    codec.check(again)


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_every_allowed_stream_decodes_to_a_closed_mesh(codec, density):
    interleaver = Interleaver.build([Rule.of(codec, limit=240)])
    grammar = Grammar(interleaver)
    for seed in range(2):
        (stream,) = interleaver.parse(written(grammar, random.Random(seed), density))
        assert 8 <= len(stream.parts[-1].codes) <= 240
        (shape,) = codec.decode([stream], options=ShapeOptions(grid=40))
        assert shape.is_watertight
        assert shape.volume() > 0


def written(grammar: Grammar, rng: random.Random, density: float) -> list[int]:
    """A random document of one shape; split bits are dense or rare, where there is a choice."""
    state, ids = grammar.start(["shape"]), []
    while not state.done:
        ranges = grammar.allowed(state)
        choices = [rng.randrange(*rng.choice(ranges)) for _ in range(3)]
        if density < 0.5 or density == 1.0:
            flat = sorted(choices, key=int.bit_count)
            choices = flat if density < 0.5 else flat[::-1]
        ids.append(choices[0])
        state = grammar.advance(state, ids[-1:])
    return ids
