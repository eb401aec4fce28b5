"""Tokenising: files per second at 1 and 2 workers, and what the pipeline costs over the bare codec.

The bare codec is the least that any pipeline must do: read each picture and encode it, in batches, on one thread.
Both are timed in the same runs, in CPU time, since two clocks on a crowded machine differ by more than what is
measured. Workers are timed by the wall clock, from when all of them run: their scaling shows only where as many cores
are free.

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
    """The share of the pipeline's CPU time that is neither reading pictures nor encoding them."""
    torch.set_num_threads(1)
    tokenize([folder], scratch / "warm", {"image": codec}, batch=BATCH)  # imports, first calls
    inside = [0.0]

    def counted(work: Callable) -> Callable:
        def run(*args, **options):
            began = time.process_time()
            try:
                return work(*args, **options)
            finally:
                inside[0] += time.process_time() - began

        return run

    codec.encode, Image.load = counted(codec.encode), counted(Image.load)
    bare, shares = [], []
    for i in range(rounds):
        inside[0], began = 0.0, time.process_time()
        tokenize([folder], scratch / f"out-{i}", {"image": codec}, batch=BATCH)
        bare.append(inside[0])
        shares.append((time.process_time() - began) / inside[0] - 1)
    rate, share = len(list(folder.iterdir())) / statistics.median(bare), statistics.median(shares)
    print(f"bare codec   {rate:7.1f} files/s of CPU time, reading and encoding")
    print(
        f"pipeline     {rate / (1 + share):7.1f} files/s of CPU time, {share:+.1%} (below +10 % asked)"
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


if __name__ == "__main__":
    typer.run(main)
