"""Training data out of folders: what the recipes write, or any folder of media files.

A recipe's folder has `data.jsonl` (assets/recipes/dataset.py): rows with a split and a path under the modality's name.
In any other folder each file of the modality is a row; a tenth of them, by the hash of their names, is "held".

Decoded media stay in memory in their integer types (a picture of 64 x 64 with alpha is 16 kB); what would exceed
`MAX_CACHE` is decoded anew each time. Random crops of sound and film are drawn from the rng that the engine hands in.

Letters: N items, C channels, H height, W width, T frames, L samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from ...modalities.audio import Audio
from ...modalities.image import Image
from .loader import RandomDataset

MAX_CACHE = 8 * 2**30  # bytes of decoded media a data set keeps
HELD_ONE_IN = 10
SUFFIXES: dict[str, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif"),
    "audio": (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff"),
    "video": (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif"),
    "shape": (".obj", ".ply", ".stl", ".off", ".glb"),
    "text": (".txt", ".md"),
}
Row = dict[str, Any]


class DataError(ValueError):
    """A folder holds nothing to train on, or not what it says; the message says what was expected."""


def find_rows(
    root: str | Path,
    sets: Sequence[str] = (".",),
    *,
    modality: str,
    splits: Sequence[str] = ("train",),
    where: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Rows of some data sets; `row[modality]` is a path that can be opened.

    Args:
        root: the folder of the sets.
        sets: folders below it; "." is `root` itself.
        modality: only rows that have it.
        splits: "train", "held", "unseen", "eval".
        where: further fields that must be equal, such as {"style": "noto"}.
    """
    found: list[Row] = []
    for name in sets:
        folder = Path(root) / name
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; recipes write it: anytok.assets.recipes")
        recipe = (folder / "data.jsonl").is_file()
        rows = _recipe_rows(folder, modality) if recipe else _folder_rows(folder, modality)
        found += [row for row in rows if row["split"] in splits]
    found = [row for row in found if all(row.get(k) == v for k, v in (where or {}).items())]
    if not found:
        raise DataError(
            f"{Path(root)} ({', '.join(sets)}) has no {modality} of split {' or '.join(splits)}"
            + (f" where {dict(where)}" if where else "")
        )
    return found


class Prepared(Dataset):
    """Rows, each turned into a sample once and kept.

    Args:
        rows: what `find_rows` gave.
        prepare: row -> sample, without chance.
    """

    def __init__(self, rows: Sequence[Row], prepare: Callable[[Row], Any]) -> None:
        self.rows, self.prepare = list(rows), prepare
        self.cache: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if index not in self.cache:
            self.cache[index] = self.prepare(self.rows[index])
        return self.cache[index]


class Pictures(Dataset):
    """Pictures of one size, with their alpha: item i is uint8 [4, H, W].

    Args:
        rows: what `find_rows` gave.
        size: (H, W).
        fit: "resize" squeezes the whole picture into the size, "crop" cuts the largest centred piece of its shape.
    """

    def __init__(self, rows: Sequence[Row], size: tuple[int, int], *, fit: str = "resize") -> None:
        if fit not in ("resize", "crop"):
            raise ValueError(f"fit is {fit!r}, expected 'resize' or 'crop'")
        self.rows, self.size, self.fit = list(rows), size, fit
        self.cache: Tensor | None = None  # [N, 4, H, W]
        if len(self.rows) * 4 * size[0] * size[1] <= MAX_CACHE:
            self.cache = torch.empty(len(self.rows), 4, *size, dtype=torch.uint8)
            for i, pixels in enumerate(_in_threads(self._load, self.rows)):
                self.cache[i] = pixels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self._load(self.rows[index]) if self.cache is None else self.cache[index]

    def _load(self, row: Row) -> Tensor:
        image = Image.load(row["image"])
        height, width = self.size
        if self.fit == "crop":
            scale = min(image.height / height, image.width / width)
            image = image.crop_center(max(1, int(height * scale)), max(1, int(width * scale)))
        if (image.height, image.width) != self.size:
            image = image.resize(height, width)
        alpha = torch.ones(1, height, width) if image.alpha is None else image.alpha
        return to_bytes(torch.cat([image.pixels, alpha]))


class Sounds(RandomDataset):
    """Pieces of recordings: a draw is float32 [C, L]. Long recordings count as often as they have pieces.

    Args:
        rows: what `find_rows` gave.
        rate: samples per second.
        length: L, samples of a piece; what is shorter is followed by silence.
        channels: 1 mixes down; 2 needs stereo, or doubles mono.
    """

    def __init__(self, rows: Sequence[Row], *, rate: int, length: int, channels: int = 1) -> None:
        if channels not in (1, 2):
            raise ValueError(f"channels is {channels}, expected 1 or 2")
        self.rows, self.rate, self.length, self.channels = list(rows), rate, length, channels
        self.samples = _in_threads(self._load, self.rows)  # int16 [C, samples] each
        self.pieces = _pieces([s.shape[1] for s in self.samples], length)

    def __len__(self) -> int:
        return len(self.pieces)

    def draw(self, index: int, rng: torch.Generator) -> Tensor:
        """Any piece of the recording that piece `index` belongs to."""
        samples = self.samples[self.pieces[index][0]]
        return self._cut(samples, _offset(samples.shape[1] - self.length, rng))

    def __getitem__(self, index: int) -> Tensor:
        recording, start = self.pieces[index]
        return self._cut(self.samples[recording], start)

    def _cut(self, samples: Tensor, start: int) -> Tensor:
        piece = samples[:, start : start + self.length].float() / 32768
        return functional.pad(piece, (0, self.length - piece.shape[1]))

    def _load(self, row: Row) -> Tensor:
        audio = Audio.load(row["audio"])
        audio = (audio.mono() if self.channels == 1 else audio).resample(self.rate)
        samples = audio.samples.expand(self.channels, -1) if audio.channels == 1 else audio.samples
        if samples.shape[0] != self.channels:
            raise DataError(f"{row['audio']} has {samples.shape[0]} channels, expected 1 or 2")
        return (samples * 32768).round().clamp(-32768, 32767).to(torch.int16)


