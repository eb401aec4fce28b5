"""Tokenising: files per second at 1 and 2 workers, and what the pipeline costs over the bare codec.

The bare codec is the least that any pipeline must do: read each picture, encode it in the same batches, on one thread.
Both are timed in turn, several times, in one process with the codec loaded; the median counts. Workers are timed from
outside with and without their work, so that starting them (imports, loading the codec) is told apart.

    python benchmarks/tokenize_speed.py --files 100
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer

from anytok.backbone.shards import plan, tokenize
from anytok.codecs import load_codec
from anytok.codecs.codec import Codec
from anytok.modalities.image import Image

BATCH = 16


def main(
    data: Path = Path("data/emoji"),
    codec: str = "onedpiece/mini",
    files: int = 100,
    rounds: int = 3,
    workers: int = 2,
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "files"
        folder.mkdir()
        for i, path in enumerate(sorted(data.rglob("*.png"))[:files]):
            shutil.copy(path, folder / f"{i:05d}.png")
        overhead(folder, Path(scratch), load_codec(codec), rounds)
        scaling(folder, Path(scratch), codec, workers)


def overhead(folder: Path, scratch: Path, codec: Codec, rounds: int) -> None:
    """Bare codec against the whole pipeline, in this process."""
    torch.set_num_threads(1)
    paths = sorted(folder.iterdir())
    bare(paths[:BATCH], codec)  # warm: imports and first calls
    tokenize([folder], scratch / "warm", {"image": codec}, batch=BATCH)
    ours, least = [], []
    for i in range(rounds):
        least.append(timed(lambda: bare(paths, codec)))
        out = scratch / f"out-{i}"
        ours.append(timed(lambda out=out: tokenize([folder], out, {"image": codec}, batch=BATCH)))
    a, b = statistics.median(ours), statistics.median(least)
    share = statistics.median(x / y for x, y in zip(ours, least)) - 1
    print(f"bare codec   {len(paths) / b:7.1f} files/s of CPU time")
    print(
        f"pipeline     {len(paths) / a:7.1f} files/s of CPU time, {share:+.1%} (below +10 % asked)"
    )


def scaling(folder: Path, scratch: Path, codec: str, workers: int) -> None:
    """The wall clock of workers, with and without their start."""
    rates = {}
    for n in (1, workers):
        job = plan([folder], scratch / f"scale-{n}", {"image": codec}, shard=BATCH)
        seconds: list[float] = []
        began = time.perf_counter()
        tokenize(
            [folder],
            job.out,
            {"image": codec},
            shard=BATCH,
            workers=n,
            progress=lambda *_, s=seconds, t=began: s.append(time.perf_counter() - t),
        )
        # from the first shard that is written to the last: all workers run
        done = min(n, len(job.chunks) - 1)
        rates[n] = (len(job.chunks) - done) * BATCH / (seconds[-1] - seconds[done])
        print(f"{n} worker(s)  {rates[n]:7.1f} files/s, begun after {seconds[done]:.1f} s")
    cores = len(os.sched_getaffinity(0))
    print(
        f"{workers} against 1: {rates[workers] / rates[1]:.2f} x, on {cores} cores at load {os.getloadavg()[0]:.1f}"
    )


def bare(paths: list[Path], codec: Codec) -> None:
    with torch.inference_mode():
        for start in range(0, len(paths), BATCH):
            codec.encode([Image.load(path) for path in paths[start : start + BATCH]])


def timed(work: Callable[[], object]) -> float:
    """CPU seconds, which a crowded machine does not stretch."""
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    typer.run(main)
