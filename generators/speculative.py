"""Speculative decoding: a drafter proposes a tree of ids, the model sees it in one pass, a rule says what stands.

    decoder = Speculative(model, drafter, grammar, speculation=Speculation(mode="certified", delta=0.1), relatives=...)
    for event in decoder.run(requests, options, rng): ...

The signature, the grammar, guidance and the independence of a batch's rows are those of `Autoregressive`. Modes:

- "lossless": the law of plain decoding. With a dynamic tree the ids are plain decoding's, seed by seed: an id is drawn
  from the model's law as ever, and drafted ids only save the passes where it is among them.
- "certified": every id's law is within `delta` (total variation) of the model's, a sequence's within `total`; the proof
  is in `acceptance.py`. At temperature 0 nothing is drawn, so nothing can be relaxed: it is lossless then.
- "lantern", "lantern++": the published relaxations to the letter, for comparison; their delta bounds nothing.

The head is multiplied only along the branch that is taken, and only for ids that the grammar allows.

B rows; R rows of the caches, which are 2 B with guidance; N nodes of a tree; D width; n ids that may come.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..backbone import masks
from ..backbone.cache import KVCache
from ..backbone.grammar import Grammar, Range, State
from ..backbone.transformer import Transformer
from .acceptance import Ladder, Ledger, Published, emitted, leaning, passes, pulled
from .autoregressive import Autoregressive, Options, _at, _event, _halves, _leave, _nulls, _Row
from .drafter import Drafter, DrafterError, Session
from .generator import Event, Request
from .neighbours import Near, Relatives
from .sampling import Sampling, guided, pick, probabilities
from .trees import Dynamic, Static, Tree, best, conditional, drawn, padded

Ranges = tuple[Range, ...]
Lane = tuple[int, int | None]  # a request's rows: with the condition, and without
Mode = Literal["lossless", "certified", "lantern", "lantern++"]
MODES: tuple[str, ...] = ("lossless", "certified", "lantern", "lantern++")


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How to speculate.

    Args:
        tree: `Dynamic` or `Static`.
        k: neighbours of an id that it may stand for.
        delta: "certified": the most total variation of an id's law; "lantern": the published parameter.
        total: "certified": the most of a whole sequence; None for no limit but delta's.
        factor: "lantern++": a sibling's relaxed probability is at most so many times its own.
    """

    mode: Mode = "lossless"
    tree: Dynamic | Static = field(default_factory=Dynamic)
    k: int = 100
    delta: float = 0.1
    total: float | None = None
    factor: float = 5.0

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, expected one of {', '.join(MODES)}")
        if self.k < 1:
            raise ValueError(f"k is {self.k}, expected 1 or more")
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta is {self.delta}, expected 0 to 1")
        if self.total is not None and (self.total < 0 or self.mode != "certified"):
            raise ValueError(
                f"total is {self.total} in mode {self.mode!r}, expected 0 or more, and mode 'certified'"
            )
        if self.factor <= 1:
            raise ValueError(f"factor is {self.factor}, expected more than 1")

    @property
    def published(self) -> Published | None:
        """The published relaxation, in a mode that has one."""
        if self.mode == "lantern":
            return Published(k=self.k, delta=self.delta)
        return Published(k=self.k, factor=self.factor) if self.mode == "lantern++" else None


