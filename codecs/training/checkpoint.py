"""Checkpoints that exist whole or not at all.

A checkpoint is a folder `step-000001200`. It is filled under another name, every file is brought to the disk (fsync),
then it is renamed: a run that is killed at any moment, or a full disk, leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PARTIAL = ".partial-"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or does not belong to this run; the message says why and what is left."""


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:09d}"


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none."""
    found = sorted(path for path in root.glob("step-*") if path.is_dir())
    return found[-1] if found else None


def partial_of(root: Path, step: int) -> Path:
    """The folder in which the checkpoint of a step is put together."""
    return root / f"{_PARTIAL}{folder_of(root, step).name}"


def begin(root: Path, step: int) -> Path:
    """An empty folder to fill; what a killed run left half-written is removed."""
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(stale)
    folder = partial_of(root, step)
    folder.mkdir()
    return folder


def commit(root: Path, step: int, *, keep: int) -> Path:
    """Bring the filled folder to the disk, give it its name, and drop all but the newest `keep`."""
    partial, target = partial_of(root, step), folder_of(root, step)
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            _sync(path)
    _sync(partial)
    os.replace(partial, target)
    _sync(root)
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


@contextmanager
def guarded(root: Path, step: int) -> Iterator[None]:
    """Turn what a full disk raises into a CheckpointError; the half-written folder is removed.

    torch reports a failed write as RuntimeError, the system as OSError.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial_of(root, step), ignore_errors=True)
        before = latest(root)
        left = f"the checkpoint {before} is intact" if before else "there is no earlier checkpoint"
        free = shutil.disk_usage(root).free / 2**20
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written to {root} ({free:.0f} MiB free): "
            f"{str(error).splitlines()[0]}; {left}"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
