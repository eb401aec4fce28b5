"""xAR as a mode of the shared transformer: ids and continuous entities in one sequence (`Packed`).

- A segment of kind "latents" stands as placeholders in the ids; its rows come from `z_proj`, with a learned place in
  the order of entities. Attention is one mask (`masks.build`): an id is a block of one, an entity a block of many.
- Every position carries a time; discrete parts and clean latents carry 0. A time is added to the row, as an embedding
  from which that of time 0 is taken away: so sequences without latents are exactly the transformer's, and it still
  exports as one.
- Ids predict the next id through the transformer's own head, latents their own velocity through the flow head.
- `Prompted` lets `generators.next_x.NextX` draw entities behind prompts.

R rows, L positions, m latents of a batch, C channels, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import masks
from .cache import KVCache
from .entities import Entities
from .heads import Flow, TimeEmbedding, next_token_loss, noised, thousandths
from .interleave import PLACE, Interleaver, Packed, Segment
from .transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class MixedOutput:
    """hidden [R, L, D]; velocity [m, C] of the latents, in order of rows and positions."""

    hidden: Tensor
    velocity: Tensor


class Batch(NamedTuple):
    """Rows of documents, padded at the right (document -1).

    ids, positions, documents, blocks: [R, L]. weights: [R, L], of an id as a target, or of a latent's velocity.
    latent: [R, L] bool, where latents stand; for these m, row by row: data [m, C], place [m] in the order of entities,
    entity [m], a number for each entity of the batch.
    """

    ids: Tensor
    positions: Tensor
    documents: Tensor
    blocks: Tensor
    weights: Tensor
    latent: Tensor
    data: Tensor
    place: Tensor
    entity: Tensor


class Mixed(nn.Module):
    """A transformer that also reads and writes latents.

    Args:
        transformer: shared; its vocabulary has the specials of the latents' modality.
        entities: how latents are cut.
        channels: C.
    """

    def __init__(self, transformer: Transformer, entities: Entities, channels: int):
        super().__init__()
        width = transformer.config.width
        self.transformer, self.entities, self.channels = transformer, entities, channels
        self.z_proj = nn.Linear(channels, width)
        self.place = nn.Parameter(torch.randn(entities.length, width) * 0.02)
        self.time_embed = TimeEmbedding(width)
        self.pred = Flow(width, channels)

    def forward(self, batch: Batch, latents: Tensor, times: Tensor) -> MixedOutput:
        """Run whole sequences.

        Args:
            latents: [m, C], as noisy as `times` say.
            times: [m] integers, 0 (clean) to 1000 (noise).
        """
        rows = self.transformer.embed(batch.ids)
        own = self.embed(latents, batch.place, times)
        rows = rows.masked_scatter(batch.latent[..., None], own.to(rows.dtype))
        mask = masks.build(batch.blocks, documents=batch.documents)
        out = self.transformer(embeddings=rows, positions=batch.positions, mask=mask, keep=0)
        return MixedOutput(hidden=out.hidden, velocity=self.pred(out.hidden[batch.latent]))

    def embed(self, latents: Tensor, place: Tensor, times: Tensor) -> Tensor:
        """Rows [..., D] of latents [..., C] at places [...] and times [...]."""
        moved = self.time_embed(times) - self.time_embed(torch.zeros_like(times[..., :1]))
        return self.z_proj(latents) + self.place[place] + moved

    def losses(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Flow matching with noisy context where latents are written, cross-entropy where ids are.

        An entity that is written has a logit-normal time of its own; what is only read is clean.
        """
        device, data = batch.data.device, batch.data
        count = int(batch.entity.max()) + 1 if len(data) else 0
        drawn = torch.randn(count, generator=rng, device=rng.device).sigmoid().to(device)
        noise = torch.randn(data.shape, generator=rng, device=rng.device).to(data)
        weights = batch.weights[batch.latent]
        times = drawn[batch.entity] * (weights > 0)
        out = self(batch, noised(data, noise, times), thousandths(times))
        errors = (out.velocity.float() - (noise - data)).square().mean(-1)
        flow = (errors * weights).sum() / weights.sum().clamp(min=1e-9)
        wanted = batch.weights.masked_fill(batch.latent, 0)[:, 1:]
        chosen = wanted > 0
        logits = self.transformer.lm_head(out.hidden[:, :-1][chosen])
        words = next_token_loss(logits, batch.ids[:, 1:][chosen], wanted[chosen])
        return {"loss": flow + words, "flow": flow, "words": words}


