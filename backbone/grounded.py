"""Embeddings of codes that begin from what the codes mean.

A codec's `code_vectors` put similar codes close together; a table of free embeddings has to learn that from counts.
Here a code's row is free + map(vector), in the input and (tied) in the output, so that a code seen rarely borrows from
its neighbours. `folded` adds it up into an ordinary checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transformer import Transformer


class Grounded(nn.Module):
    """A transformer in training, with grounded rows.

    Args:
        vectors: first id of a block -> its codes' vectors [V, d].
    """

    def __init__(self, model: Transformer, vectors: Mapping[int, Tensor]):
        super().__init__()
        self.model = model
        self.starts = list(vectors)
        width = model.config.width
        self.maps = nn.ModuleList(
            nn.Linear(v.shape[1], width, bias=False) for v in vectors.values()
        )
        for i, table in enumerate(vectors.values()):
            spread = table.float() - table.float().mean(0)
            self.register_buffer(f"vectors_{i}", spread / spread.std().clamp(min=1e-6))
            nn.init.normal_(self.maps[i].weight, std=0.02 / table.shape[1] ** 0.5)
            rows = slice(self.starts[i], self.starts[i] + len(table))
            with torch.no_grad():
                model.model.embed_tokens.weight[rows] *= 0.1

    def table(self, free: Tensor) -> Tensor:
        """All rows [V, D] of a free table with the grounded parts added."""
        for i, start in enumerate(self.starts):
            part = self.maps[i](getattr(self, f"vectors_{i}"))
            free = free + F.pad(part, (0, 0, start, len(free) - start - len(part)))
        return free

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, D] of ids [B, T], and the output table [V, D]."""
        table = self.table(self.model.model.embed_tokens.weight)
        hidden = self.model(
            embeddings=F.embedding(ids, table), positions=positions, mask=mask, keep=0
        ).hidden
        return hidden, table if self.model.config.tied else self.model.lm_head.weight

    @torch.no_grad()
    def folded(self) -> Transformer:
        """An ordinary transformer with the same outputs."""
        model = copy.deepcopy(self.model)
        model.model.embed_tokens.weight.copy_(self.table(self.model.model.embed_tokens.weight))
        return model
