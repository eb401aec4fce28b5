"""Binary quantisers: a code is a row of signs.

- LFQ, lookup-free quantisation (MAGVIT-v2, arXiv 2310.05737): signs of plain numbers, codes +-1.
- BSQ, binary spherical quantisation (arXiv 2406.07548): the vector is normalised first, codes +-1/sqrt(K), so that
  every code has unit length.
- One sign rule for all published users (lucidrains' LFQ, OctGPT's BSQ): a number above zero gives bit 1, zero and
  below give bit 0.
- `pack` makes one integer of K bits, the first bit the most significant (lucidrains); OctGPT keeps the bits apart,
  one depth each.
- Both entropies of the training loss split into a sum over bits: the softmax over all 2**K codes is a product of K
  sigmoids. For the sample entropy that is exact. For the batch entropy it is an upper bound, exact where bits are
  independent over the batch; the table of 2**K probabilities is never built.

Letters: `...` any leading dimensions, K bits, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PACKED_BITS = 62  # an id is an int64
EPSILON = 1e-6  # how near to 0 and 1 a mean bit's probability is let


@dataclass(frozen=True, kw_only=True)
class BinaryConfig:
    """A binary quantiser.

    Args:
        bits: K.
        spherical: BSQ (normalise, codes of unit length) instead of LFQ.
        inverse_temperature: how sharp the probabilities of the entropy loss are: 100 in lucidrains' LFQ, 1 in OctGPT.
    """

    bits: int
    spherical: bool = False
    inverse_temperature: float = 100.0

    def __post_init__(self):
        if self.bits < 1:
            raise ValueError(f"bits is {self.bits}, expected 1 or more")

    @property
    def scale(self) -> float:
        """The size of one entry of a code."""
        return self.bits**-0.5 if self.spherical else 1.0


def binarize(z: Tensor, config: BinaryConfig) -> tuple[Tensor, Tensor]:
    """Quantise [..., K].

    Returns:
        The codes [..., K], with the gradient of the identity (straight through), and the bits [..., K], bool.
    """
    if z.shape[-1] != config.bits:
        raise ValueError(f"z is {tuple(z.shape)}, expected [..., {config.bits}]")
    if config.spherical:
        z = F.normalize(z, dim=-1)
    bits = z > 0
    signs = bits.to(z.dtype) * 2 - 1
    if z.requires_grad:
        signs = z + (signs - z).detach()
    return signs * config.scale, bits


def codes_of(bits: Tensor, config: BinaryConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """The codes of bits [..., K], as the decoder receives them."""
    return (bits.to(dtype) * 2 - 1) * config.scale


def pack(bits: Tensor) -> Tensor:
    """Bits [..., K] to ids [...], the first bit the most significant."""
    n = bits.shape[-1]
    if n > MAX_PACKED_BITS:
        raise ValueError(f"{n} bits do not fit one id; keep them apart, one depth each")
    weights = 2 ** torch.arange(n - 1, -1, -1, device=bits.device)
    return (bits.to(torch.int64) * weights).sum(-1)


def unpack(ids: Tensor, n: int) -> Tensor:
    """Ids [...] to bits [..., n], bool; the reverse of `pack`."""
    shifts = torch.arange(n - 1, -1, -1, device=ids.device)
    return (ids[..., None] >> shifts & 1).bool()


def entropies(z: Tensor, config: BinaryConfig) -> tuple[Tensor, Tensor]:
    """Mean entropy of each vector's code, and entropy of the mean code, in nats, from z [..., K] before quantising.

    Training lowers the first (be sure) and raises the second (use all codes).
    """
    z = z.float()
    if config.spherical:
        z = F.normalize(z, dim=-1)
    # Two codes that differ in one bit differ by 2 * scale there, and the logits are 2 * <z, code> / temperature.
    logits = (4 * config.inverse_temperature * config.scale * z).flatten(0, -2)
    p = torch.sigmoid(logits)
    # From logits, because the entropy of a probability has no finite slope at 0 and 1.
    sample = F.softplus(logits) - logits * p
    mean = p.mean(0).clamp(EPSILON, 1 - EPSILON)
    return sample.sum(-1).mean(), (torch.special.entr(mean) + torch.special.entr(1 - mean)).sum()


def entropy_loss(z: Tensor, config: BinaryConfig, diversity: float = 1.0) -> Tensor:
    """Sample entropy minus `diversity` times batch entropy (gamma); published weight: 0.1 for LFQ, 1 for OctGPT."""
    sample, batch = entropies(z, config)
    return sample - diversity * batch


class LFQ(nn.Module):
    """Project to K numbers, take their signs, project back (none where `dim` is K). Runs in float32, as published."""

    def __init__(self, dim: int, config: BinaryConfig):
        super().__init__()
        self.config = config
        same = dim == config.bits
        self.project_in = nn.Identity() if same else nn.Linear(dim, config.bits)
        self.project_out = nn.Identity() if same else nn.Linear(config.bits, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., D] to quantised [..., D], ids [...], and the numbers before quantising [..., K]."""
        z = self.project_in(x).float()
        codes, bits = binarize(z, self.config)
        return self.project_out(codes.to(x.dtype)), pack(bits), z

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids [...] to what the decoder receives, [..., D]."""
        weight = getattr(self.project_out, "weight", None)
        dtype = torch.float32 if weight is None else weight.dtype
        return self.project_out(codes_of(unpack(ids, self.config.bits), self.config, dtype))
