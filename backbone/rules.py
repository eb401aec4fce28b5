"""Rules: how each codec's streams stand in a sequence of ids, and the way back.

- "frame": positions in order, all depths of a position together.
- "depth": all positions of the first depth, then of the second (MIO's equal runs of speech).
- "octree": bits, packed: eight siblings of a split part are an id, and a node's code is one id where it has at most
  twelve bits, else one for each eight (OctGPT).

n positions or ids of a stream, d codes of a position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from ..codecs.codec import Codec
from ..codecs.layout import Fixed, Frames, Grid, Layout, Octree, Prefix
from ..codecs.stream import StreamError, TokenStream
from .vocabulary import Block

Flatten = Literal["frame", "depth", "octree"]
ONE_ID = 12  # bits of a node's code that are one id still: 4,096 ids
LAYOUTS = {"fixed": Fixed, "prefix": Prefix, "grid": Grid, "frames": Frames, "octree": Octree}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one codec's streams stand in a sequence.

    Args:
        codec: `name@fingerprint`, as its streams say.
        vocab: sizes by part and depth, of the depths that are used.
        layout: the codec's counting rule.
        flatten: the order of the ids.
        shape: positions of one frame or picture, where the layout leaves it open.
        limit: the most positions (prefix), frames, or codes (octree) that a model reads and writes; None for the
            layout's own.
        tables: each of the first so many positions has a block of its own (the codec's `position_tables`); 0 for
            one block for all. Then no stream has more positions.
        stack: so many ids of a stream that is only read share one position, their embeddings summed; 0 for one id a
            position. Reading becomes shorter by that factor; writing is not touched.
        meta: what streams that a model wrote say to the decoder.
    """

    codec: str
    modality: str
    vocab: tuple[tuple[int, ...], ...]
    layout: Layout
    flatten: Flatten = "frame"
    shape: tuple[int, ...] | None = None
    limit: int | None = None
    prefix_step: int | None = None
    depth_prefix: bool = False
    tables: int = 0
    stack: int = 0
    meta: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self):
        bits = all(size == 2 for sizes in self.vocab for size in sizes)
        octree = isinstance(self.layout, Octree)
        if octree != (self.flatten == "octree") or (octree and not bits):
            raise ValueError(
                f"'{self.codec}': the flattening 'octree' goes with an octree layout of bits, and with no other; "
                f"given {self.flatten!r} for {self.layout}"
            )
        if not octree and len(self.vocab) != 1:
            raise ValueError(
                f"'{self.codec}' has {len(self.vocab)} parts, only octrees may have several"
            )
        if self.tables and (self.depth > 1 or not isinstance(self.layout, Prefix)):
            raise ValueError(
                f"'{self.codec}': blocks of single positions go with a prefix layout of depth 1"
            )
        if self.unit is None and not octree:
            raise ValueError(f"'{self.codec}' leaves its grid open ({self.layout}): give `shape`")

    @classmethod
    def of(
        cls,
        codec: Codec,
        *,
        flatten: Flatten | None = None,
        depths: int | None = None,
        shape: tuple[int, ...] | None = None,
        limit: int | None = None,
        stack: int = 0,
        meta: Mapping[str, object] | None = None,
    ) -> Rule:
        """The rule of a codec; `depths` keeps the first so many of each position."""
        spec = codec.spec
        if depths is not None and not spec.depth_prefix:
            raise ValueError(f"'{spec.name}' does not decode from its first {depths} depths")
        return cls(
            codec=codec.identity,
            modality=spec.modality,
            vocab=tuple(sizes[:depths] for sizes in spec.vocab),
            layout=spec.layout,
            flatten=flatten or ("octree" if isinstance(spec.layout, Octree) else "frame"),
            shape=shape,
            limit=limit,
            prefix_step=spec.prefix_step,
            depth_prefix=spec.depth_prefix,
            tables=min(spec.position_tables, limit or spec.position_tables),
            stack=stack,
            meta=meta or {},
        )

    @property
    def name(self) -> str:
        """`system/variant`."""
        return self.codec.partition("@")[0]

    @property
    def depth(self) -> int:
        """Codes of a position."""
        return len(self.vocab[0])

    @property
    def unit(self) -> int | None:
        """Positions of the smallest whole piece: a picture, a frame, or 1; None where nothing says it."""
        if isinstance(self.layout, Fixed):
            return self.layout.length
        if isinstance(self.layout, Prefix):
            return self.prefix_step or 1
        shape = self.shape if self.shape is not None else getattr(self.layout, "shape", None)
        return None if shape is None else prod(shape)

    @property
    def most(self) -> int | None:
        """The most units; None where any number goes."""
        if isinstance(self.layout, (Fixed, Grid)):
            return 1
        own = None
        if isinstance(self.layout, Prefix):
            own = (self.tables or self.layout.max_length) // (self.unit or 1)
        elif isinstance(self.layout, Frames):
            own = self.layout.max_frames
        return min((n for n in (self.limit, own) if n is not None), default=None)

    def grid(self, positions: int) -> tuple[int, ...]:
        """The stream's grid for so many positions."""
        shape = self.shape if self.shape is not None else getattr(self.layout, "shape", ())
        if isinstance(self.layout, Grid):
            return tuple(shape or ())
        if isinstance(self.layout, Frames):
            return (positions // (self.unit or 1), *(shape or ()))
        return ()

    def blocks(self) -> list[Block]:
        """The blocks of ids that this rule needs; their `start` is still 0."""
        blocks = []
        for part, sizes in enumerate(self.vocab):
            if self.tables:
                blocks += [self._block(part, 0, sizes[0], position=t) for t in range(self.tables)]
                continue
            if self.flatten != "octree":
                blocks += [self._block(part, d, size) for d, size in enumerate(sizes)]
                continue
            pack = self._pack(len(sizes))
            blocks += [self._block(part, d, 2**pack, pack=pack) for d in range(0, len(sizes), pack)]
        return blocks

    def _pack(self, bits: int) -> int:
        """How many bits one id holds, for nodes of so many bits."""
        if 1 < bits <= ONE_ID:
            return bits
        if bits > 1 and bits % 8:
            raise ValueError(
                f"'{self.codec}' has {bits} bits a node, expected 1 to {ONE_ID} or a multiple of 8"
            )
        return 8

    def _block(
        self, part: int, depth: int, size: int, *, pack: int = 1, position: int = 0
    ) -> Block:
        return Block(
            codec=self.name,
            part=part,
            depth=depth,
            position=position,
            start=0,
            size=size,
            pack=pack,
        )

    def to_json(self) -> dict[str, object]:
        """JSON values."""
        kind = next(name for name, cls in LAYOUTS.items() if isinstance(self.layout, cls))
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**data, "meta": dict(self.meta), "layout": {"kind": kind, **vars(self.layout)}}

    @classmethod
    def from_json(cls, data: Mapping) -> Rule:
        """From what `to_json` gave."""
        layout = dict(data["layout"])
        kind = LAYOUTS[layout.pop("kind")]
        layout = {k: tuple(v) if isinstance(v, list) else v for k, v in layout.items()}
        shape = None if data["shape"] is None else tuple(data["shape"])
        vocab = tuple(tuple(sizes) for sizes in data["vocab"])
        return cls(**{**data, "layout": kind(**layout), "shape": shape, "vocab": vocab})


