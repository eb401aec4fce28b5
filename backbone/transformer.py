"""The Llama-family transformer (arXiv 2302.13971), decoder-only, under Llama's own weight names.

One class serves Llama, Qwen2, Qwen3 (qk-norm), LlamaGen (2-D positions, a condition before the sequence) and our own
models. Options: bias on q, k, v; tied head; grouped-query attention; qk-norm; positions
rotary 1-D, rotary 2-D or learned.

- Attention is torch's scaled_dot_product_attention, with a mask only where causality alone does not say it.
- `fuse()` joins q, k, v and gate, up into one matrix each for inference; the named parameters become views into them,
  so that nothing is stored twice and the state dict stays Llama's.

B rows, T new positions, S visible positions, D width, N heads, K key-value heads, H head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .cache import KVCache
from .conditions import ClassCondition, FeatureCondition
from .heads import NextToken
from .rope import Rotary, rotary_1d, rotary_2d


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and options.

    Args:
        width, ffn: D, and the width inside the feed-forward part.
        heads, kv_heads, head_width: N, K, H; H is D / N where None.
        context: the most positions.
        positions: "rope", "rope2d" (`grid`, after `prefix` condition positions) or "learned".
        classes: a class condition with so many classes; 0 for none.
        features: (P, d) of a feature condition; None for none.
        dropout: on the embeddings and on both residual branches, in training.
    """

    vocab_size: int
    width: int = 768
    ffn: int = 2048
    layers: int = 12
    heads: int = 12
    kv_heads: int = 12
    head_width: int | None = None
    context: int = 2048
    norm_eps: float = 1e-5
    theta: float = 10000.0
    positions: Literal["rope", "rope2d", "learned"] = "rope"
    grid: tuple[int, int] | None = None
    prefix: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    classes: int = 0
    features: tuple[int, int] | None = None
    dropout: float = 0.0

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads}, expected a multiple of kv_heads {self.kv_heads}"
            )
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of heads {self.heads}")
        if (self.positions == "rope2d") != (self.grid is not None):
            raise ValueError("grid goes with positions='rope2d', and with nothing else")
        for name in ("grid", "features"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def head_size(self) -> int:
        """H."""
        return self.head_width or self.width // self.heads


class Output(NamedTuple):
    """hidden [B, T, D] after the final norm; logits [B, t, V] of the last t positions asked for, or None."""

    hidden: Tensor
    logits: Tensor | None


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the quotient is taken in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x [..., D]."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        c, h = config, config.head_size
        self.layer, self.heads, self.kv_heads, self.head_size = layer, c.heads, c.kv_heads, h
        self.q_proj = nn.Linear(c.width, c.heads * h, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * h, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * h, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * h, c.width, bias=False)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(h, c.norm_eps), RMSNorm(h, c.norm_eps)
        self.qk_norm = c.qk_norm
        self.fused: tuple[Tensor, Tensor | None] | None = None

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        turns: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KVCache | None,
        counts: Sequence[int] | None,
    ) -> Tensor:
        """x [B, T, D] to [B, T, D]."""
        q, k, v = self._project(x)
        if rotary is not None and turns is not None:
            q, k = rotary.turn(q, *turns), rotary.turn(k, *turns)
        if cache is not None:
            k, v = cache.append(self.layer, k, v, counts)
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.heads != self.kv_heads
        )
        return self.o_proj(rearrange(y, "b n t h -> b t (n h)"))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.fused is None:
            parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            sizes = [n * self.head_size for n in (self.heads, self.kv_heads, self.kv_heads)]
            parts = F.linear(x, *self.fused).split(sizes, -1)
        q, k, v = (rearrange(t, "b t (n h) -> b n t h", h=self.head_size) for t in parts)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def fuse(self) -> None:
        """One matrix for q, k and v; the parameters become views into it."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        bias = None if self.q_proj.bias is None else _join([p.bias for p in parts])
        self.fused = (_join([p.weight for p in parts]), bias)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.width, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=False)
        self.fused: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] to [B, T, D]."""
        if self.fused is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = F.linear(x, self.fused).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)

    def fuse(self) -> None:
        """One matrix for gate and up; the parameters become views into it."""
        self.fused = _join([self.gate_proj.weight, self.up_proj.weight])


