"""Frames between a source and a codec: size and rate, there and back.

- `fit_frames` brings frames to the codec's size; `unfit_frames` undoes it, as far as it can be undone.
- `Timing` thins a fast source to the codec's rate. A slow source is never repeated: its frames are coded one by one.
- Work goes in chunks, so that a large source never stands in memory as floats.

Letters: F frames, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

CHUNK = 16  # frames that are floats at one time
MAX_EVERY = 1000.0
EPSILON = 1e-6  # frames; 29.97 / 7.4925 is 4, whatever the last bit says


@dataclass(frozen=True)
class Timing:
    """Codec frame j is source frame floor(j * every)."""

    every: float = 1.0

    def __post_init__(self):
        if not 1 <= self.every <= MAX_EVERY:
            raise ValueError(
                f"{self.every} source frames to a codec frame, expected 1 to {MAX_EVERY}"
            )

    @classmethod
    def between(cls, source_fps: float, codec_fps: float) -> Timing:
        """The timing for a source's and a codec's frames a second."""
        if not (math.isfinite(source_fps) and source_fps > 0):
            raise ValueError(f"the source has {source_fps} frames a second, expected more than 0")
        return cls(max(1.0, source_fps / codec_fps))

    def source(self, j: int) -> int:
        """The source frame that codec frame j shows."""
        return int(j * self.every + EPSILON)

    def count(self, n: int) -> int:
        """Codec frames of n source frames."""
        return math.ceil((n - EPSILON) / self.every)

    def shown(self, start: int, stop: int) -> Tensor:
        """For each source frame in start...stop the codec frame that stands for it, [stop - start]."""
        frames = torch.arange(start + 1, stop + 1, dtype=torch.float64)
        return ((frames - EPSILON) / self.every).ceil().long() - 1


def fit_frames(frames: Tensor, size: tuple[int, int], fit: str) -> Tensor:
    """uint8 [F, 3, H, W] to float32 [F, 3, *size] in 0...1: "resize", "crop" the middle, or "pad" with black."""
    source = (frames.shape[-2], frames.shape[-1])
    inner = _inner(source, size, fit)

    def one(chunk: Tensor) -> Tensor:
        return _place(_scale(chunk.float() / 255, inner), size)

    return _chunked(one, frames)


def unfit_frames(frames: Tensor, source: tuple[int, int], fit: str) -> Tensor:
    """float [F, 3, h, w] to uint8 of the source's size; a crop comes back at the source's scale, without margins."""
    size = (frames.shape[-2], frames.shape[-1])
    inner = _inner(source, size, fit)
    kept = (min(inner[0], size[0]), min(inner[1], size[1]))
    target = tuple(max(1, round(s * k / i)) for s, k, i in zip(source, kept, inner))

    def one(chunk: Tensor) -> Tensor:
        return to_bytes(_scale(_place(chunk.clamp(0, 1), kept), target))

    return _chunked(one, frames)


def to_bytes(frames: Tensor) -> Tensor:
    """Floats in 0...1 to uint8, clamped and rounded."""
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8)


def _inner(source: tuple[int, int], size: tuple[int, int], fit: str) -> tuple[int, int]:
    """The size to which the whole source is scaled, before it is cut or padded to `size`."""
    if fit == "resize":
        return size
    if fit not in ("crop", "pad"):
        raise ValueError(f"fit is {fit!r}, expected 'resize', 'crop' or 'pad'")
    ratios = [n / s for s, n in zip(source, size)]
    ratio = max(ratios) if fit == "crop" else min(ratios)
    return max(1, round(source[0] * ratio)), max(1, round(source[1] * ratio))


def _scale(frames: Tensor, size: tuple[int, int]) -> Tensor:
    if frames.shape[-2:] == size:
        return frames
    return nnf.interpolate(frames, size, mode="bilinear", antialias=True).clamp(0, 1)


def _place(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the middle out, or pad around it."""
    for dim, wanted in ((-2, size[0]), (-1, size[1])):
        extra = frames.shape[dim] - wanted
        if extra > 0:
            frames = frames.narrow(dim, extra // 2, wanted)
        elif extra < 0:
            before = -extra // 2
            pad = (before, -extra - before)
            frames = nnf.pad(frames, pad if dim == -1 else (0, 0, *pad))
    return frames


def _chunked(function: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    return torch.cat([function(chunk) for chunk in frames.split(CHUNK)])
