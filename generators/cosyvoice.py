"""CosyVoice from text to speech: language model, then the codec's flow and vocoder (arXiv 2407.05407, 2412.10117,
2505.17589).

    tts = CosyVoiceTTS.load("CosyVoice2-0.5B")
    voice = Voice.from_audio(Audio.load("me.wav"), tts.codec, text="What I say in it.")
    tts(["Hello there."], voice=voice)[0].save("hello.wav")
    for piece in tts.stream("Hello there.", voice=voice): ...

- A voice whose recording's words are known goes on speaking (zero-shot); of one without words only the sound is kept
  (cross-lingual); an instruction says how to speak.
- `stream` gives sound while tokens are still drawn, and takes text that arrives in pieces (v2, v3).
- Texts are read as they are: numbers are not spelled out, long texts are not cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..codecs.audio.cosyvoice.codec import CosyVoice, Speech
from ..codecs.audio.cosyvoice.voice import Voice
from ..codecs.codec import CodecUnavailable, Rng, item_rngs
from ..codecs.published import WeightsError, read_weights
from ..codecs.registry import load_codec
from ..codecs.text import TextCodec
from ..modalities.audio import Audio
from .cosyvoice_lm import CosyVoiceLM
from .cosyvoice_lm_v1 import CosyVoiceLMv1
from .cosyvoice_words import END_OF_PROMPT, read_words
from .speech_decoder import RepetitionAware, SpeechDecoder, SpeechRequest

LANGUAGE_MODEL, WORDS = "llm.pt", "CosyVoice-BlankEN"
YAML = {"v1": "cosyvoice.yaml", "v2": "cosyvoice2.yaml", "v3": "cosyvoice3.yaml"}
SYSTEM = "You are a helpful assistant."  # v3's instructions begin with it
PUSH = 5  # tokens that are handed to the vocoder at once
# v3 draws silence at length; published code lets five such tokens in a row pass.
SILENT, SILENCE = frozenset((1, 2, 28, 29, 55, 248, 494, 2241, 2242, 2322, 2323)), 5


class SpeechError(RuntimeError):
    """The language model wrote no speech."""


class CosyVoiceTTS:
    """Text to speech.

    Args:
        codec: tokens to speech.
        model: text to tokens, of the same version.
        words: the text tokenizer.
        version: "v1", "v2" or "v3".
    """

    def __init__(
        self, codec: CosyVoice, model: CosyVoiceLM | CosyVoiceLMv1, words: TextCodec, version: str
    ):
        codes = codec.spec.vocab[0][0]
        if model.codes != codes:
            raise ValueError(
                f"the language model has {model.codes} speech tokens, the codec {codes}"
            )
        self.codec, self.model, self.words, self.version = codec, model, words, version
        self.decoder = SpeechDecoder(model)

    @classmethod
    def load(
        cls, path: str | Path, *, name: str | None = None, words: TextCodec | None = None
    ) -> CosyVoiceTTS:
        """A model directory.

        Args:
            name: the codec's, such as "cosyvoice/v1-25hz"; told by the directory's yaml where None.
            words: the text tokenizer; v1's (Whisper's) lies in no model directory and has to be given.

        Raises:
            WeightsError: a file is missing or another model's.
        """
        path = Path(path)
        name = name or f"cosyvoice/{_version(path)}"
        version = name.split("/")[1][:2]
        if version == "v1" and words is None:
            raise WeightsError(
                f"{path}: v1's text tokenizer (Whisper's) lies in no model directory; "
                "pass words=TextCodec.from_file('tokenizer.json')"
            )
        file = read_weights(path / LANGUAGE_MODEL)
        if version == "v1":
            model = CosyVoiceLMv1.from_published(file.tensors, source=file.source)
        else:
            config = path / WORDS / "config.json"
            sizes = json.loads(config.read_text()) if config.is_file() else None
            model = CosyVoiceLM.from_published(file.tensors, sizes, source=file.source)
        codec = load_codec(name, path)
        if not isinstance(codec, CosyVoice):
            raise WeightsError(f"'{name}' is no CosyVoice model, expected cosyvoice/v1, v2 or v3")
        return cls(codec, model, words or read_words(path / WORDS, version), version)

    def __call__(
        self,
        texts: Sequence[str],
        *,
        voice: Voice | Sequence[Voice],
        instruct: str | None = None,
        sampling: RepetitionAware | None = None,
        speech: Speech | None = None,
        rng: Rng | None = None,
    ) -> list[Audio]:
        """Speech of each text, drawn as one batch.

        Args:
            voice: one for all, or one a text.
            instruct: how to speak, in words (v2, v3).
            speech: steps and guidance of the flow; its voice is not used.
            rng: of the tokens, one a text.
        """
        voices = [voice] * len(texts) if isinstance(voice, Voice) else list(voice)
        if len(voices) != len(texts):
            raise ValueError(f"{len(voices)} voices for {len(texts)} texts; give one, or one each")
        requests = [
            self._request(self._ids(t), v, instruct) for t, v in zip(texts, voices, strict=True)
        ]
        tokens: list[list[int]] = [[] for _ in texts]
        for event in self.decoder.run(requests, sampling, rng):
            tokens[event.request] += event.ids
        streams = []
        for ids, text, one in zip(tokens, texts, voices):
            kept = Hush(self.version).keep(ids)
            if not kept:
                raise SpeechError(f"no speech token was drawn for {text!r}")
            streams.append(
                self.codec.stream(torch.tensor(kept), grid=(len(kept),), side=one.side())
            )
        return self.codec.decode(streams, options=_plain(speech)) if streams else []

    def stream(
        self,
        text: str | Iterable[str],
        *,
        voice: Voice,
        instruct: str | None = None,
        sampling: RepetitionAware | None = None,
        speech: Speech | None = None,
        rng: torch.Generator | None = None,
    ) -> Iterator[Audio]:
        """Speech of one text piece by piece, the first after some 28 tokens (1.1 s of speech).

        Args:
            text: whole, or pieces that are read as they arrive.
        """
        if not self.codec.spec.streaming:
            raise CodecUnavailable(
                f"'{self.codec.spec.name}' does not stream; cosyvoice/v2 and v3 do"
            )
        words = self._ids(text) if isinstance(text, str) else (self._ids(t) for t in text if t)
        request = self._request(words, voice, instruct)
        tokens = self.decoder.run([request], sampling, item_rngs(None if rng is None else [rng], 1))
        return self._pieces((id for event in tokens for id in event.ids), voice, _plain(speech))

    def _pieces(self, tokens: Iterator[int], voice: Voice, speech: Speech) -> Iterator[Audio]:
        output, hush = self.codec.decoder_stream(options=speech), Hush(self.version)
        side, waiting, any_yet = voice.side(), [], False
        for id in tokens:
            waiting += hush.keep([id])
            if len(waiting) == PUSH:
                piece = output.push(self._piece(waiting, side))
                waiting, any_yet = [], True
                if piece is not None:
                    yield piece
        if waiting:
            any_yet = True
            piece = output.push(self._piece(waiting, side))
            if piece is not None:
                yield piece
        if not any_yet:
            raise SpeechError("no speech token was drawn")
        yield output.finish()

    def _piece(self, ids: list[int], side: dict[str, Tensor]):
        return self.codec.stream(torch.tensor(ids), grid=(len(ids),), side=side)

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.words.ids(text), dtype=torch.int64)

    def _request(
        self, words: Tensor | Iterable[Tensor], voice: Voice, instruct: str | None
    ) -> SpeechRequest:
        """What the language model reads; see the module for the three ways."""
        if self.version == "v1" and instruct is not None:
            raise ValueError("v1 takes no instruction in words; use v2 or v3")
        opening = f"{instruct}{END_OF_PROMPT}" if instruct else ""
        if self.version == "v3":
            opening = f"{SYSTEM} {instruct}" if instruct else SYSTEM
            opening += END_OF_PROMPT
        goes_on = bool(voice.text) and len(voice.tokens) > 0 and not instruct
        return SpeechRequest(
            text=words,
            prompt_text=self._ids(opening + (voice.text if goes_on else "")),
            prompt_speech=voice.tokens if goes_on else voice.tokens[:0],
            speaker=voice.embedding if self.version == "v1" else None,
        )


class Hush:
    """Drops what v3 draws of one silence beyond five tokens; other versions' tokens all pass."""

    def __init__(self, version: str):
        self.silent = SILENT if version == "v3" else frozenset()
        self.run = 0

    def keep(self, ids: Iterable[int]) -> list[int]:
        """Those of the next ids that stay."""
        kept = []
        for id in ids:
            self.run = self.run + 1 if id in self.silent else 0
            if self.run <= SILENCE:
                kept.append(id)
        return kept


def _plain(speech: Speech | None) -> Speech:
    """Options without a voice: each stream carries its own."""
    return Speech() if speech is None else Speech(steps=speech.steps, cfg=speech.cfg)


def _version(path: Path) -> str:
    found = [version for version, name in YAML.items() if (path / name).is_file()]
    if len(found) != 1:
        raise WeightsError(
            f"{path}: holds {len(found)} of {', '.join(YAML.values())}, expected one; "
            "say which model it is with name='cosyvoice/v2'"
        )
    return found[0]
