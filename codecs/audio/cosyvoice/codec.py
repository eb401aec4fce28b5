"""CosyVoice as a codec: speech to 25 (or 50) semantic tokens a second, and back in any voice (arXiv 2407.05407,
2412.10117, 2505.17589).

    Audio ─ S3 tokenizer (`s3`) ─▶ tokens ─ flow (`flow`) ─▶ mel ─ vocoder (`hift`) ─▶ Audio
                                      voice: CAM++ vector, prompt ─▶┘

- Tokens say what is said and how; who says it comes from a voice: `Speech(voice=...)`, else a speaker of the
  checkpoint by name, else the voice that the stream carries, else the checkpoint's first speaker (`spk2info.pt`).
- By default encoding keeps the speaker's vector in the stream (768 bytes), so that it decodes at once.
- A model directory holds `speech_tokenizer_v*.onnx`, `campplus.onnx`, `flow.pt`, `hift.pt`, perhaps `spk2info.pt`; its
  language model (`llm.pt`) is `generators.cosyvoice_lm`'s.
- What is longer than 300 s (the published noise table ends there) is spoken in pieces of 100 s, each prompted with the
  end of the one before; the vocoder runs through, so memory stays bounded.
- v2 and v3 stream: `decoder_stream()` gives sound after the first chunk of tokens, and the pieces join to what `decode`
  gives with `Speech(chunked=True)`. A chunk runs the flow over everything before it, so chunks grow from 25 tokens to
  100, anew in each stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ....modalities.audio import Audio
from ....modalities.features import (
    COSYVOICE_V1_MEL,
    COSYVOICE_V2_MEL,
    COSYVOICE_V3_MEL,
    HifiMel,
    hifi_mel,
)
from ...codec import Codec, CodecSpec, CodecUnavailable, Rng, item_rngs
from ...layout import Frames
from ...published import BROKEN_PICKLE, File, Weights, WeightsError, find, load_into
from ...stream import TokenStream
from ..waveform import AudioOptions, DecoderStream, rows_of, source_meta, source_sound
from .campplus import CAMPPlus, CAMPPlusConfig
from .campplus import graph_state_dict as campplus_state_dict
from .conformer import LOOKAHEAD
from .flow import CHUNK, FRAMES, Flow, FlowConfig, make_flow
from .flow import PUBLISHED as FLOWS
from .graph import is_graph
from .hift import V2 as VOCODER_V2
from .hift import HiFT, HiFTConfig, HiFTStream, Noise, SourceNoise
from .s3 import V2 as S3_V2
from .s3 import S3Config, S3Tokenizer
from .s3 import build as build_s3
from .voice import Voice

if TYPE_CHECKING:
    from ...registry import Entry

PROMPT_SECONDS = 30.0  # the most that a voice takes of a recording
SILENCE = 1e-3  # a recording whose samples all stay below it says nothing of a voice
BATCH_FRAMES = 6000  # padded mel frames in one pass, which bounds the memory
LARGEST_CHUNK = 100  # tokens, in streaming
LONGEST = FRAMES  # frames with the prompt, that the flow makes at once
PIECE, CONTEXT = 100.0, 3.0  # seconds of the pieces of what is longer, and of their prompts
MELS = {"v1": COSYVOICE_V1_MEL, "v2": COSYVOICE_V2_MEL, "v3": COSYVOICE_V3_MEL}
SPEAKERS = "spk2info.pt"
SPEAKER = CAMPPlusConfig()


@dataclass(frozen=True, kw_only=True)
class CosyVoiceConfig:
    """The four networks' sizes and the mel between flow and vocoder, those of v2 if nothing is said."""

    tokenizer: S3Config = S3_V2
    speaker: CAMPPlusConfig = SPEAKER
    flow: FlowConfig = FLOWS["v2"]
    vocoder: HiFTConfig = VOCODER_V2
    mel: HifiMel = COSYVOICE_V2_MEL

    def __post_init__(self):
        pairs = (
            ("tokens", self.tokenizer.codes, self.flow.vocab),
            ("mel bands", self.mel.n_mels, self.flow.mels),
            ("mel bands", self.mel.n_mels, self.vocoder.mels),
            ("samples a second", self.mel.rate, self.vocoder.rate),
            ("samples a frame", self.mel.hop, self.vocoder.hop),
            ("numbers of a speaker", self.speaker.embedding, self.flow.speaker),
        )
        for what, one, other in pairs:
            if one != other:
                raise ValueError(f"two networks disagree about {what}: {one} and {other}")

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> CosyVoiceConfig:
        """What `dataclasses.asdict` and JSON made of one."""
        parts = {f.name: type(f.default) for f in dataclasses.fields(cls)}
        return cls(**{name: parts[name](**_tuples(values)) for name, values in table.items()})


