"""Films: uint8 frames at a constant rate with their sound, read from and written to MP4, WebM, MKV and GIF.

- FFmpeg (PyAV) decodes. Frames are placed by their time stamps: at each tick k / fps the frame that is then on
  screen. So a variable rate (phones, screen recordings, GIFs) becomes a constant one without drifting from the sound.
- A phone's rotation mark is applied. Sound is cut or padded with silence to begin with the picture.
- What is too long for memory is read by `Video.open`, a chunk at a time.

Letters: T frames, H height, W width, C sound channels, N sound samples.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .audio import Audio, AudioReader, ffmpeg_failures, ffmpeg_reader, open_container
from .complete import refuse_truncated
from .errors import MediaError, translating
from .files import Source, describe, format_of, name_of, opened, sniff

if TYPE_CHECKING:
    import av.container

MAX_FRAME_PIXELS = 2**24  # 16 million: twice 4K
MAX_BYTES = 2**30  # of decoded frames in `load`; pass `max_bytes` for more
MAX_FPS = 240.0
MAX_GAP_SECONDS = 600.0  # a longer jump between time stamps is an attack or a defect
CHUNK_FRAMES = 32
SAVE_SUFFIXES = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mp4",
    ".webm": "webm",
    ".mkv": "mkv",
    ".gif": "gif",
}
_FFMPEG_FORMATS = {"mp4": "mov", "matroska": "matroska", "avi": "avi", "gif": "gif"}


@dataclass(frozen=True, eq=False)
class Video:
    """A film.

    Attributes:
        frames: [T, 3, H, W] uint8, sRGB.
        fps: frames per second, constant.
        audio: its sound, beginning with the first frame, or None.
    """

    frames: Tensor
    fps: float
    audio: Audio | None = None
    modality: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        shape = tuple(self.frames.shape)
        if len(shape) != 4 or shape[1] != 3 or 0 in shape:
            raise ValueError(f"frames are {shape}, expected [T, 3, H, W]")
        if self.frames.dtype != torch.uint8:
            raise ValueError(f"frames are {self.frames.dtype}, expected torch.uint8")
        if not 0 < self.fps <= MAX_FPS:
            raise ValueError(f"fps is {self.fps}, expected more than 0 and at most {MAX_FPS}")

    @property
    def height(self) -> int:
        """Rows."""
        return self.frames.shape[2]

    @property
    def width(self) -> int:
        """Columns."""
        return self.frames.shape[3]

    @property
    def seconds(self) -> float:
        """Duration of the picture."""
        return len(self.frames) / self.fps

    @classmethod
    def load(cls, source: Source, *, fps: float | None = None, max_bytes: int = MAX_BYTES) -> Video:
        """Read a whole film, from a path or from bytes.

        Args:
            source: where from.
            fps: the constant rate to read at; None takes the file's average rate.
            max_bytes: limit for the decoded frames; `Video.open` reads any length.

        Raises:
            MediaError: empty, cut short, of another kind, without picture, or above a limit.
        """
        with cls.open(source, chunk_frames=1, fps=fps) as reader:
            frames = []
            for frame in reader.ticks:
                frames.append(frame)
                if len(frames) * frame.nbytes > max_bytes:
                    cause = f"decodes to more than max_bytes={max_bytes}; read it with Video.open"
                    raise MediaError(name_of(source), cause)
            if not frames:
                raise MediaError(name_of(source), "holds no frames")
            sound = reader.sound(math.ceil(len(frames) / reader.fps * reader.sound_rate))
        return cls(_stacked(frames), reader.fps, sound)

    @classmethod
    @contextmanager
    def open(
        cls, source: Source, chunk_frames: int = CHUNK_FRAMES, *, fps: float | None = None
    ) -> Iterator[VideoReader]:
        """Read a film of any length in constant memory.

            with Video.open("film.mkv", chunk_frames=17, fps=8) as reader:
                for chunk in reader:  # each a Video with its share of the sound; the last may be shorter
                    ...

        Raises:
            MediaError: as `load`, but of any length; also while iterating, where the file breaks.
        """
        if chunk_frames < 1:
            raise ValueError(f"chunk_frames is {chunk_frames}, expected at least 1")
        if fps is not None and not 0 < fps <= MAX_FPS:
            raise ValueError(f"fps is {fps}, expected more than 0 and at most {MAX_FPS}")
        name = name_of(source)
        with opened(source) as pictures, opened(source) as sounds:
            kind = _kind(pictures, name)
            with (
                open_container(pictures, _FFMPEG_FORMATS[kind], name) as container,
                _open_sound(sounds, kind, name) as sound,
            ):
                yield VideoReader(container, sound, fps, chunk_frames, name)

    def save(self, path: str | os.PathLike[str], *, crf: int | None = None) -> None:
        """Write a film, as the extension says.

        | extension | picture | sound |
        |---|---|---|
        | .mp4, .mov | H.264 (`crf` 0 … 51, default 18) | AAC |
        | .webm | VP9 (`crf` 0 … 63, default 24) | Opus |
        | .mkv | FFV1, lossless | FLAC, 16 bit |
        | .gif | 256 colours per frame | none: GIF has no sound |

        Raises:
            MediaError: unknown extension, or the folder cannot be written.
            ValueError: a `crf` for a format without one.
        """
        from . import videofile

        videofile.write(self, path, format_of(path, SAVE_SUFFIXES), crf)

    @classmethod
    def from_numpy(cls, frames: np.ndarray, fps: float, audio: Audio | None = None) -> Video:
        """From [T, H, W, 3] uint8."""
        if frames.dtype != np.uint8 or frames.ndim != 4:
            raise ValueError(
                f"frames are {frames.shape} {frames.dtype}, expected [T, H, W, 3] uint8"
            )
        planes = rearrange(torch.from_numpy(np.array(frames)), "t h w c -> t c h w")
        return cls(planes.contiguous(), fps, audio)

    def to_numpy(self) -> np.ndarray:
        """[T, H, W, 3] uint8."""
        return rearrange(self.frames.cpu(), "t c h w -> t h w c").contiguous().numpy()

    def resize(self, height: int, width: int) -> Video:
        """Resample each frame to [height, width], bicubic with antialiasing."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resize

        if min(height, width) < 1:
            raise ValueError(f"size is {height} × {width}, expected at least 1 × 1")
        mode = InterpolationMode.BICUBIC
        # A few frames at a time: the intermediate floats take four times the room.
        parts = [resize(p, [height, width], mode, antialias=True) for p in self.frames.split(16)]
        return Video(torch.cat(parts), self.fps, self.audio)

    def at_fps(self, fps: float) -> Video:
        """The same film at another rate: at each new tick the frame that is then on screen."""
        if not 0 < fps <= MAX_FPS:
            raise ValueError(f"fps is {fps}, expected more than 0 and at most {MAX_FPS}")
        count = max(1, round(self.seconds * fps))
        # 1e-6 of a frame keeps k / fps · fps from falling one frame short by rounding.
        index = (torch.arange(count, dtype=torch.float64) * (self.fps / fps) + 1e-6).long()
        return Video(self.frames[index.clamp(max=len(self.frames) - 1)], fps, self.audio)


