"""Training DyVTE's gates (arXiv 2411.19628): behind which layers would the answer be the same without the picture?

The trained model is frozen. For a batch and a layer drawn by chance the layers behind it run twice, once as ever and
once with the visual tokens hidden from everyone. A row's label is "leave" where more than 99 % of its answer's
arg-maxes agree and its loss is less than 1.03 times the other; the gate of that layer learns it by cross-entropy from
the prompt's text. The paper trains 1 % of 665k conversations for one epoch at a rate of 6e-5.

Labels are a row's own here (the published code makes one of a batch), and only documents that read something other than
text count. Config: as for "pairs", with the trained model in data.start.

B rows, T positions, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ...codecs.training.entry import ConfigError, settings
from ..directory import load_model
from ..interleave import Packed
from ..tasks import PairsTask, build
from ..transformer import Transformer
from .dyvte import HIDDEN, Gates, text_features
from .inside import Prompt


@dataclass(frozen=True, kw_only=True)
class Labels:
    """When a row may leave.

    Args:
        agree: more than this share of the answer's arg-maxes must be the same.
        worse: its loss must be less than so many times the loss with the picture.
        hidden: width inside a gate.
    """

    agree: float = 0.99
    worse: float = 1.03
    hidden: int = HIDDEN


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Documents [B, T] for the labels.

    Args:
        x: [B, T, D], embeddings.
        visual: True at visual tokens. prompt: True up to where the answer begins.
        answers: True where the next id is part of the answer; targets: that id.
    """

    x: Tensor
    visual: Tensor
    prompt: Tensor
    answers: Tensor
    targets: Tensor


@torch.no_grad()
def outcome(model: Transformer, batch: Batch, layer: int, labels: Labels) -> tuple[Tensor, Tensor]:
    """A gate's features [B, 2 D] behind `layer` (0 the first), and whether each row may leave there, [B] bool."""
    length = batch.x.shape[1]
    places = torch.arange(length, device=batch.x.device)
    positions = places.expand(len(batch.x), -1)
    x = batch.x
    if model.config.positions == "learned":
        x = x + model.model.embed_positions(positions)
    turns = None if model.rotary is None else model.rotary.at(positions, x.dtype)
    for block in model.model.layers[: layer + 1]:
        x = block(x, model.rotary, turns, None, None, None)
    state = Prompt(
        x=x,
        positions=positions,
        index=places.where(batch.prompt, -1),
        visual=batch.visual & batch.prompt,
    )
    itself = torch.eye(length, dtype=torch.bool, device=x.device)
    hidden = (itself.new_ones(length, length).tril() & ~batch.visual[:, None] | itself)[:, None]
    logits = []
    for mask in (None, hidden):
        y = x
        for block in model.model.layers[layer + 1 :]:
            y = block(y, model.rotary, turns, mask, None, None)
        logits.append(model.lm_head(model.model.norm(y)[batch.answers]).float())
    row = batch.answers.nonzero()[:, 0]
    agree = _row_means((logits[0].argmax(-1) == logits[1].argmax(-1)).float(), row, len(x))
    losses = [
        _row_means(
            F.cross_entropy(one, batch.targets[batch.answers], reduction="none"), row, len(x)
        )
        for one in logits
    ]
    leaves = (agree > labels.agree) & (losses[1] < labels.worse * losses[0])
    return text_features(state), leaves


