"""`anytok tokenize`: sources of any media become a corpus of token shards, which `anytok train backbone` streams."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

out, err = Console(), Console(stderr=True)
SHOWN = 5  # errors that are printed


def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders of media with captions beside them, data.jsonl folders, WebDataset .tar, .parquet, .jsonl, "
            "folders of `datasets.save_to_disk`."
        ),
    ],
    codec: Annotated[
        list[str],
        typer.Option(
            "--codec", "-c", help="MEDIUM=NAME, one for each medium: image=onedpiece/mini."
        ),
    ],
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="The corpus; one that was begun there goes on.")
    ],
    column: Annotated[
        list[str] | None,
        typer.Option(help="MEDIUM=FIELD, where a table's fields have unusual names."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 1,
    shard: Annotated[int, typer.Option(min=1, help="Documents a shard.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Documents that are encoded together.")] = 16,
    ray: Annotated[
        bool, typer.Option("--ray", help="Workers on the Ray cluster at hand (anytok[ray]).")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print machine-readable results.")
    ] = False,
) -> None:
    """Tokenise data sets into shards of documents. Bad files are recorded in OUT/errors.jsonl and skipped."""
    from .backbone import shards
    from .cli import _errors

    columns = [
        TextColumn("tokenising"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    with _errors():
        given: dict[str, Any] = {
            "codecs": _assignments(codec, "--codec"),
            "columns": _assignments(column or [], "--column"),
            "workers": workers,
            "shard": shard,
            "batch": batch,
        }
        if ray:
            report = shards.tokenize_ray(sources, folder, **given)
        else:
            with Progress(*columns, console=err, disable=as_json) as bar:
                task = bar.add_task("")
                report = shards.tokenize(
                    sources,
                    folder,
                    progress=lambda done, total: bar.update(task, completed=done, total=total),
                    **given,
                )
    if as_json:
        typer.echo(json.dumps({**asdict(report), "path": str(report.path)}))
        return
    out.print(f"{folder}: {report.documents} documents, {report.shards} shards", highlight=False)
    for error in report.errors[:SHOWN]:
        said = escape(f"{error['document']}: {error['error']}")
        err.print(f"[yellow]skipped[/] {said}", highlight=False)
    if report.errors:
        err.print(f"{len(report.errors)} skipped in all, see {folder}/errors.jsonl")


def _assignments(given: list[str], option: str) -> dict[str, str]:
    """MEDIUM=VALUE, several times."""
    from .modalities.media import MODALITIES

    made = {}
    for one in given:
        medium, _, value = one.partition("=")
        if medium not in MODALITIES or not value:
            known = ", ".join(MODALITIES)
            raise typer.BadParameter(
                f"{option} is '{one}', expected MEDIUM=VALUE with one of {known}"
            )
        made[medium] = value
    return made
