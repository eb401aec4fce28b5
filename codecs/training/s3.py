"""Training a supervised semantic tokenizer (CosyVoice, arXiv 2407.05407 §2.1; CosyVoice 2, arXiv 2412.10117 §2.1).

A speech recogniser with a quantiser in its middle: what its second half needs to write the words down has to pass
through the tokens.

    log-mel ─ S3 encoder ─▶ FSQ ─▶ ids          kept: the codec
                             └─ up, blocks, letters ─▶ CTC          thrown away

- The published tokenizers are cut out of SenseVoice and trained on with its losses; here all is trained at once, on
  letters, with CTC, for versions v2 and v3 (FSQ). A utterance that has more letters than tokens gives no gradient.
- `target` "mel" is the ablation without words: the same net, the same tokens, and mel frames in place of letters.
- Logged: the share of letters that CTC can place, and how many different tokens a batch uses.

Config: "model" is an S3Config, "loss" an S3Loss, "data" has "root" and "sets" (recordings with their text).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...modalities.audio import Audio
from ...modalities.features import WhisperMel, whisper_mel
from ..audio.cosyvoice.s3 import RATE, SHORTEST, Block, S3Config, S3Tokenizer, rotary
from ..audio.waveform import AudioOptions, rows_of
from ..published import save_codec
from .data import Prepared, Row, find_rows
from .entry import settings
from .task import Task, adamw

LETTERS = " abcdefghijklmnopqrstuvwxyz0123456789'"
BLANK = 0  # CTC's; letter i has the class i + 1
NAME = "cosyvoice/s3-mini"


@dataclass(frozen=True, kw_only=True)
class S3Loss:
    """What is not the tokenizer's.

    Args:
        target: "text" for letters, "mel" for the ablation.
        upper_layers: blocks after the quantiser.
        lr: peak rate.
        mask_bands, mask_frames: the widest masks over mel bands and frames (SpecAugment, arXiv 1904.08779).
        held: utterances that are evaluated.
    """

    target: str = "text"
    upper_layers: int = 2
    lr: float = 1e-3
    mask_bands: int = 12
    mask_frames: int = 20
    held: int = 64

    def __post_init__(self):
        if self.target not in ("text", "mel"):
            raise ValueError(f"target is {self.target!r}, expected 'text' or 'mel'")


class Utterances(NamedTuple):
    """A batch: log-mels [B, M, T] with n [B] frames; letters [sum] in a row with their counts [B]."""

    mels: Tensor
    n: Tensor
    letters: Tensor
    counts: Tensor

    def to(self, device: torch.device) -> Utterances:
        """All tensors on a device."""
        return Utterances(*(t.to(device) for t in self))


class Recogniser(nn.Module):
    """An S3 tokenizer and what is trained with it."""

    def __init__(self, config: S3Config, upper_layers: int, classes: int):
        super().__init__()
        if config.version == "v1":
            raise ValueError("version is 'v1', expected 'v2' or 'v3': only FSQ is trained here")
        self.codec = S3Tokenizer(config, name=NAME, licences=("Apache-2.0", "Apache-2.0"))
        self.up = nn.Linear(config.digits, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(upper_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, classes)

    def forward(self, mels: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-mels [B, M, T], of which n [B] frames count, to outputs [B, T', classes], ids [B, T'], lengths [B]."""
        hidden, n = self.codec.encoder(mels, n)
        quantiser = self.codec.quantizer
        codes = quantiser.rounding(quantiser.project(hidden))
        x = self.up(codes.vectors.to(hidden.dtype))
        beyond = torch.arange(x.shape[1], device=x.device) >= n[:, None]
        rotation = rotary(x.shape[1], self.codec.encoder.head_width, x)
        for block in self.blocks:
            x = block(x, beyond, rotation)
        return self.head(self.norm(x)), codes.ids, n


