"""The scan of a Mamba block beside the step-by-step loop, forward and in both directions, and the block beside others.

    python benchmarks/storm_scan.py [--tokens 8192] [--width 32 --width 128] [--threads 1] [--reference mambapy]

The loop is what the published reference does where no kernel runs: exponentials for all steps at once, then one step
after another. Both run in one process, alternating, best of `rounds`; times are CPU time of the process, so that other
work on the machine counts little. Outputs must agree within 1e-5 of the largest. `--reference mambapy` adds the
package's sequential and parallel scans (pip install mambapy).
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from anytok.codecs.layers.mamba import BidirectionalMamba, Mamba, MambaConfig, selective_scan


def loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Step by step, channels first as in the reference: u [B, E, L]."""
    kept = torch.exp(torch.einsum("bel,es->bels", delta, A))
    added = torch.einsum("bel,bsl,bel->bels", delta, B, u)
    h, ys = torch.zeros_like(added[:, :, 0]), []
    for t in range(u.shape[2]):
        h = kept[:, :, t] * h + added[:, :, t]
        ys.append(torch.einsum("bes,bs->be", h, C[:, :, t]))
    return torch.stack(ys, 2) + D[:, None] * u


def best(run: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times)


@torch.inference_mode()
def compare(width: int, tokens: int, rounds: int, reference: bool) -> dict[str, float]:
    torch.manual_seed(0)
    block = Mamba(MambaConfig(width=width)).eval()
    E, S = block.config.inner, block.config.state
    u, delta = torch.randn(1, tokens, E), F.softplus(torch.randn(1, tokens, E) - 3)
    B, C = torch.randn(1, tokens, S), torch.randn(1, tokens, S)
    given = (u, delta, -block.A_log.exp(), B, C, block.D)
    first = tuple(t.transpose(1, 2).contiguous() if t.ndim == 3 else t for t in given)
    runs = {"scan": lambda: selective_scan(*given), "loop": lambda: loop(*first)}
    if reference:
        runs |= mambapy(width, given)
    difference = (selective_scan(*given)[0] - loop(*first).transpose(1, 2)).abs().max()
    figures = {name: best(run, rounds) for name, run in runs.items()}
    both = BidirectionalMamba(block.config).eval()
    x = torch.randn(1, tokens, width)
    figures |= {"both_directions": best(lambda: both(x), rounds)}
    largest = loop(*first).abs().max()
    return figures | {
        "ratio": figures["loop"] / figures["scan"],
        "difference": float(difference),
        "largest": float(largest),
    }


def mambapy(width: int, given: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """The same scan as the package runs it."""
    from mambapy.mamba import MambaBlock
    from mambapy.mamba import MambaConfig as Other

    block = MambaBlock(Other(d_model=width, n_layers=1)).eval()
    return {
        "mambapy_sequential": lambda: block.selective_scan_seq(*given),
        "mambapy_parallel": lambda: block.selective_scan(*given),
    }


def main(
    tokens: Annotated[int, typer.Option(min=1, help="T * N")] = 8192,
    width: Annotated[list[int], typer.Option(help="D; channels are 2 D")] = [32, 64, 128],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    reference: Annotated[str, typer.Option(help="mambapy, where it is installed")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compare the scan with the loop."""
    torch.set_num_threads(threads)
    there = bool(reference) and importlib.util.find_spec("mambapy") is not None
    results: dict[str, Any] = {
        "tokens": tokens,
        "threads": threads,
        "reference": "mambapy" if there else "not run",
        "widths": {D: compare(D, tokens, rounds, there) for D in width},
    }
    if as_json:
        typer.echo(json.dumps(results))
        return
    typer.echo(f"{tokens} tokens, {threads} thread(s), reference: {results['reference']}; seconds")
    for D, figures in results["widths"].items():
        shown = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        typer.echo(f"D = {D}: {shown}")


if __name__ == "__main__":
    typer.run(main)