class DyVTETask(PairsTask):
    """See the module's docstring.

    Args:
        config: that of "pairs" with "data": {"start": the trained model}, and "training": Labels.

    Raises:
        ConfigError: no trained model, or no pair that reads more than text.
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        start = self.data.start
        if start is None:
            raise ConfigError(
                "data.start names no model; gates are trained for one that is trained"
            )
        pairs = tuple(dataclasses.replace(p, drop=0.0) for p in self.data.pairs if p.read != "text")
        if not pairs:
            raise ConfigError("data.pairs has none that reads more than text: nothing to leave out")
        self.data = dataclasses.replace(self.data, packing=False, pairs=pairs)
        self.labels = settings(Labels, config.get("training", {}), "training")
        self.trained = load_model(start, codecs=self.codecs)
        self.interleaver, self.text = self.trained.interleaver, self.trained.text

    def networks(self) -> dict[str, nn.Module]:
        """The gates, and the frozen model."""
        model = self.trained.transformer.requires_grad_(False).eval()
        c = model.config
        gates = Gates(width=c.width, layers=c.layers, hidden=self.labels.hidden)
        return {"gates": gates, "backbone": model}

    def initialise(self, networks: Mapping[str, nn.Module], dataset: Any) -> None:
        """Nothing: gates begin at random."""

    def collate(self, samples: Sequence[Packed]) -> dict[str, Tensor]:
        """As for pairs, and where visual tokens stand."""
        batch = super().collate(samples)
        visual = torch.zeros_like(batch["ids"], dtype=torch.bool)
        for row, one in enumerate(samples):
            for part in one.segments:
                if part.block != "text" and not one.weights[part.start : part.stop].any():
                    visual[row, part.start : part.stop] = True
        return {**batch, "visual": visual}

    def losses(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Cross-entropy of one layer's gate; the last layer has nothing behind it to save."""
        model, gates = networks["backbone"], networks["gates"]
        assert isinstance(model, Transformer)
        layers = model.config.layers
        layer = int(torch.randint(layers - 1, (), generator=rng, device=rng.device))
        features, leaves = outcome(model, embedded(model, batch), layer, self.labels)
        logits = gates(layer, features).float()
        right = (logits.argmax(-1) == leaves.long()).float().mean()
        return {
            "loss": F.cross_entropy(logits, leaves.long()),
            "right": right,
            "leaves": leaves.float().mean(),
        }

    @torch.no_grad()
    def evaluate(self, networks: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """On held-out documents, over all layers: how often gates are right, how often rows may and do leave."""
        model, gates = networks["backbone"], networks["gates"]
        assert isinstance(model, Transformer)
        documents = [d for corpus in self.corpora for d in corpus.documents if d.split == "held"]
        made = [
            build(d, pair, self.interleaver, self.text, self.data)
            for pair in self.data.pairs
            for d in documents
        ]
        sequences = [one for one in made if one is not None]
        if not sequences:
            return {}
        device = next(model.parameters()).device
        batch = embedded(model, {k: v.to(device) for k, v in self.collate(sequences).items()})
        may, does = [], []
        for layer in range(model.config.layers - 1):
            features, leaves = outcome(model, batch, layer, self.labels)
            may.append(leaves)
            does.append(gates(layer, features).argmax(-1) == 1)
        may_leave, do_leave = torch.stack(may), torch.stack(does)
        return {
            "right": float((may_leave == do_leave).float().mean()),
            "may_leave": float(may_leave.float().mean()),
            "do_leave": float(do_leave.float().mean()),
        }

    def export(self, networks: Mapping[str, nn.Module], path: Path) -> None:
        """Write the gates under their published names."""
        state = {
            k: v.detach().cpu().contiguous() for k, v in networks["gates"].state_dict().items()
        }
        save_file(state, str(path), metadata={"anytok": f"DyVTE gates of {self.trained.name}"})


def embedded(model: Transformer, batch: Mapping[str, Tensor]) -> Batch:
    """What `outcome` takes, of a collated batch."""
    x = model.embed(batch["ids"])
    if "stacked" in batch:
        codes = batch["stacked"]
        rows = (model.embed(codes.clamp(min=0)) * (codes >= 0)[..., None]).sum(1)
        x = x.masked_scatter(batch["places"][..., None], rows.to(x.dtype))
    learned = batch["weights"] > 0
    answers = F.pad(learned[:, 1:], (0, 1))
    before = learned.cumsum(1) == 0
    return Batch(
        x=x,
        visual=batch["visual"],
        prompt=before,
        answers=answers,
        targets=F.pad(batch["ids"][:, 1:], (0, 1)),
    )


def _row_means(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """[rows], the mean of the values [N] of each."""
    count = values.new_zeros(rows).index_add(0, row, torch.ones_like(values))
    return values.new_zeros(rows).index_add(0, row, values) / count.clamp(min=1)
