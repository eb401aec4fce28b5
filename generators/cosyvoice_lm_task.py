"""Training CosyVoice's language model of v2 or v3 on texts and their speech tokens (arXiv 2412.10117).

Tokens are made once by the codec (`cosyvoice/s3-v2` or a file) and kept in memory. A share of the utterances is read in
bi-stream order, where there is speech enough for it. Text is a tokenizer file's ids, or its bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.transformer import TransformerConfig
from ..codecs.published import write_safetensors
from ..codecs.registry import load_codec
from ..codecs.text import TextCodec
from ..codecs.training.data import Prepared, Row, find_rows
from ..codecs.training.engine import Task, adamw
from ..codecs.training.entry import settings
from ..modalities.audio import Audio
from .cosyvoice_lm import CosyVoiceLM, CosyVoiceLMConfig

Sample = tuple[Tensor, Tensor]  # text ids [N], speech tokens [T]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UtterancesConfig:
    """What is learned from.

    Args:
        root, sets: data sets whose rows have audio and text.
        codec: whose tokens: a name, or a file that `save_codec` wrote.
        path: folder of the codec's published files; None for the hub.
        words: a `tokenizer.json`; None for bytes.
        blocks: the share that is read in bi-stream order.
        limit: the most speech tokens; longer utterances are left out.
    """

    root: str = "data"
    sets: tuple[str, ...] = ("speech",)
    codec: str = "cosyvoice/s3-v2"
    path: str | None = None
    words: str | None = None
    blocks: float = 0.5
    limit: int = 750


class UtterancesTask(Task):
    """See the module's docstring.

    Args:
        config: {"model": {"version": ..., sizes of `TransformerConfig`}, "data": UtterancesConfig,
            "optimizer": {"lr": ...}}.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = dict(config)
        self.data = settings(UtterancesConfig, config["data"], "data")
        self.codec = load_codec(self.data.codec, self.data.path)
        self.words = TextCodec.from_file(self.data.words) if self.data.words else TextCodec()
        sizes = dict(config["model"])
        version = sizes.pop("version", "v2")
        fixed = {"vocab_size": self.words.spec.vocab[0][0], "qkv_bias": True, "tied": True}
        decoder = settings(TransformerConfig, {**sizes, **fixed}, "model")
        codes = self.codec.spec.vocab[0][0]
        self.model = CosyVoiceLMConfig(transformer=decoder, version=version, codes=codes)
        self._held: Prepared | None = None

    def networks(self) -> dict[str, nn.Module]:
        """The language model."""
        return {"lm": CosyVoiceLM(self.model)}

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW."""
        return adamw(parameters, **self.config.get("optimizer", {}))

    def dataset(self) -> Prepared:
        """Utterances of the split "train"."""
        return self._utterances("train")

    def collate(self, samples: Sequence[Sample]) -> dict[str, list[Tensor]]:
        """Utterances of unequal length stay lists."""
        texts, speeches = zip(*samples)
        return {"texts": list(texts), "speeches": list(speeches)}

    def losses(
        self,
        name: str,
        networks: Mapping[str, Any],
        batch: Mapping[str, list[Tensor]],
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Cross-entropy of the speech tokens, what fills and what ends."""
        draws = torch.rand(len(batch["texts"]), generator=rng, device=rng.device).tolist()
        return {"loss": self._loss(networks["lm"], batch, [u < self.data.blocks for u in draws])}

    @torch.no_grad()
    def evaluate(self, networks: Mapping[str, Any], step: int) -> dict[str, float]:
        """Loss of held-out utterances, in both orders."""
        if self._held is None:
            self._held = self._utterances("held", 32)
        batch = self.collate([self._held[i] for i in range(len(self._held))])
        orders = {"whole": False, "blocks": True}
        count = len(batch["texts"])
        return {k: float(self._loss(networks["lm"], batch, [v] * count)) for k, v in orders.items()}

    def export(self, networks: Mapping[str, Any], path: Path) -> None:
        """The state dict under the published keys; `CosyVoiceLM.from_published` reads it."""
        tensors = {k: v.detach().cpu().clone() for k, v in networks["lm"].state_dict().items()}
        write_safetensors(tensors, path, {"format": "pt"})

    def sample(self, row: Row) -> Sample:
        """Text ids and speech tokens of a row."""
        with torch.inference_mode():
            codes = self.codec.encode([Audio.load(row["audio"])])[0].codes[:, 0]
        return torch.tensor(self.words.ids(row["text"]), dtype=torch.int64), codes.clone()

    def _loss(
        self, lm: CosyVoiceLM, batch: Mapping[str, list[Tensor]], blocks: list[bool]
    ) -> Tensor:
        n_text, n_speech = self.model.mix
        pairs = zip(batch["texts"], batch["speeches"], blocks)
        return lm.loss(
            [
                lm.sequence(t, s, blocks=b and len(s) * n_text > len(t) * n_speech)
                for t, s, b in pairs
            ]
        )

    def _utterances(self, split: str, most: int | None = None) -> Prepared:
        rows = find_rows(self.data.root, self.data.sets, modality="audio", splits=(split,))
        seconds = self.data.limit / (self.codec.spec.rate or 25.0)
        rows = [r for r in rows if r.get("text") and r.get("seconds", 0.0) <= seconds]
        return Prepared(rows[:most], self.sample)


def task(config: Mapping[str, Any]) -> Task:
    """The task of a config file."""
    return UtterancesTask(config)
