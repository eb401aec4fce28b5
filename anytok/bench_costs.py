"""What pruning visual tokens saves, and what choosing them costs (`anytok bench prune`).

A prompt is n visual tokens with text around them. For every method and share: positions that each layer sees, FLOPs,
time of the prompt's pass, time of choosing, bytes of keys and values, time of the steps that follow.

- Weights are random (seeded) and so are features: costs do not depend on them. What pruning does to answers is
  measured on a trained model: `--model NAME --data FOLDER` (`bench_answers.py`).
- Times are the best of `rounds`. With one thread they are CPU seconds of the process, so that other work on the machine
  counts little; with more, whose waiting would count too, and on an accelerator they are wall-clock.
- DyVTE's exit is learned; here its gates, of random weights, are made to leave behind the layer that TransPrune cuts
  last at, at their full cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backbone.pruning.dyvte import DyVTE, Gates
from .backbone.pruning.inside import PrunedTransformer, Pruner
from .backbone.pruning.methods import METHODS
from .backbone.pruning.select import Visual, budget, compact, kept_places
from .backbone.pruning.transprune import TransPrune
from .backbone.transformer import Transformer, TransformerConfig
from .report import Row

SIZES = {
    "mini": TransformerConfig(
        vocab_size=6144, width=160, ffn=448, layers=4, heads=5, kv_heads=5, context=1024
    ),
    "llamagen-b": TransformerConfig(vocab_size=16384, context=1024),
}
BEFORE = tuple(METHODS)
INSIDE = ("transprune", "dyvte")
VISION_LAYERS = 24  # whose CLS attention VTC-CLS sums: CLIP-L


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One method at one share.

    Args:
        method: its name; "all" prunes nothing.
        share: of visual tokens that stay to the end.
        lengths: positions that each layer sees.
        flops: of the prompt's pass, choosing left out.
        prefill: seconds of the prompt's pass, choosing included.
        choosing: seconds of that.
        kv_bytes: held keys and values behind the prompt.
        step: seconds of each step that follows.
    """

    method: str
    share: float
    lengths: tuple[int, ...]
    flops: float
    prefill: float
    choosing: float
    kv_bytes: int
    step: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Args:
        visual, text: tokens of a prompt; a third of the text stands before the visual ones.
        new: steps that follow.
    """

    size: str = "llamagen-b"
    visual: int = 576
    text: int = 64
    batch: int = 1
    new: int = 8
    shares: tuple[float, ...] = (0.5, 0.25, 0.125)
    methods: tuple[str, ...] = BEFORE + INSIDE
    rounds: int = 2
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self):
        if self.size not in SIZES:
            raise ValueError(f"size is {self.size!r}, expected one of {', '.join(SIZES)}")
        for method in self.methods:
            if method not in BEFORE + INSIDE:
                known = ", ".join(BEFORE + INSIDE)
                raise ValueError(f"method is {method!r}, expected one of {known}")
        longest = self.visual + self.text + self.new
        if self.text < 3 or self.visual < 1 or longest > SIZES[self.size].context:
            raise ValueError(
                f"{self.visual} visual tokens, {self.text} of text and {self.new} new: expected text >= 3, "
                f"and at most {SIZES[self.size].context} in all"
            )


@torch.inference_mode()
def measure(plan: Plan) -> list[Figures]:
    """All methods at all shares, and first the prompt as it is."""
    bench = _Bench(plan)
    results = [bench.run("all", 1.0)]
    for share in plan.shares:
        results += [bench.run(method, share) for method in plan.methods if method != "dyvte"]
    if "dyvte" in plan.methods:  # it leaves nothing, whatever the share
        results.append(bench.run("dyvte", 0.0))
    return results


class _Bench:
    """One model and one batch of prompts."""

    def __init__(self, plan: Plan):
        self.plan, self.config = plan, SIZES[plan.size]
        torch.manual_seed(0)
        kind = {"device": plan.device, "dtype": getattr(torch, plan.dtype)}
        self.model = Transformer(self.config).to(**kind).eval()
        rows, before = plan.batch, plan.text // 3
        length = plan.visual + plan.text
        self.x = torch.randn(rows, length, self.config.width).to(**kind)
        places = torch.arange(length, device=plan.device)
        span = (places >= before) & (places < before + plan.visual)
        self.visual = span.expand(rows, -1)
        self.tokens = Visual(
            features=self.x[:, span],
            cls_attention=torch.rand(VISION_LAYERS, rows, plan.visual).to(**kind),
        )
        self.timed: dict[tuple[int, ...], tuple[float, float, int, tuple[int, ...]]] = {}

    def run(self, method: str, share: float) -> Figures:
        """Measure one method at one share."""
        if method in INSIDE:
            return self._inside(method, share)
        choosing, keep = 0.0, torch.ones_like(self.visual)
        if method != "all":
            number = budget(share, self.tokens.counts)
            chosen = METHODS[method](self.tokens, number)
            choosing = self._time(lambda: METHODS[method](self.tokens, number))
            keep = kept_places(self.visual, chosen)
        short = compact(self.x, keep)
        # Which tokens stay changes no cost: prompts of one length are timed once.
        if short.x.shape[1] not in self.timed:
            left = self.visual.gather(1, short.index)
            self.timed[short.x.shape[1]] = self._prompt(
                PrunedTransformer(self.model), short.x, left
            )
        prefill, step, held, lengths = self.timed[short.x.shape[1]]
        return self._figures(method, share, prefill + choosing, choosing, step, held, lengths)

    def _inside(self, method: str, share: float) -> Figures:
        layers = self.config.layers
        if method == "transprune":
            pruner: Pruner = TransPrune.scaled(layers, share)
        else:
            pruner = DyVTE(leaving_gates(self.config, round(layers * 12 / 32), self.x))
        timer = Stopwatch(pruner, self._clock)
        prefill, step, held, lengths = self._prompt(
            PrunedTransformer(self.model, timer), self.x, self.visual, timer
        )
        kept = share if method == "transprune" else 0.0
        return self._figures(method, kept, prefill, timer.best, step, held, lengths)

    def _figures(
        self,
        method: str,
        share: float,
        prefill: float,
        choosing: float,
        step: float,
        held: int,
        lengths: tuple[int, ...],
    ) -> Figures:
        return Figures(
            method=method,
            share=share,
            lengths=lengths,
            flops=self.plan.batch * flops(self.config, lengths),
            prefill=prefill,
            choosing=choosing,
            kv_bytes=held,
            step=step,
        )

    def _prompt(
        self, run: PrunedTransformer, x: Tensor, visual: Tensor, timer: Stopwatch | None = None
    ) -> tuple[float, float, int, tuple[int, ...]]:
        """Seconds of the pass and of a step, bytes held behind the pass, lengths of the layers."""
        made = run.prefill(x, visual, room=self.plan.new)
        held, lengths = made.cache.bytes, tuple(made.cache.lengths.amax(1).tolist())
        if timer is not None:
            timer.best = float("inf")
        prefill = self._time(lambda: run.prefill(x, visual, room=self.plan.new), timer)
        ids = torch.zeros(len(x), dtype=torch.long, device=x.device)
        run.step(ids, made.cache)
        began = self._clock()
        for _ in range(self.plan.new - 1):
            run.step(ids, made.cache)
        step = (self._clock() - began) / max(self.plan.new - 1, 1)
        return prefill, step, held, lengths

    def _time(self, work: Callable[[], Any], timer: Stopwatch | None = None) -> float:
        best = float("inf")
        for _ in range(self.plan.rounds):
            began = self._clock()
            work()
            best = min(best, self._clock() - began)
            if timer is not None:
                timer.lap()
        return best

    def _clock(self) -> float:
        if self.plan.device == "cpu":
            alone = torch.get_num_threads() == 1
            return time.process_time() if alone else time.perf_counter()
        torch.accelerator.synchronize()
        return time.perf_counter()


class Stopwatch:
    """A pruner that notes how long its watching and choosing takes.

    Args:
        pruner: the method.
        clock: seconds.
    """

    def __init__(self, pruner: Pruner, clock: Callable[[], float]):
        self.pruner, self.clock = pruner, clock
        self.positions = pruner.positions
        self.best, self.spent = float("inf"), 0.0

    def lap(self) -> None:
        """One prompt is done."""
        self.best, self.spent = min(self.best, self.spent), 0.0

    def start(self, model: Transformer, prompt: Any) -> _Watched:
        """Begin a prompt."""
        self.spent = 0.0
        return _Watched(self, self.pruner.start(model, prompt))


class _Watched:
    def __init__(self, watch: Stopwatch, tracker: Any):
        self.watch, self.tracker = watch, tracker

    def watches(self, layer: int) -> bool:
        return self.tracker.watches(layer)

    def see(self, prompt: Any, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        began = self.watch.clock()
        self.tracker.see(prompt, parts)
        self.watch.spent += self.watch.clock() - began

    def cut(self, layer: int, prompt: Any) -> Tensor | None:
        began = self.watch.clock()
        keep = self.tracker.cut(layer, prompt)
        self.watch.spent += self.watch.clock() - began
        return keep


def leaving_gates(config: TransformerConfig, behind: int, like: Tensor) -> Gates:
    """Gates of the published size that let all rows leave behind layer `behind` (1 the first)."""
    gates = Gates(width=config.width, layers=config.layers).to(like)
    for i, gate in enumerate(gates.visual_gates_router):
        half = gate.w1.weight.shape[0] // 2
        gate.w1.weight[half:] = -gate.w1.weight[:half]
        # GELU(z) + GELU(-z) > 0: the row of ones wins whatever the features are.
        gate.w2.weight.zero_()
        gate.w2.weight[int(i + 1 >= behind)] = 1.0
    return gates


def flops(config: TransformerConfig, lengths: Sequence[int]) -> float:
    """Of a prompt's pass through layers that see so many positions: matrices, and attention over the causal half."""
    heads, d = config.heads * config.head_size, config.width
    keys = 2 * config.kv_heads * config.head_size
    matrices = 2 * (d * (heads + keys) + heads * d + 3 * d * config.ffn)
    return sum(n * matrices + 2 * n * n * heads for n in lengths)


def rows_of(results: Sequence[Figures]) -> list[Row]:
    """Figures as a report's rows, beside those of the prompt as it is."""
    whole = results[0]
    return [
        Row(
            name=f"{r.method} {r.share:.1%}" if r is not whole else "all tokens",
            values={
                "positions at the end": r.lengths[-1],
                "FLOPs": f"{r.flops / whole.flops:.1%}",
                "prefill ms": f"{1000 * r.prefill:.0f}",
                "of all": f"{r.prefill / whole.prefill:.1%}",
                "choosing ms": f"{1000 * r.choosing:.1f}",
                "of prefill": f"{r.choosing / whole.prefill:.2%}",
                "KV kB": f"{r.kv_bytes / 1000:.0f}",
                "KV of all": f"{r.kv_bytes / whole.kv_bytes:.1%}",
                "step ms": f"{1000 * r.step:.1f}",
            },
        )
        for r in results
    ]
