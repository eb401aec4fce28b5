"""Entities: what one step of next-X prediction writes (xAR, arXiv 2502.20388): the grid of latents, cut into groups.

| kind | an entity | order | number on a grid of side S |
|---|---|---|---|
| token | one position | raster | S * S |
| cell | a square of k x k positions (k = `size`; released: 8) | raster, and raster inside | (S / k) ** 2 |
| subsample | every k-th position of every k-th row (k = `size`) | offsets in raster order | k * k |
| scale | the whole picture at a lower resolution: ..., S/4, S/2, S; the finest `size` | coarse to fine | log2(S) + 1 |
| image | everything | - | 1 |

Sides need not be multiples of k: cells at the right and the lower edge are then smaller. Positions of a coarser scale
lie at the centres of what they cover, so that rotary positions agree between scales.

B rows, C channels, h w sides of the grid, L positions of the sequence, E entities.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Kind = Literal["token", "cell", "subsample", "scale", "image"]
KINDS: tuple[Kind, ...] = ("token", "cell", "subsample", "scale", "image")
SIZES: dict[str, int] = {"cell": 8, "subsample": 2}  # where none is given; of scales, all


class Entities:
    """One way to cut a grid; see the module's docstring.

    Args:
        kind: what an entity is.
        grid: (h, w).
        size: of a cell, a stride, or a number of scales; None for 8, 2, or all scales.

    Raises:
        ValueError: an unknown kind, or a size that it does not have.
    """

    def __init__(self, kind: Kind, grid: tuple[int, int], size: int | None = None):
        if kind not in KINDS:
            raise ValueError(f"entity is {kind!r}, expected one of {', '.join(KINDS)}")
        if min(grid) < 1:
            raise ValueError(f"grid is {grid}, expected sides of 1 or more")
        sizeless = kind in ("token", "image")
        if size is not None and (sizeless or size < 1):
            raise ValueError(f"size is {size}, {kind} takes {'none' if sizeless else '1 or more'}")
        self.kind, self.grid = kind, grid
        size = SIZES.get(kind) if size is None else size
        with torch.device("cpu"):  # tables, not weights: they have values on the meta device too
            self.scales = _scales(grid, size) if kind == "scale" else ()
            groups = [] if self.scales else _groups(kind, grid, size or 1)
            self.sizes = tuple(h * w for h, w in self.scales) or tuple(map(len, groups))
            self.order = torch.cat(groups) if groups else None  # [L], flat places in the grid
            self.coordinates = self._coordinates()

    def __len__(self) -> int:
        """E."""
        return len(self.sizes)

    @property
    def length(self) -> int:
        """L."""
        return sum(self.sizes)

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """Where entities first ... stop - 1 lie in the sequence."""
        return sum(self.sizes[:first]), sum(self.sizes[:stop])

    def blocks(self, first: int = 0, stop: int | None = None) -> Tensor:
        """The entity of each position of entities first ... stop - 1."""
        sizes = torch.tensor(self.sizes[first:stop])
        return torch.arange(first, first + len(sizes)).repeat_interleave(sizes)

    def split(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to the sequence [B, L, C], entity after entity.

        Raises:
            ValueError: latents of another grid.
        """
        if latents.ndim != 4 or tuple(latents.shape[-2:]) != self.grid:
            h, w = self.grid
            raise ValueError(f"latents are {tuple(latents.shape)}, expected [B, C, {h}, {w}]")
        if self.order is None:
            parts = [F.adaptive_avg_pool2d(latents, scale) for scale in self.scales]
            return torch.cat([rearrange(part, "b c h w -> b (h w) c") for part in parts], 1)
        return rearrange(latents, "b c h w -> b (h w) c")[:, self.order.to(latents.device)]

    def join(self, sequence: Tensor) -> Tensor:
        """The first entities of a sequence [B, n, C] (all of them, or fewer) to latents [B, C, h, w].

        What is not there yet is 0; of scales, the last one that is there fills the grid.
        """
        h, w = self.grid
        rows, length, channels = sequence.shape
        if self.order is None:
            done = next((i for i in range(len(self)) if self.span(0, i)[1] == length), len(self))
            if done == 0:
                return sequence.new_zeros(rows, channels, h, w)
            last = sequence[:, self.span(0, done - 1)[1] : self.span(0, done)[1]]
            own = rearrange(last, "b (h w) c -> b c h w", h=self.scales[done - 1][0])
            return own if tuple(own.shape[2:]) == self.grid else F.interpolate(own, (h, w))
        flat = sequence.new_zeros(rows, h * w, channels)
        flat[:, self.order[:length].to(flat.device)] = sequence
        return rearrange(flat, "b (h w) c -> b c h w", h=h)

    def _coordinates(self) -> Tensor:
        """Row and column of each position [L, 2], in units of the whole grid."""
        if self.order is not None:
            return torch.stack([self.order // self.grid[1], self.order % self.grid[1]], -1).float()
        return torch.cat([_centres(self.grid, scale) for scale in self.scales])


def _groups(kind: Kind, grid: tuple[int, int], size: int) -> list[Tensor]:
    """Flat places of each entity, in order."""
    places = torch.arange(grid[0] * grid[1]).view(grid)
    if kind == "token":
        return list(places.flatten().split(1))
    if kind == "image":
        return [places.flatten()]
    if kind == "cell":
        return [cell.flatten() for row in places.split(size) for cell in row.split(size, 1)]
    offsets = [(i, j) for i in range(min(size, grid[0])) for j in range(min(size, grid[1]))]
    return [places[i::size, j::size].flatten() for i, j in offsets]


def _scales(grid: tuple[int, int], count: int | None) -> tuple[tuple[int, int], ...]:
    """Sides that halve (rounded up) from the grid down to 1 x 1, coarse to fine; the finest `count` of them."""
    scales = [grid]
    while max(scales[0]) > 1:
        scales.insert(0, (-(-scales[0][0] // 2), -(-scales[0][1] // 2)))
    if count is not None and count > len(scales):
        raise ValueError(f"size is {count}, a grid of {grid} has at most {len(scales)} scales")
    return tuple(scales[-(count or len(scales)) :])


def _centres(grid: tuple[int, int], scale: tuple[int, int]) -> Tensor:
    axes = [(torch.arange(n) + 0.5) * side / n - 0.5 for side, n in zip(grid, scale)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
