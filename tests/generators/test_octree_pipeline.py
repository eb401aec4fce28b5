"""Text to shape and shape to text in `AnyToAny`, with an untrained backbone and `octgpt/mini`."""

import pytest
import torch

from anytok.backbone.directory import Model
from anytok.backbone.interleave import Interleaver
from anytok.backbone.rules import Rule
from anytok.codecs import StreamError, load_codec
from anytok.codecs.text import TextCodec
from anytok.generators.pipeline import AnyToAny
from anytok.generators.sampling import Sampling
from tests.backbone.tiny import transformer
from tests.codecs.shape.test_octgpt import box


def pipeline(limit: int | None = None, context: int = 1200) -> AnyToAny:
    text, codec = TextCodec(), load_codec("octgpt/mini")
    rules = [Rule.of(text, limit=12), Rule.of(codec, limit=limit)]
    interleaver = Interleaver.build(rules)
    return AnyToAny(
        Model(
            name="tiny",
            transformer=transformer(interleaver.vocabulary.size, context=context),
            interleaver=interleaver,
            text=text,
            pairs=(("text", "shape"), ("shape", "text")),
            generation={"shape": {"units": 24}, "text": {"units": 4}},
            codecs={"shape": codec},
        )
    )


def test_shapes_are_written_and_read():
    model = pipeline()
    (answer,) = model("stool", to="shape", seeds=[1], options=Sampling())
    (shape,) = answer.items
    assert len(answer.streams[0].parts[-1].codes) <= 24
    assert shape.is_watertight
    (named,) = model([box()], to="text", options={"text": Sampling()})
    assert len(named.items[0].text.encode(errors="replace")) >= 1
    again = model("stool", to="shape", seeds=[1], options=Sampling())[0].streams[0]
    assert torch.equal(again.parts[-1].codes, answer.streams[0].parts[-1].codes)


def test_a_shape_that_is_too_large_is_named():
    with pytest.raises(StreamError, match=r"codes, the model takes 64; larger shapes"):
        pipeline(limit=64)([box()], to="text")
