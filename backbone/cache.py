"""KVCache: what attention has seen, with a length for each layer and row.

Rows are right-padded: a row's positions stand at 0 ... length - 1 and what lies behind is overwritten later, so rows of
different prompts run in one batch without left padding. Lengths are Python numbers, so that no step waits for a device.
Layers may hold different lengths (pruning); `gather` compacts and reorders, `keep` picks the accepted
branch of a tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import repeat
from torch import Tensor

from . import masks


class KVCache:
    """Keys and values [layers, B, K, capacity, H] for K key-value heads of width H.

    Args:
        capacity: positions to allocate at first; it doubles where more are appended.
    """

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        kv_heads: int,
        head_width: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (layers, rows, kv_heads, max(capacity, 1), head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._lengths = [[0] * rows for _ in range(layers)]

    @property
    def lengths(self) -> Tensor:
        """Positions held: [layers, B]."""
        return torch.tensor(self._lengths)

    @property
    def rows(self) -> int:
        """B."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Positions that fit without growing."""
        return self.keys.shape[3]

    def row_lengths(self, layer: int = 0) -> list[int]:
        """Positions held by each row of one layer."""
        return list(self._lengths[layer])

    def append(
        self, layer: int, k: Tensor, v: Tensor, counts: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add T positions; returns all keys and values so far, [B, K, S, H].

        Args:
            k, v: [B, K, T, H].
            counts: how many of the T are real in each row (right padding); None for all.
        """
        starts = self._lengths[layer]
        length = k.shape[2]
        stop = max(starts) + length
        if stop > self.capacity:
            self._grow(stop)
        keys, values = self.keys[layer], self.values[layer]
        if len(starts) == 1 or min(starts) == max(starts):
            keys[:, :, starts[0] : stop] = k
            values[:, :, starts[0] : stop] = v
        else:
            rows = torch.arange(len(starts), device=k.device)[:, None]
            at = torch.tensor(starts, device=k.device)[:, None] + torch.arange(
                length, device=k.device
            )
            keys[rows, :, at] = k.transpose(1, 2)
            values[rows, :, at] = v.transpose(1, 2)
        added = [length] * len(starts) if counts is None else counts
        self._lengths[layer] = [start + n for start, n in zip(starts, added)]
        return keys[:, :, :stop], values[:, :, :stop]

    def mask(self, layer: int, length: int) -> Tensor | None:
        """What `length` new positions may see, [B, 1, length, S], before they are appended.

        None where causality says it all: nothing is held yet, or one position is added to rows of one length.
        """
        starts = self._lengths[layer]
        if max(starts) == 0 or (length == 1 and min(starts) == max(starts)):
            return None
        own = torch.tensor(starts, device=self.keys.device)
        return masks.after_cache(own, length, max(starts) + length)

    def gather(self, indices: Tensor, layer: int | None = None) -> None:
        """Keep positions `indices` [B, n] of each row, in that order, in one layer or in all."""
        chosen = range(len(self._lengths)) if layer is None else [layer]
        index = repeat(
            indices.to(self.keys.device),
            "b n -> b k n h",
            k=self.keys.shape[2],
            h=self.keys.shape[4],
        )
        for i in chosen:
            for table in (self.keys, self.values):
                table[i, :, :, : indices.shape[1]] = table[i].gather(2, index)
            self._lengths[i] = [indices.shape[1]] * self.rows

    def keep(self, added: int, chosen: Tensor, counts: Sequence[int]) -> None:
        """Of the last `added` positions of each row keep some, in order, and forget the others (a tree's branch).

        Only these positions are moved, where `gather` copies all.

        Args:
            chosen: [B, m], which of the last `added`, counted from 0.
            counts: how many of the m are real in each row.
        """
        chosen = chosen.to(self.keys.device)
        rows = torch.arange(self.rows, device=chosen.device)[:, None]
        order = torch.arange(chosen.shape[1], device=chosen.device)
        same = all(held == self._lengths[0] for held in self._lengths)
        for layers in (
            [slice(None)] if same else [slice(i, i + 1) for i in range(len(self._lengths))]
        ):
            held = self._lengths[layers.start or 0]
            starts = torch.tensor(held, device=chosen.device)[:, None] - added
            for table in (self.keys, self.values):
                moved = table[layers, rows, :, starts + chosen]
                table[layers, rows, :, starts + order] = moved
            for i in range(len(self._lengths))[layers]:
                self._lengths[i] = [n - added + count for n, count in zip(held, counts)]

    def take(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order (finished rows leave, beams move)."""
        index = torch.tensor(list(rows), device=self.keys.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self._lengths = [[lengths[row] for row in rows] for lengths in self._lengths]

    def join(self, other: KVCache) -> None:
        """Add the rows of another cache behind these (requests that begin later)."""
        if other.capacity > self.capacity:
            self._grow(other.capacity)
        pad = (0, 0, 0, self.capacity - other.capacity)
        for name in ("keys", "values"):
            more = torch.nn.functional.pad(getattr(other, name), pad)
            setattr(self, name, torch.cat([getattr(self, name), more], 1))
        self._lengths = [a + b for a, b in zip(self._lengths, other._lengths)]

    def fork(self, n: int) -> KVCache:
        """A copy with each row n times: [r0, r0, ..., r1, r1, ...]."""
        copy = object.__new__(KVCache)
        copy.keys = self.keys.repeat_interleave(n, 1)
        copy.values = self.values.repeat_interleave(n, 1)
        copy._lengths = [[m for m in row for _ in range(n)] for row in self._lengths]
        return copy

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget what lies behind `lengths`, one a row, in every layer."""
        for layer, held in enumerate(self._lengths):
            if any(new > old for new, old in zip(lengths, held)):
                raise ValueError(f"rewind to {list(lengths)}, but layer {layer} holds {held}")
            self._lengths[layer] = list(lengths)

    def _grow(self, needed: int) -> None:
        more = max(needed, 2 * self.capacity) - self.capacity
        pad = (0, 0, 0, more)
        self.keys = torch.nn.functional.pad(self.keys, pad)
        self.values = torch.nn.functional.pad(self.values, pad)
