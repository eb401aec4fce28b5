"""LayeredCache: keys and values of layers that hold different positions, since tokens left between them.

Each layer has storage of its own length, so that what was pruned takes no memory. A layer also knows how many
positions before its next one it does not hold (`shift`): the next position is length + shift, in every layer the same
number if positions were kept, the layer's own count if they were packed.

B rows, K key-value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import KVCache


class LayeredCache:
    """As `KVCache`, layer by layer.

    Args:
        room: positions that each layer gets beyond what is first appended, for the steps that follow.
    """

    def __init__(self, *, layers: int, room: int):
        self.room = room
        self.parts: list[KVCache | None] = [None] * layers
        self.shift: list[list[int]] = [[] for _ in range(layers)]

    def append(
        self, layer: int, k: Tensor, v: Tensor, counts: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add T positions [B, K, T, H] to a layer; returns all its keys and values [B, K, S, H]."""
        part = self.parts[layer]
        if part is None:
            part = self.parts[layer] = KVCache(
                layers=1,
                rows=k.shape[0],
                kv_heads=k.shape[1],
                head_width=k.shape[3],
                capacity=k.shape[2] + self.room,
                dtype=k.dtype,
                device=k.device,
            )
            if not self.shift[layer]:
                self.shift[layer] = [0] * k.shape[0]
        return part.append(0, k, v, counts)

    def part(self, layer: int) -> KVCache:
        """One layer's cache."""
        part = self.parts[layer]
        if part is None:
            raise ValueError(f"layer {layer} holds nothing yet; run a prompt first")
        return part

    def row_lengths(self, layer: int = 0) -> list[int]:
        """Positions that each row of a layer holds."""
        part = self.parts[layer]
        return part.row_lengths() if part is not None else [0] * len(self.shift[layer])

    def next_positions(self, layer: int) -> list[int]:
        """The position of each row's next token, as this layer counts."""
        return [n + s for n, s in zip(self.row_lengths(layer), self.shift[layer])]

    @property
    def lengths(self) -> Tensor:
        """Positions held: [layers, B]."""
        return torch.tensor([self.row_lengths(i) for i in range(len(self.parts))])

    @property
    def bytes(self) -> int:
        """What the held keys and values take, padding and room left out."""
        parts = [part for part in self.parts if part is not None]
        return sum(sum(p.row_lengths()) * _bytes_of_a_position(p) for p in parts)

    @property
    def allocated(self) -> int:
        """What is really allocated."""
        parts = [part for part in self.parts if part is not None]
        return sum(t.numel() * t.element_size() for p in parts for t in (p.keys, p.values))

    def prune(self, layer: int, indices: Tensor) -> None:
        """Keep `indices` [B, m] of what a layer holds, ascending, -1 behind a row's last; the rest is freed.

        Keys were turned by their positions and stay so: positions of later tokens do not change.

        Raises:
            ValueError: an index that a row does not hold.
        """
        part, held = self.part(layer), self.row_lengths(layer)
        counts = (indices >= 0).sum(1).tolist()
        most = indices.amax(1).tolist() if indices.shape[1] else [-1] * len(held)
        for row, (index, n) in enumerate(zip(most, held)):
            if index >= n:
                raise ValueError(f"row {row} of layer {layer} holds {n} positions, not {index}")
        self._pick(part, indices, counts)
        self.shift[layer] = [s + n - m for s, n, m in zip(self.shift[layer], held, counts)]
        stop = min(indices.shape[1] + self.room, part.capacity)
        part.keys = part.keys[:, :, :, :stop].clone()
        part.values = part.values[:, :, :, :stop].clone()

    def accept(self, new: int, chosen: Tensor) -> None:
        """Of the last `new` positions, in every layer, keep `chosen` [B, k] in that order (a tree's branch).

        Args:
            chosen: indices into the `new` ones; -1 behind a row's last.
        """
        counts = (chosen >= 0).sum(1).tolist()
        for layer, part in enumerate(self.parts):
            if part is None:
                continue
            before = [n - new for n in self.row_lengths(layer)]
            columns = torch.arange(max(before) + chosen.shape[1], device=chosen.device)
            start = torch.tensor(before, device=chosen.device)[:, None]
            own = (columns - start).clamp(0, max(chosen.shape[1] - 1, 0))
            # Columns behind a row's last accepted one hold anything: they are overwritten.
            index = columns.where(columns < start, start + chosen.clamp(min=0).gather(1, own))
            self._pick(part, index, [n + m for n, m in zip(before, counts)])
            assert self.row_lengths(layer) == [n + m for n, m in zip(before, counts)]

    def take(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        for layer, part in enumerate(self.parts):
            if part is not None:
                part.take(rows)
            self.shift[layer] = [self.shift[layer][row] for row in rows]

    def fork(self, n: int) -> LayeredCache:
        """A copy with each row n times: [r0, r0, ..., r1, r1, ...]."""
        copy = LayeredCache(layers=len(self.parts), room=self.room)
        copy.parts = [None if part is None else part.fork(n) for part in self.parts]
        copy.shift = [[s for s in row for _ in range(n)] for row in self.shift]
        return copy

    @staticmethod
    def _pick(part: KVCache, indices: Tensor, counts: Sequence[int]) -> None:
        part.gather(indices.clamp(min=0))
        part.rewind(counts)


def _bytes_of_a_position(part: KVCache) -> int:
    return 2 * part.keys.shape[2] * part.keys.shape[4] * part.keys.element_size()
