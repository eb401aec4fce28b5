"""From shards to a model's rows: documents packed to the context length, in an order that can be entered anywhere.

- `Rows` lays down, once and for all, which documents share a row. Documents of a row do not see each other, so a
  packing that never changes costs nothing, and row i is the same on every machine and after every restart. A row's
  documents are of one shard.
- `Stream` reads the rows of an epoch as they lie: shards in a new order, cut into equal runs for the ranks, rows
  shuffled within a buffer. Its state is one number, the rows it has given.
- As a `RandomDataset`, `Rows` goes into the engine's loader as it is: there rank, seed and step say which row comes,
  and the last few shards stay in memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import IterableDataset

from ..codecs.training.loader import RandomDataset, derived
from .corpus import CorpusError
from .interleave import Packed
from .shards import Document, Shards

Pack = Callable[[Document, torch.Generator | None], Packed]
KEPT = 32  # shards in memory


class Rows(RandomDataset):
    """Rows of documents, each at most `context` ids long.

    Args:
        corpora: whose documents; a row's are of one shard.
        pack: makes a document's sequence. Without a generator it gives the longest that it may give with one.
        context: the most ids of a row.
        train: the documents of the split "train", or the others.
        overlong: "skip" leaves documents out that are longer than the context, "error" refuses them.

    Raises:
        CorpusError: no document, a damaged shard, or an overlong document.
    """

    def __init__(
        self,
        corpora: Sequence[Shards],
        pack: Pack,
        *,
        context: int,
        train: bool = True,
        overlong: str = "error",
    ):
        if overlong not in ("error", "skip"):
            raise ValueError(f"overlong is {overlong!r}, expected 'error' or 'skip'")
        self.pack, self.context, self.overlong = pack, context, overlong
        self.skipped = 0
        self.shards = [(corpus, n) for corpus in corpora for n in range(len(corpus))]
        self._kept: OrderedDict[int, list[Document]] = OrderedDict()
        self.rows: list[tuple[int, list[int]]] = []  # (shard, its documents)
        for shard in range(len(self.shards)):
            self.rows += [(shard, row) for row in self._packed(shard, train)]
        if not self.rows:
            names = ", ".join(str(corpus.path) for corpus in corpora)
            raise CorpusError(f"{names}: no document of the split {'train' if train else 'held'}")

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, index: int, rng: torch.Generator) -> Packed:
        """One row; `rng` decides what is left open in its documents."""
        return self._row(index, rng)

    def __getitem__(self, index: int) -> Packed:
        return self._row(index, None)

    def _row(self, index: int, rng: torch.Generator | None) -> Packed:
        shard, row = self.rows[index]
        documents = self._documents(shard)
        return Packed.join([self.pack(documents[i], rng) for i in row])

    def _documents(self, shard: int) -> list[Document]:
        if shard not in self._kept:
            corpus, number = self.shards[shard]
            self._kept[shard] = corpus.read(number)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(shard)
        return self._kept[shard]

    def _packed(self, shard: int, train: bool) -> list[list[int]]:
        lengths = {}
        for i, document in enumerate(self._documents(shard)):
            if (document.split == "train") != train:
                continue
            length = len(self.pack(document, None))
            if length <= self.context:
                lengths[i] = length
            elif self.overlong == "skip":
                self.skipped += 1
            else:
                raise CorpusError(
                    f"{self.shards[shard][0].path}: document '{document.name}' has {length} ids, the context has "
                    f"{self.context}; take a longer context, or skip such documents"
                )
        return best_fit(lengths, self.context)


def best_fit(lengths: dict[int, int], context: int) -> list[list[int]]:
    """Divide items into bins: longest first, each into the fullest that has room (as `interleave.fill`)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(lengths, key=lengths.__getitem__, reverse=True):
        fitting = [b for b, free in enumerate(room) if free >= lengths[item]]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            bins[best].append(item)
            room[best] -= lengths[item]
        else:
            bins.append([item])
            room.append(context - lengths[item])
    return bins


class Stream(IterableDataset):
    """Rows without end, for one rank. `state_dict` and `load_state_dict` are what a StatefulDataLoader asks for.

    Args:
        rows: all of them.
        seed: of the order and of every draw.
        rank, processes: this process, and how many there are. Each gets as many rows an epoch; the few that remain are
            others in every epoch.
        buffer: rows among which the next one is drawn.
    """

    def __init__(
        self, rows: Rows, *, seed: int = 0, rank: int = 0, processes: int = 1, buffer: int = 1024
    ):
        if len(rows) < processes:
            raise CorpusError(f"{len(rows)} rows for {processes} processes, expected one each")
        self.rows, self.seed, self.buffer = rows, seed, buffer
        self.rank, self.processes = rank, processes
        self.given = 0

    @property
    def epoch_rows(self) -> int:
        """Rows an epoch and rank."""
        return len(self.rows) // self.processes

    def __iter__(self) -> Iterator[Packed]:
        epoch, order = -1, []
        while True:
            if self.given // self.epoch_rows != epoch:
                epoch = self.given // self.epoch_rows
                order = self.order(epoch)
            index = order[self.given % self.epoch_rows]
            seed = derived(self.seed, "draw", self.rank, self.given)
            self.given += 1
            yield self.rows.draw(index, torch.Generator().manual_seed(seed))

    def order(self, epoch: int) -> list[int]:
        """Which rows this rank gives in an epoch, in order."""
        rng = torch.Generator().manual_seed(derived(self.seed, "shards", epoch))
        of_shard: dict[int, list[int]] = {}
        for index, (shard, _) in enumerate(self.rows.rows):
            of_shard.setdefault(shard, []).append(index)
        shards = list(of_shard)
        shuffled = [shards[i] for i in torch.randperm(len(shards), generator=rng).tolist()]
        whole = [index for shard in shuffled for index in of_shard[shard]]
        own = whole[self.rank * self.epoch_rows : (self.rank + 1) * self.epoch_rows]
        return _through_buffer(own, self.buffer, rng)

    def state_dict(self) -> dict[str, int]:
        """Where the stream is."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.given = state["given"]


def _through_buffer(items: list[int], size: int, rng: torch.Generator) -> list[int]:
    """The order in which items leave a buffer that is filled in their order and emptied at random."""
    held, out = items[:size], []
    for item in [*items[size:], *[None] * len(held)]:
        at = int(torch.randint(len(held), (), generator=rng))
        out.append(held[at])
        last = held.pop() if item is None else item
        if at < len(held):
            held[at] = last
    return out
