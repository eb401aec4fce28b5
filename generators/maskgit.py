"""The one masked loop (MaskGIT, arXiv 2202.04200): draw all open positions at once, keep the sure ones, draw again.

A step: logits of every position -> one draw for each open one -> a doubt for each -> the most doubtful are open again.
How many stay open falls along a curve to none. What differs between systems is an option:

- `curve`: arccos (TiTok, One-D-Piece) or cosine (Phenaki, MAR, OctGPT).
- `doubt`: the drawn logit, noised (TiTok); the drawn probability (Phenaki without a critic); chance alone (MAR); or a
  critic's word, which may take back what stood for many steps (Phenaki with one).
- guidance: `u + (c - u) w`, where w goes from 1 to `cfg` along `guidance`, in one batch with the condition and without.

What no step changes (a caption's keys and values, position biases) is computed once (`prepare`). A row's codes do not
depend on its batch-mates: it counts its own free positions and draws for these alone, from its own generator, in the
published order (codes, then doubts), so published traces replay. Other loops may use `open_positions`, `gumbel`,
`most` and `Numbers`.

Letters: B requests, R rows (B, or 2 B with guidance), N positions, V codes, L condition positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..codecs.codec import Codec, item_rngs
from ..codecs.layout import Fixed, Frames, Grid, Layout, Prefix
from ..codecs.stream import TokenStream
from .generator import Canvas, Event
from .sampling import guided

# r in 0...1, the share of the steps that is done -> the share of the positions that is open
CURVES: Mapping[str, Callable[[float], float]] = {
    "arccos": lambda r: math.acos(r) / (math.pi / 2),
    "cosine": lambda r: math.cos(r * math.pi / 2),
    "linear": lambda r: 1 - r,
}
# r -> how far guidance has come; "power-cosine" is MDT's (arXiv 2303.14389)
GUIDANCE: Mapping[str, Callable[[float], float]] = {
    "constant": lambda r: 1.0,
    "linear": lambda r: r,
    "power-cosine": lambda r: (1 - math.cos(math.pi * r**3)) / 2,
}
# what a critic's noise is multiplied with, after a share r of the steps
ANNEAL: Mapping[str, Callable[[float], float]] = {
    "decay": lambda r: 1 - r,
    "fixed": lambda r: 1.0,
    "increase": lambda r: r,
}


@dataclass(frozen=True, kw_only=True)
class Unmasking:
    """How a canvas is filled.

    Args:
        steps: passes of the network.
        curve: how many positions stay open.
        rounding: of that number; "floor" is TiTok's and MAR's, "round" Phenaki's.
        temperature: of the first draw; falls linearly, and the last draw takes the likeliest code. 0 is greedy.
        softmax: what logits are divided by, at the start and at the end ((1.3, 0.5) in TiTok's evaluation).
        doubt: what decides which positions are drawn again.
        cfg: guidance; 1 for none.
        guidance: how it rises from 1 to `cfg` (with "constant" it does not rise).
        critic_noise, critic_anneal: uniform noise on a critic's word, and how it changes.
    """

    steps: int = 16
    curve: Literal["arccos", "cosine", "linear"] = "cosine"
    rounding: Literal["floor", "round"] = "floor"
    temperature: float = 1.0
    softmax: tuple[float, float] = (1.0, 1.0)
    doubt: Literal["logit", "probability", "chance", "critic"] = "logit"
    cfg: float = 1.0
    guidance: Literal["constant", "linear", "power-cosine"] = "constant"
    critic_noise: float = 1.0
    critic_anneal: Literal["decay", "fixed", "increase"] = "decay"

    def __post_init__(self):
        object.__setattr__(self, "softmax", tuple(self.softmax))  # a list, where from JSON
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected 1 or more")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more")
        if len(self.softmax) != 2 or min(self.softmax) <= 0:
            raise ValueError(f"softmax is {self.softmax}, expected two numbers above 0")
        for name, table in (
            ("curve", CURVES),
            ("rounding", ("floor", "round")),
            ("doubt", ("logit", "probability", "chance", "critic")),
            ("guidance", GUIDANCE),
            ("critic_anneal", ANNEAL),
        ):
            if getattr(self, name) not in table:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(table)}"
                )

    def done(self, step: int) -> float:
        """The share of the steps that is done after `step` (0, 1, ...)."""
        return (step + 1) / self.steps

    def open_after(self, step: int, free: int, opened: int) -> int:
        """How many of `free` positions are open after `step`, of which `opened` were open before it."""
        # A critic may take back anything; Phenaki without one may settle nothing in a step; others settle one or more.
        most = {"critic": free, "probability": opened}.get(self.doubt, opened - 1)
        wanted = open_positions(self.done(step), free, self.curve, self.rounding)
        return max(min(wanted, most), min(1, free))

    def cfg_at(self, step: int) -> float:
        """The guidance of a step."""
        return 1 + (self.cfg - 1) * GUIDANCE[self.guidance](step / self.steps)

    def temperature_at(self, step: int) -> float:
        """The temperature of a step's draw."""
        return self.temperature * (1 - self.done(step))

    def softmax_at(self, step: int) -> float:
        """What a step's logits are divided by."""
        start, end = self.softmax
        return end + (start - end) * (1 - self.done(step))


class MaskedNetwork(Protocol):
    """A network that sees all positions at once; a critic is one whose answer has no V."""

    vocab: int  # V; the id V means that a position is open

    def prepare(self, conditions: Sequence[Tensor | None], grid: tuple[int, ...]) -> Any:
        """What no step changes, for R rows; None is the null condition."""
        ...

    def check(self, canvas: Canvas) -> None:
        """Raise ValueError where a canvas does not fit: too many positions, a grid or condition of another kind."""
        ...

    def __call__(self, ids: Tensor, prepared: Any) -> Tensor:
        """Ids [R, N] to logits [R, N, V] (a critic: doubt [R, N])."""
        ...


class MaskGIT:
    """Masked generation with a network and, where there is one, a critic.

    Args:
        network: in eval mode.
        critic: for `doubt="critic"`.
        options: what `run` uses where it is given none.
        codec: the name of the codec whose codes the network writes, where known.
    """

    def __init__(
        self,
        network: MaskedNetwork,
        critic: MaskedNetwork | None = None,
        *,
        options: Unmasking | None = None,
        codec: str | None = None,
    ):
        self.network, self.critic = network, critic
        self.options = options or Unmasking()
        self.codec = codec

    def run(
        self,
        requests: Sequence[Canvas],
        options: Unmasking | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> Iterator[Event]:
        """One event a step and request; the last one's `codes` are whole.

        Canvases of one grid go together; others follow.

        Raises:
            ValueError: a canvas that the network cannot fill, or a critic asked for that is not there.
        """
        options = options or self.options
        if options.doubt == "critic" and self.critic is None:
            raise ValueError(
                "doubt is 'critic' and there is no critic, expected 'logit', 'probability' or 'chance'"
            )
        generators = item_rngs(rng, len(requests))
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for i, canvas in enumerate(requests):
            self._check(i, canvas)
            groups.setdefault((len(canvas.codes), canvas.grid), []).append(i)
        return self._groups(list(groups.values()), requests, options, generators)

    def fill(
        self,
        requests: Sequence[Canvas],
        options: Unmasking | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> list[Tensor]:
        """The filled codes [N] of each canvas, on the CPU."""
        codes = {e.request: e.codes for e in self.run(requests, options, rng) if e.reason}
        return [codes[i].cpu() for i in range(len(requests))]  # type: ignore[union-attr]

    def streams(
        self,
        codec: Codec,
        conditions: Sequence[Tensor | int | None],
        *,
        units: int = 1,
        options: Unmasking | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> list[TokenStream]:
        """Whole streams of a codec, from conditions alone.

        Args:
            codec: whose codes the network was trained on.
            conditions: one a stream: a class, ids, or features; None for none.
            units: frames, where the layout leaves their number open.
        """
        if codec.spec.vocab != ((self.network.vocab,),):
            raise ValueError(
                f"'{codec.spec.name}' has the vocabulary {codec.spec.vocab}, the generator writes "
                f"{self.network.vocab} codes, one a position; load the codec that it was trained with"
                + (f": '{self.codec}'" if self.codec else "")
            )
        grid, n = shape_of(codec.spec.layout, units)
        given = [torch.tensor(c) if isinstance(c, int) else c for c in conditions]
        open_codes = torch.full((n,), -1)
        canvases = [Canvas(codes=open_codes, grid=grid, condition=c) for c in given]
        return [codec.stream(codes, grid=grid) for codes in self.fill(canvases, options, rng)]

    def _check(self, number: int, canvas: Canvas) -> None:
        if len(canvas.codes) and int(canvas.codes.max()) >= self.network.vocab:
            raise ValueError(
                f"canvas {number} holds code {int(canvas.codes.max())}, "
                f"expected -1 (open) or 0 to {self.network.vocab - 1}"
            )
        self.network.check(canvas)

    def _groups(
        self,
        groups: list[list[int]],
        requests: Sequence[Canvas],
        options: Unmasking,
        rng: list[torch.Generator],
    ) -> Iterator[Event]:
        for numbers in groups:
            canvases = [requests[i] for i in numbers]
            yield from self._loop(numbers, canvases, options, [rng[i] for i in numbers])

    @torch.inference_mode()
    def _loop(
        self,
        numbers: list[int],
        canvases: list[Canvas],
        options: Unmasking,
        rng: list[torch.Generator],
    ) -> Iterator[Event]:
        predict = Guided(self.network, canvases, options)
        judge = None
        if options.doubt == "critic" and self.critic is not None:
            judge = Guided(self.critic, canvases, options)
        ids = torch.stack([canvas.codes for canvas in canvases]).to(predict.device)
        masked = free = ids < 0  # [B, N]
        numbers_of = Numbers(rng, free)
        frees = free.sum(1).tolist()
        opened = list(frees)
        for step in range(options.steps):
            logits = predict(ids.masked_fill(masked, self.network.vocab), step).float()
            logits = logits / options.softmax_at(step)
            drawn = draw_codes(logits, options, step, numbers_of)
            ids = torch.where(masked, drawn, ids)
            if step == options.steps - 1:
                break
            if judge is not None:
                doubt = _criticised(judge(ids, step).float(), options, step, numbers_of)
                candidates = free
            else:
                doubt = _doubt(logits, ids, options, step, numbers_of)
                candidates = masked
            opened = [options.open_after(step, f, o) for f, o in zip(frees, opened)]
            masked = most(doubt.masked_fill(~candidates, -math.inf), opened)
            codes = ids.masked_fill(masked, -1)
            for row, number in enumerate(numbers):
                yield Event(number, (), frees[row] - opened[row], codes=codes[row])
        for row, number in enumerate(numbers):
            yield Event(number, (), frees[row], "end", ids[row])


class Guided:
    """A network under guidance: what is prepared once, and both rows of a request in one pass.

    Args:
        canvases: B of one grid.
        options: tell which steps are guided.
    """

    def __init__(self, network: MaskedNetwork, canvases: Sequence[Canvas], options: Unmasking):
        self.network, self.options = network, options
        given = [canvas.condition for canvas in canvases]
        grid = canvases[0].grid
        self.useless = all(condition is None for condition in given)
        scales = [self._scale(step) for step in range(options.steps)]
        nulls: list[Tensor | None] = [None] * len(given)
        self.single = network.prepare(given, grid) if 1 in scales else None
        self.both = network.prepare([*given, *nulls], grid) if set(scales) != {1} else None

    @property
    def device(self) -> torch.device:
        """Where the network's weights lie; the CPU where it has none."""
        parameters = getattr(self.network, "parameters", None)
        first = next(iter(parameters()), None) if parameters else None
        return torch.device("cpu") if first is None else first.device

    def __call__(self, ids: Tensor, step: int) -> Tensor:
        """What the network says of ids [B, N], guided as the step asks."""
        scale = self._scale(step)
        if scale == 1:
            return self.network(ids, self.single)
        conditional, null = self.network(torch.cat([ids, ids]), self.both).chunk(2)
        return guided(conditional, null, scale)

    def _scale(self, step: int) -> float:
        """Without any condition there is nothing to guide."""
        return 1 if self.useless else self.options.cfg_at(step)


def open_positions(done: float, n: int, curve: str = "cosine", rounding: str = "floor") -> int:
    """How many of n positions are still open when the share `done` of the steps is behind."""
    exact = n * CURVES[curve](done)
    return math.floor(exact) if rounding == "floor" else round(exact)


class Numbers:
    """Uniform numbers for the free positions of each row, from the row's own generator.

    Args:
        rng: one a row.
        free: which positions are drawn at all, [B, N] bool.
    """

    def __init__(self, rng: Sequence[torch.Generator], free: Tensor):
        self.rng, self.device, self.n = rng, free.device, free.shape[1]
        self.places = [row.nonzero().squeeze(-1) for row in free.cpu()]

    def __call__(self, *shape: int) -> Tensor:
        """[B, N, *shape]; 0.5 where a position is not free."""
        rows = [self._row(g, places, shape) for g, places in zip(self.rng, self.places)]
        return torch.stack(rows).to(self.device)

    def _row(self, g: torch.Generator, places: Tensor, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.rand((len(places), *shape), generator=g, device=g.device)
        if len(places) == self.n:
            return drawn
        return drawn.new_full((self.n, *shape), 0.5).index_copy_(0, places.to(g.device), drawn)


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise from uniform numbers, in their place."""
    # 0 is drawn now and then; its noise must stay finite, for temperature 0 multiplies it.
    return uniform.clamp_(min=1e-20).log_().neg_().log_().neg_()


def draw_codes(logits: Tensor, options: Unmasking, step: int, numbers: Numbers) -> Tensor:
    """One code [B, N] for each position, from logits [B, N, V] at the step's temperature.

    argmax(logits + T * Gumbel) is a draw from softmax(logits / T).
    """
    if options.temperature == 0:
        return logits.argmax(-1)
    noise = gumbel(numbers(logits.shape[-1]))
    return noise.mul_(options.temperature_at(step)).add_(logits).argmax(-1)


def most(doubt: Tensor, counts: Sequence[int]) -> Tensor:
    """Which counts[i] positions of row i have the most doubt: [B, N] bool of [B, N]."""
    order = doubt.argsort(dim=-1, descending=True, stable=True)
    wanted = torch.tensor(counts, device=doubt.device)[:, None]
    places = torch.arange(doubt.shape[-1], device=doubt.device)
    return torch.zeros_like(doubt, dtype=torch.bool).scatter(1, order, places < wanted)


def _doubt(logits: Tensor, ids: Tensor, options: Unmasking, step: int, numbers: Numbers) -> Tensor:
    """How unsure each drawn code is: [B, N] of logits [B, N, V] and ids [B, N]."""
    if options.doubt == "chance":
        return numbers()
    if options.doubt == "probability":
        logits = logits.log_softmax(-1)
    sure = logits.gather(-1, ids[..., None]).squeeze(-1)
    if options.doubt == "logit" and options.temperature > 0:
        sure = sure + options.temperature_at(step) * gumbel(numbers())
    return -sure


def _criticised(said: Tensor, options: Unmasking, step: int, numbers: Numbers) -> Tensor:
    """A critic's doubt [B, N] with uniform noise around 0 (Token-Critic, arXiv 2209.04439)."""
    scale = options.critic_noise * ANNEAL[options.critic_anneal](options.done(step))
    return said + scale * (numbers() - 0.5)


def shape_of(layout: Layout, units: int = 1) -> tuple[tuple[int, ...], int]:
    """The grid and the number of positions of a whole stream; `units`: frames, where their number is open.

    Raises:
        ValueError: the layout does not say (an open picture size, an octree).
    """
    if isinstance(layout, Fixed):
        return (), layout.length
    if isinstance(layout, Prefix):
        return (), layout.max_length
    if isinstance(layout, Grid) and layout.shape is not None:
        return tuple(layout.shape), math.prod(layout.shape)
    if isinstance(layout, Frames) and layout.shape is not None:
        grid = (units, *layout.shape)
        return grid, math.prod(grid)
    raise ValueError(
        f"{layout} does not say how many positions a stream has; fill a Canvas instead"
    )
