"""What every method has to beat: chance, even spacing, and the longest vectors."""

from __future__ import annotations

import torch

from ...codecs.codec import Rng, item_rngs
from .select import Keep, Selection, Visual, top


def random(visual: Visual, keep: Keep, *, rng: Rng | None = None) -> Selection:
    """m tokens of each row by chance, each row from its own generator (None: seed 0 each)."""
    real = visual.real
    draws = torch.zeros(real.shape)
    for row, (count, g) in enumerate(zip(visual.counts, item_rngs(rng, len(real)))):
        draws[row, real[row].cpu()] = torch.rand(count, generator=g)
    return top(visual, draws.to(real.device), keep)


def uniform(visual: Visual, keep: Keep) -> Selection:
    """m tokens of each row, evenly spaced."""
    real = visual.real
    n = real.sum(1, keepdim=True).clamp(min=1)
    m = torch.tensor(visual.wanted(keep), device=real.device)[:, None]
    place = real.cumsum(1) - 1
    # A token stays where the count of kept ones, m (place + 1/2) / n, passes a half: in the middle of each stretch.
    before, after = (2 * m * place + n) // (2 * n), (2 * m * (place + 1) + n) // (2 * n)
    return Selection.of(real & (after > before))


def norm(visual: Visual, keep: Keep) -> Selection:
    """The m tokens of each row with the largest L2 norm."""
    return top(visual, visual.features.float().norm(dim=-1), keep)
