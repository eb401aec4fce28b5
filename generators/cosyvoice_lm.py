"""CosyVoice 2 and 3: text to semantic speech tokens (arXiv 2412.10117, 2505.17589; FunAudioLLM/CosyVoice).

A Qwen2 decoder reads text through its own embeddings and speech tokens through a second table; a second head writes
speech tokens only. It runs on the shared `Transformer` with our `KVCache`, so that cached steps equal whole passes.

    whole text:     [sos] text [task] speech            ─▶ speech [eos]
    text arriving:  [sos] (5 text, 15 speech) ... rest of text [task] rest of speech

| version | sos, task | eos | fill | head |
|---|---|---|---|---|
| v2 | a table of their own, `llm_embedding` | S | S + 2 | S + 3 rows, bias |
| v3 | rows S, S + 2 of the speech table | S + 1 | S + 3 | S + 200 rows, no bias |

`speech_decoder.py` draws from it, and says how that departs from the published code.

S speech codes, B rows, L ids of a sequence, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..backbone.cache import KVCache
from ..backbone.checkpoints import from_transformers
from ..backbone.step import Stepper
from ..backbone.transformer import Transformer, TransformerConfig, rotary
from ..codecs.published import WeightsError, load_into
from .speech_decoder import Marks, SpeechRequest, check_codes, known

IGNORE = -1  # a target that no loss sees
# What Qwen2.5-0.5B's files do not show in their shapes.
QWEN = {
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
WORDS, HEAD = "llm.model.model.embed_tokens.weight", "llm.model.lm_head.weight"
MARKER = 151646  # <|endofprompt|>: v3's instruction ends with it
MARKS = {"v2": 3, "v3": 200}  # rows of the head behind the codes


@dataclass(frozen=True, kw_only=True)
class CosyVoiceLMConfig:
    """Sizes.

    Args:
        transformer: the decoder; its vocabulary is the text's.
        codes: S.
        mix: text and speech tokens of a bi-stream block.
        marker: the text id that closes v3's instruction.
    """

    transformer: TransformerConfig
    version: Literal["v2", "v3"] = "v2"
    codes: int = 6561
    mix: tuple[int, int] = (5, 15)
    marker: int = MARKER


class CosyVoiceLM(nn.Module):
    """The language model of v2 or v3; its keys are those of the published `llm.pt`."""

    def __init__(self, config: CosyVoiceLMConfig):
        super().__init__()
        self.config = config
        width, rows = config.transformer.width, config.codes + MARKS[config.version]
        if config.version == "v2":
            self.llm_embedding = nn.Embedding(2, width)
        self.llm = nn.Module()
        self.llm.model = Transformer(config.transformer)
        self.llm_decoder = nn.Linear(width, rows, bias=config.version == "v2")
        self.speech_embedding = nn.Embedding(rows, width)
        self.codes, self.marks = config.codes, _marks(config)
        self.context = config.transformer.context
        self._stepper: Stepper | None = None

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        source: str = "llm.pt",
    ) -> CosyVoiceLM:
        """The model of a published `llm.pt`.

        Args:
            config: transformers' config.json of the decoder (`CosyVoice-BlankEN`); Qwen2.5-0.5B's where None.
        """
        state = {k: v for k, v in state_dict.items() if k not in ("epoch", "step")}
        sizes = _infer(state, config, source)
        with torch.device("meta"):
            model = cls(sizes)
        model = model.to_empty(device="cpu")
        model.backbone.rotary = rotary(sizes.transformer)
        if sizes.transformer.tied:
            model.backbone.lm_head.weight = model.backbone.model.embed_tokens.weight
            state.setdefault(HEAD, state.get(WORDS, Tensor()))
        load_into(model, state, source=source)
        return model.eval()

    @property
    def backbone(self) -> Transformer:
        """The decoder."""
        return self.llm.model  # type: ignore[return-value]

    def inputs(self) -> Tensor:
        """Input vectors [rows, D] of codes and marks, by the ids of `marks`."""
        own = self.speech_embedding.weight
        return torch.cat([own, self.llm_embedding.weight]) if self.config.version == "v2" else own

    def embed(self, ids: Tensor, is_text: Tensor) -> Tensor:
        """Input vectors [..., D] of ids [...], each a text id or one of `inputs`."""
        text = self.backbone.embed(ids * is_text)
        speech = F.embedding(ids * ~is_text, self.inputs())
        return torch.where(is_text[..., None], text, speech)

    def sequence(
        self, text: Tensor, speech: Tensor, *, instruct: Tensor | None = None, blocks: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A training sequence: ids [L], which of them are text [L], and targets [L].

        Args:
            blocks: in bi-stream order, which needs more than mix[1] / mix[0] speech tokens a text token.
        """
        m, (n_text, n_speech) = self.marks, self.config.mix
        ids, kinds, targets = [m.sos], [False], [IGNORE]

        def read(tokens: list[int], is_text: bool, answers: list[int]) -> None:
            ids.extend(tokens)
            kinds.extend([is_text] * len(tokens))
            targets.extend([IGNORE] * (len(tokens) - len(answers)) + answers)

        words, sounds = text.tolist(), speech.tolist()
        read([] if instruct is None else instruct.tolist(), True, [])
        if blocks and len(sounds) * n_text <= len(words) * n_speech:
            raise ValueError(
                f"{len(sounds)} speech tokens for {len(words)} of text: blocks of {n_text} and {n_speech} need more"
            )
        while blocks and len(words) >= n_text:
            now, answers = sounds[:n_speech], [*sounds[:n_speech], known(m.fill)]
            read(words[:n_text], True, answers[:1])
            read(now, False, answers[1:])
            words, sounds = words[n_text:], sounds[n_speech:]
        read(words, True, [])
        read([m.task, *sounds], False, [*sounds, m.eos])
        table = torch.tensor([ids, kinds, targets])
        return table[0], table[1].bool(), table[2]

    def loss(self, sequences: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Mean cross-entropy of all targets, in nats."""
        ids, kinds, targets = (
            pad_sequence(list(part), batch_first=True, padding_value=value).to(
                self.llm_decoder.weight.device
            )
            for part, value in zip(zip(*sequences), (0, False, IGNORE))
        )
        hidden = self.backbone(embeddings=self.embed(ids, kinds), keep=0).hidden
        logits = self.llm_decoder(hidden[targets != IGNORE])
        return F.cross_entropy(logits.float(), targets[targets != IGNORE])

    def prompt(self, request: SpeechRequest) -> Tensor:
        """[sos] text [task] speech, of prompt and request: [L, D]."""
        assert isinstance(request.text, Tensor)
        words = torch.cat([request.prompt_text, request.text]).long()
        self.check_text(words)
        return self.vectors([self.marks.sos], words.tolist(), self._after_text(request))

    def vectors(self, marks: list[int], words: list[int], sounds: list[int]) -> Tensor:
        """Input vectors [L, D] of marks, then text, then marks and codes."""
        device = self.llm_decoder.weight.device
        ids = torch.tensor([*marks, *words, *sounds], dtype=torch.int64, device=device)
        is_text = torch.zeros_like(ids, dtype=torch.bool)
        is_text[len(marks) : len(marks) + len(words)] = True
        return self.embed(ids, is_text)

    def check_text(self, words: Tensor) -> None:
        """Raise ValueError where text ids are impossible, or v3's instruction does not end."""
        size = self.config.transformer.vocab_size
        if len(words) and not 0 <= int(words.min()) <= int(words.max()) < size:
            raise ValueError(
                f"text ids reach from {int(words.min())} to {int(words.max())}, expected 0...{size - 1}"
            )
        if self.config.version == "v3" and self.config.marker not in words:
            raise ValueError(
                f"text has no <|endofprompt|> (id {self.config.marker}), which v3 needs: begin with "
                "'You are a helpful assistant.<|endofprompt|>'"
            )

    def begin(self, rows: int, capacity: int) -> KVCache:
        """An empty cache; fuses the decoder's projections, after which it cannot be trained."""
        if self._stepper is None:
            self._stepper = Stepper(self.backbone.fuse())
            self._stepper.table = self.inputs().detach()
        return self.backbone.cache(rows, capacity)

    def read(self, x: Tensor, cache: KVCache, counts: Sequence[int]) -> Tensor:
        """Embeddings [B, T, D], counts[b] of them real, to hidden states [B, T, D]."""
        return self.backbone(embeddings=x, cache=cache, counts=counts, keep=0).hidden

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Speech tokens [B] to hidden states [B, D]."""
        assert self._stepper is not None
        return self._stepper(ids, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [B, V] of codes and marks."""
        return self.llm_decoder(hidden)

    def _after_text(self, request: SpeechRequest) -> list[int]:
        check_codes(request.prompt_speech, self.codes)
        return [self.marks.task, *request.prompt_speech.tolist()]


def _marks(config: CosyVoiceLMConfig) -> Marks:
    s = config.codes
    if config.version == "v2":
        return Marks(sos=s + 3, task=s + 4, eos=s, fill=s + 2, stops=(s, s + 3))
    return Marks(sos=s, task=s + 2, eos=s + 1, fill=s + 3, stops=(s, s + 200))


def _infer(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None, source: str
) -> CosyVoiceLMConfig:
    """Sizes, from shapes and transformers' config."""
    missing = [
        k for k in (WORDS, "llm_decoder.weight", "speech_embedding.weight") if k not in state
    ]
    if missing:
        raise WeightsError(
            f"{source}: not a language model of CosyVoice 2 or 3, it lacks {', '.join(missing)}"
        )
    version = "v2" if "llm_embedding.weight" in state else "v3"
    vocab_size, width = state[WORDS].shape
    layers = [int(k.split(".")[4]) for k in state if k.startswith("llm.model.model.layers.")]
    shapes = {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": len(state["llm.model.model.layers.0.mlp.gate_proj.weight"]),
        "num_hidden_layers": 1 + max(layers),
    }
    decoder = from_transformers({**(config or QWEN), **shapes}, source=source)
    codes = len(state["llm_decoder.weight"]) - MARKS[version]
    return CosyVoiceLMConfig(transformer=decoder, version=version, codes=codes)
