"""Drawing speech tokens: repetition-aware sampling over a batch, for the language models of CosyVoice 1, 2 and 3.

Rows of different length share a batch without left padding, finish independently, and draw from their own generators.
Text may arrive while speech is drawn (bi-stream, v2 and v3): five ids of text, fifteen of speech, and so on.

Where this departs from the published decoder:

- Published v3 forbids id S before the least length, which is its sos and never comes: nothing holds that length.
  Here all ids that end are forbidden (`RepetitionAware.enforce`; False as published).
- Published bi-stream decoding reads the last speech token twice before the rest of the text, and lets a prompt whose
  speech fills its block write a second one; here the order is that of training.

S speech codes, B rows, L ids of a sequence, D width, V ids of the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..backbone.cache import KVCache
from ..codecs.codec import Rng, item_rngs
from .generator import Event


class Marks(NamedTuple):
    """Ids beside the speech codes; sos and task are inputs only, `stops` are ids of the head that end."""

    sos: int
    task: int
    eos: int
    fill: int | None
    stops: tuple[int, int]


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
    codes: int  # S
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
            self.history.append(known(self.marks.fill))  # forced, so that it need not be computed
            self.feed, self.maximum = blocks.more([id])
        if self.maximum is not None and self.written >= self.maximum:
            self.reason = "length"


class _Blocks:
    """The text side of a bi-stream row: blocks of text as they fill up, then the rest and [task].

    Args:
        model: a `CosyVoiceLM`.
    """

    def __init__(self, model: Any, request: SpeechRequest, maximum: float):
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
    if model.marks.fill is None:
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


def known(id: int | None) -> int:
    """The id of fill; ValueError for v1, which has none."""
    if id is None:
        raise ValueError("this model has no fill token, so no bi-stream order")
    return id
