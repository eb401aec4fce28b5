"""OctGPT's generation: an octree level by level, each in a few parallel steps, coarse to fine.

    generator = load_generator("octgpt/category generator")
    codec = load_codec(generator.codec)
    meshes = codec.decode(generator.streams(codec, ["chair", "table"]))

- A level begins fully masked. Each of its iterations runs the network once and draws some of the masked tokens, in a
  random order and by a cosine schedule; towards the end of the level doubtful ones are drawn again (remasking).
- The split bits drawn say how many tokens the next level has; the last level holds the codes.
- Samples of a batch go in step, but none depends on its mates: each has its own order, windows, counts and random
  numbers. `joint` does as the published code does: one order over all samples, windows cut across them.
- Guidance is an addition of ours: where the network has a null condition, every sample runs twice in the same batch.

Wei et al., OctGPT, SIGGRAPH 2025 (arXiv 2504.09975; github.com/octree-nn/octgpt).
Letters: n tokens of a level, d bits a token (1, or the codes' D), N tokens of all levels so far, B samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..codecs.codec import item_rngs
from ..codecs.shape.octgpt import OctGPT
from ..codecs.shape.octree import Octree, full_octree
from ..codecs.stream import TokenStream
from .octree_condition import Labels, Words
from .octree_network import Conditioned, OctreeNetwork
from .octree_windows import Tokens
from .sampling import guided

Reader = Labels | Words


class OctreeTooBig(RuntimeError):
    """The network splits more nodes than a surface needs; nothing was decoded."""


@dataclass(frozen=True, kw_only=True)
class ShapeRequest:
    """One shape to generate.

    Args:
        condition: a label, features [L, F] of a text or picture, or words, where the generator reads them; None for no
            condition, where the network knows what that means.
        given: split bits [n] of the first levels, which are kept: a coarse shape to refine.
    """

    condition: int | str | Tensor | None = None
    given: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OctreeOptions:
    """How levels are drawn. Defaults are the published ones.

    Args:
        iterations, temperatures: per level; the temperature falls to 0 along the iterations.
        cfg: guidance; 1 for none.
        remask: the share of a level's iterations after which doubtful tokens are drawn again; 1 for never.
        doubt: how many of them at most, as shares of the doubtful split bits and of the doubtful codes.
        joint: one order and one set of windows over all samples, as published; then all draws come from the first
            sample's generator.
        max_nodes: the most tokens of one level of one sample.
    """

    iterations: tuple[int, ...] = (64, 128, 128, 256)
    temperatures: tuple[float, ...] = (1.0, 1.2, 0.5, 0.5)
    cfg: float = 1.0
    remask: float = 0.7
    doubt: tuple[float, float] = (0.2, 0.1)
    joint: bool = False
    max_nodes: int = 1 << 17

    def __post_init__(self):
        for name in ("iterations", "temperatures", "doubt"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists
        if len(self.iterations) != len(self.temperatures) or min(self.iterations) < 1:
            raise ValueError(
                f"iterations are {self.iterations} and temperatures {self.temperatures}, expected one of each a level"
            )
        if min(self.temperatures) <= 0:
            raise ValueError(f"temperatures are {self.temperatures}, expected all above 0")


@dataclass(frozen=True, kw_only=True)
class OctreeEvent:
    """One iteration, or the end.

    Args:
        depth, iteration, iterations: where the generation stands.
        masked: tokens of this level that each sample still lacks.
        levels: the finished levels of each sample: split bits [n], and in the last event the codes' bits [m, D].
        done: whether this is the last event.
    """

    depth: int
    iteration: int
    iterations: int
    masked: tuple[int, ...]
    levels: tuple[tuple[Tensor, ...], ...]
    done: bool = False


class Draws:
    """The random choices of one sample (or of all, where they are drawn jointly)."""

    def __init__(self, rng: torch.Generator):
        self.rng = rng

    def order(self, n: int) -> Tensor:
        """A permutation of n tokens."""
        return torch.randperm(n, generator=self.rng, device=self.rng.device)

    def pick(self, logits: Tensor) -> Tensor:
        """0 or 1 for each row of logits [n, 2] (over the temperature)."""
        spot = torch.rand(len(logits), generator=self.rng, device=self.rng.device)
        return (spot.to(logits.device) < logits.softmax(-1)[:, 1]).long()


@dataclass
class _Group:
    """Tokens of a level that are drawn together: those of one sample, or all."""

    rows: slice
    draws: Draws
    order: Tensor
    left: int  # tokens still masked: the first so many of `order`


@dataclass
class _Level:
    """A level in progress."""

    depth: int
    masked: Tensor  # [n]
    value: Tensor  # [n, d], -1 where masked
    groups: list[_Group]
    logits: Tensor | None = None  # [n, d, 2], the last ones


@dataclass
class _State:
    """A batch in progress; `known` embeds the finished levels [N, C]."""

    tree: Octree
    condition: Conditioned
    null: Conditioned | None
    options: OctreeOptions
    given: list[tuple[Tensor, ...]]
    draws: list[Draws]
    known: list[Tensor] = field(default_factory=list)
    levels: list[list[Tensor]] = field(default_factory=list)  # per sample


class OctreeGenerator:
    """Masked generation with a network, for the streams of a codec.

    Args:
        options: how to draw where a call does not say.
        codec: the name of the codec whose streams it writes.
        reader: what turns words into conditions.
        draws: what makes a sample's random choices from its generator.
    """

    critic = None  # as other masked generators may have

    def __init__(
        self,
        network: OctreeNetwork,
        *,
        options: OctreeOptions | None = None,
        codec: str | None = None,
        reader: Reader | None = None,
        draws: Callable[[torch.Generator], Draws] = Draws,
    ):
        self.network = network.eval()
        self.options = options or OctreeOptions()
        self.codec = codec
        self.reader = reader
        self.draws = draws

    def streams(
        self,
        codec: OctGPT,
        conditions: Sequence[ShapeRequest | int | str | Tensor | None],
        *,
        options: OctreeOptions | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> list[TokenStream]:
        """One stream of a codec for each condition or request; see `run`.

        Raises:
            ValueError: the codec's streams have other levels or codes.
        """
        ours, theirs = self.network.config, codec.config.network
        for name in ("full_depth", "code_depth", "code_bits"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(
                    f"the network's {name} is {getattr(ours, name)}, codec '{codec.spec.name}' has "
                    f"{getattr(theirs, name)}; load the codec that it was trained with"
                    + (f": '{self.codec}'" if self.codec else "")
                )
        requests = [
            one if isinstance(one, ShapeRequest) else ShapeRequest(condition=one)
            for one in conditions
        ]
        levels: tuple[tuple[Tensor, ...], ...] = ()
        for event in self.run(requests, options, rng):
            levels = event.levels
        return [codec.stream(list(own)) for own in levels]

    def run(
        self,
        requests: Sequence[ShapeRequest],
        options: OctreeOptions | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> Iterator[OctreeEvent]:
        """An event an iteration; the last one has the codes too. Closing the iterator cancels.

        Args:
            rng: one generator a request; None draws each from seed 0.

        Raises:
            ValueError: a condition or given levels that the network does not take, options of another depth.
            OctreeTooBig: while running.
        """
        options = options or self.options
        config = self.network.config
        depths = config.code_depth - config.full_depth + 1
        if len(options.iterations) != depths:
            raise ValueError(
                f"{len(options.iterations)} iteration counts given, the network has {depths} levels"
            )
        if not requests:
            raise ValueError("there are no requests")
        state = self._start(requests, options, item_rngs(rng, len(requests)))
        return self._loop(state)

    def _start(
        self, requests: Sequence[ShapeRequest], options: OctreeOptions, rngs: list[torch.Generator]
    ) -> _State:
        count, config = len(requests), self.network.config
        given = [self._given(i, request.given) for i, request in enumerate(requests)]
        if options.joint and any(given):
            raise ValueError("levels are given, which the joint order cannot keep: set joint=False")
        with torch.inference_mode():
            condition = self.network.condition([self._condition(r) for r in requests])
            null = None
            if options.cfg != 1:
                null = self.network.condition([self.network.no_condition] * count)
        tree = full_octree(config.full_depth, count, self.network.device)
        draws = [self.draws(g) for g in (rngs[:1] if options.joint else rngs)]
        return _State(tree, condition, null, options, given, draws, levels=[[] for _ in requests])

    def _condition(self, request: ShapeRequest) -> int | Tensor:
        given = request.condition
        if isinstance(given, str):
            if self.reader is None:
                raise ValueError(
                    f"the condition is {given!r}, but this generator reads no words: give a label or features"
                )
            return self.reader(given)
        return self.network.no_condition if given is None else given

    def _given(self, number: int, levels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Given levels as flat bits on the device, each of the size that the one above asks for."""
        config = self.network.config
        most = config.code_depth - config.full_depth
        if len(levels) > most:
            raise ValueError(
                f"request {number} gives {len(levels)} levels, expected {most} or fewer"
            )
        flat, expected = [], 8**config.full_depth
        for i, level in enumerate(levels):
            bits = level.reshape(-1).to(self.network.device, torch.int64)
            if len(bits) != expected or bool(((bits != 0) & (bits != 1)).any()):
                raise ValueError(
                    f"request {number}: given level {i} has {len(bits)} values, expected {expected} bits"
                )
            if not bool(bits.any()):
                raise ValueError(f"request {number}: given level {i} splits nothing")
            flat.append(bits)
            expected = 8 * int(bits.sum())
        return tuple(flat)

    @torch.inference_mode()
    def _loop(self, state: _State) -> Iterator[OctreeEvent]:
        config, options = self.network.config, state.options
        for i, depth in enumerate(range(config.full_depth, config.code_depth + 1)):
            level = self._open(state, depth)
            steps = options.iterations[i] if bool(level.masked.any()) else 0
            tokens = Tokens.of(state.tree, depth, grid=config.grid)
            x = self._masked_embeddings(state, level)
            for step in range(steps):
                self._iterate(state, level, tokens, x, step, i)
                masked = tuple(self._count(level, state))
                done = tuple(tuple(rows) for rows in state.levels)
                if step + 1 < steps or depth < config.code_depth:
                    yield OctreeEvent(
                        depth=depth, iteration=step, iterations=steps, masked=masked, levels=done
                    )
            if depth < config.code_depth:
                self._close(state, level)
        yield self._finish(state, level, options.iterations[-1])

    def _open(self, state: _State, depth: int) -> _Level:
        """A level, masked but where it is given."""
        tree, config = state.tree, self.network.config
        n, i = tree.count(depth), depth - config.full_depth
        bits = config.code_bits if depth == config.code_depth else 1
        counts = torch.bincount(tree.batch(depth), minlength=tree.batch_size).tolist()
        if max(counts) > state.options.max_nodes:
            raise OctreeTooBig(
                f"sample {counts.index(max(counts))} has {max(counts)} nodes at depth {depth}, expected at most "
                f"{state.options.max_nodes} (option max_nodes)"
            )
        if state.options.joint:
            counts = [n]
        value = torch.full((n, bits), -1, device=self.network.device)
        masked = torch.ones(n, dtype=torch.bool, device=self.network.device)
        groups, start = [], 0
        for b, count in enumerate(counts):
            rows = slice(start, start + count)
            start += count
            if i < len(state.given[b]):
                value[rows, 0], masked[rows] = state.given[b][i], False
            else:
                order = state.draws[b].order(count).to(self.network.device)
                groups.append(_Group(rows, state.draws[b], order, count))
        return _Level(depth, masked, value, groups)

    def _masked_embeddings(self, state: _State, level: _Level) -> Tensor:
        """Embeddings of all levels so far and of this one, of which only given tokens count yet: [N, C]."""
        own = self._embed(level.value.clamp(min=0), level)
        return torch.cat([*state.known, own])

    def _embed(self, value: Tensor, level: _Level) -> Tensor:
        if level.depth < self.network.config.code_depth:
            return self.network.split_emb(value[:, 0])
        return self.network.embed_codes(value)

    def _iterate(
        self, state: _State, level: _Level, tokens: Tokens, x: Tensor, step: int, index: int
    ) -> None:
        """Run the network once and draw what is due."""
        options = state.options
        steps, start = options.iterations[index], options.temperatures[index]
        level.logits = self._logits(state, level, tokens, x)
        chosen = torch.zeros_like(level.masked)
        for group in level.groups:
            chosen[group.rows] = self._due(level, group, step, steps, options)
        temperature = start * (steps - step) / steps
        for group in level.groups:
            rows = chosen[group.rows].nonzero()[:, 0] + group.rows.start
            logits = level.logits[rows] / temperature
            level.value[rows] = group.draws.pick(logits.flatten(0, 1)).view(logits.shape[:2])
        rows = chosen.nonzero()[:, 0]
        x[len(x) - len(chosen) + rows] = self._embed(level.value[rows], level)

    def _logits(self, state: _State, level: _Level, tokens: Tokens, x: Tensor) -> Tensor:
        """Logits [n, d, 2] of the level, guided where that is asked for."""
        n = len(level.masked)
        masked = torch.cat([torch.zeros_like(level.masked[:1]).expand(len(x) - n), level.masked])
        joint = state.options.joint
        if state.null is None:
            return self._heads(
                self.network(x, tokens, masked, state.condition, joint=joint)[-n:], level
            )
        twice = Tokens(
            torch.cat([tokens.sample, tokens.sample + state.condition.samples]),
            torch.cat([tokens.level] * 2),
            torch.cat([tokens.place] * 2),
        )
        both = _joined(state.condition, state.null)
        hidden = self.network(torch.cat([x, x]), twice, torch.cat([masked] * 2), both, joint=joint)
        with_, without = (self._heads(part[-n:], level) for part in hidden.chunk(2))
        return guided(with_, without, state.options.cfg)

    def _heads(self, hidden: Tensor, level: _Level) -> Tensor:
        if level.depth < self.network.config.code_depth:
            return self.network.split_logits(hidden)[:, None]
        return self.network.code_logits(hidden)

    def _due(
        self, level: _Level, group: _Group, step: int, steps: int, options: OctreeOptions
    ) -> Tensor:
        """Which tokens of a group are drawn now: [n] bool. Moves the mask on."""
        masked = level.masked[group.rows].clone()
        n, last = len(masked), step + 1 == steps
        keep = math.floor(n * math.cos(math.pi / 2 * (step + 1) / steps))
        group.left = max(1, min(group.left - 1, keep))
        after = torch.zeros_like(masked)
        after[group.order[: group.left]] = True
        chosen = masked if last else masked & ~after
        if step > options.remask * steps:
            assert level.logits is not None
            doubtful = _doubtful(
                level.logits[group.rows], level.value[group.rows], masked, options.doubt
            )
            chosen = chosen | doubtful
        level.masked[group.rows] = False if last else after
        return chosen

    def _count(self, level: _Level, state: _State) -> list[int]:
        batch = state.tree.batch(level.depth)[level.masked]
        return torch.bincount(batch, minlength=state.tree.batch_size).tolist()

    def _close(self, state: _State, level: _Level) -> None:
        """Split the tree by a finished level and grow the next one."""
        bits = level.value[:, 0]
        batch = state.tree.batch(level.depth)
        for b in range(state.tree.batch_size):
            own = batch == b
            if not bool(bits[own].any()):
                # An empty shape: its likeliest node is split, so that there is a next level.
                assert level.logits is not None
                lead = (level.logits[:, 0, 1] - level.logits[:, 0, 0]).masked_fill(~own, -torch.inf)
                bits[lead.argmax()] = 1
            state.levels[b].append(bits[own].clone())
        state.known.append(self._embed(level.value, level))
        state.tree = state.tree.split(level.depth, bits).grow()

    def _finish(self, state: _State, level: _Level, steps: int) -> OctreeEvent:
        batch = state.tree.batch(level.depth)
        for b, levels in enumerate(state.levels):
            levels.append(level.value[batch == b])
        return OctreeEvent(
            depth=level.depth,
            iteration=steps - 1,
            iterations=steps,
            masked=(0,) * len(state.levels),
            levels=tuple(tuple(levels) for levels in state.levels),
            done=True,
        )


