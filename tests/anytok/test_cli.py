"""The command line as a person uses it: results, JSON, exit codes, one-line errors."""

import json
from importlib import resources
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anytok import load_codec
from anytok.cli import app
from anytok.codecs import CodecUnavailable

SAMPLES = Path(str(resources.files("anytok.assets") / "samples"))


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("two small words")
    return path


def test_codecs_lists_names_and_licences():
    rows = json.loads(run("codecs", "--json").stdout)
    assert {"text/bytes", "onedpiece/mini"} <= {row["name"] for row in rows}
    assert all(row["code_licence"] and row["weights_licence"] for row in rows)
    assert "onedpiece/mini" in run("codecs", "onedpiece/mini").stdout


def test_encode_info_decode(text, tmp_path):
    tok, back = tmp_path / "x.tok", tmp_path / "back.txt"
    facts = json.loads(run("encode", text, "-o", tok, "--json").stdout)
    assert facts["tokens"] == 15
    assert facts["bytes"] == tok.stat().st_size
    assert json.loads(run("info", tok, "--json").stdout) == facts
    assert "15 x 256" in run("info", tok).stdout
    assert run("decode", tok, "-o", back).exit_code == 0
    assert back.read_text() == "two small words"
    assert run("decode", tok, "-o", back, "-k", 3).exit_code == 0
    assert back.read_text() == "two"


def test_roundtrip_leaves_files_to_look_at(text, tmp_path):
    done = run("roundtrip", text, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert row["equal"] == 1.0
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"contact_sheet.png", "report.html", "figures.json", "words.text-bytes.txt"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png" in page
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["encode", "nowhere.png", "-o", "x.tok"], 3, "nowhere.png"),
        (["info", "words.txt"], 4, "not a .tok file"),
        (["encode", "words.txt", "-o", "x.tok", "-c", "onedpeice/mini"], 5, "did you mean"),
        (["encode", "words.txt", "-o", "no/such/folder/x.tok"], 4, "cannot be written"),
        (["decode", "broken.tok", "-o", "x.txt"], 4, "broken.tok"),
        (["encode", "words.txt"], 2, "output"),
        (["generate", "-o", "x.png", "--to", "image"], 2, "prompt"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    text, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.tok").write_bytes(b"\x00" * 50)
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "x.tok").exists()


def test_another_mediums_codec_is_refused(tmp_path):
    picture = SAMPLES / "emoji-pineapple.png"
    done = run("encode", picture, "-o", tmp_path / "x.tok", "-c", "text/bytes")
    assert done.exit_code == 4
    assert "codes text, this is image" in done.output.replace("\n", " ")


def ships(name: str) -> bool:
    try:
        load_codec(name)
    except CodecUnavailable:
        return False
    return True


@pytest.mark.parametrize("sample", sorted(p.name for p in SAMPLES.iterdir() if p.suffix != ".md"))
def test_samples_go_through_the_mini_codecs(sample, tmp_path):
    from anytok import modalities
    from anytok.roundtrip import DEFAULT_CODECS

    name = DEFAULT_CODECS[modalities.medium_of(SAMPLES / sample).modality]
    done = run("roundtrip", SAMPLES / sample, "--out", tmp_path, "--json")
    if not ships(name):  # a mini that is not good enough yet does not ship: the command must say so
        assert done.exit_code == 5, done.output
        assert "does not ship" in done.output.replace("\n", " ")
        return
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert all(row["bytes"] > 0 for row in rows)
