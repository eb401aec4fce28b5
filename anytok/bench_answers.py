"""What pruning does to answers: a trained model names held-out pictures from fewer and fewer of their tokens.

The same model, the same pictures, greedy decoding within the grammar; before the model (`METHODS`) or between its
layers (TransPrune). Beside every method stand "all" tokens and "random" ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .backbone.grammar import Grammar, State
from .backbone.interleave import Item, Packed
from .backbone.pruning.inside import PrunedTransformer
from .backbone.pruning.methods import METHODS
from .backbone.pruning.methods import select as choose
from .backbone.pruning.select import Visual, budget, compact, kept_places
from .backbone.pruning.transprune import TransPrune
from .codecs.training.data import find_rows
from .generators.pipeline import AnyToAny
from .modalities import Image

ANSWERING = (*(m for m in METHODS if m != "vtccls"), "transprune")  # codes have no CLS
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Pictures as the model reads them, B rows of T positions.

    Args:
        x: [B, T, D], right-padded. real, visual: [B, T].
    """

    x: Tensor
    real: Tensor
    visual: Tensor

    @property
    def tokens(self) -> Visual:
        """The visual tokens of all rows."""
        rows = [x[places] for x, places in zip(self.x, self.visual)]
        valid = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        return Visual(
            features=pad_sequence(rows, batch_first=True),
            valid=pad_sequence(valid, batch_first=True).to(self.x.device),
        )


def measure_answers(
    model: AnyToAny,
    folder: Path,
    shares: Sequence[float],
    methods: Sequence[str],
    *,
    splits: Sequence[str] = ("held",),
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Share of exactly right names for each method and share, "all" first.

    Raises:
        ValueError: a method that cannot answer from codes.
    """
    for method in methods:
        if method not in ANSWERING:
            raise ValueError(
                f"method is {method!r}, for answers expected one of {', '.join(ANSWERING)}"
            )
    rows = find_rows(folder, modality="image", splits=splits)[:limit]
    names = [str(row["name"]) for row in rows]
    pictures = [Image.load(row["image"]) for row in rows]
    batches = [
        prompts_of(model, pictures[start : start + BATCH])
        for start in range(0, len(pictures), BATCH)
    ]
    plans = [("all", 1.0)] + [(method, share) for share in shares for method in methods]
    results = []
    for method, share in plans:
        given = [text for batch in batches for text in name(model, batch, method, share)]
        right = sum(a == b for a, b in zip(given, names)) / len(names)
        tokens = float(batches[0].visual.sum(1).float().mean())
        kept = max(1, round(share * tokens))
        results.append(
            {"method": method, "share": share, "tokens": kept, "right": right, "of": len(names)}
        )
    return results


def prompts_of(model: AnyToAny, pictures: Sequence[Image]) -> Prompts:
    """Encode pictures as prompts."""
    lists = [[picture] for picture in pictures]
    packed: list[Packed] = []
    for streams in model._encode(lists):
        items = [Item(stream=stream, target=False) for stream in streams]
        packed.append(model.interleaver.pack(items, end=False))
    visual = []
    for one in packed:
        places = torch.zeros(len(one), dtype=torch.bool)
        for part in one.segments:
            places[part.start : part.stop] = part.block != "text"
        visual.append(places)
    x = pad_sequence([model._embedded(one) for one in packed], batch_first=True)
    real = pad_sequence(
        [torch.ones(len(one), dtype=torch.bool) for one in packed], batch_first=True
    )
    return Prompts(
        x=x, real=real.to(x.device), visual=pad_sequence(visual, batch_first=True).to(x.device)
    )


@torch.inference_mode()
def name(model: AnyToAny, prompts: Prompts, method: str, share: float) -> list[str]:
    """The texts that the model writes about pictures of which a share is left."""
    pruner, keep = None, prompts.real
    if method == "transprune":
        pruner = TransPrune.scaled(model.model.transformer.config.layers, share)
    elif method != "all":
        tokens = prompts.tokens
        chosen = choose(method, tokens, budget(share, tokens.counts))
        keep = kept_places(prompts.visual, chosen, real=prompts.real)
    # Positions are kept: the model was trained on pictures of one length.
    short = compact(prompts.x, keep, positions="kept")
    left = prompts.visual.gather(1, short.index.clamp(min=0)) & (short.index >= 0)
    run = PrunedTransformer(model.model.transformer, pruner, positions="kept")
    units = model.model.generation.get("text", {}).get("units", 16)
    made = run.prefill(short.x, left, counts=short.counts, at=short.positions, room=int(units) + 2)
    grammar = Grammar(model.interleaver, limits={"text": int(units)})
    ids = _greedy(run, grammar, made.last, made.cache, int(units) + 2)
    return [_text(model, row) for row in ids]


def _greedy(
    run: PrunedTransformer, grammar: Grammar, hidden: Tensor, cache, most: int
) -> list[list[int]]:
    """Ids of all rows in step; a row that has ended is fed its last id on and writes nothing."""
    states: list[State] = [grammar.start(["text"]) for _ in hidden]
    written: list[list[int]] = [[] for _ in hidden]
    for _ in range(most):
        logits = run.model.lm_head(hidden)
        fed = []
        for row, state in enumerate(states):
            if state.done:
                fed.append(written[row][-1])
                continue
            refused = grammar.mask(grammar.allowed(state), logits.device)
            best = int(logits[row].masked_fill(refused, -torch.inf).argmax())
            written[row].append(best)
            states[row] = grammar.advance(state, (best,))
            fed.append(best)
        if all(state.done for state in states):
            break
        hidden = run.step(torch.tensor(fed, device=hidden.device), cache)
    return written


def _text(model: AnyToAny, ids: list[int]) -> str:
    closing = model.interleaver.tags("text")[1]
    whole = ids if closing in ids else [*ids, closing]
    (stream,) = model.interleaver.parse(whole)
    (text,) = model.model.text.decode([stream])
    return text.text
