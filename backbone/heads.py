"""Heads: what the hidden state predicts. The next token; the velocity of a flow (xAR, arXiv 2502.20388); the codes of
one position, dimension after dimension (TokenBridge, arXiv 2503.16430).

B rows, T positions, C latent channels, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
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


@dataclass(frozen=True, kw_only=True)
class DimensionWiseConfig:
    """Sizes of a dimension-wise head; the defaults are TokenBridge-L's.

    Args:
        features: W, the width of what it predicts from.
        dimensions: C, codes of a position.
        levels: V, values of a code.
        width, layers, heads: of its own transformer.
    """

    features: int = 1024
    dimensions: int = 16
    levels: int = 64
    width: int = 1024
    layers: int = 4
    heads: int = 8

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of heads {self.heads}")


class DimensionWise(nn.Module):
    """The codes of one position, one dimension after another, by a small causal transformer (TokenBridge).

    - Every step is modulated (AdaLN) by the position's feature and the step's own embedding. The first input is that
      condition itself, later ones are embeddings of the codes so far, a table for each dimension.
    - The published training fed the first step without its embedding, the published sampler with it; this is the
      sampler's form, in training too.
    - `sample` keeps keys and values, where the published sampler computes every prefix again.

    n positions, W features, C dimensions, V levels, D width.
    """

    def __init__(self, config: DimensionWiseConfig | None = None):
        super().__init__()
        self.config = c = config or DimensionWiseConfig()
        self.condition_proj = nn.Linear(c.features, c.width)
        self.channel_embed = nn.Parameter(torch.randn(1, c.dimensions, c.width) * 0.02)
        self.timesteps_embeddings = nn.Parameter(torch.randn(1, c.dimensions, c.width) * 0.02)
        self.token_embeddings = nn.ModuleList(
            nn.Embedding(c.levels, c.width) for _ in range(c.dimensions - 1)
        )
        self.channel_blocks = nn.ModuleList(_HeadBlock(c) for _ in range(c.layers))
        self.channel_norm = nn.LayerNorm(c.width, eps=1e-6)
        self.channel_final = _HeadFinal(c.width)
        self.channel_heads = nn.ModuleList(
            nn.Linear(c.width, c.levels) for _ in range(c.dimensions)
        )

    def forward(self, features: Tensor, codes: Tensor) -> Tensor:
        """Logits [n, C, V] of every dimension, given the codes [n, C] before it and features [n, W]."""
        condition = self._condition(features)
        known = [table(codes[:, i]) for i, table in enumerate(self.token_embeddings)]
        x = torch.stack([condition[:, 0], *known], 1) + self.channel_embed
        for block in self.channel_blocks:
            x = block(x, condition)
        x = self.channel_final(self.channel_norm(x), condition)
        return torch.stack([head(x[:, i]) for i, head in enumerate(self.channel_heads)], 1)

    def sample(self, features: Tensor, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Codes [n, C] of features [n, W].

        Args:
            choose: takes logits [n, V] and the dimension's number, gives codes [n].
        """
        condition = self._condition(features)
        shape = (2, len(self.channel_blocks), *condition.shape)  # keys and values
        memory = condition.new_empty(shape)
        x, codes = condition[:, :1], []
        for i, head in enumerate(self.channel_heads):
            own = condition[:, i : i + 1]
            x = x + self.channel_embed[:, i : i + 1]
            for k, block in enumerate(self.channel_blocks):
                x = block(x, own, memory[:, k], i)
            x = self.channel_final(self.channel_norm(x), own)
            codes.append(choose(head(x[:, 0]), i))
            if i < len(self.token_embeddings):
                x = self.token_embeddings[i](codes[-1])[:, None]
        return torch.stack(codes, 1)

    def _condition(self, features: Tensor) -> Tensor:
        """[n, C, D]."""
        return self.condition_proj(features)[:, None] + self.timesteps_embeddings


class _HeadAttention(nn.Module):
    """Causal attention with normed queries and keys."""

    def __init__(self, config: DimensionWiseConfig):
        super().__init__()
        self.heads = config.heads
        size = config.width // config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm, self.k_norm = nn.LayerNorm(size, eps=1e-6), nn.LayerNorm(size, eps=1e-6)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, memory: Tensor | None, at: int) -> Tensor:
        """x [n, T, D]; with memory [2, n, C, D], x is step `at` alone and earlier ones are read from it."""
        parts = rearrange(
            self.qkv(x), "n t (three m h) -> three n t m h", three=3, m=self.heads
        ).unbind()
        q, k, v = self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]
        if memory is not None:
            for table, new in zip(memory, (k, v)):
                table[:, at : at + 1] = new.flatten(2)
            k, v = (
                rearrange(table[:, : at + 1], "n t (m h) -> n t m h", m=self.heads)
                for table in memory
            )
        q, k, v = (rearrange(t, "n t m h -> n m t h") for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=memory is None)
        return self.proj(rearrange(y, "n m t h -> n t (m h)"))


class _HeadBlock(nn.Module):
    """Shift, scale, gate for attention, then for the feed-forward part, from the condition of every step."""

    def __init__(self, config: DimensionWiseConfig):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _HeadAttention(config)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: Tensor, condition: Tensor, memory: Tensor | None = None, at: int = 0
    ) -> Tensor:
        """x [n, T, D], its steps' conditions [n, T, D]."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(condition).chunk(
            6, -1
        )
        y = self.attn(self.norm1(x) * (1 + scale_1) + shift_1, memory, at)
        x = x + gate_1 * y
        return x + gate_2 * self.mlp(self.norm2(x) * (1 + scale_2) + shift_2)


class _HeadFinal(nn.Module):
    """A last norm; here the published order is scale, shift."""

    def __init__(self, width: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [n, T, D], its steps' conditions [n, T, D]."""
        scale, shift = self.adaLN_modulation(condition).chunk(2, -1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Mlp(nn.Module):
    """Linear, exact GELU, linear, under timm's names."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Every position by itself."""
        return self.fc2(F.gelu(self.fc1(x)))
