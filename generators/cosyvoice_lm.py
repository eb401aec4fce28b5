"""CosyVoice 2 and 3: text to semantic speech tokens (arXiv 2412.10117, 2505.17589; FunAudioLLM/CosyVoice).

A Qwen2 decoder reads text through its own embeddings and speech tokens through a second table; a second head writes
speech tokens only. It runs on the shared `Transformer` with our `KVCache`, so that cached steps equal whole passes.

    whole text:     [sos] text [task] speech            ─▶ speech [eos]
    text arriving:  [sos] (5 text, 15 speech) ... rest of text [task] rest of speech

| version | sos, task | eos | fill | head |
|---|---|---|---|---|
| v2 | a table of their own, `llm_embedding` | S | S + 2 | S + 3 rows, bias |
| v3 | rows S, S + 2 of the speech table | S + 1 | S + 3 | S + 200 rows, no bias |

`SpeechDecoder` draws tokens for a batch of requests, each row from its own generator, also for v1
(`cosyvoice_lm_v1.py`). Where it departs from the published decoder:

- Published v3 forbids id S before the least length, which is its sos and never comes: nothing holds that length.
  Here all ids that end are forbidden (`RepetitionAware.enforce`; False as published).
- Published bi-stream decoding reads the last speech token twice before the rest of the text, and lets a prompt whose
  speech fills its block write a second one; here the order is that of training.

S speech codes, B rows, L ids of a sequence, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..backbone.cache import KVCache
from ..backbone.checkpoints import from_transformers
from ..backbone.step import Stepper
from ..backbone.transformer import Transformer, TransformerConfig, rotary
from ..codecs.codec import Rng, item_rngs
from ..codecs.published import WeightsError, load_into
from .generator import Event

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


class Marks(NamedTuple):
    """Ids beside the speech codes; sos and task are inputs only, `stops` are ids of the head that end."""

    sos: int
    task: int
    eos: int
    fill: int | None
    stops: tuple[int, int]


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


@dataclass(frozen=True, kw_only=True)
class RepetitionAware:
    """Repetition-aware sampling (VALL-E 2, arXiv 2406.05370), with CosyVoice's values.

    A token is drawn from the likeliest; where it stands in the last `window` tokens `window * share` times or more,
    it is struck out and another is drawn from all.

    Args:
        top_p, top_k: the likeliest tokens that reach p together, at most k.
        window, share: 0 for `window` leaves repetition alone.
        enforce: no id that ends is drawn before the least length; False forbids one id only, as published.
        minimum, maximum: least and most speech tokens for each text token.
    """

    top_p: float = 0.8
    top_k: int = 25
    window: int = 10
    share: float = 0.1
    enforce: bool = True
    minimum: float = 2.0
    maximum: float = 20.0

    def __post_init__(self):
        if not 0 < self.top_p <= 1 or self.top_k < 1 or self.window < 0:
            raise ValueError(
                f"top_p {self.top_p}, top_k {self.top_k}, window {self.window}: expected 0 < top_p <= 1, "
                "top_k of 1 or more, window of 0 or more"
            )
        if not 0 <= self.minimum <= self.maximum:
            raise ValueError(f"minimum {self.minimum} is above maximum {self.maximum}, or negative")


@dataclass(frozen=True, kw_only=True)
class SpeechRequest:
    """One utterance to write.

    Args:
        text: ids [N]; or an iterable of such pieces, which is read as it arrives (bi-stream; not v1).
        prompt_text, prompt_speech: ids of a recording whose voice goes on (zero-shot). v3's instruction stands at the
            beginning of `prompt_text` (or of `text`) and ends with `<|endofprompt|>`.
        speaker: an embedding [192]; v1 only.
    """

    text: Tensor | Iterable[Tensor]
    prompt_text: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    prompt_speech: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    speaker: Tensor | None = None


class SpeechLM(Protocol):
    """What `SpeechDecoder` needs of a language model."""

    marks: Marks
    codes: int
    context: int  # the most positions

    def inputs(self) -> Tensor:
        """Input vectors of codes and marks."""
        ...

    def prompt(self, request: SpeechRequest) -> Tensor:
        """Everything that is read before the first new token, [L, D]."""
        ...

    def begin(self, rows: int, capacity: int) -> KVCache:
        """An empty cache."""
        ...

    def read(self, x: Tensor, cache: KVCache, counts: Sequence[int]) -> Tensor:
        """Embeddings [B, T, D], counts[b] of them real, to hidden states [B, T, D]."""
        ...

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Speech tokens [B] to hidden states [B, D]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [B, V] of codes and marks."""
        ...


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
            now, answers = sounds[:n_speech], [*sounds[:n_speech], _known(m.fill)]
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


