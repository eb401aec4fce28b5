"""Transformer blocks with the key names of CLIP-style vision transformers (TiTok, One-D-Piece, GigaTok).

Attention is PyTorch's fused `scaled_dot_product_attention`, batch first, on the packed projection that
`nn.MultiheadAttention` stores, so published weights load by key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head self-attention [B, T, D] -> [B, T, D], keys as in `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, expected a multiple of heads = {heads}")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (bool, True = may look, or additive) broadcasts to [B, heads, T, T]."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(rearrange(y, "b h t d -> b t (h d)"))


class FeedForward(nn.Module):
    """Linear, exact GELU, Linear: [..., D] -> [..., D]."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Every position by itself."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm transformer block [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int, *, mlp_ratio: int = 4):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, mlp_ratio * width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` as in `SelfAttention`."""
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))
