"""Picture codecs side by side on one page: `anytok compare DIR --codecs A,B --out REPORT.html`.

- Every picture is cut to a centred square and brought to one size first, so that all codecs are measured on the same
  pixels; what a codec gives back is brought to that size too.
- A codec with ordered tokens is decoded at 1, 4, 16, ... tokens and all of them.
- JPEG, WebP and AVIF spend at most as many bytes as the codec at each of its points: quality and size reduction are
  searched for each picture, the best PSNR wins. Files hold no metadata; their headers count, as a user would pay them.
- Bytes of a codec are its packed codes and side tensors; a `.tok` file adds under 250 more.
- Distances of features need `anytok[judges]` (Lite2) and `anytok[teachers]` (Lite0, perceptual); without them the
  columns are missing and the page says so. The Frechet distance is between Lite2 features: it compares rows of one
  page, not with published rFID, which is Inception's.
"""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.features
import PIL.Image
import torch
from torch import Tensor

from .codecs import Codec
from .codecs.layout import Prefix
from .codecs.stream import TokenStream
from .modalities import Image, MediaError, measure
from .report import Row

SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.125)
QUALITIES = (0, 2, 5, 10, 20, 30, 45, 60, 75, 90)
FRECHET_LEAST = 128  # pictures below which a Frechet distance says nothing
Batch = Sequence[Image]


@dataclass(frozen=True)
class Point:
    """One way to code all pictures.

    Args:
        name: "onedpiece/mini, 16 tokens".
        curve: what it is a point of: "onedpiece/mini".
        bytes: of each picture [N].
        pictures: what came back.
        seconds: to encode and to decode, a picture; None where it was not timed.
    """

    name: str
    curve: str
    bytes: tuple[float, ...]
    pictures: tuple[Image, ...]
    seconds: tuple[float, float] | None = None

    @property
    def mean_bytes(self) -> float:
        """Of a picture."""
        return sum(self.bytes) / len(self.bytes)


def find_pictures(
    folder: Path, size: int, limit: int | None = None
) -> tuple[list[str], list[Image], list[str]]:
    """Names, pictures [3, size, size], and what could not be read.

    Raises:
        MediaError: no file of the folder is a picture.
    """
    if not folder.is_dir():
        raise MediaError(str(folder), "is no folder; give one with pictures")
    names, pictures, broken = [], [], []
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".gif"}
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    for path in files[:limit]:
        try:
            pictures.append(squared(Image.load(path), size))
        except MediaError as error:
            broken.append(str(error))
            continue
        names.append(str(path.relative_to(folder)))
    if not pictures:
        found = "; ".join(broken) or "it has none"
        raise MediaError(str(folder), f"holds no picture that can be read: {found}")
    return names, pictures, broken


def squared(picture: Image, size: int) -> Image:
    """The centred square over white, size x size."""
    opaque = picture if picture.alpha is None else picture.over()
    side = min(opaque.height, opaque.width)
    cut = opaque.crop_center(side, side)
    return Image(cut.resize(size, size).pixels.clamp(0, 1))


def token_counts(codec: Codec) -> list[int | None]:
    """1, 4, 16, ... and None (all of them); only None where a stream has no prefixes."""
    layout = codec.spec.layout
    if codec.spec.prefix_step != 1 or not isinstance(layout, Prefix):
        return [None]
    counts: list[int | None] = []
    k = 1
    while k < layout.max_length:
        counts.append(k)
        k *= 4
    return [*counts, None]


def through_codec(codec: Codec, pictures: Batch, batch: int = 16) -> Iterator[Point]:
    """A point for each token count."""
    size = pictures[0].height
    streams: list[TokenStream] = []
    began = time.perf_counter()
    for part in _batches(pictures, batch):
        streams += codec.encode(part)
    encoding = (time.perf_counter() - began) / len(pictures)
    name = codec.spec.name
    for count in token_counts(codec):
        cut = [s if count is None else s[: min(count, len(s))] for s in streams]
        began = time.perf_counter()
        back = [p for part in _batches(cut, batch) for p in codec.decode(part)]
        decoding = (time.perf_counter() - began) / len(pictures)
        label = name if token_counts(codec) == [None] else f"{name}, {count or 'all'} tokens"
        yield Point(
            name=label,
            curve=name,
            bytes=tuple(s.bits / 8 for s in cut),
            pictures=tuple(squared(p, size) for p in back),
            seconds=(encoding, decoding),
        )


def file_formats() -> list[str]:
    """What Pillow can write here."""
    formats = ["JPEG"]
    formats += [
        f for f, feature in (("WEBP", "webp"), ("AVIF", "avif")) if PIL.features.check(feature)
    ]
    return formats