class Layer(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *context) -> Tensor:
        """x [B, T, D] to [B, T, D]; `context` is what attention takes."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), *context))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Body(nn.Module):
    """Everything below the head; its parameters are Llama's `model.*`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.context, config.width)
        if config.classes:
            self.cls_embedding = ClassCondition(config.classes, config.width)
        elif config.features is not None:
            self.cls_embedding = FeatureCondition(*config.features, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)


class Transformer(nn.Module):
    """Ids or embeddings in, hidden states and logits out."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = NextToken(config.width, config.vocab_size)
        self.rotary = rotary(config)
        self._initialise()
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        ids: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        counts: Sequence[int] | None = None,
        keep: int | None = None,
    ) -> Output:
        """Run T positions.

        Args:
            ids: [B, T], or `embeddings` [B, T, D] in their place.
            positions: [B, T] or [T]; where None, they go on from what the cache holds.
            mask: True where attention is allowed, [B or 1, 1, T, S]; None for causal.
            cache: keys and values of earlier positions; the new ones are appended.
            counts: real positions of each row, where rows are right-padded into a cache.
            keep: logits of the last `keep` positions only; 0 for none, None for all.

        Raises:
            ValueError: more positions than the context has.
        """
        x = self.model.embed_tokens(ids) if embeddings is None else embeddings
        if positions is None:
            positions = self._positions(x, cache)
        if self.config.positions == "learned":
            x = x + self.model.embed_positions(positions)
        x = self.model.dropout(x)
        turns = None if self.rotary is None else self.rotary.at(positions, x.dtype)
        if mask is None and cache is not None:
            mask = cache.mask(0, x.shape[1])
        for layer in self.model.layers:
            x = layer(x, self.rotary, turns, mask, cache, counts)
        hidden = self.model.norm(x)
        if keep == 0:
            return Output(hidden, None)
        return Output(hidden, self.lm_head(hidden if keep is None else hidden[:, -keep:]))

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., D] of ids [...]."""
        return self.model.embed_tokens(ids)

    def cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache for this model."""
        weight = self.model.embed_tokens.weight
        return KVCache(
            layers=self.config.layers,
            rows=rows,
            kv_heads=self.config.kv_heads,
            head_width=self.config.head_size,
            capacity=min(capacity, self.config.context),
            dtype=weight.dtype,
            device=weight.device,
        )

    def fuse(self) -> Transformer:
        """Join the projections for inference; training must not follow."""
        for part in self.modules():
            if isinstance(part, (Attention, FeedForward)):
                part.fuse()
        return self.requires_grad_(False).eval()

    def check_length(self, length: int, what: str = "the sequence") -> None:
        """Raise ValueError where `length` positions do not fit the context."""
        if length > self.config.context:
            raise ValueError(
                f"{what} has {length} positions, the model's context is {self.config.context}"
            )

    def _positions(self, x: Tensor, cache: KVCache | None) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        starts = [0] if cache is None else cache.row_lengths()
        self.check_length(max(starts) + x.shape[1])
        if min(starts) == max(starts):
            return steps + starts[0]
        return torch.tensor(starts, device=x.device)[:, None] + steps

    def _initialise(self) -> None:
        """N(0, .02), residual outputs smaller with depth (GPT-2), so that deep models start calmly."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                small = name.endswith(("o_proj", "down_proj"))
                std = 0.02 / (2 * self.config.layers) ** 0.5 if small else 0.02
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)


def rotary(config: TransformerConfig) -> Rotary | None:
    """The table of positions that a config asks for; None for learned ones."""
    if config.positions == "rope":
        return rotary_1d(config.context, config.head_size, config.theta)
    if config.positions == "rope2d" and config.grid is not None:
        return rotary_2d(config.grid, config.prefix, config.head_size, config.theta)
    return None


@torch.no_grad()
def _join(parameters: list[Tensor]) -> Tensor:
    """The parameters in one tensor, of which they become views."""
    whole = torch.cat([p.detach() for p in parameters])
    start = 0
    for p in parameters:
        p.data = whole[start : start + len(p)]
        start += len(p)
    return whole
