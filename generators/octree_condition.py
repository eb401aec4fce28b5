"""Conditions of our own shape generators: a category's label, or the words of a name as hashed features.

A word's features are the signed, hashed counts of its letter groups (Joulin et al., fastText, arXiv 1612.03651, without
learnt vectors): no file and no other package is needed, and a word that was never seen resembles those that share its
letters. The network learns what the features mean.
Letters: L words, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUP = 3  # letters


@dataclass(frozen=True)
class Words:
    """Names as features.

    Args:
        width: F.
        most: the most words that are read.
    """

    width: int
    most: int

    def __call__(self, text: str) -> Tensor:
        """Features [L, F] of a text; unit rows.

        Raises:
            ValueError: a text without words.
        """
        words = text.lower().split()[: self.most]
        if not words:
            raise ValueError("the text has no words, expected a name such as 'office chair'")
        return torch.stack([self._word(word) for word in words])

    def to_json(self) -> dict[str, Any]:
        """JSON values for a header."""
        return {"kind": "words", "width": self.width, "most": self.most}

    def _word(self, word: str) -> Tensor:
        row = torch.zeros(self.width)
        framed = f"<{word}>"
        groups = [framed] + [framed[i : i + GROUP] for i in range(max(1, len(framed) - GROUP + 1))]
        for group in groups:
            number = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big")
            row[(number >> 1) % self.width] += 1 if number & 1 else -1
        return torch.nn.functional.normalize(row, dim=0)


@dataclass(frozen=True)
class Labels:
    """Categories by name."""

    names: tuple[str, ...]

    def __call__(self, name: str) -> int:
        """The label of a category.

        Raises:
            ValueError: an unknown one.
        """
        if name not in self.names:
            raise ValueError(f"unknown category {name!r}, expected one of {', '.join(self.names)}")
        return self.names.index(name)

    def to_json(self) -> dict[str, Any]:
        """JSON values for a header."""
        return {"kind": "labels", "names": list(self.names)}


def from_header(header: Mapping[str, Any]) -> Words | Labels | None:
    """What the header of a saved generator says about conditions; None where there are none.

    Raises:
        ValueError: a kind that this version does not know.
    """
    said: Mapping[str, Any] = header.get("condition") or {"kind": "none"}
    if said["kind"] == "none":
        return None
    if said["kind"] == "words":
        return Words(said["width"], said["most"])
    if said["kind"] == "labels":
        return Labels(_strings(said["names"]))
    raise ValueError(f"condition is {said['kind']!r}, expected words, labels or none")


def _strings(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(name) for name in names)
