"""What a run tells: `log.jsonl`, TensorBoard through accelerate's trackers, and a progress bar or plain lines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Window:
    """Means of what was measured since the last line; part of a checkpoint, so that a resumed run logs the same."""

    def __init__(self, sums: Mapping[str, list[float]] | None = None) -> None:
        self.sums: dict[str, list[float]] = {k: list(v) for k, v in (sums or {}).items()}

    def add(self, values: Mapping[str, float]) -> None:
        """One more step."""
        for name, value in values.items():
            total = self.sums.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the steps and over all processes; empties the window."""
        everyone = gather_object([self.sums]) if accelerator.num_processes > 1 else [self.sums]
        self.sums = {}
        means: dict[str, float] = {}
        for name in sorted({name for sums in everyone for name in sums}):
            pairs = [sums[name] for sums in everyone if name in sums]
            means[name] = sum(p[0] for p in pairs) / sum(p[1] for p in pairs)
        return means


class Journal:
    """Writes on the main process only.

    Args:
        accelerator: knows which process this is.
        out: the run's folder.
        step: where the run goes on: lines of later steps, from before a crash, are removed.
        tensorboard: whether to write event files too.
    """

    def __init__(
        self, accelerator: Accelerator, out: Path, step: int, *, tensorboard: bool
    ) -> None:
        self.accelerator = accelerator
        self.path = out / "log.jsonl"
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.tensorboard = tensorboard
        if accelerator.is_main_process:
            _truncate(self.path, step)
        if tensorboard:
            accelerator.init_trackers(
                "tensorboard", init_kwargs={"tensorboard": {"purge_step": step}}
            )

    def open(self, what: str) -> None:
        """Begin the progress bar, where somebody looks."""
        if self.accelerator.is_main_process and self.console.is_terminal:
            self.bar = Progress(
                TextColumn(what),
                BarColumn(),
                TextColumn("step {task.fields[step]}  {task.fields[rate]:.2f} it/s"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.bar.start()
            self.bar.add_task(what, total=1.0, step=0, rate=0.0, note="")

    def advance(self, progress: float, step: int, rate: float, note: str) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(
                self.bar.task_ids[0], completed=progress, step=step, rate=rate, note=note
            )

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One line: `kind` is "train" or "eval"."""
        if self.tensorboard:
            self.accelerator.log({f"{kind}/{k}": v for k, v in values.items()}, step=step)
        if not self.accelerator.is_main_process:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        except OSError as error:  # a full disk does not say where it is full
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if self.bar is None or kind == "eval":
            said = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
            self.say(f"step {step}  {kind}: {said}")

    def say(self, line: str) -> None:
        """A line for people."""
        if self.accelerator.is_main_process:
            self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Flush everything."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        if self.tensorboard:
            self.accelerator.end_training()


def read_log(out: Path, kind: str = "train") -> list[dict[str, float]]:
    """The lines of one kind that a run wrote."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def _truncate(path: Path, step: int) -> None:
    """Keep what was logged up to `step`; a half line from a killed run goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
