import json
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from anytok.codecs import train
from anytok.codecs.training.engine import RunConfig
from anytok.codecs.training.entry import (
    ConfigError,
    find,
    main,
    make,
    override,
    read,
    run_config,
    settings,
)

TOY = Path(__file__).with_name("toy.py")


def write(path, **config):
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"run": {}}, "has no 'task'"),
        ({"task": 3}, "has no 'task'"),
        ({"task": "toy", "modle": {}}, "unknown section 'modle'; did you mean 'model'"),
        ({"task": "toy", "name": 3}, "'name' is 3"),
        ({"task": "toy", "model": 3}, "section 'model' is 3, expected an object"),
    ],
)
def test_malformed_configs(tmp_path, config, message):
    with pytest.raises(ConfigError, match=message):
        read(write(tmp_path / "c.json", **config))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null"])
def test_files_that_are_no_config(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.json"):
        read(tmp_path / "c.json")


def test_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown task 'onedpeice'; did you mean 'onedpiece'"):
        make(train.TASKS, {"task": "onedpeice"})


def test_unknown_run_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"run has the unknown key 'batchsize'.*'batch_size'"):
        run_config({"run": {"out": "x", "steps": 1, "batchsize": 3}})


def test_missing_and_impossible_values_are_config_errors():
    with pytest.raises(ConfigError, match=r"run: missing 1 required keyword-only argument: 'out'"):
        run_config({"run": {"steps": 1}})
    with pytest.raises(ConfigError, match=r"run: run.steps is 0, expected more than 0"):
        run_config({"run": {"out": "x", "steps": 0}})


def test_lists_become_tuples():
    @dataclass(frozen=True, kw_only=True)
    class Model:
        sizes: tuple[tuple[int, ...], ...] = ()

    assert settings(Model, {"sizes": [[1, 2], [3]]}, "model").sizes == ((1, 2), (3,))


def test_find_by_path_and_by_name(tmp_path):
    path = write(tmp_path / "toy_mini.json", task="toy")
    assert find(str(path), tmp_path) == find("toy_mini", tmp_path) == path
    assert find("toy_mini.json", tmp_path) == path
    with pytest.raises(ConfigError, match="no config 'toy_mimi'; did you mean 'toy_mini'"):
        find("toy_mimi", tmp_path)


def test_data_folder_of_sets_keeps_them(tmp_path):
    (tmp_path / "e").mkdir()
    config = {"task": "toy", "data": {"root": "d", "sets": ["e", "f"], "size": 3}}
    changed = override(config, {}, data=str(tmp_path))
    assert changed["data"] == {"root": str(tmp_path), "sets": ["e", "f"], "size": 3}


def test_overrides():
    config = {"task": "toy", "run": {"out": "a", "steps": 5}, "data": {"root": "d", "sets": ["e"]}}
    changed = override(config, {"minutes": 2.0, "out": None, "steps": None}, data="other")
    assert changed["run"] == {"out": "a", "minutes": 2.0}
    assert changed["data"] == {"root": "other", "sets": ["."]}  # a data set itself
    assert config["run"] == {"out": "a", "steps": 5}
    both = override(config, {"minutes": 2.0, "steps": 9})
    assert run_config(both) == RunConfig(out="a", minutes=2.0, steps=9)


def test_shipped_configs_can_be_read():
    configs = sorted(train.CONFIGS.glob("*.json"))
    assert configs
    for path in configs:
        config = read(path)
        run_config(config)
        assert config["task"] in train.TASKS, path


def test_main_trains_what_the_config_says(tmp_path, monkeypatch):
    module = type(sys)("toy_module")
    module.make_toy = lambda config: runpy.run_path(str(TOY))["Toy"](**config["model"])
    monkeypatch.setitem(sys.modules, "toy_module", module)
    run = {"out": str(tmp_path / "a"), "minutes": 9, "tensorboard": False}
    path = write(tmp_path / "toy.json", task="toy", run=run, model={"chance": False})
    arguments = ["toy", "--steps", "2", "--out", str(tmp_path / "b")]
    assert main({"toy": "toy_module:make_toy"}, path.parent, arguments).is_file()
    assert json.loads((tmp_path / "b" / "result.json").read_text())["step"] == 2


def test_command_line_says_one_line():
    command = [sys.executable, "-m", "anytok.codecs.train", "no-such-config"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no config 'no-such-config'")
    assert done.stderr.count("\n") == 1
