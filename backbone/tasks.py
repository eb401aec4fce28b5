"""Training tasks of the backbone, for the one engine.

`PairsTask` learns to write one medium of a document from another: text -> image, image -> text, over a
tokenised corpus.

- The loss counts on what is written; the medium that is read is context.
- The condition is left out in a share of the documents (`drop`), so that guidance exists.
- The first codes of a prefix layout say most about the picture: `front` weighs them more.
- Each draw takes another augmented copy; several documents share a row and do not see each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..codecs.registry import load_codec
from ..codecs.stream import TokenStream
from ..codecs.text import TextCodec, TextConfig
from ..codecs.training.engine import Task, adamw
from ..codecs.training.entry import settings
from ..codecs.training.loader import RandomDataset
from ..modalities.text import Text
from . import masks
from .corpus import Corpus, Document
from .directory import Model, load_model, save_model
from .grounded import Grounded, Grounding
from .interleave import PLACE, Interleaver, Item, Packed, fill
from .rules import Rule
from .transformer import TransformerConfig
from .words import word_tokenizer


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One direction.

    Args:
        read, write: modalities.
        share: how often it is drawn, beside the other pairs.
        units: how many positions of a prefix layout are used (of the side that is no text), one of these a draw.
        copies: only the first so many copies of an item: 1 for media as they are, which is what should be written;
            None for all, which is what reading learns from.
        drop: how often the read side is left out.
        scale: weight of its loss.
        prompts: templates over the row's fields for the text that is read or written, one a draw.
    """

    read: str
    write: str
    share: float = 1.0
    units: tuple[int, ...] = ()
    copies: int | None = None
    drop: float = 0.0
    scale: float = 1.0
    prompts: tuple[str, ...] = ("{text}",)

    @property
    def name(self) -> str:
        """`text_to_image`."""
        return f"{self.read}_to_{self.write}"


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """What is learned, and from what.

    Args:
        root: the folder of the corpora.
        corpora: folders below it that `corpus.tokenize` wrote.
        codecs: modality -> codec name or file, for grounding and export; text is a word tokenizer of the corpora.
        pairs: the directions.
        stack: modality -> how many ids share a position where its stream is only read.
        start: a model directory whose weights training begins with.
        front: (how many first positions of a written prefix, how much more they weigh).
        context: the most ids of a row.
        packing: several documents a row. Saves work where their lengths differ much; where they do not, short rows of
            one document each are faster, since attention is quadratic in a row.
        attention: "auto" is torch's choice; "math" are plain products, in bf16 on CPUs 3 times faster for short rows.
    """

    root: str = "data"
    corpora: tuple[str, ...]
    codecs: Mapping[str, str]
    pairs: tuple[Pair, ...]
    stack: Mapping[str, int] = field(default_factory=dict)
    start: str | None = None
    front: tuple[int, float] = (8, 2.0)
    context: int = 128
    packing: bool = True
    attention: Literal["auto", "math"] = "auto"
    generation: Mapping[str, Any] = field(default_factory=dict)


