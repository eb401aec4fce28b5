"""Bringing a picture to a codec's square and back: crop (as published), resize (the whole picture), pad.

What decode can undo it undoes from the stream's meta: resize and pad give the source's size back, a crop cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modalities.image import Image
from ..codec import Codec, Fit, Rng
from ..stream import TokenStream

FITS = ("crop", "resize", "pad")
MAX_SIDE = 1 << 14  # a decoded picture's side: a foreign stream's meta must not ask for gigabytes


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Options of picture codecs' `encode` and `decode`.

    Args:
        fit: "crop", "resize" or "pad" instead of the codec's own; None keeps it. (encode)
        native: give the codec's own size instead of the source's. (decode)
    """

    fit: Fit | None = None
    native: bool = False

    def __post_init__(self):
        if self.fit is not None and self.fit not in FITS:
            raise ValueError(f"fit is {self.fit!r}, expected one of {', '.join(FITS)}")


def fit_pictures(
    pictures: Sequence[Image], size: int, fit: Fit
) -> tuple[Tensor, list[dict[str, object]]]:
    """Opaque pictures (alpha over white) as pixels [B, 3, size, size] in [0, 1], and the meta that undoes it.

    Crop resizes the shorter side (bicubic, antialiased) and takes the centre, as the published evaluations do; those
    round to 8 bits after resizing, this does not.
    """
    pixels = torch.stack([_fitted(_opaque(p, i), size, fit) for i, p in enumerate(pictures)])
    return pixels, [{"size": [p.height, p.width], "fit": fit} for p in pictures]


def restore_picture(pixels: Tensor, meta: Mapping[str, object], *, native: bool = False) -> Image:
    """Pixels [3, S, S] as a picture of the source's size, where `meta` names one and the fit can be undone."""
    picture = Image(pixels.detach().float().cpu().clamp(0, 1).contiguous())
    size, fit = meta.get("size"), meta.get("fit")
    if native or size is None or fit not in ("resize", "pad"):
        return picture
    height, width = _checked_size(size)
    if fit == "pad":
        inner = _scaled_size(height, width, picture.height, longer=True)
        picture = picture.crop_center(*inner)
    return picture if pixels.shape[1:] == (height, width) else picture.resize(height, width)


def decode_pictures(
    codec: Codec, streams: Sequence[TokenStream], options: PictureOptions | None
) -> list[Image]:
    """Streams of a one-part codec to pictures; those of one shape go through `detokenize` together.

    `detokenize` takes codes [B, N] from codecs of one code a position, else [B, N, depth], and the grid where streams
    have one.
    """
    for stream in streams:
        codec.check(stream)
    pictures: dict[int, Image] = {}
    native = options is not None and options.native
    flat = len(codec.spec.vocab[0]) == 1
    for shape, grid in {(stream.codes.shape, stream.grid) for stream in streams}:
        rows = [i for i, s in enumerate(streams) if (s.codes.shape, s.grid) == (shape, grid)]
        codes = torch.stack([streams[i].codes for i in rows]).to(codec.device)
        codes = codes[..., 0] if flat else codes
        pixels = codec.detokenize(codes, grid) if grid else codec.detokenize(codes)
        for i, picture in zip(rows, pixels):
            pictures[i] = restore_picture(picture, streams[i].meta, native=native)
    return [pictures[i] for i in range(len(streams))]


class PictureCodec(Codec):
    """The media side of a codec whose tokens are one table of codes a picture.

    A subclass has a `config` with `image_size`, and writes `tokenize` and `detokenize`; see `decode_pictures`.
    """

    config: Any

    def side(self, options: PictureOptions | None) -> int:
        """The side that pictures are brought to."""
        return self.config.image_size

    def grid(self, side: int) -> tuple[int, ...]:
        """The grid of a stream of that side; () where tokens have no places."""
        return ()

    @torch.no_grad()
    def encode(
        self,
        media: Sequence[Image],
        *,
        options: PictureOptions | None = None,
        rng: Rng | None = None,
    ) -> list[TokenStream]:
        """Pictures to streams; nothing is random."""
        if not media:
            return []
        side = self.side(options)
        pixels, metas = fit_pictures(media, side, (options and options.fit) or self.spec.fit)
        codes = self.tokenize(pixels.to(self.device, self.dtype))
        grid = self.grid(side)
        return [self.stream(row, grid=grid, meta=meta) for row, meta in zip(codes, metas)]

    @torch.no_grad()
    def decode(
        self,
        streams: Sequence[TokenStream],
        *,
        options: PictureOptions | None = None,
        rng: Rng | None = None,
    ) -> list[Image]:
        """Streams to pictures; those of one shape and grid are decoded together."""
        return decode_pictures(self, streams, options)


def _opaque(picture: Image, index: int) -> Image:
    if not isinstance(picture, Image):
        raise TypeError(f"item {index} is a {type(picture).__name__}, expected an Image")
    if not torch.isfinite(picture.pixels).all():
        raise ValueError(f"picture {index} holds NaN or infinite values, expected [0, 1]")
    return picture.over()


def _fitted(picture: Image, size: int, fit: Fit) -> Tensor:
    height, width = picture.height, picture.width
    if fit == "resize":
        return picture.resize(size, size).pixels
    inner = _scaled_size(height, width, size, longer=fit == "pad")
    pixels = picture.resize(*inner).pixels
    if fit == "pad":
        top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
        edges = (left, size - inner[1] - left, top, size - inner[0] - top)
        return F.pad(pixels, edges, value=1.0)
    top, left = round((inner[0] - size) / 2), round((inner[1] - size) / 2)
    return pixels[:, top : top + size, left : left + size]


def _scaled_size(height: int, width: int, size: int, *, longer: bool) -> tuple[int, int]:
    """Height and width with the shorter (or longer) side at `size`, the other rounded down, at least 1."""
    reference = max(height, width) if longer else min(height, width)
    return max(1, height * size // reference), max(1, width * size // reference)


def _checked_size(size: object) -> tuple[int, int]:
    whole = isinstance(size, (list, tuple)) and len(size) == 2
    if not whole or not all(isinstance(n, int) and 1 <= n <= MAX_SIDE for n in size):
        raise ValueError(
            f"the stream's meta has the size {size}, expected [height, width] up to {MAX_SIDE}"
        )
    return size[0], size[1]
