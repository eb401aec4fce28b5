"""The pruning bench: figures that are counted, not timed, and a command that prints them."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from anytok import bench_answers, bench_costs, cli
from anytok.backbone.transformer import TransformerConfig
from anytok.bench_costs import BEFORE, INSIDE, Plan, flops, measure, rows_of
from anytok.bench_prune import METHODS, prune
from anytok.generators.pipeline import AnyToAny
from anytok.modalities.image import Image
from tests.backbone.tiny import Thumbnail, model

TINY = TransformerConfig(
    vocab_size=32, width=16, ffn=24, layers=5, heads=2, kv_heads=1, context=128
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(bench_costs.SIZES, "tiny", TINY)


PLAN = {"size": "tiny", "visual": 64, "text": 9, "new": 2, "rounds": 1}


def test_lengths_and_bytes_are_what_was_asked_for():
    results = measure(Plan(**PLAN, batch=2, shares=(0.5, 0.125)))
    position = 2 * 1 * 8 * 4  # keys and values of one head of 8 floats
    for r in results:
        assert r.kv_bytes == 2 * position * sum(r.lengths)
        assert r.prefill > r.choosing >= 0
        assert r.step > 0
        assert r.flops == pytest.approx(2 * flops(TINY, r.lengths))
    by = {(r.method, r.share): r.lengths for r in results}
    assert by["all", 1.0] == (73,) * 5
    for method in BEFORE:
        assert by[method, 0.5] == (41,) * 5
        assert by[method, 0.125] == (17,) * 5
    # Cuts behind layers 1, 2 and 3: to 56, 40 and 8 of 64, as shares 7/8, 5/8 and 1/8.
    assert by["transprune", 0.125] == (73, 65, 49, 17, 17)
    assert by["dyvte", 0.0] == (73, 73, 9, 9, 9)
    assert len(rows_of(results)) == len(results) == 1 + 2 * 6 + 1


def test_flops_are_counted_right():
    d, f, n = 16, 24, 10
    matrices = d * 16 + 2 * d * 8 + 16 * d + 3 * d * f
    attention = 2 * n * n * 16
    assert flops(TINY, [n]) == 2 * n * matrices + attention
    assert flops(TINY, [n, n]) == 2 * flops(TINY, [n])


def test_the_command_prints_a_table_and_json():
    app = typer.Typer()
    app.command()(prune)
    given = ["--size", "tiny", "--visual", "32", "--text", "6", "--rounds", "1", "--share", "0.25"]
    threads = torch.get_num_threads()
    shown = CliRunner().invoke(app, [*given, "--method", "divprune"])
    assert shown.exit_code == 0, shown.output
    assert "divprune 25.0%" in shown.output
    told = CliRunner().invoke(app, [*given, "--method", "dyvte", "--json"])
    methods = [r["method"] for r in json.loads(told.output)["results"]]
    assert methods == ["all", "dyvte"]
    assert torch.get_num_threads() == threads
    wrong = CliRunner().invoke(app, [*given, "--method", "prumerge"])
    assert wrong.exit_code == 2
    assert "expected one of divprune" in wrong.output.replace("\n", " ")


@pytest.fixture
def pictures(tmp_path):
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(5):
        Image(torch.rand(3, 8, 8, generator=g)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "name": "x", "split": "held"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_answers_of_all_tokens_are_the_models_own(pictures):
    whole = AnyToAny(model(Thumbnail(), layers=4))
    media = [Image.load(pictures / f"{i}.png") for i in range(5)]
    own = [answer.items[0].text for answer in whole(media, to="text")]
    assert bench_answers.name(whole, bench_answers.prompts_of(whole, media), "all", 1.0) == own
    for method in bench_answers.ANSWERING:
        together = bench_answers.name(whole, bench_answers.prompts_of(whole, media), method, 0.25)
        alone = [
            bench_answers.name(whole, bench_answers.prompts_of(whole, [one]), method, 0.25)[0]
            for one in media
        ]
        assert together == alone


def test_shares_of_right_names_are_counted(pictures):
    whole = AnyToAny(model(Thumbnail(), layers=4))
    media = [Image.load(pictures / f"{i}.png") for i in range(5)]
    said = whole(media, to="text")[0].items[0].text
    rows = [json.loads(line) for line in (pictures / "data.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**row, "name": said}) + "\n" for row in rows)
    (pictures / "data.jsonl").write_text(text)
    got = bench_answers.measure_answers(whole, pictures, (0.5,), ("uniform",), limit=1)
    assert [r["method"] for r in got] == ["all", "uniform"]
    assert got[0]["right"] == 1.0
    assert got[0]["of"] == 1
    assert [r["tokens"] for r in got] == [16, 8]
    with pytest.raises(ValueError, match="for answers expected one of divprune"):
        bench_answers.measure_answers(whole, pictures, (0.5,), ("vtccls",))


def test_the_command_is_there():
    assert METHODS.split(", ") == [*BEFORE, *INSIDE]
    shown = CliRunner().invoke(cli.app, ["bench", "prune", "--help"])
    assert shown.exit_code == 0
    assert "--visual" in shown.output
    wrong = CliRunner().invoke(cli.app, ["bench", "prune", "--model", "anytok/mini"])
    assert wrong.exit_code == 2
    assert "--model needs --data" in wrong.output


def test_impossible_plans_are_named():
    with pytest.raises(ValueError, match="size is 'huge', expected one of mini, llamagen-b"):
        Plan(size="huge")
    with pytest.raises(ValueError, match="at most 128 in all"):
        Plan(size="tiny", visual=200)
