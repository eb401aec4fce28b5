"""Heads: what the hidden state predicts. Here the next token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class NextToken(nn.Linear):
    """Logits over the whole vocabulary, or over a range of ids. The weight is Llama's `lm_head.weight` [V, D]."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__(width, vocab_size, bias=False)

    def within(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Logits [..., stop - start] of the ids start ... stop - 1: what a grammar allows is often one block."""
        return F.linear(hidden, self.weight[start:stop])


def next_token_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy in nats.

    Args:
        logits: [..., V], of any floating type; the loss is taken in float32.
        targets: [...] ids.
        weights: [...] >= 0; 0 leaves a position out.
    """
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum().clamp(min=1e-9)
