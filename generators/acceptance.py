"""Acceptance: which drafted ids stand, and what is drawn where none does. Rules on laws, without any model.

At a node of a draft tree the model has a law p (after guidance, temperature and truncation) and the drafter has
proposed siblings x_1 ... x_m, either its likeliest ids (dynamic trees, q is None) or draws without replacement from its
own law q (static trees).

`Ladder` tests siblings one after another. Without relaxation it is exact: the id that is emitted has the law p. With
one it is LANTERN (arXiv 2410.03355) or LANTERN++ (arXiv 2502.06352) to the letter, whose nominal delta is *not* a bound
on the emitted law: siblings spend it again and again, more is taken away after a rejection than was given, and the
target depends on the draw.

`pulled` is ours, with a bound that holds ("certified"). Let S be the siblings, however they came about, and e_S the law
of what the exact ladder emits given S; over the drafter's draws its mean is p. The certified law moves mass from ids y
outside S to neighbours x in S, once for all siblings together, before anything is accepted:

    r_S = e_S - (mass taken from ids y) + (the same mass given to neighbours x),   mass <= delta

and emits exactly r_S. Therefore, whatever was drafted, for any number of siblings, with guidance and truncation already
inside p, the law of the emitted id given what stands before it is E_S[r_S], and

    TV(E_S[r_S], p) = TV(E_S[r_S], E_S[e_S]) <= E_S[TV(r_S, e_S)] <= E_S[mass] <= delta.

- Some sibling stands with probability e_S(S) + min(delta, e_S of all neighbours outside S), and no law within delta of
  e_S that moves mass between neighbours only has more. Mass is split where a whole neighbour would exceed the budget.
- Likeliest siblings (q None) are a function of what stands before: e_S = p. To emit r_S is to draw from it and to see
  whether the id is among the siblings.
- Drawn siblings: e_S outside S is the last rest of the ladder, times the probability R that all siblings are rejected.
  So the ladder runs as ever, and only where it ends without a sibling up to delta / R of its rest is pulled.
- Over a sequence: let e_t be the mass that is moved when the t-th id is chosen, given all before, rejections included.
  Couple both ways of writing as well as possible step by step; they part there with probability at most e_t, so
  TV(sequences) <= E[sum e_t]. `Ledger` keeps sum e_t <= total on every path; e_t may depend on the past in any way.

n ids that may come (a law has n numbers), m siblings, k neighbours. Places are indices into a law; -1 is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Published:
    """The published relaxation: the longest run of nearest neighbours whose mass stays within a limit.

    Args:
        k: neighbours that may be merged. After a rejection one more is emptied, as published.
        delta: the limit (LANTERN), up to 1.
        factor: or, where given, the limit is (factor - 1) p(x) (LANTERN++), more than 1.
    """

    k: int = 1000
    delta: float = 0.1
    factor: float | None = None

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k is {self.k}, expected 1 or more")
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta is {self.delta}, expected 0 to 1; a factor goes in `factor`")
        if self.factor is not None and self.factor <= 1:
            raise ValueError(f"factor is {self.factor}, expected more than 1")

    def merged(self, p: Tensor, x: int, near: Tensor) -> tuple[float, int]:
        """The mass that x receives from its neighbours `near` [k + 1] under p [n], and from how many."""
        known = near[: self.k][near[: self.k] >= 0]
        running = p[known].cumsum(0)
        limit = self.delta if self.factor is None else (self.factor - 1) * float(p[x])
        count = int((running <= limit).sum())
        return (float(running[count - 1]) if count else 0.0), count


class Ladder:
    """One node's siblings, tested one after another with `u <= chance`.

    Args:
        p: the model's law [n].
        q: the drafter's [n], where siblings are drawn from it; None where they are its likeliest.
        relaxation: the published rule; None for exactness.
    """

    def __init__(self, p: Tensor, q: Tensor | None = None, relaxation: Published | None = None):
        self.rest, self.q, self.relaxation = p, q, relaxation

    def chance(self, x: int, near: Tensor | None = None, *, drafted: float | None = None) -> float:
        """With which probability x stands (may exceed 1).

        Args:
            near: its neighbours [k + 1].
            drafted: its probability among what was left to draw; q's own where None.
        """
        own = float(self.rest[x]) + self._merged(x, near)[0]
        if self.q is None:
            return own
        drafted = float(self.q[x]) if drafted is None else drafted
        return own / drafted if drafted > 0 else 0.0

    def reject(self, x: int, near: Tensor | None = None) -> None:
        """What is left after x did not stand."""
        emptied = torch.empty(0, dtype=torch.int64, device=self.rest.device)
        if near is not None and self.relaxation is not None and self._merged(x, near)[1]:
            emptied = near[: self.relaxation.k + 1]
            emptied = emptied[emptied >= 0]
        taken = torch.tensor([x], device=self.rest.device)
        if self.q is None:
            self.rest = _normal(self.rest.index_fill(0, torch.cat([taken, emptied]), 0))
            return
        self.rest = _normal((self.rest - self.q.index_fill(0, emptied, 0)).clamp(min=0))
        self.q = _normal(self.q.index_fill(0, taken, 0))

    def _merged(self, x: int, near: Tensor | None) -> tuple[float, int]:
        if self.relaxation is None or near is None:
            return 0.0, 0
        return self.relaxation.merged(self.rest, x, near)


def passes(p: Tensor, x: int, near: Tensor, rule: Published) -> bool:
    """The published rule without randomness: x is the likeliest id once it has its neighbours' mass."""
    raised = p.clone()
    raised[x] += rule.merged(p, x, near)[0]
    return int(raised.argmax()) == x


