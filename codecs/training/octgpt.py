"""Training OctGPT's VQ-VAE: octree splits by cross-entropy, the field by distance and gradient, codes by entropy.

- A sample is a closed mesh, turned and scaled by chance: points with normals for the octree, and query points with
  exact signed distance and gradient, near the surface and anywhere in the cube. Distances are truncated; where they
  are, the gradient is 0.
- The decoder follows the true octree, and each depth's planes are judged alone, so that every level learns.
- The split loss has a weight per depth: published 1 above depth 8 and 0.1 at it, here a list from the code depth on.
- Exact distances are costly, so they are computed once per mesh and kept as `.npz` files.

Facts: arXiv 2504.09975 and github.com/octree-nn/octgpt (`dossier/video3d.md` C3, C11).
Letters: P points, Q queries, N nodes.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modalities.distance import sdf
from ...modalities.errors import MediaError
from ...modalities.measure import f_score, volume_iou
from ...modalities.shape import Shape
from ..published import load_into, read_weights, save_codec
from ..shape.octgpt import OctGPT, OctGPTConfig
from ..shape.octree import Octree, Points
from ..shape.surface import mpu
from ..shape.vqvae import Decoded
from ..stream import StreamError
from .data import DataError, Row, find_rows
from .engine import Task, adamw
from .loader import RandomDataset

logger = logging.getLogger(__name__)

BOX = 0.9  # volume queries lie in [-BOX, BOX]^3
# How many of a mesh's cached queries lie anywhere, and how many at which distance (standard deviation) of the surface.
QUERIES = ((None, 2048), (0.06, 3072), (0.015, 3072))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a sample holds.

    Args:
        root, sets, cache: the data sets, and where exact distances are kept.
        queries, surface: query points in the volume and on the surface.
        truncate: distances beyond it count as it.
        scale: the longest side of a sample, drawn from this range, as a share of the codec's own.
        tilt: share of samples that are turned by any angle, not only onto other axes.
    """

    root: str = "."
    sets: tuple[str, ...] = ("shapes",)
    cache: str = ""
    queries: int = 2048
    surface: int = 1024
    truncate: float = 0.08
    scale: tuple[float, float] = (0.72, 1.08)
    tilt: float = 0.3


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised, and how fast.

    Args:
        split: weight per depth from the code depth on.
        distance, gradient: weights of their squared errors.
        entropy: weight of the quantiser's.
        flip: training noise on the codes' bits.
        lr: the peak rate of AdamW (published 5e-4; small networks bear more).
    """

    split: tuple[float, ...] = (1.0, 1.0, 0.1)
    distance: float = 200.0
    gradient: float = 1.0
    entropy: float = 1.0
    flip: float = 0.0
    lr: float = 1e-3


@dataclass(frozen=True)
class Queries:
    """Where the field is known: points [Q, 3], distance [Q], gradient [Q, 3], batch row [Q]."""

    points: Tensor
    distance: Tensor
    gradient: Tensor
    batch: Tensor


class Fields(RandomDataset):
    """Closed meshes with exact distances: a draw is a dictionary of tensors (`points`, `normals`, `query`, ...)."""

    def __init__(self, rows: Sequence[Row], config: DataConfig, *, points: int, extent: float):
        self.rows, self.config, self.points, self.extent = list(rows), config, points, extent
        self.items: dict[int, dict[str, Tensor] | None] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, index: int) -> dict[str, Tensor]:
        """Mesh `index` with its distances; the next one that is closed, where this one is not.

        Raises:
            DataError: none is closed.
        """
        for i in range(index, index + len(self.rows)):
            at = i % len(self.rows)
            if at not in self.items:
                self.items[at] = self._load(self.rows[at])
            if (found := self.items[at]) is not None:
                return found
        raise DataError("none of the meshes is closed: there are no signed distances to learn")

    def draw(self, index: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Mesh `index`, turned, scaled and sampled by chance."""
        item, config = self.item(index), self.config
        turn = _turn(rng, config.tilt)
        low, high = config.scale
        share = low + (high - low) * torch.rand((), generator=rng)
        corners = item["vertices"] @ turn.T
        bottom, top = corners.amin(0), corners.amax(0)
        scale = share * self.extent / (top - bottom).max()
        shift = -(top + bottom) / 2
        mesh = Shape(item["vertices"], item["faces"])
        cloud = mesh.sample(self.points, rng)
        pick = torch.randint(len(item["query"]), (config.queries,), generator=rng)
        query = (item["query"][pick].float() @ turn.T + shift) * scale
        points = (cloud.vertices @ turn.T + shift) * scale
        normals = cloud.normals @ turn.T
        distance = item["distance"][pick].float() * scale
        far = distance.abs() >= config.truncate
        gradient = torch.where(far[:, None], 0, item["gradient"][pick].float() @ turn.T)
        on = torch.randint(len(points), (config.surface,), generator=rng)
        return {
            "points": points,
            "normals": normals,
            "query": torch.cat([query, points[on]]),
            "distance": torch.cat(
                [distance.clamp(-config.truncate, config.truncate), torch.zeros(len(on))]
            ),
            "gradient": torch.cat([gradient, normals[on]]),
        }

    def _load(self, row: Row) -> dict[str, Tensor] | None:
        """A row's mesh and distances, from the cache where they lie there; None for one that is broken or open."""
        path = Path(self.config.cache) / f"{Path(row['shape']).stem}.npz"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                shape = Shape.load(row["shape"])
            except MediaError as error:
                logger.warning("left out of training: %s", error)
                return None
            _write(path, measured(shape))
        with np.load(path) as arrays:
            item = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if "faces" not in item:
            return None
        item["faces"] = item["faces"].long()
        return item


