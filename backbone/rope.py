"""Rotary positions, as tables of cosine and sine that are looked up by position.

- 1-D (Llama, arXiv 2302.13971; RoPE, arXiv 2104.09864): pairs are (i, i + H/2), "half-split", as transformers has it.
- 2-D (LlamaGen, arXiv 2406.06525): the first half of the frequencies turns with the row, the second with the
  column; pairs are (2i, 2i + 1). Positions of the condition's prefix have cosine = sine = 0, so that their queries and
  keys are zero vectors: a table with cosine = 1 there does not match the published weights.

P positions, H head width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn


class Rotary(nn.Module):
    """Tables [P, H/2] of cosine and sine in float32; not part of the state dict."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cos: Tensor, sin: Tensor, *, interleaved: bool):
        super().__init__()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.interleaved = interleaved

    def __len__(self) -> int:
        return len(self.cos)

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [..., 1, T, H/2] at positions [..., T]."""
        cos, sin = self.cos[positions], self.sin[positions]
        return cos.to(dtype).unsqueeze(-3), sin.to(dtype).unsqueeze(-3)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate queries or keys [B, N, T, H]."""
        if self.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
            pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
            return rearrange(pairs, "... half two -> ... (half two)")
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotary_1d(positions: int, head_width: int, theta: float) -> Rotary:
    """Llama's table."""
    angles = torch.outer(
        torch.arange(positions, dtype=torch.float32), frequencies(head_width, theta)
    )
    return Rotary(angles.cos(), angles.sin(), interleaved=False)


def rotary_2d(grid: tuple[int, int], prefix: int, head_width: int, theta: float) -> Rotary:
    """LlamaGen's table: `prefix` rows of zeros, then the grid's positions in row-major order."""
    freqs = frequencies(head_width // 2, theta)
    rows, columns = torch.meshgrid(*(torch.arange(n).float() for n in grid), indexing="ij")
    angles = torch.cat(
        [torch.outer(rows.flatten(), freqs), torch.outer(columns.flatten(), freqs)], dim=1
    )
    zeros = torch.zeros(prefix, head_width // 2)
    return Rotary(
        torch.cat([zeros, angles.cos()]), torch.cat([zeros, angles.sin()]), interleaved=True
    )


def frequencies(width: int, theta: float) -> Tensor:
    """One angular frequency a pair: [width/2]."""
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
