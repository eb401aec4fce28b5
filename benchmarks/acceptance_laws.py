"""Exact laws of the acceptance rules: how often a sibling stands, and how far the emitted law is from the model's.

    python benchmarks/acceptance_laws.py [--size 24|16384] [--model DIR --codec FILE --prompt "noto red apple"] [--json]

Every branch is enumerated; nothing is drawn. Contexts are synthetic (seeded): codes of eight random dimensions (four at
size 24), logits smooth over them, siblings the likeliest of noisy logits. `delta` of the published rules is nominal.
With --model the laws are a model's own, along pictures that it writes itself (guided, as the model's defaults say), and
the neighbours its codec's; siblings are again the likeliest of noisy logits.
"drawn" siblings come from the noisy logits' law instead, averaged over DRAWS seeded draws; of one sibling that is the
overlap of both laws.
The line "at equal distance" gives certified mode the distance that the published rule was measured to have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Optional

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from anytok.backbone.grammar import Grammar
from anytok.backbone.interleave import BOS, Item
from anytok.codecs.registry import load_codec
from anytok.generators.acceptance import Published, emitted, pulled
from anytok.generators.pipeline import AnyToAny
from anytok.generators.sampling import Sampling, guided, probabilities
from anytok.generators.trees import drawn
from anytok.modalities.text import Text

SIBLINGS = (1, 3, 5)
DRAWS = 8
# law [n], noisy logits [n], and neighbours of any places: places and gaps [m, k + 1]
Context = tuple[Tensor, Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]


def context(size: int, seed: int, sharp: float) -> tuple[Tensor, Tensor, Tensor]:
    """A law [n], codes [n, d], and noisy logits [n]."""
    rng = torch.Generator().manual_seed(seed)
    codes = F.normalize(torch.randn(size, 8 if size > 100 else 4, generator=rng), dim=-1)
    centres = F.normalize(torch.randn(6, codes.shape[1], generator=rng), dim=-1)
    smooth = torch.logsumexp(codes @ centres.T * 4, -1)
    logits = sharp * (smooth + 0.5 * torch.randn(size, generator=rng))
    law = probabilities(logits[None], Sampling(top_k=min(2000, size)))[0].double()
    noisy = logits + 0.5 * sharp * torch.randn(size, generator=rng)
    return law / law.sum(), codes, noisy


def near(codes: Tensor, siblings: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Neighbours of the siblings: places and distances [m, k]."""
    table = torch.cdist(codes[siblings], codes)
    table[torch.arange(len(siblings)), siblings] = torch.inf
    found = table.topk(min(k, len(codes) - 1), largest=False)
    return found.indices, found.values


def certified(
    law: Tensor, siblings: Tensor, places: Tensor, gaps: Tensor, budget: float
) -> tuple[float, float]:
    """How often a sibling stands, and the distance."""
    moved = pulled(
        law[None], siblings[None], places[None], gaps[None], law.new_tensor([budget])
    ).law[0]
    return float(moved[siblings].sum()), float((moved - law).abs().sum()) / 2


def whole_neighbours(
    law: Tensor, siblings: Tensor, places: Tensor, gaps: Tensor, budget: float
) -> tuple[float, float]:
    """The rule (B) that was known: whole neighbours only, nearest first, those too heavy for the rest skipped."""
    order = gaps.flatten().argsort()
    taken, own, left = set(siblings.tolist()), float(law[siblings].sum()), budget
    for y in places.flatten()[order].tolist():
        if y not in taken and float(law[y]) <= left:
            taken.add(y)
            left -= float(law[y])
    return own + budget - left, budget - left


def drawn_rules(
    law: Tensor,
    noisy: Tensor,
    neighbours: Callable[[Tensor], tuple[Tensor, Tensor]],
    count: int,
    rules: list[tuple[str, float]],
) -> Iterator[tuple[str, str, float]]:
    """How often one of `count` drawn siblings stands: lossless, certified, published."""
    q = noisy.double().softmax(-1)
    rng = torch.Generator().manual_seed(count)
    draws = [drawn(q[None], count, rng)[0].tolist() for _ in range(DRAWS)]

    yield "lossless, drawn", "", sum(emitted(law, own, q=q)[1] for own in draws) / DRAWS
    for kind, number in rules:
        key = f"{kind} {number:g}"
        if kind == "delta":
            found = [
                emitted(law, own, *neighbours(torch.tensor(own)), q=q, budget=number)[1]
                for own in draws
            ]
            yield "certified, drawn", key, sum(found) / DRAWS
        near = [neighbours(torch.tensor(own))[0] for own in draws]
        k = near[0].shape[1] - 1
        rule = Published(k=min(k, 10) if kind == "factor" else k, **{kind: number})
        found = [emitted(law, own, n, q=q, relaxation=rule)[1] for own, n in zip(draws, near)]
        yield "published, drawn", key, sum(found) / DRAWS


def synthetic(size: int, seeds: int) -> Iterator[Context]:
    """Contexts of random codes."""
    k = 10 if size < 100 else 1000
    for seed in range(seeds):
        for sharp in (0.5, 1.0, 2.0):
            law, codes, noisy = context(size, seed, sharp)
            yield law, noisy, partial(near, codes, k=k + 1)


