"""Video as it arrives: frames in, tokens out, and back, with the causal layouts of C-ViViT.

The chunks that `EncoderStream` gives, added up, are the stream that encoding the whole clip gives. Each chunk's
`meta["length"]` counts the source frames that it stands for, so `DecoderStream` knows when to stop holding a frame.

Memory: a codec with `temporal_window` keeps that many latent frames; one without keeps all, and
`CViViT.bytes_per_latent_frame` says what each costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from ...modalities.video import Video
from ..stream import StreamError, TokenStream
from .frames import Timing, fit_frames, to_bytes, unfit_frames

if TYPE_CHECKING:
    from .cvivit import CViViT, CViViTOptions

MAX_SIDE = 8192  # pixels
MAX_BYTES = 2**32  # of one decoded video


class EncoderStream:
    """Push pieces of one video, in order, each a `Video` of the same size and rate; then `finish`."""

    def __init__(self, codec: CViViT, options: CViViTOptions):
        self.codec, self.options = codec, options
        self.state = codec.encoder_state()
        self.waiting: list[Tensor] = []  # fitted frames [3, h, w] that are not encoded yet
        self.seen = 0  # source frames
        self.taken = 0  # codec frames fitted
        self.coded = 0  # codec frames encoded
        self.told = 0  # source frames that chunks stand for
        self.fps: float | None = None
        self.size: tuple[int, int] = (0, 0)
        self.timing = Timing()

    def push(self, video: Video) -> TokenStream | None:
        """More frames; the tokens that are complete now, or None."""
        self._same_source(video)
        self._take(video.frames)
        ready = self._ready()
        if not ready:
            return None
        return self._chunk(ready, self.timing.source(self.coded + ready))

    def finish(self) -> TokenStream | None:
        """The last tokens, the last frame repeated where the tube is not full; None where nothing is left."""
        if not self.seen:
            raise ValueError("no frames were pushed, expected at least one")
        if not self.waiting:
            return None
        missing = self.codec.frames_missing(len(self.waiting), first=self.coded == 0)
        self.waiting += [self.waiting[-1]] * missing
        return self._chunk(len(self.waiting), self.seen)

    def _same_source(self, video: Video) -> None:
        size = (video.frames.shape[-2], video.frames.shape[-1])
        if self.fps is None:
            self.fps, self.size = float(video.fps), size
            self.timing = self.codec.timing(self.fps, self.options)
        elif (size, float(video.fps)) != (self.size, self.fps):
            raise ValueError(
                f"frames are {size} at {video.fps} frames a second, the stream began with {self.size} at {self.fps}"
            )

    def _take(self, frames: Tensor) -> None:
        """Fit the frames among these that the codec sees."""
        stop = self.seen + len(frames)
        last = self.timing.count(stop)
        picks = [self.timing.source(j) - self.seen for j in range(self.taken, last)]
        if picks:
            fitted = fit_frames(frames[picks], self.codec.config.size, self.codec.fit(self.options))
            self.waiting += list(fitted)
        self.seen, self.taken = stop, last

    def _ready(self) -> int:
        """Waiting frames that fill whole latent frames, and whose time is over."""
        n = len(self.waiting)
        if n and self.timing.source(self.coded + n) > self.seen:
            n -= 1
        if n == 0:
            return 0
        head = 1 if self.coded == 0 else 0
        tube = self.codec.config.temporal_patch
        return head + (n - head) // tube * tube

    def _chunk(self, n: int, covered: int) -> TokenStream:
        x = torch.stack(self.waiting[:n])[None]
        codes = self.codec.encode_chunk(x, self.state)[0]
        del self.waiting[:n]
        meta = self.codec.meta(
            covered - self.told, self.size, self.fps, self.timing, self.codec.fit(self.options)
        )
        self.coded += n
        self.told = covered
        return self.codec.stream(codes.flatten(), grid=tuple(codes.shape), meta=meta)


class DecoderStream:
    """Push the chunks of one stream, in order."""

    def __init__(self, codec: CViViT, options: CViViTOptions):
        self.codec, self.options = codec, options
        self.state = codec.decoder_state()
        self.shown = 0  # source frames given out
        self.decoded = 0  # codec frames decoded

    def push(self, stream: TokenStream) -> Video:
        """The frames of the next chunk."""
        self.codec.check(stream)
        codes = rearrange(stream.codes, "(t h w) 1 -> 1 t h w", t=stream.grid[0], h=stream.grid[1])
        frames = self.codec.decode_chunk(codes.to(self.codec.device), self.state)[0].float().cpu()
        video = restore(self.codec, frames, stream.meta, self.options, self.decoded, self.shown)
        self.decoded += len(frames)
        self.shown += stream.meta.get("length", 0)
        return video

    def finish(self) -> None:
        """Nothing is kept back: every push gives all of its frames."""


def restore(
    codec: CViViT,
    frames: Tensor,
    meta: dict,
    options: CViViTOptions,
    decoded: int = 0,
    shown: int = 0,
) -> Video:
    """Decoded frames [F, 3, h, w] as a Video: the source's size, rate and length, where `meta` knows them.

    Args:
        decoded: codec frames of this stream that came before these.
        shown: source frames of this stream that came before these.
    """
    if "length" not in meta:
        return Video(frames=to_bytes(frames), fps=codec.config.fps)
    length, size, fps, timing, fit = read_meta(meta)
    # A prefix of a stream ends before its length, and the last tube may be filled up beyond it.
    stop = min(shown + length, timing.source(decoded + len(frames)))
    index = timing.shown(shown, stop) - decoded
    if not len(index) or int(index[0]) < 0:
        raise StreamError(
            f"chunks of a stream are missing or out of order after {shown} source frames"
        )
    frames = frames[: int(index[-1]) + 1]
    if not options.restore:
        return Video(frames=to_bytes(frames), fps=fps / timing.every)
    volume = 3 * len(index) * size[0] * size[1]
    if volume > MAX_BYTES:
        raise StreamError(
            f"{len(index)} frames of {size[0]}x{size[1]} take {volume} bytes, the limit is {MAX_BYTES}; "
            "decode piece by piece with decoder_stream(), or with restore=False"
        )
    return Video(frames=unfit_frames(frames, size, fit)[index], fps=fps)


def read_meta(meta: dict) -> tuple[int, tuple[int, int], float, Timing, str]:
    """Length, size, rate, timing and fit of a source, checked, for they may come from anywhere.

    Raises:
        StreamError: one of them is missing or absurd.
    """
    try:
        length, fps, fit = int(meta["length"]), float(meta["fps"]), str(meta["fit"])
        height, width = (int(n) for n in meta["size"])
        timing = Timing(float(meta.get("every", 1.0)))
    except (KeyError, TypeError, ValueError) as error:
        raise StreamError(f"the stream's meta does not describe a video: {error!r}") from error
    if length < 1 or not 0 < fps < 1e5 or not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise StreamError(
            f"the stream's meta says {length} frames of {height}x{width} at {fps} a second, "
            f"expected sides of 1 to {MAX_SIDE} and a rate below 100000"
        )
    if fit not in ("resize", "crop", "pad"):
        raise StreamError(f"the stream's meta has fit {fit!r}")
    return length, (height, width), fps, timing, fit
