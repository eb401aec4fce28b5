"""Residual vector quantisation with projected, normalised lookups (DAC, arXiv 2306.06546).

Each stage takes what the stages before left over, projects it from D to a few dimensions, looks up the nearest
codebook row by cosine, and projects the row (as it is stored, not normalised) back to D. The quantised latent is the
sum over the stages, so the first n stages alone decode too.

Letters: B batch, D latent width, d codebook width, T frames, N stages, V codebook rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..layers.conv import Conv1d


@dataclass(frozen=True)
class Quantised:
    """z [B, D, T], codes [B, N, T], projected residuals [B, N·d, T], and the two losses (scalars)."""

    z: Tensor
    codes: Tensor
    latents: Tensor
    commitment: Tensor
    codebook: Tensor


class ProjectedVQ(nn.Module):
    """One stage: D -> d, cosine lookup, d -> D."""

    def __init__(self, width: int, size: int, dim: int):
        super().__init__()
        self.in_proj = Conv1d(width, dim, 1)
        self.out_proj = Conv1d(dim, width, 1)
        self.codebook = nn.Embedding(size, dim)

    def lookup(self, z_e: Tensor) -> Tensor:
        """Nearest rows by cosine: [B, d, T] to codes [B, T]."""
        query = F.normalize(rearrange(z_e, "b d t -> (b t) d"))
        rows = F.normalize(self.codebook.weight)
        distance = query.square().sum(1, keepdim=True) - 2 * query @ rows.T
        codes = (distance + rows.square().sum(1)).argmin(1)
        return rearrange(codes, "(b t) -> b t", b=len(z_e))

    def rows(self, codes: Tensor) -> Tensor:
        """Codebook rows of codes [B, T]: [B, d, T]."""
        return rearrange(self.codebook(codes), "b t d -> b d t")

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Residual [B, D, T] to (quantised [B, D, T], codes [B, T], z_e [B, d, T], rows [B, d, T])."""
        z_e, _ = self.in_proj(z)
        codes = self.lookup(z_e)
        rows = self.rows(codes)
        # The straight-through sum is kept at inference: the published encoder subtracts it, rounding included,
        # and the next stage's codes depend on it.
        z_q, _ = self.out_proj(z_e + (rows - z_e).detach())
        return z_q, codes, z_e, rows


class ResidualVQ(nn.Module):
    """N stages; key `quantizers.{i}`.

    Args:
        width: D.
        stages: N.
        size: V.
        dim: d.
    """

    def __init__(self, width: int, *, stages: int, size: int, dim: int):
        super().__init__()
        self.quantizers = nn.ModuleList(ProjectedVQ(width, size, dim) for _ in range(stages))

    def forward(self, z: Tensor, keep: Tensor | None = None) -> Quantised:
        """Quantise z [B, D, T] with all stages, or item b with its first keep[b] only.

        Stages beyond `keep` still see the residual and give codes, as published, but enter neither z nor the losses.
        """
        residual, total = z, torch.zeros_like(z)
        codes, latents = [], []
        commitment = codebook = z.new_zeros(())
        for i, stage in enumerate(self.quantizers):
            z_q, stage_codes, z_e, rows = stage(residual)
            used = z.new_ones(len(z)) if keep is None else (keep > i).to(z.dtype)
            total = total + z_q * used[:, None, None]
            residual = residual - z_q
            commitment = commitment + (_distance(z_e, rows.detach()) * used).mean()
            codebook = codebook + (_distance(rows, z_e.detach()) * used).mean()
            codes.append(stage_codes)
            latents.append(z_e)
        return Quantised(total, torch.stack(codes, 1), torch.cat(latents, 1), commitment, codebook)

    def encode(self, z: Tensor, stages: int | None = None) -> Tensor:
        """z [B, D, T] to the codes [B, n, T] of the first n stages."""
        codes = []
        for stage in self.quantizers[:stages]:
            z_q, stage_codes, _, _ = stage(z)
            z = z - z_q
            codes.append(stage_codes)
        return torch.stack(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, n, T], any 1 <= n <= N, to the sum of their vectors [B, D, T]."""
        total = None
        for stage, stage_codes in zip(self.quantizers, codes.unbind(1)):
            vectors, _ = stage.out_proj(stage.rows(stage_codes))
            total = vectors if total is None else total + vectors
        if total is None:
            raise ValueError("codes have no depth, expected [B, n, T] with n >= 1")
        return total

    def vectors(self, stage: int) -> Tensor:
        """What each code of a stage adds to the latent: [V, D], the projection's bias included."""
        quantizer = self.quantizers[stage]
        projected, _ = quantizer.out_proj(quantizer.codebook.weight.T[None])
        return projected[0].T


class EuclideanRVQ(nn.Module):
    """Residual quantisation by plain nearest neighbours (EnCodec); key `vq.layers.{i}._codebook.embed`.

    Args:
        width: D.
        stages: N.
        size: V.
    """

    def __init__(self, width: int, *, stages: int, size: int):
        super().__init__()
        self.vq = nn.Module()
        self.vq.layers = nn.ModuleList(_Codebook(width, size) for _ in range(stages))

    def encode(self, z: Tensor, stages: int | None = None) -> Tensor:
        """z [B, D, T] to the codes [B, n, T] of the first n stages."""
        residual = rearrange(z, "b d t -> b t d")
        codes = []
        for i in range(len(self.vq.layers) if stages is None else stages):
            rows = self.vectors(i)
            flat = rearrange(residual, "b t d -> (b t) d")
            distance = flat.square().sum(1, keepdim=True) - 2 * flat @ rows.T
            nearest = (distance + rows.square().sum(1)).argmin(1)
            codes.append(rearrange(nearest, "(b t) -> b t", b=len(z)))
            residual = residual - rows[codes[-1]]
        return torch.stack(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, n, T], any 1 <= n <= N, to the sum of their rows [B, D, T]."""
        total = sum(self.vectors(i)[stage] for i, stage in enumerate(codes.unbind(1)))
        return rearrange(total, "b t d -> b d t")

    def vectors(self, stage: int) -> Tensor:
        """The codebook [V, D] of a stage."""
        return self.vq.layers[stage]._codebook.embed


class _Codebook(nn.Module):
    """One codebook under its published name."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self._codebook = nn.Module()
        self._codebook.register_buffer("embed", torch.randn(size, width))


def draw_depths(batch: int, stages: int, share: float, rng: torch.Generator) -> Tensor:
    """Quantiser dropout: how many stages each item of a batch keeps, [B].

    The first ⌊B · share⌋ items draw from 1 ... N, the rest keep all (N + 1, as published).
    """
    drawn = torch.randint(1, stages + 1, (batch,), generator=rng, device=rng.device)
    kept = torch.full_like(drawn, stages + 1)
    dropped = int(batch * share)
    kept[:dropped] = drawn[:dropped]
    return kept


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of each item: [B, d, T] to [B]."""
    return (a - b).square().mean((1, 2))


__all__ = ["EuclideanRVQ", "ProjectedVQ", "Quantised", "ResidualVQ", "draw_depths"]
