"""What a leap costs beside a plain step, at LlamaGen-B's size with random weights: from how many ids a leap on it pays.

    python benchmarks/speculative.py [--batch 1] [--nodes 8] [--leaps 6] [--cfg 3] [--int8] [--json]

With random weights a drafter is never right, so only cost is measured: a leap is the drafter's passes, the model's pass
over root and tree, and the choice. `break-even` is cost of a leap over cost of a step: a drafter whose leaps write more
ids than that makes decoding faster. Seconds are the processor's on a CPU (other work on the machine counts little).
"""

from __future__ import annotations

import json
import time
from typing import Annotated

import torch
import typer

from anytok.backbone.transformer import Transformer, TransformerConfig
from anytok.generators.autoregressive import Autoregressive
from anytok.generators.drafter import Drafter
from anytok.generators.generator import Request
from anytok.generators.neighbours import Relatives, nearest
from anytok.generators.sampling import Sampling
from anytok.generators.speculative import Speculation, Speculative
from anytok.generators.trees import Dynamic

LLAMAGEN_B = TransformerConfig(
    vocab_size=16384, context=257, positions="rope2d", grid=(16, 16), prefix=1, classes=1000
)


def requests(model: Transformer, batch: int, ids: int) -> list[Request]:
    """Classes 0, 1, 2, ..., with their null."""
    condition = model.model.cls_embedding
    labels = torch.arange(batch)
    with torch.no_grad():
        rows, nulls = condition(labels), condition(condition.null(labels))
    return [
        Request(embeddings=row, null_embeddings=null, max_tokens=ids)
        for row, null in zip(rows, nulls)
    ]


def step_seconds(
    decoder: Autoregressive, model: Transformer, batch: int, steps: int, options: Sampling
) -> float:
    """A plain step."""
    events = decoder.run(requests(model, batch, steps + 3), options)
    for _ in range(2 * batch):
        next(events)
    began = time.process_time()
    for _ in range(steps * batch):
        next(events)
    return (time.process_time() - began) / steps


def main(
    batch: Annotated[int, typer.Option(min=1)] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="ids of a tree, the root not counted")] = 8,
    depth: Annotated[int, typer.Option(min=1)] = 3,
    width: Annotated[int, typer.Option(min=1)] = 4,
    leaps: Annotated[int, typer.Option(min=1)] = 6,
    mode: Annotated[
        str, typer.Option(help="lossless, certified, lantern or lantern++")
    ] = "lossless",
    k: Annotated[int, typer.Option(min=1)] = 100,
    cfg: Annotated[float, typer.Option()] = 3.0,
    int8: Annotated[bool, typer.Option("--int8", help="also plain steps in eight bits")] = False,
    threads: Annotated[int, typer.Option(help="0: torch's choice")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Cost of a leap and of a step."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Transformer(LLAMAGEN_B).eval()
    relatives = None
    if mode != "lossless":
        codes = torch.nn.functional.normalize(torch.randn(LLAMAGEN_B.vocab_size, 8))
        relatives = Relatives.plain(nearest(codes, k + 1))
    options = Sampling(cfg=cfg, top_k=2000)
    result: dict[str, object] = {"batch": batch, "nodes": nodes, "mode": mode, "cfg": cfg}
    plain = step_seconds(Autoregressive(model), model, batch, leaps, options)
    result["step"] = plain
    if int8:
        small = step_seconds(Autoregressive(model, int8=True), model, batch, leaps, options)
        result |= {"int8 step": small, "int8 speed-up": plain / small}
    decoder = Speculative(
        model,
        Drafter(model),
        speculation=Speculation(
            mode=mode,  # type: ignore[arg-type]
            tree=Dynamic(depth=depth, width=width, nodes=nodes),
            k=k,
        ),
        relatives=relatives,
    )
    events = decoder.run(requests(model, batch, LLAMAGEN_B.context - 1), options)
    while decoder.statistics.passes < 1:
        next(events)
    before = dict(decoder.statistics.seconds)
    while decoder.statistics.passes < 1 + leaps:
        next(events)
    parts = {k: (v - before[k]) / leaps for k, v in decoder.statistics.seconds.items()}
    leap = sum(parts.values())
    result |= {**parts, "leap": leap, "break-even": leap / plain}
    if as_json:
        typer.echo(json.dumps(result))
        return
    for key, value in result.items():
        typer.echo(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")


if __name__ == "__main__":
    typer.run(main)
