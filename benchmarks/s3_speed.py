"""Speed of the S3 tokenizers, from samples to tokens, beside the PyPI package `s3tokenizer` with the same weights.

    python benchmarks/s3_speed.py [--model v2] [--reference] [--rounds 3] [--threads 0] [--json]

Published size, random weights (seeded), synthetic sounds, one run, alternating; the best of the rounds counts. CPU
seconds stand beside the clock's, since other work on the machine does not lengthen them. `--reference` needs
`pip install s3tokenizer`; without it, its columns say "not run".
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from anytok.codecs.audio.cosyvoice.s3 import RATE, V1, V1_25HZ, V2, V3, S3Tokenizer
from anytok.modalities import Audio

MODELS = {"v1": V1, "v1-25hz": V1_25HZ, "v2": V2, "v3": V3}
NAMES = {
    "v1": "speech_tokenizer_v1",
    "v1-25hz": "speech_tokenizer_v1_25hz",
    "v2": "speech_tokenizer_v2_25hz",
    "v3": "speech_tokenizer_v3_25hz",
}
# Seconds of the sounds of a call.
CALLS = {
    "one of 10 s": [10],
    "eight of 1 to 15 s": [1, 3, 5, 7, 9, 11, 13, 15],
    "3 and 40 s": [3, 40],
}

Run = Callable[[list[Tensor]], list[list[int]]]


def sounds(lengths: list[int]) -> list[Tensor]:
    """Tones that wander, in noise: samples [N] at 16 kHz."""
    rng = torch.Generator().manual_seed(0)
    rows = []
    for seconds in lengths:
        t = torch.arange(seconds * RATE) / RATE
        tone = torch.sin(2 * math.pi * (300 + 200 * torch.sin(3 * t)) * t) * (1 + torch.sin(7 * t))
        rows.append(0.2 * tone + 0.02 * torch.randn(len(t), generator=rng))
    return rows


def random_codec(model: str) -> S3Tokenizer:
    """Published size; the quantiser is scaled so that codes vary."""
    torch.manual_seed(0)
    codec = S3Tokenizer(MODELS[model]).eval()
    if "v1" not in model:
        torch.nn.init.normal_(codec.quantizer._codebook.project_down.weight, std=0.1)
    return codec


def ours(codec: S3Tokenizer) -> Run:
    def run(rows: list[Tensor]) -> list[list[int]]:
        streams = codec.encode([Audio(row[None], RATE) for row in rows])
        return [stream.codes[:, 0].tolist() for stream in streams]

    return run


def theirs(model: str, state: dict[str, Tensor]) -> Run | None:
    """The package's documented path: log-mel of each, padding, `quantize`. None where it is not installed."""
    try:
        import s3tokenizer
        from s3tokenizer.model_v2 import S3TokenizerV2
        from s3tokenizer.model_v3 import S3TokenizerV3
    except ImportError:
        return None
    kinds: dict[str, Any] = {"v2": S3TokenizerV2, "v3": S3TokenizerV3}
    net = kinds.get(model, s3tokenizer.S3Tokenizer)(NAMES[model])
    net.load_state_dict(state)
    net.eval()

    def run(rows: list[Tensor]) -> list[list[int]]:
        mels = [s3tokenizer.log_mel_spectrogram(row) for row in rows]
        codes, lengths = net.quantize(*s3tokenizer.padding(mels))
        return [row[:n].tolist() for row, n in zip(codes, lengths.tolist())]

    return run


def measure(run: Run, rows: list[Tensor]) -> tuple[float, float, list[list[int]]]:
    """Seconds by the clock, seconds of CPU, tokens."""
    clock, cpu = time.perf_counter(), time.process_time()
    ids = run(rows)
    return time.perf_counter() - clock, time.process_time() - cpu, ids


def compare(runs: dict[str, Run | None], lengths: list[int], rounds: int) -> dict[str, Any]:
    rows = sounds(lengths)
    best = {name: (math.inf, math.inf) for name, run in runs.items() if run}
    ids: dict[str, list[list[int]]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            if run:
                clock, cpu, ids[name] = measure(run, rows)
                best[name] = (min(best[name][0], clock), min(best[name][1], cpu))
    result: dict[str, Any] = {}
    for name in runs:
        clock, cpu = best.get(name, ("not run", "not run"))
        result |= {f"{name}_seconds": clock, f"{name}_cpu_seconds": cpu}
    result["real_time_factor"] = best["anytok"][0] / sum(lengths)
    if "s3tokenizer" in ids:
        pairs = [(a, b) for x, y in zip(ids["anytok"], ids["s3tokenizer"]) for a, b in zip(x, y)]
        result["cpu_ratio"] = best["s3tokenizer"][1] / best["anytok"][1]
        result["clock_ratio"] = best["s3tokenizer"][0] / best["anytok"][0]
        result["same_lengths"] = [*map(len, ids["anytok"])] == [*map(len, ids["s3tokenizer"])]
        result["tokens"], result["other_tokens"] = len(pairs), sum(a != b for a, b in pairs)
    return result


@torch.inference_mode()
def main(
    model: Annotated[str, typer.Option(help=", ".join(MODELS))] = "v2",
    reference: Annotated[bool, typer.Option(help="beside the PyPI package s3tokenizer")] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(help="0: torch's choice")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Time a tokenizer of published size."""
    if threads:
        torch.set_num_threads(threads)
    codec = random_codec(model)
    runs: dict[str, Run | None] = {"anytok": ours(codec)}
    if reference:
        runs["s3tokenizer"] = theirs(model, codec.state_dict())
    else:
        runs["s3tokenizer"] = None
    for run in runs.values():
        if run:
            run(sounds([1]))  # warm up
    results = {name: compare(runs, lengths, rounds) for name, lengths in CALLS.items()}
    if as_json:
        typer.echo(json.dumps({"model": model, "threads": torch.get_num_threads(), **results}))
        return
    typer.echo(f"S3 {model}, {torch.get_num_threads()} threads")
    for name, result in results.items():
        typer.echo(name)
        for key, value in result.items():
            shown = f"{value:.3f}" if isinstance(value, float) else value
            typer.echo(f"  {key}: {shown}")


if __name__ == "__main__":
    typer.run(main)
