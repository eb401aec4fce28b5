"""Tables of numbers in 8 bits, the nearest row of one, and k-means, which fits them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Exact(nn.Module):
    """A module whose numbers stay float32, whatever type its codec runs in: codes hang on them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        def move(x: Tensor) -> Tensor:
            return x.to(fn(x).device) if x.is_floating_point() else fn(x)

        return super()._apply(move, recurse)


class Table(Exact):
    """int8 numbers [..., V, d] with a scale for each of the last axis (and of every leading one)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("values", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(*shape[:-2], 1, shape[-1]))

    def store(self, numbers: Tensor, index: int | None = None) -> None:
        """Round `numbers` into the table, or one entry of it; the largest magnitude of a column becomes 127."""
        at = slice(None) if index is None else index
        scale = numbers.abs().amax(-2, keepdim=True).clamp_min(1e-3) / 127
        self.scale[at] = scale.half().float()  # as it will be stored, so that saving moves no code
        self.values[at] = (numbers / self.scale[at]).round().clamp(-127, 127).to(torch.int8)

    def forward(self, index: int | None = None) -> Tensor:
        """The numbers in float32, or those of one entry of the first axis."""
        at = slice(None) if index is None else index
        return self.values[at].float() * self.scale[at]


def nearest(x: Tensor, table: Tensor, chunk: int = 8192) -> Tensor:
    """The nearest row of `table` [V, d] for each of x [n, d]: [n]."""
    half = table.square().sum(1) / 2
    parts = [torch.addmm(half, part, table.T, alpha=-1).argmin(1) for part in x.split(chunk)]
    return torch.cat(parts)


def kmeans(points: Tensor, count: int, rng: torch.Generator, rounds: int = 10) -> Tensor:
    """Centroids [count, d] of points [n, d]; one that nothing is near starts again at a random point."""
    rows = points[torch.randint(len(points), (count,), generator=rng)]
    for _ in range(rounds):
        at = nearest(points, rows)
        sums = torch.zeros_like(rows).index_add_(0, at, points)
        hits = torch.bincount(at, minlength=count)[:, None]
        spare = points[torch.randint(len(points), (count,), generator=rng)]
        rows = torch.where(hits > 0, sums / hits.clamp(min=1), spare)
    return rows
