"""Prefill time and bytes of keys and values with fewer visual tokens, at LlamaGen-B's size with random weights.

    python benchmarks/pruning.py [--size llamagen-b] [--visual 576] [--batch 1] [--threads 1] [--rounds 3] [--json]

The measurements are `anytok bench prune`'s; here they are held against what pruning promises: time and bytes fall with
the tokens, choosing costs under 3 % of the prefill of all tokens, a batch gives what single rows give.
"""

from __future__ import annotations

import json
from typing import Annotated

import torch
import typer
from rich.console import Console

from anytok.backbone.pruning.methods import METHODS, select
from anytok.backbone.pruning.select import Visual
from anytok.bench_costs import Plan, measure, rows_of
from anytok.report import table

LIMIT = 0.03  # of the prefill of all tokens


def same_alone(visual: int, keep: int, rows: int = 4) -> bool:
    """Whether every method chooses for a batch what it chooses for its rows."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(rows, visual, 256, generator=rng)
    attention = torch.rand(24, rows, visual, generator=rng)
    batch = Visual(features=features, cls_attention=attention)
    for method in METHODS:
        together = select(method, batch, keep).indices
        for row in range(rows):
            one = slice(row, row + 1)
            alone = Visual(features=features[one], cls_attention=attention[:, one])
            if not torch.equal(select(method, alone, keep).indices[0], together[row]):
                return False
    return True


def main(
    size: Annotated[str, typer.Option(help="llamagen-b or mini")] = "llamagen-b",
    visual: Annotated[int, typer.Option(min=8)] = 576,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure pruning."""
    torch.set_num_threads(threads)
    results = measure(Plan(size=size, visual=visual, batch=batch, rounds=rounds))
    whole = results[0]
    dearest = max(results, key=lambda r: r.choosing)
    held = {
        "batch equals single rows": same_alone(visual, visual // 8),
        "choosing at most": f"{dearest.choosing / whole.prefill:.2%} ({dearest.method})",
        "choosing under 3 %": dearest.choosing < LIMIT * whole.prefill,
    }
    if as_json:
        typer.echo(json.dumps({**held, "results": [vars(r) for r in results]}))
        return
    Console(width=150).print(
        table(rows_of(results), f"{size}, {visual} visual tokens, {batch} row(s)")
    )
    for name, value in held.items():
        typer.echo(f"{name}: {value}")


if __name__ == "__main__":
    typer.run(main)
