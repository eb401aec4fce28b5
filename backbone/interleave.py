"""Interleaving: documents of media become one sequence of ids, and ids become streams again.

Each medium stands as a block, opening id, codes, closing id: `<image> ... </image>`. A `Rule` says for one codec how
its codes are laid out as ids; it carries all that a stream needs to be built again, so that no codec has to be loaded.

L ids of a sequence, n ids or positions of one stream, d codes of a position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from ..codecs.stream import Part, StreamError, TokenStream
from .rules import Rule, codes_of, ids_of
from .vocabulary import Vocabulary

BOS, EOS, PAD, PLACE = "<bos>", "<eos>", "<pad>", "<place>"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One medium of a document.

    Args:
        target: whether the model learns to write it, or only reads it.
        weights: loss weight of each id of the stream [n]; None for ones.
        role: who speaks ("user", "assistant"), for loss masks and chat formats.
        time: seconds at which it begins, where it has a place in time.
    """

    stream: TokenStream
    target: bool = True
    weights: Tensor | None = None
    role: str | None = None
    time: float | None = None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of a sequence that belongs to one medium.

    Args:
        start, stop: places in the sequence, without the opening and closing id.
        kind: "ids" in the sequence itself; otherwise ids are placeholders and `data` has the content:
            "codes" [n, D] (ids whose embeddings are summed; -1 for none), "features" [n, d] or "latents" [n, d].
        block: the modality.
        document: its number in the sequence.
    """

    start: int
    stop: int
    kind: Literal["ids", "codes", "features", "latents"] = "ids"
    block: str
    role: str | None = None
    time: float | None = None
    document: int = 0
    data: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One sequence, of one document or of several that do not see each other.

    Args:
        ids: [L].
        weights: [L], the loss weight of each id as a target; 0 where it is only read.
        positions: [L], from 0 in each document.
        documents: [L].
    """

    ids: Tensor
    weights: Tensor
    positions: Tensor
    documents: Tensor
    segments: tuple[Segment, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def stacked(self) -> Tensor | None:
        """The ids [m, D] that share positions, in order; None where none do."""
        parts = [s.data for s in self.segments if s.kind == "codes" and s.data is not None]
        return torch.cat(parts) if parts else None

    @classmethod
    def join(cls, sequences: Sequence[Packed]) -> Packed:
        """Put documents one behind another; their numbers go on."""
        documents, segments = [], []
        start = count = 0
        for one in sequences:
            documents.append(one.documents + count)
            segments += [_moved(s, start, count) for s in one.segments]
            start += len(one)
            count = int(documents[-1][-1]) + 1
        return cls(
            ids=torch.cat([one.ids for one in sequences]),
            weights=torch.cat([one.weights for one in sequences]),
            positions=torch.cat([one.positions for one in sequences]),
            documents=torch.cat(documents),
            segments=tuple(segments),
        )


def _moved(segment: Segment, by: int, documents: int) -> Segment:
    return dataclasses.replace(
        segment,
        start=segment.start + by,
        stop=segment.stop + by,
        document=segment.document + documents,
    )


def fill(sequences: Sequence[Packed], length: int) -> list[Packed]:
    """Pack sequences into as few as fit `length`: longest first, each into the fullest that has room.

    Raises:
        ValueError: one of them is longer than `length`.
    """
    bins: list[list[Packed]] = []
    used: list[int] = []
    for one in sorted(sequences, key=len, reverse=True):
        if len(one) > length:
            raise ValueError(f"a document has {len(one)} ids, the context has {length}")
        room = [i for i, n in enumerate(used) if n + len(one) <= length]
        if room:
            best = max(room, key=used.__getitem__)
            bins[best].append(one)
            used[best] += len(one)
        else:
            bins.append([one])
            used.append(len(one))
    return [Packed.join(content) for content in bins]


def special_names(rules: Iterable[Rule]) -> list[str]:
    """The specials that a vocabulary needs: frame of a document, padding, and two for each modality."""
    modalities = dict.fromkeys(rule.modality for rule in rules)
    return [PAD, BOS, EOS, PLACE, *(tag for m in modalities for tag in (f"<{m}>", f"</{m}>"))]


class Interleaver:
    """Documents to sequences and back, for a vocabulary and one rule a modality."""

    def __init__(self, vocabulary: Vocabulary, rules: Sequence[Rule]):
        self.vocabulary = vocabulary
        self.rules = {rule.modality: rule for rule in rules}
        if len(self.rules) != len(rules):
            raise ValueError("two rules for one modality; a model reads one codec of each")
        for rule in rules:
            sizes = [b.size for b in vocabulary.of(rule.name)]
            if sizes != [b.size for b in rule.blocks()]:
                raise ValueError(
                    f"'{rule.name}' needs blocks of {[b.size for b in rule.blocks()]} ids, the vocabulary has {sizes}"
                )

    @classmethod
    def build(cls, rules: Sequence[Rule], *, multiple: int = 1) -> Interleaver:
        """An interleaver with a new vocabulary: specials, then the rules' blocks in order."""
        blocks = [block for rule in rules for block in rule.blocks()]
        vocabulary = Vocabulary.build(special_names(rules), blocks, multiple=multiple)
        return cls(vocabulary, rules)

    def rule(self, modality: str) -> Rule:
        """The rule of a modality.

        Raises:
            ValueError: the model knows no such modality.
        """
        if modality not in self.rules:
            known = ", ".join(self.rules)
            raise ValueError(f"the model knows no {modality!r}, only {known}")
        return self.rules[modality]

    def tags(self, modality: str) -> tuple[int, int]:
        """The opening and the closing id."""
        return self.vocabulary.special(f"<{modality}>"), self.vocabulary.special(f"</{modality}>")

    def ids(self, stream: TokenStream) -> Tensor:
        """The ids [n] of a stream, without opening and closing.

        Raises:
            StreamError: another codec's stream, or more than the rule takes.
        """
        rule = self.rule(stream.modality)
        if stream.codec != rule.codec:
            raise StreamError(
                f"stream was written by codec '{stream.codec}', the model reads '{rule.codec}'"
            )
        return ids_of(stream, rule, self.vocabulary.of(rule.name))

    def stream(self, ids: Tensor | Sequence[int], modality: str) -> TokenStream:
        """The stream of ids [n] between an opening and a closing id.

        Raises:
            StreamError: an id of another block, or a length that the layout does not have.
        """
        rule = self.rule(modality)
        ids = torch.as_tensor(ids, dtype=torch.int64)
        tables = codes_of(ids, rule, self.vocabulary.of(rule.name))
        grid = rule.grid(len(tables[0]))
        problem = rule.layout.problem(tables, grid)
        if problem:
            raise StreamError(f"the {modality} block {problem}")
        return TokenStream(
            parts=tuple(Part(t, v) for t, v in zip(tables, rule.vocab)),
            codec=rule.codec,
            modality=modality,
            grid=grid,
            prefix_step=rule.prefix_step,
            depth_prefix=rule.depth_prefix,
            meta=rule.meta,
        )

    def pack(self, items: Sequence[Item], *, end: bool = True) -> Packed:
        """One document: `<bos>`, a block for each item, `<eos>` where `end`."""
        ids, weights = [torch.tensor([self.vocabulary.special(BOS)])], [torch.zeros(1)]
        segments, start = [], 1
        for item in items:
            body, stacked = self._body(item)
            opening, closing = self.tags(item.stream.modality)
            ids.append(torch.cat([torch.tensor([opening]), body, torch.tensor([closing])]))
            weights.append(_block_weights(item, len(body)))
            segments.append(
                Segment(
                    start=start + 1,
                    stop=start + 1 + len(body),
                    kind="ids" if stacked is None else "codes",
                    data=stacked,
                    block=item.stream.modality,
                    role=item.role,
                    time=item.time,
                )
            )
            start += len(body) + 2
        if end:
            ids.append(torch.tensor([self.vocabulary.special(EOS)]))
            weights.append(torch.tensor([1.0 if items and items[-1].target else 0.0]))
        whole = torch.cat(ids)
        return Packed(
            ids=whole,
            weights=torch.cat(weights),
            positions=torch.arange(len(whole)),
            documents=torch.zeros(len(whole), dtype=torch.int64),
            segments=tuple(segments),
        )

    def _body(self, item: Item) -> tuple[Tensor, Tensor | None]:
        """The ids of a block; where several share a position, placeholders [n] and the ids [n, D]."""
        ids = self.ids(item.stream)
        stack = self.rule(item.stream.modality).stack
        if item.target or not stack:
            return ids, None
        count = -(-len(ids) // stack)
        rest = ids.new_full((count * stack - len(ids),), -1)
        stacked = rearrange(torch.cat([ids, rest]), "(n d) -> n d", d=stack)
        return ids.new_full((count,), self.vocabulary.special(PLACE)), stacked

    def parse(self, ids: Tensor | Sequence[int]) -> list[TokenStream]:
        """The streams of a document; ids before the first block's opening and `<eos>` are framing.

        Raises:
            StreamError: a block that does not close, or ids that stand in no block; names the place.
        """
        values = torch.as_tensor(ids).tolist()
        frame = {self.vocabulary.special(name) for name in (BOS, EOS, PAD)}
        opens = {self.tags(m)[0]: m for m in self.rules}
        streams, i = [], 0
        while i < len(values):
            if values[i] in frame:
                i += 1
                continue
            modality = opens.get(values[i])
            if modality is None:
                raise StreamError(
                    f"{self.vocabulary.name(values[i])} at place {i} stands in no block"
                )
            closing = self.tags(modality)[1]
            if closing not in values[i:]:
                raise StreamError(f"the {modality} block that opens at place {i} does not close")
            stop = values.index(closing, i)
            streams.append(self.stream(values[i + 1 : stop], modality))
            i = stop + 1
        return streams

    def to_json(self) -> dict[str, object]:
        """JSON values: the vocabulary and the rules."""
        rules = [rule.to_json() for rule in self.rules.values()]
        return {"vocabulary": self.vocabulary.to_json(), "rules": rules}

    @classmethod
    def from_json(cls, data: Mapping) -> Interleaver:
        """From what `to_json` gave."""
        rules = [Rule.from_json(rule) for rule in data["rules"]]
        return cls(Vocabulary.from_json(data["vocabulary"]), rules)


def _block_weights(item: Item, length: int) -> Tensor:
    """Weights of opening, body and closing. A model that is told what to write need not learn the opening."""
    if not item.target:
        return torch.zeros(length + 2)
    body = torch.ones(length) if item.weights is None else item.weights
    if len(body) != length:
        raise ValueError(f"weights has {len(body)} values for {length} ids")
    return torch.cat([torch.ones(1), body, torch.ones(1)])
