"""Finite scalar quantisation (FSQ, arXiv 2309.15505): every dimension is rounded to a few levels; no codebook.

- With L levels a number is squashed by tanh, shifted where L is even, and rounded half to even; codes are q / (L // 2).
- The id of a vector is a mixed-radix number whose first dimension runs fastest: bases 1, L0, L0·L1, ...
- Always in float32, where published codes were computed. The published index is summed in floats and truncated; the
  integers here are equal to it for every code (a test walks through all 64,000 of FlexTok's).

Shapes: d dimensions, V = L0·L1·... codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

MARGIN = 1e-3  # of the outermost levels' width, so that tanh reaches their centres


class FSQCodes(NamedTuple):
    """Values [..., d] in [-1, 1] with straight-through gradients, and their ids [...]."""

    vectors: Tensor
    ids: Tensor


class FSQ(nn.Module):
    """Rounds [..., d] to `levels` per dimension; no parameters and no state."""

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels are {list(levels)}, expected sizes of 2 or more")
        self.levels = tuple(levels)
        self.size = prod(self.levels)

    @property
    def width(self) -> int:
        """Numbers a code."""
        return len(self.levels)

    def bound(self, z: Tensor) -> Tensor:
        """Squash [..., d] (float32) into the open interval that rounding covers."""
        levels = self._levels(z)
        half = (levels - 1) * (1 + MARGIN) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def steps(self, z: Tensor) -> Tensor:
        """[..., d] to levels counted from the lowest, integers in 0 ... L - 1."""
        with torch.autocast(z.device.type, enabled=False):
            return self.bound(z.float()).round().long() + self._levels(z) // 2

    def ids(self, z: Tensor) -> Tensor:
        """[..., d] to ids [...]."""
        return (self.steps(z) * self._bases(z)).sum(-1)

    def digits(self, ids: Tensor) -> Tensor:
        """Ids [...] to levels counted from the lowest, [..., d].

        Raises:
            ValueError: an id is outside 0 ... V - 1.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.size:
            raise ValueError(
                f"ids run from {int(ids.min())} to {int(ids.max())}, expected 0 to {self.size - 1}"
            )
        return ids[..., None] // self._bases(ids) % self._levels(ids)

    def vectors(self, ids: Tensor) -> Tensor:
        """Ids [...] to values [..., d] in [-1, 1], float32."""
        return self._values(self.digits(ids))

    def tables(self) -> list[Tensor]:
        """The values of each dimension's levels, [L, 1] each; a code's vector is their concatenation."""
        return [(torch.arange(n)[:, None] - n // 2).float() / (n // 2) for n in self.levels]

    def forward(self, z: Tensor) -> FSQCodes:
        """Quantise for training: gradients skip the rounding and pass the tanh."""
        steps = self.steps(z)
        with torch.autocast(z.device.type, enabled=False):
            smooth = self.bound(z.float()) / (self._levels(z) // 2)
            vectors = smooth + (self._values(steps) - smooth).detach()
        return FSQCodes(vectors, (steps * self._bases(z)).sum(-1))

    def _values(self, steps: Tensor) -> Tensor:
        half = self._levels(steps) // 2
        return (steps - half).float() / half

    def _levels(self, like: Tensor) -> Tensor:
        return torch.tensor(self.levels, device=like.device)

    def _bases(self, like: Tensor) -> Tensor:
        bases = [prod(self.levels[:i]) for i in range(self.width)]
        return torch.tensor(bases, device=like.device)
