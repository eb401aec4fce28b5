"""What every recipe writes: media files, `data.jsonl`, `LICENCE.md`.

`OUT/<recipe>/data.jsonl` has one JSON object a line. A medium stands under its modality's name
(`image`, `audio`, `video`, `shape`) as a path relative to the folder, words under `text`; every row
has `split`, `source` and `licence`.

Splits: `train`; `held` (the same kind, never trained on); `unseen` (a style or voice that training
never met); `eval` (share-alike or GPL data: for measuring and for a user's own training, never for
weights that ship). `finish` refuses rows of such licences in `train` and `held`, so that no recipe
lets one slip.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

OUT = Path("data")
MEDIA = ("image", "audio", "video", "shape")
SPLITS = ("train", "held", "unseen", "eval")
HELD_ONE_IN = 10
# What weights that ship may be trained on (SPDX names, and two of our own).
PERMISSIVE = frozenset(
    {
        "public-domain",
        "CC0-1.0",
        "CC-BY-1.0",
        "CC-BY-2.0",
        "CC-BY-2.5",
        "CC-BY-3.0",
        "CC-BY-3.0-US",
        "CC-BY-4.0",
        "MIT",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "Apache-2.0",
        "Zlib",
        "own-rendering",
        "synthetic",
    }
)
Row = dict[str, Any]
T = TypeVar("T")

_console = Console(stderr=True)


def begin(folder: Path, settings: Row) -> bool:
    """True if `folder` holds this very data set, finished; otherwise makes it ready to be filled.

    What a run with other settings left is removed first; what an interrupted run with the same
    settings left is kept, so that the work goes on where it stopped.
    """
    wish = json.dumps(settings, sort_keys=True)
    note = folder / "recipe.json"
    same = note.is_file() and note.read_text() == wish
    if same and (folder / "data.jsonl").is_file():
        _console.print(f"{folder}: complete already")
        return True
    if note.is_file() and not same:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save(note, wish.encode())
    return False


def finish(folder: Path, rows: Sequence[Row], about: str) -> Path:
    """Check the rows, write `LICENCE.md`, then `data.jsonl` (last: it marks the set as complete)."""
    if not rows:
        raise ValueError(f"{folder.name} found no data at all, expected some; nothing was written")
    for row in rows:
        _check(folder, row)
    save(folder / "LICENCE.md", _licence_text(folder.name, rows, about).encode())
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    save(folder / "data.jsonl", ("\n".join(lines) + "\n").encode())
    counts = Counter(row["split"] for row in rows)
    _console.print(f"{folder}: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    return folder


def read(folder: Path) -> list[Row]:
    """The rows that a recipe wrote."""
    with (folder / "data.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def save(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    return track(items, description=what, total=total, console=_console)


def say(line: str) -> None:
    _console.print(line, highlight=False)


def is_permissive(licence: str) -> bool:
    """Whether weights that ship may learn from it: of `A AND B` both must allow it, of `A OR B` one."""
    return all(
        any(choice in PERMISSIVE for choice in part.split(" OR "))
        for part in licence.split(" AND ")
    )


def split_by_hash(data: bytes, *, one_in: int = HELD_ONE_IN) -> str:
    """`held` for about one item in `one_in`, decided by its bytes: the same on every machine."""
    return "held" if int(hashlib.sha256(data).hexdigest()[:8], 16) % one_in == 0 else "train"


def _check(folder: Path, row: Row) -> None:
    missing = [key for key in ("split", "source", "licence") if not row.get(key)]
    media = [row[key] for key in MEDIA if key in row]
    if missing or not media:
        raise ValueError(f"{folder.name}: row {row} lacks {missing or 'a medium'}")
    if row["split"] not in SPLITS:
        raise ValueError(f"{folder.name}: split is {row['split']!r}, expected one of {SPLITS}")
    if row["split"] in ("train", "held") and not is_permissive(row["licence"]):
        raise ValueError(f"{folder.name}: {row['licence']} may not stand in {row['split']}: {row}")
    for path in media:
        if not (folder / path).is_file():
            raise ValueError(f"{folder.name}: {path} is named in a row but was not written")


def _licence_text(name: str, rows: Sequence[Row], about: str) -> str:
    counts = Counter((row["source"], row["licence"], row["split"]) for row in rows)
    table = [f"| {s} | {lic} | {split} | {n} |" for (s, lic, split), n in sorted(counts.items())]
    head = ["| source | licence | split | items |", "|---|---|---|---|"]
    return "\n".join([f"# {name}: sources and licences", "", about.strip(), "", *head, *table, ""])
