"""A scalar quantiser for numbers that are nearly standard normal, without training (TokenBridge, arXiv 2503.16430).

- [low, high] is mapped to [-3, 3] and cut into 2**bits bins of equal normal mass; each level is the mean of the normal
  inside its bin. A number takes the *nearest level*, which is not always the level of its bin.
- The published table is made in float32 with the outermost bins cut at +-3. From 10 bits on several boundaries fall
  beyond 3, their bins have no width and the level becomes 0, so that the table is no longer sorted. There we divide the
  mass between -3 and 3 instead, in float64; up to 9 bits the table is the published one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

REACH = 3.0  # standard deviations
MAX_BITS = 16
# The last size whose bins all have width: the mass of one is more than that of a normal below -3.
PUBLISHED_BITS = int(-math.log2(math.erfc(REACH / math.sqrt(2)) / 2))


@dataclass(frozen=True, kw_only=True)
class GaussianConfig:
    """A quantiser.

    Args:
        bits: 2**bits levels.
        low, high: the range that is mapped to +-3 standard deviations; what lies outside is clamped.
    """

    bits: int = 6
    low: float = -5.0
    high: float = 5.0

    def __post_init__(self):
        if not 1 <= self.bits <= MAX_BITS:
            raise ValueError(f"bits is {self.bits}, expected 1 to {MAX_BITS}")
        if not self.low < self.high:
            raise ValueError(f"the range is {self.low} to {self.high}, expected low < high")


def gaussian_levels(bits: int) -> Tensor:
    """The levels of 2**bits bins, ascending, in standard deviations: [2**bits], float32."""
    if bits <= PUBLISHED_BITS:
        return _bin_means(_published_boundaries(bits))
    low = torch.special.ndtr(torch.tensor(-REACH, dtype=torch.float64))
    share = torch.linspace(0, 1, 2**bits + 1, dtype=torch.float64)
    boundaries = torch.special.ndtri(low + share * (1 - 2 * low)).clamp(-REACH, REACH)
    return _bin_means(boundaries).float()


def _published_boundaries(bits: int) -> Tensor:
    share = torch.linspace(0, 1, 2**bits + 1, dtype=torch.float64)
    return torch.special.ndtri(share).float().clamp(-REACH, REACH)


def _bin_means(b: Tensor) -> Tensor:
    """The mean of the standard normal between neighbouring boundaries, in their type."""
    # exp and erf are taken in float64 and rounded once, because float32 versions differ between processors in the last
    # bit, which the narrow bins amplify. This gives the published tables of 4 to 6 bits exactly; at 8 bits, where one
    # erf is a near tie, one of 225 checked levels differs by 2e-5 and no code does.
    density = torch.exp((-0.5 * b**2).double()).to(b.dtype) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + torch.erf((b / math.sqrt(2)).double()).to(b.dtype))
    return (density[:-1] - density[1:]) / (below[1:] - below[:-1])


class GaussianQuantizer(nn.Module):
    """Numbers to level indices and back; nothing is learned, and nothing enters the state dict."""

    def __init__(self, config: GaussianConfig | None = None):
        super().__init__()
        self.config = config or GaussianConfig()
        low, high = self.config.low, self.config.high
        with torch.device(
            "cpu"
        ):  # a table, not a weight: it has values also where modules are made without memory
            levels = gaussian_levels(self.config.bits)
        values = (levels + REACH) / (2 * REACH) * (high - low) + low
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("values", values, persistent=False)

    def _apply(self, fn, recurse=True):
        # Published codes are those of float32 tables: only the device of a `.to(...)` is followed.
        levels, values = self.levels, self.values
        super()._apply(fn, recurse)
        self.levels = levels.to(self.levels.device)
        self.values = values.to(self.values.device)
        return self

    def ids(self, x: Tensor) -> Tensor:
        """The nearest levels of x [...], the lower one on a tie: [...], int64."""
        low, high = self.config.low, self.config.high
        y = (x.float() - low) / (high - low) * (2 * REACH) - REACH
        y = y.clamp(-REACH, REACH)
        upper = torch.searchsorted(self.levels, y.contiguous()).clamp(1, len(self.levels) - 1)
        lower = upper - 1
        nearer = (y - self.levels[lower]).abs() <= (y - self.levels[upper]).abs()
        return torch.where(nearer, lower, upper)

    def dequantize(self, ids: Tensor) -> Tensor:
        """Level indices [...] to numbers [...]."""
        return self.values[ids]
