"""Drafting: how a batch of requests gets its trees from one drafter, dynamic or static, under the grammar.

Every level of all trees is one pass of the drafter; nodes at which the same ids may come are scored together.

B rows; R rows of the drafter's cache, which are more where requests are guided; K beams; D width; n ids that may come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backbone.grammar import Grammar, Range, State
from ..backbone.transformer import Transformer
from .acceptance import Ledger
from .autoregressive import Autoregressive, Options, _at, _nulls, _Row
from .drafter import Drafter, DrafterError, Session
from .sampling import Sampling, guided, probabilities
from .trees import Dynamic, Static, Tree, best, conditional, drawn

Ranges = tuple[Range, ...]


@dataclass
class _Draft(_Row):
    """A request in progress, with its tree.

    `feed` begins with the root, the last id that the model has not seen; what the grammar forced follows it.
    """

    ledger: Ledger = field(default_factory=lambda: Ledger(0.0))
    anchor: State | None = None  # before feed[0]
    tree: Tree = field(default_factory=lambda: Tree([0], [-1], [1.0]))
    path: list[int] = field(default_factory=lambda: [0])  # nodes that stand

    @property
    def node(self) -> int:
        return self.path[-1]


class Drafting(Autoregressive):
    """The half of speculative decoding that proposes.

    Args:
        model: fused here.
        drafter: of this very model; fused here.
        shape: of the trees.
    """

    def __init__(
        self,
        model: Transformer,
        drafter: Drafter,
        grammar: Grammar | None,
        shape: Dynamic | Static,
        *,
        rows: int | None = None,
    ):
        super().__init__(model, grammar, rows=rows)
        if drafter.target is not model:
            raise DrafterError("the drafter belongs to another target than the model that is given")
        self.drafter, self.shape = drafter.fuse(), shape

    def _propose(
        self, rows: list[_Draft], session: Session, ahead: Tensor, options: Options
    ) -> None:
        """Give each row its tree. `ahead` [R, D]: the roots' states as predicted."""
        # The last id that can be written is never read. Each row has its own depth, whatever its batch-mates' is.
        useful = [len(r.feed) - 2 + r.request.max_tokens - r.written for r in rows]
        grow = self._grow if isinstance(self.shape, Dynamic) else self._cast
        for row, tree in zip(rows, grow(rows, session, ahead, options, useful)):
            row.tree, row.path = tree, [0]

    def _grow(
        self,
        rows: list[_Draft],
        session: Session,
        ahead: Tensor,
        options: Options,
        useful: list[int],
    ) -> list[Tree]:
        """Dynamic trees."""
        shape = self.shape
        assert isinstance(shape, Dynamic)
        nulls, width = _nulls(rows), shape.width
        states = [[self._after(row.anchor, row.feed[0])] for row in rows]
        outs, scores = ahead[:, None], torch.zeros(len(rows), 1, device=ahead.device)
        beams = torch.full_like(scores, -1, dtype=torch.int64)
        seen = torch.zeros(len(rows), 1, 0, dtype=torch.bool, device=ahead.device)
        every: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        count = 0
        depth = min(shape.depth, max(useful))
        for level in range(depth):
            ids, logs = self._likeliest(rows, outs, states, options, width)
            ended = torch.tensor([level >= most for most in useful], device=logs.device)
            logs = logs.masked_fill(ended[:, None, None], -torch.inf)
            totals = (scores[..., None] + logs).flatten(1)
            every.append(
                (ids.flatten(1), beams.repeat_interleave(width, 1), logs.flatten(1), totals)
            )
            if level + 1 == depth:
                break
            top = totals.topk(min(width, totals.shape[1]))
            scores, parent = top.values, top.indices // width
            ids = ids.flatten(1).gather(1, top.indices)
            beams = count + top.indices
            count += totals.shape[1]
            states = self._advanced(states, parent, ids, scores)
            eye = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
            before = seen.gather(1, parent[..., None].expand(-1, -1, seen.shape[2]))
            seen = torch.cat([before, eye.expand(len(rows), -1, -1)], 2)
            index = _doubled(parent, nulls)[..., None].expand(-1, -1, outs.shape[2])
            outs = session.branch(
                _doubled(ids, nulls), outs.gather(1, index), _doubled(seen, nulls), level + 1
            )
        if not every:
            return [Tree([row.feed[0]], [-1], [1.0]) for row in rows]
        ids, parents, logs, totals = (torch.cat(parts, 1) for parts in zip(*every))
        chosen = best(totals, parents, shape.nodes)
        lists = ids.tolist(), parents.tolist(), logs.exp().tolist()
        return [
            _tree(row.feed[0], own, *(t[b] for t in lists))
            for b, (row, own) in enumerate(zip(rows, chosen))
        ]

    def _advanced(
        self, states: list[list[State | None]], parent: Tensor, ids: Tensor, scores: Tensor
    ) -> list[list[State | None]]:
        """States behind the beams that go on; a beam of probability 0 stays where it is (nothing follows it)."""
        if self.grammar is None:
            return [[None] * ids.shape[1] for _ in states]
        alive = (scores > -torch.inf).tolist()
        return [
            [self._after(own[p], id) if ok else own[p] for p, id, ok in zip(ps, xs, oks)]
            for own, ps, xs, oks in zip(states, parent.tolist(), ids.tolist(), alive)
        ]

    def _likeliest(
        self,
        rows: list[_Draft],
        outs: Tensor,
        states: list[list[State | None]],
        options: Options,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """The likeliest ids behind each beam and their log-probabilities, [B, K, width] each; -inf for none."""
        shape = (len(states), len(states[0]), width)
        ids = torch.zeros(shape, dtype=torch.int64, device=outs.device)
        logs = torch.full(shape, -torch.inf, device=outs.device)
        for (ranges, sampling), at, beams, logits in self._groups(rows, outs, states, options):
            law = (logits.float() / (sampling.temperature or 1.0)).log_softmax(-1)
            top = law.topk(min(width, law.shape[-1]))
            ids[at, beams, : top.values.shape[1]] = _ids(top.indices, ranges)
            logs[at, beams, : top.values.shape[1]] = top.values
        return ids, logs

    def _cast(
        self,
        rows: list[_Draft],
        session: Session,
        ahead: Tensor,
        options: Options,
        useful: list[int],
    ) -> list[Tree]:
        """Static trees."""
        shape = self.shape
        assert isinstance(shape, Static)
        nulls = _nulls(rows)
        ids = [[row.feed[0]] for row in rows]
        parents, chances = [[-1] for _ in rows], [[1.0] for _ in rows]
        laws: list[dict[int, Tensor]] = [{} for _ in rows]
        states = [[self._after(row.anchor, row.feed[0])] for row in rows]
        outs, seen = ahead[:, None], torch.zeros(len(rows), 1, 0, dtype=torch.bool)
        # Places of a level by shape; each row's node there, None where it has none.
        level: list[list[int | None]] = [[0] for _ in rows]
        places: list[
            int
        ] = []  # of each place of a level: which expanded node of the level before is its parent
        for depth, counts in enumerate(shape.levels[: max(useful)]):
            own = [i for i, n in enumerate(counts) if n]
            if depth:
                # Only nodes that get children are run through the drafter.
                tokens = [
                    [ids[b][n] if n is not None else 0 for n in (level[b][i] for i in own)]
                    for b in range(len(rows))
                ]
                origin = torch.tensor([places[i] for i in own])
                eye = torch.eye(len(own), dtype=torch.bool).expand(len(rows), -1, -1)
                seen = torch.cat([seen[:, origin], eye], 2)
                outs = session.branch(
                    _doubled(self._tensor(tokens), nulls),
                    outs[:, origin.to(outs.device)],
                    _doubled(seen, nulls).to(outs.device),
                    depth,
                )
                states = [
                    [
                        None if n is None else self._after(before[places[i]], ids[b][n])
                        for i, n in ((i, level[b][i]) for i in own)
                    ]
                    for b, before in enumerate(states)
                ]
            alive = [
                [level[b][i] is not None and depth < useful[b] for i in own]
                for b in range(len(rows))
            ]
            found = self._drawn(rows, outs, states, options, max(counts), alive)
            places, following = [], [[] for _ in rows]
            for e, i in enumerate(own):
                places += [e] * counts[i]
                for b in range(len(rows)):
                    drafts = found.get((b, e))
                    for rank in range(counts[i]):
                        node = None
                        if drafts is not None and rank < len(drafts.ids) and drafts.ids[rank] >= 0:
                            node = len(ids[b])
                            ids[b].append(drafts.ids[rank])
                            parents[b].append(level[b][i])  # type: ignore[arg-type]
                            chances[b].append(drafts.chances[rank])
                            if drafts.law is not None:
                                laws[b][level[b][i]] = drafts.law  # type: ignore[index]
                        following[b].append(node)
            level = following
        return [Tree(*lists) for lists in zip(ids, parents, chances, laws)]

    def _drawn(
        self,
        rows: list[_Draft],
        outs: Tensor,
        states: list[list[State | None]],
        options: Options,
        count: int,
        alive: list[list[bool]],
    ) -> dict[tuple[int, int], _Draws]:
        """Siblings drawn behind each node (row, place) that is alive and may go on."""
        found: dict[tuple[int, int], _Draws] = {}
        for (ranges, sampling), members, places, logits in self._groups(
            rows, outs, states, options
        ):
            law = logits.float().softmax(-1) if sampling.greedy else probabilities(logits, sampling)
            at = list(zip(members.tolist(), places.tolist()))
            own: dict[int, list[int]] = {}
            for i, (b, e) in enumerate(at):
                if alive[b][e]:
                    own.setdefault(b, []).append(i)
            if not own:
                continue
            if sampling.greedy:
                where = law.topk(min(count, law.shape[1])).indices
            else:
                where = law.new_full((len(law), min(count, law.shape[1])), -1, dtype=torch.int64)
                for b, lines in own.items():
                    part = law if len(lines) == len(law) else law[lines]
                    draws = drawn(part.to(rows[b].rng.device), count, rows[b].rng)
                    where[lines] = draws.to(where.device)
            names = torch.where(where < 0, -1, _ids(where.clamp(min=0), ranges)).tolist()
            chances = conditional(law, where).tolist()
            for lines in own.values():
                for i in lines:
                    kept = None if sampling.greedy else law[i]
                    found[at[i]] = _Draws(names[i], chances[i], kept)
        return found

    @property
    def _device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def _tensor(self, ids: list) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)

    def _most_nodes(self) -> int:
        tree = self.shape
        return tree.nodes if isinstance(tree, Dynamic) else sum(map(sum, tree.levels))

    def _after(self, state: State | None, id: int) -> State | None:
        if state is None or self.grammar is None:
            return None
        return self.grammar.advance(state, (id,))

    def _options_at(
        self, state: State | None, options: Options, written: int
    ) -> tuple[Ranges, Sampling] | None:
        """What may come at a state, and how it is drawn; None where nothing may."""
        if state is None or self.grammar is None:
            ranges: Ranges = ((0, self.model.config.vocab_size),)
        else:
            ranges = self.grammar.allowed(state)
        if not ranges:
            return None
        return ranges, _at(options, state.modality if state is not None else "", written)

    def _groups(
        self,
        rows: list[_Draft],
        outs: Tensor,
        states: list[list[State | None]],
        options: Options,
    ) -> Iterator[tuple[tuple[Ranges, Sampling], Tensor, Tensor, Tensor]]:
        """Nodes with the same choice together: the choice, their rows, their places, and logits [m, n].

        Args:
            outs: [R, K, D].
            states: of each row's K nodes.
        """
        nulls = {b: len(rows) + n for n, b in enumerate(_nulls(rows))}
        groups: dict[tuple[Ranges, Sampling], list[tuple[int, int]]] = {}
        for b, own in enumerate(states):
            for i, state in enumerate(own):
                choice = self._options_at(state, options, rows[b].written)
                if choice is not None:
                    groups.setdefault(choice, []).append((b, i))
        for choice, members in groups.items():
            at, places = torch.tensor(members, device=outs.device).unbind(1)
            null = None
            if choice[1].cfg != 1:
                null = outs[self._tensor([nulls[b] for b, _ in members]), places]
            yield choice, at, places, self._law_logits(outs[at, places], null, *choice)

    def _law_logits(
        self, hidden: Tensor, null: Tensor | None, ranges: Ranges, sampling: Sampling
    ) -> Tensor:
        """Guided logits [m, n] of states [m, D] with the condition and without."""
        logits = self._logits(hidden, ranges)
        if null is None or sampling.cfg == 1:
            return logits
        return guided(logits, self._logits(null, ranges), sampling.cfg)


