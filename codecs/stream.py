"""TokenStream: what every medium becomes.

A stream has one or more parts (OctGPT has several; every other codec one), each a table of integer codes
[positions, depth] with a vocabulary for each depth. It knows which codec wrote it (`name@fingerprint`), so that no
other one decodes it by mistake, and carries what decoding needs beside the codes: JSON `meta` (source size, rate,
length, fit) and named `side` tensors (segment scales, a mesh's centre and scale, a voice).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class StreamError(ValueError):
    """A stream or a `.tok` file is corrupted, foreign, or not what the codec needs."""


@dataclass(frozen=True)
class Part:
    """Codes [positions, depth] (int64, on the CPU) and how many values each depth can take."""

    codes: Tensor
    vocab: tuple[int, ...]

    def __post_init__(self):
        if self.codes.ndim != 2 or self.codes.is_floating_point() or self.codes.is_complex():
            raise StreamError(
                f"codes are {self.codes.dtype} of shape {tuple(self.codes.shape)}, "
                "expected integers [positions, depth]"
            )
        object.__setattr__(self, "codes", self.codes.detach().to("cpu", torch.int64))
        depth = self.codes.shape[1]
        if depth != len(self.vocab) or depth == 0:
            raise StreamError(f"codes have depth {depth}, but vocab gives {len(self.vocab)} depths")
        if min(self.vocab) < 1:
            raise StreamError(f"vocab is {self.vocab}, expected sizes of 1 or more")
        if len(self.codes):
            low, high = self.codes.amin(0), self.codes.amax(0)
            for j, size in enumerate(self.vocab):
                if low[j] < 0 or high[j] >= size:
                    bad = int(low[j]) if low[j] < 0 else int(high[j])
                    raise StreamError(f"code {bad} at depth {j} is outside 0...{size - 1}")

    @property
    def bits(self) -> int:
        """Bits that the packed codes take."""
        return len(self.codes) * sum(code_bits(size) for size in self.vocab)


def code_bits(size: int) -> int:
    """Bits of one code with `size` values."""
    return (size - 1).bit_length()


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """One medium as integers.

    Args:
        parts: one or more tables of codes.
        codec: the writer, `name@fingerprint`.
        modality: "image", "audio", "video", "shape" or "text".
        grid: what the positions mean, e.g. (T, h, w); () where they have no geometry.
        prefix_step: `stream[:k]` is a stream for multiples of this; None where only the whole one is.
        depth_prefix: whether the first n depths alone are a stream (RVQ).
        meta: JSON values that decode needs: source size, rate, length, fit.
        side: named tensors that decode needs; counted as bits.
    """

    parts: tuple[Part, ...]
    codec: str
    modality: str
    grid: tuple[int, ...] = ()
    prefix_step: int | None = None
    depth_prefix: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)
    side: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        if not self.parts:
            raise StreamError("a stream needs at least one part")
        try:
            json.dumps(dict(self.meta), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise StreamError(f"meta is not JSON: {error}") from error
        side = {k: v.detach().to("cpu").contiguous() for k, v in self.side.items()}
        object.__setattr__(self, "side", side)
        object.__setattr__(self, "grid", tuple(int(n) for n in self.grid))

    @property
    def codes(self) -> Tensor:
        """The codes [positions, depth] of a stream with one part."""
        if len(self.parts) != 1:
            raise StreamError(f"the stream has {len(self.parts)} parts; ask for `parts[i].codes`")
        return self.parts[0].codes

    @property
    def depth(self) -> int:
        """Codes per position in the first part."""
        return len(self.parts[0].vocab)

    @property
    def bits(self) -> int:
        """Bits of the packed codes and of the side tensors."""
        side = sum(8 * t.numel() * t.element_size() for t in self.side.values())
        return sum(part.bits for part in self.parts) + side

    def __len__(self) -> int:
        """Positions in all parts."""
        return sum(len(part.codes) for part in self.parts)

    def __getitem__(self, index: slice) -> TokenStream:
        """`stream[:k]`: the first k positions, where the codec allows it (`prefix_step`)."""
        if (
            not isinstance(index, slice)
            or index.start not in (None, 0)
            or index.step not in (None, 1)
        ):
            raise StreamError("only prefixes `stream[:k]` can be taken")
        n = len(self)
        k = n if index.stop is None else index.stop
        if k == n:
            return self
        if self.prefix_step is None or len(self.parts) != 1:
            raise StreamError(f"streams of '{self.codec}' have no prefixes")
        if not 0 < k <= n:
            raise StreamError(f"the prefix has k = {k}, expected 1 to {n}")
        if k % self.prefix_step:
            raise StreamError(f"the prefix has k = {k}, expected a multiple of {self.prefix_step}")
        part = self.parts[0]
        grid = self.grid
        if grid:
            per_step = prod(grid[1:])
            grid = (k // per_step, *grid[1:])
        return replace(self, parts=(Part(part.codes[:k], part.vocab),), grid=grid)

    def depths(self, n: int) -> TokenStream:
        """The first n codes of each position, where the codec allows it (RVQ)."""
        if n == self.depth:
            return self
        if not self.depth_prefix:
            raise StreamError(f"streams of '{self.codec}' decode at their full depth only")
        if not 1 <= n <= self.depth:
            raise StreamError(f"n = {n} depths asked for, the stream has {self.depth}")
        parts = tuple(Part(p.codes[:, :n], p.vocab[:n]) for p in self.parts)
        return replace(self, parts=parts)

    def __add__(self, other: TokenStream) -> TokenStream:
        """Join two streams in time: same codec, same depth, same frame shape."""
        if not isinstance(other, TokenStream):
            return NotImplemented
        if self.codec != other.codec:
            raise StreamError(f"cannot join streams of '{self.codec}' and '{other.codec}'")
        if self.modality not in ("audio", "video", "text") or not self.grid:
            raise StreamError(f"a stream of '{self.codec}' has no time axis to join along")
        if self.grid[1:] != other.grid[1:] or self.depth != other.depth:
            raise StreamError(f"cannot join grids {self.grid} and {other.grid}")
        if self.side or other.side:
            raise StreamError("streams with side tensors belong to one source and cannot be joined")
        codes = torch.cat([self.codes, other.codes])
        meta = dict(self.meta)
        if "length" in meta and "length" in other.meta:
            meta["length"] = meta["length"] + other.meta["length"]
        grid = (self.grid[0] + other.grid[0], *self.grid[1:])
        return replace(self, parts=(Part(codes, self.parts[0].vocab),), grid=grid, meta=meta)

    def save(self, path: str | Path) -> None:
        """Write a `.tok` file atomically."""
        from . import tokfile

        tokfile.write(self, path)

    @classmethod
    def load(cls, path: str | Path) -> TokenStream:
        """Read a `.tok` file; StreamError where it is corrupted or foreign."""
        from . import tokfile

        return tokfile.read(path)
