"""Fits the analytic half of `onedpiece/mini`: basis, tables and orders, from pictures, without gradients.

Everything is closed-loop: each token is fitted to what all earlier ones, rounded as they will be stored, leave over.

Letters: N pictures, S side, K coefficients, P components, T head tokens, d dimensions, V codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..image.onedpiece_mini import OneDPieceMini, nearest

ITERATIONS = 6
CHUNK = 512
BLOCK_SAMPLES = 98_304  # blocks that a tail table is fitted to


@torch.no_grad()
def fit(codec: OneDPieceMini, pictures: Tensor, rng: torch.Generator) -> None:
    """Fill the codec's buffers from pictures uint8 [N, 3, S, S]."""
    fit_basis(codec, pictures)
    residual = torch.cat([codec.components(chunk / 255) for chunk in pictures.split(CHUNK)])
    components = fit_head(codec, residual, rng)
    fit_tail(codec, pictures, components, rng)


def fit_basis(codec: OneDPieceMini, pictures: Tensor) -> None:
    """The DCT coefficients of largest variance, and their principal components."""
    size, count = codec.config.coefficients, len(pictures)
    total = square = torch.zeros(())
    for chunk in pictures.split(CHUNK):
        spectrum = codec.spectrum(chunk / 255)
        total, square = total + spectrum.sum(0), square + spectrum.square().sum(0)
    mean = total / count
    index = (square / count - mean.square()).argsort(descending=True)[:size]
    codec.index.copy_(index)
    codec.mean.copy_(mean[index].half())
    covariance = torch.zeros(size, size)
    for chunk in pictures.split(CHUNK):
        x = codec.spectrum(chunk / 255)[:, index] - codec.mean
        covariance += x.T @ x
    vectors = torch.linalg.eigh(covariance).eigenvectors
    codec.basis.store(vectors.flip(1)[:, : codec.config.components])


def fit_head(codec: OneDPieceMini, residual: Tensor, rng: torch.Generator) -> Tensor:
    """Tables for components [N, P], token by token; returns what the head decodes, [N, P]."""
    target = residual
    residual = residual.clone()
    for t in range(codec.config.head_tokens):
        pick = residual.square().mean(0).argsort(descending=True)[: codec.config.head_width]
        x = residual[:, pick]
        codec.picks[t] = pick
        codec.head.store(kmeans(x, codec.config.codes, rng), t)
        residual[:, pick] = x - codec.head(t)[nearest(x, codec.head(t))]
    return target - residual


def fit_tail(
    codec: OneDPieceMini, pictures: Tensor, components: Tensor, rng: torch.Generator
) -> None:
    """The blocks' basis, their order (most energy first) and the stages' tables."""
    chosen = torch.randperm(len(pictures), generator=rng)[: BLOCK_SAMPLES // 8]
    parts = []
    for rows in chosen.split(CHUNK):
        missing = pictures[rows] / 255 - codec.coarse(components[rows])
        parts.append(codec.to_blocks(missing))
    blocks = torch.cat(parts)
    codec.order.copy_(codec.order[blocks.square().sum((0, 2)).argsort(descending=True)])
    flat = blocks.flatten(0, 1)
    flat = flat[torch.randperm(len(flat), generator=rng)[:BLOCK_SAMPLES]]
    vectors = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)
    codec.block_basis.store(vectors[:, : codec.config.block_width])
    x = flat @ codec.block_basis()
    for s in range(codec.config.stages):
        codec.tail.store(kmeans(x, codec.config.codes, rng), s)
        x = x - codec.tail(s)[nearest(x, codec.tail(s))]


def kmeans(x: Tensor, codes: int, rng: torch.Generator, iterations: int = ITERATIONS) -> Tensor:
    """Lloyd's algorithm on x [N, d]: [V, d]. An empty cell restarts at a random point."""
    table = x[torch.randint(len(x), (codes,), generator=rng)]
    for _ in range(iterations):
        ids = nearest(x, table)
        count = torch.bincount(ids, minlength=codes)[:, None]
        total = torch.zeros_like(table).index_add_(0, ids, x)
        fresh = x[torch.randint(len(x), (codes,), generator=rng)]
        table = torch.where(count > 0, total / count.clamp_min(1), fresh)
    return table
