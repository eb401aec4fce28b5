"""Training rvq/mini: bases and tables are fitted once, then the decoder learns.

    loss = mel + stft (+ adversarial + feature, once the discriminators begin)

- `initialise` takes principal components of loudness and shape, and fits the tables stage after stage with k-means.
- Half of a batch keeps a random number of codes (quantiser dropout, as DAC does), so every depth decodes.
- `mel` is DAC's multi-scale mel distance; `stft` compares complex spectra, which keeps the phase that the codes carry.

Config: "model" is an RVQMiniConfig, "loss" an RVQMiniLoss, "data" has "root" and "sets" (folders of recordings).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..audio.rvq_mini import RVQMini, RVQMiniConfig
from ..published import load_into, save_codec
from ..quantizers.rvq import draw_depths
from ..quantizers.table import kmeans, nearest
from .adversarial import Discriminators, adversarial_loss, discriminator_loss, feature_loss
from .dac import vary
from .data import Sounds, find_rows
from .engine import Task, adamw
from .entry import settings
from .spectral import ComplexSTFT, MultiScaleMel, si_sdr


@dataclass(frozen=True, kw_only=True)
class RVQMiniLoss:
    """What is not the model's.

    Args:
        seconds: length of a crop.
        lr, discriminator_lr: peak rates.
        dropout: share of a batch that keeps a random number of codes.
        search: paths of the encoder's search while training; fewer are faster, and miss a little more.
        mel, stft, adversarial, feature: weights of the losses.
        discriminators_from: the step at which discriminators begin; None for never.
        discriminator_width: channels of theirs.
        crops: crops that bases and tables are fitted to.
        rounds: of k-means for each table.
    """

    seconds: float = 0.96
    lr: float = 1e-3
    discriminator_lr: float = 2e-4
    dropout: float = 0.5
    search: int = 1
    mel: float = 1.0
    stft: float = 1.0
    adversarial: float = 0.05
    feature: float = 0.1
    discriminators_from: int | None = None
    discriminator_width: int = 8
    crops: int = 3200
    rounds: int = 8


@torch.no_grad()
def fit(codec: RVQMini, crops: Tensor, rng: torch.Generator, rounds: int) -> None:
    """Bases and tables from crops [n, 1, L]."""
    s, latents = codec.config.subframes, codec.latents
    parts = [codec.analyse(x[:, 0]) for x in crops.split(64)]
    loudness, shape = (torch.cat(part) for part in zip(*parts))
    flat = rearrange(loudness, "b m (t s) -> (b t) (s m)", s=s)
    latents.mean.copy_(_half(flat.mean(0)))
    latents.loudness.copy_(_half(principal(flat - flat.mean(0), codec.config.loudness_width)))
    flat = rearrange(shape, "b k (t s) -> (b t) (s k)", s=s)
    latents.shape.copy_(_half(principal(flat, codec.config.shape_width)))
    residual = rearrange(latents.join(loudness, shape), "b d t -> (b t) d").contiguous()
    for i in range(codec.config.codebooks):
        codec.tables.store(kmeans(residual, codec.config.codebook_size, rng, rounds), i)
        table = codec.tables(i)
        residual = residual - table[nearest(residual, table)]


def principal(x: Tensor, width: int) -> Tensor:
    """The directions [d, width] in which x [n, d] is largest."""
    return torch.linalg.eigh(x.T @ x / len(x)).eigenvectors.flip(1)[:, :width]


def colour(crops: Tensor, rng: torch.Generator) -> Tensor:
    """Crops [B, 1, L] through random microphones: gains of about 5 dB in 8 bands, half of them after noise.

    Synthetic voices are spoken by few mouths into digital silence. Recorded ones are not: noise has -75 to -45 dB.
    """
    level, noisy = torch.rand(2, len(crops), 1, 1, generator=rng, device=rng.device)
    noise = torch.randn(crops.shape, generator=rng, device=rng.device)
    gains = 0.6 * torch.randn(len(crops), 1, 8, generator=rng, device=rng.device)
    spectrum = torch.fft.rfft(crops + (noisy < 0.5) * 10 ** (-3.75 + 1.5 * level) * noise)
    gains = F.interpolate(gains, size=spectrum.shape[-1], mode="linear", align_corners=True)
    x = torch.fft.irfft(spectrum * gains.exp(), n=crops.shape[-1])
    return x / x.abs().amax(-1, keepdim=True).clamp(min=1.0)


class RVQMiniTask(Task):
    """Learn rvq/mini from recordings."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = dict(config)
        self.model = settings(RVQMiniConfig, config.get("model", {}), "model")
        self.loss = settings(RVQMiniLoss, config.get("loss", {}), "loss")
        hop = self.model.hop
        self.length = max(1, round(self.loss.seconds * self.model.sample_rate / hop)) * hop
        self._held: Tensor | None = None

    def networks(self) -> dict[str, nn.Module]:
        """The codec, and the filter banks of the losses, which learn nothing."""
        banks = {"mel": MultiScaleMel(self.model.sample_rate), "stft": ComplexSTFT()}
        networks = {"codec": RVQMini(self.model), "spectral": nn.ModuleDict(banks)}
        if self.loss.discriminators_from is not None:
            networks["discriminators"] = Discriminators(self.loss.discriminator_width)
        return networks

    def active(self, name: str, step: int) -> bool:
        """Whether a network is updated: discriminators begin late."""
        begin = self.loss.discriminators_from
        return name != "discriminators" or (begin is not None and step >= begin)

    def optimizer(self, name: str, parameters) -> torch.optim.Optimizer:
        """AdamW."""
        lr = self.loss.lr if name == "codec" else self.loss.discriminator_lr
        return adamw(parameters, lr=lr, betas=(0.8, 0.98), weight_decay=0.01)

    def dataset(self) -> Sounds:
        """Training crops."""
        return self._sounds("train", round(1.2 * self.length))

    def initialise(self, networks, dataset) -> None:
        """Bases and tables from crops drawn from all of the data."""
        rng = torch.Generator().manual_seed(0)
        pick = torch.randint(len(dataset), (self.loss.crops,), generator=rng)
        crops = torch.stack([dataset.draw(int(i), rng) for i in pick])
        fit(networks["codec"], self.augment(crops, rng), rng, self.loss.rounds)

    def augment(self, batch, rng) -> Tensor:
        """Crops of one length, varied."""
        return colour(vary(batch, self.length, rng), rng)

    def losses(self, name, networks, batch, step, rng) -> dict[str, Tensor]:
        """Losses of the codec or of the discriminators for crops [B, 1, L]."""
        codec, weights = networks["codec"], self.loss
        if name == "discriminators":
            with torch.no_grad():
                fake = self._reconstruct(codec, batch, rng)
            judge = networks[name]
            return {"loss": discriminator_loss(judge(batch), judge(fake))}
        y = self._reconstruct(codec, batch, rng)
        mel = networks["spectral"]["mel"](y, batch)
        stft = networks["spectral"]["stft"](y, batch)
        loss, logged = weights.mel * mel + weights.stft * stft, {}
        if "discriminators" in networks and self.active("discriminators", step):
            judge = networks["discriminators"]
            with torch.no_grad():
                real = judge(batch)
            fake = judge(y)
            logged = {"adversarial": adversarial_loss(fake), "feature": feature_loss(real, fake)}
            loss = loss + weights.adversarial * logged["adversarial"]
            loss = loss + weights.feature * logged["feature"]
        return {"loss": loss, "mel": mel, "stft": stft, **logged}

    def evaluate(self, networks, step) -> dict[str, float]:
        """Mel distance and SI-SDR on held-out recordings at some depths."""
        codec, mel = networks["codec"], networks["spectral"]["mel"]
        x = self._held_out().to(codec.latents.mean.device)
        codes = codec.quantise(codec.encode_latents(x), self.model.codebooks)
        measures = {}
        for depth in sorted(
            {1, self.model.codebooks // 3, 2 * self.model.codebooks // 3, self.model.codebooks}
            - {0}
        ):
            z = codec.dequantise(codes[:, :depth])
            y = codec.synthesise(z, torch.full((len(x),), depth, device=x.device))
            measures[f"mel/{depth}"] = float(mel(y, x))
            measures[f"sisdr/{depth}"] = float(si_sdr(y, x).mean())
        return measures

    def export(self, networks, path) -> None:
        """The codec in fp16, its tables in int8."""
        codec = RVQMini(self.model)
        tensors = {k: v.cpu() for k, v in networks["codec"].state_dict().items()}
        load_into(codec, tensors, source="the trained codec")
        about = {"trained_on": list(self.config["data"]["sets"]), "loss": asdict(self.loss)}
        save_codec(codec, path, name=self.config.get("name"), dtype=torch.float16, about=about)

    def _reconstruct(self, codec: RVQMini, batch: Tensor, rng: torch.Generator) -> Tensor:
        """Crops [B, 1, L] through random numbers of codes."""
        n = self.model.codebooks
        keep = draw_depths(len(batch), n, self.loss.dropout, rng).clamp(max=n)
        with torch.no_grad():
            codes = codec.quantise(codec.encode_latents(batch), n, search=self.loss.search)
            z = codec.dequantise(codes, keep)
        return codec.synthesise(z, keep)

    def _sounds(self, split: str, length: int, limit: int | None = None) -> Sounds:
        data = self.config["data"]
        rows = find_rows(data["root"], data["sets"], modality="audio", splits=(split,))
        rows = rows[:: max(1, len(rows) // limit)][:limit] if limit else rows
        return Sounds(rows, rate=self.model.sample_rate, length=length)

    def _held_out(self) -> Tensor:
        """The first seconds of held-out recordings: [n, 1, L]."""
        if self._held is None:
            sounds = self._sounds("held", 2 * self.length, limit=24)
            first = [i for i, (_, start) in enumerate(sounds.pieces) if start == 0]
            self._held = torch.stack([sounds[i] for i in first])
        return self._held


def _half(x: Tensor) -> Tensor:
    """As fp16 stores it, so that saving moves no code."""
    return x.half().float()


def task(config: Mapping[str, Any]) -> Task:
    """The task of a config file."""
    return RVQMiniTask(config)
