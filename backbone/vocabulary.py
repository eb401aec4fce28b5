"""Vocabulary: which id means what. Text, specials, and one block of ids for each codec, part and depth.

Everything comes from data (JSON), nothing from constants in code: published layouts differ, and MIO's block order is
only known from its tokenizer file. A block with `pack` above 1 holds several bits in one id (octrees).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class VocabularyError(ValueError):
    """Blocks overlap, an id belongs to nothing, or a name is unknown."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Ids `start` ... `start + size - 1` are the values of one depth of one part of one codec's streams.

    Args:
        codec: `system/variant`, without a fingerprint.
        depth: the depth, or the first of the `pack` depths that one id holds.
        position: the position, where each has a table of its own; else 0.
        pack: how many bits one id holds; 1 where an id is a code.
    """

    codec: str
    part: int = 0
    depth: int = 0
    position: int = 0
    start: int
    size: int
    pack: int = 1

    @property
    def stop(self) -> int:
        """One past the last id."""
        return self.start + self.size


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Specials by name, and blocks. `size` is the model's vocabulary; ids that nothing owns are allowed."""

    size: int
    specials: Mapping[str, int]
    blocks: tuple[Block, ...]

    def __post_init__(self):
        spans = [(b.start, b.stop, f"{b.codec} part {b.part} depth {b.depth}") for b in self.blocks]
        spans += [(i, i + 1, name) for name, i in self.specials.items()]
        end, before = 0, ""
        for start, stop, what in sorted(spans):
            if start < end:
                raise VocabularyError(f"id {start} belongs to {before} and to {what}")
            end, before = stop, what
        if end > self.size:
            raise VocabularyError(f"{before} ends at id {end}, the vocabulary has {self.size}")

    @classmethod
    def build(
        cls, specials: Sequence[str], blocks: Sequence[Block], *, multiple: int = 1
    ) -> Vocabulary:
        """Lay out specials first, then the blocks one after another; their `start` is set here.

        Args:
            multiple: the size is rounded up to a multiple of it (fast matrix shapes).
        """
        placed, start = [], len(specials)
        for block in blocks:
            placed.append(dataclasses.replace(block, start=start))
            start += block.size
        size = -(-start // multiple) * multiple
        names = {name: i for i, name in enumerate(specials)}
        return cls(size=size, specials=names, blocks=tuple(placed))

    def special(self, name: str) -> int:
        """The id of a special."""
        if name not in self.specials:
            known = ", ".join(self.specials)
            raise VocabularyError(f"the vocabulary has no special {name!r}, it has {known}")
        return self.specials[name]

    def of(self, codec: str) -> tuple[Block, ...]:
        """The blocks of a codec (`system/variant`), by part, position and depth."""
        found = [b for b in self.blocks if b.codec == codec]
        if not found:
            known = ", ".join(dict.fromkeys(b.codec for b in self.blocks))
            raise VocabularyError(f"the vocabulary has no block of codec {codec!r}, it has {known}")
        return tuple(sorted(found, key=lambda b: (b.part, b.position, b.depth)))

    def name(self, id: int) -> str:
        """What an id is, for error messages: `</image>`, or `onedpiece/mini:17`."""
        for name, i in self.specials.items():
            if i == id:
                return name
        for b in self.blocks:
            if b.start <= id < b.stop:
                place = f"/{b.part}.{b.depth}" if b.part or b.depth else ""
                return f"{b.codec}{place}:{id - b.start}"
        return f"unused id {id}"

    def to_json(self) -> dict[str, object]:
        """JSON values."""
        blocks = [dataclasses.asdict(b) for b in self.blocks]
        return {"size": self.size, "specials": dict(self.specials), "blocks": blocks}

    @classmethod
    def from_json(cls, data: Mapping) -> Vocabulary:
        """From what `to_json` gave."""
        try:
            blocks = tuple(Block(**b) for b in data["blocks"])
            return cls(size=data["size"], specials=dict(data["specials"]), blocks=blocks)
        except (KeyError, TypeError) as error:
            raise VocabularyError(f"not a vocabulary: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")
