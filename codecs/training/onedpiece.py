"""Trains `onedpiece/mini`: an analytic basis fitted to the data, then the repairing network, with tail drop.

- Data: pictures with alpha (emoji) and crops of photographs, half and half; small affine moves, backgrounds.
- One k for each forward pass, as in One-D-Piece: all tokens for a quarter of the passes, else log-uniform.
- The loss is the squared error over that of the linear picture, so that every k counts alike, plus a little L1 of
  the gradients, on the same terms; and, for a few pictures of the batch, a distance of classifier features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from ...modalities.image import Image
from ..image.onedpiece_mini import OneDPieceMini, OneDPieceMiniConfig
from ..published import save_codec
from ..registry import load_codec
from . import onedpiece_basis
from .data import Pictures, find_rows, to_bytes
from .engine import StopRun, Task, adamw
from .entry import settings
from .onedpiece_stage1 import StageOneTask
from .perceptual import PerceptualDistance

SOURCE = 128  # side of the pictures that augmentation draws from
BUDGETS = (4, 16, 64)  # token counts at which evaluation decodes, besides all
SMALLEST = 0.2  # of a photograph's shorter side, the smallest crop
EMPTY = 1e-4  # squared error below which a linear picture counts as perfect


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pictures come from.

    Args:
        root: the folder of the sets.
        sets: sets of pictures, drawn or photographed, used whole.
        photos: sets of photographs, of which crops are used; as many as there are pictures in `sets`.
        basis: pictures that the analytic half is fitted to.
        unseen: how many "unseen" pictures evaluation takes.
    """

    root: str = "data"
    sets: tuple[str, ...] = ("emoji",)
    photos: tuple[str, ...] = ()
    basis: int = 32_768
    unseen: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Rates and weights.

    Args:
        lr: of AdamW. (At 2e-3 the network leaves zero for good within 50 steps and learns nothing.)
        whole: share of passes with all tokens.
        head: share of passes with the tokens of the head, which are what a backbone writes.
        gradient: weight of the L1 term.
        perceptual: weight of the distance of features; 0 needs no teacher.
        seen: how many pictures of a batch the teacher looks at.
        start: a saved codec to begin with, in place of fitting the analytic half.
    """

    lr: float = 6e-4
    whole: float = 0.25
    head: float = 0.0
    gradient: float = 0.1
    perceptual: float = 0.0
    seen: int = 8
    start: str | None = None


class Crops(Dataset):
    """Crops of photographs, drawn once from a seed: item i is uint8 [4, SOURCE, SOURCE], opaque.

    The first two of each photograph are the whole of it.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], each: int, seed: int = 0):
        rng = torch.Generator().manual_seed(seed)
        self.items = torch.full((len(rows) * each, 4, SOURCE, SOURCE), 255, dtype=torch.uint8)
        for i, row in enumerate(rows):
            image = Image.load(row["image"]).over()
            for j in range(each):
                piece = image if j < 2 else self._crop(image, rng)
                self.items[i * each + j, :3] = to_bytes(piece.resize(SOURCE, SOURCE).pixels)

    @staticmethod
    def _crop(image: Image, rng: torch.Generator) -> Image:
        scale, x, y = torch.rand(3, generator=rng).tolist()
        side = int(min(image.height, image.width) * SMALLEST ** (1 - scale))
        side = min(max(side, 64), image.height, image.width)
        top, left = int(y * (image.height - side)), int(x * (image.width - side))
        return Image(image.pixels[:, top : top + side, left : left + side])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        return self.items[index]


