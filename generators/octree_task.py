"""Training OctGPT's transformer: all levels of a stream at once, most tokens masked.

- One share of masked tokens a step, from a normal distribution cut to [low, 1], and one random order over the whole
  batch. Cross-entropy of the masked split bits, plus that of the masked codes' bits.
- `flip` flips a share of the codes' input bits; all codes are then judged, so that the network learns to mend them.
- Conditions are left out now and then (`drop`), which guidance needs.
- Streams are made once by the codec and kept as `.tok` files.

Facts: arXiv 2504.09975 and github.com/octree-nn/octgpt (`dossier/video3d.md` C11).
Letters: N tokens, n of the split levels, m codes, D bits of a code.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs.registry import load_codec
from ..codecs.shape.octgpt import OctGPT
from ..codecs.shape.octree import Octree, full_octree, merge_octrees
from ..codecs.stream import StreamError, TokenStream
from ..codecs.training.data import DataError, Row, find_rows
from ..codecs.training.engine import Task, adamw
from ..codecs.training.entry import settings
from ..modalities.errors import MediaError
from ..modalities.shape import Shape
from .octree import OctreeGenerator, OctreeOptions
from .octree_condition import Labels, Words
from .octree_files import save
from .octree_network import OctreeNetwork, OctreeNetworkConfig
from .octree_windows import Tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned from.

    Args:
        root, sets: the data sets.
        cache: where the streams are kept.
        codec: whose streams.
        condition: "category" or "text" (rows' keys), or "none".
    """

    root: str = "data"
    sets: tuple[str, ...] = ("furniture",)
    cache: str = "runs/octree_streams"
    codec: str = "octgpt/mini"
    condition: Literal["category", "text", "none"] = "text"


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How tokens are masked, and how fast the network learns.

    Args:
        mean, spread, low: of the share that is masked.
        flip: share of the codes' input bits that are flipped.
        drop: how often a condition is left out.
        lr: the rate of AdamW.
    """

    mean: float = 1.0
    spread: float = 0.25
    low: float = 0.5
    flip: float = 0.1
    drop: float = 0.1
    lr: float = 1e-4

    def __post_init__(self):
        for name in ("flip", "drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 <= {name} < 1")
        if not 0 < self.low < 1:
            raise ValueError(f"low is {self.low}, expected 0 < low < 1")

    def share(self, rng: torch.Generator) -> float:
        """A share, drawn until it lies in [low, 1]."""
        while True:
            draw = torch.randn((), generator=rng, device=rng.device) * self.spread + self.mean
            if self.low <= float(draw) <= 1:
                return float(draw)


@dataclass(frozen=True)
class Item:
    """One shape: its split bits per level [n_d], its codes [m, D], and what it is."""

    splits: tuple[Tensor, ...]
    codes: Tensor
    condition: str


class Streams(torch.utils.data.Dataset):
    """Rows whose shapes have become streams."""

    def __init__(self, rows: Sequence[Row], config: DataConfig, codec: OctGPT):
        self.config, self.codec = config, codec
        self.folder = Path(config.cache) / codec.identity.replace("/", "-")
        self.folder.mkdir(parents=True, exist_ok=True)
        found = [(row, stream) for row in rows if (stream := self._stream(row)) is not None]
        if not found:
            raise DataError(f"none of {len(rows)} shapes became a stream")
        self.items = [self._item(row, stream) for row, stream in found]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    def _stream(self, row: Row) -> TokenStream | None:
        source = Path(row["shape"])
        path = self.folder / f"{source.parent.name}-{source.stem}.tok"
        empty = path.with_suffix(".none")
        if path.is_file():
            return TokenStream.load(path)
        if empty.is_file():
            return None
        try:
            stream = self.codec.encode([Shape.load(source)])[0]
        except (MediaError, StreamError, ValueError) as error:
            logger.warning("%s is left out: %s", source, error)
            empty.touch()
            return None
        stream.save(path)
        return stream

    def _item(self, row: Row, stream: TokenStream) -> Item:
        *splits, codes = (part.codes for part in stream.parts)
        said = "" if self.config.condition == "none" else str(row[self.config.condition])
        return Item(tuple(bits[:, 0] for bits in splits), codes, said)


@dataclass(frozen=True)
class Batch:
    """Shapes joined: octree, split bits [n] and codes [m, D] in its order."""

    tree: Octree
    splits: Tensor
    codes: Tensor
    conditions: tuple[str, ...]


def join(items: Sequence[Item], *, full_depth: int, device: torch.device) -> Batch:
    """A batch of shapes; levels are batch-major."""
    tree = merge_octrees([_tree(item, full_depth) for item in items])
    levels = zip(*(item.splits for item in items))
    tree.keys = [keys.to(device) for keys in tree.keys]
    tree.children = [children.to(device) for children in tree.children]
    return Batch(
        tree,
        torch.cat([bits for level in levels for bits in level]).to(device),
        torch.cat([item.codes for item in items]).to(device),
        tuple(item.condition for item in items),
    )


def _tree(item: Item, full_depth: int) -> Octree:
    tree = full_octree(full_depth)
    for bits in item.splits:
        tree = tree.split(tree.depth, bits).grow()
    return tree


def masked_losses(
    split_logits: Tensor,
    splits: Tensor,
    code_logits: Tensor,
    codes: Tensor,
    masked: Tensor,
    *,
    every_code: bool = False,
) -> dict[str, Tensor]:
    """Cross-entropies of what was masked, and how often the likeliest bit is right.

    Args:
        split_logits, splits: [n, 2] and [n].
        code_logits, codes: [m, D, 2] and [m, D].
        masked: [n + m].
        every_code: judge all codes, as with flipped inputs.
    """
    of_splits, of_codes = masked.split([len(splits), len(codes)])
    of_codes = torch.ones_like(of_codes) if every_code else of_codes
    split_logits, splits = split_logits[of_splits].float(), splits[of_splits]
    code_logits, codes = code_logits[of_codes].float().flatten(0, 1), codes[of_codes].flatten()
    return {
        "split": _entropy(split_logits, splits),
        "code": _entropy(code_logits, codes),
        "split_right": (split_logits.argmax(-1) == splits).float().mean(),
        "code_right": (code_logits.argmax(-1) == codes).float().mean(),
    }


def _entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    # a sum over none is 0, a mean would be no number
    return F.cross_entropy(logits, wanted, reduction="sum") / max(1, len(wanted))


class OctreeTask(Task):
    """Sections "model" (OctreeNetworkConfig), "data" (DataConfig), "loss" (MaskConfig), "training" (OctreeOptions: how
    the product draws).
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = dict(config)
        self.data = settings(DataConfig, config["data"], "data")
        self.masks = settings(MaskConfig, config.get("loss", {}), "loss")
        self.drawing = settings(OctreeOptions, config.get("training", {}), "training")
        codec = load_codec(self.data.codec)
        if not isinstance(codec, OctGPT):
            raise ValueError(f"'{self.data.codec}' is no OctGPT codec: its streams have no levels")
        self.codec = codec
        net = codec.config.network
        own = {k: getattr(net, k) for k in ("full_depth", "code_depth", "code_bits")}
        model = {**own, **config["model"]}
        self.reader = self._reader(model)
        if isinstance(self.reader, Labels):
            model["classes"] = len(self.reader.names)
        self.model = settings(OctreeNetworkConfig, model, "model")
        self._held: Streams | None = None

    def _reader(self, model: Mapping[str, Any]) -> Words | Labels | None:
        if self.data.condition == "none":
            return None
        if self.data.condition == "text":
            return Words(model["features"], model["prefix"])
        return Labels(tuple(sorted({row["category"] for row in self._rows("train")})))

    def _rows(self, split: str) -> list[Row]:
        return find_rows(self.data.root, self.data.sets, modality="shape", splits=(split,))

    def networks(self) -> dict[str, nn.Module]:
        """The transformer."""
        return {"network": OctreeNetwork(self.model)}

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW as published; small networks bear a higher rate."""
        return adamw(parameters, lr=self.masks.lr, betas=(0.9, 0.999))

    def dataset(self) -> Streams:
        """The streams of split "train"."""
        return Streams(self._rows("train"), self.data, self.codec)

    def collate(self, samples: Sequence[Item]) -> list[Item]:
        """Items as they are: their octrees are joined on the device."""
        return list(samples)

    def losses(
        self,
        name: str,
        networks: Mapping[str, Any],
        batch: list[Item],
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Cross-entropies of masked split bits and codes."""
        network: OctreeNetwork = networks[name]
        joined = join(batch, full_depth=self.model.full_depth, device=network.device)
        out = self._judged(network, joined, self.masks.share(rng), rng, training=True)
        return {"loss": out["split"] + out["code"], **out}

    def _judged(
        self,
        network: OctreeNetwork,
        batch: Batch,
        share: float,
        rng: torch.Generator,
        *,
        training: bool,
    ) -> dict[str, Tensor]:
        tokens = Tokens.of(batch.tree, self.model.code_depth, grid=self.model.grid)
        order = torch.randperm(len(tokens), generator=rng, device=rng.device)
        masked = torch.zeros(len(tokens), dtype=torch.bool, device=network.device)
        masked[order[: max(1, int(share * len(tokens)))].to(network.device)] = True
        codes, flip = batch.codes, self.masks.flip if training else 0.0
        if flip:
            noise = torch.rand(codes.shape, generator=rng, device=rng.device)
            codes = codes ^ (noise < flip).to(codes.device).long()
        conditions = [self._condition(network, said, training, rng) for said in batch.conditions]
        x = network.embed(batch.splits, codes)
        hidden = network(x, tokens, masked, network.condition(conditions))
        n = len(batch.splits)
        return masked_losses(
            network.split_logits(hidden[:n]),
            batch.splits,
            network.code_logits(hidden[n:]),
            batch.codes,
            masked,
            every_code=flip > 0,
        )

    def _condition(
        self, network: OctreeNetwork, said: str, training: bool, rng: torch.Generator
    ) -> int | Tensor:
        dropped = self.model.null and training
        if dropped:
            dropped = float(torch.rand((), generator=rng, device=rng.device)) < self.masks.drop
        return network.no_condition if dropped or self.reader is None else self.reader(said)

    def evaluate(self, networks: Mapping[str, Any], step: int) -> dict[str, float]:
        """The same measures on held-out shapes, three quarters masked."""
        if self._held is None:
            rows = self._rows("held")
            if isinstance(self.reader, Labels):
                rows = [row for row in rows if row["category"] in self.reader.names]
            self._held = Streams(rows[:32], self.data, self.codec)
        network: OctreeNetwork = networks["network"]
        rng = torch.Generator().manual_seed(0)
        scores: dict[str, list[float]] = {}
        for item in self._held.items:
            batch = join([item], full_depth=self.model.full_depth, device=network.device)
            for key, value in self._judged(network, batch, 0.75, rng, training=False).items():
                scores.setdefault(key, []).append(float(value))
        return {key: sum(values) / len(values) for key, values in scores.items()}

    def export(self, networks: Mapping[str, Any], path: Path) -> None:
        """The network as one file in half precision."""
        generator = OctreeGenerator(
            networks["network"], options=self.drawing, codec=self.data.codec, reader=self.reader
        )
        about = {
            "codec_identity": self.codec.identity,
            "trained_on": ", ".join(self.data.sets) + ", split train",
        }
        name = self.config.get("name", "octgpt/custom generator")
        save(generator, path, name=name, dtype=torch.float16, about=about)


def task(config: Mapping[str, Any]) -> OctreeTask:
    """The task of a config file."""
    return OctreeTask(config)
