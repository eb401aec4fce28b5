"""Speech, clips and motion: fixed order, fixed splits, and captions that are true. No network."""

import json
import re
import sys
from itertools import pairwise

import numpy as np
import pytest
import soundfile

from anytok.assets.recipes import clips, motion, speech, speech_real
from anytok.assets.recipes.fetch import FetchError
from anytok.assets.recipes.mp4 import read_frames, write_clip
from anytok.assets.recipes.sentences import LISTS, TEMPLATES, mend, sentences

NAMES = [f"name {i}" for i in range(40)]
LINES = sentences(200, 1)


def test_sentences_are_fixed_different_and_whole():
    assert sentences(50, 7) == sentences(400, 7)[:50]
    assert sentences(50, 7) != sentences(50, 8)
    many = sentences(2000, 7)
    assert len(set(many)) == 2000
    assert all(re.fullmatch(r"[A-Z][A-Za-z', ]+[.?]", line) for line in many)


def test_templates_name_known_lists():
    used = {slot for template in TEMPLATES for slot in re.findall(r"\{(\w+)\}", template)}
    assert used <= set(LISTS)
    assert used == set(LISTS)


@pytest.mark.parametrize(
    ("raw", "good"),
    [
        ("Anna buys a orange box.", "Anna buys an orange box."),
        ("a apple and a pear", "An apple and a pear"),
        ("two boxs, two leafs", "Two boxes, two leaves"),
        ("three butterflys and two keys", "Three butterflies and two keys"),
        ("two mouses meet", "Two mice meet"),
    ],
)
def test_grammar_is_mended(raw, good):
    assert mend(raw) == good


def take(count):
    return [clip for clip, _ in zip(speech.clips(NAMES, LINES), range(count))]


def test_clips_are_fixed_and_a_longer_list_starts_alike():
    assert take(100) == take(300)[:100]
    assert len({clip.path for clip in take(300)}) == 300


def test_every_name_comes_first_and_again_by_another_speaker():
    first = take(len(NAMES))
    assert [clip.text for clip in first] == NAMES
    block = len(NAMES) + len(LINES)
    second = take(block + len(NAMES))[block:]
    assert [clip.text for clip in second] == NAMES
    pairs = [((a.engine, a.voice), (b.engine, b.voice)) for a, b in zip(first, second)]
    assert all(a != b for a, b in pairs)


def test_unseen_speakers_and_held_sentences_stay_out_of_training():
    trained = [clip for clip in take(1500) if clip.split == "train"]
    unseen = list(speech.unseen_clips(NAMES, LINES))
    assert not {c.voice for c in trained} & {c.voice for c in unseen}
    assert not {c.text for c in unseen if c.kind == "sentence"} & {c.text for c in trained}
    held = {clip.text for clip in take(1500) if clip.split == "held"}
    assert held == {line for line in LINES if speech.is_held(line)}
    assert 0.01 < len(held) / len(LINES) < 0.12


def test_pitch_and_speed_are_what_they_say(tmp_path, monkeypatch):
    """A synthesiser that hums 200 Hz for one second at speed 1."""
    script = tmp_path / "hum.py"
    script.write_text(
        "import sys, numpy as np, soundfile\n"
        "speed, path = float(sys.argv[1]), sys.argv[2]\n"
        "t = np.arange(int(22050 / speed)) / 22050\n"
        "soundfile.write(path, 0.5 * np.sin(2 * np.pi * 200 * t), 22050)\n"
    )

    def command(clip, path):
        return [sys.executable, str(script), str(clip.speed / clip.pitch), str(path)]

    monkeypatch.setattr(speech, "_command", command)
    clip = speech.Clip(
        engine="flite", voice="x", text="x", kind="name", split="train", speed=1.25, pitch=1.08
    )
    samples = speech.synthesise(clip)
    assert len(samples) / speech.RATE == pytest.approx(1 / 1.25, rel=0.01)
    peak = np.abs(np.fft.rfft(samples)).argmax() * speech.RATE / len(samples)
    assert peak == pytest.approx(200 * 1.08, abs=2)
    soundfile.write(tmp_path / "check.flac", samples, speech.RATE)


def test_missing_synthesiser_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"command 'flite' is missing; .*apt-get install flite"):
        speech.build(tmp_path)


def test_transcripts():
    text = "; remark: no\nbeep: [a tone]\nhello-world: Hello,  world!\n\ndigits/1: one (short)\n"
    assert speech_real.transcripts(text) == {"hello-world": "Hello, world!", "digits/1": "one"}


def test_g722_gives_two_samples_a_byte():
    samples = speech_real.decode_g722(bytes(range(256)) * 10)
    assert samples.shape == (2 * 2560,)
    assert np.abs(samples).max() <= 1