@dataclass
class Statistics:
    """What a run did.

    Args:
        passes: of the model, over all rows at once.
        row_passes: the same counted by row.
        written: ids that the passes wrote (the first id of each row comes from the prompt's pass).
        tested, stood: by depth, how often siblings were there to choose from, and how often one stood.
        distances: with `audit`, total variation between the law of what is emitted and the model's, of each id that
            was chosen among likeliest siblings (of drawn ones, the law given the draw says nothing).
        moved: mass that certified mode moved, summed over ids.
        seconds: spent on "draft", "target", "verify": of the processor on CPUs, else of the clock.
        clock: what tells them.
    """

    passes: int = 0
    row_passes: int = 0
    written: int = 0
    tested: list[int] = field(default_factory=list)
    stood: list[int] = field(default_factory=list)
    moved: float = 0.0
    distances: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("draft", "target", "verify"), 0.0)
    )
    clock: Callable[[], float] = time.perf_counter

    @property
    def compression(self) -> float:
        """Ids a pass and row: plain decoding has 1."""
        return self.written / max(self.row_passes, 1)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time within to `part`."""
        began = self.clock()
        yield
        self.seconds[part] += self.clock() - began

    def note(self, depth: int, stood: bool) -> None:
        """A choice among siblings."""
        while len(self.tested) <= depth:
            self.tested.append(0)
            self.stood.append(0)
        self.tested[depth] += 1
        self.stood[depth] += stood


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


@dataclass
class _Work:
    """What the requests in progress share.

    Args:
        ahead: the roots' states as the drafter predicts them, [R, D].
    """

    cache: KVCache
    session: Session
    ahead: Tensor

    def leave(self, rows: list[_Draft], options: Options) -> list[_Draft]:
        """Let finished requests go."""
        stay, kept = _leave(rows, self.cache, options)  # type: ignore[arg-type]
        if kept:
            self.session.take(kept)
            self.ahead = self.ahead[kept]
        return stay  # type: ignore[return-value]

    def join(self, rows: list[_Draft], fresh: list[_Draft], other: _Work) -> _Work:
        """Requests `fresh` behind `rows`, rows without the condition behind all."""
        held = len(self.ahead)
        order = [*range(len(rows)), *range(held, held + len(fresh))]
        order += [*range(len(rows), held), *range(held + len(fresh), held + len(other.ahead))]
        self.cache.join(other.cache)
        self.cache.take(order)
        self.session.join(other.session)
        self.session.take(order)
        self.ahead = torch.cat([self.ahead, other.ahead])[order]
        return self


class Speculative(Autoregressive):
    """Next-token decoding in leaps.

    Args:
        model: fused here.
        drafter: of this very model; fused here.
        grammar: what may be written; None for free text.
        rows: the most requests at once; None for all.
        relatives: neighbours, which every mode but "lossless" needs.
        audit: enumerate every id's law, `statistics.distances`.

    Attributes:
        statistics: of the last run.
    """

    def __init__(
        self,
        model: Transformer,
        drafter: Drafter,
        grammar: Grammar | None = None,
        *,
        speculation: Speculation | None = None,
        relatives: Relatives | None = None,
        rows: int | None = None,
        audit: bool = False,
    ):
        super().__init__(model, grammar, rows=rows)
        if drafter.target is not model:
            raise DrafterError("the drafter belongs to another target than the model that is given")
        self.speculation = Speculation() if speculation is None else speculation
        if self.speculation.mode != "lossless":
            if relatives is None:
                raise ValueError(
                    f"mode {self.speculation.mode!r} needs `relatives`, a table of neighbours"
                )
            if len(relatives.rows) != model.config.vocab_size:
                raise ValueError(
                    f"the neighbours are of {len(relatives.rows)} ids, the model has {model.config.vocab_size}"
                )
            if self.speculation.k > relatives.k:
                raise ValueError(
                    f"k is {self.speculation.k}, the table of neighbours has {relatives.k}"
                )
            relatives.to(model.lm_head.weight.device)
        self.drafter, self.relatives = drafter.fuse(), relatives
        self.audit = audit
        self.statistics = self._fresh_statistics()

    def _row(self, number: int, request: Request, guided: bool, rng: torch.Generator) -> _Draft:
        super()._row(number, request, guided, rng)
        ledger = Ledger(self.speculation.delta, self.speculation.total, request.max_tokens)
        return _Draft(number, request, rng, request.state, guided, ledger=ledger)

    @torch.inference_mode()
    def _loop(self, rows: list[_Draft], options: Options) -> Iterator[Event]:  # type: ignore[override]
        self.statistics = self._fresh_statistics()
        for row in rows:
            self._force(row)
        yield from (_event(row) for row in rows if row.fresh or row.reason)
        waiting = deque(row for row in rows if row.reason is None)
        rows = []
        work: _Work | None = None
        while rows or waiting:
            if rows and work is not None:
                self._leap(rows, work, options)
                yield from (_event(row) for row in rows if row.fresh)
                rows = work.leave(rows, options)
            fresh = [waiting.popleft() for _ in range(self._room(len(rows), len(waiting)))]
            if fresh:
                own = self._start(fresh, options)
                yield from (_event(row) for row in fresh if row.fresh)
                fresh = own.leave(fresh, options)
            if fresh:
                rows, work = (rows + fresh, work.join(rows, fresh, own)) if rows else (fresh, own)

    def _leap(self, rows: list[_Draft], work: _Work, options: Options) -> None:
        """One pass of the model: propose, look, choose, and tell the drafter what stands."""
        nulls = _nulls(rows)
        with self.statistics.timed("draft"):
            self._propose(rows, work, options)
        with self.statistics.timed("target"):
            hidden = self._look(rows, work.cache)
        with self.statistics.timed("verify"):
            self._walk(rows, hidden, options)
            paths = pad_sequence([torch.tensor(row.path) for row in rows], batch_first=True)
            paths = _doubled(paths, nulls).to(hidden.device)
            counts = [len(row.path) for row in rows]
            counts += [counts[i] for i in nulls]
            work.cache.keep(hidden.shape[1], paths, counts)
        with self.statistics.timed("draft"):
            work.session.forget()
            states = hidden.gather(1, paths[..., None].expand(-1, -1, hidden.shape[2]))
            work.ahead = work.session.read(_doubled(self._next(rows), nulls), states, counts)

    # the beginning

    def _start(self, rows: list[_Draft], options: Options) -> _Work:
        """The prompts' pass and the first ids."""
        sides = [(r, r.request.ids, r.request.embeddings) for r in rows]
        sides += [(r, r.request.null_ids, r.request.null_embeddings) for r in rows if r.guided]
        forced = [list(row.feed) for row, _, _ in sides]
        with self.statistics.timed("target"):
            read = self._read(rows)
        hidden, counts = read.hidden, read.counts
        if read.same is not None:
            hidden, counts = hidden[read.same], [counts[i] for i in read.same]
            read.cache.take(read.same)
        last = hidden[torch.arange(len(hidden)), torch.tensor(counts) - 1]
        for row in rows:
            row.feed.clear()
            row.anchor = row.state
        self._write(rows, *_halves(last, rows), options)  # type: ignore[arg-type]
        room = read.cache.capacity + 1 + self._most_nodes()
        session = Session(self.drafter, len(hidden), room)
        with self.statistics.timed("draft"):
            roots = self.drafter.embed(self._tensor([[row.feed[0]] for row, _, _ in sides]))
            seen = [
                torch.cat([self._seen(ids, embeddings, more)[1:], root])
                for (_, ids, embeddings), more, root in zip(sides, forced, roots)
            ]
            ahead = session.read(pad_sequence(seen, batch_first=True), hidden, counts)
        return _Work(read.cache, session, ahead)

    def _seen(self, ids: Tensor | None, embeddings: Tensor | None, more: list[int]) -> Tensor:
        """What the drafter reads in place of a prompt: [L, D]."""
        given = [] if ids is None else ids.tolist()
        own = self.drafter.embed(self._tensor([*given, *more]))
        if embeddings is None:
            return own
        if self.drafter.dummy is not None:
            dummies = self._tensor([self.drafter.dummy]).expand(len(embeddings))
            return torch.cat([self.drafter.embed(dummies), own])
        return torch.cat([embeddings.to(own), own])

    def _next(self, rows: list[_Draft]) -> Tensor:
        """Embeddings [B, m, D] of the ids behind each node that stands, the new root the last."""
        ids = [
            torch.tensor([*(r.tree.ids[i] for i in r.path[1:]), r.feed[0] if r.feed else 0])
            for r in rows
        ]
        return self.drafter.embed(pad_sequence(ids, batch_first=True).to(self._device))

    # drafting

    def _propose(self, rows: list[_Draft], work: _Work, options: Options) -> None:
        """Give each row its tree."""
        # The last id that can be written is never read. Each row has its own depth, whatever its batch-mates' is.
        useful = [len(r.feed) - 2 + r.request.max_tokens - r.written for r in rows]
        tree = self.speculation.tree
        grow = self._grow if isinstance(tree, Dynamic) else self._cast
        for row, tree in zip(rows, grow(rows, work.session, work.ahead, options, useful)):
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
        shape = self.speculation.tree
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
        shape = self.speculation.tree
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

    # the model's pass and the choice

    def _look(self, rows: list[_Draft], cache: KVCache) -> Tensor:
        """The model's states [R, N, D] at all nodes of all trees."""
        ids, depths, seen = padded([row.tree for row in rows], self._device)
        nulls = _nulls(rows)
        starts = torch.tensor(cache.row_lengths(), device=ids.device)
        mask = masks.tree(starts, _doubled(seen, nulls), int(starts.max()) + ids.shape[1])
        # Nodes behind the context's end are never accepted; they only must not fail.
        positions = (starts[:, None] + _doubled(depths, nulls)).clamp(
            max=self.model.config.context - 1
        )
        self.statistics.passes += 1
        self.statistics.row_passes += len(rows)
        out = self.model(_doubled(ids, nulls), positions=positions, mask=mask, cache=cache, keep=0)
        return out.hidden

    def _walk(self, rows: list[_Draft], hidden: Tensor, options: Options) -> None:
        """Choose id after id of each row, down its tree as long as that has them."""
        for row in rows:
            row.anchor = self._after(row.anchor, row.feed.pop(0))  # the root
            self._descend(row)
        walking = [row for row in rows if row.reason is None and not row.feed]
        lanes = {id(row): (b, None) for b, row in enumerate(rows)}
        lanes |= {id(rows[b]): (b, len(rows) + n) for n, b in enumerate(_nulls(rows))}
        while walking:
            at = [lanes[id(row)] for row in walking]
            lines = [b for b, _ in at] + [null for _, null in at if null is not None]
            nodes = [row.node for row in walking] + [row.node for row in walking if row.guided]
            outs = hidden[lines, nodes][:, None]
            states = [[row.state] for row in walking]
            for (ranges, sampling), members, _, logits in self._groups(
                walking, outs, states, options
            ):
                own = [walking[i] for i in members.tolist()]
                places = self._choose(own, hidden, lanes, logits, ranges, sampling, options)
                for row, place in zip(own, places):
                    self._stand(row, int(_ids(torch.tensor(place), ranges)))
            walking = [row for row in walking if row.reason is None and not row.feed]

    def _stand(self, row: _Draft, chosen: int) -> None:
        """Write an id, and what it forces, and go down the tree with it."""
        depth, had = row.tree.depths[row.node], bool(row.tree.children[row.node])
        before = row.written
        row.anchor = row.state
        self._accept(row, chosen)
        self._force(row)
        self.statistics.written += row.written - before
        stood = self._descend(row)
        if had:
            self.statistics.note(depth, stood)

    def _descend(self, row: _Draft) -> bool:
        """Follow `feed` down the tree; whether its first id was there."""
        first = True
        while row.feed:
            ids = row.tree.ids
            child = next((c for c in row.tree.children[row.node] if ids[c] == row.feed[0]), None)
            if child is None:
                return not first
            row.anchor = self._after(row.anchor, row.feed.pop(0))
            row.path.append(child)
            first = False
        return not first

    def _choose(
        self,
        rows: list[_Draft],
        hidden: Tensor,
        lanes: dict[int, Lane],
        logits: Tensor,
        ranges: Ranges,
        sampling: Sampling,
        options: Options,
    ) -> list[int]:
        """One place in `ranges` for each row, from the model's logits [B, n] at its node."""
        published = self.speculation.published
        if sampling.greedy:
            places = logits.argmax(-1).tolist()
            if published is None:
                return places
            far = [self._farthest(row, hidden, lanes[id(row)], options, published) for row in rows]
            return [place if best is None else best for place, best in zip(places, far)]
        laws = probabilities(logits, sampling)
        sampled = [row.node in row.tree.laws for row in rows]
        if published is None and not any(sampled):
            if self.speculation.mode == "certified":
                laws = self._pulled(rows, laws, ranges)
            return pick(laws, [row.rng for row in rows])
        return [self._tested(row, law, ranges) for row, law in zip(rows, laws)]

    def _pulled(self, rows: list[_Draft], laws: Tensor, ranges: Ranges) -> Tensor:
        """The certified laws [B, n] towards each row's siblings."""
        children = [row.tree.children[row.node] for row in rows]
        most = max(map(len, children))
        if most == 0:
            for row in rows:
                row.ledger.spend(0.0)
            return laws
        ids = self._tensor(
            [
                [r.tree.ids[c] for c in own] + [-1] * (most - len(own))
                for r, own in zip(rows, children)
            ]
        )
        worth = [r.tree.values() for r in rows]
        values = torch.tensor(
            [[w[c] for c in own] + [0.0] * (most - len(own)) for w, own in zip(worth, children)],
            device=laws.device,
        )
        near = self._near(ids, ranges)
        moved = pulled(
            laws,
            _places(ids, ranges),
            near.ids,
            near.distances,
            laws.new_tensor([row.ledger.allowance for row in rows]),
            values=values,
            price=laws.new_tensor([row.ledger.price for row in rows]),
        )
        if self.audit:
            self.statistics.distances += ((moved.law - laws).abs().sum(1) / 2).tolist()
        for row, mass in zip(rows, moved.mass.tolist()):
            row.ledger.spend(mass)
            self.statistics.moved += mass
        return moved.law

    def _tested(self, row: _Draft, law: Tensor, ranges: Ranges) -> int:
        """A place for one row, its siblings tested one after another."""
        children = row.tree.children[row.node]
        if not children:
            return pick(law[None], [row.rng])[0]
        q = row.tree.laws.get(row.node)
        if self.speculation.mode == "certified" and q is not None:
            # Every move gains one id here: nothing is known yet of what will be drawn behind it.
            budget = row.ledger.allowance if row.ledger.price <= 1 else 0.0
            moved = leaning(law, q, lambda at: self._near(_ids(at, ranges), ranges), budget)
            law = moved.law
            row.ledger.spend(float(moved.mass))
            self.statistics.moved += float(moved.mass)
        ladder = Ladder(law, q, self.speculation.published)
        ids = self._tensor([row.tree.ids[c] for c in children])
        near = None if self.speculation.published is None else self._near(ids, ranges).ids
        if self.audit and q is None:
            places = _places(ids, ranges).tolist()
            out, _ = emitted(law, places, near, relaxation=self.speculation.published)
            self.statistics.distances.append(float((out - law).abs().sum()) / 2)
        for i, place in enumerate(_places(ids, ranges).tolist()):
            own = None if near is None else near[i]
            chance = ladder.chance(place, own)
            spot = torch.rand((), generator=row.rng, device=row.rng.device, dtype=torch.float64)
            if float(spot) <= chance:
                return place
            ladder.reject(place, own)
        return pick(ladder.rest[None], [row.rng])[0]

    def _farthest(
        self, row: _Draft, hidden: Tensor, lane: Lane, options: Options, rule: Published
    ) -> int | None:
        """The published greedy rule: the first id of the longest branch whose ids all pass; None where none does."""

        def passing(node: int, state: State | None) -> list[int]:
            children = row.tree.children[node]
            choice = self._options_at(state, options, row.written)
            if not children or choice is None:
                return []
            null = None if lane[1] is None else hidden[lane[1], node][None]
            logits = self._law_logits(hidden[lane[0], node][None], null, *choice)
            law = logits[0].float().softmax(-1)
            ids = self._tensor([row.tree.ids[c] for c in children])
            near, longest = self._near(ids, choice[0]).ids, []
            for child, place, own in zip(children, _places(ids, choice[0]).tolist(), near):
                if passes(law, place, own, rule):
                    branch = [place, *passing(child, self._after(state, row.tree.ids[child]))]
                    longest = branch if len(branch) > len(longest) else longest
            return longest

        branch = passing(row.node, row.state)
        return branch[0] if branch else None

    # small parts

    def _fresh_statistics(self) -> Statistics:
        cpu = self._device.type == "cpu"
        return Statistics(clock=time.process_time if cpu else time.perf_counter)

    @property
    def _device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def _tensor(self, ids: list) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)

    def _most_nodes(self) -> int:
        tree = self.speculation.tree
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

    def _near(self, ids: Tensor, ranges: Ranges) -> Near:
        """Places and distances of the neighbours [..., k] that may come."""
        assert self.relatives is not None
        near = self.relatives.of(ids, self.speculation.k + (self.speculation.published is not None))
        return Near(_places(near.ids, ranges), near.distances)


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
