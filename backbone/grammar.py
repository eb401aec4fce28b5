"""Grammar: which ids may come next, so that every block that a model writes is a stream.

A small automaton over ranges of ids, made from the rules of an `Interleaver`. States are immutable tuples of numbers,
so that speculative trees and rewinds can keep and fork them.

    state = grammar.start(["image"])
    ranges = grammar.allowed(state)          # ((1024, 5120), (7, 8)): half-open
    state = grammar.advance(state, [2000])

At the level of the document a plan (the modalities to write, in order) or, without one, the model decides what comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..codecs.layout import Octree
from .interleave import EOS, Interleaver
from .rules import Rule
from .vocabulary import Block, Vocabulary

Range = tuple[int, int]


class GrammarError(ValueError):
    """An id that the grammar does not allow at this place; names the id and what was expected."""


class State(NamedTuple):
    """Where a sequence stands.

    Args:
        plan: modalities still to write; None where the model decides.
        modality: the open block's; "" at the level of the document.
        inner: the block's own numbers.
        done: `<eos>` was written.
    """

    plan: tuple[str, ...] | None
    modality: str = ""
    inner: tuple[int, ...] = ()
    done: bool = False


class Grammar:
    """The automaton of an interleaver.

    Args:
        limits: modality -> the most units (positions of a prefix, frames, codes of an octree); the rules' own where
            not given.
    """

    def __init__(self, interleaver: Interleaver, *, limits: Mapping[str, int] | None = None):
        self.vocabulary: Vocabulary = interleaver.vocabulary
        self.tags = {m: interleaver.tags(m) for m in interleaver.rules}
        self._opens = {tags[0]: m for m, tags in self.tags.items()}
        self._eos = self.vocabulary.special(EOS)
        limits = limits or {}
        unknown = set(limits) - set(interleaver.rules)
        if unknown:
            raise ValueError(f"limits for {sorted(unknown)}, the model knows {list(self.tags)}")
        self._blocks = {
            m: _automaton(rule, self.vocabulary.of(rule.name), limits.get(m))
            for m, rule in interleaver.rules.items()
        }
        self._masks: dict[tuple[Range, ...], Tensor] = {}

    def start(self, to: Sequence[str] | None = None) -> State:
        """The level of the document.

        Args:
            to: the modalities to write, in order; None leaves it to the model.

        Raises:
            ValueError: a modality that the model does not know, or none at all.
        """
        if to is None:
            return State(None)
        for modality in to:
            if modality not in self.tags:
                raise ValueError(f"the model writes no {modality!r}, only {', '.join(self.tags)}")
        if not to:
            raise ValueError("no modality to write was named")
        return State(tuple(to))

    def allowed(self, state: State) -> tuple[Range, ...]:
        """Half-open ranges of ids that may come next; () once the document has ended."""
        if state.done:
            return ()
        if state.modality:
            ranges, may_close = self._blocks[state.modality].allowed(state.inner)
            closing = self.tags[state.modality][1]
            return (*ranges, (closing, closing + 1)) if may_close else ranges
        if state.plan is None:
            ids = [*self._opens, self._eos]
        else:
            ids = [self.tags[state.plan[0]][0]] if state.plan else [self._eos]
        return tuple((i, i + 1) for i in ids)

    def advance(self, state: State, ids: Iterable[int]) -> State:
        """The state after `ids`.

        Raises:
            GrammarError: an id that is not allowed.
        """
        for id in ids:
            state = self._step(state, id)
        return state

    def forced(self, state: State) -> int | None:
        """The id that must come next, where there is only one."""
        ranges = self.allowed(state)
        if len(ranges) == 1 and ranges[0][1] - ranges[0][0] == 1:
            return ranges[0][0]
        return None

    def least(self, modality: str) -> int:
        """The fewest ids of a block of `modality`, without opening and closing."""
        return self._blocks[modality].least

    def mask(self, ranges: tuple[Range, ...], device: torch.device | str = "cpu") -> Tensor:
        """True at ids that are not allowed: [V]. Kept, since few sets of ranges ever occur."""
        mask = self._masks.get(ranges)
        if mask is None or mask.device != torch.device(device):
            mask = torch.ones(self.vocabulary.size, dtype=torch.bool)
            for start, stop in ranges:
                mask[start:stop] = False
            mask = self._masks[ranges] = mask.to(device)
        return mask

    def _step(self, state: State, id: int) -> State:
        if state.modality:
            block = self._blocks[state.modality]
            if id != self.tags[state.modality][1]:
                if not any(a <= id < b for a, b in block.allowed(state.inner)[0]):
                    raise self._refusal(state, id)
                return state._replace(inner=block.advance(state.inner, id))
            if not block.allowed(state.inner)[1]:
                raise self._refusal(state, id)
            return State(state.plan)
        if not any(a <= id < b for a, b in self.allowed(state)):
            raise self._refusal(state, id)
        if id == self._eos:
            return state._replace(done=True)
        plan = None if state.plan is None else state.plan[1:]
        return State(plan, self._opens[id], self._blocks[self._opens[id]].first)

    def _refusal(self, state: State, id: int) -> GrammarError:
        name = self.vocabulary.name
        expected = [
            name(a) if b - a == 1 else f"{name(a)} ... {name(b - 1)}"
            for a, b in self.allowed(state)
        ]
        place = f"in a block of {state.modality}" if state.modality else "between blocks"
        return GrammarError(
            f"{name(id)} cannot stand {place}, expected {' or '.join(expected) or 'nothing more'}"
        )


def _automaton(rule: Rule, blocks: Sequence[Block], limit: int | None):
    most = min((n for n in (limit, rule.most) if n is not None), default=None)
    if most is not None and most < 1:
        raise ValueError(f"the limit of {rule.modality} is {most}, expected 1 or more")
    if isinstance(rule.layout, Octree):
        return _OctreeBlock(rule.layout, blocks, most)
    ranges = [(b.start, b.stop) for b in blocks]
    if rule.tables:
        return _FrameBlock(ranges, (rule.unit or 1), most, depth=1)
    kind = _FrameBlock if rule.flatten == "frame" else _RunBlock
    return kind(ranges, rule.unit or 1, most)


class _FrameBlock:
    """Whole units of positions, all depths of a position together. Inner state: (ids so far,).

    `depth` 1 where the ranges are those of single positions.
    """

    first = (0,)

    def __init__(
        self, ranges: list[Range], unit: int, most: int | None, *, depth: int | None = None
    ):
        self.ranges = [(r,) for r in ranges]
        self.unit = self.least = unit * (depth or len(ranges))
        self.stop = None if most is None else most * self.unit

    def allowed(self, inner: tuple[int, ...]) -> tuple[tuple[Range, ...], bool]:
        (count,) = inner
        if count == self.stop:
            return (), True
        return self.ranges[count % len(self.ranges)], count > 0 and count % self.unit == 0

    def advance(self, inner: tuple[int, ...], id: int) -> tuple[int, ...]:
        return (inner[0] + 1,)


class _RunBlock:
    """Equal runs, one a depth. Inner state: (run, ids of this run, ids of the first run)."""

    first = (0, 0, 0)

    def __init__(self, ranges: list[Range], unit: int, most: int | None):
        self.ranges = ranges
        self.unit = unit
        self.least = unit * len(ranges)
        self.stop = None if most is None else most * unit

    def allowed(self, inner: tuple[int, ...]) -> tuple[tuple[Range, ...], bool]:
        run, count, length = inner
        last = run == len(self.ranges) - 1
        if run > 0:
            full = count == length
            return (() if full else (self.ranges[run],)), full and last
        whole = count > 0 and count % self.unit == 0
        go_on = () if count == self.stop else (self.ranges[0],)
        if not whole:
            return go_on, False
        return (go_on, True) if last else ((*go_on, self.ranges[1]), False)

    def advance(self, inner: tuple[int, ...], id: int) -> tuple[int, ...]:
        run, count, length = inner
        if run == 0:
            start, stop = self.ranges[0]
            return (0, count + 1, count + 1) if start <= id < stop else self._next(1, 1, count)
        return self._next(run, count + 1, length)

    def _next(self, run: int, count: int, length: int) -> tuple[int, ...]:
        if count == length and run < len(self.ranges) - 1:
            return (run + 1, 0, length)
        return (run, count, length)


class _OctreeBlock:
    """Levels of split bits, eight an id, then codes. Inner state: (part, ids left of it, bits set in it).

    - A level whose bits were all zero would leave nothing to code, so its last id may not be zero then.
    - With a limit of codes, the last level of bits has an allowance of set bits; what is above it decides nothing yet,
      since one bit is enough for any level.
    """

    def __init__(self, layout: Octree, blocks: Sequence[Block], most: int | None = None):
        if most is not None and most < 8:
            raise ValueError(
                f"the limit of codes is {most}, expected 8 or more: siblings go together"
            )
        self.layout = layout
        self.bits = None if most is None else most // 8
        self.parts = [[b for b in blocks if b.part == i] for i in range(layout.split_parts + 1)]
        self.first = (0, layout.first_count() // 8, 0)
        # One bit set at each level: a single node's eight children all the way down.
        self.least = self.first[1] + layout.split_parts - 1 + 8 * len(self.parts[-1])

    def allowed(self, inner: tuple[int, ...]) -> tuple[tuple[Range, ...], bool]:
        part, left, bits = inner
        if part == len(self.parts):
            return (), True
        own = self.parts[part]
        block = own[-left % len(own)]
        split = part < self.layout.split_parts
        least = int(split and left == 1 and bits == 0)
        if self.bits is not None and part == self.layout.split_parts - 1:
            spans = _few_bits(least, min(8, self.bits - bits))
            return tuple((block.start + a, block.start + b) for a, b in spans), False
        return ((block.start + least, block.stop),), False

    def advance(self, inner: tuple[int, ...], id: int) -> tuple[int, ...]:
        part, left, bits = inner
        if part < self.layout.split_parts:
            bits += (id - self.parts[part][0].start).bit_count()
        if left > 1:
            return (part, left - 1, bits)
        if part + 1 == len(self.parts):
            return (part + 1, 0, 0)
        nodes = self.layout.next_count(bits)
        last = part + 1 == self.layout.split_parts
        return (part + 1, nodes * len(self.parts[part + 1]) if last else nodes // 8, 0)


@cache
def _few_bits(least: int, most: int) -> tuple[Range, ...]:
    """Half-open ranges of the bytes from `least` on with at most `most` bits set."""
    good = [value >= least and value.bit_count() <= most for value in range(256)]
    starts = [v for v in range(256) if good[v] and (v == 0 or not good[v - 1])]
    stops = [v + 1 for v in range(256) if good[v] and (v == 255 or not good[v + 1])]
    return tuple(zip(starts, stops))
