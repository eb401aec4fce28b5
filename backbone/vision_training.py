"""Training our own ViT: it names what is on emoji and on frames of rendered clips, from its CLS token.

The same thing in another artist's style, size, place or moment has the same name, so CLS has to find the thing. The
classifier reads CLS behind the last block and is thrown away at the end.

    python -m anytok.backbone.train vision_mini --data FOLDER

B pictures, H W pixels, C names, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs.training.data import Clips, Pictures, find_rows
from ..codecs.training.engine import Task, adamw
from ..codecs.training.entry import settings
from ..codecs.training.loader import RandomDataset
from .vision import MiniViTConfig, VisionEncoder, mini_vit, save_vision

SMALLEST = 0.6  # of its size, that augmentation shows a picture at


@dataclass(frozen=True, kw_only=True)
class VisionData:
    """What is learned from.

    Args:
        root: the folder of the sets.
        pictures, clips: sets below it with pictures and with videos whose rows have a "name".
        most_clips: only the first so many of each split; None for all.
        smoothing: of the names' one-hot targets.
    """

    root: str = "data"
    pictures: tuple[str, ...] = ("emoji",)
    clips: tuple[str, ...] = ("motion",)
    most_clips: int | None = None
    smoothing: float = 0.1


class Namer(nn.Module):
    """The encoder and a classifier on its CLS token."""

    def __init__(self, config: MiniViTConfig, names: int):
        super().__init__()
        self.encoder = mini_vit(config)
        self.head = nn.Linear(config.width, names)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, C] of pixels [B, 3, H, W] in 0 ... 1."""
        model = self.encoder.model
        return self.head(model.forward_features(self.encoder.normalise(pixels))[:, 0])


class Named(RandomDataset):
    """Pictures and frames with the number of their name: {"pixels": uint8 [4, H, W], "name": int}."""

    def __init__(self, data: VisionData, split: str, size: int, names: Mapping[str, int]):
        self.items: list[tuple[Any, int]] = []  # (its data set, the number in it)
        self.labels: list[int] = []
        for modality, sets in (("image", data.pictures), ("video", data.clips)):
            if not sets:
                continue
            rows = find_rows(data.root, sets, modality=modality, splits=(split,))
            rows = [row for row in rows if row["name"] in names]
            if modality == "video":
                rows = rows[: data.most_clips]
            if not rows:
                continue
            if modality == "image":
                source: Any = Pictures(rows, (size, size))
            else:
                source = Clips(rows, frames=1, size=(size, size))
            numbers = range(len(source)) if modality == "image" else _middles(source)
            self.items += [(source, number) for number in numbers]
            self.labels += [names[row["name"]] for row in rows]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, number = self.items[index]
        return self._sample(source[number], index)

    def draw(self, index: int, rng: torch.Generator) -> dict[str, Any]:
        """The picture, or any frame of the clip."""
        source, number = self.items[index]
        found = source.draw(number, rng) if isinstance(source, Clips) else source[number]
        return self._sample(found, index)

    def _sample(self, found: Tensor, index: int) -> dict[str, Any]:
        if found.ndim == 4:  # a clip of one frame
            found = torch.cat([found[0], torch.full_like(found[0, :1], 255)])
        return {"pixels": found, "name": self.labels[index]}


class VisionTask(Task):
    """See the module's docstring. Config: "model": MiniViTConfig, "data": VisionData, "optimizer"."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.model = settings(MiniViTConfig, config.get("model", {}), "model")
        self.data = settings(VisionData, config["data"], "data")
        rows = [
            row
            for modality, sets in (("image", self.data.pictures), ("video", self.data.clips))
            if sets
            for row in find_rows(self.data.root, sets, modality=modality)
        ]
        self.names = {name: i for i, name in enumerate(sorted({row["name"] for row in rows}))}

    def networks(self) -> dict[str, nn.Module]:
        """The encoder with its classifier."""
        return {"vision": Namer(self.model, len(self.names))}

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW."""
        return adamw(parameters, **self.config.get("optimizer", {}))

    def dataset(self) -> Named:
        """The split "train"."""
        return Named(self.data, "train", self.model.size, self.names)

    def augment(self, batch: dict[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
        """Pictures [B, 3, H, W] in 0 ... 1: over a colour, mirrored or not, smaller, elsewhere."""
        rgba = batch["pixels"].float() / 255
        many = len(rgba)

        def chance(*shape: int) -> Tensor:
            return torch.rand(many, *shape, generator=rng, device=rng.device)

        scale = SMALLEST + (1 - SMALLEST) * chance()
        mirrored = torch.where(chance() < 0.5, -1.0, 1.0)
        room = (1 - scale)[:, None] * (2 * chance(2) - 1)
        # affine_grid maps where pixels go to where they come from: the inverse of scale and shift.
        grid = torch.zeros(many, 2, 3, device=rgba.device)
        grid[:, 0, 0], grid[:, 1, 1] = mirrored / scale, 1 / scale
        grid[:, :, 2] = -room / scale[:, None]
        grid[:, 0, 2] *= mirrored
        places = F.affine_grid(grid, list(rgba.shape), align_corners=False)
        moved = F.grid_sample(rgba, places, padding_mode="zeros", align_corners=False)
        return {**batch, "pixels": over(moved, chance(3))}

    def losses(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Cross-entropy of the name."""
        logits = networks["vision"](batch["pixels"]).float()
        loss = F.cross_entropy(logits, batch["name"], label_smoothing=self.data.smoothing)
        return {"loss": loss, "right": (logits.argmax(-1) == batch["name"]).float().mean()}

    @torch.no_grad()
    def evaluate(self, networks: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """Share of right names, first and among five, of held pictures and middle frames whose name was trained."""
        held = Named(self.data, "held", self.model.size, self.names)
        network = networks["vision"]
        device = next(network.parameters()).device
        places = []
        for start in range(0, len(held), 64):
            some = [held[i] for i in range(start, min(start + 64, len(held)))]
            rgba = torch.stack([one["pixels"] for one in some]).float().to(device) / 255
            names = torch.tensor([one["name"] for one in some], device=device)
            logits = network(over(rgba, torch.ones(len(some), 3, device=device)))
            places.append((logits > logits.gather(1, names[:, None])).sum(1).cpu())
        where = torch.cat(places)
        return {f"top{k}": float((where < k).float().mean()) for k in (1, 5)}

    def export(self, networks: Mapping[str, nn.Module], path: Path) -> None:
        """Write the encoder without its classifier."""
        namer = networks["vision"]
        assert isinstance(namer, Namer)
        encoder: VisionEncoder = namer.encoder
        about = {"name": self.config.get("name", "vision/mini"), "names": len(self.names)}
        save_vision(encoder, self.model, path, about=about)


def over(rgba: Tensor, colours: Tensor) -> Tensor:
    """[B, 3, H, W] of pictures [B, 4, H, W] over plain colours [B, 3]."""
    pixels, alpha = rgba[:, :3], rgba[:, 3:]
    return pixels * alpha + colours[..., None, None] * (1 - alpha)


def _middles(clips: Clips) -> list[int]:
    """The piece in the middle of each film."""
    pieces: dict[int, list[int]] = {}
    for number, (film, _) in enumerate(clips.pieces):
        pieces.setdefault(film, []).append(number)
    return [numbers[len(numbers) // 2] for _, numbers in sorted(pieces.items())]
