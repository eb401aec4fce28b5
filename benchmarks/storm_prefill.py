"""What a language model pays for a video, with STORM's reductions in front of it and without.

    python benchmarks/storm_prefill.py [--frames 256] [--tokens 16] [--size mini] [--threads 1] [--rounds 3] [--json]

Features of every frame [T, N, D] go to a transformer of random weights with a question of 32 tokens behind them: as
they are; after STORM (2 layers of bidirectional Mamba) without reduction; with temporal pooling of 4; with sampling of
2 on top. Seconds (CPU time, one thread) of STORM and of the prompt's pass, bytes of keys and values, and ratios to the
first.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from anytok.backbone.pruning.inside import PrunedTransformer
from anytok.backbone.transformer import Transformer
from anytok.bench_costs import SIZES
from anytok.codecs.video.storm import Storm, StormConfig
from anytok.report import Row, table

QUESTION = 32
LAYERS = 2  # of the scan


def best(run: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    times = []
    for _ in range(rounds):
        began = time.process_time()
        made = run()
        times.append(time.process_time() - began)
    return min(times), made


@torch.inference_mode()
def compare(frames: int, tokens: int, size: str, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    length = frames * tokens + QUESTION
    config = dataclasses.replace(SIZES[size], context=length)
    model = PrunedTransformer(Transformer(config).eval())
    video = torch.randn(1, frames, tokens, config.width)
    question = torch.randn(1, QUESTION, config.width)

    def storm(temporal: int) -> Storm:
        torch.manual_seed(1)
        return Storm(StormConfig(width=config.width, layers=LAYERS, temporal=temporal)).eval()

    plain: Callable[[], Tensor] = lambda: video.flatten(1, 2)  # noqa: E731
    whole, pooled = storm(1), storm(4)
    ways = {
        "as it is": plain,
        "STORM, all tokens": lambda: whole(video).tokens,
        "STORM, pooled 4": lambda: pooled(video).tokens,
        "STORM, pooled 4, sampled 2": lambda: pooled(video, sample=2).tokens,
    }
    results = []
    for name, reduce in ways.items():
        scan, reduced = best(reduce, rounds)
        x = torch.cat([reduced, question], 1)
        visual = torch.arange(x.shape[1])[None] < reduced.shape[1]
        prefill, made = best(lambda x=x, visual=visual: model.prefill(x, visual), rounds)
        results.append(
            {
                "way": name,
                "tokens": reduced.shape[1],
                "storm": scan if reduce is not plain else 0.0,
                "prefill": prefill,
                "kv_bytes": made.cache.bytes,
            }
        )
    return results


def main(
    frames: Annotated[int, typer.Option(min=8)] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="of a frame; a square")] = 16,
    size: Annotated[str, typer.Option(help=" or ".join(SIZES))] = "mini",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure reductions."""
    torch.set_num_threads(threads)
    results = compare(frames, tokens, size, rounds)
    if as_json:
        typer.echo(json.dumps({"frames": frames, "size": size, "results": results}))
        return
    first = results[0]
    rows = []
    for r in results:
        total = r["storm"] + r["prefill"]
        values = {
            "tokens": r["tokens"],
            "STORM s": f"{r['storm']:.3f}",
            "prefill s": f"{r['prefill']:.3f}",
            "faster": f"{first['prefill'] / total:.2f} x",
            "KV of all": f"{r['kv_bytes'] / first['kv_bytes']:.1%}",
        }
        rows.append(Row(name=r["way"], values=values))
    Console(width=120).print(table(rows, f"{frames} frames of {tokens} tokens, {size}"))


if __name__ == "__main__":
    typer.run(main)