class OneDPieceMiniTask(Task):
    """Fits and trains one `OneDPieceMini`."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.model = settings(OneDPieceMiniConfig, config.get("model", {}), "model")
        self.data = settings(DataConfig, config.get("data", {}), "data")
        self.training = settings(TrainingConfig, config.get("training", {}), "training")
        self.name = config.get("name", "onedpiece/mini")
        self._held: dict[str, Tensor] | None = None

    def networks(self) -> dict[str, nn.Module]:
        """The codec, and the teacher where the loss asks it."""
        networks: dict[str, nn.Module] = {"codec": OneDPieceMini(self.model, name=self.name)}
        if self.training.perceptual:
            networks["teacher"] = PerceptualDistance()
        return networks

    def dataset(self) -> Dataset:
        """uint8 [4, SOURCE, SOURCE], drawn pictures first, then as many crops."""
        drawn = Pictures(self._rows(self.data.sets, "train"), (SOURCE, SOURCE))
        if not self.data.photos:
            return drawn
        photos = self._rows(self.data.photos, "train")
        return ConcatDataset([drawn, Crops(photos, max(1, math.ceil(len(drawn) / len(photos))))])

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW."""
        return adamw(parameters, lr=self.training.lr)

    def initialise(self, networks: Mapping[str, nn.Module], dataset: Dataset) -> None:
        """The analytic half, from augmented pictures or from `training.start`."""
        codec = networks["codec"]
        assert isinstance(codec, OneDPieceMini)
        if self.training.start is not None:
            codec.load_state_dict(load_codec(self.training.start).state_dict())
            return
        rng = torch.Generator().manual_seed(0)
        picked = torch.randint(len(dataset), (self.data.basis,), generator=rng)  # type: ignore[arg-type]
        pictures = []
        for rows in picked.split(256):
            batch = torch.stack([dataset[i] for i in rows.tolist()])
            pictures.append(to_bytes(self.augment(batch, rng)))
        onedpiece_basis.fit(codec, torch.cat(pictures), rng)

    @torch.no_grad()
    def augment(self, batch: Tensor, rng: torch.Generator) -> Tensor:
        """uint8 [B, 4, SOURCE, SOURCE] to pixels [B, 3, S, S]."""
        return augment(batch, self.model.image_size, rng)

    def losses(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        batch: Tensor,
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Relative squared error and gradient error of the repaired picture at one k."""
        codec = networks["codec"]
        assert isinstance(codec, OneDPieceMini)
        k = self.draw_length(rng)
        with torch.no_grad(), torch.autocast(batch.device.type, enabled=False):
            linear, counts = codec.linear(codec.tokenize(batch, k))
        repaired = codec.repair(linear, counts).float()
        before, after = _errors(linear, batch), _errors(repaired, batch)
        square = (after[0] / before[0].clamp_min(EMPTY)).mean()
        edges = (after[1] / before[1].clamp_min(EMPTY**0.5)).mean()
        gained = 10 * (before[0].clamp_min(EMPTY) / after[0].clamp_min(EMPTY)).log10().mean()
        loss = square + self.training.gradient * edges
        logged = {"square": square, "edges": edges, "gained_db": gained.detach()}
        if self.training.perceptual:
            n = self.training.seen
            distance = networks["teacher"](repaired[:n].clamp(0, 1), batch[:n]).mean()
            loss = loss + self.training.perceptual * distance
            logged["perceptual"] = distance
        return {"loss": loss, **logged}

    def draw_length(self, rng: torch.Generator) -> int:
        """One k for a forward pass."""
        u, v = torch.rand(2, generator=rng, device=rng.device).tolist()
        if u < self.training.whole:
            return self.model.tokens
        if u < self.training.whole + self.training.head:
            return self.model.head_tokens
        return min(self.model.tokens, int(self.model.tokens**v))

    @torch.no_grad()
    def evaluate(self, networks: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """PSNR at each budget on held-out and unseen pictures, and how many codes the pictures use."""
        codec = networks["codec"]
        assert isinstance(codec, OneDPieceMini)
        if self._held is None:
            self._held = self._held_out()
        result = {}
        for kind, pixels in self._held.items():
            codes = codec.tokenize(pixels.to(codec.device))
            for k in (*BUDGETS, self.model.tokens):
                picture = codec.detokenize(codes[:, :k]).float().cpu()
                label = "all" if k == self.model.tokens else str(k)
                result[f"{kind}_psnr_{label}"] = psnr(picture, pixels).mean().item()
            result[f"{kind}_codes"] = float(codes.unique().numel())
            if result[f"{kind}_psnr_4"] >= result[f"{kind}_psnr_all"]:
                raise StopRun(f"{kind}: the picture from 4 tokens is as good as that from all")
        return result

    def export(self, networks: Mapping[str, nn.Module], path: Path) -> None:
        """The codec in float16 and int8."""
        codec = networks["codec"]
        assert isinstance(codec, OneDPieceMini)
        about = {"trained_on": [*self.data.sets, *self.data.photos]}
        save_codec(codec, path, name=self.name, dtype=torch.float16, about=about)

    def _rows(self, sets: Sequence[str], split: str) -> list[dict[str, Any]]:
        return find_rows(self.data.root, sets, modality="image", splits=(split,))

    def _held_out(self) -> dict[str, Tensor]:
        """Pixels [N, 3, S, S] of each kind."""
        size = self.model.image_size
        rows = {"drawn": self._rows(self.data.sets, "held")}
        if self.data.photos:
            rows["photo"] = self._rows(self.data.photos, "held")
        if self.data.unseen:
            unseen = self._rows(self.data.sets, "unseen")
            rows["unseen"] = unseen[:: max(1, len(unseen) // self.data.unseen)]
        return {
            kind: torch.stack(
                [Image.load(r["image"]).over().resize(size, size).pixels for r in some]
            )
            for kind, some in rows.items()
            if some
        }


def task(config: dict[str, Any]) -> Task:
    """The task of a config: with "stage": 1 under "training" the published ViT's, else the mini's."""
    if config.get("training", {}).get("stage") == 1:
        return StageOneTask(config)
    return OneDPieceMiniTask(config)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Decibels of each picture, for values in [0, 1]: [B]."""
    return -10 * (a.clamp(0, 1) - b).square().flatten(1).mean(1).log10()


def augment(batch: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """uint8 [B, 4, H, W] to [B, 3, size, size] in [0, 1].

    Pictures with alpha: three in five are moved, scaled and turned a little; the background is white, or for three
    in ten a flat colour. Opaque ones: mirrored for one half, and cut by up to a fifth.
    """
    device = batch.device
    opaque = (batch[:, 3].flatten(1).amin(1) == 255).float()

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(batch), generator=rng, device=device)

    moved = (draw(0, 1) < 0.6).float()
    scale = torch.lerp(1 + moved * (draw(0.85, 1.25) - 1), draw(0.8, 1), opaque)
    angle = (1 - opaque) * moved * draw(-0.12, 0.12)
    room = torch.lerp(moved * 0.12, 1 - scale, opaque)
    mirror = torch.where((draw(0, 1) < 0.5) & (opaque > 0), -1.0, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    x, y = room * draw(-1, 1), room * draw(-1, 1)
    theta = torch.stack([torch.stack([cos * mirror, -sin, x], 1), torch.stack([sin, cos, y], 1)], 1)
    colour = torch.rand(len(batch), 3, 1, 1, generator=rng, device=device)
    flat = (draw(0, 1) < 0.3).float()[:, None, None, None]

    pixels = batch.float() / 255
    pixels = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, align_corners=False)
    pixels = pixels[:, :3] + torch.lerp(torch.ones_like(colour), colour, flat) * (1 - pixels[:, 3:])
    pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    return pixels.clamp(0, 1)


def _errors(picture: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error, and mean absolute error of the gradients, of each picture: [B], [B]."""
    error = picture - target
    edges = error.diff(dim=2).abs().flatten(1).mean(1) + error.diff(dim=3).abs().flatten(1).mean(1)
    return error.square().flatten(1).mean(1), edges
