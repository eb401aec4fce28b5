"""Convolutional residual blocks with the key names of the VQGAN family (norm1, conv1, norm2, conv2, nin_shortcut)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-conv3x3 twice, plus the input: [B, C_in, H, W] -> [B, C_out, H, W]."""

    def __init__(
        self, channels: int, out: int | None = None, *, bias: bool = True, groups: int = 32
    ):
        super().__init__()
        out = channels if out is None else out
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=bias)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=bias)
        if channels != out:
            self.nin_shortcut = self._shortcut(channels, out, bias)

    def _shortcut(self, channels: int, out: int, bias: bool) -> nn.Module:
        return nn.Conv2d(channels, out, 1, bias=bias)

    def residual(self, x: Tensor) -> Tensor:
        """What the block adds: [B, C_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h)))

    def forward(self, x: Tensor) -> Tensor:
        """The input, brought to the new width, plus the residual."""
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + self.residual(x)
