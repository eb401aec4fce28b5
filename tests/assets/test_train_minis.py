import importlib.util
import json
import sys

import pytest
import typer

from anytok.assets.recipes import train_minis
from anytok.assets.recipes.train_minis import ENTRIES, Entry, Job, chosen, config_of, plan, work


def begin(runs, name, minutes):
    (runs / name).mkdir(parents=True)
    (runs / name / "config.json").write_text(json.dumps({"run": {"minutes": minutes}}))


def minutes_of(jobs):
    return {job.entry.name: job.minutes for job in jobs if job.minutes is not None}


def test_every_entry_can_be_run():
    names = [entry.name for entry in ENTRIES]
    for i, entry in enumerate(ENTRIES):
        assert importlib.util.find_spec(entry.module), entry
        assert set(entry.needs) <= set(names[:i]), f"{entry.name} comes before what it needs"
        if entry.config:
            assert json.loads(config_of(entry).read_text())["run"]["minutes"] > 0


def test_budget_is_shared_in_proportion(tmp_path):
    trainings = [entry for entry in ENTRIES if entry.config]
    asked = minutes_of(plan(trainings, tmp_path, tmp_path, None, 0))
    given = minutes_of(plan(trainings, tmp_path, tmp_path, 10.0, 0))
    assert sum(given.values()) == pytest.approx(10)
    for name, minutes in asked.items():
        assert given[name] == pytest.approx(minutes * 10 / sum(asked.values()))


def test_begun_runs_keep_their_budget_and_complete_ones_cost_nothing(tmp_path):
    trainings = chosen(["onedpiece", "rvq", "cvivit"])
    begin(tmp_path, "rvq", 4.0)
    begin(tmp_path, "cvivit", 50.0)
    (tmp_path / "cvivit" / "result.json").write_text("{}")
    jobs = plan(trainings, tmp_path, tmp_path, 10.0, 0)
    assert [job.state for job in jobs] == ["new", "goes on", "complete"]
    assert minutes_of(jobs) == pytest.approx({"onedpiece": 6.0, "rvq": 4.0})
    with pytest.raises(ValueError, match=r"rvq began with 4 minutes .* nothing of 3 for onedpiece"):
        plan(trainings, tmp_path, tmp_path, 3.0, 0)


def test_data_sets_are_complete_when_their_rows_lie_there(tmp_path):
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "data.jsonl").write_text("{}")
    jobs = plan(chosen(["emoji", "speech"]), tmp_path, tmp_path, None, 0)
    assert [job.state for job in jobs] == ["complete", "new"]


def test_commands(tmp_path):
    (job,) = plan(chosen(["rvq"]), tmp_path / "d", tmp_path / "r", 2.0, 1)
    out, data = str(tmp_path / "r" / "rvq"), str(tmp_path / "d")
    expected = ["-m", "anytok.codecs.train", "rvq_mini", "--out", out, "--data", data]
    assert list(job.command) == [sys.executable, *expected, "--minutes", "2.0"]
    (job,) = plan(chosen(["rvq"]), tmp_path / "d", tmp_path / "r", 2.0, 4)
    assert job.command[1:4] == ("-m", "accelerate.commands.launch", "--multi_gpu")


def test_unknown_entry_is_refused():
    with pytest.raises(typer.BadParameter, match="'rqv' is none of emoji"):
        chosen(["rqv"])
    assert [entry.name for entry in chosen(["rvq", "emoji"])] == ["emoji", "rvq"]


def job(name, code, *, needs=(), state="new", asset=""):
    entry = Entry(name=name, module="none", needs=needs, asset=asset)
    return Job(entry=entry, state=state, minutes=None, command=(sys.executable, "-c", code))


def test_failure_takes_only_what_needs_it_along(tmp_path):
    mark = f"open({str(tmp_path)!r} + '/' + {{!r}}, 'w')"
    jobs = [
        job("a", "raise SystemExit(3)"),
        job("b", mark.format("b"), needs=("a",)),
        job("c", mark.format("c"), needs=("b",)),
        job("d", mark.format("d")),
        job("e", mark.format("e"), needs=("d",)),
        job("f", mark.format("f"), state="complete"),
    ]
    assert work(jobs, tmp_path) == ["a", "b", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "e"]


def test_finished_codecs_are_installed_before_what_needs_them(tmp_path):
    product = tmp_path / "runs" / "a" / "final.safetensors"
    product.parent.mkdir(parents=True)
    asset = tmp_path / "weights" / "a-mini.safetensors"
    jobs = [
        job("a", f"open({str(product)!r}, 'w').write('new')", asset=asset.name),
        job("b", f"assert open({str(asset)!r}).read() == 'new'", needs=("a",)),
    ]
    assert work(jobs, tmp_path / "runs", asset.parent) == []
    assert [path.name for path in asset.parent.iterdir()] == ["a-mini.safetensors"]


def test_plan_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(train_minis.subprocess, "run", lambda *a: pytest.fail("something was run"))
    train_minis.main(data=tmp_path, runs=tmp_path, just_plan=True)
