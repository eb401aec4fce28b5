"""`anytok bench prune`: the command. Costs are measured in `bench_costs.py`, answers in `bench_answers.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from .report import Row

METHODS = "divprune, vtccls, random, uniform, norm, transprune, dyvte"


def prune(
    size: Annotated[str, typer.Option(help="llamagen-b or mini.")] = "llamagen-b",
    visual: Annotated[int, typer.Option(min=1, help="Visual tokens of a prompt.")] = 576,
    text: Annotated[int, typer.Option(min=3, help="Tokens of text around them.")] = 64,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    share: Annotated[list[float], typer.Option(help="Of visual tokens that stay.")] = [  # noqa: B006
        0.5,
        0.25,
        0.125,
    ],
    method: Annotated[list[str], typer.Option(help=f"{METHODS}; default: all.")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="The best of so many.")] = 2,
    threads: Annotated[int, typer.Option(min=0, help="0: torch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    model: Annotated[
        Optional[str],  # noqa: UP045 (typer reads annotations at run time on 3.10)
        typer.Option(help="Measure this model's answers in place of costs."),
    ] = None,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="With --model: a recipe's folder of named pictures."),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="With --model: at most so many pictures."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print machine-readable results.")
    ] = False,
) -> None:
    """Measure what pruning visual tokens saves and what choosing them costs; with --model, what it does to answers."""
    import torch
    from rich.console import Console

    from .codecs.codec import CodecUnavailable
    from .report import table

    if threads:
        torch.set_num_threads(threads)
    try:
        if model is not None:
            given: dict[str, Any] = {"model": model, "data": str(data)}
            rows, results = _answers(model, data, share, method, limit, device)
        else:
            from .bench_costs import BEFORE, INSIDE, Plan, measure, rows_of

            plan = Plan(
                size=size,
                visual=visual,
                text=text,
                batch=batch,
                shares=tuple(share),
                methods=tuple(method) or BEFORE + INSIDE,
                rounds=rounds,
                device=device,
                dtype=dtype,
            )
            given = {**vars(plan), "threads": torch.get_num_threads()}
            costs = measure(plan)
            rows, results = rows_of(costs), [vars(r) for r in costs]
    except (ValueError, CodecUnavailable) as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(json.dumps({**given, "results": results}))
    else:
        Console(width=150).print(table(rows))


def _answers(
    model: str,
    data: Path | None,
    shares: Sequence[float],
    methods: Sequence[str],
    limit: int | None,
    device: str,
) -> tuple[list[Row], list[dict[str, Any]]]:
    from .bench_answers import ANSWERING, measure_answers
    from .generators.pipeline import AnyToAny
    from .report import Row

    if data is None:
        raise ValueError("--model needs --data, a folder of named pictures")
    loaded = AnyToAny.load(model, device=device)
    results = measure_answers(loaded, data, shares, methods or ANSWERING, limit=limit)
    rows = [
        Row(
            name="all tokens" if r["method"] == "all" else f"{r['method']} {r['share']:.1%}",
            values={"tokens": r["tokens"], "right names": f"{r['right']:.1%}", "of": r["of"]},
        )
        for r in results
    ]
    return rows, results