@dataclass(frozen=True, kw_only=True)
class Keep:
    """How to encode.

    Args:
        voice: what the stream carries of who speaks: "speaker" the vector, "prompt" tokens and mel of the first
            `seconds` too (the recording's own sound: 16 kB a second), "none" nothing.
        seconds: of the prompt.
    """

    voice: Literal["none", "speaker", "prompt"] = "speaker"
    seconds: float = 3.0

    def __post_init__(self):
        if self.voice not in ("none", "speaker", "prompt"):
            raise ValueError(f"voice is {self.voice!r}, expected 'none', 'speaker' or 'prompt'")
        if not 0 < self.seconds <= PROMPT_SECONDS:
            raise ValueError(f"seconds is {self.seconds}, expected up to {PROMPT_SECONDS}")


@dataclass(frozen=True, kw_only=True)
class Speech:
    """How to decode.

    Args:
        voice: who speaks; see the module for what happens where it is None.
        speaker: the name of a speaker that comes with the checkpoint, in place of a voice.
        steps: Euler steps of the flow.
        cfg: guidance; 0 takes half the time and follows tokens and voice less closely.
        chunked: decode as a stream does (v2, v3), to get exactly its sound.
    """

    voice: Voice | None = None
    speaker: str | None = None
    steps: int = 10
    cfg: float = 0.7
    chunked: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected 1 or more")
        if self.voice is not None and self.speaker is not None:
            raise ValueError("voice and speaker are both given, expected one of them")


class Networks(NamedTuple):
    """What a codec is made of."""

    tokenizer: S3Tokenizer
    campplus: CAMPPlus
    flow: Flow
    vocoder: HiFT

    @classmethod
    def fresh(cls, config: CosyVoiceConfig) -> Networks:
        """With random weights."""
        c = config
        return cls(
            S3Tokenizer(c.tokenizer), CAMPPlus(c.speaker), make_flow(c.flow), HiFT(c.vocoder)
        )

    def config(self, mel: HifiMel) -> CosyVoiceConfig:
        """Their sizes, with the mel between flow and vocoder."""
        return CosyVoiceConfig(
            tokenizer=self.tokenizer.config,
            speaker=self.campplus.config,
            flow=self.flow.config,
            vocoder=self.vocoder.config,
            mel=mel,
        )


