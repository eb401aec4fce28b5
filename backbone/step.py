"""One decoding step without the overhead of modules: what `Transformer.forward` computes for one new position a row.

At batch 1 a small model spends more time between its operations than in them. Everything that does not change from step
to step (weights, views of the cache's layers, the table of positions) is looked up once; the operations are the same,
so are the numbers. T = 1; B rows, D width, N heads, K key-value heads, H head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import KVCache
from .int8 import Int8Linear
from .transformer import RMSNorm, Transformer


class _Layer(NamedTuple):
    norm: RMSNorm
    qkv: Tensor | Int8Linear
    bias: Tensor | None
    head_norms: tuple[RMSNorm, RMSNorm] | None
    out: Tensor | Int8Linear
    second_norm: RMSNorm
    gate_up: Tensor | Int8Linear
    down: Tensor | Int8Linear


class Stepper:
    """Steps of a fused transformer over one cache.

    Args:
        model: after `fuse()`.
        int8: layers in eight bits (CPUs only); the head stays as it is.
    """

    def __init__(self, model: Transformer, *, int8: bool = False):
        self.model = model
        self.table = model.model.embed_tokens.weight
        self.layers = [_parts(layer, int8) for layer in model.model.layers]
        self.learned = model.config.positions == "learned"
        c = model.config
        self.heads, self.kv_heads, self.head_size = c.heads, c.kv_heads, c.head_size

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Feed ids [B]; returns hidden states [B, D] after the final norm.

        Raises:
            ValueError: the context is full.
        """
        model, starts = self.model, cache.row_lengths()
        model.check_length(max(starts) + 1)
        positions = torch.tensor(starts, device=ids.device)
        x = F.embedding(ids, self.table)
        if self.learned:
            x = x + model.model.embed_positions(positions)
        turns = self._turns(positions, x.dtype)
        mask = cache.mask(0, 1)
        for i, layer in enumerate(self.layers):
            y = _linear(_normed(x, layer.norm), layer.qkv, layer.bias)
            y = self._attend(y, i, layer.head_norms, turns, mask, cache)
            x = x + _linear(y, layer.out)
            gate, up = _linear(_normed(x, layer.second_norm), layer.gate_up).chunk(2, -1)
            x = x + _linear(F.silu(gate).mul_(up), layer.down)
        return _normed(x, model.model.norm)

    def _attend(
        self,
        y: Tensor,
        layer: int,
        norms: tuple[RMSNorm, RMSNorm] | None,
        turns: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KVCache,
    ) -> Tensor:
        """Joined projections [B, (N + 2K) H] to attention's output [B, N H]."""
        rows, n, k = len(y), self.heads, self.kv_heads
        y = y.view(rows, n + 2 * k, self.head_size)
        turned, v = y[:, : n + k], y[:, n + k :]
        if norms is not None:
            turned = torch.cat([_normed(y[:, :n], norms[0]), _normed(y[:, n : n + k], norms[1])], 1)
        if turns is not None:
            # Heads stand where positions stand elsewhere: the table has one row a batch row.
            turned = self.model.rotary.turn(turned, *turns)  # type: ignore[union-attr]
        keys, values = cache.append(layer, turned[:, n:, None], v[:, :, None])
        q = turned[:, :n, None]
        if n != k:
            # The queries of a group attend as if they were positions of one head: no copies of keys.
            q = turned[:, :n].reshape(rows, k, n // k, self.head_size)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return out.reshape(rows, -1)

    def _turns(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        rotary = self.model.rotary
        if rotary is None:
            return None
        return (
            rotary.cos[positions].to(dtype).unsqueeze(1),
            rotary.sin[positions].to(dtype).unsqueeze(1),
        )


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)
    return norm(x)


def _linear(x: Tensor, weight: Tensor | Int8Linear, bias: Tensor | None = None) -> Tensor:
    return weight(x) if isinstance(weight, Int8Linear) else F.linear(x, weight, bias)


def _parts(layer: Any, int8: bool) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, bias = attention.fused
    out, gate_up, down = attention.o_proj.weight, mlp.fused, mlp.down_proj.weight
    if int8:
        qkv = Int8Linear(qkv, bias)
        out, gate_up, down = Int8Linear(out), Int8Linear(gate_up), Int8Linear(down)
    return _Layer(
        norm=layer.input_layernorm,
        qkv=qkv,
        bias=bias,
        head_norms=(attention.q_norm, attention.k_norm) if attention.qk_norm else None,
        out=out,
        second_norm=layer.post_attention_layernorm,
        gate_up=gate_up,
        down=down,
    )