def ids_of(stream: TokenStream, rule: Rule, blocks: Sequence[Block]) -> Tensor:
    """The ids [n] of a stream, in the rule's order.

    Raises:
        StreamError: more positions than the rule takes.
    """
    if rule.flatten == "octree":
        return _octree_ids(stream, rule, blocks)
    if stream.depth != rule.depth:
        stream = stream.depths(rule.depth)
    most = None if rule.most is None else rule.most * (rule.unit or 1)
    if most is not None and len(stream.codes) > most:
        raise StreamError(
            f"stream of '{stream.codec}' has {len(stream.codes)} positions, the model takes {most}"
        )
    starts = torch.tensor([b.start for b in blocks])
    if rule.tables:
        return stream.codes[:, 0] + starts[: len(stream.codes)]
    table = stream.codes + starts
    return table.flatten() if rule.flatten == "frame" else table.T.flatten()


def codes_of(ids: Tensor, rule: Rule, blocks: Sequence[Block]) -> list[Tensor]:
    """The codes [n, d] of each part from the ids of a block.

    Raises:
        StreamError: an id of another block, or a number of ids that no stream has.
    """
    if rule.flatten == "octree":
        return _octree_codes(ids, rule, blocks)
    if len(ids) % rule.depth or len(ids) == 0:
        raise StreamError(f"the block has {len(ids)} ids, expected a multiple of {rule.depth}")
    if rule.tables:
        if len(ids) > rule.tables:
            raise StreamError(f"the block has {len(ids)} ids, expected at most {rule.tables}")
        return [torch.stack([_codes(id[None], b) for id, b in zip(ids, blocks)])]
    order = "(n d) -> d n" if rule.flatten == "frame" else "(d n) -> d n"
    columns = rearrange(ids, order, d=rule.depth)
    return [torch.stack([_codes(column, b) for column, b in zip(columns, blocks)], dim=1)]