class SpeechDecoder:
    """Draws speech tokens; a `Generator` over `SpeechRequest`s.

    Rows of different length share a batch, finish independently and then leave it. A row's tokens do not depend on
    its neighbours; a row whose text has not arrived yet makes all wait.
    """

    def __init__(self, model: SpeechLM):
        self.model = model

    def run(
        self,
        requests: Sequence[SpeechRequest],
        options: RepetitionAware | None = None,
        rng: Rng | None = None,
    ) -> Iterator[Event]:
        """Events as tokens are drawn; reason "end" or "length" with a request's last.

        Raises:
            ValueError: ids outside the vocabularies, a text that is empty, arriving text for v1.
        """
        options = options or RepetitionAware()
        rows = [
            _row(self.model, i, request, options, g)
            for i, (request, g) in enumerate(zip(requests, item_rngs(rng, len(requests))))
        ]
        return self._loop(rows, options)

    @torch.inference_mode()
    def _loop(self, rows: list[_Row], options: RepetitionAware) -> Iterator[Event]:
        for row in rows:
            if row.maximum == 0:
                row.reason = "length"
                yield Event(row.number, (), 0, row.reason)
        rows = [row for row in rows if row.reason is None]
        if not rows:
            return
        longest = max(len(row.feed) for row in rows if row.feed is not None)
        cache = self.model.begin(len(rows), longest + max(row.maximum or 0 for row in rows))
        while rows:
            logits = self.model.logits(self._hidden(rows, cache))
            for row, scores in zip(rows, logits):
                row.take(_draw(scores, row, self.model, options))
                if row.fresh or row.reason:
                    yield Event(row.number, tuple(row.fresh), row.written, row.reason)
                    row.fresh.clear()
            stay = [i for i, row in enumerate(rows) if row.reason is None]
            if 0 < len(stay) < len(rows):
                cache.take(stay)
            rows = [rows[i] for i in stay]

    def _hidden(self, rows: list[_Row], cache: KVCache) -> Tensor:
        """Hidden states [B, D] after everything that each row has to feed."""
        ids = [row.last for row in rows if row.feed is None]
        if len(ids) == len(rows):
            return self.model.step(torch.tensor(ids, device=cache.keys.device), cache)
        table = self.model.inputs()
        pieces = [table[row.last][None] if row.feed is None else row.feed for row in rows]
        counts = [len(piece) for piece in pieces]
        hidden = self.model.read(pad_sequence(pieces, batch_first=True), cache, counts)
        for row in rows:
            row.feed = None
        return hidden[torch.arange(len(rows)), torch.tensor(counts) - 1]


@dataclass
class _Row:
    """One request in progress; `feed` [n, D] is what the model has not read yet, None for the last token alone."""

    number: int
    rng: torch.Generator
    marks: Marks
    feed: Tensor | None
    minimum: int
    maximum: int | None  # None while text may still arrive
    blocks: _Blocks | None = None
    history: list[int] = field(default_factory=list)  # tokens and fills
    fresh: list[int] = field(default_factory=list)  # tokens that no event has told yet
    written: int = 0
    reason: str | None = None

    @property
    def last(self) -> int:
        """The newest token."""
        return self.history[-1]

    def take(self, id: int) -> None:
        """Go on with a drawn id."""
        start, stop = self.marks.stops
        blocks = self.blocks
        if blocks is not None and id == self.marks.fill and not blocks.closed:
            self.history.append(id)
            self.feed, self.maximum = blocks.more([])
            return
        if start <= id < stop:
            self.reason = "end"
            return
        self.history.append(id)
        self.fresh.append(id)
        self.written += 1
        if blocks is not None and blocks.spent():
            self.history.append(_known(self.marks.fill))  # forced, so that it need not be computed
            self.feed, self.maximum = blocks.more([id])
        if self.maximum is not None and self.written >= self.maximum:
            self.reason = "length"


