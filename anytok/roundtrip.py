"""Round trips: files through tokens and back, with the measures that fit each medium."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import modalities
from .codecs import Codec, StreamError, TokenStream
from .modalities import Audio, Image, Media, Shape, Text, Video, measure
from .report import Row

# What a medium is coded with when nobody says otherwise.
DEFAULT_CODECS = {
    "image": "onedpiece/mini",
    "audio": "rvq/mini",
    "video": "cvivit/mini",
    "shape": "octgpt/mini",
    "text": "text/bytes",
}
SUFFIXES = {"image": ".png", "audio": ".wav", "video": ".mp4", "shape": ".glb", "text": ".txt"}


@dataclass(frozen=True)
class Coded:
    """A medium as tokens: its stream, and a video's sound as a second one."""

    stream: TokenStream
    sound: TokenStream | None = None

    @property
    def bits(self) -> int:
        """Bits of both streams."""
        return self.stream.bits + (self.sound.bits if self.sound else 0)


def encode(medium: Media, codec: Codec, sound_codec: Codec | None = None) -> Coded:
    """Code one medium; a video's sound goes through `sound_codec`, or is left out where that is None.

    Raises:
        StreamError: the codec is for another medium.
    """
    if codec.spec.modality != medium.modality:
        kind = medium.modality
        raise StreamError(f"codec '{codec.spec.name}' codes {codec.spec.modality}, this is {kind}")
    (stream,) = codec.encode([medium])
    sound = None
    if isinstance(medium, Video) and medium.audio is not None and sound_codec is not None:
        (sound,) = sound_codec.encode([medium.audio])
    return Coded(stream, sound)


def decode(coded: Coded, codec: Codec, sound_codec: Codec | None = None) -> Media:
    """Back to a medium; the sound is put under the frames again."""
    (medium,) = codec.decode([coded.stream])
    if coded.sound is not None and sound_codec is not None and isinstance(medium, Video):
        (audio,) = sound_codec.decode([coded.sound])
        medium = replace(medium, audio=audio)
    return medium


def prefixes(stream: TokenStream) -> list[TokenStream]:
    """The stream at a few lengths: 16 and 64 tokens where it is ordered, half the depths where it is residual."""
    if stream.depth_prefix and stream.depth > 1:
        depths = sorted({1, max(1, stream.depth // 2), stream.depth})
        return [stream.depths(n) for n in depths]
    if stream.prefix_step == 1 and stream.modality == "image":
        return [stream[:k] for k in (16, 64) if k < len(stream)] + [stream]
    return [stream]


def title_of(stream: TokenStream) -> str:
    """How a stream is called in a report: its tokens, or its depths."""
    if stream.depth_prefix:
        return f"{stream.depth} deep"
    return f"{len(stream)} tokens"


def roundtrip(
    path: Path, codec: Codec, sound: Callable[[], Codec] | None = None
) -> Iterator[tuple[Row, Media]]:
    """Code one file at a few lengths; yields a row with its figures, and what came back.

    `sound` loads the codec of a video's sound, and is called only where there is some; None leaves the sound out.
    """
    source = modalities.load(path)
    has_sound = isinstance(source, Video) and source.audio is not None
    sound_codec = sound() if has_sound and sound is not None else None
    start = time.perf_counter()
    coded = encode(source, codec, sound_codec)
    encode_seconds = time.perf_counter() - start
    for stream in prefixes(coded.stream):
        start = time.perf_counter()
        result = decode(replace(coded, stream=stream), codec, sound_codec)
        seconds = time.perf_counter() - start
        values = {
            "codec": codec.spec.name,
            "tokens": sum(p.codes.numel() for p in stream.parts),
            "bytes": (replace(coded, stream=stream).bits + 7) // 8,
            **rate(source, stream),
            **measures(source, result),
            "encode s": round(encode_seconds, 3),
            "decode s": round(seconds, 3),
        }
        yield Row(path.name, {"source": source, title_of(stream): result}, values), result


def rate(source: Media, stream: TokenStream) -> dict[str, float]:
    """Bits per pixel of a picture, per second of sound and video, per face of a mesh."""
    if isinstance(source, Image):
        return {"bits/pixel": stream.bits / (source.height * source.width)}
    if isinstance(source, Audio):
        return {"kbit/s": stream.bits / source.seconds / 1000}
    if isinstance(source, Video):
        return {"kbit/s": stream.bits / (len(source.frames) / source.fps) / 1000}
    return {}


def measures(source: Media, result: Media) -> dict[str, float]:
    """The measures that fit the medium, `result` against `source`."""
    if isinstance(source, Image) and isinstance(result, Image):
        a, b = source.over().pixels, result.pixels.clamp(0, 1)
        return {"PSNR dB": measure.psnr(b, a), "SSIM": measure.ssim(b, a)}
    if isinstance(source, Audio) and isinstance(result, Audio):
        a = source.mono().resample(result.rate).samples
        b = result.mono().samples
        n = min(a.shape[-1], b.shape[-1])
        a, b = a[..., :n], b[..., :n]
        return {
            "mel distance": measure.mel_distance(b, a, result.rate),
            "SI-SDR dB": measure.si_sdr(b, a),
        }
    if isinstance(source, Video) and isinstance(result, Video):
        n = min(len(source.frames), len(result.frames))
        a = source.resize(*result.frames.shape[-2:]).frames[:n].float() / 255
        return {"PSNR dB": measure.psnr(result.frames[:n].float() / 255, a)}
    if isinstance(source, Shape) and isinstance(result, Shape):
        return {"F-score 1%": measure.f_score(result, source, 0.01)}
    if isinstance(source, Text) and isinstance(result, Text):
        return {"equal": float(source.text == result.text)}
    return {}


def merged(rows: Sequence[Row]) -> list[Row]:
    """Rows of one file as one row for a contact sheet: the source once, then every length."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    made = []
    for name, group in by_name.items():
        cells = {title: m for row in group for title, m in row.cells.items()}
        made.append(Row(name, cells, group[-1].values))
    return made