def closed_shapes(rows: Sequence[Row]) -> list[Shape]:
    """The meshes of some rows that can be read and are closed."""
    shapes = []
    for row in rows:
        try:
            shape = Shape.load(row["shape"])
        except MediaError as error:
            logger.warning("left out: %s", error)
            continue
        if shape.is_watertight:
            shapes.append(shape)
    return shapes


def measured(shape: Shape) -> dict[str, np.ndarray]:
    """A closed mesh in its cube with exact distances at chosen points; {} where it is not closed."""
    shape = shape.normalized(1.6)[0]
    if not shape.is_watertight:
        return {}
    if shape.volume() < 0:
        shape = Shape(shape.vertices, shape.faces.flip(1))
    rng = torch.Generator().manual_seed(0)
    parts = []
    for spread, count in QUERIES:
        if spread is None:
            parts.append((torch.rand(count, 3, generator=rng) * 2 - 1) * BOX)
        else:
            noise = torch.randn(count, 3, generator=rng) * spread
            parts.append(shape.sample(count, rng).vertices + noise)
    # points are stored in half precision, so they are rounded before their distance is measured
    query = torch.cat(parts).half()
    found = sdf(shape, query.float())
    return {
        "vertices": shape.vertices.numpy(),
        "faces": shape.faces.int().numpy(),
        "query": query.numpy(),
        "distance": found.distance.half().numpy(),
        "gradient": found.gradient.half().numpy(),
    }


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def _turn(rng: torch.Generator, tilt: float) -> Tensor:
    """One of the cube's 48 symmetries, or, for a share `tilt`, any rotation: [3, 3]."""
    if float(torch.rand((), generator=rng)) < tilt:
        q, r = torch.linalg.qr(torch.randn(3, 3, generator=rng))
        return q * r.diagonal().sign()
    signs = torch.randint(2, (3,), generator=rng) * 2 - 1
    return torch.eye(3)[torch.randperm(3, generator=rng)] * signs


