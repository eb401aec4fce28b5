"""A voice: what CosyVoice must know of who speaks.

    embedding  who: CAM++'s vector [192]; the flow sees it, and v1's language model
    tokens     how: the S3 tokens of a few seconds of speech, which the flow continues
    mel        the same seconds as the flow's mel spectrum
    text       what they say, for the text → token language model

A voice with an embedding alone is a speaker (CosyVoice's SFT voices); tokens and mel make it a prompt (zero-shot).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ....modalities.audio import Audio
    from .codec import CosyVoice

SIDE = "voice."  # prefix of a voice's tensors in a stream's `side`


def _empty_tokens() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


def _empty_mel() -> Tensor:
    return torch.empty(0, 80)


@dataclass(frozen=True, kw_only=True, eq=False)
class Voice:
    """Who speaks. Tensors lie on the CPU; nothing is normalised yet.

    Args:
        embedding: [E] float32, CAM++'s vector (E = 192 in published models).
        tokens: [T'] int64, the prompt's S3 tokens; empty for a speaker without prompt.
        mel: [T, M] float32, the prompt's mel spectrum as the flow's version wants it; of 24 kHz models T = 2 T'.
        text: the prompt's words; "" where nobody knows them.

    Raises:
        ValueError: tokens without mel or mel without tokens, or another shape or type.
    """

    embedding: Tensor
    tokens: Tensor = field(default_factory=_empty_tokens)
    mel: Tensor = field(default_factory=_empty_mel)
    text: str = ""

    def __post_init__(self):
        vector = self.embedding.detach().to("cpu", torch.float32)
        tokens, mel = self.tokens.detach().cpu(), self.mel.detach().to("cpu", torch.float32)
        if vector.ndim != 1 or not len(vector):
            raise ValueError(f"embedding is {tuple(vector.shape)}, expected one vector [E]")
        if not torch.isfinite(vector).all() or not torch.isfinite(mel).all():
            raise ValueError("the voice holds NaN or infinite numbers")
        if tokens.ndim != 1 or tokens.is_floating_point() or tokens.is_complex():
            shape = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"tokens are {shape}, expected integers [T']")
        if mel.ndim != 2:
            raise ValueError(f"mel is {tuple(mel.shape)}, expected [T, M]")
        if bool(len(tokens)) != bool(len(mel)):
            raise ValueError(
                f"the prompt has {len(tokens)} tokens and {len(mel)} mel frames, expected both or neither"
            )
        values = {"embedding": vector, "tokens": tokens.long(), "mel": mel}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_audio(cls, audio: Audio, codec: CosyVoice, *, text: str = "") -> Voice:
        """The voice of a recording of some seconds of speech (up to 30 s).

        Args:
            audio: any rate, any number of channels.
            codec: `load_codec("cosyvoice/v2")` or another version: tokens and mel are that version's.
            text: the recording's words.

        Raises:
            ValueError: a recording that is empty, too short, longer than 30 s, not finite, or silent.
        """
        return codec.voice(audio, text=text)

    @classmethod
    def from_side(cls, side: Mapping[str, Tensor]) -> Voice | None:
        """The voice that a stream carries in its `side` tensors; None where it carries none."""
        if SIDE + "embedding" not in side:
            return None
        found = {k.removeprefix(SIDE): v for k, v in side.items() if k.startswith(SIDE)}
        text = bytes(found.pop("text", torch.empty(0, dtype=torch.uint8)).tolist())
        return cls(**found, text=text.decode("utf-8", "replace"))

    def side(self) -> dict[str, Tensor]:
        """As tensors that a stream can carry; `from_side` is the way back."""
        tensors = {SIDE + "embedding": self.embedding}
        if len(self.tokens):
            tensors |= {SIDE + "tokens": self.tokens.to(torch.int16), SIDE + "mel": self.mel}
        if self.text:
            tensors[SIDE + "text"] = torch.tensor(list(self.text.encode()), dtype=torch.uint8)
        return tensors

    @property
    def speaker(self) -> Voice:
        """This voice without its prompt."""
        return Voice(embedding=self.embedding)
