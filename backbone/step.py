"""One decoding step without the overhead of modules: what `Transformer.forward` computes for one new position a row.

At batch 1 a small model spends more time between its operations than in them. Everything that does not change from step
to step (weights, views of the cache's layers, the table of positions) is looked up once; the operations are the same,
so are the numbers. T = 1; B rows, D width, N heads, K key-value heads, H head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import KVCache
from .transformer import RMSNorm, Transformer


class Stepper:
    """Steps of a fused transformer over one cache.

    Args:
        model: after `fuse()`.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self.table = model.model.embed_tokens.weight
        self.layers = [_parts(layer) for layer in model.model.layers]
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
        for i, (norm, qkv, bias, heads_norm, out, norm2, gate_up, down) in enumerate(self.layers):
            y = F.linear(_normed(x, norm), qkv, bias)
            y = self._attend(y, i, heads_norm, turns, mask, cache)
            x = x + F.linear(y, out)
            gate, up = F.linear(_normed(x, norm2), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate).mul_(up), down)
        return _normed(x, model.model.norm)

    def _attend(self, y: Tensor, layer: int, norms, turns, mask, cache: KVCache) -> Tensor:
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


def _parts(layer):
    attention, mlp = layer.self_attn, layer.mlp
    norms = (attention.q_norm, attention.k_norm) if attention.qk_norm else None
    return (
        layer.input_layernorm,
        *attention.fused,
        norms,
        attention.o_proj.weight,
        layer.post_attention_layernorm,
        mlp.fused,
        mlp.down_proj.weight,
    )