class OctGPTTask(Task):
    """The task of `octgpt_mini.json`: sections "model" (OctGPTConfig), "data" (DataConfig), "loss" (LossConfig).

    "model" may name a saved codec as "start", from whose weights training begins.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = dict(config)
        model = dict(config["model"])
        self.start = model.pop("start", None)
        self.model = OctGPTConfig(**model)
        self.data = DataConfig(**{k: _tuple(v) for k, v in config["data"].items()})
        self.weights = LossConfig(**{k: _tuple(v) for k, v in config.get("loss", {}).items()})
        self._held: list[Shape] | None = None

    def networks(self) -> dict[str, nn.Module]:
        """The codec."""
        return {"codec": OctGPT(self.model, name=self.config.get("name", "octgpt/mini"))}

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW as published, but for the rate."""
        return adamw(parameters, lr=self.weights.lr, betas=(0.9, 0.99))

    def initialise(self, networks: Mapping[str, nn.Module], dataset: Fields) -> None:
        """Take over the weights of "start"."""
        if self.start is not None:
            load_into(networks["codec"], read_weights(self.start).tensors, source=self.start)

    def dataset(self) -> Fields:
        """The meshes of split "train"."""
        return Fields(
            self._rows("train"), self.data, points=self.model.points, extent=self.model.extent
        )

    def _rows(self, split: str) -> list[Row]:
        return find_rows(self.data.root, self.data.sets, modality="shape", splits=(split,))

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Samples as they are: shapes differ in size, the octree joins them."""
        return list(samples)

    def losses(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        batch: list[dict[str, Tensor]],
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Split, distance, gradient and entropy losses, and what tells how it goes."""
        codec = networks["codec"]
        tree = codec.octree([Points(item["points"], item["normals"]) for item in batch])
        vqvae = codec.vqvae
        z = vqvae.pre_proj(vqvae.encoder(tree))
        codes, bits, entropy = vqvae.quantizer(z, flip=self.weights.flip, rng=rng)
        decoded = vqvae.decode(codes, tree, grow=False)
        out = split_losses(decoded, tree, self.weights.split)
        out |= field_losses(decoded, join(batch), self.weights)
        out["entropy"] = entropy * self.weights.entropy
        out["loss"] = sum(out.values())
        out["bit_balance"] = (bits.float().mean(0) - 0.5).abs().max()
        return out

    def evaluate(self, networks: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """F-score at 1 % of the diagonal, volume IoU and bits, on held-out meshes."""
        codec = networks["codec"]
        scores: list[tuple[float, float, float]] = []
        for shape in self._held_shapes(6):
            stream = codec.encode([shape])[0]
            try:
                again = codec.decode([stream])[0]
            except StreamError:  # nothing learned yet: the field has no surface
                scores.append((0.0, 0.0, stream.bits))
                continue
            scores.append((f_score(shape, again), volume_iou(shape, again, 32), stream.bits))
        f, iou, bits = torch.tensor(scores).mean(0).tolist()
        return {"f_score": f, "iou": iou, "bits": bits}

    def _held_shapes(self, count: int) -> list[Shape]:
        if self._held is None:
            self._held = closed_shapes(self._rows("held")[: 2 * count])[:count]
        return self._held

    def export(self, networks: Mapping[str, nn.Module], path: Path) -> None:
        """The codec as one file in half precision."""
        save_codec(
            networks["codec"],
            path,
            dtype=torch.float16,
            about={"trained_on": "pybullet random_urdfs (zlib licence), split train"},
        )


def join(batch: Sequence[Mapping[str, Tensor]]) -> Queries:
    """The queries of all samples, with their batch rows."""
    rows = [torch.full((len(item["query"]),), i) for i, item in enumerate(batch)]
    device = batch[0]["query"].device
    return Queries(
        *(torch.cat([item[k] for item in batch]) for k in ("query", "distance", "gradient")),
        torch.cat(rows).to(device),
    )


def split_losses(decoded: Decoded, tree: Octree, weights: Sequence[float]) -> dict[str, Tensor]:
    """Cross-entropy of each depth's splits, times its weight.

    Raises:
        ValueError: there is not one weight per depth.
    """
    if len(weights) != len(decoded.logits):
        raise ValueError(f"{len(weights)} split weights, expected {len(decoded.logits)}")
    return {
        f"split_{d}": weight * F.cross_entropy(logits.float(), tree.split_bits(d))
        for (d, logits), weight in zip(decoded.logits.items(), weights)
    }


def field_losses(decoded: Decoded, queries: Queries, weights: LossConfig) -> dict[str, Tensor]:
    """Squared errors of distance and gradient, for the planes of each depth."""
    out = {}
    for d in decoded.planes:
        points = queries.points.detach().requires_grad_(True)
        with torch.enable_grad():
            value = mpu(decoded.field(d), points, queries.batch)
            (slope,) = torch.autograd.grad(value.sum(), points, create_graph=True)
        out[f"distance_{d}"] = weights.distance * F.mse_loss(value, queries.distance)
        out[f"gradient_{d}"] = weights.gradient * F.mse_loss(slope, queries.gradient)
    return out


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def task(config: Mapping[str, Any]) -> OctGPTTask:
    """The task of a config file."""
    return OctGPTTask(config)
