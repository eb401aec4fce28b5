"""The front of the package: lazy names, `load`, `save`, errors that travel."""

import pickle
import subprocess
import sys

import pytest
import torch

import anytok.modalities as modalities
from anytok.modalities import MODALITIES, Image, MediaError, Text, load, save
from tests.modalities.conftest import cube, film, picture, tone

LAZY = ["torchaudio", "torchvision", "trimesh", "av", "PIL", "soundfile", "scipy", "skimage"]


def test_importing_costs_nothing():
    code = (
        "import sys, anytok.modalities as m; import anytok.modalities.features, anytok.modalities.measure\n"
        "import anytok.modalities.watertight; [getattr(m, name) for name in m.__all__]\n"
        f"print([name for name in {LAZY} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_names():
    assert list(MODALITIES) == ["text", "image", "audio", "video", "shape"]
    assert all(cls.modality == name for name, cls in MODALITIES.items())
    assert set(modalities.__all__) <= set(dir(modalities))
    with pytest.raises(AttributeError, match="no attribute 'Smell'"):
        modalities.Smell  # noqa: B018


@pytest.mark.parametrize(
    ("name", "medium"),
    [
        ("a.png", Image(picture())),
        ("a.wav", tone()),
        ("a.mkv", film()),
        ("a.obj", cube()),
        ("a.txt", Text("x")),
    ],
)
def test_save_and_load(tmp_path, name, medium):
    save(medium, tmp_path / name)
    assert type(load(tmp_path / name)) is type(medium)
    assert type(load((tmp_path / name).read_bytes())) is type(medium) or name == "a.obj"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_saving_something_else():
    with pytest.raises(TypeError, match="cannot save a Tensor, expected one of Text, Image"):
        save(torch.zeros(3), "a.png")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    Text("old").save(tmp_path / "a.txt")
    with pytest.raises(MediaError):
        Text("\ud800").save(tmp_path / "a.txt")
    assert Text.load(tmp_path / "a.txt").text == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(MediaError("a.png", "is empty")))
    assert (error.source, error.cause, str(error)) == ("a.png", "is empty", "a.png: is empty")
