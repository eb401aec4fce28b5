import json

import pytest
import torch
from typer.testing import CliRunner

from anytok.cli import app
from anytok.codecs.registry import _THIRD_PARTY, register_codec
from anytok.modalities.image import Image
from tests.backbone.tiny import Thumbnail


@pytest.fixture
def run(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image(torch.rand(3, 8, 8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    (folder / "bad.png").write_bytes(b"no picture")
    register_codec("thumbnail/tiny", lambda path: Thumbnail())
    monkeypatch.chdir(tmp_path)
    yield lambda *args: CliRunner().invoke(app, ["tokenize", *args])
    del _THIRD_PARTY["thumbnail/tiny"]


CODEC = ("--codec", "image=thumbnail/tiny")


def test_a_folder_becomes_a_corpus_and_a_second_call_says_the_same(run):
    made = run("pictures", *CODEC, "--out", "corpus", "--json")
    assert made.exit_code == 0, made.output
    report = json.loads(made.stdout)
    assert (report["documents"], report["shards"]) == (3, 1)
    (error,) = report["errors"]
    assert error["document"] == "bad"
    again = run("pictures", *CODEC, "--out", "corpus")
    assert again.exit_code == 0
    assert "corpus: 3 documents, 1 shards" in again.stdout
    assert "skipped bad" in again.stderr
    other = run("pictures", *CODEC, "--out", "corpus", "--shard", "2")
    assert other.exit_code == 6
    assert "other settings, shards" in " ".join(other.stderr.split())


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("pictures", "-c", "image"), 2, "expected MEDIUM=VALUE"),
        (("pictures", "-c", "smell=x/y"), 2, "expected MEDIUM=VALUE"),
        (("nowhere", *CODEC), 3, "there is no such file or folder"),
        (("pictures", "-c", "image=thumbnail/huge"), 5, "thumbnail/huge"),
        (("pictures", "-c", "audio=thumbnail/tiny"), 6, "codes image"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, args, code, message):
    made = run(*args, "--out", "corpus")
    assert made.exit_code == code, made.output
    assert message in made.stderr
