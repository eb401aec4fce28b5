"""Convolutions of the audio codecs: weight norm in all its published spellings, and rows of unequal length.

- Our modules hold plain weights. `fuse_weight_norm` turns a state dict with `weight_g`/`weight_v` (the old hook) or
  `parametrizations.weight.original0/1` (the new one) into plain weights; `train_with_weight_norm` and
  `without_weight_norm` put the parametrisation on for training and take it off again.
- A batch of unequal lengths is padded on the right. What a row computes beyond its own end would leak back into it
  through the next kernel, so every layer takes and returns `(x, n)`: x [B, C, L] and the valid lengths n [B] (None:
  all of L), and a convolution zeroes what lies beyond them. Then each row sees the zeros that its own padding
  would have given, and a batch equals the single calls.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

Pair = tuple[Tensor, Tensor | None]  # x [B, C, L], valid lengths [B]

_SPELLINGS = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


class Conv1d(nn.Conv1d):
    """nn.Conv1d on `(x, n)`."""

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:  # type: ignore[override]
        """x [B, C, L] to [B, C', L'], n to the lengths after the layer."""
        y = super().forward(x)
        if n is not None:
            reach = self.dilation[0] * (self.kernel_size[0] - 1) + 1
            n = (n + 2 * self.padding[0] - reach) // self.stride[0] + 1  # type: ignore[operator]
            y = cut(y, n)
        return y, n


class ConvTranspose1d(nn.ConvTranspose1d):
    """nn.ConvTranspose1d on `(x, n)`."""

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:  # type: ignore[override]
        """x [B, C, L] to [B, C', L'], n to the lengths after the layer."""
        y = super().forward(x)
        if n is not None:
            n = (n - 1) * self.stride[0] - 2 * self.padding[0] + self.kernel_size[0]  # type: ignore[operator]
            y = cut(y, n)
        return y, n


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """x + sin²(alpha x) / alpha, for x [B, C, L] and alpha [1, C, 1]."""
    alpha = alpha.to(x.dtype)
    return x + torch.sin(alpha * x).square() / (alpha + 1e-9)


class Snake(nn.Module):
    """`snake` with alpha learned for each channel (Ziyin et al., arXiv 2006.08195).

    `function` may be replaced by a compiled one: eager, its backward takes most of a training step on a CPU.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))
        self.function = snake

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:
        """[B, C, L], any L; zeros stay zeros."""
        # Viewed, because a compiler takes a parameter's shape for constant and would compile once a width.
        return self.function(x, self.alpha.view(1, -1, 1)), n


class Chain(nn.Sequential):
    """nn.Sequential of layers on `(x, n)`."""

    def forward(self, x: Tensor, n: Tensor | None = None) -> Pair:  # type: ignore[override]
        """Through all layers."""
        for layer in self:
            x, n = layer(x, n)
        return x, n


def cut(x: Tensor, n: Tensor) -> Tensor:
    """Zero x [B, C, L] beyond the lengths n [B]."""
    beyond = torch.arange(x.shape[-1], device=x.device) >= n[:, None]
    return x.masked_fill(beyond[:, None], 0)


def fuse_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every pair of magnitude and direction replaced by the `weight` that they stand for.

    weight = g · v / ‖v‖, the norm taken over all dimensions but the first (which is the *input* channel of a transposed
    convolution), in float64 and rounded once to the type of v.
    """
    fused = dict(tensors)
    for g_name, v_name in _SPELLINGS:
        for key in [k for k in fused if k.endswith("." + g_name)]:
            stem = key.removesuffix(g_name)
            g, v = fused.pop(key), fused.pop(stem + v_name)
            wide = v.double()
            norm = wide.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))
            fused[stem + "weight"] = (g.double() * wide / norm).to(v.dtype)
    return fused


def train_with_weight_norm(module: nn.Module) -> None:
    """Put weight norm on every convolution of `module`, in place; its output does not change."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d, nn.Conv2d)):
            parametrizations.weight_norm(layer)


def without_weight_norm(module: nn.Module) -> None:
    """Bake weight norm into plain weights, in place; the inverse of `train_with_weight_norm`."""
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