@dataclass(frozen=True)
class _Draws:
    ids: list[int]
    chances: list[float]
    law: Tensor | None


def _tree(
    root: int, chosen: list[int], ids: list[int], parents: list[int], chances: list[float]
) -> Tree:
    """A tree of the chosen candidates."""
    number = {-1: 0, **{c: i + 1 for i, c in enumerate(chosen)}}
    return Tree(
        [root, *(ids[c] for c in chosen)],
        [-1, *(number[parents[c]] for c in chosen)],
        [1.0, *(chances[c] for c in chosen)],
    )


def _ids(places: Tensor, ranges: Ranges) -> Tensor:
    """Ids at places of the ranges laid end to end."""
    ids, end = places + ranges[0][0], ranges[0][1] - ranges[0][0]
    for start, stop in ranges[1:]:
        ids = torch.where(places >= end, places - end + start, ids)
        end += stop - start
    return ids


def _places(ids: Tensor, ranges: Ranges) -> Tensor:
    """Places of ids; -1 for those in none of the ranges."""
    places, end = torch.full_like(ids, -1), 0
    for start, stop in ranges:
        places = torch.where((ids >= start) & (ids < stop), ids - start + end, places)
        end += stop - start
    return places


def _doubled(table: Tensor, nulls: list[int]) -> Tensor:
    """Rows [B, ...] followed by those of the requests that have a row without the condition: [R, ...]."""
    return torch.cat([table, table[nulls]]) if nulls else table
