"""What every decoding method takes and gives: requests in, events out, one by one; closing the iterator cancels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


class Event(NamedTuple):
    """What one step wrote for one request.

    Args:
        request: its number.
        ids: written since its last event.
        total: written in all.
        reason: "end" or "length" where the request is finished, else None.
    """

    request: int
    ids: tuple[int, ...]
    total: int
    reason: str | None = None


class Generator(Protocol):
    """A decoding method."""

    def run(
        self,
        requests: Sequence[Request],
        options: Any = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> Iterator[Event]:
        """Go on with the requests. `rng`: one generator a request; None draws each from seed 0."""
        ...
