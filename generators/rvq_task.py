"""Training models of residual codes: RQ-Transformer, ResGen, and the depth-parallel ablation, on equal terms.

The config's "model" names the kind ("rq", "resgen", "discrete") beside its sizes. Codes are made once by the codec,
cut to its first `depth` depths, and kept in memory; a condition is a text's bytes, the number of a label, or nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.published import KEY, WeightsError, load_into, read_weights, write_safetensors
from ..codecs.registry import load_codec
from ..codecs.training.data import Prepared, Row, find_rows
from ..codecs.training.engine import Task, adamw
from ..codecs.training.entry import ConfigError, settings
from ..modalities.media import MODALITIES
from .resgen import ResGen, ResGenConfig
from .rq_transformer import RQTransformer, RQTransformerConfig

KINDS = {"rq": RQTransformer, "resgen": ResGen, "discrete": ResGen}
CONFIGS = {"rq": RQTransformerConfig, "resgen": ResGenConfig, "discrete": ResGenConfig}
Sample = tuple[Tensor, Tensor]  # codes [L, D], condition ids [P]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodesConfig:
    """What is learned from.

    Args:
        root, sets: the data sets.
        codec: whose codes: a name, or a file that `save_codec` wrote.
        depth: its first so many depths; None for all.
        condition: "text" (its UTF-8 bytes), "none", or another field of the rows, whose values are labels.
        limit: the most positions; what is longer is cut.
        words: the most bytes of a text.
    """

    root: str = "data"
    sets: tuple[str, ...] = ("speech",)
    codec: str = "rvq/mini"
    depth: int | None = None
    condition: str = "text"
    limit: int = 512
    words: int = 64


class CodesTask(Task):
    """See the module's docstring.

    Args:
        config: {"model": {"kind": ..., sizes}, "data": CodesConfig, "optimizer": {"lr": ...}}.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = dict(config)
        self.data = settings(CodesConfig, config["data"], "data")
        codec = load_codec(self.data.codec)
        if codec.spec.compose != "sum":
            raise ConfigError(f"data.codec is '{codec.spec.name}', expected a residual codec (RVQ)")
        self.codec = codec
        self.rows = self.rows_of("train")
        self.labels = self._labels()
        self.model = self._sizes(dict(config["model"]))
        self._held: Prepared | None = None

    def networks(self) -> dict[str, nn.Module]:
        """The model, grounded in the codec's vectors."""
        net = KINDS[self.kind](self.model)
        net.ground(self.codec)
        return {"model": net}

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW."""
        return adamw(parameters, **self.config.get("optimizer", {}))

    def dataset(self) -> Prepared:
        """Codes and conditions of the split "train"."""
        return Prepared(self.rows, self.sample)

    def collate(self, samples: Sequence[Sample]) -> dict[str, list[Tensor]]:
        """Rows of unequal length stay lists."""
        codes, conditions = zip(*samples)
        return {"codes": list(codes), "conditions": list(conditions)}

    def losses(
        self,
        name: str,
        networks: Mapping[str, Any],
        batch: Mapping[str, list[Tensor]],
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """The model's own loss."""
        return networks["model"].loss(batch["codes"], batch["conditions"], rng)

    @torch.no_grad()
    def evaluate(self, networks: Mapping[str, Any], step: int) -> dict[str, float]:
        """The same loss on held-out rows, with the same draws each time."""
        if self._held is None:
            self._held = Prepared(self.rows_of("held")[:64], self.sample)
        net, samples = networks["model"], [self._held[i] for i in range(len(self._held))]
        rng = torch.Generator(device=net.device).manual_seed(0)
        batch = self.collate(samples)
        return {k: float(v) for k, v in net.loss(batch["codes"], batch["conditions"], rng).items()}

    def export(self, networks: Mapping[str, Any], path: Path) -> None:
        """The model as one file; `load_model` reads it."""
        about = {"codec": self.codec.identity, "labels": self.labels, "data": self.config["data"]}
        save_model(networks["model"], path, kind=self.kind, about=about)

    def sample(self, row: Row) -> Sample:
        """Codes [L, D] and condition ids of a row."""
        with torch.inference_mode():
            codes = self.codec.encode([self.medium(row)])[0].codes
        depth, limit = len(self.model.vocab), self.data.limit
        return codes[:limit, :depth].clone(), self.condition(row)

    def medium(self, row: Row) -> Any:
        """What a row holds."""
        modality = self.codec.spec.modality
        return MODALITIES[modality].load(row[modality])  # type: ignore[attr-defined]

    def condition(self, row: Row) -> Tensor:
        """Ids [P] of what a row says."""
        field = self.data.condition
        if field == "none":
            return torch.zeros(0, dtype=torch.int64)
        if field == "text":
            return torch.tensor(
                list(str(row["text"]).encode()[: self.data.words]), dtype=torch.int64
            )
        value = str(row[field])
        if value not in self.labels:
            raise ConfigError(f"'{value}' is no {field} of the training rows")
        return torch.tensor([self.labels.index(value)])

    def rows_of(self, split: str) -> list[Row]:
        """Rows of "train" or "held"."""
        return find_rows(
            self.data.root, self.data.sets, modality=self.codec.spec.modality, splits=(split,)
        )

    def _labels(self) -> list[str]:
        if self.data.condition in ("text", "none"):
            return []
        missing = [row for row in self.rows if self.data.condition not in row]
        if missing:
            raise ConfigError(
                f"data.condition: {len(missing)} rows have no '{self.data.condition}'"
            )
        return sorted({str(row[self.data.condition]) for row in self.rows})

    def _sizes(self, model: dict[str, Any]) -> Any:
        self.kind = model.pop("kind", "resgen")
        if self.kind not in KINDS:
            raise ConfigError(f"model.kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.kind != "rq":
            model["head"] = {"resgen": "mixture", "discrete": "discrete"}[self.kind]
        vocab = self.codec.spec.vocab[0][: self.data.depth]
        conditions = {"text": 256, "none": 0}.get(self.data.condition, len(self.labels))
        before = {"text": self.data.words, "none": 0}.get(self.data.condition, 1)
        sizes = {
            "vocab": vocab,
            "vectors": self.codec.code_vectors(0, 0).shape[1],
            "conditions": conditions,
            "longest": self.data.limit + before,
        }
        return settings(CONFIGS[self.kind], {**model, **sizes}, "model")


def save_model(
    net: RQTransformer | ResGen, path: str | Path, *, kind: str, about: Mapping[str, Any]
) -> None:
    """Write a model with its config; the codec's vectors travel with it."""
    header = {"kind": kind, "config": dataclasses.asdict(net.config), **about}
    tensors = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    write_safetensors(tensors, path, {KEY: json.dumps(header)})


def load_model(path: str | Path) -> tuple[RQTransformer | ResGen, dict[str, Any]]:
    """A model that `save_model` wrote, and its header."""
    file = read_weights(path)
    kind = file.config.get("kind")
    if kind not in KINDS:
        raise WeightsError(f"{path}: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    net = KINDS[kind](CONFIGS[kind](**file.config["config"]))
    load_into(net, file.tensors, source=file.source)
    return net.eval(), file.config


def task(config: Mapping[str, Any]) -> Task:
    """The task of a config file."""
    return CodesTask(config)
