"""An exponential moving average of weights, with a ramp: it forgets fast at first, so that the start is soon gone.

The decay at update t is min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage. The average
lies beside the parameters as they are on this process (whole, or this process's shards), so that it can be exchanged
with them in place and everything else (state dicts, gathering) works on it as on the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The average of some parameters.

    Args:
        parameters: those that are trained; buffers are not averaged.
        decay: what it tends to; 0 turns the average into a copy.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.average: list[Tensor] = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.parameters:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside the block, and what they held before after it."""
        trained = [p.detach().clone() for p in self.parameters]
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(trained)

    def state(self) -> list[Tensor]:
        """What a checkpoint stores."""
        return self.average

    def load(self, state: list[Tensor]) -> None:
        """Take over what `state` gave."""
        for mine, stored in zip(self.average, state, strict=True):
            mine.copy_(stored)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
