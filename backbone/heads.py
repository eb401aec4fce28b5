"""Heads: what the hidden state predicts. The next token, or the velocity of a flow (xAR).

B rows, T positions, C latent channels, D width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
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


class Flow(nn.Linear):
    """The velocity [..., C] of a flow from noise (time 1) to latents (time 0), of hidden states [..., D]."""


class TimeEmbedding(nn.Module):
    """Times as vectors: 128 cosines and 128 sines, then two layers (DiT's and xAR's `mlp.0`, `mlp.2`)."""

    features = 256

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.features, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, times: Tensor) -> Tensor:
        """Times [...] in 0 ... 1000 to [..., D]."""
        half = self.features // 2
        steps = torch.arange(half, dtype=torch.float32, device=times.device)
        angles = times[..., None].float() * torch.exp(-math.log(10_000) * steps / half)
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


def thousandths(times: Tensor) -> Tensor:
    """Times in 0 ... 1 as the integers that networks are told.

    Rounded to float32 first: 0.04, the last time of the published sampler, is then 40, as it was in training.
    """
    return (times.float() * 1000).long()


def noised(latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Latents [B, T, C] on their straight way to noise, at times [B, T]."""
    t = times[..., None]
    return (1 - t) * latents + t * noise


def flow_loss(velocity: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of a velocity against noise - latents, in float32."""
    return F.mse_loss(velocity.float(), noise - latents)
