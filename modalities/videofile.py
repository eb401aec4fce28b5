"""Writing films: the encoders, their pixel formats, and the sound beside the picture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .audio import Audio, ffmpeg_failures
from .errors import translating
from .files import replacing

if TYPE_CHECKING:
    from .video import Video

_BLOCK = 4096  # sound samples handed to the encoder at a time
_STANDARD_RATES = (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)


class _Encoder(NamedTuple):
    """How one container is written; `max_crf` 0 means that there is no such option."""

    container: str
    video: str
    audio: str
    sample_format: str
    default_crf: int
    max_crf: int
    rates: tuple[int, ...]


_ENCODERS = {
    "mp4": _Encoder("mp4", "libx264", "aac", "fltp", 18, 51, _STANDARD_RATES),
    "webm": _Encoder("webm", "libvpx-vp9", "libopus", "flt", 24, 63, (48000,)),
    "mkv": _Encoder("matroska", "ffv1", "flac", "s16", 0, 0, ()),
}


def write(video: Video, path: str | os.PathLike[str], kind: str, crf: int | None) -> None:
    """Encode into a file of kind `mp4`, `webm`, `mkv` or `gif`."""
    top = _ENCODERS[kind].max_crf if kind in _ENCODERS else 0
    if crf is not None and not (top and 0 <= crf <= top):
        allowed = f"0 … {top}" if top else "no crf for this format"
        raise ValueError(f"crf is {crf} for {kind}, expected {allowed}")
    with (
        replacing(path) as temporary,
        translating(os.fspath(path), ffmpeg_failures(), f"cannot be written as {kind}"),
    ):
        if kind == "gif":
            _write_gif(video, os.fspath(temporary))
        else:
            _write_container(video, os.fspath(temporary), _ENCODERS[kind], crf)


def _write_container(video: Video, path: str, encoder: _Encoder, crf: int | None) -> None:
    import av

    with av.open(path, "w", format=encoder.container) as container:
        pictures = _picture_stream(container, video, encoder, crf)
        sound = None if video.audio is None else _playable(video.audio, encoder)
        track = None if sound is None else _sound_stream(container, sound, encoder)
        for index, frame in enumerate(_frames(video, pictures)):
            frame.pts = index
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        if sound is not None and track is not None:
            for block in _sound_frames(sound, encoder):
                container.mux(track.encode(block))
            container.mux(track.encode(None))


def _picture_stream(container: Any, video: Video, encoder: _Encoder, crf: int | None) -> Any:
    # 29.97 is 30000/1001; anything finer than thousandths is not a rate that players know.
    rate = Fraction(video.fps).limit_denominator(1001)
    stream = container.add_stream(encoder.video, rate=rate)
    stream.height, stream.width = video.height, video.width
    if encoder.max_crf:
        stream.options = {"crf": str(encoder.default_crf if crf is None else crf)}
        # H.264 halves the colour planes only for even sizes.
        even = video.height % 2 == 0 and video.width % 2 == 0
        stream.pix_fmt = "yuv420p" if even or encoder.video != "libx264" else "yuv444p"
        _tag_colours(stream.codec_context)
    else:
        stream.pix_fmt = "bgr0"
    if encoder.video == "libvpx-vp9":
        stream.codec_context.bit_rate = 0  # constant quality
        stream.options = {**stream.options, "row-mt": "1", "cpu-used": "4"}
    return stream


def _tag_colours(context: Any) -> None:
    """Say that the colours are BT.709, limited range, so that every player converts back alike."""
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    context.colorspace = Colorspace.ITU709
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.color_range = ColorRange.MPEG


def _frames(video: Video, stream: Any) -> Iterator[Any]:
    import av
    from av.video.reformatter import Colorspace

    for picture in video.frames:
        pixels = np.ascontiguousarray(picture.cpu().numpy().transpose(1, 2, 0))
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        if stream.pix_fmt.startswith("yuv"):
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=Colorspace.ITU709)
        yield frame


def _playable(audio: Audio, encoder: _Encoder) -> Audio:
    """At most two channels, at a rate that the encoder knows (the next one above, else the highest)."""
    if audio.channels > 2:
        audio = audio.mono()
    if not encoder.rates or audio.rate in encoder.rates:
        return audio
    above = [rate for rate in encoder.rates if rate >= audio.rate]
    return audio.resample(min(above, default=max(encoder.rates)))


def _sound_stream(container: Any, audio: Audio, encoder: _Encoder) -> Any:
    stream = container.add_stream(encoder.audio, rate=audio.rate)
    stream.layout = "mono" if audio.channels == 1 else "stereo"
    stream.format = encoder.sample_format
    return stream


def _sound_frames(audio: Audio, encoder: _Encoder) -> Iterator[Any]:
    import av

    layout = "mono" if audio.channels == 1 else "stereo"
    planar = encoder.sample_format.endswith("p")
    done = 0
    for block in audio.samples.detach().cpu().split(_BLOCK, dim=1):
        part = Audio(block.contiguous(), audio.rate)
        array = part.to_numpy(np.int16 if encoder.sample_format == "s16" else np.float32)
        if not planar:
            array = np.ascontiguousarray(array.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(array, format=encoder.sample_format, layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = audio.rate, done, Fraction(1, audio.rate)
        done += part.samples.shape[1]
        yield frame


def _write_gif(video: Video, path: str) -> None:
    """Pillow chooses 256 colours for each frame; FFmpeg's encoder would use one fixed palette."""
    import PIL.Image

    pictures = [PIL.Image.fromarray(picture) for picture in video.to_numpy()]
    # GIF counts in hundredths of a second; rounding the sum, not each, keeps the pace.
    ticks = [round(100 * index / video.fps) for index in range(len(pictures) + 1)]
    durations = [10 * (stop - start) for start, stop in pairwise(ticks)]
    pictures[0].save(
        path, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )
