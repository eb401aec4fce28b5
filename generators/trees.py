"""Draft trees: what a drafter proposes behind the last id, and how a target sees all of it in one pass.

- `Dynamic` (EAGLE-2, arXiv 2406.16858): the likeliest ids of the likeliest branches, best `nodes` of all. A function of
  what stands before.
- `Static` (EAGLE, arXiv 2401.15077; LANTERN++, arXiv 2502.06352): a fixed shape; siblings are drawn without replacement
  from the drafter's law, which is kept for verification. Without randomness (temperature 0) they are its likeliest.

Rows of a batch have trees of different size: they are padded, and padding sees only itself. Node 0 is the root, the
last id that was written and that no forward pass has seen yet.

B rows, N nodes (root and padding included), K beams, n ids of a law.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Children of the nodes of each level, in order; the rest of a level has none (EAGLE's and LANTERN's named trees).
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "chain": ((1,), (1,), (1,), (1,), (1,)),
    "mc_sim_7b_63": ((4,), (3, 2, 2, 1), (3, 2, 2, 1), (3,), (2,)),
    "mc_sim_7b_63_balanced": ((3,), (3, 3, 2), (3, 2, 0, 2, 2), (3,), (2,)),
    "reverse_balanced_25": ((3,), (2, 1, 1), (3, 2, 1), (3, 2), (4, 3)),
    "naive_extend_57": (
        (5,),
        (4, 3, 3, 2, 1),
        (4, 3, 3, 2, 2, 1, 0, 1),
        (4, 3, 2, 1, 2, 1, 0, 1),
        (3, 2, 0, 0, 2, 1, 0, 1),
    ),
    "medusa_2_7b_63": (
        (10,),
        (10, 5, 2, 2, 1, 1, 1, 1),
        (9, 4, 2, 1, 1, 1, 0, 0, 0, 0, 3, 1, 0, 0, 0, 1),
        (4, 1, 1, 0, 0, 0, 0, 0, 0, 1),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """A tree of the best branches.

    Args:
        depth: levels of ids.
        width: beams of a level, and children of a node.
        nodes: ids of the tree, the root not counted.
    """

    depth: int = 5
    width: int = 10
    nodes: int = 58

    def __post_init__(self):
        for name in ("depth", "width", "nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a tree is {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class Static:
    """A tree of fixed shape, its ids drawn.

    Args:
        shape: a name in `SHAPES`, or the children of the nodes of each level.
    """

    shape: str | tuple[tuple[int, ...], ...] = "naive_extend_57"

    def __post_init__(self):
        if isinstance(self.shape, str) and self.shape not in SHAPES:
            raise ValueError(f"the tree {self.shape!r} is none of {', '.join(SHAPES)}")
        width = 1
        for level in self.levels:
            if not level or len(level) > width or min(level) < 0 or sum(level) == 0:
                raise ValueError(
                    f"a level of the tree has children {level}, expected 1 to {width} counts"
                )
            width = sum(level)

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Children of the nodes of each level."""
        return SHAPES[self.shape] if isinstance(self.shape, str) else self.shape

    @property
    def depth(self) -> int:
        """Levels of ids."""
        return len(self.levels)


@dataclass
class Tree:
    """One row's tree, as lists over its nodes; parents stand before their children.

    Args:
        ids, parents: of each node; -1 is the root's parent.
        chances: probability of each id under the drafter's law at its parent.
        laws: node -> the drafter's law [n] at that node, where its children were drawn from it.
    """

    ids: list[int]
    parents: list[int]
    chances: list[float]
    laws: dict[int, Tensor] = field(default_factory=dict)
    children: list[list[int]] = field(init=False)
    depths: list[int] = field(init=False)

    def __post_init__(self):
        self.children = [[] for _ in self.ids]
        self.depths = [0] * len(self.ids)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                self.children[parent].append(node)
                self.depths[node] = self.depths[parent] + 1

    def __len__(self) -> int:
        return len(self.ids)

    def values(self) -> list[float]:
        """How many ids are expected to stand once a node does, itself included, were the drafter right."""
        values = [1.0] * len(self)
        for node in range(len(self) - 1, 0, -1):
            if self.parents[node] > 0:
                values[self.parents[node]] += self.chances[node] * values[node]
        return values


def padded(trees: list[Tree], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Trees as tensors: ids [B, N], depths [B, N], ancestors [B, N, N] (each node and padding sees itself)."""
    width = max(map(len, trees))

    def table(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in lists], device=device)

    ids, depths = table([t.ids for t in trees], 0), table([t.depths for t in trees], 0)
    parents = table([t.parents for t in trees], -1)
    seen = torch.eye(width, dtype=torch.bool, device=device).repeat(len(trees), 1, 1)
    index = parents.clamp(min=0)[..., None].expand(-1, -1, width)
    inner = (parents >= 0)[..., None]
    for _ in range(max(max(t.depths) for t in trees)):
        seen = seen | (seen.gather(1, index) & inner)
    return ids, depths, seen


def best(scores: Tensor, parents: Tensor, nodes: int) -> list[list[int]]:
    """The `nodes` best of each row's candidates, in their order, which is that of levels.

    Args:
        scores: log-probabilities of whole branches [B, M]; -inf for none.
        parents: [B, M], candidates' numbers, -1 for the root. A parent's score is no less than its child's.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :nodes]
    found = scores.gather(1, order) > -torch.inf
    return [sorted(row[ok].tolist()) for row, ok in zip(order, found)]


def drawn(law: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """`count` different places [E, count] a row of laws [E, n], drawn one after another; -1 where a law has no more."""
    count = min(count, law.shape[1])
    places = torch.multinomial(law, count, replacement=False, generator=rng)
    return torch.where(law.gather(1, places) > 0, places, -1)


def conditional(law: Tensor, places: Tensor) -> Tensor:
    """Probability of each draw [E, count] given those before it."""
    own = law.gather(1, places.clamp(min=0)) * (places >= 0)
    return (own / (1 - (own.cumsum(1) - own)).clamp(min=1e-12)).clamp(0, 1)
