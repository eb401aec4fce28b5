"""The one interface of all pruning methods: scores -> kept indices -> a compacted sequence.

- `Visual` holds the visual tokens of B items and what a method may need to know about them.
- A method gives a `Selection`: for each row the indices of the tokens that stay, ascending, none twice.
- `compact` takes the other tokens out of a sequence; positions stay as they were ("kept": distances in the picture
  survive) or go on without gaps ("packed": as the published methods do), and the index map says what came from where.

Rows may differ in length and in how much they keep; a row's result does not depend on its batch-mates.
B rows, n visual tokens, m kept ones, T positions of a sequence, D and d widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Keep: TypeAlias = "int | Sequence[int]"
Positions: TypeAlias = Literal["kept", "packed"]


@dataclass(frozen=True, kw_only=True)
class Visual:
    """Visual tokens.

    Args:
        features: [B, n, d].
        valid: [B, n], False at padding; None where all are real.
        cls_attention: [layers, B, n], what CLS pays to each token in each layer of the vision model: after the
            softmax, mean over heads, all layers (VTC-CLS).
        cls_logits: [B, n], the same of the last layer before the softmax (GlobalCom2).

    Raises:
        ValueError: shapes that do not belong together, or numbers that are not finite; names the token.
    """

    features: Tensor
    valid: Tensor | None = None
    cls_attention: Tensor | None = None
    cls_logits: Tensor | None = None

    def __post_init__(self):
        if self.features.ndim != 3:
            raise ValueError(f"features is {tuple(self.features.shape)}, expected [B, n, d]")
        rows = tuple(self.features.shape[:2])
        for name in ("valid", "cls_attention", "cls_logits"):
            given = getattr(self, name)
            if given is not None and tuple(given.shape[-2:]) != rows:
                raise ValueError(f"{name} is {tuple(given.shape)}, expected [..., B, n] = {rows}")
        self._finite("features", self.features.isfinite().all(-1))
        if self.cls_attention is not None:
            self._finite("cls_attention", self.cls_attention.isfinite().all(0))
        if self.cls_logits is not None:
            self._finite("cls_logits", self.cls_logits.isfinite())

    @property
    def real(self) -> Tensor:
        """[B, n], True at tokens that are no padding."""
        if self.valid is not None:
            return self.valid
        return torch.ones(self.features.shape[:2], dtype=torch.bool, device=self.features.device)

    @property
    def counts(self) -> list[int]:
        """Real tokens of each row."""
        if self.valid is None:
            return [self.features.shape[1]] * self.features.shape[0]
        return self.valid.sum(1).tolist()

    def wanted(self, keep: Keep) -> list[int]:
        """How many tokens each row keeps.

        Raises:
            ValueError: more than a row has, or less than none.
        """
        counts = self.counts
        numbers = [keep] * len(counts) if isinstance(keep, int) else list(keep)
        if len(numbers) != len(counts):
            raise ValueError(f"keep has {len(numbers)} numbers for {len(counts)} rows")
        for row, (m, n) in enumerate(zip(numbers, counts)):
            if not 0 <= m <= n:
                raise ValueError(f"keep is {m}, but row {row} has {n} tokens; expected 0 to {n}")
        return numbers

    def _finite(self, name: str, good: Tensor) -> None:
        bad = ~good & self.real
        if bool(bad.any()):
            row, token = bad.nonzero()[0].tolist()
            raise ValueError(f"{name} of row {row}, token {token} is NaN or infinite")


@dataclass(frozen=True)
class Selection:
    """What stays.

    Args:
        indices: [B, m] into each row's tokens, ascending; -1 behind the last where a row keeps fewer than m.
    """

    indices: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Selection:
        """From a mask [B, n], True where a token stays."""
        most = int(mask.sum(1).max()) if mask.shape[0] else 0
        first = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        return cls(first.where(mask.gather(1, first), -1))

    @property
    def valid(self) -> Tensor:
        """[B, m], False behind a row's last token."""
        return self.indices >= 0

    @property
    def counts(self) -> list[int]:
        """How many each row keeps."""
        return self.valid.sum(1).tolist()

    def mask(self, n: int) -> Tensor:
        """[B, n], True where a token stays."""
        spread = self.indices.new_zeros(len(self.indices), n + 1, dtype=torch.bool)
        return spread.scatter(1, self.indices.where(self.valid, n), True)[:, :n]

    def take(self, x: Tensor) -> Tensor:
        """The kept rows [B, m, d] of x [B, n, d]; zeros where a row keeps fewer."""
        rows = x.gather(1, self.indices.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
        return rows.where(self.valid[..., None], 0)


def budget(share: float, counts: Sequence[int]) -> list[int]:
    """How many of `counts` tokens a share is, rounded as Python rounds, and at least one of any.

    Raises:
        ValueError: a share that is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected more than 0 and at most 1")
    return [max(min(n, 1), round(share * n)) for n in counts]


def top(visual: Visual, scores: Tensor, keep: Keep) -> Selection:
    """The tokens with the highest scores [B, n]; of equal ones the first."""
    number = torch.tensor(visual.wanted(keep), device=scores.device)
    order = scores.masked_fill(~visual.real, -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return Selection.of(ranks < number[:, None])


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """A sequence without the tokens that left.

    Args:
        x: [B, T', D], zeros behind a row's last position.
        positions: [B, T'], what the transformer is to be given.
        index: [B, T'], the place in the sequence before; -1 behind a row's last position.
    """

    x: Tensor
    positions: Tensor
    index: Tensor

    @property
    def counts(self) -> list[int]:
        """Positions of each row."""
        return (self.index >= 0).sum(1).tolist()


def compact(
    x: Tensor, keep: Tensor, *, at: Tensor | None = None, positions: Positions = "packed"
) -> Compacted:
    """Take out what does not stay.

    Args:
        x: [B, T, D].
        keep: [B, T], True where a position stays (`kept_places`); False at padding.
        at: [B, T], the positions before; 0, 1, 2, ... where None.
        positions: "kept" or "packed" (counted anew from each row's first).
    """
    chosen = Selection.of(keep)
    if at is None:
        at = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    moved = at.gather(1, chosen.indices.clamp(min=0))
    if positions == "packed":
        moved = moved[:, :1] + torch.arange(moved.shape[1], device=x.device)
    moved = moved.where(chosen.valid, moved[:, :1])
    return Compacted(x=chosen.take(x), positions=moved, index=chosen.indices)


def kept_places(visual: Tensor, selection: Selection, *, real: Tensor | None = None) -> Tensor:
    """[B, T], True at what stays of a sequence: all that is not visual, and the selected visual tokens.

    Args:
        visual: [B, T], True at the places of visual tokens; the j-th of a row is token j of the selection.
        real: [B, T], False at padding, which does not stay.

    Raises:
        ValueError: the selection has a token that the sequence does not.
    """
    counts = visual.sum(1)
    tokens = max(int(counts.max()), 1)
    if selection.indices.shape[1] and bool((selection.indices.amax(1) >= counts).any()):
        raise ValueError("the selection names tokens behind the sequence's last visual one")
    number = (visual.cumsum(1) - 1).clamp(0, tokens - 1)
    stays = selection.mask(tokens).gather(1, number)
    keep = ~visual | stays
    return keep if real is None else keep & real