class CosyVoice(Codec):
    """Speech to tokens and back; `networks` are those of `config`, None makes fresh ones."""

    system = "cosyvoice"

    def __init__(
        self,
        config: CosyVoiceConfig,
        *,
        networks: Networks | None = None,
        name: str = "cosyvoice/custom",
        licences: tuple[str, str] = ("Apache-2.0", "unknown"),
    ):
        super().__init__()
        self.config = c = config
        parts = Networks.fresh(c) if networks is None else networks
        self.tokenizer, self.campplus, self.flow, self.vocoder = parts
        self.speakers: dict[str, Voice] = {}
        self.spec = CodecSpec(
            name=name,
            modality="audio",
            vocab=((c.tokenizer.codes,),),
            layout=Frames(),
            streaming=c.flow.causal,
            rate=float(c.tokenizer.rate),
            size=(c.vocoder.rate,),
            code_licence=licences[0],
            weights_licence=licences[1],
        )

    @torch.no_grad()
    def encode(
        self, media: Sequence[Audio], *, options: Keep | None = None, rng: Rng | None = None
    ) -> list[TokenStream]:
        """Sounds of any rate and length to streams, with what `options` keeps of their voices.

        Raises:
            ValueError: an empty sound, NaN or infinite samples.
        """
        options = options or Keep()
        streams = self.tokenizer.encode(media)
        return [
            self.stream(
                stream.codes,
                grid=stream.grid,
                meta=source_meta(audio, 1),
                side=self._kept(audio, stream.codes[:, 0], options),
            )
            for audio, stream in zip(media, streams)
        ]

    @torch.no_grad()
    def decode(
        self,
        streams: Sequence[TokenStream],
        *,
        options: Speech | None = None,
        rng: Rng | None = None,
    ) -> list[Audio]:
        """Streams to speech, of the source's rate and length where the stream tells them.

        Args:
            rng: of the flow's start and the source's noise; None is the published noise.

        Raises:
            CodecUnavailable: there is no voice; names what would give one.
            StreamError: another codec's stream.
            ValueError: a voice of another version.
        """
        options = options or Speech()
        for stream in streams:
            self.check(stream)
        voices = [self.voice_of(stream.side, options) for stream in streams]
        chances = [Chance(self, None if rng is None else r) for r in item_rngs(rng, len(streams))]
        rows = self._speak([s.codes[:, 0] for s in streams], voices, chances, options)
        rate = self.config.vocoder.rate
        return [
            source_sound(row[None].cpu(), stream.meta, rate, len(row))
            for row, stream in zip(rows, streams)
        ]

    def decoder_stream(
        self, *, options: Speech | None = None, rng: torch.Generator | None = None
    ) -> SpeechStream:
        """Speech of one stream whose tokens arrive in pieces (v2, v3)."""
        if not self.spec.streaming:
            raise CodecUnavailable(
                f"'{self.spec.name}' sees all frames at once and cannot stream; cosyvoice/v2 and v3 can"
            )
        return SpeechStream(self, options or Speech(), rng)

    def encoder_stream(self) -> None:
        """Always CodecUnavailable: the tokenizer hears a sound's loudest moment before its first token."""
        raise CodecUnavailable(
            f"'{self.spec.name}' streams tokens to speech only; encode a recording as a whole "
            "(hours are fine)"
        )

    @torch.no_grad()
    def voice(self, audio: Audio, *, text: str = "") -> Voice:
        """What `Voice.from_audio` gives: vector, prompt tokens and prompt mel of a recording.

        Raises:
            ValueError: a recording that is empty, too short, longer than 30 s, not finite, or silent.
        """
        if audio.seconds > PROMPT_SECONDS:
            raise ValueError(
                f"the recording lasts {audio.seconds:.1f} s, a voice takes at most {PROMPT_SECONDS:.0f} s; cut it"
            )
        if audio.samples.numel() and audio.samples.abs().amax() < SILENCE:
            raise ValueError("the recording is silent, there is no voice in it")
        tokens = self.tokenizer.encode([audio])[0].codes[:, 0]
        mel = self.mel(audio)
        if self.config.flow.causal:
            count = min(len(tokens), len(mel) // 2)
            tokens, mel = tokens[:count], mel[: 2 * count]
        return Voice(embedding=self.campplus.embed([audio])[0], tokens=tokens, mel=mel, text=text)

    def mel(self, audio: Audio) -> Tensor:
        """The flow's mel spectrum [T, M] of a sound."""
        (row,) = rows_of(audio, self.config.mel.rate, AudioOptions())
        least = (self.config.mel.n_fft - self.config.mel.hop) // 2 + 1
        return hifi_mel(F.pad(row, (0, max(0, least - len(row)))), self.config.mel).T

    def voice_of(self, side: Mapping[str, Tensor], options: Speech) -> Voice:
        """Who speaks a stream with these `side` tensors."""
        if options.voice is not None:
            return options.voice
        if options.speaker is not None:
            if options.speaker not in self.speakers:
                known = ", ".join(self.speakers) or "none: this checkpoint has no spk2info.pt"
                raise ValueError(f"there is no speaker {options.speaker!r}; there are {known}")
            return self.speakers[options.speaker]
        kept = Voice.from_side(side)
        if kept is not None:
            return kept
        if self.speakers:
            return next(iter(self.speakers.values()))
        raise CodecUnavailable(
            f"'{self.spec.name}' does not know who speaks: the stream keeps no voice and the checkpoint came "
            "without speakers; pass options=Speech(voice=Voice.from_audio(recording, codec))"
        )

    def tokenize(self, x: Tensor, n: Tensor | None = None) -> Tensor:
        """As `S3Tokenizer.tokenize`: log-mels [B, 128, T] to ids [B, T']."""
        return self.tokenizer.tokenize(x, n)

    def detokenize(self, codes: Tensor, voices: Sequence[Voice]) -> Tensor:
        """Ids [B, T'] and one voice each to samples [B, L]."""
        chances = [Chance(self, None) for _ in codes]
        return torch.stack(self._speak(list(codes.cpu()), voices, chances, Speech()))

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """What the flow reads for each token: [V, D]."""
        return self.flow.input_embedding.weight

    def _kept(self, audio: Audio, tokens: Tensor, options: Keep) -> dict[str, Tensor]:
        if options.voice == "none":
            return {}
        if options.voice == "prompt":
            count = round(options.seconds * audio.rate)
            return self.voice(Audio(audio.samples[:, :count], audio.rate)).side()
        # A click has no voice; the vector wants 45 ms.
        samples = F.pad(audio.samples, (0, max(0, audio.rate // 10 - audio.samples.shape[1])))
        heard = samples[:, : round(PROMPT_SECONDS * audio.rate)]
        return Voice(embedding=self.campplus.embed([Audio(heard, audio.rate)])[0]).side()

    def _speak(
        self,
        tokens: Sequence[Tensor],
        voices: Sequence[Voice],
        chances: Sequence[Chance],
        options: Speech,
    ) -> list[Tensor]:
        """Rows of tokens to rows of samples [L_i], neighbours in length in one pass."""
        sizes = [len(v.mel) + self.flow.frames(len(t)) for t, v in zip(tokens, voices)]
        results: list[Tensor] = [torch.empty(0)] * len(tokens)
        for i in (i for i, size in enumerate(sizes) if size > LONGEST):
            results[i] = self._speak_long(tokens[i], voices[i], chances[i], options)
        for group in groups({i: size for i, size in enumerate(sizes) if size <= LONGEST}):
            mels = self.flow.generate(
                [tokens[i] for i in group],
                [voices[i] for i in group],
                [chances[i].flow for i in group],
                steps=options.steps,
                guidance=options.cfg,
                chunked=options.chunked,
            )
            for i, row in zip(group, self._vocode(mels, [chances[i] for i in group])):
                results[i] = row
        return results

    def _speak_long(self, tokens: Tensor, voice: Voice, chance: Chance, options: Speech) -> Tensor:
        """Tokens [T'] to samples [L], in pieces."""
        stream, samples, prompted = HiFTStream(self.vocoder, chance.source), [], voice
        for piece in tokens.split(round(PIECE * self.config.tokenizer.rate)):
            mel = self.flow.generate(
                [piece],
                [prompted],
                [chance.flow],
                steps=options.steps,
                guidance=options.cfg,
                chunked=options.chunked,
            )[0]
            samples.append(stream.push(mel))
            prompted = self.continued(voice, piece, mel)
        return torch.cat([*samples, stream.finish()])

    def continued(self, voice: Voice, tokens: Tensor, mel: Tensor, *, unit: int = 1) -> Voice:
        """A voice whose prompt ends with the last seconds of tokens [T'] and their mel [M, T].

        The prompt is made a multiple of `unit` tokens.
        """
        count = round(CONTEXT * self.config.tokenizer.rate)
        count = min(len(tokens), count + -(len(voice.tokens) + count) % unit)
        frames = self.flow.frames(count)
        if not frames:
            return voice
        return Voice(
            embedding=voice.embedding,
            tokens=torch.cat([voice.tokens, tokens[-count:].cpu()]),
            mel=torch.cat([voice.mel.reshape(-1, len(mel)), mel.T[-frames:].cpu()]),
        )

    def _vocode(self, mels: list[Tensor], chances: Sequence[Chance]) -> list[Tensor]:
        sizes = [mel.shape[1] for mel in mels]
        noise = [chance.source.draw(size) for chance, size in zip(chances, sizes)]
        like = self.vocoder.conv_pre.weight
        joined = Noise(
            torch.stack([chance.source.phase for chance in chances]).to(like),
            pad_sequence(noise, batch_first=True).to(like),
        )
        n = torch.tensor(sizes, device=like.device) if len(set(sizes)) > 1 else None
        x = pad_sequence([mel.T for mel in mels], batch_first=True).mT.to(like)
        samples = self.vocoder(x, joined, n)
        return [row[: size * self.config.vocoder.hop] for row, size in zip(samples, sizes)]


class Chance:
    """All chance in the decoding of one item: the flow's start, then the vocoder's noise.

    Args:
        rng: None gives the published noise: seed 0, and v3's table.
    """

    def __init__(self, codec: CosyVoice, rng: torch.Generator | None):
        mine = torch.Generator().manual_seed(0) if rng is None else rng
        self.flow = codec.flow.noise_table(mine)
        table = rng is None and codec.config.vocoder.version == "v3"
        self.source = SourceNoise(codec.config.vocoder, None if table else mine)


class SpeechStream(DecoderStream):
    """Decodes tokens that arrive in pieces; `codec.decoder_stream()` makes one. Its pieces of sound join to `decode`'s
    with `Speech(chunked=True)`.

    The voice is the options', else that of the first piece that is pushed.
    """

    _windows: Any

    def __init__(self, codec: CosyVoice, options: Speech, rng: torch.Generator | None):
        super().__init__(codec, None)  # type: ignore[arg-type]
        self._options, self._rng = options, rng

    def push(self, stream: TokenStream) -> Audio | None:
        """Take tokens; return the sound that has become final, None where there is none yet."""
        codec = self._codec
        assert isinstance(codec, CosyVoice)
        codec.check(stream)
        if self._windows is None:
            voice = codec.voice_of(stream.side, self._options)
            self._windows = Growing(codec, voice, Chance(codec, self._rng), self._options)
        return super().push(stream)

    def finish(self) -> Audio:
        """The rest. ValueError where nothing was pushed."""
        if self._windows is None:
            raise ValueError("the stream was finished before anything was pushed into it")
        return super().finish()


class Growing:
    """Tokens to samples, a chunk at a time: `Windowed` for a network that sees everything before.

    Args:
        codec, voice, chance, options: as in decoding.
    """

    def __init__(self, codec: CosyVoice, voice: Voice, chance: Chance, options: Speech):
        self._codec, self._voice, self._chance, self._options = codec, voice, chance, options
        self._vocoder = HiFTStream(codec.vocoder, chance.source)
        self._prompted, self._mel = voice, torch.empty(0)
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._done = 0  # tokens whose mel the vocoder has
        # Chunks end where prompt and tokens make a multiple of 25.
        self._next = CHUNK - len(voice.tokens) % CHUNK
        self._grown = CHUNK

    def push(self, codes: Tensor) -> list[Tensor]:
        """Codes [1, 1, n] to samples [1, L] that have become final."""
        self._tokens = torch.cat([self._tokens, codes[0, 0]])
        final = []
        while len(self._tokens) >= self._done + self._next + LOOKAHEAD:
            final.append(self._advance(self._done + self._next, last=False))
            self._grown = self._next = min(LARGEST_CHUNK, 2 * self._grown)
        return [samples[None] for samples in final if len(samples)]

    def finish(self) -> Tensor:
        """The rest [1, L]."""
        parts = []
        if len(self._tokens) > self._done:
            parts.append(self._advance(len(self._tokens), last=True))
        return torch.cat([*parts, self._vocoder.finish().cpu()])[None]

    def _advance(self, stop: int, *, last: bool) -> Tensor:
        if len(self._prompted.mel) + self._codec.flow.frames(stop + LOOKAHEAD) > LONGEST:
            stop -= self._begin_anew()
        mel = self._codec.flow.generate(
            [self._tokens[: stop + (0 if last else LOOKAHEAD)]],
            [self._prompted],
            [self._chance.flow],
            steps=self._options.steps,
            guidance=self._options.cfg,
            chunked=True,
            last=last,
        )[0]
        fresh = mel[:, self._codec.flow.frames(self._done) :]
        self._done, self._mel = stop, mel
        return self._vocoder.push(fresh).cpu()

    def _begin_anew(self) -> int:
        """Forget what was spoken but for a prompt; how many tokens that were."""
        gone = self._done
        spoken = self._tokens[:gone]
        self._prompted = self._codec.continued(self._voice, spoken, self._mel, unit=CHUNK)
        self._tokens, self._done = self._tokens[gone:], 0
        return gone


def groups(sizes: Mapping[int, int]) -> list[list[int]]:
    """Keys in batches of neighbours in length, none of more than BATCH_FRAMES padded frames."""
    batches: list[list[int]] = []
    for i in sorted(sizes, key=lambda j: sizes[j]):
        if batches and sizes[i] * (len(batches[-1]) + 1) <= BATCH_FRAMES:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def read_speakers(path: Path) -> dict[str, Voice]:
    """The speakers of a `spk2info.pt`: a vector each, or a whole prompt.

    Raises:
        WeightsError: the file is damaged or holds something else.
    """
    try:
        table = torch.load(path, map_location="cpu", weights_only=True)
        return {name: _speaker(values) for name, values in table.items()}
    except BROKEN_PICKLE as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: not a table of speakers ({why})") from error


def _speaker(values: Mapping[str, Any]) -> Voice:
    vector = values["embedding"] if "embedding" in values else values["flow_embedding"]
    vector = torch.as_tensor(vector).reshape(-1)
    if "flow_prompt_speech_token" not in values:
        return Voice(embedding=vector)
    tokens = torch.as_tensor(values["flow_prompt_speech_token"]).reshape(-1).long()
    return Voice(embedding=vector, tokens=tokens, mel=values["prompt_speech_feat"][0])


def _speakers_beside(flow: str, repo: str | None) -> dict[str, Voice]:
    """Speakers of the folder, or of the hub repository, that a flow came from; {} where it has none."""
    from huggingface_hub import constants

    beside = Path(flow).with_name(SPEAKERS)
    if beside.is_file():
        return read_speakers(beside)
    if repo is None or not Path(flow).is_relative_to(constants.HF_HUB_CACHE):
        return {}
    try:
        return read_speakers(find(File(name=SPEAKERS, repo=repo)))
    except (
        CodecUnavailable
    ):  # most repositories have none, and the voice's own error says what to do
        return {}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def build(files: Mapping[str, Weights], entry: Entry) -> CosyVoice:
    """The codec of a registry row (a model directory), or of a file that `save_codec` wrote."""
    licences = (entry.code_licence, entry.weights_licence)
    if "weights" in files:
        config = CosyVoiceConfig.from_json(entry.config)
        codec = CosyVoice(config, name=entry.name, licences=licences)
        load_into(codec, files["weights"].tensors, source=files["weights"].source)
        return codec.eval()
    version, rate = entry.config["version"], entry.config.get("rate", 25)
    tokenizer = build_s3(
        {"weights": files["tokenizer"]},
        dataclasses.replace(entry, config={"version": version, "rate": rate}),
    )
    speaker = files["speaker"]
    tensors = campplus_state_dict(speaker) if is_graph(speaker) else speaker.tensors
    given, extra = files["flow"], {k: v for k, v in entry.config.items() if k == "head_width"}
    flow = Flow.from_published(
        given.tensors, {"version": version, "token_rate": rate, **extra}, source=given.source
    )
    heard = files["vocoder"]
    vocoder = HiFT.from_published(heard.tensors, {"version": version}, source=heard.source)
    campplus = CAMPPlus.from_published(tensors, source=speaker.source)
    networks = Networks(tokenizer, campplus, flow, vocoder)
    codec = CosyVoice(
        networks.config(MELS[version]), networks=networks, name=entry.name, licences=licences
    )
    codec.speakers = _speakers_beside(given.source, entry.files["flow"].repo)
    return codec.eval()
