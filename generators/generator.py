"""What every decoding method takes and gives: requests in, events out, one by one; closing the iterator cancels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backbone.grammar import State


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to go on with.

    Args:
        ids: [L], what stands before; prefix streams and primes are part of it.
        embeddings: [P, D], a condition that stands before the ids (LlamaGen's class or caption).
        null_ids, null_embeddings: the same without the condition, where guidance is wanted.
        state: where the grammar stands after `ids`; None for free text.
        max_tokens: the most ids to write.
        end: an id that ends free text.
    """

    ids: Tensor | None = None
    embeddings: Tensor | None = None
    null_ids: Tensor | None = None
    null_embeddings: Tensor | None = None
    state: State | None = None
    max_tokens: int
    end: int | None = None

    @property
    def has_null(self) -> bool:
        """Whether guidance is possible."""
        return self.null_ids is not None or self.null_embeddings is not None


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Positions to fill in any order (masked generation), where a `Request` goes on from the left.

    Args:
        codes: [N], what stands already and stays (a prime, frozen tokens); -1 where to write.
        grid: what the positions mean, such as (T, h, w); () where they have no geometry.
        condition: a class [] or ids [L] (integers), or features [L, d]; None for none, which is also the null of
            guidance.
    """

    codes: Tensor
    grid: tuple[int, ...] = ()
    condition: Tensor | None = None

    def __post_init__(self):
        if self.codes.ndim != 1 or self.codes.is_floating_point():
            raise ValueError(
                f"codes are {self.codes.dtype} of shape {tuple(self.codes.shape)}, expected integers [positions]"
            )
        if self.grid and prod(self.grid) != len(self.codes):
            raise ValueError(f"{len(self.codes)} codes for the grid {self.grid}")


class Event(NamedTuple):
    """What one step wrote for one request.

    Args:
        request: its number.
        ids: written since its last event; () where positions are filled in any order.
        total: written in all, and not taken back.
        reason: "end" or "length" where the request is finished, else None.
        codes: the whole canvas, -1 where it is open; None where ids are written in order.
    """

    request: int
    ids: tuple[int, ...]
    total: int
    reason: str | None = None
    codes: Tensor | None = None


class Generator(Protocol):
    """A decoding method."""

    def run(
        self,
        requests: Sequence[Any],
        options: Any = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> Iterator[Event]:
        """Go on with the requests (`Request` or `Canvas`). `rng`: one generator each; None draws each from seed 0."""
        ...
