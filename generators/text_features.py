"""What a prompt becomes before a generator reads it: T5's features, or ids of words.

Both take strings and give one tensor each; generators also take such tensors from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codecs.text import TextCodec
from ..modalities.text import Text


class T5Features:
    """Features [L, C] of T5's encoder (arXiv 1910.10683), which Phenaki's networks read.

    Args:
        name: a model of the hub, or a folder that transformers reads; loaded with the first prompt.
        length: tokens after which a prompt is cut.
        device: where the encoder runs.
    """

    def __init__(
        self,
        name: str | Path = "google/t5-v1_1-base",
        *,
        length: int = 256,
        device: str | torch.device = "cpu",
    ):
        self.name, self.length, self.device = str(name), length, device
        self._parts = None

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        """Features [L, C] of each text, float32, on the CPU.

        Raises:
            ImportError: transformers is not installed.
            OSError: the model is not here and cannot be fetched.
        """
        tokenizer, encoder = self._load()
        batch = tokenizer(
            list(texts),
            return_tensors="pt",
            padding="longest",
            max_length=self.length,
            truncation=True,
        ).to(self.device)
        out = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        rows = zip(out.last_hidden_state.float().cpu(), batch.attention_mask.bool().cpu())
        return [row[there].clone() for row, there in rows]

    def _load(self):
        if self._parts is None:
            try:
                from transformers import AutoTokenizer, T5EncoderModel
            except ImportError as error:
                raise ImportError(
                    f"text features of '{self.name}' need transformers: pip install 'anytok[transformers]'; "
                    "or give features [L, C] or ids instead of strings"
                ) from error
            encoder: Any = T5EncoderModel.from_pretrained(self.name)
            encoder = encoder.to(self.device).eval()
            self._parts = (AutoTokenizer.from_pretrained(self.name), encoder)
        return self._parts


class TextIds:
    """Ids [L] of a text codec, for networks that have their own table."""

    def __init__(self, codec: TextCodec):
        self.codec = codec

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        """Ids [L] of each text."""
        return [stream.codes[:, 0] for stream in self.codec.encode([Text(text) for text in texts])]
