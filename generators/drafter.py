"""The drafter: one transformer layer that runs ahead of a target in the space of its hidden states (EAGLE, 2401.15077).

At place t it reads the target's hidden state h_t (after the final norm) and the embedding of the id at t + 1, and
predicts h_{t+1}; the target's own head turns that into a law. Behind the last known state it reads its own predictions.

    y_t = layer(fc [embed(x_{t+1}); h_t])          attention without an input norm, as published

- Rotary positions, embeddings and head are the target's; a place has the position of its id, t + 1. Nothing of them is
  stored, except where a published file brings its own embeddings (`jadohu/*`).
- Our files name the target by a fingerprint of its layers; another target is refused.

B rows, T places, D width.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backbone import masks
from ..backbone.cache import KVCache
from ..backbone.transformer import Attention, FeedForward, RMSNorm, Transformer
from ..codecs.codec import fingerprint
from ..codecs.published import WeightsError, load_into, read_weights, write_safetensors

FORMAT = 1
KEY = "anytok_drafter"


class DrafterError(ValueError):
    """A drafter does not belong to its target; the message says why."""


class _Layer(nn.Module):
    """A decoder layer without the norm before attention."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config, 0)
        self.mlp = FeedForward(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.self_attn(x, *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Drafter(nn.Module):
    """One layer beside a target.

    Args:
        target: whose ids are drafted; its sizes are the drafter's.
        dummy: the id that stands for places of a condition without ids (LlamaGen: 0); None for their own embeddings.
        own_embeddings: whether a table of embeddings is part of the drafter.
        norm_eps: of its norm, where that is not the target's.
    """

    def __init__(
        self,
        target: Transformer,
        *,
        dummy: int | None = None,
        own_embeddings: bool = False,
        norm_eps: float | None = None,
    ):
        super().__init__()
        config = dataclasses.replace(
            target.config, layers=1, dropout=0.0, norm_eps=norm_eps or target.config.norm_eps
        )
        self.config, self.dummy = config, dummy
        self._target = [target]  # not a submodule: its weights are not the drafter's
        if own_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.own_embeddings = own_embeddings
        layer = _Layer(config)
        self.layers = nn.ModuleList([layer])
        self.fc = nn.Linear(2 * config.width, config.width)
        with torch.no_grad():
            # It begins as the guess that nothing changes.
            self.fc.weight.zero_()
            self.fc.weight[:, config.width :].fill_diagonal_(1.0)
            self.fc.bias.zero_()
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(0.1)

    def __deepcopy__(self, memo: dict) -> Drafter:
        """A copy beside the same target (averages of weights are kept in copies)."""
        memo[id(self.target)] = self.target
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @property
    def target(self) -> Transformer:
        """The model that it runs ahead of."""
        return self._target[0]

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of ids [...]."""
        return self.embed_tokens(ids) if self.own_embeddings else self.target.embed(ids)

    def forward(
        self,
        embeddings: Tensor,
        hidden: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Predicted hidden states.

        Args:
            embeddings: of the ids at t + 1, [B, T, D].
            hidden: the states at t, [B, T, D].
            positions: t + 1, [B, T] or [T].
            mask, cache, counts: as `Transformer.forward`.
        """
        x = self.fc(torch.cat([embeddings.to(hidden.dtype), hidden], -1))
        rotary = self.target.rotary
        turns = None
        if rotary is not None:
            # Places behind the last position are never accepted; they only must not fail.
            turns = rotary.at(positions.clamp(max=len(rotary) - 1), x.dtype)
        if mask is None and cache is not None:
            mask = cache.mask(0, x.shape[1])
        return self.layers[0](x, rotary, turns, mask, cache, counts)

    def cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache of one layer."""
        c, weight = self.config, self.fc.weight
        return KVCache(
            layers=1,
            rows=rows,
            kv_heads=c.kv_heads,
            head_width=c.head_size,
            capacity=capacity,
            dtype=weight.dtype,
            device=weight.device,
        )

    def fuse(self) -> Drafter:
        """Join the projections for inference; training must not follow."""
        for part in self.layers.modules():
            if isinstance(part, (Attention, FeedForward)):
                part.fuse()
        return self.requires_grad_(False).eval()


class Session:
    """A drafter at work: what it has read for good, and the branches that it tries behind that.

    Args:
        rows: R, those without the condition included.
    """

    def __init__(self, drafter: Drafter, rows: int, capacity: int):
        self.drafter = drafter
        self.cache = drafter.cache(rows, capacity)
        self._held = [0] * rows

    def read(self, embeddings: Tensor, hidden: Tensor, counts: Sequence[int]) -> Tensor:
        """Read pairs of the id at t + 1 and the state at t, [R, T, D] each; the last real state predicted, [R, D]."""
        starts = torch.tensor(self._held, device=hidden.device)[:, None]
        positions = starts + 1 + torch.arange(hidden.shape[1], device=hidden.device)
        out = self.drafter(embeddings, hidden, positions, cache=self.cache, counts=counts)
        self._held = self.cache.row_lengths()
        last = torch.tensor(counts, device=hidden.device) - 1
        return out[torch.arange(len(out), device=hidden.device), last]

    def branch(self, ids: Tensor, hidden: Tensor, ancestors: Tensor, depth: int) -> Tensor:
        """Try ids [R, K] at `depth` (1: behind the last id read); predicted states [R, K, D].

        Args:
            hidden: predicted for their parents, [R, K, D].
            ancestors: [R, K, M], which of the M ids tried so far (these included) each sees.
        """
        starts = torch.tensor(self._held, device=ids.device)
        count = ancestors.shape[2]
        mask = masks.tree(starts, ancestors, max(self._held) + count)
        positions = (starts + depth)[:, None].expand(-1, ids.shape[1])
        return self.drafter(self.drafter.embed(ids), hidden, positions, mask, self.cache)

    def forget(self) -> None:
        """Drop the branches."""
        self.cache.rewind(self._held)

    def join(self, other: Session) -> None:
        """Add another session's rows behind these."""
        self.cache.join(other.cache)
        self._held += other._held

    def take(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        self.cache.take(rows)
        self._held = [self._held[row] for row in rows]


def target_print(target: Transformer) -> str:
    """Eight hex digits of a target's layers, the same in float32, bfloat16, and from a float16 file."""
    state = target.model.layers.state_dict() | {"norm": target.model.norm.weight}
    return fingerprint({k: v.bfloat16() for k, v in state.items()})


def save_drafter(
    drafter: Drafter,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    about: Mapping[str, object] | None = None,
) -> None:
    """Write one safetensors file. `about`: what else should travel with the weights."""
    header = {
        "format": FORMAT,
        "target": target_print(drafter.target),
        "dummy": drafter.dummy,
        "norm_eps": drafter.config.norm_eps,
        **(about or {}),
    }
    tensors = {k: v.detach().to("cpu", dtype).clone() for k, v in drafter.state_dict().items()}
    write_safetensors(tensors, path, {KEY: json.dumps(header)})


def load_drafter(path: str | Path, target: Transformer) -> Drafter:
    """Read a file that `save_drafter` wrote, or a published one (`jadohu/*`, `input_type` c2i or t2i).

    Raises:
        DrafterError: it was trained for another target.
        WeightsError: the file is damaged, or no drafter.
    """
    weights = read_weights(path)
    header = json.loads(weights.metadata.get(KEY, "{}"))
    if not header:
        return from_published(weights.tensors, target, source=weights.source)
    if header.get("format") != FORMAT:
        raise WeightsError(f"{path}: format {header.get('format')!r}, this anytok reads {FORMAT}")
    _check_sizes(weights.tensors, target, str(path))
    own = target_print(target)
    if header["target"] != own:
        raise DrafterError(
            f"{path} was trained for a target with the fingerprint {header['target']}, this one is {own}; "
            "a drafter only serves the weights whose hidden states it learned"
        )
    drafter = Drafter(target, dummy=header["dummy"], norm_eps=header["norm_eps"])
    load_into(drafter, weights.tensors, source=weights.source)
    return drafter.to(target.lm_head.weight)


def from_published(
    tensors: Mapping[str, Tensor],
    target: Transformer,
    *,
    norm_eps: float = 1e-5,
    source: str = "drafter",
) -> Drafter:
    """A drafter by LANTERN's names (embeddings of its own; places of the condition read id 0).

    Raises:
        DrafterError: its sizes are not the target's.
    """
    _check_sizes(tensors, target, source)
    own = "embed_tokens.weight" in tensors
    drafter = Drafter(target, dummy=0, own_embeddings=own, norm_eps=norm_eps)
    load_into(drafter, tensors, source=source)
    return drafter.eval()


def _check_sizes(tensors: Mapping[str, Tensor], target: Transformer, source: str) -> None:
    if "fc.weight" not in tensors:
        raise WeightsError(f"{source} holds no fc.weight, so it is no drafter")
    width = target.config.width
    if tensors["fc.weight"].shape != (width, 2 * width):
        raise DrafterError(
            f"{source} is a drafter of width {len(tensors['fc.weight'])}, the target's is {width}"
        )
    table = tensors.get("embed_tokens.weight")
    if table is not None and len(table) != target.config.vocab_size:
        raise DrafterError(
            f"{source} drafts {len(table)} ids, the target has {target.config.vocab_size}"
        )
