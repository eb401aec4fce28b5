"""Autoregressive decoding: batched, cached, constrained by the grammar, with guidance in the same batch.

- Rows of different length share a batch without left padding (`KVCache`), finish independently, and then leave it.
- A row's ids do not depend on its batch-mates: attention sees its own positions, draws come from its own generator.
- The grammar saves work: only the rows of the head that may come next are multiplied, an id that is forced is not
  computed at all, and what is forced at the end needs no step.
- With guidance a request has two rows of the cache, one with the condition and one without; the second goes as soon as
  nothing that may still be written is guided.
- Prompts that are the same, as those of several samples, are read once.
- With `rows`, so many requests run at once; as one ends the next takes its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbone.cache import KVCache
from ..backbone.grammar import Grammar, Range, State
from ..backbone.step import Stepper
from ..backbone.transformer import Transformer
from ..codecs.codec import item_rngs
from .generator import Event, Request
from .sampling import Sampling, draw, guided

Options = Sampling | Mapping[str, Sampling]


@dataclass
class _Row:
    """One request in progress. `guided`: it has a row without the condition, too."""

    number: int
    request: Request
    rng: torch.Generator
    state: State | None
    guided: bool
    written: int = 0
    feed: list[int] = field(default_factory=list)  # ids that the model has not seen yet
    fresh: list[int] = field(default_factory=list)  # ids that no event has told yet
    reason: str | None = None


class Autoregressive:
    """Next-token decoding with a transformer.

    Args:
        model: fused here for inference (`Transformer.fuse`).
        grammar: what may be written; None for free text.
        rows: the most requests at once; None for all.
        int8: layers of steps in eight bits (`Int8Linear`); prompts are read as ever.
    """

    def __init__(
        self,
        model: Transformer,
        grammar: Grammar | None = None,
        *,
        rows: int | None = None,
        int8: bool = False,
    ):
        if rows is not None and rows < 1:
            raise ValueError(f"rows is {rows}, expected 1 or more, or None for all at once")
        self.rows = rows
        self.model = model.fuse()
        self.step = Stepper(model, int8=int8)
        self.grammar = grammar

    def run(
        self,
        requests: Sequence[Request],
        options: Options | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> Iterator[Event]:
        """Events of all requests, as their ids are written.

        Args:
            options: how ids are drawn, for all, or by modality; greedy where None.

        Raises:
            ValueError: a request that does not fit the context, guidance without a null.
        """
        options = Sampling(temperature=0) if options is None else options
        rows = [
            self._row(i, request, _guidance(request.state, options, 0), g)
            for i, (request, g) in enumerate(zip(requests, item_rngs(rng, len(requests))))
        ]
        return self._loop(rows, options)

    def _row(self, number: int, request: Request, guided: bool, rng: torch.Generator) -> _Row:
        length = _length(request.ids, request.embeddings)
        if length == 0:
            raise ValueError(f"request {number} is empty, expected ids or embeddings to go on with")
        what = f"request {number} (a prompt of {length} and up to {request.max_tokens} new)"
        # The last id that is written is never read.
        self.model.check_length(length + request.max_tokens - 1, what)
        if request.state is not None and self.grammar is None:
            raise ValueError(f"request {number} has a grammar state, but there is no grammar")
        if guided and not request.has_null:
            raise ValueError(
                f"request {number} has no null condition, which cfg other than 1 needs"
            )
        return _Row(number, request, rng, request.state, guided)

    @torch.inference_mode()
    def _loop(self, rows: list[_Row], options: Options) -> Iterator[Event]:
        for row in rows:
            self._force(row)
        yield from (_event(row) for row in rows if row.fresh or row.reason)
        waiting = deque(row for row in rows if row.reason is None)
        rows = []
        cache: KVCache | None = None
        while rows or waiting:
            if rows and cache is not None:
                self._write(rows, *self._step(rows, cache), options)
                yield from (_event(row) for row in rows if row.fresh)
                rows, _ = _leave(rows, cache, options)
            fresh = [waiting.popleft() for _ in range(self._room(len(rows), len(waiting)))]
            if fresh:
                own, hidden, null = self._prefill(fresh)
                self._write(fresh, hidden, null, options)
                yield from (_event(row) for row in fresh if row.fresh)
                fresh, _ = _leave(fresh, own, options)
            if fresh:
                rows, cache = _joined(rows, cache, fresh, own)

    def _room(self, running: int, waiting: int) -> int:
        """How many requests may begin."""
        return waiting if self.rows is None else min(waiting, self.rows - running)

    def _force(self, row: _Row) -> None:
        """Write what the grammar leaves no choice about; decide whether the request is finished."""
        while row.reason is None:
            forced = None
            if self.grammar is not None and row.state is not None:
                if row.state.done:
                    row.reason = "end"
                    return
                forced = self.grammar.forced(row.state)
            if row.written >= row.request.max_tokens:
                row.reason = "length"
            elif forced is None:
                return
            else:
                self._accept(row, forced)

    def _accept(self, row: _Row, id: int) -> None:
        row.written += 1
        row.feed.append(id)
        row.fresh.append(id)
        if row.state is not None and self.grammar is not None:
            row.state = self.grammar.advance(row.state, (id,))
        elif id == row.request.end:
            row.reason = "end"

    def _prefill(self, rows: Sequence[_Row]) -> tuple[KVCache, Tensor, Tensor | None]:
        """The prompts, right-padded: the cache, and hidden states [B, D] of each row's last position."""
        read = self._read(rows)
        last = torch.tensor(read.counts, device=read.hidden.device) - 1
        hidden = read.hidden[torch.arange(len(last), device=last.device), last]
        if read.same is not None:
            hidden = hidden[read.same]
            read.cache.take(read.same)
        for row in rows:
            row.feed.clear()
        return read.cache, *_halves(hidden, rows)

    def _read(self, rows: Sequence[_Row]) -> _Read:
        """Run the prompts, those with the condition first; the same prompt once."""
        sides = [(r, r.request.ids, r.request.embeddings) for r in rows]
        sides += [(r, r.request.null_ids, r.request.null_embeddings) for r in rows if r.guided]
        numbers: dict[object, int] = {}
        firsts, same = [], []
        for side in sides:
            row, ids, embeddings = side
            given = () if ids is None else tuple(ids.tolist())
            key = (given, tuple(row.feed), None if embeddings is None else id(embeddings))
            if key not in numbers:
                numbers[key] = len(numbers)
                firsts.append(side)
            same.append(numbers[key])
        prompts = [self._embedded(*side) for side in firsts]
        counts = [len(prompt) for prompt in prompts]
        most = max(
            _length(r.request.ids, r.request.embeddings) + r.request.max_tokens for r in rows
        )
        cache = self.model.cache(len(prompts), most)
        padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        hidden = self.model(embeddings=padded, cache=cache, counts=counts, keep=0).hidden
        return _Read(cache, hidden, counts, same if len(firsts) < len(sides) else None)

    def _embedded(self, row: _Row, ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
        """Condition, prompt and forced ids of a row: [L, D]."""
        table = self.model.model.embed_tokens.weight
        given = [] if ids is None else ids.tolist()
        whole = self.model.embed(
            torch.tensor([*given, *row.feed], dtype=torch.int64, device=table.device)
        )
        return whole if embeddings is None else torch.cat([embeddings.to(table), whole])

    def _step(self, rows: list[_Row], cache: KVCache) -> tuple[Tensor, Tensor | None]:
        """Feed one id a row."""
        ids = [row.feed.pop(0) for row in rows]
        ids += [ids[i] for i in _nulls(rows)]
        return _halves(self.step(torch.tensor(ids, device=cache.keys.device), cache), rows)

    def _write(
        self, rows: list[_Row], hidden: Tensor, null: Tensor | None, options: Options
    ) -> None:
        """Draw the next id of each row that has none waiting; rows with the same choice go together."""
        own = {i: n for n, i in enumerate(_nulls(rows))}
        groups: dict[tuple[tuple[Range, ...], Sampling], list[int]] = {}
        for i, row in enumerate(rows):
            if not row.feed:
                groups.setdefault((self._ranges(row), self._sampling(row, options)), []).append(i)
        for (ranges, sampling), members in groups.items():
            whole = len(members) == len(rows)
            logits = self._logits(hidden if whole else hidden[members], ranges)
            if null is not None and sampling.cfg != 1:
                others = null if whole else null[[own[i] for i in members]]
                other = self._logits(others, ranges)
                logits = guided(logits, other, sampling.cfg)
            chosen = draw(logits, sampling, [rows[i].rng for i in members])
            for i, index in zip(members, chosen):
                self._accept(rows[i], _id(index, ranges))
                self._force(rows[i])

    def _ranges(self, row: _Row) -> tuple[Range, ...]:
        if row.state is None or self.grammar is None:
            return ((0, self.model.config.vocab_size),)
        return self.grammar.allowed(row.state)

    def _sampling(self, row: _Row, options: Options) -> Sampling:
        modality = row.state.modality if row.state is not None else ""
        return _at(options, modality, row.written)

    def _logits(self, hidden: Tensor, ranges: tuple[Range, ...]) -> Tensor:
        """Logits [B, n] of the ids in `ranges`, one range behind another."""
        parts = [self.model.lm_head.within(hidden, *span) for span in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class _Read(NamedTuple):
    """Prompts that were run, each once.

    Args:
        hidden: [P, L, D].
        counts: their lengths.
        same: which of them each row of the requests has; None where every row has its own.
    """

    cache: KVCache
    hidden: Tensor
    counts: list[int]
    same: list[int] | None


def _at(options: Options, modality: str, written: int) -> Sampling:
    """How an id of a modality is drawn, once `written` ids stand."""
    if not isinstance(options, Sampling):
        options = options.get(modality, Sampling(temperature=0))
    return options if options.guides(written) or options.cfg == 1 else options.unguided


def _guidance(state: State | None, options: Options, written: int) -> bool:
    """Whether anything that may still be written is guided."""
    if isinstance(options, Sampling):
        return options.guides(written)
    coming = set(options)
    if state is not None and state.plan is not None:
        coming = {*state.plan, state.modality}
    return any(one.guides(written) for modality, one in options.items() if modality in coming)


def _length(ids: Tensor | None, embeddings: Tensor | None) -> int:
    return (0 if ids is None else len(ids)) + (0 if embeddings is None else len(embeddings))


def _event(row: _Row) -> Event:
    ids = tuple(row.fresh)
    row.fresh.clear()
    return Event(row.number, ids, row.written, row.reason)


def _nulls(rows: Sequence[_Row]) -> list[int]:
    """Requests that have a row without the condition; these rows follow all others in the cache."""
    return [i for i, row in enumerate(rows) if row.guided]


def _halves(hidden: Tensor, rows: Sequence[_Row]) -> tuple[Tensor, Tensor | None]:
    return (hidden[: len(rows)], hidden[len(rows) :]) if len(hidden) > len(rows) else (hidden, None)


def _leave(
    rows: list[_Row], cache: KVCache, options: Options
) -> tuple[list[_Row], list[int] | None]:
    """The requests that go on, and the cache's rows that were kept (None: all); the others' are let go."""
    stay = [i for i, row in enumerate(rows) if row.reason is None]
    before = _nulls(rows)
    for row in rows:
        row.guided = row.guided and _guidance(row.state, options, row.written)
    kept = [len(rows) + n for n, i in enumerate(before) if i in stay and rows[i].guided]
    if len(stay) == len(rows) and len(kept) == len(before):
        return rows, None
    if stay:
        cache.take([*stay, *kept])
    return [rows[i] for i in stay], [*stay, *kept]


def _joined(
    rows: list[_Row], cache: KVCache | None, fresh: list[_Row], own: KVCache
) -> tuple[list[_Row], KVCache]:
    """Requests that run and those that begin, in one cache."""
    if cache is None or not rows:
        return fresh, own
    held = cache.rows
    cache.join(own)
    new = range(held, cache.rows)
    cache.take([*range(len(rows)), *new[: len(fresh)], *range(len(rows), held), *new[len(fresh) :]])
    return rows + fresh, cache


def _id(index: int, ranges: tuple[Range, ...]) -> int:
    """The id at place `index` of the ranges laid end to end."""
    for start, stop in ranges:
        if index < stop - start:
            return start + index
        index -= stop - start
    raise AssertionError("the index lies in no range")
