"""Train every mini with one command, on whatever device there is: data, codecs, tokens, backbone, in this order.

    python assets/recipes/train_minis.py [--only NAME ...] [--minutes ALL] [--data DIR] [--runs DIR] [--plan]

- Each entry is a module and a config (`ENTRIES`), run as a process of its own; accelerate uses all GPUs there are.
- What is complete is skipped, what was interrupted goes on with the budget it began with: start it again at any time.
- `--minutes` shares one budget among the trainings that are left, in proportion to what their configs ask for.
- A failed entry does not stop those that do not need it.
- Products lie in the runs folder. `--install` copies finished codecs to assets/weights, where the names find them.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent / "weights"
console = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One member of the queue.

    Args:
        name: for `--only`, and the run's folder.
        module: what is run with `python -m`.
        config: of a training: the name of a config that ships beside its module; "" for other steps.
        needs: entries that must have succeeded, where they are in the queue.
        asset: what `--install` calls the product in assets/weights.
    """

    name: str
    module: str
    config: str = ""
    needs: tuple[str, ...] = ()
    asset: str = ""


ENTRIES: tuple[Entry, ...] = (
    *(
        Entry(name=name, module=f"anytok.assets.recipes.{name}")
        for name in ("emoji", "photos", "speech", "shapes", "clips", "motion")
    ),
    Entry(
        name="onedpiece",
        module="anytok.codecs.train",
        config="onedpiece_mini",
        needs=("emoji", "photos"),
        asset="onedpiece-mini.safetensors",
    ),
    Entry(
        name="rvq",
        module="anytok.codecs.train",
        config="rvq_mini",
        needs=("speech",),
        asset="rvq-mini.safetensors",
    ),
    Entry(
        name="cvivit",
        module="anytok.codecs.train",
        config="cvivit_mini",
        needs=("clips", "motion"),
        asset="cvivit-mini.safetensors",
    ),
    Entry(
        name="octgpt",
        module="anytok.codecs.train",
        config="octgpt_mini",
        needs=("shapes",),
        asset="octgpt-mini.safetensors",
    ),
    Entry(name="tokens", module="anytok.assets.recipes.tokens", needs=("emoji", "onedpiece")),
    Entry(name="backbone", module="anytok.backbone.train", config="mini", needs=("tokens",)),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """An entry on this machine: what will be run, or why not."""

    entry: Entry
    state: str  # "complete", "goes on", "new"
    minutes: float | None  # of a training that is left
    command: tuple[str, ...]


def plan(
    entries: Sequence[Entry], data: Path, runs: Path, minutes: float | None, gpus: int
) -> list[Job]:
    """What is to be done; `minutes` is shared among trainings that have not begun, after those that go on."""
    states = {e.name: state(e, data, runs) for e in entries}
    begun = {e.name: budget(e, runs) for e in entries if states[e.name] == "goes on"}
    fresh = {e.name: wish(e) for e in entries if e.config and states[e.name] == "new"}
    if minutes is not None:
        left = minutes - sum(begun.values())
        if fresh and left <= 0:
            raise ValueError(
                f"{', '.join(begun)} began with {sum(begun.values()):g} minutes together, which leaves nothing "
                f"of {minutes:g} for {', '.join(fresh)}; give more, or --only"
            )
        share = left / sum(fresh.values()) if fresh else 0.0
        fresh = {name: wanted * share for name, wanted in fresh.items()}
    budgets = begun | fresh
    return [
        Job(
            entry=e,
            state=states[e.name],
            minutes=budgets.get(e.name),
            command=command(e, data, runs, budgets.get(e.name), gpus),
        )
        for e in entries
    ]


def state(entry: Entry, data: Path, runs: Path) -> str:
    """How far an entry is."""
    if not entry.config:
        return "complete" if (data / entry.name / "data.jsonl").is_file() else "new"
    if (runs / entry.name / "result.json").is_file():
        return "complete"
    return "goes on" if (runs / entry.name / "config.json").is_file() else "new"


def budget(entry: Entry, runs: Path) -> float:
    """The minutes that a run began with."""
    stored = json.loads((runs / entry.name / "config.json").read_text(encoding="utf-8"))
    return stored["run"]["minutes"]


def wish(entry: Entry) -> float:
    """The minutes that an entry's config asks for."""
    return json.loads(config_of(entry).read_text(encoding="utf-8"))["run"]["minutes"]


def config_of(entry: Entry) -> Path:
    """Where a training's config lies: beside its module, or in a folder beside it."""
    spec = importlib.util.find_spec(entry.module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"there is no module {entry.module}")
    folder = Path(spec.origin).parent
    for place in (folder / "training", folder / "configs"):
        if (place / f"{entry.config}.json").is_file():
            return place / f"{entry.config}.json"
    raise FileNotFoundError(f"there is no {entry.config}.json in {folder}/training or /configs")


def command(
    entry: Entry, data: Path, runs: Path, minutes: float | None, gpus: int
) -> tuple[str, ...]:
    """The process of an entry."""
    if not entry.config:
        return (sys.executable, "-m", entry.module, "--out", str(data))
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu") if gpus > 1 else ()
    arguments = ("--out", str(runs / entry.name), "--data", str(data))
    if minutes is not None:
        arguments += ("--minutes", repr(minutes))
    return (sys.executable, *launch, "-m", entry.module, entry.config, *arguments)


def work(jobs: Sequence[Job], runs: Path, weights: Path | None = None) -> list[str]:
    """Run the queue; returns the names of those that failed or could not begin.

    Args:
        jobs: from `plan`.
        runs: the folder of all runs.
        weights: where finished codecs are copied to, before what needs them begins; None copies nothing.
    """
    lost: list[str] = []
    for job in jobs:
        entry = job.entry
        missing = [name for name in entry.needs if name in lost]
        if missing:
            console.print(f"[yellow]{entry.name}: left out, {', '.join(missing)} failed")
            lost.append(entry.name)
            continue
        if job.state != "complete":
            console.rule(entry.name)
            if subprocess.run(job.command).returncode != 0:
                lost.append(entry.name)
                continue
        if weights is not None and entry.asset:
            install(runs / entry.name / "final.safetensors", weights / entry.asset)
    return lost


def install(product: Path, asset: Path) -> None:
    """Copy a finished codec to where the registry looks for it, whole or not at all."""
    asset.parent.mkdir(parents=True, exist_ok=True)
    partial = asset.with_name(f".{asset.name}")
    shutil.copyfile(product, partial)
    partial.replace(asset)
    console.print(f"installed {asset}")


def show(jobs: Sequence[Job]) -> None:
    table = Table("entry", "state", "minutes", "command")
    for job in jobs:
        minutes = "" if job.minutes is None else f"{job.minutes:.1f}"
        words = [Path(job.command[0]).name, *job.command[1:]]
        table.add_row(job.entry.name, job.state, minutes, " ".join(words))
    console.print(table)


def chosen(names: Sequence[str]) -> list[Entry]:
    """The entries of these names, in the queue's order; all where there are none."""
    known = {entry.name: entry for entry in ENTRIES}
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
    return [entry for entry in ENTRIES if not names or entry.name in names]


def main(
    only: Annotated[list[str] | None, typer.Option(help="an entry; may be repeated")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="of all trainings")] = None,
    data: Annotated[Path, typer.Option(help="folder of all data sets")] = Path("data"),
    runs: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs"),
    just_plan: Annotated[bool, typer.Option("--plan", help="say what would be done")] = False,
    to_assets: Annotated[bool, typer.Option("--install", help="copy to assets/weights")] = False,
) -> None:
    """Train every mini: data, codecs, tokens, backbone."""
    import torch

    jobs = plan(chosen(only or []), data, runs, minutes, torch.cuda.device_count())
    show(jobs)
    if just_plan:
        return
    failed = work(jobs, runs, WEIGHTS if to_assets else None)
    if failed:
        console.print(f"[red]not done: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