class _Blocks:
    """The text side of a bi-stream row: blocks of text as they fill up, then the rest and [task]."""

    def __init__(self, model: CosyVoiceLM, request: SpeechRequest, maximum: float):
        self.model, self.maximum = model, maximum
        self.size, self.room = model.config.mix
        self.source = iter(request.text)
        self.words = request.prompt_text.tolist()
        self.arrived = 0
        self.left = 0  # speech tokens of this block that are still to come
        self.closed = False

    def begin(self, request: SpeechRequest) -> tuple[Tensor, int | None]:
        """Everything up to the first new token, and the most tokens."""
        model = self.model
        check_codes(request.prompt_speech, model.codes)
        opening, sounds = self._opening(), request.prompt_speech.tolist()
        pieces = [model.vectors([model.marks.sos], opening, [])]
        while sounds and self._full():
            now, sounds = sounds[: self.room], sounds[self.room :]
            pieces.append(model.vectors([], self._words(self.size), now))
            self.left = self.room - len(now)
        if self.left and not sounds:
            return torch.cat(pieces), None
        rest, maximum = self.more([])
        return torch.cat([*pieces, rest, model.vectors([], [], sounds)]), maximum

    def spent(self) -> bool:
        """Count one token; whether the block is full."""
        self.left -= 1
        return self.left == 0 and not self.closed

    def more(self, before: list[int]) -> tuple[Tensor, int | None]:
        """What comes after a full block: [before] text, or what is left of it and [task]; and the most tokens."""
        if self._full():
            self.left = self.room
            return self.model.vectors(before, self._words(self.size), []), None
        self.closed = True
        if not self.arrived:
            raise ValueError("no text arrived, expected at least one id")
        whole = self.model.vectors(before, self._words(len(self.words)), [self.model.marks.task])
        return whole, int(self.maximum * self.arrived)

    def _opening(self) -> list[int]:
        """v3's instruction, which stands before the blocks."""
        if self.model.config.version == "v2":
            return []
        marker = self.model.config.marker
        while marker not in self.words and self._pull():
            pass
        self.model.check_text(torch.tensor(self.words, dtype=torch.int64))
        return self._words(self.words.index(marker) + 1)

    def _full(self) -> bool:
        while len(self.words) < self.size and self._pull():
            pass
        return len(self.words) >= self.size

    def _pull(self) -> bool:
        piece = next(self.source, None)
        if piece is None:
            return False
        self.words += piece.tolist()
        self.arrived += len(piece)
        return True

    def _words(self, n: int) -> list[int]:
        now, self.words = self.words[:n], self.words[n:]
        size = self.model.config.transformer.vocab_size
        if any(not 0 <= id < size for id in now):
            raise ValueError(f"text ids {now} hold one outside 0...{size - 1}")
        return now


def check_codes(codes: Tensor, size: int) -> None:
    """Raise ValueError unless all speech tokens are of the codebook."""
    if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ValueError(
            f"prompt_speech reaches from {int(codes.min())} to {int(codes.max())}, expected 0...{size - 1}"
        )


def _row(
    model: SpeechLM,
    number: int,
    request: SpeechRequest,
    options: RepetitionAware,
    rng: torch.Generator,
) -> _Row:
    if isinstance(request.text, Tensor):
        if not len(request.text):
            raise ValueError(f"request {number} has no text")
        least, most = (int(len(request.text) * r) for r in (options.minimum, options.maximum))
        with torch.inference_mode():
            prompt = model.prompt(request)
        if len(prompt) > model.context:
            raise ValueError(
                f"request {number} has {len(prompt)} positions before its first token, the model has {model.context}"
            )
        # The last token is never read, so one more than the free positions can be drawn.
        most = min(most, model.context - len(prompt) + 1)
        return _Row(number, rng, model.marks, prompt, least, most)
    if not isinstance(model, CosyVoiceLM):
        raise ValueError(f"request {number} has text that arrives, which only v2 and v3 read")
    blocks = _Blocks(model, request, options.maximum)
    with torch.inference_mode():
        feed, most = blocks.begin(request)
    return _Row(number, rng, model.marks, feed, 0, most, blocks)


def _draw(scores: Tensor, row: _Row, model: SpeechLM, options: RepetitionAware) -> int:
    """The next id of one row, from scores [V]."""
    scores = scores.float().log_softmax(-1)
    start, stop = row.marks.stops
    if row.blocks is not None:
        ends = row.marks.eos if row.blocks.closed else row.marks.fill
        kept = scores[ends].clone()
        scores[start:stop] = -torch.inf
        scores[ends] = kept
    elif row.written < row.minimum:
        scores[start : stop if options.enforce else model.codes + 1] = -torch.inf
    return aware(scores, row.history, options, row.rng)


def aware(
    scores: Tensor, history: Sequence[int], options: RepetitionAware, rng: torch.Generator
) -> int:
    """Repetition-aware sampling: an id, from scores [V] (log-probabilities) after `history`."""
    values, order = scores.softmax(-1).sort(descending=True, stable=True)
    values = values[: options.top_k]
    keep = int(((values.cumsum(-1) - values) < options.top_p).sum())
    id = int(order[_multinomial(values[:keep], rng)])
    recent = history[-options.window :] if options.window else []
    if options.window and recent.count(id) >= options.window * options.share:
        struck = scores.clone()
        struck[id] = -torch.inf
        id = _multinomial(struck.softmax(-1), rng)
    return id


def _multinomial(weights: Tensor, rng: torch.Generator) -> int:
    return int(torch.multinomial(weights.to(rng.device), 1, replacement=True, generator=rng))


def _known(id: int | None) -> int:
    if id is None:
        raise ValueError("this model has no fill token, so no bi-stream order")
    return id


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


__all__ = ["CosyVoiceLM", "CosyVoiceLMConfig", "RepetitionAware", "SpeechDecoder", "SpeechRequest"]
