"""One mask builder: position i sees position j if j's block is no later than i's, and both are of one document.

Token-causal attention is block-causal attention with blocks of one; xAR's entities are larger blocks; packed documents
never see each other; padding is seen by nobody (but by itself, so that its rows stay finite, as in LlamaGen).
"""

from __future__ import annotations

import torch
from torch import Tensor


def build(
    blocks: Tensor, *, documents: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """True where attention is allowed: [B, 1, L, L].

    Args:
        blocks: [B, L] or [L], the number of each position's block, not decreasing within a document.
        documents: [B, L] or [L], the number of each position's document; None for a single one.
        valid: [B, L], False at padding.
    """
    blocks = blocks if blocks.ndim == 2 else blocks[None]
    allowed = blocks[:, :, None] >= blocks[:, None, :]
    if documents is not None:
        documents = documents if documents.ndim == 2 else documents[None]
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])
    if valid is not None:
        itself = torch.eye(blocks.shape[1], dtype=torch.bool, device=blocks.device)
        allowed = (allowed & valid[:, None, :]) | itself
    return allowed[:, None]


def causal(
    length: int,
    *,
    documents: Tensor | None = None,
    valid: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Token-causal: blocks of one. [B, 1, L, L]."""
    return build(torch.arange(length, device=device), documents=documents, valid=valid)


def padded_positions(valid: Tensor) -> Tensor:
    """Positions [B, L] that begin at 0 with each row's first valid entry (left or right padding)."""
    return (valid.long().cumsum(-1) - 1).clamp(min=0)


def after_cache(starts: Tensor, length: int, stop: int) -> Tensor:
    """New queries over a cache: [B, 1, length, stop].

    Args:
        starts: [B], how many positions each row held before; query i of a row is its position starts + i.
        length: new positions.
        stop: how many cached positions there are, the new ones included.
    """
    own = starts[:, None] + torch.arange(length, device=starts.device)
    columns = torch.arange(stop, device=starts.device)
    return (columns <= own[:, :, None])[:, None]


def tree(starts: Tensor, ancestors: Tensor, stop: int) -> Tensor:
    """Queries of draft trees over a cache: each sees what was held before, and its own branch. [B, 1, T, stop].

    Args:
        starts: [B], how many positions each row held before its tree.
        ancestors: [B, T, M], True where query t sees the tree's node m, which stands at starts + m (itself included).
        stop: how many cached positions there are, the tree's included.
    """
    nodes = torch.arange(stop, device=starts.device) - starts[:, None]
    inside = (nodes >= 0) & (nodes < ancestors.shape[2])
    index = nodes.clamp(0, ancestors.shape[2] - 1)[:, None].expand(-1, ancestors.shape[1], -1)
    seen = ancestors.gather(2, index) & inside[:, None]
    return (seen | (nodes < 0)[:, None])[:, None]
