"""Short clips to and from MP4, through PyAV.

Clips for training are written nearly lossless and with full colour (H.264, 4:4:4): at 64 pixels the
usual halved colour planes would blur what a codec is to learn.
"""

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from anytok.assets.recipes.dataset import save

QUALITY = "10"  # x264's rate factor: 0 is lossless, 23 its default


def write_clip(path: Path, frames: Sequence[np.ndarray], rate: int) -> None:
    """Write RGB frames, each [H, W, 3] uint8, at `rate` frames a second; whole or not at all."""
    height, width, _ = frames[0].shape
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=Fraction(rate))
        video.width, video.height, video.pix_fmt = width, height, "yuv444p"
        video.options = {"crf": QUALITY, "preset": "fast", "threads": "1"}
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
    save(path, stream.getvalue())


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """Every frame of the first video track, [H, W, 3] uint8."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")
