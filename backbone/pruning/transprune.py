"""TransPrune (arXiv 2507.20630): tokens that the layers change much, and that the question attends to, stay.

- Transition of a token in a part of a layer (attention, feed-forward) with input a, behind the norm, and output b,
  before the residual: |b| / |a| times exp(1 - cos(a, b)) over its sum across the row's positions. Both parts are added,
  and layers accumulate, divided by their sum over the visual tokens.
- Attention of the question: what the positions behind the visual tokens pay to each, with the next layer's queries
  and keys, mean over heads and positions, divided likewise.
- After each cutting layer int(share n) of a row's n visual tokens with the highest sum of both stay.

Rows are independent here: sums do not run over the batch or over padding, as in the published code, which is for one
row. Positions count anew after each cut, as published; `PrunedTransformer(positions="kept")` changes that.

B rows, T positions, D width, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..transformer import Attention, Transformer
from .inside import Prompt
from .select import Positions, Visual, top

EPSILON = 1e-8  # in divisions by sums, as published


@dataclass(frozen=True, kw_only=True)
class TransPrune:
    """Where it watches and cuts. Layers count from 1, as in the paper; the defaults are its for 32 layers.

    Args:
        cuts: (layer, share of the original visual tokens that stays behind it), layers ascending, shares descending.
        watch: the first and the last layer whose transitions count.
    """

    cuts: tuple[tuple[int, float], ...] = ((7, 0.875), (9, 0.625), (12, 0.125))
    watch: tuple[int, int] = (7, 12)
    positions: Positions = "packed"

    def __post_init__(self):
        layers, shares = [c[0] for c in self.cuts], [c[1] for c in self.cuts]
        if not layers or sorted(set(layers)) != layers or layers[0] < 1:
            raise ValueError(f"cuts are at the layers {layers}, expected ascending ones from 1")
        if sorted(shares, reverse=True) != shares or not 0 <= shares[-1] <= shares[0] <= 1:
            raise ValueError(f"shares are {shares}, expected descending ones in 0 ... 1")
        if not 1 <= self.watch[0] <= layers[0]:
            raise ValueError(
                f"the first layer watched is {self.watch[0]}, expected at most the first cut, {layers[0]}"
            )

    @classmethod
    def scaled(cls, layers: int, share: float = 0.125) -> TransPrune:
        """The published plan for a model of other depth, down to another share.

        Raises:
            ValueError: fewer than 4 layers.
        """
        if layers < 4:
            raise ValueError(f"the model has {layers} layers, TransPrune's three cuts need 4")
        first = max(1, round(layers * 7 / 32))
        second = max(first + 1, round(layers * 9 / 32))
        third = max(second + 1, round(layers * 12 / 32))
        steps = [1 - (1 - share) * gone for gone in (1 / 7, 3 / 7, 1)]
        return cls(cuts=tuple(zip((first, second, third), steps)), watch=(first, third))

    def start(self, model: Transformer, prompt: Prompt) -> _Tracker:
        """Begin a prompt. Rows without visual tokens are left as they are."""
        if self.cuts[-1][0] >= model.config.layers:
            raise ValueError(
                f"the last cut is behind layer {self.cuts[-1][0]} of {model.config.layers}; "
                f"take TransPrune.scaled({model.config.layers})"
            )
        has = prompt.visual.any(1)
        mute = has & ~prompt.text_behind.any(1)
        if bool(mute.any()):
            row = int(mute.nonzero()[0])
            raise ValueError(f"row {row} has no text behind its visual tokens to judge them by")
        return _Tracker(self, model, prompt)


class _Tracker:
    def __init__(self, plan: TransPrune, model: Transformer, prompt: Prompt):
        self.plan, self.model = plan, model
        self.cuts = dict(plan.cuts)
        self.tokens = prompt.visual.sum(1).tolist()
        # By place in the sequence given, so that nothing has to follow when tokens leave.
        self.seen = torch.zeros(prompt.index.shape, device=prompt.x.device)

    def watches(self, layer: int) -> bool:
        return self.plan.watch[0] <= layer + 1 <= self.plan.watch[1]

    def see(self, prompt: Prompt, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        for before, after in parts:
            value = transition(before, after, prompt.real)
            self.seen.scatter_add_(1, prompt.index.clamp(min=0), value.where(prompt.real, 0))

    def cut(self, layer: int, prompt: Prompt) -> Tensor | None:
        share = self.cuts.get(layer + 1)
        if share is None:
            return None
        wanted = [int(n * share) for n in self.tokens]
        moved = self.seen.gather(1, prompt.index.clamp(min=0))
        asked = attention_of_text(self.model, layer + 1, prompt)
        score = _share(moved, prompt.visual) + _share(asked, prompt.visual)
        # Visual places as tokens of their own: top() chooses among those that are `valid`.
        visual = Visual(features=score[..., None], valid=prompt.visual)
        chosen = top(visual, score, [min(m, n) for m, n in zip(wanted, visual.counts)])
        return ~prompt.visual & prompt.real | chosen.mask(score.shape[1])


def transition(before: Tensor, after: Tensor, real: Tensor) -> Tensor:
    """[B, T] of a part's input and output [B, T, D].

    Args:
        real: [B, T], False at padding, which does not count in the sum.
    """
    before, after = before.float(), after.float()
    lengths = [x.norm(dim=-1).clamp(min=EPSILON) for x in (before, after)]
    cosine = (before * after).sum(-1) / (lengths[0] * lengths[1])
    turned = torch.exp(1 - cosine).where(real, 0)
    return lengths[1] / lengths[0] * turned / turned.sum(1, keepdim=True)


def attention_of_text(model: Transformer, layer: int, prompt: Prompt) -> Tensor:
    """[B, T], the attention that the text behind the visual tokens would pay in `layer` (0 the first)."""
    block: Any = model.model.layers[layer]
    x = block.input_layernorm(prompt.x)
    asking = prompt.text_behind
    # Only the columns in which some row asks: a question is short beside a picture.
    columns = asking.any(0).nonzero()[:, 0]
    q, k = queries(block.self_attn, x[:, columns]), keys(block.self_attn, x)
    if model.rotary is not None:
        q = model.rotary.turn(q, *model.rotary.at(prompt.positions[:, columns], q.dtype))
        k = model.rotary.turn(k, *model.rotary.at(prompt.positions, k.dtype))
    q = rearrange(q, "b (k g) t h -> b k g t h", k=k.shape[1])
    logits = torch.einsum("bkgth,bksh->bkgts", q, k) / q.shape[-1] ** 0.5
    later = torch.arange(k.shape[2], device=k.device) > columns[:, None]
    paid = logits.float().masked_fill(later, -torch.inf).softmax(-1).mean((1, 2))
    weight = asking[:, columns].float()
    return torch.einsum("bts,bt->bs", paid, weight) / weight.sum(1, keepdim=True).clamp(min=1)


def queries(attention: Attention, x: Tensor) -> Tensor:
    """[B, N, T, H] of x [B, T, D], not yet turned by position."""
    q = rearrange(attention.q_proj(x), "b t (n h) -> b n t h", h=attention.head_size)
    return attention.q_norm(q) if attention.qk_norm else q


def keys(attention: Attention, x: Tensor) -> Tensor:
    """[B, K, T, H] of x [B, T, D], not yet turned by position."""
    k = rearrange(attention.k_proj(x), "b t (n h) -> b n t h", h=attention.head_size)
    return attention.k_norm(k) if attention.qk_norm else k


def _share(values: Tensor, visual: Tensor) -> Tensor:
    """Values [B, T] of visual places, over their sum."""
    own = values.where(visual, 0)
    return own / (own.sum(1, keepdim=True) + EPSILON)