def _codes(ids: Tensor, block: Block) -> Tensor:
    codes = ids - block.start
    wrong = (codes < 0) | (codes >= block.size)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise StreamError(
            f"id {int(ids[place])} is not one of '{block.codec}' (part {block.part}, depth {block.depth}), "
            f"expected {block.start} to {block.stop - 1}"
        )
    return codes


def _octree_ids(stream: TokenStream, rule: Rule, blocks: Sequence[Block]) -> Tensor:
    problem = rule.layout.problem([p.codes for p in stream.parts], stream.grid)
    if problem:
        raise StreamError(f"stream of '{stream.codec}' {problem}")
    if rule.most is not None and len(stream.parts[-1].codes) > rule.most:
        raise StreamError(
            f"stream of '{stream.codec}' has {len(stream.parts[-1].codes)} codes, the model takes {rule.most}; "
            "larger shapes go through generators/octree.py"
        )
    ids = []
    for i, part in enumerate(stream.parts):
        own = [b for b in blocks if b.part == i]
        starts, pack = torch.tensor([b.start for b in own]), own[0].pack
        bits = rearrange(part.codes.flatten(), "(n bit) -> n bit", bit=pack)
        values = (bits << torch.arange(pack)).sum(1)
        ids.append((rearrange(values, "(n d) -> n d", d=len(starts)) + starts).flatten())
    return torch.cat(ids)


def _octree_codes(ids: Tensor, rule: Rule, blocks: Sequence[Block]) -> list[Tensor]:
    layout = rule.layout
    assert isinstance(layout, Octree)
    tables, start, nodes = [], 0, layout.first_count()
    for i, sizes in enumerate(rule.vocab):
        own = [b for b in blocks if b.part == i]
        pack = own[0].pack
        count = nodes * len(sizes) // pack
        if start + count > len(ids):
            raise StreamError(
                f"part {i} needs {count} ids for {nodes} nodes, but {len(ids) - start} are left"
            )
        rows = rearrange(ids[start : start + count], "(n d) -> d n", d=len(own))
        values = torch.stack([_codes(row, b) for row, b in zip(rows, own)], dim=1).flatten()
        bits = (values[:, None] >> torch.arange(pack)) & 1
        tables.append(rearrange(bits.flatten(), "(n d) -> n d", d=len(sizes)))
        start += count
        nodes = layout.next_count(int(tables[-1].sum()))
    if start != len(ids):
        raise StreamError(f"the octree is complete after {start} ids, the block has {len(ids)}")
    return tables