class S3Task(Task):
    """Learn an S3 tokenizer from recordings and their words."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = dict(config)
        self.model = settings(S3Config, config["model"], "model")
        self.loss = settings(S3Loss, config.get("loss", {}), "loss")
        self.frames = 100 // self.model.rate  # mel frames a token
        self._held: Utterances | None = None

    def networks(self) -> dict[str, nn.Module]:
        """The recogniser."""
        letters = self.loss.target == "text"
        classes = len(LETTERS) + 1 if letters else self.frames * self.model.mels
        return {"recogniser": Recogniser(self.model, self.loss.upper_layers, classes)}

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW."""
        return adamw(parameters, lr=self.loss.lr, betas=(0.9, 0.98))

    def dataset(self) -> Prepared:
        """Utterances of the training split."""
        return Prepared(self._rows("train"), self._prepare)

    def collate(self, samples: Sequence[tuple[Tensor, Tensor]]) -> Utterances:
        """Utterances of unequal length."""
        mels, letters = zip(*samples)
        return Utterances(
            pad_sequence([mel.float().T for mel in mels], batch_first=True).mT,
            torch.tensor([mel.shape[1] for mel in mels]),
            torch.cat(letters),
            torch.tensor([len(row) for row in letters]),
        )

    def augment(self, batch: Utterances, rng: torch.Generator) -> Utterances:
        """Masked mels, where letters are the target; a masked mel cannot be reconstructed."""
        if self.loss.target == "mel":
            return batch
        _, bands, frames = batch.mels.shape
        widest = (min(self.loss.mask_bands, bands), min(self.loss.mask_frames, frames))
        masked = batch.mels
        for axis, size, most in ((1, bands, widest[0]), (2, frames, widest[1])):
            hidden = spans(len(masked), size, most, rng)
            masked = masked.masked_fill(hidden[:, :, None] if axis == 1 else hidden[:, None], 0)
        return batch._replace(mels=masked)

    def losses(
        self,
        name: str,
        networks: Mapping[str, Any],
        batch: Any,
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """CTC (or the mel's L1), and what the batch uses of the codebook."""
        batch = Utterances(*batch)
        out, ids, n = networks["recogniser"](batch.mels, batch.n)
        inside = torch.arange(ids.shape[1], device=ids.device) < n[:, None]
        used = ids[inside].unique().numel() / min(self.model.codes, int(inside.sum()))
        logged = {"used": out.new_tensor(used)}
        if self.loss.target == "mel":
            return {"loss": self._mel_loss(out.float(), batch), **logged}
        fits = (batch.counts <= n).float().mean()
        return {"loss": ctc(out.float(), n, batch), "fits": fits, **logged}

    def evaluate(self, networks: Mapping[str, Any], step: int) -> dict[str, float]:
        """On held-out utterances: letter error rate (or the mel's L1), different tokens, their perplexity."""
        net = networks["recogniser"]
        batch = self._held_out().to(net.codec.device)
        out, ids, n = net(batch.mels, batch.n)
        inside = torch.arange(ids.shape[1], device=ids.device) < n[:, None]
        share = torch.bincount(ids[inside], minlength=self.model.codes) / inside.sum()
        entropy = -(share * share.clamp(min=1e-9).log()).sum()
        measures = {
            "tokens": float(inside.sum()),
            "different": float((share > 0).sum()),
            "perplexity": float(entropy.exp()),
        }
        if self.loss.target == "mel":
            return {"mel": float(self._mel_loss(out.float(), batch)), **measures}
        written = [letters_of(row[:length]) for row, length in zip(out.argmax(-1), n.tolist())]
        asked = [row.tolist() for row in batch.letters.split(batch.counts.tolist())]
        errors = sum(edits(a, b) for a, b in zip(written, asked))
        loss = ctc(out.float(), n, batch)
        return {"loss": float(loss), "errors": errors / sum(map(len, asked)), **measures}

    def export(self, networks: Mapping[str, Any], path: Path) -> None:
        """The tokenizer alone."""
        about = {
            "training_data": list(self.config["data"].get("sets", [])),
            "target": self.loss.target,
        }
        name = str(self.config.get("name", NAME))
        codec = networks["recogniser"].codec
        save_codec(codec, path, name=name, dtype=torch.float16, about=about)

    def _mel_loss(self, out: Tensor, batch: Utterances) -> Tensor:
        """L1 of the frames of each token."""
        guess = rearrange(out, "b t (m f) -> b m (t f)", f=self.frames)
        length = min(guess.shape[-1], batch.mels.shape[-1])
        inside = (torch.arange(length, device=out.device) < batch.n[:, None])[:, None]
        distance = (guess[..., :length] - batch.mels[..., :length]).abs() * inside
        return distance.sum() / (inside.sum() * guess.shape[1])

    def _prepare(self, row: Row) -> tuple[Tensor, Tensor]:
        """Log-mel [M, T] in float16, letters [n]."""
        (samples,) = rows_of(Audio.load(row["audio"]), RATE, AudioOptions())
        samples = F.pad(samples, (0, max(0, SHORTEST - len(samples))))
        mel = whisper_mel(samples, WhisperMel(n_mels=self.model.mels))
        return mel.half(), torch.tensor(spelled(row.get("text", "")), dtype=torch.int64)

    def _rows(self, split: str) -> list[Row]:
        data = self.config["data"]
        rows = find_rows(
            data.get("root", "data"), data.get("sets", ["."]), modality="audio", splits=(split,)
        )
        return [row for row in rows if self.loss.target == "mel" or spelled(row.get("text", ""))]

    def _held_out(self) -> Utterances:
        if self._held is None:
            rows = self._rows("held")[: self.loss.held]
            self._held = self.collate([self._prepare(row) for row in rows])
        return self._held


def ctc(out: Tensor, n: Tensor, batch: Utterances) -> Tensor:
    """The mean over utterances of the loss a letter; impossible ones count as none."""
    log_probabilities = rearrange(out.log_softmax(-1), "b t c -> t b c")
    return F.ctc_loss(
        log_probabilities, batch.letters, n, batch.counts, blank=BLANK, zero_infinity=True
    )


def spelled(text: str) -> list[int]:
    """CTC classes of a text's letters; what is no letter is a space, and spaces do not repeat."""
    plain = "".join(c if c in LETTERS else " " for c in text.lower())
    return [LETTERS.index(c) + 1 for c in " ".join(plain.split())]


def letters_of(classes: Tensor) -> list[int]:
    """The best path's classes [T'] to letters: repeats joined, blanks dropped."""
    return [c for c in torch.unique_consecutive(classes).tolist() if c != BLANK]


def edits(a: Sequence[int], b: Sequence[int]) -> int:
    """The least insertions, deletions and changes that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def spans(count: int, size: int, widest: int, rng: torch.Generator) -> Tensor:
    """One run of up to `widest` places in each row: bool [count, size]."""
    draw = torch.rand(2, count, 1, generator=rng, device=rng.device)
    width = (draw[0] * (widest + 1)).floor()
    start = (draw[1] * (size - width + 1)).floor()
    place = torch.arange(size, device=rng.device)
    return (place >= start) & (place < start + width)


def task(config: dict) -> Task:
    """The task of a config file."""
    return S3Task(config)
