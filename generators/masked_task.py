"""Training masked generators over a tokenised corpus, for the one engine.

- `MaskGITTask`: TiTok's and One-D-Piece's networks. As many codes are masked as the curve says at a uniform place
  (arccos); cross-entropy with label smoothing, on what is visible too, but ten times weaker; the class is dropped now
  and then, so that guidance exists.
- `PhenakiTask`: video. Cross-entropy of masked codes alone; text dropped now and then (the public code forgets to); a
  critic learns which codes were drawn: a network of its own, or a head on the generator ("self").

Corpora are what `backbone.corpus.tokenize` wrote. The published numbers are the defaults.

Letters: B rows, N positions, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.conditions import dropped
from ..backbone.corpus import Corpus, Document
from ..backbone.rules import Rule
from ..backbone.words import word_tokenizer
from ..codecs.registry import load_codec
from ..codecs.text import TextCodec, TextConfig
from ..codecs.training.engine import Task, adamw
from ..codecs.training.entry import ConfigError, settings
from ..codecs.training.loader import RandomDataset
from ..codecs.video.cvivit import CViViT
from . import image_maskgit, phenaki
from .image_maskgit import ClassMaskConfig, class_network
from .maskgit import MaskGIT, Unmasking, gumbel, shape_of
from .phenaki import Phenaki, TextEncoder
from .text_features import T5Features, TextIds
from .video_maskgit import SelfCritic, TokenCritic, VideoMaskConfig, VideoMaskGIT

HELD = 256  # documents that are evaluated


@dataclass(frozen=True, kw_only=True)
class MaskedData:
    """What is learned from.

    Args:
        root, corpora: folders that `corpus.tokenize` wrote.
        codec: whose codes: a name, or a file that `save_codec` wrote.
        condition: the rows' key that is asked for; None for nothing.
        encoder: of texts: "words" (ids, a table in the network), or the name or folder of a T5.
        copies: only the first so many copies of an item; None for all.
        units: latent frames of a sample; None for whole streams, which then must be of one size.
        crop: samples begin anywhere in a longer stream, as primes of tokens do; else at its beginning.
    """

    root: str = "data"
    corpora: tuple[str, ...]
    codec: str
    condition: str | None = None
    encoder: str = "words"
    copies: int | None = None
    units: int | None = None
    crop: bool = False


@dataclass(frozen=True, kw_only=True)
class MaskedLoss:
    """What is minimised.

    Args:
        curve: how many codes are masked, at a uniform place of it.
        places: that many places alone (Phenaki's steps); None for any.
        smoothing: of labels.
        unmasked: the weight of codes that the network sees.
        drop: how often the condition is left out.
        critic: "token", "self" or "none".
        critic_labels: "seen" calls false what the critic sees that was drawn wrong; "published" also calls so the
            right codes it sees where a draw would have been wrong.
        critic_weight: beside the generator's loss, for "self".
    """

    curve: Literal["arccos", "cosine"] = "arccos"
    places: int | None = None
    smoothing: float = 0.1
    unmasked: float = 0.1
    drop: float = 0.1
    critic: Literal["none", "token", "self"] = "none"
    critic_labels: Literal["seen", "published"] = "seen"
    critic_weight: float = 1.0

    def __post_init__(self):
        for name, choices in (
            ("curve", ("arccos", "cosine")),
            ("critic", ("none", "token", "self")),
            ("critic_labels", ("seen", "published")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}"
                )


class MaskedTask(Task):
    """What both tasks share: a corpus of streams with a condition, and how codes are masked.

    Args:
        config: {"model": sizes, "data": MaskedData, "loss": MaskedLoss, "training": {"sampling": Unmasking},
            "optimizer": {"lr": ...}}.
    """

    losses_of_kind: Mapping[str, Any] = {}  # defaults that differ from MaskedLoss's

    def __init__(self, config: Mapping[str, Any]):
        self.config = dict(config)
        self.data = settings(MaskedData, config["data"], "data")
        self.loss = settings(MaskedLoss, {**self.losses_of_kind, **config.get("loss", {})}, "loss")
        training = config.get("training", {})
        self.sampling = settings(Unmasking, training.get("sampling", {}), "training.sampling")
        self.codec = load_codec(self.data.codec)
        self.corpora = [Corpus(Path(self.data.root) / path) for path in self.data.corpora]
        for corpus in self.corpora:
            corpus.check([Rule.of(self.codec)])
        modality = self.codec.spec.modality
        documents = [d for c in self.corpora for d in c.documents if modality in d.modalities]
        self.conditions = self._conditions([d for d in documents if d.split == "train"])
        self.grid, self.positions = self._shape(documents)

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW with the published rates."""
        own = {"lr": 2e-4, "betas": (0.9, 0.96), "weight_decay": 0.03}
        return adamw(parameters, **{**own, **self.config.get("optimizer", {})})

    def dataset(self) -> Codes:
        """Items of the split "train"."""
        items = [item[: self.data.copies] for c in self.corpora for item in c.items("train")]
        return Codes(self, items)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Codes [B, N], and the conditions as they are."""
        codes = torch.stack([sample["codes"] for sample in samples])
        return {"codes": codes, "conditions": [sample["condition"] for sample in samples]}

    def evaluate(self, networks: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """Losses on held-out documents, each masked in the same way every time."""
        documents = [d for c in self.corpora for d in c.documents if d.split == "held"]
        samples = [self.sample(d) for d in documents[:HELD]]
        sums: dict[str, float] = {}
        for name, batch in self._batches(samples, networks):
            rng = torch.Generator().manual_seed(0)
            share = len(batch["codes"]) / len(samples)
            for key, value in self.losses(name, networks, batch, step, rng).items():
                label = key if len(networks) == 1 else f"{name}/{key}"
                sums[label] = sums.get(label, 0.0) + share * float(value)
        return sums

    def sample(self, document: Document, rng: torch.Generator | None = None) -> dict[str, Any]:
        """One stream's codes [N], cut as the data say, and its condition."""
        codes = document.stream(self.codec.spec.modality).codes[:, 0]
        extra = len(codes) - self.positions
        start = 0
        if rng is not None and self.data.crop and extra > 0:
            unit = math.prod(self.grid[1:])
            start = unit * int(torch.randint(extra // unit + 1, (), generator=rng))
        cut = codes[start : start + self.positions]
        return {"codes": cut, "condition": self.condition(document)}

    def condition(self, document: Document) -> Tensor | None:
        """What is asked for, None where the row does not say."""
        if self.data.condition is None:
            return None
        value = document.row.get(self.data.condition)
        return None if value is None else self.conditions[str(value)]

    def masked(self, codes: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the network sees (V where masked) and which positions are masked: [B, N] each."""
        vocab = self.codec.spec.vocab[0][0]
        is_masked = masks(codes.shape, self.loss, rng).to(codes.device)
        return codes.masked_fill(is_masked, vocab), is_masked

    def kept(self, conditions: Sequence[Any], rng: torch.Generator) -> list[Any]:
        """The conditions, some of them dropped."""
        if self.loss.drop == 0:
            return list(conditions)
        lost = dropped(len(conditions), self.loss.drop, rng, None).tolist()
        return [None if gone else condition for gone, condition in zip(lost, conditions)]

    def _batches(
        self, samples: list[dict[str, Any]], networks: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for start in range(0, len(samples), 32):
            batch = self.collate(samples[start : start + 32])
            for name, network in networks.items():
                device = next(network.parameters()).device
                yield name, {**batch, "codes": batch["codes"].to(device)}

    def _conditions(self, documents: Iterable[Document]) -> dict[str, Tensor]:
        """Condition of each value that the rows have."""
        return {}

    def _shape(self, documents: Sequence[Document]) -> tuple[tuple[int, ...], int]:
        """The grid of a sample and its positions, which all streams must have."""
        sizes = [d.records[self.codec.spec.modality] for d in documents]
        grids = sorted({tuple(grid) for _, _, grid in sizes})
        units = self.data.units
        if units is None:
            if len(grids) > 1:
                raise ConfigError(
                    f"data: streams have the grids {', '.join(map(str, grids))}; give 'units', the latent frames of a "
                    "sample"
                )
            units = grids[0][0] if grids and grids[0] else 1
        grid, n = shape_of(self.codec.spec.layout, units)
        short = sum(len(parts[0]) < n for _, parts, _ in sizes)
        if short:
            raise ConfigError(
                f"data: {short} of {len(sizes)} streams have fewer than the {n} positions of a sample"
            )
        return grid, n


class Codes(RandomDataset):
    """Items of a corpus; a draw takes a copy and, where asked, a place in it."""

    def __init__(self, task: MaskedTask, items: Sequence[Sequence[Document]]):
        self.task, self.items = task, items

    def __len__(self) -> int:
        return len(self.items)

    def draw(self, index: int, rng: torch.Generator) -> dict[str, Any]:
        """One sample."""
        copies = self.items[index]
        return self.task.sample(copies[int(torch.randint(len(copies), (), generator=rng))], rng)


class MaskGITTask(MaskedTask):
    """A class-conditioned generator of codes; "model" are the sizes of `ClassMaskConfig`."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        (sizes,) = self.codec.spec.vocab
        if len(sizes) != 1:
            raise ConfigError(
                f"data.codec is '{self.codec.spec.name}' with {len(sizes)} codes a position, expected one"
            )
        told = {"vocab": sizes[0], "length": self.positions, "classes": len(self.conditions)}
        self.model = settings(ClassMaskConfig, {**config["model"], **told}, "model")

    def networks(self) -> dict[str, nn.Module]:
        """BERT or U-ViT."""
        return {"generator": class_network(self.model)}

    def losses(
        self,
        name: str,
        networks: Mapping[str, Any],
        batch: dict[str, Any],
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Cross-entropy, and how many masked codes are right."""
        network, codes = networks["generator"], batch["codes"]
        seen, is_masked = self.masked(codes, rng)
        prepared = network.prepare(self.kept(batch["conditions"], rng), self.grid)
        logits = network(seen, prepared).float()
        return {
            "loss": masked_loss(logits, codes, is_masked, self.loss),
            "accuracy": accuracy(logits, codes, is_masked),
        }

    def export(self, networks: Mapping[str, Any], path: Path) -> None:
        """A file that `load_generator` reads; what classes mean stands in its header."""
        network = networks["generator"]
        generator = MaskGIT(network, options=self.sampling, codec=self.data.codec)
        name = self.config.get("name", "maskgit/custom")
        about = {"classes": list(self.conditions)}
        image_maskgit.save(generator, path, name=name, dtype=torch.float16, about=about)

    def _conditions(self, documents: Iterable[Document]) -> dict[str, Tensor]:
        key = self.data.condition
        values = set() if key is None else {str(d.row[key]) for d in documents if key in d.row}
        return {value: torch.tensor(i) for i, value in enumerate(sorted(values))}

    def condition(self, document: Document) -> Tensor | None:
        """The class; None for a held-out document's that training does not know."""
        value = document.row.get(self.data.condition) if self.data.condition else None
        return self.conditions.get(str(value))


class PhenakiTask(MaskedTask):
    """Video from text; "model" are the sizes of `VideoMaskConfig`, "critic" in it changes for the critic's."""

    losses_of_kind: Mapping[str, Any] = {"curve": "cosine", "smoothing": 0.0, "unmasked": 0.0}

    def __init__(self, config: Mapping[str, Any]):
        self.encoder: TextEncoder | None = None
        super().__init__(config)
        if not isinstance(self.codec, CViViT):
            raise ConfigError(f"data.codec is '{self.codec.spec.name}', expected a C-ViViT")
        self.video_codec = self.codec
        table = dict(config["model"])
        critic = table.pop("critic", {})
        told = {"vocab": self.codec.spec.vocab[0][0], **self._text_sizes(table)}
        told["length"] = max(table.pop("length", 0), self.positions)
        self.model = settings(VideoMaskConfig, {**table, **told}, "model")
        self.critic = settings(
            VideoMaskConfig, {**table, **critic, **told, "critic": True}, "model.critic"
        )

    def networks(self) -> dict[str, nn.Module]:
        """The generator, with its own head of doubt for "self", and a critic for "token"."""
        network = VideoMaskGIT(self.model)
        if self.loss.critic == "self":
            return {"generator": SelfCritic(network)}
        if self.loss.critic == "token":
            return {"generator": network, "critic": TokenCritic(self.critic)}
        return {"generator": network}

    def losses(
        self,
        name: str,
        networks: Mapping[str, Any],
        batch: dict[str, Any],
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Cross-entropy of masked codes; for a critic, that of true and drawn ones."""
        whole, codes = networks["generator"], batch["codes"]
        network = whole.maskgit if isinstance(whole, SelfCritic) else whole
        seen, is_masked = self.masked(codes, rng)
        conditions = self.kept(batch["conditions"], rng)
        prepared = network.prepare(conditions, self.grid)
        with torch.set_grad_enabled(torch.is_grad_enabled() and name == "generator"):
            logits = network(seen, prepared).float()
        if name == "critic":
            critic = networks["critic"]
            drawn = drawn_codes(logits, rng)
            judged = critic.prepare(conditions, self.grid)
            return {"loss": self._critic_loss(critic, codes, drawn, is_masked, judged)}
        found = {
            "loss": masked_loss(logits, codes, is_masked, self.loss),
            "accuracy": accuracy(logits, codes, is_masked),
        }
        if isinstance(whole, SelfCritic):
            drawn = drawn_codes(logits.detach(), rng)
            doubt = self._critic_loss(whole, codes, drawn, is_masked, prepared)
            found |= {
                "mask": found["loss"],
                "critic": doubt,
                "loss": found["loss"] + self.loss.critic_weight * doubt,
            }
        return found

    def export(self, networks: Mapping[str, Any], path: Path) -> None:
        """A file that `load_generator` reads."""
        whole = networks["generator"]
        network = whole.maskgit if isinstance(whole, SelfCritic) else whole
        critic = networks.get("critic", whole if isinstance(whole, SelfCritic) else None)
        generator = Phenaki(
            network, critic, codec=self.video_codec, text=self.encoder, options=self.sampling
        )
        generator.codec = self.data.codec
        name = self.config.get("name", "phenaki/custom")
        phenaki.save(generator, path, name=name, dtype=torch.float16)

    def _critic_loss(
        self, critic: Any, codes: Tensor, drawn: Tensor, is_masked: Tensor, prepared: Any
    ) -> Tensor:
        shown = torch.where(is_masked, drawn, codes)
        false = (drawn if self.loss.critic_labels == "published" else shown) != codes
        doubt = critic(shown, prepared).float()
        return F.binary_cross_entropy_with_logits(doubt, false.float())

    def _conditions(self, documents: Iterable[Document]) -> dict[str, Tensor]:
        key = self.data.condition
        if key is None:
            return {}
        every = [d for corpus in self.corpora for d in corpus.documents]
        texts = sorted({str(d.row[key]) for d in every if key in d.row})
        if self.data.encoder == "words":
            known = sorted({str(d.row[key]) for d in documents if key in d.row})
            words = TextCodec(TextConfig(tokenizer=word_tokenizer(known)), name="text/words")
            self.encoder = TextIds(words)
        else:
            self.encoder = T5Features(self.data.encoder)
        pieces = [self.encoder(texts[i : i + 64]) for i in range(0, len(texts), 64)]
        return dict(zip(texts, [one for piece in pieces for one in piece]))

    def _text_sizes(self, table: dict[str, Any]) -> dict[str, int]:
        """What the network reads, as the texts' encoder gives it."""
        if self.encoder is None:
            return {"text_dim": 0, "text_vocab": 0}
        if isinstance(self.encoder, TextIds):
            width = table.pop("text_dim", table.get("dim", 0))
            return {"text_dim": width, "text_vocab": self.encoder.codec.spec.vocab[0][0]}
        return {"text_dim": next(iter(self.conditions.values())).shape[1], "text_vocab": 0}


def masks(shape: torch.Size, loss: MaskedLoss, rng: torch.Generator) -> Tensor:
    """Which positions are masked, [B, N]: each row at its own place of the curve, at least one.

    The draws are the published ones: a place a row, then a number a position, whose order is a random one.
    """
    rows, n = shape
    if loss.places is None:
        place = torch.rand(rows, generator=rng, device=rng.device)
    else:
        place = torch.randint(loss.places, (rows,), generator=rng, device=rng.device) / loss.places
    quarter = math.pi / 2
    share = place.acos() / quarter if loss.curve == "arccos" else (place * quarter).cos()
    count = (n * share).round().clamp(min=1)
    order = torch.rand(rows, n, generator=rng, device=rng.device).argsort(-1)
    return order < count[:, None]


def masked_loss(logits: Tensor, codes: Tensor, is_masked: Tensor, loss: MaskedLoss) -> Tensor:
    """Cross-entropy of logits [B, N, V], the visible codes weighted down."""
    each = F.cross_entropy(
        logits.flatten(0, 1), codes.flatten(), label_smoothing=loss.smoothing, reduction="none"
    )
    weight = torch.where(is_masked, 1.0, loss.unmasked).flatten()
    return (each * weight).sum() / weight.sum()


def accuracy(logits: Tensor, codes: Tensor, is_masked: Tensor) -> Tensor:
    """The share of masked codes that are the likeliest."""
    right = (logits.detach().argmax(-1) == codes) & is_masked
    return right.sum() / is_masked.sum()


def drawn_codes(logits: Tensor, rng: torch.Generator) -> Tensor:
    """A draw of every code [B, N] at temperature 1."""
    uniform = torch.rand(logits.shape, generator=rng, device=rng.device).to(logits.device)
    return gumbel(uniform).add_(logits).argmax(-1)
