"""Batches without end, in an order that (seed, epoch, process) decide and that can be entered anywhere.

The epochs' permutations are laid end to end to one stream of positions. Batch g takes the next `batch · processes`
positions, process r its share. So a data set smaller than a batch is no special case, nothing is left out at an
epoch's end, and a resumed run starts at batch g as if it had never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class RandomDataset(Dataset):
    """A data set whose items are drawn: a random second of a recording, a random clip of a film.

    `draw(index, rng)` serves training; `self[index]`, the same every time, serves evaluation.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def draw(self, index: int, rng: torch.Generator) -> Any:
        """Item `index`, with chance from `rng` alone (on the CPU)."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Any:
        return self.draw(index, torch.Generator().manual_seed(0))


def derived(*parts: object) -> int:
    """A 63-bit seed that depends on every part: `derived(seed, "augment", step, process)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which items come when, for one process.

    Args:
        items: size of the data set.
        batch: items a batch on one process.
        rank, processes: this process, and how many there are.
        start: the number of batches that were used already.
    """

    items: int
    batch: int
    seed: int
    rank: int = 0
    processes: int = 1
    start: int = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Endless batches of (index, seed of the draw)."""
        epoch, permutation = -1, torch.empty(0)
        position = (self.start * self.processes + self.rank) * self.batch
        while True:
            batch = []
            for n in range(position, position + self.batch):
                if n // self.items != epoch:
                    epoch = n // self.items
                    permutation = self.permutation(epoch)
                batch.append((int(permutation[n % self.items]), derived(self.seed, "draw", n)))
            yield batch
            position += self.batch * self.processes

    def permutation(self, epoch: int) -> torch.Tensor:
        """The order of one epoch: [items]."""
        rng = torch.Generator().manual_seed(derived(self.seed, "order", epoch))
        return torch.randperm(self.items, generator=rng)


class _Batches(Sampler):
    def __init__(self, order: Order) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.order)


class _Draws(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        if isinstance(self.dataset, RandomDataset):
            return self.dataset.draw(index, torch.Generator().manual_seed(seed))
        return self.dataset[index]


def batches(
    dataset: Dataset,
    order: Order,
    collate: Callable[[Sequence[Any]], Any],
    *,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Any]:
    """Collated batches, prepared in `workers` processes, or in this one where that is 0."""
    return iter(
        DataLoader(
            _Draws(dataset),
            batch_sampler=_Batches(order),
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin,
        )
    )
