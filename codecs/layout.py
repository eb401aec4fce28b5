"""Layouts: the counting rules of a token stream.

A layout says how many positions each part of a stream has, and which lengths are whole. A codec puts one
into its `spec`; `backbone/grammar.py` turns it into id ranges; `TokenStream` is checked against it.

- `Fixed`   a set number of positions (TiTok, GigaTok).
- `Prefix`  ordered positions, of which any prefix is a stream (FlexTok, One-D-Piece).
- `Grid`    height x width positions (LlamaGen's VQ-16, TokenBridge).
- `Frames`  an open number of frames, each with the same positions: () for audio, (h, w) for video.
- `Octree`  levels of split bits, then codes; a level has eight nodes for each bit set in the one above (OctGPT).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Union

from torch import Tensor


@dataclass(frozen=True)
class Fixed:
    """`length` positions, always."""

    length: int

    def problem(self, parts: list[Tensor], grid: tuple[int, ...]) -> str | None:
        """Say what is wrong with `parts` (each [positions, depth]), or None."""
        n = len(parts[0])
        return None if n == self.length else f"has {n} positions, expected {self.length}"


@dataclass(frozen=True)
class Prefix:
    """1 to `max_length` ordered positions; any prefix of a stream is a stream."""

    max_length: int

    def problem(self, parts: list[Tensor], grid: tuple[int, ...]) -> str | None:
        """Say what is wrong with `parts` (each [positions, depth]), or None."""
        n = len(parts[0])
        if 1 <= n <= self.max_length:
            return None
        return f"has {n} positions, expected 1 to {self.max_length}"


@dataclass(frozen=True)
class Grid:
    """Height x width positions in row-major order; `shape` None where any size goes."""

    shape: tuple[int, int] | None = None

    def problem(self, parts: list[Tensor], grid: tuple[int, ...]) -> str | None:
        """Say what is wrong with `parts` (each [positions, depth]), or None."""
        if len(grid) != 2 or prod(grid) != len(parts[0]):
            return f"has {len(parts[0])} positions for the grid {grid}"
        if self.shape is not None and tuple(grid) != self.shape:
            return f"has the grid {grid}, expected {self.shape}"
        return None


@dataclass(frozen=True)
class Frames:
    """Any number of frames, each of prod(`shape`) positions; grid = (frames, *shape).

    Args:
        shape: positions of one frame: () for audio, (h, w) for video; None where the size is free.
        max_frames: the most frames that the codec takes; None where any number goes.
    """

    shape: tuple[int, ...] | None = ()
    max_frames: int | None = None

    def problem(self, parts: list[Tensor], grid: tuple[int, ...]) -> str | None:
        """Say what is wrong with `parts` (each [positions, depth]), or None."""
        if not grid or prod(grid) != len(parts[0]) or grid[0] < 1:
            return f"has {len(parts[0])} positions for the grid {grid}"
        if self.shape is not None and tuple(grid[1:]) != self.shape:
            return f"has frames of shape {tuple(grid[1:])}, expected {self.shape}"
        if self.max_frames is not None and grid[0] > self.max_frames:
            return f"has {grid[0]} frames, expected at most {self.max_frames}"
        return None


@dataclass(frozen=True)
class Octree:
    """Split bits of depths `full_depth` ... `code_depth` - 1, then codes at `code_depth`.

    The first part has 8**full_depth positions (a complete grid, z-order); each later part, the codes included,
    has eight for every bit set in the part before (OctGPT, arXiv 2504.09975).
    """

    full_depth: int
    code_depth: int

    @property
    def split_parts(self) -> int:
        """How many parts are split bits; one part of codes follows."""
        return self.code_depth - self.full_depth

    def first_count(self) -> int:
        """Positions of the first part."""
        return 8**self.full_depth

    def next_count(self, bits_set: int) -> int:
        """Positions of the part that follows one with `bits_set` bits set."""
        return 8 * bits_set

    def problem(self, parts: list[Tensor], grid: tuple[int, ...]) -> str | None:
        """Say what is wrong with `parts` (each [positions, depth]), or None."""
        if len(parts) != self.split_parts + 1:
            return f"has {len(parts)} parts, expected {self.split_parts + 1}"
        expected = self.first_count()
        for i, part in enumerate(parts):
            if len(part) != expected:
                return f"part {i} has {len(part)} positions, but the split bits above ask for {expected}"
            if i < self.split_parts:
                expected = self.next_count(int(part.sum()))
        return None


Layout = Union[Fixed, Prefix, Grid, Frames, Octree]  # noqa: UP007 (an alias that 3.10 evaluates)
