import json

import pytest
import torch

from anytok.backbone.directory import ModelError, load_model, save_model
from anytok.codecs.published import WeightsError
from anytok.codecs.registry import _THIRD_PARTY, register_codec
from anytok.generators.pipeline import AnyToAny
from anytok.generators.sampling import Sampling
from anytok.modalities.audio import Audio
from anytok.modalities.image import Image
from anytok.modalities.text import Text
from tests.backbone.tiny import Thumbnail, model


@pytest.fixture(scope="module")
def anytoany():
    return AnyToAny(model())


@pytest.fixture
def registered():
    register_codec("thumbnail/tiny", lambda path: Thumbnail())
    yield
    del _THIRD_PARTY["thumbnail/tiny"]


def picture():
    return Image(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_text_to_image_and_back(anytoany):
    (answer,) = anytoany("red", to="image")
    assert isinstance(answer.items[0], Image)
    assert 1 <= len(answer.streams[0]) <= 10  # the model's own limit
    assert set(answer.seconds) == {"encode", "generate", "decode"}
    (answer,) = anytoany(picture(), to="text")
    assert isinstance(answer.items[0], Text)
    assert answer.streams[0].codec == anytoany.model.text.identity


def test_one_answer_a_prompt_and_sample(anytoany):
    answers = anytoany(["a", "bcd"], to="image", samples=3)
    assert [(a.prompt, a.sample, a.seed) for a in answers] == [
        (0, 0, 0),
        (0, 1, 1),
        (0, 2, 2),
        (1, 0, 3),
        (1, 1, 4),
        (1, 2, 5),
    ]
    (mixed,) = anytoany([["b", picture()]], to=["image", "text"])
    assert [type(item) for item in mixed.items] == [Image, Text]


def test_a_row_does_not_depend_on_its_batch(anytoany):
    together = anytoany(["a", "bcd", "efghi"], to="image", seeds=[5, 6, 7])
    for answer, prompt in zip(together, ["a", "bcd", "efghi"]):
        (alone,) = anytoany(prompt, to="image", seeds=[answer.seed])
        assert torch.equal(alone.streams[0].codes, answer.streams[0].codes)
        assert torch.equal(alone.items[0].pixels, answer.items[0].pixels)


def test_where_nothing_is_named_the_only_trained_direction_is_taken(anytoany):
    assert isinstance(anytoany("red")[0].items[0], Image)
    assert isinstance(anytoany([picture()])[0].items[0], Text)


def test_units_and_options_can_be_given(anytoany):
    (answer,) = anytoany("red", to="image", units={"image": 3}, options=Sampling(cfg=1.5))
    assert len(answer.streams[0]) <= 3
    greedy = [
        anytoany("red", to="image", seeds=[s], options=Sampling(temperature=0))[0].streams[0].codes
        for s in (1, 2)
    ]
    assert torch.equal(*greedy)


def test_stream_gives_partial_pictures_and_then_the_answer(anytoany):
    events = list(anytoany.stream("red", to="image", every=1))
    partial = [event.partial for event in events if event.partial is not None]
    assert partial
    assert all(isinstance(one, Image) for one in partial)
    assert [event.answer is not None for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1].answer.items[0].pixels.shape == (3, 4, 4)


def test_closing_the_stream_cancels(anytoany):
    calls = []
    handle = anytoany.model.transformer.register_forward_hook(lambda *_: calls.append(1))
    events = anytoany.stream("red", to="image")
    next(events)
    next(events)
    done = len(calls)
    events.close()
    handle.remove()
    assert len(calls) == done < 5


@pytest.mark.parametrize(
    ("prompt", "to", "message"),
    [
        ("red", "audio", "knows no 'audio', only text, image"),
        ("red", "text", "not trained to write text from text, it knows text -> image"),
        (Audio(torch.zeros(1, 100), 16000), "text", "knows no 'audio'"),
        ([], "image", "no prompts"),
        ("far too long a prompt", "image", "21 positions, the model takes 12"),
    ],
)
def test_impossible_wishes_are_refused(anytoany, prompt, to, message):
    with pytest.raises(ValueError, match=message):
        anytoany(prompt, to=to)


def test_a_prompt_longer_than_the_context_is_refused():
    small = AnyToAny(model(context=14))
    with pytest.raises(ValueError, match="the prompt has 12 ids and the model's context is 14"):
        small("abcdefghi", to="image")
    # What fits is cut where the context ends.
    (answer,) = small("abcdef", to="image")
    assert len(answer.streams[0]) <= 4
    with pytest.raises(TypeError, match="a prompt holds a int"):
        small([3], to="image")
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        small(["a", "b"], to="image", seeds=[1])
    with pytest.raises(ValueError, match="samples is 0"):
        small("a", to="image", samples=0)


def test_a_model_directory_says_everything(tmp_path, registered, anytoany):
    save_model(anytoany.model, tmp_path)
    again = AnyToAny.load(tmp_path)
    assert again.model.pairs == anytoany.model.pairs
    assert again.model.generation == anytoany.model.generation
    assert json.loads((tmp_path / "config.json").read_text())["anytok"]["codecs"] == {
        "text": anytoany.model.text.identity,
        "image": Thumbnail().identity,
    }
    for prompt, to in (("red", "image"), (picture(), "text")):
        a, b = (m(prompt, to=to)[0] for m in (anytoany, again))
        assert torch.equal(a.streams[0].codes, b.streams[0].codes)


def test_another_codec_version_is_refused(tmp_path, anytoany):
    save_model(anytoany.model, tmp_path)
    register_codec("thumbnail/tiny", lambda path: Thumbnail(brightest=0.9))
    try:
        with pytest.raises(ModelError, match="was trained with codec 'thumbnail/tiny@"):
            AnyToAny.load(tmp_path)("red", to="image")
    finally:
        del _THIRD_PARTY["thumbnail/tiny"]


def test_damaged_directories_and_unknown_names(tmp_path, anytoany):
    with pytest.raises(ValueError, match="neither a model directory nor one of anytok/mini"):
        AnyToAny.load("anytok/maxi")
    save_model(anytoany.model, tmp_path)
    vocabulary = tmp_path / "vocabulary.json"
    data = json.loads(vocabulary.read_text())
    data["vocabulary"]["size"] += 1
    vocabulary.write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"vocabulary\.json has"):
        load_model(tmp_path)
    vocabulary.unlink()
    with pytest.raises(WeightsError, match=r"vocabulary\.json cannot be read"):
        load_model(tmp_path)
