"""Fits the analytic half of `onedpiece/mini`: basis, tables and orders, from pictures, without gradients.

Everything is closed-loop: each token is fitted to what all earlier ones, rounded as they will be stored, leave over.

Letters: N pictures, S side, K coefficients, P components, T head tokens, d dimensions, V codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..image.onedpiece_mini import OneDPieceMini
from ..quantizers.table import kmeans, nearest

ITERATIONS = 6
CHUNK = 512
EARLY = 0.9  # of all bits: the budget that the first token's group is cut for
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


def fit_head(codec: OneDPieceMini, components: Tensor, rng: torch.Generator) -> Tensor:
    """Groups and tables for components [N, P]; returns what the head decodes, [N, P]."""
    variances = components.square().mean(0)
    bits = math.log2(codec.config.codes)
    codec.ends.copy_(torch.tensor(cut(variances, codec.config.head_tokens, bits)))
    tables = [kmeans(components[:, g], codec.config.codes, rng, ITERATIONS) for g in codec.groups()]
    codec.head.store(torch.cat(tables, 1))
    return codec.decode_head(codec.tokenize_head(components, codec.config.head_tokens))


def cut(variances: Tensor, tokens: int, bits: float, early: float = EARLY) -> list[int]:
    """Where the groups end, for variances [P] in falling order and so many bits a token.

    Reverse water-filling gives component i the bits log2(variance_i / level) / 2 at the level that spends all of them.
    Token t is cut at the level of a shorter budget, `early` of the whole for the first, all for the last: prefixes gain
    what the whole loses. Every group has a component at least, and the last one takes what is left.
    """
    ends, start = [], 0
    for t in range(tokens):
        budget = bits * tokens * (early + (1 - early) * t / max(1, tokens - 1))
        wanted = (variances.log2() - water_level(variances, budget)).clamp_min(0) / 2
        most = len(variances) - (tokens - t - 1)
        end, spent = start + 1, float(wanted[start])
        while end < most and spent + float(wanted[end]) / 2 < bits and wanted[end] > 0:
            spent += float(wanted[end])
            end += 1
        ends.append(most if t == tokens - 1 else end)
        start = end
    return ends


def water_level(variances: Tensor, budget: float) -> float:
    """log2 of the level at which sum(max(0, log2(variance / level) / 2)) is `budget` bits."""
    low, high = float(variances.log2().min()) - 2 * budget, float(variances.log2().max())
    for _ in range(60):
        level = (low + high) / 2
        spent = float((variances.log2() - level).clamp_min(0).sum()) / 2
        low, high = (level, high) if spent > budget else (low, level)
    return (low + high) / 2


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
        codec.tail.store(kmeans(x, codec.config.codes, rng, ITERATIONS), s)
        x = x - codec.tail(s)[nearest(x, codec.tail(s))]
