"""Conditions: what stands before a sequence and steers it. Each has a null, and training drops to it (p = 0.1), so
that classifier-free guidance exists (arXiv 2207.12598).

- `ClassCondition`: one embedding a class; the null is one more row (LlamaGen c2i).
- `FeatureCondition`: features [P, d] of an encoder (T5, CLIP, DINOv2) through a two-layer map; the null is learned
  (LlamaGen t2i).
- `IdCondition`: ids of the model's own vocabulary; the null leaves them out.

Parameter names are LlamaGen's below `cls_embedding`. B rows, P condition positions, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassCondition(nn.Module):
    """One embedding a class: [B] -> [B, 1, D]."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.classes = classes
        self.embedding_table = nn.Embedding(classes + 1, width)

    def null(self, labels: Tensor) -> Tensor:
        """The label that means no class."""
        return torch.full_like(labels, self.classes)

    def drop(self, labels: Tensor, p: float, rng: torch.Generator) -> Tensor:
        """Each row's label becomes the null with probability p."""
        return torch.where(dropped(len(labels), p, rng, labels.device), self.classes, labels)

    def forward(self, labels: Tensor) -> Tensor:
        """Embeddings [B, 1, D] of labels [B]."""
        return self.embedding_table(labels)[:, None]


class FeatureCondition(nn.Module):
    """Features [B, P, d] of another network -> [B, P, D]."""

    def __init__(self, length: int, features: int, width: int):
        super().__init__()
        self.cap_proj = _Projection(features, width)
        self.uncond_embedding = nn.Parameter(torch.randn(length, features) / features**0.5)

    def null(self, features: Tensor) -> Tensor:
        """The learned features that mean no caption."""
        return self.uncond_embedding.expand_as(features)

    def drop(self, features: Tensor, p: float, rng: torch.Generator) -> Tensor:
        """Each row's features become the null with probability p."""
        rows = dropped(len(features), p, rng, features.device)
        return torch.where(rows[:, None, None], self.uncond_embedding, features)

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings [B, P, D]."""
        return self.cap_proj(features)


class IdCondition:
    """Ids of the model's own vocabulary; nothing is learned beside its embeddings."""

    def null(self, ids: Tensor) -> Tensor:
        """No ids at all."""
        return ids[:0]

    def drop(self, ids: Tensor, p: float, rng: torch.Generator) -> Tensor:
        """The whole condition [P] is left out with probability p."""
        return self.null(ids) if bool(dropped(1, p, rng, None)) else ids


class _Projection(nn.Module):
    def __init__(self, features: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(features, width, bias=False)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def dropped(rows: int, p: float, rng: torch.Generator, device: torch.device | None) -> Tensor:
    """Which rows lose their condition: [rows] bool."""
    return (torch.rand(rows, generator=rng, device=rng.device) < p).to(device)
