"""Training a vocoder (HiFT: HiFi-GAN's losses, arXiv 2010.05646, with a pitch predictor; CosyVoice's recipe).

    loss = 45 mel + f0  (+ adversarial + 2 feature + relative, once the discriminators begin)

- Discriminators look at periods and at several resolutions of the spectrum (`adversarial`); least squares, and a
  truncated relative loss: what is taken for realer than the real thing by more than the median is pushed back.
- The pitch predictor learns the pitch of `hift_pitch`; the source runs on what it predicts, without gradient.
- "training" may name "tokenizer" and "flow" (what the tasks s3 and flow wrote): then the product is the whole codec.

Config: "model" is a HiFTConfig, "training" has "mel" (a HifiMel) and perhaps the two paths, "loss" is a HiFTLoss,
"data" has "root" and "sets".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...modalities.features import HifiMel, hifi_mel
from ..audio.cosyvoice.codec import MELS, CosyVoice, Networks
from ..audio.cosyvoice.hift import HiFT, HiFTConfig, Noise
from ..audio.cosyvoice.s3 import S3Tokenizer
from ..layers.conv import fuse_weight_norm, train_with_weight_norm
from ..published import KEY, WeightsError, load_into, save_codec, write_safetensors
from ..registry import load_codec
from .adversarial import (
    Discriminators,
    Features,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)
from .data import Sounds, find_rows
from .entry import settings
from .flow import load_flow
from .hift_pitch import pitch
from .task import Task

TRUNCATION = 0.04  # of the relative loss
NAME = "cosyvoice/mini"


@dataclass(frozen=True, kw_only=True)
class HiFTLoss:
    """What is not the vocoder's.

    Args:
        seconds: length of a crop.
        lr: of both sides.
        mel, f0, adversarial, feature, relative: weights of the losses.
        discriminators_from: the step at which discriminators begin; None for never.
        discriminator_width: channels of theirs.
        held: crops that are evaluated.
    """

    seconds: float = 1.0
    lr: float = 2e-4
    mel: float = 45.0
    f0: float = 1.0
    adversarial: float = 1.0
    feature: float = 2.0
    relative: float = 1.0
    discriminators_from: int | None = None
    discriminator_width: int = 32
    held: int = 32


class HiFTTask(Task):
    """Learn a vocoder from recordings."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = dict(config)
        self.model = settings(HiFTConfig, config["model"], "model")
        self.loss = settings(HiFTLoss, config.get("loss", {}), "loss")
        self.training = dict(config.get("training", {}))
        given = self.training.get("mel")
        version = self.model.version
        self.mel = MELS[version] if given is None else settings(HifiMel, given, "training.mel")
        if (self.mel.hop, self.mel.rate) != (self.model.hop, self.model.rate):
            raise ValueError(
                f"training.mel has {self.mel.rate} Hz and hop {self.mel.hop}, the vocoder "
                f"{self.model.rate} Hz and hop {self.model.hop}"
            )
        self.length = (
            max(1, round(self.loss.seconds * self.model.rate / self.model.hop)) * self.model.hop
        )

    def networks(self) -> dict[str, nn.Module]:
        """The vocoder, and discriminators where asked."""
        vocoder = HiFT(self.model)
        train_with_weight_norm(vocoder)
        networks: dict[str, nn.Module] = {"vocoder": vocoder}
        if self.loss.discriminators_from is not None:
            networks["discriminators"] = Discriminators(self.loss.discriminator_width)
        return networks

    def active(self, name: str, step: int) -> bool:
        """Whether a network is updated: discriminators begin late."""
        begin = self.loss.discriminators_from
        return name != "discriminators" or (begin is not None and step >= begin)

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam with betas as HiFi-GAN's."""
        return torch.optim.AdamW(
            parameters, lr=self.loss.lr, betas=(0.8, 0.99), weight_decay=0.0, fused=True
        )

    def dataset(self) -> Sounds:
        """Training crops."""
        return self._sounds("train")

    def losses(
        self,
        name: str,
        networks: Mapping[str, Any],
        batch: Any,
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Losses of the vocoder or of the discriminators for crops [B, 1, L]."""
        vocoder = networks["vocoder"]
        if name == "discriminators":
            with torch.no_grad():
                made, _ = self._vocode(vocoder, batch, rng)
            judge = networks["discriminators"]
            real, fake = judge(batch), judge(made)
            relative = relative_loss(real, fake)
            loss = discriminator_loss(real, fake) + self.loss.relative * relative
            return {"loss": loss, "relative": relative}
        made, f0 = self._vocode(vocoder, batch, rng)
        with torch.autocast(batch.device.type, enabled=False):
            logged = {
                "mel": self._mel_distance(made.float(), batch),
                "f0": (f0.float() - pitch(batch[:, 0], self.model.rate, self.model.hop))
                .abs()
                .mean(),
            }
        loss = self.loss.mel * logged["mel"] + self.loss.f0 * logged["f0"]
        if "discriminators" in networks and self.active("discriminators", step):
            judge = networks["discriminators"]
            with torch.no_grad():
                real = judge(batch)
            fake = judge(made)
            logged |= {
                "adversarial": adversarial_loss(fake),
                "feature": feature_loss(real, fake),
                "relative": relative_loss(fake, real),
            }
            for part in ("adversarial", "feature", "relative"):
                loss = loss + getattr(self.loss, part) * logged[part]
        return {"loss": loss, **logged}

    def evaluate(self, networks: Mapping[str, Any], step: int) -> dict[str, float]:
        """On held-out crops: the mel's L1, pitch error in Hz where voiced, and how often voicing is right."""
        vocoder = networks["vocoder"]
        held = self._sounds("held")
        crops = torch.stack([held[i] for i in range(min(self.loss.held, len(held)))])
        crops = crops.to(vocoder.conv_pre.bias.device)
        made, f0 = self._vocode(vocoder, crops, torch.Generator(crops.device).manual_seed(0))
        wanted = pitch(crops[:, 0], self.model.rate, self.model.hop)
        voiced = wanted > 0
        error = (f0 - wanted).abs()[voiced].mean() if voiced.any() else torch.zeros(())
        return {
            "mel": float(self._mel_distance(made, crops)),
            "f0": float(error),
            "voicing": float(((f0 > 10) == voiced).float().mean()),
        }

    def export(self, networks: Mapping[str, Any], path: Path) -> None:
        """The whole codec where tokenizer and flow are named, else the vocoder with plain weights and its config."""
        vocoder = HiFT(self.model)
        load_into(vocoder, fuse_weight_norm(networks["vocoder"].state_dict()), source="the run")
        if "tokenizer" in self.training and "flow" in self.training:
            codec = assemble(self.training["tokenizer"], self.training["flow"], vocoder)
            about = {"training_data": list(self.config["data"].get("sets", []))}
            name = str(self.config.get("name", NAME))
            save_codec(codec, path, name=name, dtype=torch.float16, about=about)
            return
        header = {"vocoder": dataclasses.asdict(self.model), "mel": dataclasses.asdict(self.mel)}
        tensors = {k: v.detach().cpu().contiguous() for k, v in vocoder.state_dict().items()}
        write_safetensors(tensors, path, {KEY: json.dumps(header)})

    def _vocode(self, vocoder: HiFT, crops: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Crops [B, 1, L] to the mel's samples [B, 1, L] and pitch [B, T]."""
        mel = hifi_mel(crops[:, 0].float(), self.mel)
        size, orders = len(crops), self.model.harmonics + 1
        phase = torch.pi * (2 * torch.rand(size, orders, generator=rng, device=rng.device) - 1)
        phase[:, 0] = 0
        kind = torch.rand if self.model.version == "v3" else torch.randn
        noise = kind(size, crops.shape[-1], orders, generator=rng, device=rng.device)
        f0 = vocoder.pitch(mel)
        source = vocoder.source(f0.detach(), Noise(phase, noise))
        return vocoder.decode(mel, source)[:, None], f0

    def _mel_distance(self, made: Tensor, crops: Tensor) -> Tensor:
        """L1 of log-mels over the whole band."""
        full = dataclasses.replace(self.mel, fmax=None)
        return (hifi_mel(made[:, 0], full) - hifi_mel(crops[:, 0], full)).abs().mean()

    def _sounds(self, split: str) -> Sounds:
        data = self.config["data"]
        root, sets = data.get("root", "data"), data.get("sets", ["."])
        rows = find_rows(root, sets, modality="audio", splits=(split,))
        return Sounds(rows, rate=self.model.rate, length=self.length)


def relative_loss(better: list[Features], worse: list[Features]) -> Tensor:
    """How far `better`'s logits fall behind `worse`'s median lead, up to a limit: a scalar, summed."""
    total = better[0][-1].new_zeros(())
    for a, b in zip(better, worse, strict=True):
        lead = a[-1].float() - b[-1].float()
        behind = lead - lead.median()
        behind = behind[behind < 0]
        if behind.numel():
            total = total + TRUNCATION - (TRUNCATION - behind.square().mean()).relu()
    return total


def assemble(tokenizer: str | Path, flow: str | Path, vocoder: HiFT) -> CosyVoice:
    """One codec of what the three tasks made.

    Raises:
        WeightsError: a file is something else.
    """
    codec = load_codec(tokenizer)
    if not isinstance(codec, S3Tokenizer):
        raise WeightsError(f"{tokenizer} is '{codec.spec.name}', expected an S3 tokenizer")
    speakers, mel = load_flow(flow)
    networks = Networks(codec, speakers.campplus, speakers.flow, vocoder)
    licences = ("Apache-2.0", "Apache-2.0")
    whole = CosyVoice(networks.config(mel), networks=networks, name=NAME, licences=licences)
    return whole.eval()


def task(config: dict) -> Task:
    """The task of a config file."""
    return HiFTTask(config)
