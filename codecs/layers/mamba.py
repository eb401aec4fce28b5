"""Mamba (arXiv 2312.00752) in plain PyTorch: a selective state space over a sequence, in one direction or in both.

For channel e and state n, with steps delta that depend on the input:

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = C_t h_t + D u_t        out = (y * silu(z)) W

- `selective_scan` runs it in blocks of steps: exponentials, inputs and outputs of a block are computed at once, and of
  a step only h = b + a h remains, one fused operation in place. The order of operations is that of the plain loop, so
  are the numbers; 8,192 steps take a tenth of its time (benchmarks/storm_scan.py). Memory is one block at any length.
- With gradients, a block's backward pass is the same recurrence in reverse; blocks are recomputed, not stored.
- On CUDA the fused kernel of `mamba-ssm` is used where that package is installed.
- `Mamba` has the published keys; `BidirectionalMamba` those of VideoMamba (arXiv 2403.06977), whose directions share
  the projections: `_b` marks what the backward direction has for itself.

B rows, L steps, D width, E = expand D channels, S states, R rank of delta.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BLOCK = 2**17  # numbers of a block: half a megabyte, so that it stays in a core's cache
TRAINED_BLOCK = 2**21  # where a block is stored for its gradients
FUSED = "mamba_ssm.ops.selective_scan_interface"


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Sizes; the defaults are the paper's.

    Args:
        width: D. state: S. conv: taps of the causal convolution. expand: E / D. rank: R; ceil(D / 16) where None.
    """

    width: int
    state: int = 16
    conv: int = 4
    expand: int = 2
    rank: int | None = None

    def __post_init__(self):
        for name in ("width", "state", "conv", "expand"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def inner(self) -> int:
        """E."""
        return self.expand * self.width

    @property
    def delta_rank(self) -> int:
        """R."""
        return math.ceil(self.width / 16) if self.rank is None else self.rank


@dataclass(frozen=True)
class MambaState:
    """Where a sequence stands, to go on with: the convolution's last inputs [B, E, conv - 1], and h [B, E, S]."""

    conv: Tensor
    scan: Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence.

    Args:
        u, delta: [B, L, E], input and step sizes (>= 0; a step of 0 leaves the state as it is).
        A: [E, S], negative. B, C: [B, L, S]. D: [E].
        state: [B, E, S] before the first step; zeros where None.

    Returns:
        y [B, L, E] in u's type, and the state [B, E, S] in float32 behind the last step.
    """
    kernel = fused_kernel(u.device) if state is None else None
    if kernel is not None:
        return _fused(kernel, u, delta, A, B, C, D)
    kind = torch.promote_types(u.dtype, torch.float32)
    wide = [t.to(kind) for t in (u, delta, A, B, C)]
    y, last = _blocks(*wide, state)
    if D is not None:
        y = y + D.to(y.dtype) * wide[0]
    return y.to(u.dtype), last


def _blocks(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Time first, channels last; block by block."""
    rows, length, channels = u.shape
    h = u.new_zeros(rows, A.shape[1], channels) if state is None else state.transpose(1, 2).to(u)
    A = A.t().contiguous()
    timed = [t.transpose(0, 1) for t in (delta * u, delta, B, C)]
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (*timed, A, h))
    steps = max(1, (TRAINED_BLOCK if trained else BLOCK) // h.numel())
    if not trained:
        y, h = _fast(timed, A, h, min(steps, length))
        return y.transpose(0, 1), h.transpose(1, 2)
    parts = []
    for block in zip(*(t.split(steps) for t in timed)):
        y, h = checkpoint(_one, *block, A, h, use_reentrant=False, preserve_rng_state=False)
        parts.append(y)
    return torch.cat(parts).transpose(0, 1), h.transpose(1, 2)


def _fast(timed: list[Tensor], A: Tensor, h: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Without gradients: [L, B, ...] in, y [L, B, E] and the last state [B, S, E] out, in two buffers of one block."""
    inputs, delta, B, C = timed
    length = len(inputs)
    y = h.new_empty(length, len(h), 1, h.shape[2])
    kept, added = h.new_empty(steps, *h.shape), h.new_empty(steps, *h.shape)
    kept_steps, added_steps = kept.unbind(0), added.unbind(0)
    for start in range(0, length, steps):
        n, part = min(steps, length - start), slice(start, start + steps)
        torch.mul(delta[part, :, None], A, out=kept[:n]).exp_()
        torch.mul(inputs[part, :, None], B[part, ..., None], out=added[:n])
        for a, b in zip(kept_steps[:n], added_steps[:n]):
            h = b.addcmul_(a, h)
        torch.matmul(C[part, :, None], added[:n], out=y[part])
        h = h.clone()  # the buffer that it stands in is written next
    return y[:, :, 0], h


def _one(
    inputs: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """One block with gradients: y [T, B, E] and the state [B, S, E] behind it."""
    kept = (delta[:, :, None] * A).exp()
    states = _Recurrence.apply(kept, inputs[:, :, None] * B[..., None], h)
    return (C[:, :, None] @ states)[:, :, 0], states[-1]


class _Recurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t for all t: a, b [T, ...], h [...] -> [T, ...]."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        states, before = b.clone(), h
        for kept, own in zip(a.unbind(0), states.unbind(0)):
            before = own.addcmul_(kept, before)
        ctx.save_for_backward(a, states, h)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, states, h = ctx.saved_tensors
        total = grad.clone()
        steps, kept = total.unbind(0), a.unbind(0)
        for t in range(len(steps) - 2, -1, -1):
            steps[t].addcmul_(kept[t + 1], steps[t + 1])
        before = torch.cat([h[None], states[:-1]])
        return total * before, total, a[0] * total[0]


def fused_kernel(device: torch.device) -> Callable[..., Any] | None:
    """The kernel of `mamba-ssm` where it can run, else None."""
    if device.type != "cuda" or importlib.util.find_spec("mamba_ssm") is None:
        return None
    return importlib.import_module(FUSED).selective_scan_fn


def _fused(
    kernel: Callable[..., Any],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernel takes channels before time, and a delta that is what it is (no bias, no softplus)."""
    first = [t.transpose(1, 2).contiguous() for t in (u, delta.to(u.dtype), B, C)]
    y, last = kernel(
        first[0],
        first[1],
        A.float(),
        first[2],
        first[3],
        D=None if D is None else D.float(),
        delta_softplus=False,
        return_last_state=True,
    )
    return y.transpose(1, 2), last


class Mamba(nn.Module):
    """One direction, [B, L, D] -> [B, L, D], under the published keys."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = c = config
        self.in_proj = nn.Linear(c.width, 2 * c.inner, bias=False)
        self.conv1d = nn.Conv1d(c.inner, c.inner, c.conv, groups=c.inner)
        self.x_proj = nn.Linear(c.inner, c.delta_rank + 2 * c.state, bias=False)
        self.dt_proj = nn.Linear(c.delta_rank, c.inner)
        self.A_log, self.D = _dynamics(c)
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)
        _start(self.dt_proj)

    def forward(self, x: Tensor, valid: Tensor | None = None, *, reverse: bool = False) -> Tensor:
        """[B, L, D].

        Args:
            valid: [B, L], False at padding, which neither is read nor moves the state.
            reverse: from the last position to the first.
        """
        if reverse:
            flipped = None if valid is None else valid.flip(1)
            return self(x.flip(1), flipped).flip(1)
        u, z = self.in_proj(x).chunk(2, -1)
        y, _ = self._direction(u, valid)
        return self.out_proj(y * F.silu(z))

    def advance(self, x: Tensor, state: MambaState | None) -> tuple[Tensor, MambaState]:
        """The next L positions of sequences that stand at `state` (None: the beginning)."""
        u, z = self.in_proj(x).chunk(2, -1)
        y, state = self._direction(u, None, state)
        return self.out_proj(y * F.silu(z)), state

    def _direction(
        self, u: Tensor, valid: Tensor | None, state: MambaState | None = None, suffix: str = ""
    ) -> tuple[Tensor, MambaState]:
        """Convolution and recurrence of u [B, L, E], with the parts named by `suffix`."""
        conv, x_proj, dt_proj = (
            getattr(self, name + suffix) for name in ("conv1d", "x_proj", "dt_proj")
        )
        A_log, D = (self.A_log, self.D) if not suffix else (self.A_b_log, self.D_b)
        c = self.config
        if valid is not None:
            u = u.where(valid[..., None], 0)
        taps = c.conv - 1
        first = u.transpose(1, 2)
        first = F.pad(first, (taps, 0)) if state is None else torch.cat([state.conv, first], 2)
        u = F.silu(conv(first)).transpose(1, 2)
        low, B, C = x_proj(u).split([c.delta_rank, c.state, c.state], -1)
        # Step sizes and decays are taken in float32, whatever the rest is in.
        delta = F.softplus(F.linear(low, dt_proj.weight).float() + dt_proj.bias.float())
        if valid is not None:
            delta = delta.where(valid[..., None], 0)
        A = -A_log.float().exp()
        y, last = selective_scan(u, delta, A, B, C, D, state=None if state is None else state.scan)
        return y, MambaState(first[:, :, first.shape[2] - taps :], last)


class BidirectionalMamba(Mamba):
    """Both directions between shared projections, their outputs added (VideoMamba's "v2")."""

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        c = config
        self.conv1d_b = nn.Conv1d(c.inner, c.inner, c.conv, groups=c.inner)
        self.x_proj_b = nn.Linear(c.inner, c.delta_rank + 2 * c.state, bias=False)
        self.dt_proj_b = nn.Linear(c.delta_rank, c.inner)
        self.A_b_log, self.D_b = _dynamics(c)
        _start(self.dt_proj_b)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, L, D]; `valid` [B, L] as in `Mamba`."""
        u, z = self.in_proj(x).chunk(2, -1)
        flipped = None if valid is None else valid.flip(1)
        y = self._direction(u, valid)[0]
        y = y + self._direction(u.flip(1), flipped, suffix="_b")[0].flip(1)
        return self.out_proj(y * F.silu(z))

    def advance(self, x: Tensor, state: MambaState | None) -> tuple[Tensor, MambaState]:
        """Not possible: the backward direction begins at the end."""
        raise ValueError("a bidirectional Mamba cannot go on with a sequence; take merge='forward'")


class TwoMambas(nn.Module):
    """Two whole blocks, one a direction, their outputs added."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.forward_mixer, self.backward_mixer = Mamba(config), Mamba(config)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, L, D]; `valid` [B, L] as in `Mamba`."""
        return self.forward_mixer(x, valid) + self.backward_mixer(x, valid, reverse=True)


def _dynamics(config: MambaConfig) -> tuple[nn.Parameter, nn.Parameter]:
    """A = -(1 ... S) for each channel, as its logarithm [E, S]; D = 1 [E]."""
    states = torch.arange(1, config.state + 1, dtype=torch.float32)
    A_log = states.log().expand(config.inner, -1).clone()
    return nn.Parameter(A_log), nn.Parameter(torch.ones(config.inner))


@torch.no_grad()
def _start(dt_proj: nn.Linear, low: float = 1e-3, high: float = 0.1) -> None:
    """Step sizes that begin between `low` and `high`, evenly in their logarithm, as published."""
    bound = dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, -bound, bound)
    steps = torch.exp(
        torch.rand(dt_proj.out_features) * (math.log(high) - math.log(low)) + math.log(low)
    )
    dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