def test_mp4_round_trip(tmp_path):
    y, x = np.mgrid[:64, :64]
    frames = [
        np.stack([4 * x, 4 * y, np.full_like(x, 12 * t)], -1).astype(np.uint8) for t in range(17)
    ]
    write_clip(tmp_path / "a.mp4", frames, 8)
    back = list(read_frames(tmp_path / "a.mp4"))
    assert len(back) == 17
    error = np.mean((np.stack(back).astype(float) - np.stack(frames)) ** 2)
    assert 10 * np.log10(255**2 / error) > 38


@pytest.mark.parametrize("count", [17, 20, 68, 100, 636])
def test_windows_never_straddle_the_splits(count):
    found = list(clips.windows(count))
    train = {i for start, split in found if split == "train" for i in range(start, start + 17)}
    held = {i for start, split in found if split == "held" for i in range(start, start + 17)}
    assert held
    assert not train & held
    assert max(train | held) < count


def test_thin_keeps_eight_frames_a_second():
    frames = [np.full((256, 512, 3), i, np.uint8) for i in range(30)]
    thinned = list(clips.thin(iter(frames), 30.0))
    assert len(thinned) == 8
    assert thinned[0].shape == (128, 256, 3)
    assert len(list(clips.thin(iter(frames), 5.0))) == 30  # a slow film keeps all


def test_squares():
    wide = [np.zeros((128, 228, 3), np.uint8)]
    assert [name for name, _ in clips.squares(wide)] == ["left", "middle", "right"]
    near = [np.zeros((128, 140, 3), np.uint8)]
    assert [(name, clip[0].shape) for name, clip in clips.squares(near)] == [
        ("middle", (128, 128, 3))
    ]


def test_no_film_without_a_licence_is_trained_on():
    for film in clips.FILMS:
        split = clips._row(film, "x.mp4", "train")["split"]
        assert split == ("eval" if film.name == "carphone_pristine" else "train")
    assert not any("egamind" in film.path for film in clips.FILMS)


def scene(motion_name, thing="red square"):
    return motion.Scene(
        thing=thing, motion=motion_name, background="white", shift=(0.0, 0.0), zoom=1.0
    )


def ink(frame):
    """How much is not white, and its centre."""
    weight = 255.0 - frame.astype(float).min(-1)
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    total = weight.sum() + 1e-9
    return total, (x * weight).sum() / total, (y * weight).sum() / total


@pytest.mark.parametrize(
    ("name", "number", "sign"),
    [
        ("moves left", 1, -1),
        ("moves right", 1, 1),
        ("moves up", 2, -1),
        ("moves down", 2, 1),
        ("grows", 0, 1),
        ("shrinks", 0, -1),
        ("appears", 0, 1),
        ("disappears", 0, -1),
    ],
)
def test_captions_are_true(name, number, sign):
    frames = motion.frames_of(scene(name), motion.plain_shape("red square"))
    assert len(frames) == 17
    assert frames[0].shape == (64, 64, 3)
    values = [ink(frame)[number] for frame in frames]
    assert all(sign * (b - a) > 0 for a, b in pairwise(values))
    if number:
        assert abs(values[-1] - values[0]) > 20  # pixels


def test_turning_left_is_against_the_clock():
    frames = motion.frames_of(scene("turns left", "red arrow"), motion.plain_shape("red arrow"))
    half = frames[8]  # a quarter turn: the arrow that pointed right points up
    top, bottom = half[:32].astype(int), half[32:].astype(int)
    assert (255 - top.min(-1)).sum() > (255 - bottom.min(-1)).sum()


def test_standing_still_is_still():
    frames = motion.frames_of(scene("stands still"), motion.plain_shape("red square"))
    assert all((frame == frames[0]).all() for frame in frames)


@pytest.mark.parametrize(
    ("thing", "word"), [("apple", "an"), ("unicorn", "a"), ("red apple", "a"), ("owl", "an")]
)
def test_article(thing, word):
    assert motion.article(thing) == word


def emoji_row(name, split="train", category="food-drink"):
    row = {"name": name, "split": split, "category": category, "image": "x.png"}
    return row | {"style": "noto", "licence": "Apache-2.0", "source": "noto@1"}


def test_held_emoji_are_never_drawn():
    rows = [emoji_row("apple"), emoji_row("pear", "held"), emoji_row("plum", "unseen")]
    rows += [emoji_row("flag france", category="flags"), emoji_row("grapes")]
    assert [row["name"] for row in motion.drawable(rows)] == ["apple"]


def test_scenes_are_fixed_and_split_by_pair():
    rows = [emoji_row(name) for name in ("apple", "pear", "plum", "fig")]
    some = motion.scenes(rows, 300, 5)
    assert some == motion.scenes(rows, 400, 5)[:300]
    held = {(s.thing, s.motion) for s in some if motion.is_held(s.thing, s.motion)}
    train = {(s.thing, s.motion) for s in some if not motion.is_held(s.thing, s.motion)}
    assert held
    assert not held & train
    assert {s.licence for s in some} == {"Apache-2.0", "own-rendering"}
    assert not any(s.motion == "turns left" and "circle" in s.thing for s in some)
    json.dumps([s.caption for s in some])