class Ladder:
    """Every file that a format makes of a picture, over sizes and qualities; `best(bytes)` chooses one.

    Args:
        kind: "JPEG", "WEBP" or "AVIF".
    """

    def __init__(self, picture: Image, kind: str):
        self.size = picture.height
        whole = picture.to_pil()
        original = np.asarray(whole, dtype=np.float64)
        self.files: list[tuple[int, float, bytes]] = []
        for scale in SCALES:
            side = max(1, round(self.size * scale))
            small = whole.resize((side, side), PIL.Image.Resampling.LANCZOS)
            for quality in QUALITIES:
                content = _file(small, kind, quality)
                error = np.square(np.asarray(self._decoded(content)) - original).mean()
                self.files.append((len(content), float(error), content))

    def best(self, most: float) -> tuple[int, Image]:
        """Bytes and picture of the least error within `most` bytes; the smallest file where none fits."""
        fitting = [f for f in self.files if f[0] <= most] or [min(self.files, key=lambda f: f[0])]
        count, _, content = min(fitting, key=lambda f: f[1])
        return count, Image.from_pil(self._decoded(content))

    def _decoded(self, content: bytes) -> PIL.Image.Image:
        picture = PIL.Image.open(io.BytesIO(content)).convert("RGB")
        return picture.resize((self.size, self.size), PIL.Image.Resampling.BICUBIC)


def _file(picture: PIL.Image.Image, kind: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    if kind == "JPEG":
        picture.save(buffer, kind, quality=max(1, quality), optimize=True)
    elif kind == "WEBP":
        picture.save(buffer, kind, quality=quality, method=6)
    else:
        picture.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def beside(
    points: Sequence[Point], pictures: Batch, track: Callable[[Iterable[Image]], Iterable[Image]]
) -> list[Point]:
    """JPEG, WebP and AVIF at the bytes of each point, picture by picture."""
    found = []
    for kind in file_formats():
        ladders = [Ladder(picture, kind) for picture in track(pictures)]
        budgets = sorted({point.bytes for point in points}, key=sum)
        last = None
        for budget in budgets:
            chosen = [ladder.best(most) for ladder, most in zip(ladders, budget)]
            sizes = tuple(float(count) for count, _ in chosen)
            if sizes == last:  # the smallest files already: a tighter budget changes nothing
                continue
            last = sizes
            mean = sum(sizes) / len(sizes)
            images = tuple(image for _, image in chosen)
            found.append(Point(f"{kind}, {mean:,.0f} bytes", kind, sizes, images))
    return found


@dataclass(frozen=True)
class Judges:
    """What compares features, where it is installed; `missing` says what is not, and how to get it."""

    perceptual: Callable[[Batch, Batch], float] | None
    features: Callable[[Batch], Tensor] | None
    missing: tuple[str, ...]


@functools.cache
def judges() -> Judges:
    """Those that are installed."""
    perceptual = features = None
    missing = []
    try:
        from .codecs.training.perceptual import PerceptualDistance

        perceptual = functools.partial(_perceptual, PerceptualDistance())
    except ImportError as error:
        missing.append(str(error))
    try:
        from .judges.image import PictureJudge

        features = PictureJudge().features
    except ImportError as error:
        missing.append(str(error))
    return Judges(perceptual, features, tuple(missing))


@torch.inference_mode()
def _perceptual(network, back: Batch, originals: Batch) -> float:
    values = [
        network(torch.stack([p.pixels for p in a]), torch.stack([p.pixels for p in b]))
        for a, b in zip(_batches(back, 8), _batches(originals, 8))
    ]
    return float(torch.cat(values).mean())


def judged(point: Point, originals: Batch, known: Tensor | None, judge: Judges) -> Row:
    """The figures of a point, as a row of a report.

    Args:
        known: features of the originals [N, 1280], where there is a judge of features.
    """
    pairs = list(zip(point.pictures, originals))
    area = originals[0].height * originals[0].width
    psnrs = [min(measure.psnr(a.pixels, b.pixels), 99.0) for a, b in pairs]
    values: dict[str, float | int | str | None] = {
        "codec": point.curve,
        "bytes": point.mean_bytes,
        "bits per pixel": 8 * point.mean_bytes / area,
        "PSNR, dB": sum(psnrs) / len(psnrs),
        "SSIM": sum(measure.ssim(a.pixels, b.pixels) for a, b in pairs) / len(pairs),
    }
    if judge.perceptual is not None:
        values["perceptual"] = judge.perceptual(point.pictures, originals)
    if judge.features is not None and known is not None:
        found = judge.features(point.pictures)
        values["features, 1 - cosine"] = 1 - float(torch.cosine_similarity(found, known).mean())
        if len(originals) >= FRECHET_LEAST:
            values["Frechet, Lite2"] = frechet(found, known)
    if point.seconds is not None:
        values["encode, ms"] = 1000 * point.seconds[0]
        values["decode, ms"] = 1000 * point.seconds[1]
    return Row(point.name, {}, values)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between normal distributions fitted to features [N, d] and [M, d] (Heusel et al. 2017).

    The trace of the root of the covariances' product comes from singular values of the centred data's product, which
    is exact and needs no d x d root.
    """
    x, y = ((f - f.mean(0)).double() / (len(f) - 1) ** 0.5 for f in (a, b))
    root = torch.linalg.svdvals(x @ y.T).sum()
    gap = (a.double().mean(0) - b.double().mean(0)).square().sum()
    return float((gap + x.square().sum() + y.square().sum() - 2 * root).clamp(min=0))


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
