"""Vector quantisation by the nearest row of a learned codebook (VQ-VAE, arXiv 1711.00937)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    """Vectors [..., d] with straight-through gradients, their ids [...], and the two scalar losses."""

    vectors: Tensor
    ids: Tensor
    commitment: Tensor
    codebook: Tensor


class VectorQuantizer(nn.Module):
    """`size` codes of `width` numbers; `normalize` compares and returns unit vectors (the stored rows are not)."""

    def __init__(self, size: int, width: int, *, normalize: bool = False):
        super().__init__()
        self.normalize = normalize
        self.embedding = nn.Embedding(size, width)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    @property
    def table(self) -> Tensor:
        """What each id decodes to: [V, d]."""
        weight = self.embedding.weight
        return F.normalize(weight, dim=-1) if self.normalize else weight

    def ids(self, z: Tensor) -> Tensor:
        """The nearest rows: [..., d] -> [...]; always in float32, where published codes were computed."""
        with torch.autocast(z.device.type, enabled=False):
            z, table = z.float(), self.table.float()
            z = F.normalize(z, dim=-1) if self.normalize else z
            flat = z.reshape(-1, z.shape[-1])
            distance = (
                flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.T
            )
            return distance.argmin(1).reshape(z.shape[:-1])

    def vectors(self, ids: Tensor) -> Tensor:
        """Ids [...] to vectors [..., d]."""
        return F.embedding(ids, self.table)

    def forward(self, z: Tensor) -> Quantized:
        """Quantise for training: gradients pass straight through to `z`."""
        ids = self.ids(z)
        z = F.normalize(z, dim=-1) if self.normalize else z
        rows = self.vectors(ids)
        return Quantized(
            vectors=z + (rows - z).detach(),
            ids=ids,
            commitment=F.mse_loss(z, rows.detach()),
            codebook=F.mse_loss(rows, z.detach()),
        )
