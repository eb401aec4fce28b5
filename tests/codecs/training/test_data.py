import json

import numpy as np
import pytest
import torch

from anytok.codecs.training import data
from anytok.codecs.training.data import (
    Clips,
    DataError,
    Pictures,
    Prepared,
    Sounds,
    find_rows,
    split_of,
)
from anytok.modalities.audio import Audio
from anytok.modalities.errors import MediaError
from anytok.modalities.image import Image


def picture(path, height=8, width=12, colour=(255, 0, 0, 128)):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.from_numpy(np.tile(np.array(colour, np.uint8), (height, width, 1))).save(path)


def recipe(folder, rows):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_recipe_rows_by_split_modality_and_field(tmp_path):
    rows = [
        {"image": "a.png", "text": "a", "split": "train", "style": "noto"},
        {"image": "b.png", "split": "held", "style": "noto"},
        {"audio": "c.wav", "split": "train"},
        {"image": "d.png", "split": "train", "style": "fluent"},
    ]
    recipe(tmp_path / "emoji", rows)
    found = find_rows(tmp_path, ["emoji"], modality="image")
    assert [row["image"] for row in found] == [
        str(tmp_path / "emoji" / n) for n in ("a.png", "d.png")
    ]
    assert [r["text"] for r in find_rows(tmp_path / "emoji", modality="text")] == ["a"]
    noto = find_rows(
        tmp_path, ["emoji"], modality="image", splits=("train", "held"), where={"style": "noto"}
    )
    assert len(noto) == 2
    with pytest.raises(DataError, match=r"no image of split unseen"):
        find_rows(tmp_path, ["emoji"], modality="image", splits=["unseen"])


def test_missing_folder_and_broken_rows_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        find_rows(tmp_path, ["emoji"], modality="image")
    for number, line in enumerate(['{"image": ', "3", '{"image": "a.png"}']):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "data.jsonl").write_text(f'{{"split": "train"}}\n{line}\n')
        with pytest.raises(DataError, match=r"data\.jsonl, line 2"):
            find_rows(folder, modality="image")


def test_plain_folder_holds_back_a_tenth_by_name(tmp_path):
    for i in range(200):
        path = tmp_path / f"{i % 3}" / f"{i}.JPG"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("not a picture")
    train = find_rows(tmp_path, modality="image")
    held = find_rows(tmp_path, modality="image", splits=["held"])
    assert len(train) + len(held) == 200
    assert 8 <= len(held) <= 35
    assert all(split_of(row["source"]) == "held" for row in held)
    assert split_of("0/3.png") == split_of("0/3.png")


@pytest.mark.parametrize("count", [2, 3])
def test_small_plain_folders_have_something_on_both_sides(tmp_path, count):
    for i in range(count):
        picture(tmp_path / f"{i}.png")
    assert find_rows(tmp_path, modality="image")
    assert find_rows(tmp_path, modality="image", splits=["held"])


@pytest.mark.parametrize("limit", [data.MAX_CACHE, 0])
def test_pictures_keep_alpha_whether_cached_or_not(tmp_path, limit, monkeypatch):
    monkeypatch.setattr(data, "MAX_CACHE", limit)
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", colour=(0, 255, 0))
    rows = [{"image": str(tmp_path / name)} for name in ("a.png", "b.png")]
    pictures = Pictures(rows, (4, 4))
    assert (pictures.cache is None) == (limit == 0)
    assert len(pictures) == 2
    assert pictures[0].shape == (4, 4, 4)
    assert pictures[0].dtype == torch.uint8
    assert pictures[0][:, 2, 2].tolist() == [255, 0, 0, 128]
    assert pictures[1][:, 2, 2].tolist() == [0, 255, 0, 255]


def test_crop_takes_the_middle(tmp_path):
    array = np.zeros((4, 12, 3), np.uint8)
    array[:, 4:8] = 200
    Image.from_numpy(array).save(tmp_path / "a.png")
    rows = [{"image": str(tmp_path / "a.png")}]
    assert (Pictures(rows, (4, 4), fit="crop")[0][:3] == 200).all()
    assert (Pictures(rows, (2, 2), fit="crop")[0][:3] == 200).all()
    assert not (Pictures(rows, (4, 4))[0][:3] == 200).all()
    with pytest.raises(ValueError, match="fit is 'pad'"):
        Pictures(rows, (4, 4), fit="pad")


def test_broken_picture_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(MediaError, match=r"bad\.png"):
        Pictures([{"image": str(tmp_path / "bad.png")}], (4, 4))


def sound(path, samples):
    Audio(torch.as_tensor(samples), 8000).save(path)
    return {"audio": str(path)}


def test_sounds_are_cut_mixed_and_padded(tmp_path):
    ramp = torch.linspace(-0.9, 0.9, 1000)
    rows = [
        sound(tmp_path / "a.wav", torch.stack([ramp, ramp])),
        sound(tmp_path / "b.wav", ramp[None, :60]),
    ]
    sounds = Sounds(rows, rate=8000, length=300)
    assert len(sounds) == 3 + 1  # long recordings count more
    torch.testing.assert_close(sounds[1][0], ramp[300:600], rtol=0, atol=1e-4)
    torch.testing.assert_close(sounds[3][0, :60], ramp[:60], rtol=0, atol=1e-4)
    assert (sounds[3][0, 60:] == 0).all()
    starts = set()
    for seed in range(20):
        piece = sounds.draw(0, torch.Generator().manual_seed(seed))
        assert piece.shape == (1, 300)
        starts.add(round(float(piece[0, 0]), 3))
    assert len(starts) > 15
    again = [sounds.draw(0, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again)


def test_sounds_of_another_rate_and_of_two_channels(tmp_path):
    rows = [sound(tmp_path / "a.wav", torch.zeros(1, 800))]
    assert Sounds(rows, rate=16000, length=1600, channels=2)[0].shape == (2, 1600)
    with pytest.raises(ValueError, match="channels is 5"):
        Sounds(rows, rate=16000, length=1600, channels=5)


def test_prepared_rows_are_prepared_once():
    calls = []
    prepared = Prepared([{"x": 1}, {"x": 2}], lambda row: calls.append(row["x"]) or row["x"] * 10)
    assert [prepared[1], prepared[0], prepared[1]] == [20, 10, 20]
    assert calls == [2, 1]
    assert len(prepared) == 2


@pytest.fixture
def film(monkeypatch):
    """Clips over a stand-in for a film: 10 frames a second, frame t is grey t."""

    def make(count, **arguments):
        frames = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 6, 8)

        class Film:
            @staticmethod
            def load(path):
                return type("Loaded", (), {"frames": frames, "fps": 10.0})

        monkeypatch.setattr("anytok.modalities.video.Video", Film)
        return Clips([{"video": "a.mp4"}], size=(3, 3), **arguments)

    return make


def times(clip):
    return clip[:, 0, 0, 0].tolist()


def test_clips_are_cut_and_rest_on_their_last_frame(film):
    clips = film(10, frames=4)
    assert len(clips) == 2
    assert clips[1].shape == (4, 3, 3, 3)
    assert times(clips[1]) == [4, 5, 6, 7]
    drawn = {times(clips.draw(0, torch.Generator().manual_seed(s)))[0] for s in range(40)}
    assert drawn == set(range(7))
    assert times(film(3, frames=5)[0]) == [0, 1, 2, 2, 2]


def test_clips_at_another_frame_rate(film):
    assert times(film(10, frames=5, fps=5.0)[0]) == [1, 3, 5, 7, 9]
    assert times(film(4, frames=8, fps=20.0)[0]) == [0, 0, 1, 1, 2, 2, 3, 3]
