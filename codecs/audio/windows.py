"""Sequences too long for one pass.

`Windowed` runs a shift-invariant network over an endless sequence in constant memory. A window carries `margin` frames
of context on both sides, as far as the network can see, so what is kept of it equals the unwindowed result (up to the
rounding of another kernel size); at the true ends the network's own padding applies, as it does unwindowed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ..layers.conv import Conv1d, ConvTranspose1d


class Windowed:
    """`fn` over a sequence that arrives in pieces along its last axis.

    Args:
        fn: maps [..., n · unit_in] to [..., n · unit_out] for whole frames n; the last window may end inside a frame.
        unit_in, unit_out: positions of the input and of the output in a frame.
        margin: frames of context that `fn` needs on either side.
        step: frames that a window adds.
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        *,
        unit_in: int,
        unit_out: int,
        margin: int,
        step: int,
    ):
        self.fn, self.unit_in, self.unit_out = fn, unit_in, unit_out
        self.margin, self.step = margin, step
        self._buffer: Tensor | None = None
        self._ahead = 0  # frames in front of the buffer's start that are finished already

    def push(self, x: Tensor) -> list[Tensor]:
        """Take a piece; return what has become final, in order."""
        self._buffer = x if self._buffer is None else torch.cat([self._buffer, x], -1)
        final = []
        while self._buffer.shape[-1] >= self.unit_in * (self._ahead + self.step + self.margin):
            final.append(self._advance())
        return final

    def finish(self) -> Tensor:
        """The rest. ValueError where nothing was pushed."""
        if self._buffer is None:
            raise ValueError("the stream was finished before anything was pushed into it")
        out = self.fn(self._buffer)[..., self._ahead * self.unit_out :]
        self._buffer, self._ahead = None, 0
        return out

    def _advance(self) -> Tensor:
        assert self._buffer is not None
        stop = self._ahead + self.step
        out = self.fn(self._buffer[..., : self.unit_in * (stop + self.margin)])
        out = out[..., self._ahead * self.unit_out : stop * self.unit_out]
        kept = max(0, stop - self.margin)
        self._buffer = self._buffer[..., kept * self.unit_in :].clone()
        self._ahead = stop - kept
        return out


def reach(network: nn.Module, stride: int) -> int:
    """How far to either side, in samples, one output of a chain of convolutions depends on its input.

    Args:
        stride: samples in a step of the input: 1 for an encoder, the hop for a decoder.
    """
    total = 0
    for layer in network.modules():
        if isinstance(layer, Conv1d):
            before = int(layer.padding[0])
            after = (layer.kernel_size[0] - 1) * layer.dilation[0] - before
            total += stride * max(before, after)
            stride *= layer.stride[0]
        elif isinstance(layer, ConvTranspose1d):
            stride //= layer.stride[0]
            before = int(layer.padding[0])
            total += stride * max(before, layer.kernel_size[0] - 1 - before)
    return total


class Step(Protocol):
    """What `Chained` runs: `Windowed`, or a network that carries a state."""

    def push(self, x: Tensor) -> list[Tensor]:
        """Take a piece; return what has become final, in order."""
        ...

    def finish(self) -> Tensor | None:
        """The rest, None where there is none."""
        ...


class Chained:
    """Several steps one after the other, with the interface of one; the last one must have a rest."""

    def __init__(self, *steps: Step):
        self.steps = steps

    def push(self, x: Tensor) -> list[Tensor]:
        """Take a piece; return what has become final, in order."""
        return self._from(0, [x])

    def finish(self) -> Tensor:
        """The rest. ValueError where nothing was pushed."""
        pieces: list[Tensor] = []
        for i, step in enumerate(self.steps):
            rest = step.finish()
            if rest is not None:
                pieces += self._from(i + 1, [rest])
        return torch.cat(pieces, -1)

    def _from(self, first: int, pieces: list[Tensor]) -> list[Tensor]:
        for step in self.steps[first:]:
            pieces = [out for piece in pieces for out in step.push(piece)]
        return pieces
