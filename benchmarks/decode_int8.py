"""Eight-bit steps beside float32: speed, and how far the laws drift.

    python benchmarks/decode_int8.py [--model DIR] [--steps 64] [--threads 1] [--json]

Both run over the same random ids, so that the drift of the cache adds up as it does in decoding.
Without --model: LlamaGen-B's size with random weights. Seconds are the processor's.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from torch import Tensor

from anytok.backbone.directory import load_model
from anytok.backbone.step import Stepper
from anytok.backbone.transformer import Transformer, TransformerConfig
from anytok.codecs.registry import load_codec


@torch.inference_mode()
def run(model: Transformer, step: Stepper, ids: list[int]) -> tuple[Tensor, float]:
    """Log-laws [T, V] behind each id, and seconds a step."""
    cache = model.cache(1, len(ids))
    hidden, began = [], time.process_time()
    for id in ids:
        hidden.append(step(torch.tensor([id]), cache))
    spent = (time.process_time() - began) / len(ids)
    return model.lm_head(torch.cat(hidden)).float().log_softmax(-1), spent


def main(
    model: Annotated[Optional[Path], typer.Option(help="model directory")] = None,  # noqa: UP045
    codec: Annotated[Optional[str], typer.Option(help="its image codec, if not by name")] = None,  # noqa: UP045
    steps: Annotated[int, typer.Option(min=2)] = 64,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compare eight-bit steps with float32."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if model is None:
        network = Transformer(TransformerConfig(vocab_size=16384, context=1024))
    else:
        given = None if codec is None else {"image": load_codec(codec)}
        network = load_model(model, codecs=given).transformer
    network.fuse()
    steppers = {"float32": Stepper(network), "int8": Stepper(network, int8=True)}
    ids = torch.randint(network.config.vocab_size, (steps,)).tolist()
    laws, seconds = {}, {}
    for name, step in steppers.items():
        run(network, step, ids[:2])  # warm up
        laws[name], seconds[name] = run(network, step, ids)
    exact, rounded = laws["float32"], laws["int8"]
    result = {
        "seconds a step": seconds,
        "speed-up": seconds["float32"] / seconds["int8"],
        "KL mean [nats]": float((exact.exp() * (exact - rounded)).sum(-1).mean()),
        "TV mean": float((exact.exp() - rounded.exp()).abs().sum(-1).mean() / 2),
        "TV of the last quarter": float(
            (exact.exp() - rounded.exp())[-steps // 4 :].abs().sum(-1).mean() / 2
        ),
        "same likeliest id": float((exact.argmax(-1) == rounded.argmax(-1)).float().mean()),
    }
    if as_json:
        typer.echo(json.dumps(result))
    else:
        for key, value in result.items():
            typer.echo(f"{key}: {value}")


if __name__ == "__main__":
    typer.run(main)
