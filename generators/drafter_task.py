"""Training a drafter: it learns to predict a frozen target's next hidden state (EAGLE, arXiv 2401.15077).

- The target runs over the documents that it was trained on, as `PairsTask` builds them (with the condition left out now
  and then, so that guidance can be drafted too).
- The loss is smooth L1 between predicted and true states, and a tenth of the cross-entropy between the laws that the
  target's head makes of both, over the block of ids that comes next. It counts where the target writes.
- A run begins with the best linear prediction (`start`), which takes no time.
- Noise on the states that are read stands for the errors of earlier predictions.

`overlap` is the sum of min(p, q): how often a single draw of the drafter stands in lossless mode.

R rows, L ids, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import masks
from ..backbone.corpus import Corpus
from ..backbone.directory import load_model
from ..backbone.interleave import PLACE, Packed
from ..backbone.tasks import Pair, Pairs, PairsConfig, build, collate
from ..backbone.transformer import Transformer
from ..codecs.registry import load_codec
from ..codecs.training.engine import Task, adamw
from ..codecs.training.entry import settings
from .drafter import Drafter, save_drafter

START = 256  # documents from which the first prediction is computed


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """What is drafted, and how it is learned.

    Args:
        target: a model directory.
        law: weight of the laws' cross-entropy beside the states' distance.
        noise: uniform noise of plus or minus so much on the states that are read.
    """

    target: str
    law: float = 0.1
    noise: float = 0.1


class DrafterTask(Task):
    """See the module's docstring.

    Args:
        config: {"model": DrafterConfig, "data": PairsConfig, "optimizer": {"lr": ...}}.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.settings = settings(DrafterConfig, config["model"], "model")
        pairs = [settings(Pair, pair, "data.pairs") for pair in config["data"]["pairs"]]
        self.data = settings(PairsConfig, {**config["data"], "pairs": pairs}, "data")
        self.corpora = [Corpus(Path(self.data.root) / path) for path in self.data.corpora]
        codecs = {m: load_codec(name) for m, name in self.data.codecs.items()}
        self.target = load_model(self.settings.target, codecs=codecs)
        for corpus in self.corpora:
            corpus.check(list(self.target.interleaver.rules.values()))
        blocks = self.target.interleaver.vocabulary.blocks
        self.spans = sorted((block.start, block.stop) for block in blocks)

    def networks(self) -> dict[str, nn.Module]:
        """The drafter, and the frozen target."""
        target = self.target.transformer.requires_grad_(False).eval()
        for part in target.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # the engine may set training mode
        return {"drafter": Drafter(target), "target": target}

    def initialise(self, networks: Mapping[str, nn.Module], dataset: Any) -> None:
        """Begin as the best linear prediction over some documents."""
        drafter = networks["drafter"]
        assert isinstance(drafter, Drafter)
        rng = torch.Generator().manual_seed(0)
        some = [dataset.draw(i % len(dataset), rng) for i in range(START)]
        start(drafter, self.collate(some))

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW."""
        return adamw(parameters, **{"lr": 1e-3, **self.config.get("optimizer", {})})

    def dataset(self) -> Pairs:
        """Documents of the split "train"."""
        items = [item for corpus in self.corpora for item in corpus.items("train")]
        return Pairs(self.data, self.target.interleaver, self.target.text, items)

    def collate(self, samples: Sequence[Packed]) -> dict[str, Tensor]:
        """Rows of one document each."""
        place = self.target.interleaver.vocabulary.special(PLACE)
        return collate(samples, place, packed=False)

    def losses(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """The drafter's loss on a batch."""
        noise = None
        if self.settings.noise:
            shape = (*batch["ids"].shape, self.target.transformer.config.width)
            noise = (
                2 * torch.rand(shape, generator=rng, device=rng.device) - 1
            ) * self.settings.noise
        drafter = networks["drafter"]
        assert isinstance(drafter, Drafter)
        parts = drafter_loss(drafter, batch, self.spans, noise=noise)
        return {"loss": parts["states"] + self.settings.law * parts["laws"], **_detached(parts)}

    def evaluate(self, networks: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """The same on held-out documents, without noise, by pair."""
        drafter = networks["drafter"]
        assert isinstance(drafter, Drafter)
        documents = [d for corpus in self.corpora for d in corpus.documents if d.split == "held"]
        measures = {}
        for pair in self.data.pairs:
            built = [
                build(d, pair, self.target.interleaver, self.target.text, self.data)
                for d in documents
            ]
            rows = [one for one in built if one is not None]
            if rows:
                device = drafter.fc.weight.device
                batch = {k: v.to(device) for k, v in self.collate(rows).items()}
                parts = drafter_loss(drafter, batch, self.spans)
                measures |= {f"{pair.name}.{k}": float(v) for k, v in _detached(parts).items()}
        return measures

    def export(self, networks: Mapping[str, nn.Module], path: Path) -> None:
        """One safetensors file."""
        drafter = networks["drafter"]
        assert isinstance(drafter, Drafter)
        save_drafter(drafter, path, dtype=torch.float16, about={"model": self.target.name})


def drafter_loss(
    drafter: Drafter,
    batch: Mapping[str, Tensor],
    spans: Sequence[tuple[int, int]],
    *,
    noise: Tensor | None = None,
) -> dict[str, Tensor]:
    """states: smooth L1; laws: cross-entropy in nats; overlap: sum of min(p, q). All are means over written places.

    Args:
        batch: of `collate`: ids, positions, weights [R, L].
        spans: blocks of ids that a law is over.
        noise: on the states that are read, [R, L, D].
    """
    target, ids = drafter.target, batch["ids"]
    embeddings, states = _states(target, batch)
    read = states if noise is None else states + noise.to(states)
    mask = masks.causal(ids.shape[1] - 1, device=ids.device)
    guess = drafter(embeddings[:, 1:], read[:, :-1], batch["positions"][:, 1:], mask)
    # Place t reads the id at t + 1 and the state at t; what comes at t + 2 is what its guess decides.
    chosen = batch["weights"][:, 2:] > 0
    guess, true, coming = guess[:, :-1][chosen], states[:, 1:-1][chosen], ids[:, 2:][chosen]
    distance = F.smooth_l1_loss(guess.float(), true.float())
    laws, overlaps = [], []
    for start, stop in spans:
        own = (coming >= start) & (coming < stop)
        if bool(own.any()):
            p = target.lm_head.within(true[own], start, stop).float().softmax(-1)
            q = target.lm_head.within(guess[own], start, stop).float().log_softmax(-1)
            laws.append(-(p * q).sum(-1))
            overlaps.append(torch.minimum(p, q.detach().exp()).sum(-1))
    none = [distance.new_zeros(1)]
    return {
        "states": distance,
        "laws": torch.cat(laws or none).mean(),
        "overlap": torch.cat(overlaps or none).mean(),
    }


@torch.no_grad()
def start(drafter: Drafter, batch: Mapping[str, Tensor], *, ridge: float = 1e-3) -> None:
    """Set `fc` to the least-squares map from what is read to the next state; the layer adds nothing at first.

    Training takes hundreds of steps to come as far.
    """
    embeddings, states = _states(drafter.target, batch)
    chosen = batch["weights"][:, 2:] > 0
    read = torch.cat([embeddings[:, 1:-1], states[:, :-2]], -1)[chosen].double()
    wanted = states[:, 1:-1][chosen].double()
    middle, aim = read.mean(0), wanted.mean(0)
    read, wanted = read - middle, wanted - aim
    square = read.T @ read
    square.diagonal().add_(ridge * square.diagonal().mean())
    matrix = torch.linalg.solve(square, read.T @ wanted)
    drafter.fc.weight.copy_(matrix.T)
    drafter.fc.bias.copy_(aim - middle @ matrix)
    for name, parameter in drafter.layers.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()


@torch.no_grad()
def _states(target: Transformer, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The target's input embeddings and states, [R, L, D] each."""
    embeddings = target.embed(batch["ids"])
    if "stacked" in batch:
        codes = batch["stacked"]
        rows = (target.embed(codes.clamp(min=0)) * (codes >= 0)[..., None]).sum(1)
        embeddings = embeddings.masked_scatter(batch["places"][..., None], rows.to(embeddings))
    hidden = target(embeddings=embeddings, positions=batch["positions"], keep=0).hidden
    return embeddings, hidden


def _detached(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in parts.items()}
