"""What the three entry points share: a config file, a few overrides, a table of tasks, the engine.

A config is JSON: "task" (a key of the table), "run" (a RunConfig), and the task's own "name" (of the product), "model",
"data", "loss", "training" and "optimizer".
"data" has "root", the folder of the data sets, which may differ between machines.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ...modalities.errors import MediaError
from .checkpoint import CheckpointError
from .data import DataError
from .engine import RunConfig, StopRun, Task, TrainingError, run

NAMES = ("task", "name")  # strings
SECTIONS = ("run", "model", "data", "loss", "training", "optimizer")  # objects
T = TypeVar("T")


class ConfigError(ValueError):
    """A config is not what it should be; the message says where and what would be right."""


def cli(tasks: Mapping[str, str], configs: Path) -> None:
    """`main` for people: what they can mend is said in one line. Exit code 3: the task itself gave up."""
    try:
        main(tasks, configs)
    except StopRun as reason:
        print(f"stopped: {reason}", file=sys.stderr)
        sys.exit(3)
    except (ConfigError, CheckpointError, DataError, MediaError, OSError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def main(tasks: Mapping[str, str], configs: Path, argv: Sequence[str] | None = None) -> Path:
    """`train` with its arguments from a command line; None is that of this process."""
    parser = argparse.ArgumentParser(description="Train; goes on by itself where a run lies.")
    names = ", ".join(path.stem for path in sorted(configs.glob("*.json")))
    parser.add_argument("config", help=f"a JSON file, or one that ships: {names or 'none yet'}")
    parser.add_argument("--out", help="the run's folder")
    parser.add_argument("--data", help="the folder of the data sets, or one folder of media files")
    parser.add_argument("--minutes", type=float, help="training time; replaces steps")
    parser.add_argument("--steps", type=int, help="updates; replaces minutes")
    parser.add_argument("--stop", action="store_true", help="export the last checkpoint, end")
    given = parser.parse_args(argv)
    changes = {"out": given.out, "minutes": given.minutes, "steps": given.steps}
    return train(tasks, configs, given.config, changes, data=given.data, stop=given.stop)


def train(
    tasks: Mapping[str, str],
    configs: Path,
    config: str,
    changes: Mapping[str, Any],
    *,
    data: str | None = None,
    stop: bool = False,
) -> Path:
    """Run a config; returns the product's path.

    Args:
        tasks: name -> "module:function", the function making a Task of a config.
        configs: the folder of configs that ship.
        config: a JSON file, or the name of a config that ships.
        changes: other values of "run"; None changes nothing. minutes and steps replace each other.
        data: the folder of the data sets, or one folder of media files.
        stop: export what the last checkpoint holds.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError, StopRun.
    """
    table = override(read(find(config, configs)), changes, data=data)
    return run(make(tasks, table), run_config(table), stop=stop)


def find(name: str, configs: Path) -> Path:
    """The config that `name` means: a path, or the name of one that ships."""
    if Path(name).is_file():
        return Path(name)
    shipped = configs / f"{name.removesuffix('.json')}.json"
    if shipped.is_file():
        return shipped
    known = [path.stem for path in sorted(configs.glob("*.json"))]
    raise ConfigError(f"there is no config {name!r}; {_nearest(name, known)}")


def read(path: Path) -> dict[str, Any]:
    """A config from its file, its sections checked."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise ConfigError(f"{path} has no 'task', expected an object with the name of one")
    for key, value in config.items():
        if key not in NAMES + SECTIONS:
            raise ConfigError(
                f"{path} has the unknown section {key!r}; {_nearest(key, NAMES + SECTIONS)}"
            )
        if key == "name" and not isinstance(value, str):
            raise ConfigError(f"{path}: 'name' is {value!r}, expected one such as 'onedpiece/mini'")
        if key in SECTIONS and not isinstance(value, dict):
            raise ConfigError(f"{path}: section {key!r} is {value!r}, expected an object")
    return config


def override(
    config: Mapping[str, Any], changes: Mapping[str, Any], *, data: str | None = None
) -> dict[str, Any]:
    """The config with other values in "run" and another data folder.

    A folder that holds none of the config's data sets is itself the data set.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    table = dict(config.get("run", {}))
    if ("minutes" in changes) != ("steps" in changes):
        table.pop("steps" if "minutes" in changes else "minutes", None)
    config = {**config, "run": table | changes}
    if data is not None:
        section = {**config.get("data", {}), "root": data}
        sets = section.get("sets", ())
        if sets and not any((Path(data) / name).is_dir() for name in sets):
            # what else stands there is about the config's own data sets, which this folder does not have
            section = {"root": data, "sets": ["."]}
        config["data"] = section
    return config


def make(tasks: Mapping[str, str], config: Mapping[str, Any]) -> Task:
    """The task that a config names."""
    name = config["task"]
    if name not in tasks:
        raise ConfigError(f"unknown task {name!r}; {_nearest(name, tasks)}")
    module, _, function = tasks[name].partition(":")
    return getattr(importlib.import_module(module), function)(config)


def run_config(config: Mapping[str, Any]) -> RunConfig:
    """The "run" section as a RunConfig."""
    return settings(RunConfig, config.get("run", {}), "run")


def settings(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """A dataclass from a JSON object: lists become tuples, an unknown key names the nearest known one.

    Args:
        cls: the dataclass.
        table: the section.
        where: the section's name, for messages.
    """
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ConfigError(f"{where} has the unknown key {key!r}; {_nearest(key, known)}")
    try:
        return cls(**{key: _tuples(value) for key, value in table.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: {str(error).removeprefix(f'{cls.__name__}.__init__() ')}"
        ) from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"expected one of {', '.join(known) or 'none: there are none yet'}"