class Clips(RandomDataset):
    """Pieces of films: a draw is uint8 [T, 3, H, W]. Long films count as often as they have pieces.

    Args:
        rows: what `find_rows` gave.
        frames: T; what is shorter rests on its last frame.
        size: (H, W); the largest centred piece of that shape is cut, then resampled.
        fps: frames per second, chosen as the nearest ones; None keeps the film's own.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        frames: int,
        size: tuple[int, int],
        fps: float | None = None,
    ) -> None:
        self.rows, self.frames, self.size, self.fps = list(rows), frames, size, fps
        self.films = [self._load(row) for row in self.rows]  # a film fills the cores by itself
        self.pieces = _pieces([len(film) for film in self.films], frames)

    def __len__(self) -> int:
        return len(self.pieces)

    def draw(self, index: int, rng: torch.Generator) -> Tensor:
        """Any piece of the film that piece `index` belongs to."""
        film = self.films[self.pieces[index][0]]
        return self._cut(film, _offset(len(film) - self.frames, rng))

    def __getitem__(self, index: int) -> Tensor:
        film, start = self.pieces[index]
        return self._cut(self.films[film], start)

    def _cut(self, film: Tensor, start: int) -> Tensor:
        at = torch.arange(start, start + self.frames).clamp(max=len(film) - 1)
        return film[at]

    def _load(self, row: Row) -> Tensor:
        from ...modalities.video import Video

        video = Video.load(row["video"])
        frames = video.frames
        if self.fps is not None:
            count = max(1, round(len(frames) * self.fps / video.fps))
            at = ((torch.arange(count) + 0.5) * video.fps / self.fps).long()
            frames = frames[at.clamp(max=len(frames) - 1)]
        return torch.cat([self._fitted(part) for part in frames.split(32)])

    def _fitted(self, frames: Tensor) -> Tensor:
        height, width = self.size
        scale = min(frames.shape[2] / height, frames.shape[3] / width)
        h, w = max(1, int(height * scale)), max(1, int(width * scale))
        top, left = (frames.shape[2] - h) // 2, (frames.shape[3] - w) // 2
        cut = frames[:, :, top : top + h, left : left + w]
        if (h, w) == self.size:
            return cut.clone()  # not a view that keeps the whole film in memory
        small = functional.interpolate(
            cut.float(), self.size, mode="bilinear", antialias=True, align_corners=False
        )
        return small.round().clamp(0, 255).to(torch.uint8)


def to_bytes(x: Tensor) -> Tensor:
    """Floats in [0, 1] to uint8."""
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def split_of(name: str) -> str:
    """ "held" for about one name in ten, the same on every machine."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return "held" if int(digest[:8], 16) % HELD_ONE_IN == 0 else "train"


def _recipe_rows(folder: Path, modality: str) -> list[Row]:
    rows = []
    with (folder / "data.jsonl").open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                row["split"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(
                    f"{folder}/data.jsonl, line {number}, is no JSON object with a 'split': {error}"
                ) from error
            if modality in row:
                path = row[modality] if modality == "text" else str(folder / row[modality])
                rows.append(row | {modality: path})
    return rows


def _folder_rows(folder: Path, modality: str) -> list[Row]:
    """Every file of the modality; where the hash holds none of them back, the last name is held."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES[modality] and path.is_file()
    )
    names = [path.relative_to(folder).as_posix() for path in paths]
    rows = [
        {modality: str(path), "split": split_of(name), "source": name}
        for path, name in zip(paths, names)
    ]
    if len(rows) > 1 and len({row["split"] for row in rows}) == 1:
        rows[-1]["split"] = "train" if rows[-1]["split"] == "held" else "held"
    return rows


def _pieces(lengths: Sequence[int], piece: int) -> list[tuple[int, int]]:
    """(item, start) of pieces that cover each item without overlap; at least one an item."""
    return [
        (item, start)
        for item, length in enumerate(lengths)
        for start in range(0, max(1, length - piece + 1), piece)
    ]


def _offset(room: int, rng: torch.Generator) -> int:
    return int(torch.randint(room + 1, (), generator=rng)) if room > 0 else 0


def _in_threads(load: Callable[[Row], Tensor], rows: Sequence[Row]) -> list[Tensor]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(load, rows))