class Prompted(nn.Module):
    """A `Mixed` behind prompts, in the form that `NextX` draws from: a "class" is a prompt.

    Args:
        prompts: ids [P] of each, up to and including the opening id of the latents' block.
        null: the prompt that says nothing, for guidance.
    """

    def __init__(self, mixed: Mixed, prompts: Sequence[Tensor], null: Tensor):
        super().__init__()
        self.mixed, self.entities, self.pred = mixed, mixed.entities, mixed.pred
        self.prompts = [*prompts, null]
        self.channels, self.classes = mixed.channels, len(prompts)

    def null(self, labels: Tensor) -> Tensor:
        """The number of the null prompt."""
        return torch.full_like(labels, self.classes)

    def modulate(self, labels: Tensor, times: Tensor) -> None:
        """Times are added to the rows; nothing can be prepared."""
        return None

    def open(self, labels: Tensor) -> KVCache:
        """The prompts of labels [R, 1] in a cache; rows of different length stand side by side."""
        prompts = [self.prompts[i] for i in labels[:, 0].tolist()]
        counts = [len(prompt) for prompt in prompts]
        model = self.mixed.transformer
        model.check_length(max(counts) + self.entities.length, "the prompt with its latents")
        cache = model.cache(len(prompts), max(counts) + self.entities.length)
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(labels.device)
        model(ids, cache=cache, counts=counts, keep=0)
        self.starts = counts
        return cache

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        times: Tensor,
        *,
        first: int = 0,
        cache: KVCache,
        keep: int = 0,
        modulations: None = None,
    ) -> Tensor:
        """Velocities [R, T, C] of entities first ... behind what the cache holds; see `XAR.forward`."""
        entities, held = self.entities, cache.row_lengths()
        start, stop = entities.span(first, first + times.shape[1])
        entity = entities.blocks(first, first + times.shape[1]).to(z.device) - first
        place = torch.arange(start, stop, device=z.device)
        rows = self.mixed.embed(z, place.expand(len(z), -1), times[:, entity])
        lengths = torch.tensor(held, device=z.device)
        positions = lengths[:, None] + place - start
        # held positions are block -1; a row's own new ones stand behind its own length
        columns = torch.arange(max(held) + stop - start, device=z.device) - lengths[:, None]
        inside = (columns >= 0) & (columns < stop - start)
        blocks = torch.where(inside, entity[columns.clamp(0, stop - start - 1)], -1)
        seen = (columns < stop - start)[:, None] & (entity[:, None] >= blocks[:, None])
        out = self.mixed.transformer(
            embeddings=rows, positions=positions, mask=seen[:, None], cache=cache, keep=0
        )
        kept = entities.span(first, first + keep)
        cache.rewind([length + kept[1] - kept[0] for length in held])
        return self.pred(out.hidden)


def latent_document(
    interleaver: Interleaver,
    before: Packed,
    latents: Tensor,
    entities: Entities,
    *,
    modality: str = "image",
    target: bool = True,
) -> Packed:
    """A document with a block of latents behind it.

    Args:
        before: what stands before, without its closing `<eos>` (`Interleaver.pack(..., end=False)`).
        latents: [C, h, w], scaled.
        target: whether they are learned to be written, or only read.
    """
    data = entities.split(latents[None])[0]
    opening, closing = interleaver.tags(modality)
    place = interleaver.vocabulary.special(PLACE)
    body = torch.full((len(data),), place)
    ids = torch.cat([before.ids, torch.tensor([opening]), body, torch.tensor([closing])])
    weight = 1.0 if target else 0.0
    weights = torch.cat([before.weights, torch.full((len(data) + 2,), weight)])
    start = len(before) + 1
    segment = Segment(
        start=start, stop=start + len(data), kind="latents", block=modality, data=data
    )
    return Packed(
        ids=ids,
        weights=weights,
        positions=torch.arange(len(ids)),
        documents=torch.zeros(len(ids), dtype=torch.int64),
        segments=(*before.segments, segment),
    )


def collate(rows: Sequence[Packed], entities: Entities, channels: int) -> Batch:
    """Rows of documents, several a row or one, as a batch.

    Raises:
        ValueError: a segment of latents that is not whole.
    """
    length = max(len(row) for row in rows)

    def padded(tensors: Sequence[Tensor], value: float) -> Tensor:
        return torch.stack([F.pad(t, (0, length - len(t)), value=value) for t in tensors])

    blocks = torch.arange(length).repeat(len(rows), 1)
    latent = torch.zeros(len(rows), length, dtype=torch.bool)
    data = [torch.zeros(0, channels)]
    own = entities.blocks()
    starts = torch.tensor([entities.span(0, i)[1] for i in range(len(entities))])
    for number, row in enumerate(rows):
        for segment in row.segments:
            if segment.kind != "latents" or segment.data is None:
                continue
            if len(segment.data) != entities.length:
                raise ValueError(
                    f"row {number}: a segment of {len(segment.data)} latents, entities have {entities.length}"
                )
            span = slice(segment.start, segment.stop)
            latent[number, span] = True
            blocks[number, span] = segment.start + starts[own]
            data.append(segment.data)
    pieces = len(data) - 1
    entity = torch.arange(pieces)[:, None] * len(entities) + own
    return Batch(
        ids=padded([row.ids for row in rows], 0),
        positions=padded([row.positions for row in rows], 0),
        documents=padded([row.documents for row in rows], -1),
        blocks=blocks,
        weights=padded([row.weights for row in rows], 0.0),
        latent=latent,
        data=torch.cat(data),
        place=torch.arange(entities.length).repeat(pieces),
        entity=entity.flatten(),
    )
