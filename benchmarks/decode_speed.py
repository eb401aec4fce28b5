"""Tokens per second of greedy decoding, beside transformers' `generate` with the very same weights.

    python benchmarks/decode_speed.py [--size 110m|mini] [--batch 1] [--new 128] [--dtype float32] [--json]

A model of random weights (seeded) is exported with `save_pretrained`, loaded by both, on the same machine in one run,
alternating; the ids of both must be equal in float32. Prompts are 16 ids a row; what is timed is the whole call.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from anytok.backbone import checkpoints
from anytok.backbone.transformer import Transformer, TransformerConfig
from anytok.generators.autoregressive import Autoregressive
from anytok.generators.generator import Request

SIZES = {
    "110m": TransformerConfig(vocab_size=16384, context=1024),
    "mini": TransformerConfig(
        vocab_size=6144, width=160, ffn=448, layers=4, heads=5, kv_heads=5, context=512
    ),
}
PROMPT = 16


def ours(model: Autoregressive, prompts: torch.Tensor, new: int) -> list[list[int]]:
    written: list[list[int]] = [[] for _ in prompts]
    for event in model.run([Request(ids=ids, max_tokens=new) for ids in prompts]):
        written[event.request] += event.ids
    return written


def theirs(model, prompts: torch.Tensor, new: int) -> list[list[int]]:
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    return ids[:, prompts.shape[1] :].tolist()


def main(
    size: Annotated[str, typer.Option(help=" or ".join(SIZES))] = "110m",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    new: Annotated[int, typer.Option(min=2, help="ids to write")] = 128,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(help="0: torch's choice")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compare greedy decoding with transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    prompts = torch.randint(SIZES[size].vocab_size, (batch, PROMPT))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save_pretrained(Transformer(SIZES[size]), folder)
        mine = Autoregressive(checkpoints.load(Path(folder), dtype=kind))
        other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
    runs = {
        "anytok": lambda n: ours(mine, prompts, n),
        "transformers": lambda n: theirs(other, prompts, n),
    }
    best = dict.fromkeys(runs, 0.0)
    ids = {name: run(8) for name, run in runs.items()}  # warm up
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            ids[name] = run(new)
            best[name] = max(best[name], batch * new / (time.perf_counter() - began))
    result = {
        "size": size,
        "batch": batch,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "tokens_per_second": best,
        "ratio": best["anytok"] / best["transformers"],
        "same_ids": ids["anytok"] == ids["transformers"],
    }
    if as_json:
        typer.echo(json.dumps(result))
    else:
        for key, value in result.items():
            typer.echo(f"{key}: {value}")


if __name__ == "__main__":
    typer.run(main)