def emitted(
    p: Tensor,
    siblings: Sequence[int],
    near: Tensor | None = None,
    distances: Tensor | None = None,
    *,
    q: Tensor | None = None,
    relaxation: Published | None = None,
    budget: float = 0.0,
) -> tuple[Tensor, float]:
    """The exact law [n] of the id that is emitted, over all branches, and how probably a sibling stands.

    Args:
        near, distances: neighbours of each sibling, [m, k]; one column more for a published rule.
        relaxation: the published rule, or
        budget: of the certified one.
    """
    ladder, left = Ladder(p, q, relaxation), 1.0
    law = torch.zeros_like(p)
    for i, x in enumerate(siblings):
        own = None if near is None or relaxation is None else near[i]
        chance = min(1.0, ladder.chance(x, own))
        law[x] += left * chance
        left *= 1 - chance
        if left <= 0:
            break
        ladder.reject(x, own)
    if left > 0:
        rest = ladder.rest
        if budget > 0 and near is not None and distances is not None:
            some = torch.tensor([list(siblings)], device=p.device)
            share = p.new_tensor([min(1.0, budget / left)])
            rest = pulled(rest[None], some, near[None], distances[None], share).law[0]
        law = law + left * rest
    return law, float(law[list(siblings)].sum())


class Moved(NamedTuple):
    """A certified law [..., n], and the mass [...] that was moved: TV(law, p) <= mass <= budget."""

    law: Tensor
    mass: Tensor


def pulled(
    p: Tensor,
    siblings: Tensor,
    near: Tensor,
    distances: Tensor,
    budget: Tensor,
    *,
    values: Tensor | None = None,
    price: Tensor | None = None,
) -> Moved:
    """Pull up to `budget` of the mass of siblings' neighbours onto the siblings.

    A unit of mass that moves from y to x gains values[x] - values[y] accepted ids (values are 0 outside the siblings).
    Each y goes to the sibling where it gains most, the nearest of those; largest gains go first, until the budget is
    spent. For a given budget no other set of such moves gains more.

    Args:
        p: laws [B, n].
        siblings: places [B, m], -1 for none.
        near, distances: neighbours of each sibling [B, m, k], places, -1 for none.
        budget: [B].
        values: ids that are expected to be accepted once a sibling stands, itself included, [B, m]; ones where None.
        price: the least gain that is worth its mass, [B].
    """
    rows, n = p.shape
    slots = torch.where(siblings < 0, n, siblings)
    values = torch.ones_like(slots, dtype=torch.float32) if values is None else values.float()
    values = torch.where(siblings < 0, 0, values)
    worth = p.new_zeros(rows, n + 1, dtype=torch.float32).scatter(1, slots, values)
    sources = torch.where((near < 0) | (siblings < 0)[..., None], n, near).flatten(1)
    gains = (values[..., None] - worth.gather(1, sources).view(near.shape)).flatten(1)
    least = 0.0 if price is None else price[:, None]
    useful = (gains > 0) & (gains >= least) & (sources < n)
    sources = torch.where(useful, sources, n)
    order = distances.flatten(1).argsort(dim=-1, stable=True)
    gains = torch.where(useful, gains, -torch.inf).gather(1, order)
    order = order.gather(1, gains.argsort(dim=-1, descending=True, stable=True))
    sources = sources.gather(1, order)
    targets = slots.gather(1, order // near.shape[2])
    # Of the moves that one source could make only the first is made.
    ranks = torch.arange(sources.shape[1], device=p.device).expand_as(sources)
    first = ranks.new_full((rows, n + 1), sources.shape[1])
    first = first.scatter_reduce(1, sources, ranks, "amin")
    chosen = (first.gather(1, sources) == ranks) & (sources < n)
    wide = F.pad(p, (0, 1))
    amounts = torch.where(chosen, wide.gather(1, sources), 0)
    amounts = within(amounts, budget)
    law = wide.scatter_add(1, sources, -amounts).scatter_add(1, targets, amounts)
    return Moved(law[:, :n].clamp(min=0), amounts.sum(1))


def within(amounts: Tensor, budget: Tensor) -> Tensor:
    """The first amounts [B, n] of each row that fit its budget [B], the one that crosses it in part."""
    before = amounts.cumsum(1) - amounts
    return torch.minimum(amounts, (budget[:, None] - before).clamp(min=0))


@dataclass
class Ledger:
    """What a sequence may still spend, and at which gain it does.

    Without a total every id may spend `delta`. With one, the price of mass rises while more is spent than an even
    pace allows and falls while less is, so that it goes where it buys most accepted ids.

    Args:
        delta: the most for one id.
        total: the most for the sequence; None for no limit.
        length: ids that are expected.
        pace: how fast the price follows; 0 spends until nothing is left.
    """

    delta: float
    total: float | None = None
    length: int = 1
    pace: float = 0.1
    spent: float = 0.0
    price: float = 0.0

    @property
    def allowance(self) -> float:
        """The most that the next id may spend."""
        return (
            self.delta if self.total is None else max(0.0, min(self.delta, self.total - self.spent))
        )

    def share(self, rejected: float) -> float:
        """The same as a share of what is left to draw from, once siblings were rejected with this probability."""
        most = min(1.0, self.delta / max(rejected, 1e-12))
        return most if self.total is None else max(0.0, min(most, self.total - self.spent))

    def spend(self, mass: float) -> None:
        """Note what an id has cost."""
        self.spent += mass
        if self.total:
            self.price = max(0.0, self.price + self.pace * (mass * self.length / self.total - 1))


def _normal(law: Tensor) -> Tensor:
    """Sums to 1; uniform where nothing is left (as published)."""
    total = law.sum()
    return law / total if float(total) > 0 else torch.full_like(law, 1 / len(law))
