"""What is learned, and how it is run: the two things a caller hands to the engine.

A `Task` holds networks, data and losses; a `RunConfig` holds budget, batch and precision. Neither knows a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import Dataset, default_collate

# What may differ when a run goes on: nothing here changes what is learned.
FREE = ("out", "workers", "save_every", "eval_every", "log_every", "keep", "tensorboard")


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why, and where the evidence lies."""


class StopRun(Exception):
    """Raised by `Task.evaluate` where going on is a waste; the reason is the message."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a task is run.

    Args:
        out: the run's folder; a run of the same config that lies there goes on.
        steps: updates of each network; None where `minutes` alone decides.
        minutes: training time in all, evaluations included; None where `steps` alone decides.
        batch_size: items a process and forward pass.
        accumulate: forward passes an update.
        schedule: "cosine" falls to `final_lr` (a share of the task's rate), "constant" does not.
        warmup: steps over which the rate rises.
        clip: largest gradient norm of a network; None for no limit.
        ema: what the weights' moving average decays by.
        precision: "no" (float32), "bf16" or "fp16"; the weights stay in float32.
        compile: torch.compile each network's forward.
        save_every, eval_every: steps; None is a twentieth and a tenth of the budget. eval_every=0: at the end only.
        keep: how many checkpoints stay.
        workers: processes that prepare data; 0 prepares it in between.
    """

    out: str
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 32
    accumulate: int = 1
    schedule: str = "cosine"
    warmup: int = 100
    final_lr: float = 0.0
    clip: float | None = 1.0
    ema: float = 0.999
    precision: str = "no"
    compile: bool = False
    save_every: int | None = None
    eval_every: int | None = None
    log_every: int = 50
    keep: int = 2
    seed: int = 0
    workers: int = 0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("run has neither steps nor minutes, expected a budget")
        _one_of("schedule", self.schedule, ("cosine", "constant"))
        _one_of("precision", self.precision, ("no", "bf16", "fp16"))
        for name in ("steps", "minutes", "batch_size", "accumulate", "log_every", "keep"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"run.{name} is {value}, expected more than 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"run.ema is {self.ema}, expected 0 <= ema < 1")


class Task:
    """What is learned. A subclass holds its own config and data; it moves nothing to a device itself.

    Tensors that a task owns beside its networks (a teacher, a mel filter bank) are best put into a network without
    trainable parameters: it comes to the right device, and is neither trained nor stored.
    """

    config: Mapping[str, Any] = {}  # JSON values; a run goes on only under the same ones

    def networks(self) -> dict[str, nn.Module]:
        """Fresh networks, updated in this order, one optimizer each. Drawn under `torch.manual_seed(seed)`."""
        raise NotImplementedError

    def dataset(self) -> Dataset:
        """Training items: map-style, or a `RandomDataset`."""
        raise NotImplementedError

    def losses(
        self,
        name: str,
        networks: Mapping[str, Any],
        batch: Any,
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Scalars for the update of network `name`: "loss" is minimised, all are logged.

        Runs under autocast; compute losses in float32. Only `networks[name]` has gradients. `rng` lies on the
        device: `torch.rand(n, generator=rng, device=rng.device)`.
        """
        raise NotImplementedError

    def evaluate(self, networks: Mapping[str, Any], step: int) -> dict[str, float]:
        """Measures on held-out data, with averaged weights, in eval mode, in float32, on every process."""
        return {}

    def export(self, networks: Mapping[str, Any], path: Path) -> None:
        """Write the product (`save_codec`) from averaged weights, once, on the main process."""

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """The optimizer of one network; its rates are the peaks of the schedule."""
        return adamw(parameters)

    def active(self, name: str, step: int) -> bool:
        """Whether a network is updated at this step: a discriminator may begin late."""
        return True

    def initialise(self, networks: Mapping[str, Any], dataset: Any) -> None:
        """Start values that come from data (PCA, k-means); called once, on the CPU, when a run begins."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """Samples to a batch, in a worker process."""
        return default_collate(list(samples))

    def augment(self, batch: Any, rng: torch.Generator) -> Any:
        """The batch that the losses see, on the device, without gradients."""
        return batch


def adamw(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float = 3e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.01,
) -> AdamW:
    """AdamW that decays matrices and kernels, not biases, gains and other vectors."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"run.{name} is {value!r}, expected one of {', '.join(choices)}")
