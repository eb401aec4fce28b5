"""Trains an `XAR` on pictures with names: next-X prediction in the latents of any `LatentCodec`.

- The condition is the words of a row's text and style, as labels whose embeddings are added; it is left out in a tenth
  of the rows (`drop`), so that guidance exists.
- Flow matching with noisy context: a logit-normal time for every entity of every row.
- Latents are computed once. Where the config names no codec, principal components of patches are fitted to the training
  pictures (`codecs/image/patches.py`), always the same.

The product is a directory, `model/xar.safetensors` and `model/latents.safetensors`, that `load_pictures` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..codecs.codec import Codec
from ..codecs.image.patches import PatchLatents, PatchLatentsConfig
from ..codecs.published import WeightsError, read_weights, save_codec
from ..codecs.registry import load_codec
from ..codecs.training.data import Pictures, find_rows
from ..codecs.training.engine import Task, adamw
from ..codecs.training.entry import settings
from .conditions import dropped
from .xar import XAR, XARConfig, load_xar, save_xar

NETWORK, LATENTS = "xar.safetensors", "latents.safetensors"
CHUNK = 64  # pictures or rows that are encoded or evaluated together


@dataclass(frozen=True, kw_only=True)
class XARDataConfig:
    """Where pictures and their latents come from.

    Args:
        root, sets: as `find_rows`; a row has "image", and its words in "text" and, where it has one, "style".
        image_size: side of the pictures; they are laid on white.
        latents: name or file of a `LatentCodec`; None fits patches.
        patch, channels: of fitted patches.
        drop: how often the condition is left out.
    """

    root: str = "data"
    sets: tuple[str, ...] = ("emoji",)
    image_size: int = 64
    latents: str | None = None
    patch: int = 4
    channels: int = 16
    drop: float = 0.1


@dataclass(frozen=True)
class NamedPictures:
    """What draws pictures of words: a network, the words that it knows, and the codec of its latents."""

    network: XAR
    words: tuple[str, ...]
    codec: Codec

    def labels(self, text: str) -> tuple[int, ...]:
        """The labels of a text's words.

        Raises:
            ValueError: a word that was not in the training data.
        """
        known = {word: i for i, word in enumerate(self.words)}
        wanted = words_of(text)
        if missing := [word for word in wanted if word not in known]:
            raise ValueError(f"{text!r}: the network knows no {', '.join(map(repr, missing))}")
        return tuple(known[word] for word in wanted)


class XARTask(Task):
    """See the module's docstring.

    Args:
        config: {"model": XARConfig without channels, grid and classes, "data": XARDataConfig, "optimizer": {...}}.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.data = settings(XARDataConfig, config.get("data", {}), "data")
        rows = {split: self._rows(split) for split in ("train", "held")}
        self.words = tuple(sorted({w for row in rows["train"] for w in row_words(row)}))
        pixels = {split: self._pixels(own) for split, own in rows.items()}
        self.codec = self._codec(pixels["train"])
        self.sets = {
            split: Latents(self._latents(pixels[split]), self._labels(rows[split]))
            for split in rows
        }
        _, channels, *grid = self.sets["train"].latents.shape
        sizes = {"channels": channels, "grid": tuple(grid), "classes": len(self.words)}
        self.model = settings(XARConfig, {**config.get("model", {}), **sizes}, "model")

    def networks(self) -> dict[str, nn.Module]:
        """The network alone."""
        return {"xar": XAR(self.model)}

    def dataset(self) -> Dataset:
        """Latents and labels of the split "train"."""
        return self.sets["train"]

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW with the published betas."""
        published = {"betas": (0.9, 0.96), "weight_decay": 0.02}
        return adamw(parameters, **{**published, **self.config.get("optimizer", {})})

    def losses(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Mean squared error of the velocity."""
        network = networks["xar"]
        assert isinstance(network, XAR)
        labels = batch["labels"]
        without = dropped(len(labels), self.data.drop, rng, labels.device)
        labels = torch.where(without[:, None], network.null(labels), labels)
        return {"loss": _loss(network, batch["latents"], labels, rng)}

    def evaluate(self, networks: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """The same on held-out pictures, always at the same times and noise."""
        network, held = networks["xar"], self.sets["held"]
        assert isinstance(network, XAR)
        device = network.pred.weight.device
        rng = torch.Generator().manual_seed(0)
        parts = zip(held.latents.split(CHUNK), held.labels.split(CHUNK))
        total = sum(
            float(_loss(network, latents.to(device), labels.to(device), rng)) * len(latents)
            for latents, labels in parts
        )
        return {"flow": total / len(held)}

    def export(self, networks: Mapping[str, nn.Module], path: Path) -> None:
        """Write the directory `model` beside `path`."""
        network = networks["xar"]
        assert isinstance(network, XAR)
        folder = path.with_name("model")
        folder.mkdir(exist_ok=True)
        save_codec(self.codec, folder / LATENTS)
        stored = load_codec(str(folder / LATENTS)).fingerprint  # of the file, as readers see it
        about: dict[str, object] = {"words": list(self.words), "latents": stored}
        about |= {"trained_on": list(self.data.sets), "image_size": self.data.image_size}
        save_xar(network, folder / NETWORK, name=self.config.get("name", "xar"), about=about)

    def _rows(self, split: str) -> list[dict[str, Any]]:
        return find_rows(self.data.root, self.data.sets, modality="image", splits=(split,))

    def _pixels(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        """uint8 [N, 3, S, S], on white."""
        size = (self.data.image_size, self.data.image_size)
        pictures = Pictures(rows, size)
        return torch.stack([_on_white(pictures[i]) for i in range(len(pictures))])

    def _codec(self, pixels: Tensor) -> Codec:
        if self.data.latents is not None:
            return load_codec(self.data.latents)
        config = PatchLatentsConfig(
            patch=self.data.patch, channels=self.data.channels, size=self.data.image_size
        )
        name = f"patches/{'-'.join(self.data.sets)}"
        return PatchLatents.fit(_floats(pixels[:: -(-len(pixels) // 2000)]), config, name=name)

    @torch.no_grad()
    def _latents(self, pixels: Tensor) -> Tensor:
        """[N, C, h, w]."""
        encode = getattr(self.codec, "encode_latents", None)
        if encode is None:
            raise ValueError(f"data.latents: '{self.codec.spec.name}' has no continuous latents")
        return torch.cat([encode(_floats(part)) for part in pixels.split(CHUNK)])

    def _labels(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        """[N, n] places in `words`, -1 where a row has fewer; words that training never saw are left out."""
        known = {word: i for i, word in enumerate(self.words)}
        lists = [[known[w] for w in row_words(row) if w in known] for row in rows]
        most = max(map(len, lists))
        return torch.tensor([own + [-1] * (most - len(own)) for own in lists])


class Latents(Dataset):
    """Latents [N, C, h, w] and labels [N, n]."""

    def __init__(self, latents: Tensor, labels: Tensor):
        self.latents, self.labels = latents, labels

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"latents": self.latents[index], "labels": self.labels[index]}


def load_pictures(folder: str | Path) -> NamedPictures:
    """Read what `XARTask` exported.

    Raises:
        WeightsError: the network was trained on the latents of another codec than the one that lies there.
    """
    folder = Path(folder)
    about = read_weights(folder / NETWORK).config
    codec = load_codec(str(folder / LATENTS))
    if about.get("latents") != codec.fingerprint:
        raise WeightsError(
            f"{folder}: {NETWORK} was trained on latents of fingerprint {about.get('latents')}, "
            f"{LATENTS} has {codec.fingerprint}"
        )
    return NamedPictures(load_xar(folder / NETWORK), tuple(about["words"]), codec)


def words_of(text: str) -> list[str]:
    """The words of a text, each once, in order."""
    return list(dict.fromkeys(text.lower().split()))


def row_words(row: Mapping[str, Any]) -> list[str]:
    """The words of a row's style and text."""
    return words_of(f"{row.get('style', '')} {row.get('text', '')}")


def _loss(network: XAR, latents: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
    rows, device = len(latents), latents.device
    shapes = (rows, len(network.entities)), (rows, network.entities.length, latents.shape[1])
    times, noise = (torch.randn(s, generator=rng, device=rng.device).to(device) for s in shapes)
    return network.loss(latents, labels, times.sigmoid(), noise)


def _on_white(picture: Tensor) -> Tensor:
    """uint8 [4, H, W] with alpha to [3, H, W]."""
    pixels, alpha = picture[:3].float(), picture[3:].float() / 255
    return (pixels * alpha + 255 * (1 - alpha)).round().to(torch.uint8)


def _floats(pixels: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float() / 127.5 - 1
