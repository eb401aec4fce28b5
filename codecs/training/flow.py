"""Training a flow: tokens and a voice to mels (CosyVoice, arXiv 2407.05407 §2.3; CosyVoice 2, arXiv 2412.10117 §2.4).

    y = (1 - (1 - σ) t) z + t x      u = x - (1 - σ) z      loss = |velocity(y, t) - u|²

- t is uniform, z normal. Tokens, speaker and prompt are dropped together for a fifth of the items, which gives the
  guidance its other side; half of the items see a beginning of their own mel, up to 30 %, as prompt.
- v2 and v3 see half of the batches in chunks, so that one network streams and does not.
- The speaker's vector comes from a CAM++ that learns along, from a second of the utterance (`speaker` says its size);
  with "campplus" in "training" a published one stays as it is.
- Tokens are made once, by the tokenizer that "training" names.

Config: "model" is a FlowConfig, "training" names "tokenizer" (a saved codec) and perhaps "campplus", "loss" is a
FlowLoss, "data" has "root" and "sets".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...modalities.audio import Audio
from ...modalities.features import HifiMel, KaldiFbank, hifi_mel, kaldi_fbank
from ..audio.cosyvoice.campplus import CAMPPlus, CAMPPlusConfig, load_campplus
from ..audio.cosyvoice.codec import MELS
from ..audio.cosyvoice.flow import CHUNK, FlowConfig, StretchingFlow, make_flow
from ..audio.cosyvoice.s3 import S3Tokenizer
from ..audio.cosyvoice.voice import Voice
from ..audio.waveform import AudioOptions, rows_of
from ..published import KEY, WeightsError, load_into, read_weights, write_safetensors
from ..registry import load_codec
from .data import Prepared, Row, find_rows
from .entry import settings
from .task import Task, adamw

SIGMA = 1e-6  # what is left of the noise at the end
FBANK_RATE = 16_000


@dataclass(frozen=True, kw_only=True)
class FlowLoss:
    """What is not the flow's.

    Args:
        lr: peak rate.
        drop: share of items without conditions.
        prompt: share of items with a prompt.
        longest: of a prompt, as a share of the mel.
        chunked: share of batches in chunks (v2, v3).
        speaker_frames: 10 ms frames of which the speaker's vector is made.
        frames: longer utterances are cut to so many mel frames.
        held: utterances that are evaluated.
    """

    lr: float = 5e-4
    drop: float = 0.2
    prompt: float = 0.5
    longest: float = 0.3
    chunked: float = 0.5
    speaker_frames: int = 100
    frames: int = 300
    held: int = 32


class Spoken(NamedTuple):
    """A batch: ids [B, T'] with n [B], mels [B, T, M] with t [B], speaker features [B, S, F]."""

    ids: Tensor
    n: Tensor
    mels: Tensor
    t: Tensor
    features: Tensor

    def to(self, device: torch.device) -> Spoken:
        """All tensors on a device."""
        return Spoken(*(x.to(device) for x in self))


class Speakers(nn.Module):
    """A flow and the speaker encoder that learns with it."""

    def __init__(self, config: FlowConfig, speaker: CAMPPlus, *, learns: bool):
        super().__init__()
        self.flow, self.campplus = make_flow(config), speaker
        speaker.requires_grad_(learns)

    def means(self, batch: Spoken, chunk: int) -> Tensor:
        """What the tokens say, at the mel's rate: [B, T, M]."""
        mu, _ = self.flow.encode(batch.ids, batch.n, chunk=chunk)
        if isinstance(self.flow, StretchingFlow):
            pairs = zip(mu, batch.n.tolist(), batch.t.tolist())
            rows = [self.flow.stretch(row[:n], t) for row, n, t in pairs]
            return pad_sequence(rows, batch_first=True)
        return mu[:, : batch.mels.shape[1]]


class FlowTask(Task):
    """Learn a flow from recordings."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = dict(config)
        self.model = settings(FlowConfig, config["model"], "model")
        self.loss = settings(FlowLoss, config.get("loss", {}), "loss")
        self.training = dict(config["training"])
        self.mel = (
            settings(HifiMel, self.training["mel"], "training.mel")
            if "mel" in self.training
            else MELS[self.model.version]
        )
        self.size = settings(CAMPPlusConfig, self.training.get("speaker", {}), "training.speaker")
        self._tokenizer: S3Tokenizer | None = None
        self._held: Spoken | None = None

    def networks(self) -> dict[str, nn.Module]:
        """The flow with its speaker encoder."""
        path = self.training.get("campplus")
        speaker = CAMPPlus(self.size) if path is None else load_campplus(path)
        self.size = speaker.config
        return {"speakers": Speakers(self.model, speaker, learns=path is None)}

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW."""
        return adamw(parameters, lr=self.loss.lr, betas=(0.9, 0.98))

    def dataset(self) -> Prepared:
        """Utterances of the training split."""
        return Prepared(self._rows("train"), self._prepare)

    def collate(self, samples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Spoken:
        """Utterances of unequal length."""
        ids, mels, features = zip(*samples)
        return Spoken(
            pad_sequence(list(ids), batch_first=True),
            torch.tensor([len(row) for row in ids]),
            pad_sequence([mel.float() for mel in mels], batch_first=True),
            torch.tensor([len(mel) for mel in mels]),
            torch.stack([row.float() for row in features]),
        )

    def losses(
        self,
        name: str,
        networks: Mapping[str, Any],
        batch: Any,
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """The velocity's squared error."""
        batch, net = Spoken(*batch), networks["speakers"]
        count, device = len(batch.ids), rng.device
        draws = torch.rand(4, count, generator=rng, device=device)
        time, z = draws[0], torch.randn(batch.mels.shape, generator=rng, device=device)
        chunk = CHUNK if self.model.causal and float(draws[1, 0]) < self.loss.chunked else 0
        length = (draws[2] * self.loss.longest * batch.t) * (draws[3] < self.loss.prompt)
        place = torch.arange(batch.mels.shape[1], device=device)
        prompt = batch.mels * (place < length[:, None].floor())[..., None]
        kept = torch.rand(count, generator=rng, device=device) >= self.loss.drop
        return {"loss": self._error(net, batch, time, z, prompt, kept, chunk)}

    def evaluate(self, networks: Mapping[str, Any], step: int) -> dict[str, float]:
        """On held-out utterances: the loss at even times, and the L1 of whole mels made in ten steps."""
        net = networks["speakers"]
        batch = self._held_out().to(net.flow.input_embedding.weight.device)
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(batch.mels.shape, generator=rng).to(batch.mels)
        time = (torch.arange(len(z), device=z.device) + 0.5) / len(z)
        nothing, all_kept = torch.zeros_like(batch.mels), torch.ones_like(time, dtype=torch.bool)
        loss = self._error(net, batch, time, z, nothing, all_kept, 0)
        vectors = net.campplus(batch.features).cpu()
        ids = [row[:n].cpu() for row, n in zip(batch.ids, batch.n.tolist())][:8]
        voices = [Voice(embedding=v) for v in vectors[: len(ids)]]
        table = net.flow.noise_table(rng)
        made = net.flow.generate(ids, voices, [table] * len(ids))
        distances = [
            float((mel.T[:t] - target[:t]).abs().mean())
            for mel, target, t in zip(made, batch.mels, batch.t.tolist())
        ]
        return {"loss": float(loss), "mel": sum(distances) / len(distances)}

    def export(self, networks: Mapping[str, Any], path: Path) -> None:
        """Flow and speaker encoder with their configs; `load_flow` reads them."""
        net = networks["speakers"]
        header = {
            "flow": dataclasses.asdict(self.model),
            "speaker": dataclasses.asdict(net.campplus.config),
            "mel": dataclasses.asdict(self.mel),
        }
        tensors = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
        write_safetensors(tensors, path, {KEY: json.dumps(header)})

    def _error(
        self,
        net: Speakers,
        batch: Spoken,
        time: Tensor,
        z: Tensor,
        prompt: Tensor,
        kept: Tensor,
        chunk: int,
    ) -> Tensor:
        """The mean squared error of velocities at times [B] from noise z [B, T, M]."""
        keep = kept.to(z.dtype)[:, None]
        mu = net.means(batch, chunk) * keep[..., None]
        speaker = net.flow.speaker(net.campplus(batch.features)) * keep
        share = time[:, None, None]
        noisy = (1 - (1 - SIGMA) * share) * z + share * batch.mels
        frames = net.flow.frames(chunk)
        v = net.flow.velocity(
            noisy, mu, speaker, prompt * keep[..., None], time, batch.t, chunk=frames
        )
        wanted = batch.mels - (1 - SIGMA) * z
        inside = torch.arange(z.shape[1], device=z.device) < batch.t[:, None]
        return (v.float() - wanted).square().mean(-1)[inside].mean()

    def _prepare(self, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [T'], mel [T, M] in float16, speaker features [S, F] in float16."""
        audio = Audio.load(row["audio"])
        with torch.no_grad():
            ids = self._codec().encode([audio])[0].codes[:, 0]
        (samples,) = rows_of(audio, self.mel.rate, AudioOptions())
        mel = hifi_mel(samples, self.mel).T
        if self.model.causal:
            count = min(len(ids), len(mel) // 2, self.loss.frames // 2)
            ids, mel = ids[:count], mel[: 2 * count]
        (samples,) = rows_of(audio, FBANK_RATE, AudioOptions())
        bank = KaldiFbank(n_mels=self.size.bands, subtract_mean=True)
        features = kaldi_fbank(F.pad(samples, (0, max(0, 720 - len(samples)))), bank)
        times = -(-self.loss.speaker_frames // len(features))
        features = features.repeat(times, 1)[: self.loss.speaker_frames]
        return ids, mel.half(), features.half()

    def _codec(self) -> S3Tokenizer:
        if self._tokenizer is None:
            codec = load_codec(self.training["tokenizer"])
            if not isinstance(codec, S3Tokenizer) or codec.config.codes != self.model.vocab:
                raise WeightsError(
                    f"{self.training['tokenizer']} is '{codec.spec.name}', expected an S3 tokenizer of "
                    f"{self.model.vocab} tokens"
                )
            self._tokenizer = codec
        return self._tokenizer

    def _rows(self, split: str) -> list[Row]:
        data = self.config["data"]
        root, sets = data.get("root", "data"), data.get("sets", ["."])
        return find_rows(root, sets, modality="audio", splits=(split,))

    def _held_out(self) -> Spoken:
        if self._held is None:
            rows = self._rows("held")[: self.loss.held]
            self._held = self.collate([self._prepare(row) for row in rows])
        return self._held


def load_flow(path: str | Path) -> tuple[Speakers, HifiMel]:
    """What `FlowTask.export` wrote: flow and speaker encoder, and their mel."""
    weights = read_weights(path)
    if not {"flow", "speaker", "mel"} <= set(weights.config):
        raise WeightsError(f"{path}: not a flow that anytok trained")
    header = weights.config
    speaker = CAMPPlus(settings(CAMPPlusConfig, header["speaker"], "speaker"))
    net = Speakers(settings(FlowConfig, header["flow"], "flow"), speaker, learns=False)
    load_into(net, weights.tensors, source=str(path))
    return net.eval(), settings(HifiMel, header["mel"], "mel")


def task(config: dict) -> Task:
    """The task of a config file."""
    return FlowTask(config)
