"""Where OctGPT's tokens stand, and the windows in which they attend to each other.

- Tokens come flat: level by level, batch-major, in z-order, as `codecs/shape/octree.py` keeps its nodes.
- Attention goes along each sample's sequence (its levels in order) in windows of K, of four kinds: consecutive tokens,
  every D-th token, and both again shifted by half a window. A token sees its own level and coarser ones only.
- Windows are tables of indices, so that nothing but attention is padded. Published models lay the samples of a batch
  end to end and cut the windows across them (`joint`); else each sample has windows of its own.

Wei et al., OctGPT, SIGGRAPH 2025 (arXiv 2504.09975); windows: Wang, OctFormer, SIGGRAPH 2023 (arXiv 2305.03045).
Letters: N tokens, C width, W windows, K tokens of a window, D dilation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..codecs.shape.octree import Octree, decode_keys


@dataclass(frozen=True)
class Tokens:
    """Where tokens stand: of which sample [N], at which level from 0 [N], at which place of the grid [N, 3]."""

    sample: Tensor
    level: Tensor
    place: Tensor

    @classmethod
    def of(cls, tree: Octree, depth: int, *, grid: int) -> Tokens:
        """The tokens of levels full_depth ... depth of an octree; places are cell centres."""
        sample, level, place = [], [], []
        for i, d in enumerate(range(tree.full_depth, depth + 1)):
            cells, rows = decode_keys(tree.keys[d])
            step = grid // 2**d
            sample.append(rows)
            level.append(torch.full_like(rows, i))
            place.append(cells * step + step // 2)
        return cls(torch.cat(sample), torch.cat(level), torch.cat(place))

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, rows: Tensor) -> Tokens:
        """Some of them, by index or mask."""
        return Tokens(self.sample[rows], self.level[rows], self.place[rows])

    def behind(self, prefix: int, samples: int) -> Tokens:
        """These with `prefix` tokens of level 0 at the origin in front of each of `samples`."""
        device = self.sample.device
        front = repeat(torch.arange(samples, device=device), "b -> (b p)", p=prefix)
        zero = torch.zeros_like(front)
        return Tokens(
            torch.cat([front, self.sample]),
            torch.cat([zero, self.level]),
            torch.cat([zero[:, None].expand(-1, 3), self.place]),
        )

    def regrouped(self) -> Tensor:
        """The order that brings each sample's tokens together, coarse levels first: [N]."""
        return self.sample.argsort(stable=True)


@dataclass(frozen=True)
class Windows:
    """Windows of attention: which token stands in each slot [W, K] (N where none), the slot of each token [N], and
    who sees whom [W, K, K]."""

    index: Tensor
    slot: Tensor
    mask: Tensor


def cut_windows(
    tokens: Tokens, *, window: int, dilation: int, shifted: bool, joint: bool
) -> Windows:
    """Windows over tokens that stand sample by sample.

    Args:
        dilation: 1 for consecutive tokens.
        shifted: begin half a window earlier.
        joint: cut across samples, as if all were one.
    """
    n, device = len(tokens), tokens.sample.device
    row = torch.zeros_like(tokens.sample) if joint else tokens.sample
    counts = torch.bincount(row)
    first = counts.cumsum(0) - counts
    at = torch.arange(n, device=device) - first[row] + (window // 2 if shifted else 0)
    longest = int(at.max()) + 1
    # A window that is longer than the sequence would be padding.
    size = min(window, -(-longest // dilation))
    block, inside = at // (size * dilation), at % (size * dilation)
    number = block * dilation + inside % dilation
    per_row = -(-longest // (size * dilation)) * dilation
    slot = (row * per_row + number) * size + inside // dilation
    index = torch.full((len(counts) * per_row * size,), n, device=device)
    index[slot] = torch.arange(n, device=device)
    index = rearrange(index, "(w k) -> w k", k=size)
    used = (index < n).any(1)
    renumbered = used.cumsum(0) - 1
    slot = renumbered[slot // size] * size + slot % size
    return Windows(index[used], slot, _visible(tokens, index[used]))


def _visible(tokens: Tokens, index: Tensor) -> Tensor:
    """Same sample, and the key's level is no finer: bool [W, K, K]. Every slot sees itself, so that none is empty."""
    # A token's sample and level as one number; empty slots lie in a sample of their own.
    span = int(tokens.level.max()) + 1
    code = F.pad(tokens.sample * span + tokens.level, (0, 1), value=-1)[index]
    first = torch.where(code < 0, code, code - code % span)  # level 0 of the same sample
    seen = (code[:, None, :] <= code[:, :, None]) & (code[:, None, :] >= first[:, :, None])
    return seen | torch.eye(index.shape[1], dtype=torch.bool, device=index.device)


@dataclass(frozen=True)
class Line:
    """Tokens that stand sample by sample, with the windows of the four kinds.

    Args:
        window, dilation, joint: see `cut_windows`.
    """

    tokens: Tokens
    window: int
    dilation: int
    joint: bool

    @cached_property
    def windows(self) -> list[Windows]:
        """Windows of block i are those of kind i % 4."""
        return [
            cut_windows(
                self.tokens,
                window=self.window,
                dilation=self.dilation if kind % 2 else 1,
                shifted=kind // 2 == 1,
                joint=self.joint,
            )
            for kind in range(4)
        ]


def sine_positions(place: Tensor, width: int) -> Tensor:
    """Sines and cosines of each coordinate, interleaved, x then y then z: [N, 3] to [N, C]."""
    each = 2 * math.ceil(width / 6)
    wave = 100.0 ** (-torch.arange(0, each, 2, device=place.device) / each)
    angle = place[..., None].float() * wave
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]