class VideoReader:
    """A film being read; iterating yields `Video` chunks. Made by `Video.open`.

    Attributes:
        fps: the constant rate that frames are placed at.
        height: of a frame, rotation applied.
        width: of a frame, rotation applied.
        ticks: the frames [3, H, W] uint8, one for each tick of the constant rate.
        sound_rate: of the sound, or 0 without sound.
    """

    def __init__(
        self,
        container: av.container.InputContainer,
        sound: AudioReader | None,
        fps: float | None,
        chunk_frames: int,
        name: str,
    ) -> None:
        with translating(name, ffmpeg_failures(), "its picture cannot be read"):
            stream = _picture_stream(container, name)
            self.fps = float(fps or _average_rate(stream, name))
            self._start = float((stream.start_time or 0) * stream.time_base)
            offset = 0.0 if sound is None else _sound_offset(container, self._start)
        self.ticks = _ticks(_decoded(container, stream, name), self.fps, self._start, name)
        self.sound_rate = 0 if sound is None else sound.rate
        self._chunk_frames = chunk_frames
        self._sound = sound
        self._silence = 0
        if sound is not None:
            self._align(sound, offset)

    def __iter__(self) -> Iterator[Video]:
        frames: list[Tensor] = []
        done = 0  # ticks handed out
        for frame in self.ticks:
            frames.append(frame)
            if len(frames) == self._chunk_frames:
                yield self._chunk(frames, done)
                done += len(frames)
                frames = []
        if frames:
            yield self._chunk(frames, done)

    def sound(self, count: int) -> Audio | None:
        """The next `count` samples of the sound, fewer at its end; None where there are none."""
        if self._sound is None:
            return None
        silence = min(self._silence, count)
        self._silence -= silence
        samples = self._sound.take(count - silence)
        if silence:
            samples = torch.cat([torch.zeros(len(samples), silence), samples], dim=1)
        return Audio(samples, self.sound_rate) if samples.shape[1] else None

    def _chunk(self, frames: list[Tensor], done: int) -> Video:
        # Boundaries are rounded from the beginning of the film, so that no sample is lost or doubled.
        begin, end = (round(n / self.fps * self.sound_rate) for n in (done, done + len(frames)))
        return Video(_stacked(frames), self.fps, self.sound(end - begin))

    def _align(self, sound: AudioReader, offset: float) -> None:
        """Make the sound begin with the picture: `offset` seconds of silence, or of sound to skip."""
        self._silence = max(0, round(offset * sound.rate))
        skip = max(0, round(-offset * sound.rate))
        while skip and (part := sound.take(min(skip, sound.rate)).shape[1]):
            skip -= part


