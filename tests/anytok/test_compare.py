"""`anytok compare`: equal bytes, distances, the page."""

import json

import pytest
import scipy.linalg
import torch
from typer.testing import CliRunner

from anytok import compare, report
from anytok.cli import app
from anytok.compare import Judges, Ladder, find_pictures, frechet, judged, through_codec
from anytok.modalities import Image, MediaError

SIZE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures and a broken one."""
    root = tmp_path_factory.mktemp("pictures")
    axis = torch.linspace(0, 1, 40)
    for i in range(2):
        pixels = torch.stack(
            [axis.expand(60, 40) ** (i + 1), axis.expand(60, 40), torch.ones(60, 40) * i]
        )
        Image(pixels).save(root / f"{i}.png")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    return root


@pytest.fixture
def no_judges(monkeypatch):
    alone = Judges(None, None, ("the judge is not here: anytok[judges]",))
    monkeypatch.setattr(compare, "judges", lambda: alone)


def test_frechet_agrees_with_the_matrix_square_root():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(40, 6, generator=rng).double()
    b = torch.randn(50, 6, generator=rng).double() * 1.5 + 0.3
    root = scipy.linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real.trace()
    wanted = (
        (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * root
    )
    assert frechet(a, b) == pytest.approx(float(wanted), abs=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-8)


def test_files_keep_the_budget_and_use_it(folder):
    _, pictures, _ = find_pictures(folder, SIZE)
    ladder = Ladder(pictures[0], "WEBP")
    sizes = sorted({size for size, _, _ in ladder.files})
    least, most = sizes[0], sizes[-1]
    assert ladder.best(0)[0] == least
    small, large = ladder.best((least + most) / 2), ladder.best(most)
    assert small[0] <= (least + most) / 2 <= large[0]
    errors = [(p.pixels - pictures[0].pixels).square().mean() for _, p in (small, large)]
    assert errors[1] <= errors[0]


def test_a_codec_gives_a_point_for_each_count(folder):
    from anytok.codecs import load_codec

    _, pictures, _ = find_pictures(folder, SIZE)
    codec = load_codec("onedpiece/mini")
    points = list(through_codec(codec, pictures))
    assert [p.mean_bytes for p in points] == [1.5, 6.0, 24.0, 96.0, 336.0]
    rows = [judged(p, pictures, None, Judges(None, None, ())) for p in points]
    decibels = [row.values["PSNR, dB"] for row in rows]
    assert decibels == sorted(decibels)
    assert {p.pictures[0].pixels.shape for p in points} == {(3, SIZE, SIZE)}


def test_the_page_holds_figures_curves_and_pictures(folder, tmp_path, no_judges):
    page = tmp_path / "page.html"
    run = CliRunner().invoke(
        app, ["compare", str(folder), "--out", str(page), "--size", "48", "--json"]
    )
    assert run.exit_code == 0, run.output
    rows = json.loads(run.stdout)
    assert {row["codec"] for row in rows} >= {"onedpiece/mini", "JPEG", "WEBP"}
    ours = max(r["bytes"] for r in rows if r["codec"] == "onedpiece/mini")
    assert min(r["bytes"] for r in rows if r["codec"] == "WEBP") <= ours
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "the judge is not here" in text
    assert "broken.png" in text
    assert text.count("data:image/png") >= 2 * len(rows)
    assert "http" not in text.replace("http-equiv", "")


def test_brackets_of_a_note_and_of_an_error_reach_the_user(folder, tmp_path, no_judges):
    page = str(tmp_path / "x.html")
    run = CliRunner().invoke(app, ["compare", str(folder), "--out", page, "--no-files"])
    assert "anytok[judges]" in run.stderr
    run = CliRunner().invoke(app, ["compare", str(tmp_path / "[gone]"), "--out", page])
    assert "[gone]" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["nowhere"], 3, "no folder"),
        (["{empty}"], 3, "no picture"),
        (["{folder}", "--codecs", "cvivit/mini"], 6, "picture codecs"),
        (["{folder}", "--codecs", "onedpiece/mimi"], 5, "onedpiece/mini"),
    ],
)
def test_bad_input_is_named(folder, tmp_path, no_judges, arguments, code, word):
    given = [a.format(empty=tmp_path, folder=folder) for a in arguments]
    run = CliRunner().invoke(app, ["compare", *given, "--out", str(tmp_path / "x.html")])
    assert run.exit_code == code
    assert word in run.stderr
    assert not (tmp_path / "x.html").exists()


def test_nothing_readable_names_the_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(MediaError, match=r"a\.png"):
        find_pictures(tmp_path, 32)


def test_curves_place_their_ends():
    drawing = report.curves({"a": [(1, 10.0), (100, 20.0)], "b": [(10, 15.0)]}, "bytes", "dB")
    assert "points='50.0,260.0 440.0,20.0'" in drawing
    assert "245.0" in drawing
    assert report.curves({}, "x", "y") == ""
