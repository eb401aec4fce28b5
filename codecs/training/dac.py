"""Training a DAC (the losses of arXiv 2306.06546 §3, at the size that a CPU affords).

    loss = 15 mel + 15 stft + 0.25 commitment  (+ 1 adversarial + 2 feature matching, once they begin)

- The untrained network is a transform codec (`lapped_start`), which keeps phase from the first step on.
- Each stage starts from what its inputs look like: a PCA projection of the residual, and the centroids of its
  directions. From then on a row follows the mean of what it codes (a moving average, as in VQ-VAE): in a short run
  the encoder moves faster than gradient steps could carry the codebooks along. Dead rows are replaced by vectors of
  recent batches.
- The published loss has no term that sees phase before the discriminators do. `stft` compares complex spectra, so
  that a few minutes of training give a waveform and not only a spectrogram.
- Quantiser dropout as published: half of a batch keeps a random number of stages.

Config: "model" is a DACConfig, "loss" a DACLoss, "data" has "root" and "sets" (folders of recordings).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..audio.dac import DAC, DACConfig
from ..layers.conv import Snake, fuse_weight_norm, snake, train_with_weight_norm
from ..published import load_into, save_codec
from ..quantizers.rvq import ProjectedVQ, draw_depths
from .adversarial import (
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)
from .data import Sounds, find_rows
from .engine import Task
from .lapped_start import start_as_transform
from .spectral import ComplexSTFT, MultiScaleMel, si_sdr

NAME = "dac/custom"


@dataclass(frozen=True, kw_only=True)
class DACLoss:
    """What is not the model's.

    Args:
        seconds: length of a crop.
        lr: peak rate.
        gain_lr: what it is multiplied with for gains.
        start: "transform" begins as a transform codec, "random" as torch does.
        plain_steps: steps without quantiser, before its stages get their start values.
        dropout: share of a batch that keeps a random number of stages.
        restart_every: steps between restarts of dead rows.
        encoder_lr: what it is multiplied with for the encoder.
        decay: of the codebooks' moving averages.
        mel, stft, commitment: weights of the losses.
        adversarial, feature: weights of the discriminators' losses.
        discriminators_from: the step at which discriminators begin; None for never.
        discriminator_width: channels of theirs.
        compile_snake: compile the activation (needs a C++ compiler on a CPU).
    """

    seconds: float = 0.48
    lr: float = 3e-4
    gain_lr: float = 2.0
    encoder_lr: float = 0.3
    decay: float = 0.98
    start: str = "transform"
    plain_steps: int = 0
    dropout: float = 0.5
    restart_every: int = 50
    mel: float = 15.0
    stft: float = 15.0
    commitment: float = 0.25
    adversarial: float = 1.0
    feature: float = 2.0
    discriminators_from: int | None = None
    discriminator_width: int = 32
    compile_snake: bool = False

    def __post_init__(self):
        if self.start not in ("transform", "random"):
            raise ValueError(f"loss.start is {self.start!r}, expected 'transform' or 'random'")


class Trainee(nn.Module):
    """A DAC with what only its training knows: how often each code is used, and recent inputs of each stage.

    Buffers: `usage` [N, V] and `sums` [N, V, d], moving averages of how often a row is hit in a batch and of the sum of
    what hits it; `recent` [N, R, d].
    """

    def __init__(
        self,
        config: DACConfig,
        *,
        start: str = "transform",
        decay: float = 0.98,
        remembered: int = 4096,
    ):
        super().__init__()
        self.decay = decay
        self.codec = DAC(config)
        if start == "transform":
            start_as_transform(self.codec)
        train_with_weight_norm(self.codec)
        stages, size, dim = config.codebooks, config.codebook_size, config.codebook_dim
        self.register_buffer("usage", torch.full((stages, size), 0.2))
        self.register_buffer("sums", torch.zeros(stages, size, dim))
        for stage, sums in zip(self.codec.quantizer.quantizers, self.sums):
            stage.codebook.weight.requires_grad_(False)
            sums.copy_(stage.codebook.weight)
        self.register_buffer("recent", torch.zeros(stages, remembered, dim))

    def reconstruct(self, x: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
        """x [B, 1, L] through the codec; unquantised where `keep` is None. L a multiple of the hop."""
        z, _ = self.codec.encoder(x)
        if keep is None:
            y, _ = self.codec.decoder(z)
            zero = x.new_zeros(())
            return {"y": _fit(y.float(), x), "commitment": zero}
        with torch.autocast(x.device.type, enabled=False):
            q = self.codec.quantizer(z.float(), keep)
        if self.training and torch.is_grad_enabled():
            self.remember(q.codes, q.latents)
        y, _ = self.codec.decoder(q.z)
        return {"y": _fit(y.float(), x), "commitment": q.commitment}

    @torch.no_grad()
    def remember(self, codes: Tensor, latents: Tensor) -> None:
        """Move the rows to codes [B, N, T] and inputs [B, N·d, T] of a batch, and keep its newest inputs."""
        stages, size = self.usage.shape
        new = latents.detach().unflatten(1, (stages, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        self.recent.copy_(torch.cat([new, self.recent], 1)[:, : self.recent.shape[1]])
        for i, stage in enumerate(self.codec.quantizer.quantizers):
            hit = codes[:, i].flatten()
            counts = torch.bincount(hit, minlength=size).to(self.usage.dtype)
            sums = torch.zeros_like(self.sums[i]).index_add_(0, hit, new[i])
            self.usage[i].lerp_(_summed(counts), 1 - self.decay)
            self.sums[i].lerp_(_summed(sums), 1 - self.decay)
            stage.codebook.weight.copy_(self.sums[i] / self.usage[i, :, None].clamp(min=1e-6))

    @torch.no_grad()
    def start_quantiser(self, x: Tensor, rng: torch.Generator) -> None:
        """Give every stage a projection and a codebook that fit the latents of x [B, 1, L]."""
        z, _ = self.codec.encoder(x)
        residual = z.float()
        for i, stage in enumerate(self.codec.quantizer.quantizers):
            fit_stage(stage, residual, rng)
            residual = residual - stage(residual)[0]
            self.sums[i].copy_(stage.codebook.weight * self.usage[i, :, None])

    @torch.no_grad()
    def restart_dead(self, rng: torch.Generator) -> int:
        """Replace rows that are used less than a tenth of the average by recent inputs; how many."""
        dead = self.usage < 0.1 * self.usage.mean(1, keepdim=True)
        for i, stage in enumerate(self.codec.quantizer.quantizers):
            rows = self.recent[i]
            pick = torch.randint(len(rows), (len(dead[i]),), generator=rng, device=rng.device)
            weight = torch.where(dead[i][:, None], rows[pick], stage.codebook.weight)
            stage.codebook.weight.copy_(_from_first(weight))
            self.usage[i][dead[i]] = self.usage[i].mean()
            self.sums[i].copy_(stage.codebook.weight * self.usage[i, :, None])
        return int(dead.sum())

    def perplexity(self) -> Tensor:
        """How many codes each stage uses, as exp of the entropy: [N]."""
        p = self.usage / self.usage.sum(1, keepdim=True)
        return torch.exp(-(p * torch.log(p + 1e-9)).sum(1))


@torch.no_grad()
def fit_stage(stage: ProjectedVQ, residual: Tensor, rng: torch.Generator, rounds: int = 8) -> None:
    """Start a stage from its inputs [B, D, T]: PCA down and up, and k-means rows.

    The lookup compares directions only. So d - 1 coordinates are principal components and the last one is a
    constant of their size: a vector's length then turns into an angle, and is quantised too.
    """
    flat = residual.transpose(1, 2).flatten(0, 1)
    dim, width = stage.codebook.weight.shape[1], flat.shape[1]
    mean = flat.mean(0)
    _, _, basis = torch.linalg.svd(flat - mean, full_matrices=False)
    basis = basis[: dim - 1]
    points = (flat - mean) @ basis.T
    constant = points.norm(dim=1).mean()
    points = F.pad(points, (0, 1), value=float(constant))
    rows = spherical_kmeans(points, len(stage.codebook.weight), rng, rounds)
    down = F.pad(basis, (0, 0, 0, 1))
    bias = F.pad(-(basis @ mean), (0, 1), value=float(constant))
    _set(stage.in_proj, down[:, :, None] + 1e-4 / width, bias)
    _set(stage.out_proj, down.T[:, :, None] + 1e-6, mean)
    stage.codebook.weight.copy_(_from_first(rows))


def spherical_kmeans(points: Tensor, count: int, rng: torch.Generator, rounds: int) -> Tensor:
    """Centroids [count, d] of points [n, d] grouped by direction."""
    pick = torch.randint(len(points), (count,), generator=rng, device=rng.device)
    rows, directions = points[pick], F.normalize(points)
    for _ in range(rounds):
        nearest = (directions @ F.normalize(rows).T).argmax(1)
        sums = torch.zeros_like(rows).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=count)[:, None]
        spare = torch.randint(len(points), (count,), generator=rng, device=rng.device)
        rows = torch.where(counts > 0, sums / counts.clamp(min=1), points[spare])
    return rows


def vary(crops: Tensor, length: int, rng: torch.Generator) -> Tensor:
    """Crops [B, 1, L'] to varied ones [B, 1, length], L' >= 1.15 · length.

    Sped up or slowed down by up to 15 % (which shifts the pitch: few voices become many), scaled by -12 to 0 dB, and
    turned over half of the time.
    """
    speed, gain, turn = torch.rand(3, len(crops), 1, generator=rng, device=rng.device)
    place = (0.85 + 0.3 * speed) * torch.arange(length, device=crops.device)
    left = place.long()
    between, x = place - left, crops[:, 0]
    right = (left + 1).clamp(max=x.shape[1] - 1)
    x = torch.lerp(x.gather(1, left), x.gather(1, right), between)
    return ((turn < 0.5) * 2.0 - 1.0)[:, None] * 10 ** (-0.6 * gain)[:, None] * x[:, None]


def compile_snake(network: nn.Module) -> None:
    """Compile the activation for training; evaluation keeps the eager one, which needs no second compilation."""
    compiled = torch.compile(snake, dynamic=True)

    def function(x: Tensor, alpha: Tensor) -> Tensor:
        return compiled(x, alpha) if torch.is_grad_enabled() else snake(x, alpha)

    for layer in network.modules():
        if isinstance(layer, Snake):
            layer.function = function


class DACTask(Task):
    """Learn a DAC from recordings."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = dict(config)
        self.model = DACConfig(**config["model"])
        self.loss = DACLoss(**config.get("loss", {}))
        hop = self.model.hop
        self.length = max(1, round(self.loss.seconds * self.model.sample_rate / hop)) * hop
        self._held: Tensor | None = None

    def networks(self) -> dict[str, nn.Module]:
        """The trainee, and the filter banks of the losses, which learn nothing."""
        trainee = Trainee(self.model, start=self.loss.start, decay=self.loss.decay)
        self._slow = {id(p) for p in trainee.codec.encoder.parameters()}
        if self.loss.compile_snake:
            compile_snake(trainee)
        spectral = nn.ModuleDict(
            {"mel": MultiScaleMel(self.model.sample_rate), "stft": ComplexSTFT()}
        )
        networks = {"codec": trainee, "spectral": spectral}
        if self.loss.discriminators_from is not None:
            networks["discriminators"] = Discriminators(self.loss.discriminator_width)
        return networks

    def active(self, name: str, step: int) -> bool:
        """Whether a network is updated: discriminators begin late."""
        begin = self.loss.discriminators_from
        return name != "discriminators" or (begin is not None and step >= begin)

    def optimizer(self, name: str, parameters) -> torch.optim.Optimizer:
        """Adam with betas as published; gains (weight-norm magnitudes, activations, biases) at a higher rate.

        The transform that training starts from rests on few large weights, which small steps of many small ones
        would drown; what begins quiet has to grow all the same.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for p in parameters:
            rate = self.loss.gain_lr if p.numel() == max(p.shape) else 1.0
            rate *= self.loss.encoder_lr if name == "codec" and id(p) in self._slow else 1.0
            groups.setdefault(rate * self.loss.lr, []).append(p)
        table = [{"params": members, "lr": lr} for lr, members in groups.items()]
        return torch.optim.AdamW(table, betas=(0.8, 0.99), weight_decay=0.0, fused=True)

    def dataset(self) -> Sounds:
        """Training crops."""
        self._train = self._sounds("train", round(1.2 * self.length))
        return self._train

    def augment(self, batch, rng) -> Tensor:
        """Crops of one length, varied."""
        return vary(batch, self.length, rng)

    def losses(self, name, networks, batch, step, rng) -> dict[str, Tensor]:
        """Losses of the codec or of the discriminators for crops [B, 1, L]."""
        if name == "discriminators":
            return self._discriminate(networks, batch, rng)
        trainee, weights = networks["codec"], self.loss
        plain = step < weights.plain_steps
        logged = {}
        if step == weights.plain_steps:
            many = torch.cat([batch, *self._more(len(batch), rng, batch)])
            trainee.start_quantiser(many, rng)
        if not plain and step > weights.plain_steps and step % weights.restart_every == 0:
            logged["restarted"] = torch.tensor(float(trainee.restart_dead(rng)))
        out = trainee.reconstruct(batch, None if plain else self._keep(len(batch), rng))
        with torch.autocast(batch.device.type, enabled=False):
            mel = networks["spectral"]["mel"](out["y"], batch)
            stft = networks["spectral"]["stft"](out["y"], batch)
        loss = weights.mel * mel + weights.stft * stft
        loss = loss + weights.commitment * out["commitment"]
        logged["commitment"] = out["commitment"]
        if "discriminators" in networks and self.active("discriminators", step):
            judge = networks["discriminators"]
            with torch.no_grad():
                real = judge(batch)
            fake = judge(out["y"])
            logged |= {"adversarial": adversarial_loss(fake), "feature": feature_loss(real, fake)}
            loss = loss + weights.adversarial * logged["adversarial"]
            loss = loss + weights.feature * logged["feature"]
        return {"loss": loss, "mel": mel, "stft": stft, **logged}

    def evaluate(self, networks, step) -> dict[str, float]:
        """Mel distance and SI-SDR on held-out recordings at every depth, and the use of the codebooks."""
        trainee, mel = networks["codec"], networks["spectral"]["mel"]
        x = self._held_out().to(trainee.codec.device)
        measures = {}
        stages = self.model.codebooks
        depths = [None] if step < self.loss.plain_steps else range(1, stages + 1)
        for depth in depths:
            keep = None if depth is None else torch.full((len(x),), depth, device=x.device)
            y = trainee.reconstruct(x, keep)["y"]
            label = "plain" if depth is None else f"depth{depth}"
            measures[f"mel/{label}"] = float(mel(y, x))
            measures[f"sisdr/{label}"] = float(si_sdr(y, x).mean())
        for i, used in enumerate(trainee.perplexity().tolist()):
            measures[f"perplexity/{i}"] = used
        return measures

    def export(self, networks, path) -> None:
        """The codec with plain weights, in fp16."""
        name = self.config.get("name", NAME)
        codec = DAC(self.model, name=name, licences=("Apache-2.0", "Apache-2.0"))
        tensors = fuse_weight_norm(networks["codec"].codec.state_dict())
        load_into(codec, {k: v.cpu() for k, v in tensors.items()}, source="the trained codec")
        about = {"trained_on": list(self.config["data"]["sets"]), "loss": asdict(self.loss)}
        save_codec(codec, path, name=name, dtype=torch.float16, about=about)

    def _sounds(self, split: str, length: int, limit: int | None = None) -> Sounds:
        data = self.config["data"]
        rows = find_rows(data["root"], data["sets"], modality="audio", splits=(split,))
        rows = rows[:: max(1, len(rows) // limit)][:limit] if limit else rows
        return Sounds(rows, rate=self.model.sample_rate, length=length)

    def _held_out(self) -> Tensor:
        """The first seconds of held-out recordings: [n, 1, L]."""
        if self._held is None:
            sounds = self._sounds("held", 4 * self.length, limit=8)
            first = [i for i, (_, start) in enumerate(sounds.pieces) if start == 0]
            self._held = torch.stack([sounds[i] for i in first])
        return self._held

    def _discriminate(self, networks, batch: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        trainee, judge = networks["codec"], networks["discriminators"]
        with torch.no_grad():
            fake = trainee.reconstruct(batch, self._keep(len(batch), rng))["y"]
        return {"loss": discriminator_loss(judge(batch), judge(fake))}

    def _keep(self, batch: int, rng: torch.Generator) -> Tensor:
        return draw_depths(batch, self.model.codebooks, self.loss.dropout, rng)

    def _more(self, batch: int, rng: torch.Generator, like: Tensor) -> list[Tensor]:
        """More training crops, enough to start the codebooks from."""
        frames = self.length // self.model.hop
        count = 6 * self.model.codebook_size // (batch * frames)
        pick = torch.randint(len(self._train), (count * batch,), generator=rng, device=rng.device)
        crops = torch.stack([self._train[int(i)] for i in pick]).to(like)
        return list(vary(crops, self.length, rng).split(batch))


def _fit(y: Tensor, x: Tensor) -> Tensor:
    """Decoded samples with zeros for those that an odd stride loses."""
    return F.pad(y, (0, x.shape[-1] - y.shape[-1]))


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Give a convolution, weight-normed or not, a weight and a bias."""
    if parametrize.is_parametrized(layer, "weight"):
        layer.weight = weight
    else:
        layer.weight.copy_(weight)  # type: ignore[operator]
    layer.bias.copy_(bias)  # type: ignore[operator]


def _summed(counts: Tensor) -> Tensor:
    """The mean over processes."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
        counts = counts / dist.get_world_size()
    return counts


def _from_first(tensor: Tensor) -> Tensor:
    """The first process's value, on every process: what is drawn from a batch must not differ between them."""
    tensor = tensor.contiguous()
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def task(config: Mapping[str, Any]) -> Task:
    """The task of a config file."""
    return DACTask(config)
