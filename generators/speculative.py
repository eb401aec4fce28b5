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

B rows; R rows of the caches, which are more where requests are guided; N nodes of a tree; D width; n ids that may come.
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
from ..backbone.grammar import Grammar, State
from ..backbone.transformer import Transformer
from .acceptance import Ladder, Ledger, Published, emitted, passes, pulled
from .autoregressive import Options, _event, _halves, _leave, _nulls
from .drafter import Drafter, Session
from .drafting import Drafting, Ranges, _doubled, _Draft, _ids, _places
from .generator import Event, Request
from .neighbours import Near, Relatives
from .sampling import Sampling, pick, probabilities
from .trees import Dynamic, Static, padded

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
        distances: with `audit`, total variation between the law of what is emitted and the exact one, of each id that
            was chosen among siblings; of drawn ones, both given the draw, in certified mode only.
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


class Speculative(Drafting):
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
        self.speculation = Speculation() if speculation is None else speculation
        super().__init__(model, drafter, grammar, self.speculation.tree, rows=rows)
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
        self.relatives = relatives
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
                work = own if work is None or not rows else work.join(rows, fresh, own)
                rows = rows + fresh

    def _leap(self, rows: list[_Draft], work: _Work, options: Options) -> None:
        """One pass of the model: propose, look, choose, and tell the drafter what stands."""
        nulls = _nulls(rows)
        with self.statistics.timed("draft"):
            self._propose(rows, work.session, work.ahead, options)
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
        lanes: dict[int, Lane] = {id(row): (b, None) for b, row in enumerate(rows)}
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

    def _pulled(
        self, rows: list[_Draft], laws: Tensor, ranges: Ranges, *, rejected: float = 1.0
    ) -> Tensor:
        """The certified laws [B, n] towards each row's siblings.

        Args:
            laws: where no sibling stands.
            rejected: how probable that was.
        """
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
            laws.new_tensor([row.ledger.share(rejected) for row in rows]),
            values=values,
            price=laws.new_tensor([row.ledger.price for row in rows]),
        )
        if self.audit and rejected == 1:
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
        ids = self._tensor([row.tree.ids[c] for c in children])
        places = _places(ids, ranges)
        near = None if self.relatives is None else self._near(ids, ranges)
        rule = self.speculation.published
        certified = self.speculation.mode == "certified"
        budget = row.ledger.allowance if certified else 0.0
        if self.audit and near is not None and (certified or q is None):
            out, _ = emitted(law, places.tolist(), *near, q=q, relaxation=rule, budget=budget)
            exact = emitted(law, places.tolist(), q=q)[0]
            self.statistics.distances.append(float((out - exact).abs().sum()) / 2)
        ladder, left = Ladder(law, q, rule), 1.0
        for i, place in enumerate(places.tolist()):
            own = None if near is None or rule is None else near.ids[i]
            chance = ladder.chance(place, own)
            spot = torch.rand((), generator=row.rng, device=row.rng.device, dtype=torch.float64)
            if float(spot) <= chance:
                row.ledger.spend(0.0)
                return place
            ladder.reject(place, own)
            left *= 1 - chance
        if not certified or near is None:
            return pick(ladder.rest[None], [row.rng])[0]
        rest = self._pulled([row], ladder.rest[None], ranges, rejected=left)
        return pick(rest, [row.rng])[0]

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

    def _near(self, ids: Tensor, ranges: Ranges) -> Near:
        """Places and distances of the neighbours [..., k] that may come."""
        assert self.relatives is not None
        near = self.relatives.of(ids, self.speculation.k + (self.speculation.published is not None))
        return Near(_places(near.ids, ranges), near.distances)