def _joined(a: Conditioned, b: Conditioned) -> Conditioned:
    """The samples of both."""
    features = None
    if a.features is not None and b.features is not None:
        features = [*a.features, *b.features]
    return Conditioned(torch.cat([a.prefix, b.prefix]), torch.cat([a.mask, b.mask]), features)


def _doubtful(logits: Tensor, value: Tensor, masked: Tensor, doubt: tuple[float, float]) -> Tensor:
    """Drawn tokens that the network now disagrees with most: [n] bool.

    As published, masked tokens (-1) count as disagreement and take part in the ranking, and only then fall away: so
    few tokens are drawn again while many are masked.

    Args:
        logits, value: [n, d, 2] and [n, d], -1 where masked.
        masked: tokens that were masked before this iteration [n].
        doubt: shares of the disagreeing tokens, for split bits and for codes.
    """
    wrong = (logits.argmax(-1) != value).sum(-1)
    if value.shape[1] == 1:
        count = int(doubt[0] * int((wrong > 0).sum()))
        rank = -logits[:, 0].gather(1, value % 2)[:, 0]
    else:
        count = int(doubt[1] * int((wrong > 0).sum()))
        rank = wrong
    chosen = torch.zeros_like(masked)
    chosen[rank.topk(count).indices] = True
    return chosen & ~masked