@torch.inference_mode()
def real(path: str, codec: str | None, prompts: list[str], every: int) -> Iterator[Context]:
    """The laws along what a model writes, each `every`-th, and neighbours in its codec's tables."""
    given = None if codec is None else {"image": load_codec(codec)}
    model = AnyToAny.load(path, codecs=given)
    own = {key: v for key, v in model.model.generation["image"].items() if key != "units"}
    sampling = Sampling(**own)
    grammar = Grammar(model.interleaver)
    transformer, rng = model.model.transformer, torch.Generator().manual_seed(0)
    tables = model.model.codec("image")
    for answer, prompt in zip(model(prompts, to="image"), prompts):
        text = model.model.text.encode([Text(prompt)])[0]
        packed = model.interleaver.pack([Item(stream=text, target=False)], end=False)
        opening = model.interleaver.tags("image")[0]
        body = model.interleaver.ids(answer.streams[0]).tolist()
        whole = [*packed.ids.tolist(), opening, *body]
        first = len(packed.ids) + 1
        bos = model.interleaver.vocabulary.special(BOS)
        hidden = transformer(torch.tensor([whole]), keep=0).hidden[0]
        null = transformer(torch.tensor([[bos, *whole[first - 1 :]]]), keep=0).hidden[0]
        state = grammar.advance(grammar.start(["image"]), [opening])
        for place, id in enumerate(body):
            span = grammar.allowed(state)[0]
            state = grammar.advance(state, [id])
            if place % every:
                continue
            logits = guided(
                transformer.lm_head.within(hidden[first - 1 + place], *span),
                transformer.lm_head.within(null[1 + place], *span),
                sampling.cfg,
            )
            law = probabilities(logits[None], sampling)[0].double()
            noisy = logits + logits.std() / 4 * torch.randn(logits.shape, generator=rng)
            codes = tables.position_vectors(place)
            yield law / law.sum(), noisy, partial(near, codes, k=101)


def main(
    size: Annotated[int, typer.Option(help="ids of a law: 24 or 16384, say")] = 24,
    seeds: Annotated[int, typer.Option(min=1)] = 6,
    model: Annotated[Optional[str], typer.Option(help="model directory")] = None,  # noqa: UP045
    codec: Annotated[Optional[str], typer.Option(help="its image codec, if not by name")] = None,  # noqa: UP045
    prompt: Annotated[Optional[list[str]], typer.Option(help="texts; may repeat")] = None,  # noqa: UP045
    every: Annotated[int, typer.Option(min=1, help="use each so-many-th law of a picture")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Enumerate the rules on the same contexts."""
    rules = [("delta", d) for d in (0.05, 0.1, 0.2)] + [("factor", 5.0)]
    contexts = (
        synthetic(size, seeds)
        if model is None
        else real(model, codec, prompt or ["noto red apple"], every)
    )
    sums: dict[tuple, list[tuple[float, float]]] = {}
    for law, noisy, neighbours in contexts:
        five = noisy.topk(max(SIBLINGS)).indices
        whole_places, whole_gaps = neighbours(five)
        k = whole_places.shape[1] - 1
        for count in SIBLINGS:
            for name, key, stood in drawn_rules(law, noisy, neighbours, count, rules):
                sums.setdefault((count, name, key), []).append((stood, float("nan")))
        for count in SIBLINGS:
            siblings, places, gaps = five[:count], whole_places[:count], whole_gaps[:count]
            exact = float(law[siblings].sum())
            sums.setdefault((count, "lossless", ""), []).append((exact, 0.0))
            for kind, number in rules:
                rule = Published(k=min(k, 10) if kind == "factor" else k, **{kind: number})
                out, stood = emitted(law, siblings.tolist(), places, relaxation=rule)
                gap = float((out - law).abs().sum()) / 2
                used = places[:, :k], gaps[:, :k]
                found = {"published": (stood, gap)}
                if kind == "delta":
                    found["certified"] = certified(law, siblings, *used, number)
                    found["rule B"] = whole_neighbours(law, siblings, *used, number)
                found["at equal distance"] = certified(law, siblings, *used, gap)
                for name, pair in found.items():
                    sums.setdefault((count, name, f"{kind} {number:g}"), []).append(pair)
    rows = [
        {
            "siblings": count,
            "rule": name,
            "setting": key,
            "stands": sum(a for a, _ in found) / len(found),
            "TV mean": sum(t for _, t in found) / len(found),
            "TV max": max(t for _, t in found),
        }
        for (count, name, key), found in sums.items()
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    typer.echo("siblings rule              setting     stands  TV mean  TV max")
    for row in rows:
        name = f"{row['siblings']:8d} {row['rule']:17s} {row['setting']:11s}"
        typer.echo(f"{name} {row['stands']:6.3f}  {row['TV mean']:7.3f} {row['TV max']:7.3f}")


if __name__ == "__main__":
    typer.run(main)
