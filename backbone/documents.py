"""Next-token training on interleaved documents: what `anytok tokenize` wrote, streamed and packed.

- The loss counts each item by its modality and by its role: 0 makes it context that is only read.
- Documents of two items can be drawn in either order (`flip`), so that pairs are learned in both directions, and
  without what comes first (`drop`), so that guidance exists.
- Loss and accuracy are logged for each modality.
- The vocabulary follows from the corpora; a corpus of another codec than the model's is refused.

R rows, L ids of a row, N targets, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs.codec import Codec
from ..codecs.registry import load_codec
from ..codecs.stream import TokenStream
from ..codecs.text import TextCodec, TextConfig
from ..codecs.training.engine import Task, adamw
from ..codecs.training.entry import settings
from ..modalities.text import Text
from . import masks
from .corpus import CorpusError
from .directory import Model, load_model, save_model
from .grounded import Grounded, Grounding
from .interleave import PLACE, Interleaver, Item, Packed
from .rules import Rule
from .shards import Document, Shards
from .streaming import Rows
from .tasks import collate
from .transformer import Transformer, TransformerConfig
from .words import word_tokenizer


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig:
    """What is learned, and from what.

    Args:
        root: the folder of the corpora.
        corpora: folders below it that `anytok tokenize` wrote; "." is `root` itself.
        codecs: modality -> codec name or file, where the name in the corpus does not find it.
        text: "words" (of the corpora), "bytes", or a `tokenizer.json`.
        ground: the modality whose codes' embeddings come from its codec's vectors (`grounded.py`); None for none.
        start: a model directory that training goes on from; its vocabulary is kept.
        weights: modality -> loss weight; 1 where none is given, 0 for what is only read.
        roles: role -> loss weight, which multiplies that of the modality.
        units: modality -> how many positions of a prefix layout are used, one of these a draw.
        flip: how often a document of two items is drawn in reverse.
        drop: how often only a document's last item is drawn.
        context: the most ids of a row.
        overlong: "error" or "skip", for documents that are longer.
        held: rows of held-out documents in an evaluation, at most.
        generation: the model's defaults, by written modality.
    """

    root: str = "data"
    corpora: tuple[str, ...]
    codecs: Mapping[str, str] = field(default_factory=dict)
    text: str = "words"
    ground: str | None = None
    start: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    roles: Mapping[str, float] = field(default_factory=dict)
    units: Mapping[str, Sequence[int]] = field(default_factory=dict)
    flip: float = 0.0
    drop: float = 0.0
    context: int = 1024
    overlong: str = "error"
    held: int = 64
    generation: Mapping[str, Any] = field(default_factory=dict)


class DocumentsTask(Task):
    """See the module's docstring.

    Args:
        config: {"model": TransformerConfig without vocab_size, "data": DocumentsConfig, "optimizer": {"lr": ...}}.
            With `data.start` the sizes are that model's, and "model" is left out.

    Raises:
        CorpusError: a corpus is damaged, or was tokenised with another codec than the model's.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.data = settings(DocumentsConfig, config["data"], "data")
        self.corpora = [Shards(Path(self.data.root) / path) for path in self.data.corpora]
        known = {m: rule for corpus in self.corpora for m, rule in corpus.rules.items()}
        self.codecs: dict[str, Codec] = {
            m: load_codec(self.data.codecs.get(m, rule.name)) for m, rule in known.items()
        }
        self.facts = _Facts.of(self.corpora)
        self.before = None
        if self.data.start is not None:
            self.before = load_model(self.data.start, codecs=self.codecs)
            self.text, self.interleaver = self.before.text, self.before.interleaver
            self.model = self.before.transformer.config
        else:
            self.text = self._text()
            self.interleaver = self._interleaver()
            size = {"vocab_size": self.interleaver.vocabulary.size}
            self.model = settings(TransformerConfig, {**config["model"], **size}, "model")
        for modality in known:
            self.interleaver.rule(modality)  # ValueError where the model knows no such modality
        for corpus in self.corpora:
            corpus.check(self.interleaver.rules.values())
        self.modalities = list(self.interleaver.rules)
        self.kinds = kinds(self.interleaver)

    def networks(self) -> dict[str, nn.Module]:
        """The transformer, grounded where `ground` says so."""
        if self.before is not None:
            return {"backbone": (self.before.grounded or self.before.transformer).float()}
        if self.data.ground is None:
            return {"backbone": Transformer(self.model)}
        if self.data.ground not in self.codecs:
            raise CorpusError(
                f"data.ground is {self.data.ground!r}, the corpora have no such medium"
            )
        grounding = Grounding.of(self.interleaver, self.codecs[self.data.ground])
        return {"backbone": Grounded(self.model, grounding)}

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW."""
        return adamw(parameters, **self.config.get("optimizer", {}))

    def dataset(self) -> Rows:
        """Rows of the split "train"."""
        return self._rows(train=True)

    def collate(self, samples: Sequence[Packed]) -> dict[str, Tensor]:
        """Rows as tensors [R, L]; see `tasks.collate`."""
        return collate(samples, self.interleaver.vocabulary.special(PLACE))

    def losses(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Weighted cross-entropy of the next id [nats], and the means of each modality."""
        losses, hits, targets, weights = scores(networks["backbone"], batch)
        total = (losses * weights).sum() / weights.sum().clamp(min=1e-6)
        own = self.kinds.to(targets.device)[targets]
        means = {}
        for number, modality in enumerate(self.modalities):
            chosen = (own == number).float()
            count = chosen.sum().clamp(min=1)
            means[f"{modality}_loss"] = (losses.detach() * chosen).sum() / count
            if hits is not None:
                means[f"{modality}_accuracy"] = (hits * chosen).sum() / count
        return {"loss": total, **means}

    @torch.no_grad()
    def evaluate(self, networks: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """Loss and accuracy of each modality on held-out documents, if there are any."""
        if not self.facts.held:
            return {}
        rows, network = self._rows(train=False), networks["backbone"]
        device = next(network.parameters()).device
        sums = torch.zeros(len(self.modalities), 3, device=device)
        for i in range(min(len(rows), self.data.held)):
            batch = {k: v.to(device) for k, v in self.collate([rows[i]]).items()}
            losses, hits, targets, _ = scores(network, batch)
            assert hits is not None  # in eval mode it is always known
            own = self.kinds.to(device)[targets]
            for number in range(len(self.modalities)):
                one = own == number
                sums[number] += torch.stack([losses[one].sum(), hits[one].sum(), one.sum()])
        measures = {}
        for modality, (loss, right, count) in zip(self.modalities, sums.tolist()):
            if count:
                measures[f"{modality}_loss"] = loss / count
                measures[f"{modality}_accuracy"] = right / count
        return measures

    def export(self, networks: Mapping[str, nn.Module], path: Path) -> None:
        """Write the model directory `model` beside `path`."""
        network = networks["backbone"]
        grounded = network if isinstance(network, Grounded) else None
        transformer = network if grounded is None else grounded.folded()
        assert isinstance(transformer, Transformer)
        pairs = dict.fromkeys([*(self.before.pairs if self.before else ()), *self._pairs()])
        model = Model(
            name=self.config.get("name", "anytok/documents"),
            transformer=transformer.cpu(),
            grounded=grounded,
            interleaver=self.interleaver,
            text=self.text,
            pairs=tuple(pairs),
            generation=dict(self.data.generation),
            codecs=self.codecs,
        )
        save_model(model, path.with_name("model"), dtype=torch.float16)

    def pack(self, document: Document, rng: torch.Generator | None = None) -> Packed:
        """A document's sequence; without `rng` the whole one, in its own order."""
        items, data = list(zip(document.items, document.roles)), self.data
        if rng is not None:
            if len(items) == 2 and _chance(data.flip, rng):
                items.reverse()
            if _chance(data.drop, rng):
                items = items[-1:]
        return self.interleaver.pack([self._item(item, role, rng) for item, role in items])

    def _item(
        self, content: str | TokenStream, role: str | None, rng: torch.Generator | None
    ) -> Item:
        stream = self.text.encode([Text(content)])[0] if isinstance(content, str) else content
        units = self.data.units.get(stream.modality, ())
        if units:
            most = max(units) if rng is None else units[_below(len(units), rng)]
            stream = stream[: min(most, len(stream))]
        weight = self.data.weights.get(stream.modality, 1.0)
        weight *= 1.0 if role is None else self.data.roles.get(role, 1.0)
        ids = len(self.interleaver.ids(stream))
        return Item(stream=stream, target=weight > 0, weights=torch.full((ids,), weight), role=role)

    def _rows(self, *, train: bool) -> Rows:
        data = self.data
        return Rows(
            self.corpora, self.pack, context=data.context, train=train, overlong=data.overlong
        )

    def _text(self) -> TextCodec:
        if self.data.text == "bytes":
            return TextCodec()
        if self.data.text == "words":
            config = TextConfig(tokenizer=word_tokenizer(self.facts.words))
            return TextCodec(config, name="text/words")
        return TextCodec.from_file(self.data.text)

    def _interleaver(self) -> Interleaver:
        rules = [Rule.of(self.text)]
        for modality, codec in self.codecs.items():
            rules.append(Rule.of(codec, limit=max(self.data.units.get(modality, ()), default=None)))
        rules.sort(key=lambda rule: rule.modality == self.data.ground)  # grounded ids come last
        return Interleaver.build(rules, multiple=64)

    def _pairs(self) -> list[tuple[str, str]]:
        pairs = sorted(self.facts.pairs)
        return pairs + [(b, a) for a, b in pairs] if self.data.flip else pairs


@dataclass(frozen=True)
class _Facts:
    """What one reading of the corpora tells: words of training texts, which medium follows which, what is held."""

    words: frozenset[str]
    pairs: frozenset[tuple[str, str]]
    held: bool

    @classmethod
    def of(cls, corpora: Sequence[Shards]) -> _Facts:
        words: set[str] = set()
        pairs: set[tuple[str, str]] = set()
        held = False
        for corpus in corpora:
            for document in (d for n in range(len(corpus)) for d in corpus.read(n)):
                held |= document.split != "train"
                if document.split == "train":
                    texts = [item for item in document.items if isinstance(item, str)]
                    words |= {word for text in texts for word in text.lower().split()}
                    order = document.modalities
                    pairs |= {(a, b) for a, b in pairwise(order) if a != b}
        return cls(frozenset(words), frozenset(pairs), held)


def kinds(interleaver: Interleaver) -> Tensor:
    """The number of each id's modality [V], in the order of the rules; -1 for framing and what nothing owns."""
    vocabulary = interleaver.vocabulary
    table = torch.full((vocabulary.size,), -1)
    for number, (modality, rule) in enumerate(interleaver.rules.items()):
        table[list(interleaver.tags(modality))] = number
        for block in vocabulary.of(rule.name):
            table[block.start : block.stop] = number
    return table


def scores(
    network: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Loss [N], whether the first choice was right [N], id [N] and weight [N] of each target.

    A grounded network's choices cost a second pass over its tables: they are known in eval mode only.
    """
    ids, documents = batch["ids"], batch["documents"][:, :-1]
    mask = masks.causal(ids.shape[1] - 1, documents=documents, device=ids.device)
    positions, weights = batch["positions"][:, :-1], batch["weights"][:, 1:]
    chosen = weights > 0
    if isinstance(network, Grounded):
        slots = network.slots(ids)[:, 1:]
        chosen = chosen & (slots != -2)  # what the grammar forces needs no learning
        hidden = network(ids[:, :-1], positions, mask)[chosen]
        targets, slots = ids[:, 1:][chosen], slots[chosen]
        losses = network.losses(hidden, targets, slots)
        hits = None if network.training else (_first_choices(network, hidden, slots) == targets)
        return losses, hits, targets, weights[chosen]
    hidden = network(ids[:, :-1], positions=positions, mask=mask, keep=0).hidden[chosen]
    assert isinstance(network, Transformer)
    logits, targets = network.lm_head(hidden).float(), ids[:, 1:][chosen]
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses, logits.argmax(-1) == targets, targets, weights[chosen]


@torch.no_grad()
def _first_choices(network: Grounded, hidden: Tensor, slots: Tensor) -> Tensor:
    """The likeliest id [N] after the hidden states [N, D], within what the grammar allows."""
    table = network.transformer.model.embed_tokens.weight
    choice = F.linear(hidden, table).argmax(-1)
    ends = F.linear(hidden, table[network.closing][None])
    for slot in range(network.blocks):
        rows = (slots == slot).nonzero()[:, 0]
        if len(rows):
            queries = hidden[rows] @ network.maps_out[slot].to(hidden.dtype).T
            logits = torch.cat([queries @ network.features[slot].to(queries).T, ends[rows]], 1)
            code = logits.argmax(-1)
            first = network.start + slot * network.codes
            choice[rows] = torch.where(code == network.codes, network.closing, first + code)
    return choice


def _chance(share: float, rng: torch.Generator) -> bool:
    return float(torch.rand((), generator=rng)) < share


def _below(n: int, rng: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=rng))
