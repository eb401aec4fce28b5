"""Sampling: guidance, temperature, top-k, top-p, and one draw a row from that row's own generator.

The order is LlamaGen's and transformers': guidance on logits, temperature, top-k (ties are kept), top-p (the id that
crosses the threshold is kept), softmax, draw. B rows, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How ids are drawn.

    Args:
        temperature: 0 takes the likeliest id.
        top_k: only the k likeliest; 0 for all.
        top_p: only the likeliest whose probabilities reach p together.
        cfg: guidance; 1 for none.
        guide: only the first so many ids are guided; None for all. Behind them guidance costs nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cfg: float = 1.0
    guide: int | None = None

    def __post_init__(self):
        if self.guide is not None and self.guide < 0:
            raise ValueError(f"guide is {self.guide}, expected 0 or more, or None for all ids")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1")

    @property
    def greedy(self) -> bool:
        """Whether no draw is made."""
        return self.temperature == 0 or self.top_k == 1

    def guides(self, written: int) -> bool:
        """Whether the id behind `written` others, or any later one, is guided."""
        return self.cfg != 1 and (self.guide is None or written < self.guide)

    @property
    def unguided(self) -> Sampling:
        """The same without guidance."""
        return replace(self, cfg=1.0, guide=None)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits (arXiv 2207.12598)."""
    return unconditional + (conditional - unconditional) * scale


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from: [B, V], float32, of logits [B, V]."""
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        dropped = (before > sampling.top_p).scatter(-1, order, before > sampling.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits.softmax(-1)


def draw(logits: Tensor, sampling: Sampling, rng: Sequence[torch.Generator]) -> list[int]:
    """One index a row of logits [B, V]; row i spends one number of rng[i] and of nothing else."""
    if sampling.greedy:
        return logits.argmax(-1).tolist()
    return pick(probabilities(logits, sampling), rng)


def pick(laws: Tensor, rng: Sequence[torch.Generator]) -> list[int]:
    """One index a row of laws [B, V], which need not sum to 1; row i spends one number of rng[i]."""
    below = laws.double().cumsum(-1)
    spots = [torch.rand((), generator=g, device=g.device, dtype=torch.float64) for g in rng]
    spot = torch.stack(spots).to(below.device) * below[:, -1]
    return torch.searchsorted(below, spot[:, None], right=True).squeeze(-1).tolist()