class PairsTask(Task):
    """See the module's docstring.

    Args:
        config: {"model": TransformerConfig without vocab_size, "data": PairsConfig, "optimizer": {"lr": ...}}.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        pairs = [settings(Pair, pair, "data.pairs") for pair in config["data"]["pairs"]]
        self.data = settings(PairsConfig, {**config["data"], "pairs": pairs}, "data")
        self.corpora = [Corpus(Path(self.data.root) / path) for path in self.data.corpora]
        self.codecs = {m: load_codec(name) for m, name in self.data.codecs.items()}
        self.text = text_codec([d.row for corpus in self.corpora for d in corpus.documents])
        self.interleaver = self._interleaver()
        size = {"vocab_size": self.interleaver.vocabulary.size}
        self.model = settings(TransformerConfig, {**config["model"], **size}, "model")

    def networks(self) -> dict[str, nn.Module]:
        """The transformer, grounded in the vectors of the codec's codes."""
        (codec,) = self.codecs.values()
        return {"backbone": Grounded(self.model, Grounding.of(self.interleaver, codec))}

    def initialise(self, networks: Mapping[str, nn.Module], dataset: Any) -> None:
        """Weights of the model that `start` names."""
        if self.data.start is not None:
            before = load_model(self.data.start, codecs=self.codecs)
            if before.grounded is None or before.transformer.config != self.model:
                raise ValueError(f"{self.data.start} is a model of other sizes than this config's")
            networks["backbone"].load_state_dict(before.grounded.state_dict())

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW."""
        return adamw(parameters, **self.config.get("optimizer", {}))

    def dataset(self) -> Pairs:
        """Documents of the split "train"."""
        items = [item for corpus in self.corpora for item in corpus.items("train")]
        return Pairs(self.data, self.interleaver, self.text, items)

    def collate(self, samples: Sequence[Packed]) -> dict[str, Tensor]:
        """Rows of documents: ids, positions, targets' weights, and, where packed, documents; all [R, L]."""
        rows = fill(samples, self.data.context) if self.data.packing else samples
        place = self.interleaver.vocabulary.special(PLACE)
        return collate(rows, place, packed=self.data.packing)

    def losses(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Cross-entropy of what is written."""
        with contextlib.ExitStack() as stack:
            if self.data.attention == "math":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            return written_loss(networks["backbone"], batch)

    def evaluate(self, networks: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """Loss of each pair on the held-out documents."""
        documents = [d for corpus in self.corpora for d in corpus.documents if d.split == "held"]
        measures = {}
        for pair in self.data.pairs:
            sequences = [
                one
                for d in documents
                if (one := build(d, pair, self.interleaver, self.text, self.data)) is not None
            ]
            if sequences:
                batch = self.collate(sequences)
                device = next(networks["backbone"].parameters()).device
                batch = {k: v.to(device) for k, v in batch.items()}
                loss = written_loss(networks["backbone"], batch)["loss"]
                measures[pair.name] = float(loss.detach())
        return measures

    def export(self, networks: Mapping[str, nn.Module], path: Path) -> None:
        """Write the model directory `model` beside `path`."""
        grounded = networks["backbone"]
        assert isinstance(grounded, Grounded)
        model = Model(
            name=self.config.get("name", "anytok/mini"),
            transformer=grounded.folded().cpu(),
            grounded=grounded,
            interleaver=self.interleaver,
            text=self.text,
            pairs=tuple((p.read, p.write) for p in self.data.pairs),
            generation=dict(self.data.generation),
            codecs=self.codecs,
        )
        save_model(model, path.with_name("model"), dtype=torch.float16)

    def _interleaver(self) -> Interleaver:
        rules = [Rule.of(self.text, limit=self.data.context)]
        for modality, codec in self.codecs.items():
            rules.append(
                Rule.of(
                    codec, limit=self._most_units(modality), stack=self.data.stack.get(modality, 0)
                )
            )
        for corpus in self.corpora:
            corpus.check(rules)
        return Interleaver.build(rules, multiple=64)

    def _most_units(self, modality: str) -> int | None:
        units = [n for p in self.data.pairs for n in p.units if modality in (p.read, p.write)]
        return max(units, default=None)


class Pairs(RandomDataset):
    """Items of a corpus; a draw takes a direction, a copy, a template, and a number of positions."""

    def __init__(
        self,
        config: PairsConfig,
        interleaver: Interleaver,
        text: TextCodec,
        items: Sequence[Sequence[Document]],
    ):
        self.config, self.interleaver, self.text = config, interleaver, text
        self.items = items
        self.shares = torch.tensor([pair.share for pair in config.pairs])

    def __len__(self) -> int:
        return len(self.items)

    def draw(self, index: int, rng: torch.Generator) -> Packed:
        """One document of the item."""
        pair = self.config.pairs[int(torch.multinomial(self.shares, 1, generator=rng))]
        copies = self.items[index][: pair.copies]
        document = copies[_below(len(copies), rng)]
        packed = build(document, pair, self.interleaver, self.text, self.config, rng)
        if packed is None:
            raise ValueError(f"item {index} has no {pair.read} or no {pair.write}")
        return packed


def build(
    document: Document,
    pair: Pair,
    interleaver: Interleaver,
    text: TextCodec,
    config: PairsConfig,
    rng: torch.Generator | None = None,
) -> Packed | None:
    """The sequence of one direction; the plain one (first template, all positions) without `rng`.

    None where the document lacks a medium.
    """
    if any(m != "text" and m not in document.modalities for m in (pair.read, pair.write)):
        return None
    units = pair.units[-1 if rng is None else _below(len(pair.units), rng)] if pair.units else None
    template = pair.prompts[0 if rng is None else _below(len(pair.prompts), rng)]

    def stream(modality: str) -> TokenStream:
        if modality == "text":
            return text.encode([Text(template.format(**document.row))])[0]
        whole = document.stream(modality)
        return whole if units is None else whole[: min(units, len(whole))]

    written = stream(pair.write)
    weights = torch.full((len(interleaver.ids(written)),), pair.scale)
    if pair.write != "text":
        weights[: config.front[0]] *= config.front[1]
    items = [Item(stream=written, weights=weights)]
    if rng is None or float(torch.rand((), generator=rng)) >= pair.drop:
        items.insert(0, Item(stream=stream(pair.read), target=False))
    return interleaver.pack(items)


def collate(rows: Sequence[Packed], place: int, *, packed: bool = True) -> dict[str, Tensor]:
    """Rows [R, L], padded at the right to the longest; padding is a document of its own, -1.

    Args:
        place: the placeholder of positions that several ids share.
        packed: whether rows hold several documents; without, causality keeps padding out, and no mask is needed.
    """
    length = max(len(row) for row in rows)

    def padded(tensors: list[Tensor], value: float) -> Tensor:
        return torch.stack([F.pad(t, (0, length - len(t)), value=value) for t in tensors])

    batch = {
        "ids": padded([row.ids for row in rows], 0),
        "positions": padded([row.positions for row in rows], 0),
        "weights": padded([row.weights for row in rows], 0.0),
    }
    if packed:
        batch["documents"] = padded([row.documents for row in rows], -1)
    stacked = [row.stacked for row in rows if row.stacked is not None]
    if stacked:
        batch |= {"places": batch["ids"] == place, "stacked": torch.cat(stacked)}
    return batch


def written_loss(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weighted cross-entropy [nats an id] of what is written, over what the grammar allows.

    Args:
        network: a `Grounded`.
    """
    assert isinstance(network, Grounded)
    ids, weights = batch["ids"], batch["weights"][:, 1:]
    mask = None
    if "documents" in batch:
        documents = batch["documents"][:, :-1]
        mask = masks.causal(ids.shape[1] - 1, documents=documents, device=ids.device)
    stacked = (batch["places"][:, :-1], batch["stacked"]) if "stacked" in batch else None
    hidden = network(ids[:, :-1], batch["positions"][:, :-1], mask, stacked)
    slots = network.slots(ids)[:, 1:]
    chosen = (weights > 0) & (slots != -2)
    losses = network.losses(hidden[chosen], ids[:, 1:][chosen], slots[chosen])
    weights, grounded = weights[chosen], (slots[chosen] >= 0).float()
    parts = {"codes": grounded, "words": 1 - grounded}
    means = {k: (losses.detach() * v).sum() / v.sum().clamp(min=1) for k, v in parts.items()}
    return {"loss": (losses * weights).sum() / weights.sum(), **means}


def text_codec(rows: Sequence[Mapping[str, Any]], *, extra: Sequence[str] = ()) -> TextCodec:
    """A word tokenizer of everything that rows say (`text`, and `style` where they have one)."""
    texts = [str(row[key]) for row in rows for key in ("text", "style") if key in row]
    config = TextConfig(tokenizer=word_tokenizer([*texts, *extra]))
    return TextCodec(config, name="text/words")


def _below(n: int, rng: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=rng))
