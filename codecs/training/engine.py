"""The one training loop: a `Task` says what is learned, the engine does everything else, on accelerate.

- Any number of processes: each network's losses are the forward of the module that accelerate prepares, so whatever
  methods of the network a task calls, gradients are shared.
- Resume is exact. Every random draw comes from (seed, purpose, step, process) and the order of the data from (seed,
  epoch, process), so a checkpoint needs no generator states, and the curve goes on bit for bit on the same hardware.
- Checkpoints are whole or absent (`checkpoint.py`). A run killed at any moment loses the steps since the last one.
- A budget is steps, minutes, or both (what ends first). Schedule, evaluations and checkpoints follow the share that
  is spent, so that with minutes a cosine ends when the time does. Time during which nothing ran does not count.
- A loss or gradient that is not finite ends the run, with the batch beside the log.

A run's folder: `config.json`, `log.jsonl`, `tensorboard/`, `checkpoints/step-*/`, `final.safetensors`, `result.json`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, broadcast, send_to_device
from torch import Tensor, nn

from . import checkpoint
from .checkpoint import CheckpointError, write_json
from .ema import Ema
from .journal import Journal, Window
from .loader import Order, batches, derived
from .task import FREE, RunConfig, StopRun, Task, TrainingError, adamw

__all__ = ["RunConfig", "StopRun", "Task", "TrainingError", "adamw", "run"]

FORMAT = 1


def run(task: Task, config: RunConfig, *, stop: bool = False) -> Path:
    """Train, or go on training; returns where the product lies.

    Args:
        stop: end here: evaluate and export what the last checkpoint holds.

    Raises:
        CheckpointError: the folder holds another run, or the disk is full.
        TrainingError: a loss is not finite, or the task is no task.
        StopRun: the task gave up; the last state is in a checkpoint.
    """
    accelerator = _accelerator(config)
    cuda = accelerator.device.type == "cuda"
    with torch.random.fork_rng(devices=[accelerator.device] if cuda else []):
        return _Run(task, config, accelerator).go(stop=stop)


@dataclass
class _Update:
    """One trained network: what accelerate made of it, and what belongs to it."""

    module: nn.Module  # its forward is the losses
    optimizer: Any
    parameters: list[nn.Parameter]
    ema: Ema
    peaks: list[float]


@dataclass
class _State:
    """What a checkpoint holds beside weights."""

    step: int = 0
    elapsed: float = 0.0  # seconds
    window: Window = field(default_factory=Window)


class _Losses(nn.Module):
    """A network under a forward that gives its losses, for accelerate to prepare."""

    def __init__(
        self, name: str, task: Task, network: nn.Module, networks: dict[str, nn.Module]
    ) -> None:
        super().__init__()
        self.network = network
        self._name, self._task, self._networks = name, task, networks

    def forward(self, batch: Any, step: int, rng: torch.Generator) -> dict[str, Tensor]:
        losses = self._task.losses(self._name, self._networks, batch, step, rng)
        if "loss" not in losses:
            raise TrainingError(
                f"losses('{self._name}') gave {', '.join(losses)}, expected a scalar 'loss' too"
            )
        # What is only logged has no gradient: processes would wait for it in vain.
        return {key: x if key == "loss" else x.detach() for key, x in losses.items()}


class _Run:
    """One run from its first step to its product."""

    def __init__(self, task: Task, config: RunConfig, accelerator: Accelerator) -> None:
        self.task, self.config, self.accelerator = task, config, accelerator
        self.out = Path(config.out)
        self.root = self.out / "checkpoints"
        self.final = self.out / "final.safetensors"
        self.state = _State()
        self.rng = torch.Generator(device=accelerator.device)

    def go(self, *, stop: bool) -> Path:
        """The whole run."""
        self._claim()
        if (self.out / "result.json").is_file():
            return self.final
        self._build()
        journal = self.journal = Journal(
            self.accelerator, self.out, self.state.step, tensorboard=self.config.tensorboard
        )
        journal.open(self.out.name)
        self.began = time.monotonic() - self.state.elapsed
        self.resumed = (self.state.step, self.state.elapsed)
        try:
            if not stop:
                self._loop()
            self._finish()
        finally:
            journal.close()
        return self.final

    def _claim(self) -> None:
        """Write the config, or compare it with the one that lies there."""
        mine = _settings(self.task, self.config, self.accelerator.num_processes)
        path = self.out / "config.json"
        self.accelerator.wait_for_everyone()
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            for place, before, now in _differences(stored, mine):
                raise CheckpointError(
                    f"{self.out} holds a run with {place} = {before}, this config has {now}; "
                    "restore it, or give another 'out'"
                )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and not path.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(path, mine)
        self.accelerator.wait_for_everyone()

    def _build(self) -> None:
        torch.manual_seed(derived(self.config.seed, "weights") % 2**32)
        task = self.task
        self.networks = task.networks()
        self.dataset = task.dataset()
        if len(self.dataset) == 0:  # type: ignore[arg-type]
            raise TrainingError("the data set is empty, expected at least one item")
        last = checkpoint.latest(self.root)
        if last is None:
            task.initialise(self.networks, self.dataset)
        self.updates = {name: self._prepare(name) for name in self._trained()}
        if last is not None:
            self._load(last)

    def _trained(self) -> list[str]:
        """Names of networks with anything to train; the others go to the device as they are."""
        names = []
        for name, network in self.networks.items():
            if any(p.requires_grad for p in network.parameters()):
                names.append(name)
            else:
                network.to(self.accelerator.device).eval()
        if not names:
            raise TrainingError("no network has trainable parameters")
        if len(names) > 1 and self.accelerator.distributed_type == DistributedType.FSDP:
            raise TrainingError(
                f"FSDP shards one network a run, this task trains {', '.join(names)}; launch with DDP"
            )
        return names

    def _prepare(self, name: str) -> _Update:
        network = self.networks[name].train()
        if self.config.compile:
            network.compile()
        module = _Losses(name, self.task, network, self.networks)
        trained = [p for p in network.parameters() if p.requires_grad]
        module, optimizer = self.accelerator.prepare(module, self.task.optimizer(name, trained))
        parameters = [p for p in module.parameters() if p.requires_grad]
        peaks = [group["lr"] for group in optimizer.param_groups]
        return _Update(module, optimizer, parameters, Ema(parameters, self.config.ema), peaks)

    # --- the loop

    def _loop(self) -> None:
        config = self.config
        data = self._data()
        progress = self._progress()
        while progress < 1:
            self._step(data, progress)
            before, progress = progress, self._progress()
            self._report(progress)
            if self._due(config.eval_every, 10, before, progress) and progress < 1:
                self._evaluate_or_stop()
            if self._due(config.save_every, 20, before, progress) or progress >= 1:
                self._save()

    def _data(self) -> Iterable[Any]:
        order = Order(
            items=len(self.dataset),  # type: ignore[arg-type]
            batch=self.config.batch_size,
            seed=self.config.seed,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            start=self.state.step * self.config.accumulate,
        )
        return batches(
            self.dataset,
            order,
            self.task.collate,
            workers=self.config.workers,
            pin=self.accelerator.device.type == "cuda",
        )

    def _step(self, data: Iterable[Any], progress: float) -> None:
        """One update of every active network."""
        # Dropout draws from the global generator: seeded anew, it needs no place in a checkpoint.
        torch.manual_seed(self._seed("dropout") % 2**32)
        parts = [self._batch(batch, i) for i, batch in zip(range(self.config.accumulate), data)]
        for name, update in self.updates.items():
            if self.task.active(name, self.state.step):
                self._update(name, update, parts, progress)
        self.state.step += 1

    @torch.no_grad()
    def _batch(self, batch: Any, part: int) -> Any:
        batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
        return self.task.augment(batch, self._rng("augment", part))

    def _update(self, name: str, update: _Update, parts: list[Any], progress: float) -> None:
        accelerator, step = self.accelerator, self.state.step
        rate = self._rate(progress)
        for group, peak in zip(update.optimizer.param_groups, update.peaks):
            group["lr"] = peak * rate
        logs: list[dict[str, Tensor]] = []
        with self._alone(name):
            for i, batch in enumerate(parts):
                last = i == len(parts) - 1
                shared = contextlib.nullcontext() if last else accelerator.no_sync(update.module)
                with shared:
                    losses = update.module(batch, step, self._rng(name, i))
                    accelerator.backward(losses["loss"].float() / len(parts))
                logs.append({k: v.detach().float() for k, v in losses.items()})
        norm = self._clip(update)
        update.optimizer.step()
        update.optimizer.zero_grad(set_to_none=True)
        self._check(name, update, logs, norm, parts)
        update.ema.update(step)

    @contextlib.contextmanager
    def _alone(self, name: str):
        """Only `name` has gradients: the others are neither slowed by them nor share them between processes."""
        others = [p for other, u in self.updates.items() if other != name for p in u.parameters]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _clip(self, update: _Update) -> Tensor | None:
        if self.config.clip is None:
            return None
        return self.accelerator.clip_grad_norm_(update.module.parameters(), self.config.clip)

    def _check(
        self,
        name: str,
        update: _Update,
        logs: list[dict[str, Tensor]],
        norm: Tensor | None,
        parts: list[Any],
    ) -> None:
        """Log the losses; end the run where one is not finite. One transfer from the device for all of them."""
        names = [(i, key) for i, log in enumerate(logs) for key in log]
        row = torch.stack([logs[i][key].reshape(()) for i, key in names]).tolist()
        values: dict[str, float] = {}
        for (_, key), value in zip(names, row):
            values[key] = values.get(key, 0.0) + value / sum(key in log for log in logs)
        bad = {key: value for (_, key), value in zip(names, row) if not math.isfinite(value)}
        if norm is not None:
            values["grad_norm"] = float(norm)
            # fp16's loss scale is found by trying: its overflows are skipped steps, not failures.
            if (
                not bad
                and self.accelerator.scaler is None
                and not math.isfinite(values["grad_norm"])
            ):
                bad["grad_norm"] = values["grad_norm"]
        if bad:
            self._fail(name, bad, parts)
        if self.accelerator.scaler is not None and update.optimizer.step_was_skipped:
            values.pop("grad_norm", None)
        prefix = f"{name}/" if len(self.updates) > 1 else ""
        self.state.window.add({prefix + key: value for key, value in values.items()})

    def _fail(self, name: str, bad: dict[str, float], parts: list[Any]) -> None:
        step, rank = self.state.step, self.accelerator.process_index
        path = self.out / f"failed-{name}-step-{step}-process-{rank}.pt"
        torch.save(send_to_device(parts, torch.device("cpu")), path)
        what = ", ".join(f"{key} = {value}" for key, value in bad.items())
        last = checkpoint.latest(self.root)
        raise TrainingError(
            f"update of '{name}' at step {step}: {what}; the batch is in {path}, "
            + (f"the last checkpoint is {last}" if last else "there is no checkpoint yet")
        )

    # --- time and rates

    def _elapsed(self) -> float:
        """Seconds of training so far, the same on every process."""
        elapsed = time.monotonic() - self.began
        if self.accelerator.num_processes > 1 and self.config.minutes is not None:
            shared = torch.tensor([elapsed], device=self.accelerator.device)
            elapsed = broadcast(shared, from_process=0).item()
        return elapsed

    def _progress(self) -> float:
        """The share of the budget that is spent."""
        config, shares = self.config, []
        self.state.elapsed = self._elapsed()
        if config.steps is not None:
            shares.append(self.state.step / config.steps)
        if config.minutes is not None:
            shares.append(self.state.elapsed / (60 * config.minutes))
        return max(shares)

    def _rate(self, progress: float) -> float:
        """What the peak rates are multiplied with."""
        rise = min(1.0, (self.state.step + 1) / max(1, self.config.warmup))
        if self.config.schedule == "constant":
            return rise
        low = self.config.final_lr
        return rise * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def _due(self, every: int | None, share: int, before: float, progress: float) -> bool:
        if every is None:
            return int(before * share) != int(progress * share)
        return every > 0 and self.state.step % every == 0

    def _seed(self, *purpose: object) -> int:
        return derived(self.config.seed, *purpose, self.state.step, self.accelerator.process_index)

    def _rng(self, *purpose: object) -> torch.Generator:
        return self.rng.manual_seed(self._seed(*purpose))

    def _report(self, progress: float) -> None:
        state, (step, elapsed) = self.state, self.resumed
        rate = (state.step - step) / max(1e-9, state.elapsed - elapsed)
        totals = state.window.sums.get("loss") or next(iter(state.window.sums.values()))
        self.journal.advance(progress, state.step, rate, f"loss {totals[0] / totals[1]:.4g}")
        if state.step % self.config.log_every == 0:
            means = state.window.means(self.accelerator)
            lr = {"lr": next(iter(self.updates.values())).optimizer.param_groups[0]["lr"]}
            clock = {"minutes": state.elapsed / 60, "it_per_s": rate}
            self.journal.write(state.step, "train", means | lr | clock)

    # --- evaluation, checkpoints, the end

    @contextlib.contextmanager
    def _averaged(self):
        """Networks in eval mode with averaged weights."""
        with contextlib.ExitStack() as stack:
            modules = [m for network in self.networks.values() for m in network.modules()]
            modes = [module.training for module in modules]
            for update in self.updates.values():
                stack.enter_context(update.ema.applied())
            for network in self.networks.values():
                network.eval()
            try:
                yield
            finally:
                for module, mode in zip(modules, modes):
                    module.training = mode

    def _evaluate_or_stop(self) -> None:
        try:
            self._evaluate()
        except StopRun:
            self._save()
            raise

    def _evaluate(self) -> dict[str, float]:
        with self._averaged(), torch.no_grad():
            measures = self.task.evaluate(self.networks, self.state.step)
        measures = {key: float(value) for key, value in measures.items()}
        if measures:
            self.journal.write(self.state.step, "eval", measures)
        return measures

    def _save(self) -> None:
        accelerator, state = self.accelerator, self.state
        folder = checkpoint.partial_of(self.root, state.step)
        self.root.mkdir(parents=True, exist_ok=True)
        with checkpoint.guarded(self.root, state.step):
            if accelerator.is_main_process:
                checkpoint.begin(self.root, state.step)
            accelerator.wait_for_everyone()
            # torch's own format: it stores tied tensors as they are.
            accelerator.save_state(str(folder), safe_serialization=False)
            if accelerator.is_main_process or self._sharded():
                averages = {name: update.ema.state() for name, update in self.updates.items()}
                torch.save(averages, folder / self._ema_name())
            if accelerator.is_main_process:
                about = {"format": FORMAT, "step": state.step, "elapsed": state.elapsed}
                write_json(folder / "state.json", about | {"window": state.window.sums})
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                checkpoint.commit(self.root, state.step, keep=self.config.keep)
        accelerator.wait_for_everyone()

    def _load(self, folder: Path) -> None:
        about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {about['format']}, expected {FORMAT}")
        self.accelerator.load_state(str(folder))
        averages = torch.load(folder / self._ema_name(), map_location="cpu", weights_only=True)
        for name, update in self.updates.items():
            update.ema.load(averages[name])
        self.state = _State(about["step"], about["elapsed"], Window(about["window"]))

    def _sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    def _ema_name(self) -> str:
        return f"ema-{self.accelerator.process_index}.pt" if self._sharded() else "ema.pt"

    def _finish(self) -> None:
        measures = self._evaluate()
        with self._averaged(), torch.no_grad():
            if self._sharded():
                self._export_gathered()
            elif self.accelerator.is_main_process:
                self.task.export(self.networks, self.final)
        if self.accelerator.is_main_process:
            about = {"step": self.state.step, "minutes": self.state.elapsed / 60}
            write_json(self.out / "result.json", about | {"eval": measures})
        self.accelerator.wait_for_everyone()

    def _export_gathered(self) -> None:
        """Shards gathered into fresh networks, on the main process."""
        weights = {n: self.accelerator.get_state_dict(u.module) for n, u in self.updates.items()}
        if self.accelerator.is_main_process:
            networks = self.task.networks()
            for name, state in weights.items():
                mine = {key.removeprefix("network."): value for key, value in state.items()}
                networks[name].load_state_dict(mine)
                networks[name].eval()
            self.task.export(networks, self.final)


def _accelerator(config: RunConfig) -> Accelerator:
    _refuse_lonely_launch()
    # Losses may leave parameters out (dropped tokens, a late head): processes must not wait for them.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        mixed_precision=config.precision,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=config.out,
        kwargs_handlers=[ddp],
    )


def _refuse_lonely_launch() -> None:
    """`accelerate launch --cpu --num_processes 2` sets up a meeting point, but starts one process alone."""
    env = os.environ
    on_cpu = env.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    ranks = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if on_cpu and "MASTER_PORT" in env and not any(name in env for name in ranks):
        raise TrainingError(
            "accelerate launch --cpu starts one process whatever --num_processes says; start several on the CPU with "
            "'ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N -m ...' (or torchrun)"
        )


def _settings(task: Task, config: RunConfig, processes: int) -> dict[str, Any]:
    about = {key: value for key, value in task.config.items() if key != "run"}
    if "data" in about:  # where the data lie is the machine's affair
        about["data"] = {k: v for k, v in about["data"].items() if k != "root"}
    settings = {
        "task": about,
        "run": {k: v for k, v in asdict(config).items() if k not in FREE},
        "processes": processes,
    }
    return json.loads(json.dumps(settings))


def _differences(before: Any, now: Any, place: str = "") -> Iterable[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            inner = f"{place}.{key}" if place else key
            yield from _differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield place, json.dumps(before), json.dumps(now)