def _kind(file: BinaryIO, name: str) -> str:
    head = file.read(512)
    kind = sniff(head)
    if kind not in _FFMPEG_FORMATS:
        cause = f"begins {describe(head)}, which is no MP4, WebM, MKV, AVI or GIF"
        raise MediaError(name, cause)
    if kind == "gif":
        # FFmpeg would allocate this canvas before anybody can look at its size.
        _check_size(int.from_bytes(head[8:10], "little"), int.from_bytes(head[6:8], "little"), name)
    refuse_truncated(file, kind, name)
    file.seek(0)
    return kind


@contextmanager
def _open_sound(file: BinaryIO, kind: str, name: str) -> Iterator[AudioReader | None]:
    """The sound through a container of its own, so that picture and sound are read at their own pace."""
    if kind == "gif":
        yield None
        return
    with open_container(file, _FFMPEG_FORMATS[kind], name) as container:
        yield ffmpeg_reader(container, name) if container.streams.audio else None


def _picture_stream(container: Any, name: str) -> Any:
    import av.stream

    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        raise MediaError(name, "holds no moving picture")
    stream = streams[0]
    _check_size(stream.codec_context.height, stream.codec_context.width, name)
    stream.thread_type = "AUTO"
    return stream


def _check_size(height: int, width: int, name: str) -> None:
    if height < 1 or width < 1:
        raise MediaError(name, f"has frames of {width} × {height} pixels")
    if height * width > MAX_FRAME_PIXELS:
        cause = f"has frames of {width} × {height}, more than {MAX_FRAME_PIXELS} pixels"
        raise MediaError(name, cause)


def _average_rate(stream: Any, name: str) -> Fraction:
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate and 0 < rate <= MAX_FPS:
            return rate
    raise MediaError(name, f"states no frame rate of up to {MAX_FPS}; pass fps")


def _sound_offset(container: Any, picture_start: float) -> float:
    """Seconds from the first frame to the first sample."""
    stream = container.streams.audio[0]
    start = stream.start_time
    return 0.0 if start is None else float(start * stream.time_base) - picture_start


def _decoded(
    container: Any, stream: Any, name: str
) -> Iterator[tuple[Tensor, float | None, float]]:
    """Frames [3, H, W] uint8 with their time and duration in seconds (None, 0 where unknown)."""
    size = None
    with translating(name, ffmpeg_failures(), "its picture is damaged"):
        for frame in container.decode(stream):
            _check_size(frame.height, frame.width, name)
            pixels = _upright(_rgb(frame), frame.rotation)
            size = size or pixels.shape
            if pixels.shape != size:
                raise MediaError(name, f"changes its size from {size} to {pixels.shape}")
            seconds = float((frame.duration or 0) * (frame.time_base or 0))
            yield (
                rearrange(torch.from_numpy(pixels), "h w c -> c h w").contiguous(),
                frame.time,
                seconds,
            )


def _rgb(frame: Any) -> np.ndarray:
    """[H, W, 3] uint8; a GIF's transparent pixels become white."""
    if frame.format.name not in ("bgra", "rgba"):
        return frame.to_ndarray(format="rgb24")
    pixels = frame.to_ndarray(format="rgba")
    return np.where(pixels[..., 3:] > 127, pixels[..., :3], np.uint8(255))


def _upright(pixels: np.ndarray, rotation: int) -> np.ndarray:
    """Apply the rotation mark, in degrees counter-clockwise; marks between the axes are ignored."""
    turns = rotation // 90 if rotation % 90 == 0 else 0
    return np.ascontiguousarray(np.rot90(pixels, turns))


def _ticks(
    decoded: Iterator[tuple[Tensor, float | None, float]], fps: float, start: float, name: str
) -> Iterator[Tensor]:
    """Place frames on the ticks of a constant rate.

    A frame belongs to the tick nearest to its time stamp and stays until the next one comes; of several on one tick
    the last is shown; the final frame stays for its duration. Time stamps that are missing follow on, those that run
    backwards count as now.
    """
    held: Tensor | None = None
    tick = 0  # of the held frame
    duration = 0.0
    for frame, time, seconds in decoded:
        place = tick + (held is not None) if time is None else round((time - start) * fps)
        place = max(place, tick)
        if (place - tick) / fps > MAX_GAP_SECONDS:
            raise MediaError(name, f"has a gap of {(place - tick) / fps:.0f} s between two frames")
        if held is None:
            place = min(place, 0)  # the first frame is shown from the beginning
        else:
            for _ in range(place - tick):
                yield held
        held, tick, duration = frame, place, seconds
    if held is not None:
        for _ in range(max(1, round(min(duration, MAX_GAP_SECONDS) * fps))):
            yield held


def _stacked(frames: list[Tensor]) -> Tensor:
    """[T, 3, H, W]; frees each frame as it is copied, so that the film is in memory only once."""
    out = torch.empty(len(frames), *frames[0].shape, dtype=torch.uint8)
    frames.reverse()
    for index in range(len(out)):
        out[index] = frames.pop()
    return out
