"""Sound: float samples with a rate, read from and written to WAV, FLAC, OGG, MP3; read from M4A and films too.

- libsndfile (soundfile) reads what it reads exactly; FFmpeg (PyAV) reads the rest. Which one is asked depends on the
  file's first bytes, never on which of them fails.
- Integer samples are k / 2^(bits − 1) in both directions, so 8-, 16- and 24-bit files survive exactly. (libsndfile
  itself divides by 32768 and multiplies by 32767.)
- What is too long for memory is read by `Audio.open`, a chunk at a time.

Letters: C channels, N samples.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

from .complete import refuse_truncated
from .errors import MediaError, translating
from .files import Source, describe, format_of, name_of, opened, replacing, sniff

if TYPE_CHECKING:
    import av.container

MAX_SAMPLES = 2**26  # over all channels: 12 minutes of CD, 46 of 24 kHz mono, 256 MiB
MAX_CHANNELS = 32
MAX_RATE = 768_000  # Hz
MAX_RESAMPLING_TAPS = 2**24  # of the polyphase kernel: what 44,100 → 44,101 Hz would need is 10^9
CHUNK_SECONDS = 10.0
SAVE_SUFFIXES = {
    ".wav": "wav",
    ".flac": "flac",
    ".ogg": "ogg",
    ".opus": "opus",
    ".mp3": "mp3",
}
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
_BLOCK = (
    2**16
)  # samples per channel; libsndfile's Vorbis encoder overflows its stack on huge blocks
_SNDFILE_KINDS = ("wav", "flac", "ogg", "aiff")
_FFMPEG_FORMATS = {
    "mp3": "mp3",
    "aac": "aac",
    "mp4": "mov",
    "matroska": "matroska",
    "avi": "avi",
}


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound.

    Attributes:
        samples: [C, N] float32, full scale is ±1 (float files may exceed it; integer formats clip on saving).
        rate: samples per second and channel.
    """

    samples: Tensor
    rate: int
    modality: ClassVar[str] = "audio"

    def __post_init__(self) -> None:
        if self.samples.ndim != 2 or not 1 <= self.samples.shape[0] <= MAX_CHANNELS:
            shape = tuple(self.samples.shape)
            raise ValueError(f"samples are {shape}, expected [C, N] with C = 1 … {MAX_CHANNELS}")
        if self.samples.dtype != torch.float32:
            raise ValueError(f"samples are {self.samples.dtype}, expected torch.float32")
        if not isinstance(self.rate, int) or not 1 <= self.rate <= MAX_RATE:
            raise ValueError(f"rate is {self.rate!r}, expected an integer of 1 … {MAX_RATE} Hz")

    @property
    def channels(self) -> int:
        """C."""
        return self.samples.shape[0]

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.samples.shape[1] / self.rate

    @classmethod
    def load(cls, source: Source, *, max_samples: int = MAX_SAMPLES) -> Audio:
        """Read a whole file, from a path or from bytes; of a film, its first sound track.

        Raises:
            MediaError: empty, cut short, of another kind, without sound, or longer than `max_samples` (over all
                channels; `Audio.open` reads any length).
        """
        with cls.open(source) as reader:
            samples = reader.read_all(max_samples)
        if samples.shape[1] == 0:
            raise MediaError(name_of(source), "holds no samples")
        return cls(samples, reader.rate)

    @classmethod
    @contextmanager
    def open(cls, source: Source, chunk_seconds: float = CHUNK_SECONDS) -> Iterator[AudioReader]:
        """Read a file of any length in constant memory.

            with Audio.open("lecture.mp3", chunk_seconds=30) as reader:
                for chunk in reader:  # each an Audio; the last one may be shorter
                    ...

        Raises:
            MediaError: as `load`, but of any length; also while iterating, where the file breaks.
        """
        if not chunk_seconds > 0:
            raise ValueError(f"chunk_seconds is {chunk_seconds}, expected more than 0")
        name = name_of(source)
        with opened(source) as file:
            head = file.read(512)
            file.seek(0)
            kind = sniff(head)
            if kind not in _SNDFILE_KINDS and kind not in _FFMPEG_FORMATS:
                cause = f"begins {describe(head)}, which is no sound format that we read"
                raise MediaError(name, f"{cause} (WAV, FLAC, OGG, AIFF, MP3, AAC, M4A or a film)")
            refuse_truncated(file, kind, name)
            opening = _open_sndfile if kind in _SNDFILE_KINDS else _open_ffmpeg
            with opening(file, kind, name) as reader:
                reader.chunk = max(1, round(chunk_seconds * reader.rate))
                yield reader

    def save(
        self, path: str | os.PathLike[str], *, bits: int = 16, quality: int | None = None
    ) -> None:
        """Write WAV, FLAC, OGG (Vorbis), OPUS or MP3, as the extension says.

        Args:
            path: where to.
            bits: 16 or 24 for FLAC; 16, 24 or 32 (float) for WAV; not for the others.
            quality: 1 … 100 for the lossy formats (default: the encoder's own).

        Raises:
            MediaError: unknown extension, or the folder cannot be written.
            ValueError: an option that the format does not have, a rate that it cannot hold, or NaN.
        """
        kind = format_of(path, SAVE_SUFFIXES)
        options = _save_options(kind, bits, quality)
        rates = {"mp3": MP3_RATES, "opus": OPUS_RATES}.get(kind, (self.rate,))
        if self.rate not in rates:
            raise ValueError(f"{kind} cannot hold {self.rate} Hz; resample to one of {rates}")
        if kind in ("mp3", "opus") and self.channels > 2:
            raise ValueError(f"{kind} holds 1 or 2 channels, got {self.channels}; use mono()")
        if not torch.isfinite(self.samples).all():
            raise ValueError("the sound holds NaN or infinite samples, expected [-1, 1]")
        import soundfile

        with (
            replacing(path) as temporary,
            translating(os.fspath(path), _sndfile_failures(), f"cannot be written as {kind}"),
            soundfile.SoundFile(
                temporary, "w", samplerate=self.rate, channels=self.channels, **options
            ) as file,
        ):
            for block in self.samples.detach().cpu().split(_BLOCK, dim=1):
                file.write(_for_writing(block, file.subtype))

    @classmethod
    def from_numpy(cls, array: np.ndarray, rate: int) -> Audio:
        """From [N] or [C, N]: floats with full scale ±1, or int16 or int32 with their own."""
        if array.ndim == 1:
            array = array[None]
        samples = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
        full_scale = {torch.int16: 2**15, torch.int32: 2**31}.get(samples.dtype)
        if full_scale is not None:
            samples = samples.to(torch.float64) / full_scale
        elif not samples.is_floating_point():
            raise ValueError(f"array is {array.dtype}, expected floats, int16 or int32")
        return cls(samples.to(torch.float32), rate)

    def to_numpy(self, dtype: type = np.float32) -> np.ndarray:
        """[C, N] as `np.float32`, or `np.int16` (rounded and clipped)."""
        samples = self.samples.detach().cpu()
        if dtype is np.float32:
            return samples.contiguous().numpy()
        if dtype is np.int16:
            return _to_integers(samples, 16).numpy().astype(np.int16)
        raise ValueError(f"dtype is {dtype}, expected np.float32 or np.int16")

    def mono(self) -> Audio:
        """The mean of the channels."""
        if self.channels == 1:
            return self
        return Audio(reduce(self.samples, "c n -> 1 n", "mean"), self.rate)

    def resample(self, rate: int) -> Audio:
        """To another rate with a Hann-windowed sinc (torchaudio's defaults); ⌈N · rate / self.rate⌉ samples.

        Raises:
            ValueError: the two rates have too small a common divisor for a filter of sane size.
        """
        if rate == self.rate:
            return self
        if not isinstance(rate, int) or not 1 <= rate <= MAX_RATE:
            raise ValueError(f"rate is {rate!r}, expected an integer of 1 … {MAX_RATE} Hz")
        divisor = math.gcd(rate, self.rate)
        old, new = self.rate // divisor, rate // divisor
        if new * (old + 16 * max(1, old // new)) > MAX_RESAMPLING_TAPS:
            raise ValueError(
                f"{self.rate} → {rate} Hz is the ratio {new}/{old}, whose filter would be huge; "
                f"go to a rate with a larger common divisor"
            )
        from torchaudio.functional import resample

        return Audio(resample(self.samples, self.rate, rate), rate)


class AudioReader:
    """A sound file being read; iterating yields `Audio` chunks. Made by `Audio.open`.

    Attributes:
        rate: samples per second and channel.
        channels: C.
    """

    def __init__(self, blocks: Iterator[Tensor], rate: int, channels: int, name: str) -> None:
        self.rate = rate
        self.channels = channels
        self.chunk = _BLOCK
        self._name = name
        self._blocks = blocks
        self._rest = torch.empty(channels, 0)

    def __iter__(self) -> Iterator[Audio]:
        while (samples := self.take(self.chunk)).shape[1]:
            yield Audio(samples, self.rate)

    def take(self, count: int) -> Tensor:
        """The next `count` samples [C, count], fewer at the end of the file."""
        parts, have = [self._rest], self._rest.shape[1]
        while have < count and (block := next(self._blocks, None)) is not None:
            parts.append(block)
            have += block.shape[1]
        samples = torch.cat(parts, dim=1)
        self._rest = samples[:, count:].clone()
        return samples[:, :count]

    def read_all(self, max_samples: int) -> Tensor:
        """All that is left, [C, N]; `MediaError` once it is more than `max_samples`."""
        parts, total = [self._rest], 0
        for block in self._blocks:
            parts.append(block)
            total += block.numel()
            if total > max_samples:
                cause = f"holds more than max_samples={max_samples} (over {self.channels} channels)"
                raise MediaError(self._name, f"{cause}; read it with Audio.open")
        return torch.cat(parts, dim=1)


def ffmpeg_failures() -> tuple[type[BaseException], ...]:
    """What PyAV raises on broken files."""
    import av.error

    return (
        av.error.FFmpegError,
        OSError,
        ValueError,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,  # a stream whose codec is unknown has no context
        OverflowError,
        ZeroDivisionError,
        NotImplementedError,
        RuntimeError,
        MemoryError,
    )


@contextmanager
def open_container(file: BinaryIO, kind: str, name: str) -> Iterator[av.container.InputContainer]:
    """An FFmpeg container of a known kind: no guessing, so no playlist can make it open other files."""
    import av

    with translating(name, ffmpeg_failures(), f"cannot be read as {kind}"):
        container = av.open(file, "r", format=kind, metadata_errors="ignore")
    try:
        yield container
    finally:
        container.close()


def ffmpeg_reader(container: av.container.InputContainer, name: str) -> AudioReader:
    """A reader of the container's first sound track."""
    with translating(name, ffmpeg_failures(), "its sound cannot be read"):
        stream = container.streams.audio[0] if container.streams.audio else None
        if stream is None:
            raise MediaError(name, "holds no sound")
        rate, channels = stream.rate, stream.channels
    _check_layout(name, rate, channels)
    return AudioReader(_ffmpeg_blocks(container, stream, name), rate, channels, name)


def _ffmpeg_blocks(container: Any, stream: Any, name: str) -> Iterator[Tensor]:
    """Decoded blocks [C, n] as float32."""
    import av

    with translating(name, ffmpeg_failures(), "its sound is damaged"):
        to_float = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
        begun = False
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                # MP3 cut out of a longer stream begins with packets that need the ones before: silence, as in players.
                if begun or not packet.duration:
                    raise
                length = round(packet.duration * packet.time_base * stream.rate)
                yield torch.zeros(stream.channels, min(length, _BLOCK))
                continue
            for frame in frames:
                begun = True
                frame.pts = (
                    None  # gaps in the time stamps must not make the resampler invent samples
                )
                for block in to_float.resample(frame):
                    yield _finite(torch.from_numpy(block.to_ndarray()), name)


@contextmanager
def _open_ffmpeg(file: BinaryIO, kind: str, name: str) -> Iterator[AudioReader]:
    with open_container(file, _FFMPEG_FORMATS[kind], name) as container:
        yield ffmpeg_reader(container, name)


@contextmanager
def _open_sndfile(file: BinaryIO, kind: str, name: str) -> Iterator[AudioReader]:
    import soundfile

    with translating(name, _sndfile_failures(), f"cannot be read as {kind.upper()}"):
        sound = soundfile.SoundFile(file)
    with sound:
        _check_layout(name, sound.samplerate, sound.channels)
        yield AudioReader(_sndfile_blocks(sound, name), sound.samplerate, sound.channels, name)


def _sndfile_blocks(sound: Any, name: str) -> Iterator[Tensor]:
    """Decoded blocks [C, n] as float32; an end before the promised one is an error."""
    done = 0
    with translating(name, _sndfile_failures(), "its sound is damaged"):
        while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
            done += len(block)
            yield _finite(torch.from_numpy(rearrange(block, "n c -> c n").copy()), name)
    if done < sound.frames:
        raise MediaError(name, f"is cut short: {sound.frames} samples promised, {done} are there")


def _finite(block: Tensor, name: str) -> Tensor:
    if not torch.isfinite(block).all():
        raise MediaError(name, "holds NaN or infinite samples")
    return block


def _check_layout(name: str, rate: int | None, channels: int | None) -> None:
    if not rate or not 1 <= rate <= MAX_RATE:
        raise MediaError(name, f"has {rate} samples per second, expected 1 … {MAX_RATE}")
    if not channels or not 1 <= channels <= MAX_CHANNELS:
        raise MediaError(name, f"has {channels} channels, expected 1 … {MAX_CHANNELS}")


def _sndfile_failures() -> tuple[type[BaseException], ...]:
    import soundfile

    return (
        soundfile.SoundFileError,
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        OverflowError,
        MemoryError,
    )


def _save_options(kind: str, bits: int, quality: int | None) -> dict[str, Any]:
    """Format, subtype and compression as soundfile names them."""
    widths = {"wav": (16, 24, 32), "flac": (16, 24)}.get(kind, (16,))
    if bits not in widths:
        raise ValueError(f"bits is {bits} for {kind}, expected one of {widths}")
    if kind in ("wav", "flac"):
        if quality is not None:
            raise ValueError(f"quality is {quality}, but {kind} is lossless; leave it out")
        return {"format": kind.upper(), "subtype": "FLOAT" if bits == 32 else f"PCM_{bits}"}
    subtype = {"ogg": "VORBIS", "opus": "OPUS", "mp3": "MPEG_LAYER_III"}[kind]
    options: dict[str, Any] = {"format": "MP3" if kind == "mp3" else "OGG", "subtype": subtype}
    if quality is not None:
        if not 1 <= quality <= 100:
            raise ValueError(f"quality is {quality}, expected 1 … 100")
        options["compression_level"] = 1 - quality / 100
    return options


def _for_writing(block: Tensor, subtype: str) -> np.ndarray:
    """[n, C] in the integer or float type that reaches the file unscaled."""
    block = rearrange(block, "c n -> n c").contiguous()
    if subtype == "PCM_16":
        return _to_integers(block, 16).numpy().astype(np.int16)
    if subtype == "PCM_24":
        return (_to_integers(block, 24) << 8).numpy()
    return block.numpy()


def _to_integers(samples: Tensor, bits: int) -> Tensor:
    """Round to int32 multiples of 2^(1 − bits), clipped to what `bits` can hold."""
    full_scale = 2 ** (bits - 1)
    scaled = (samples.to(torch.float64) * full_scale).round()
    return scaled.clamp(-full_scale, full_scale - 1).to(torch.int32)
