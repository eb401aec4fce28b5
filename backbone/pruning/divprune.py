"""DivPrune (arXiv 2503.02175): the tokens that differ most, by a greedy solution of the max-min diversity problem.

The first token is the one whose nearest neighbour is farthest, then always the one that is farthest from all chosen
so far; distance is 1 - cosine. No training, no text, no attention maps: any features will do.

- No token is chosen twice. Where fewer directions than m exist, all of them are chosen first, then repetitions, in
  order; the published code returns one index several times.
- A vector of zeros has no direction: such tokens come last (the published code's distances become NaN).
- Distances below 1e-6 are rounding and count as 0, ties go to the lower index: the result is defined.

The n x n distances are kept where they are small (`table`); otherwise rows are computed as they are needed, with
memory O(n) beside the features and time O(n^2 d) for the first token, O(n m d) for the others.

B rows, n tokens, m chosen, d features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .select import Keep, Selection, Visual

ROUNDING = 1e-6  # float32 products of unit vectors differ by less
TABLE = 2**24  # distances that may be held at once (64 MiB)
LAST, NEVER = -1.0, -2.0  # below every distance: vectors of zeros; padding and what is chosen


def select(visual: Visual, keep: Keep, *, table: int = TABLE) -> Selection:
    """The m most diverse tokens of each row.

    Args:
        table: the most distances to hold at once.

    Raises:
        ValueError: keep is more than a row has.
    """
    number = torch.tensor(visual.wanted(keep), device=visual.features.device)
    chosen = order(visual, keep, table=table)
    n = visual.features.shape[1]
    steps = torch.arange(chosen.shape[1], device=chosen.device)
    spread = chosen.where(steps < number[:, None], n)
    mask = torch.zeros(len(chosen), n + 1, dtype=torch.bool, device=chosen.device)
    return Selection.of(mask.scatter_(1, spread, True)[:, :n])


def order(visual: Visual, keep: Keep, *, table: int = TABLE) -> Tensor:
    """[B, max m], the tokens in the order in which they are chosen; a row's entries behind its own m mean nothing."""
    wanted = visual.wanted(keep)
    x = visual.features.float()
    length = x.norm(dim=-1, keepdim=True)
    directions = x / length.clamp(min=torch.finfo(x.dtype).tiny)
    usable = visual.real & (length[..., 0] > 0)
    distances = _Distances(directions, usable, table)
    # What a token has when nothing is chosen yet; negative numbers survive every minimum.
    rank = torch.full(usable.shape, LAST, device=x.device).masked_fill(~visual.real, NEVER)
    gap = distances.nearest().where(usable, rank)
    found = []
    for step in range(max(wanted, default=0)):
        pick = gap.argmax(1, keepdim=True)
        found.append(pick)
        row = distances.row(pick)
        gap = row.where(usable, rank) if step == 0 else torch.minimum(gap, row, out=gap)
        # Tokens that were chosen before keep NEVER through every minimum.
        gap.scatter_(1, pick, NEVER)
    return (
        torch.cat(found, 1) if found else torch.empty(len(x), 0, dtype=torch.long, device=x.device)
    )


class _Distances:
    """1 - cosine between directions [B, n, d]: from one table, or row by row."""

    def __init__(self, directions: Tensor, usable: Tensor, table: int):
        rows, n, _ = directions.shape
        self.directions, self.usable = directions, usable
        self.piece = max(1, min(n, table // max(rows * n, 1)))
        self.table = self._between(slice(0, n)) if self.piece == n else None
        self.rows = torch.arange(rows, device=directions.device)[:, None]

    def nearest(self) -> Tensor:
        """[B, n], the distance to the nearest other usable token; infinite where there is none."""
        n = self.directions.shape[1]
        parts = []
        for start in range(0, n, self.piece):
            part = slice(start, min(start + self.piece, n))
            near = self._between(part) if self.table is None else self.table
            near = near.masked_fill(~self.usable[:, None], torch.inf)
            own = torch.arange(part.start, part.stop, device=near.device)
            near[:, own - start, own] = torch.inf
            parts.append(near.amin(-1))
        return torch.cat(parts, 1) if parts else self.usable.float()

    def row(self, pick: Tensor) -> Tensor:
        """[B, n], the distances of all tokens to one of each row, pick [B, 1]."""
        if self.table is not None:
            return self.table[self.rows, pick][:, 0]
        one = self.directions[self.rows, pick]
        return _snapped((self.directions @ one.transpose(1, 2))[..., 0])

    def _between(self, part: slice) -> Tensor:
        return _snapped(self.directions[:, part] @ self.directions.transpose(1, 2))


def _snapped(cosine: Tensor) -> Tensor:
    """1 - cosine, 0 where it is nothing but rounding."""
    return F.threshold_(cosine.neg_().add_(1), ROUNDING, 0.0)
