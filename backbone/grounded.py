"""Codes whose embeddings come from what the codes mean, in the input and in the output.

A codec knows a vector for each code (`code_vectors`, `position_vectors`). A table of free embeddings would have to
learn from counts that two codes are neighbours; with 4,096 codes at each of 32 positions and 5,000 pictures it cannot.
Here a code's row is a linear map, one for each block of ids, of fixed features of its vector v:

    f = standardised [v, v^2], 1          the squares let the output be a normal distribution of any width
                                          (of one width for all columns where v has more than WIDE)
    input row = f M_in                    output row = f M_out

- Ids below `start` (specials, text) have free rows, tied between input and output.
- The loss at a place is over what the grammar allows there: a block's codes and the closing id, or the free ids.
- `folded` writes the rows out: an ordinary transformer with ordinary tables, which decodes and exports as any other.
  On disk only the maps are kept (`directory.py`).

G free ids, T blocks, V codes a block, m features, D width, N targets.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs.codec import Codec
from .interleave import Interleaver
from .transformer import Transformer, TransformerConfig

WIDE = 12


@dataclass(frozen=True)
class Grounding:
    """The grounded ids of a vocabulary.

    Args:
        modality: whose blocks they are.
        start: the first id; the blocks follow one another, and nothing follows them but unused ids.
        features: [T, V, m].
        closing: the id that ends such a block.
        by_position: block t belongs to position t; otherwise one block serves all.
    """

    modality: str
    start: int
    features: Tensor
    closing: int
    by_position: bool

    @classmethod
    def of(cls, interleaver: Interleaver, codec: Codec) -> Grounding:
        """From a codec that knows its codes' vectors.

        Raises:
            CodecUnavailable: it does not.
        """
        rule = interleaver.rule(codec.spec.modality)
        blocks = interleaver.vocabulary.of(rule.name)
        if any(b.start != blocks[0].start + i * blocks[0].size for i, b in enumerate(blocks)):
            raise ValueError(f"the blocks of '{rule.name}' do not follow one another at equal size")
        if rule.tables:
            vectors = [codec.position_vectors(b.position) for b in blocks]
        else:
            vectors = [codec.code_vectors(b.part, b.depth) for b in blocks]
        return cls(
            modality=rule.modality,
            start=blocks[0].start,
            features=_features(vectors),
            closing=interleaver.tags(rule.modality)[1],
            by_position=bool(rule.tables),
        )


class Grounded(nn.Module):
    """A transformer whose vocabulary ends with grounded blocks.

    Args:
        config: of the whole model; `vocab_size` counts all ids.
    """

    features: Tensor

    def __init__(self, config: TransformerConfig, grounding: Grounding):
        super().__init__()
        self.config = config
        self.modality = grounding.modality
        self.start, self.closing = grounding.start, grounding.closing
        self.by_position = grounding.by_position
        self.register_buffer("features", grounding.features, persistent=False)
        self.blocks, self.codes, width = self.features.shape
        free = dataclasses.replace(config, vocab_size=self.start, tied=True)
        self.transformer = Transformer(free)
        self.maps_in = nn.Parameter(torch.randn(self.blocks, width, config.width) * 0.01)
        self.maps_out = nn.Parameter(torch.randn(self.blocks, width, config.width) * 0.01)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        stacked: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [B, L, D] of ids [B, L].

        Args:
            stacked: where several ids share a position: True at those places [B, L], and their ids [m, D] (-1: none).
        """
        embeddings = self.embed(ids)
        if stacked is not None:
            places, codes = stacked
            rows = (self.embed(codes.clamp(min=0)) * (codes >= 0)[..., None]).sum(1)
            embeddings = embeddings.masked_scatter(places[..., None], rows.to(embeddings.dtype))
        return self.transformer(
            embeddings=embeddings, positions=positions, mask=mask, keep=0
        ).hidden

    def embed(self, ids: Tensor) -> Tensor:
        """Input rows [..., D] of ids [...]."""
        rows = self.transformer.embed(ids.clamp(max=self.start - 1))
        grounded = ids >= self.start
        block, code = self._place(ids[grounded])
        # Features in the columns of their block: one matrix product serves all blocks.
        spread = self.features.new_zeros(len(block), *self.maps_in.shape[:2])
        spread[torch.arange(len(block), device=ids.device), block] = self.features[block, code]
        own = spread.flatten(1) @ self.maps_in.flatten(0, 1)
        return rows.masked_scatter(grounded[..., None], own.to(rows.dtype))

    def slots(self, ids: Tensor) -> Tensor:
        """Which block's softmax each id [B, L] is drawn from as a target; -1: the free ids; -2: it is forced."""
        grounded = ids >= self.start
        block = torch.where(grounded, self._place(ids)[0], -1)
        before = F.pad(block, (1, -1), value=-1)
        after = before + 1 if self.by_position else before
        after = torch.where(after < self.blocks, after, -2)
        return torch.where((ids == self.closing) & (before >= 0), after, block)

    def losses(self, hidden: Tensor, targets: Tensor, slots: Tensor) -> Tensor:
        """Cross-entropy [N] of `targets` [N] from the hidden states [N, D] before them; 0 where they are forced."""
        out = hidden.new_zeros(len(targets), dtype=torch.float32)
        table = self.transformer.model.embed_tokens.weight
        free = (slots == -1).nonzero()[:, 0]
        logits = F.linear(hidden[free], table).float()
        out = out.index_add(0, free, F.cross_entropy(logits, targets[free], reduction="none"))
        queries = torch.einsum("nd,tmd->ntm", hidden, self.maps_out.to(hidden.dtype))
        ends = F.linear(hidden, table[self.closing][None])
        for slot in range(self.blocks):
            rows = (slots == slot).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            logits = F.linear(queries[rows, slot], self.features[slot].to(queries.dtype))
            logits = torch.cat([logits, ends[rows].to(logits.dtype)], 1).float()
            wanted = targets[rows]
            wanted = torch.where(wanted == self.closing, self.codes, self._place(wanted)[1])
            out = out.index_add(0, rows, F.cross_entropy(logits, wanted, reduction="none"))
        return out

    @torch.no_grad()
    def folded(self) -> Transformer:
        """An ordinary transformer with the same outputs, on the same device."""
        free = self.transformer
        model = Transformer(dataclasses.replace(self.config, tied=False))
        state = {k: v.clone() for k, v in free.state_dict().items()}
        state["model.embed_tokens.weight"] = self._rows(self.maps_in)
        state["lm_head.weight"] = self._rows(self.maps_out)
        model.load_state_dict(state)
        return model.to(self.maps_in.device).eval()

    def _rows(self, maps: Tensor) -> Tensor:
        own = (self.features @ maps).flatten(0, 1)
        rows = torch.cat([self.transformer.model.embed_tokens.weight, own])
        return F.pad(rows, (0, 0, 0, self.config.vocab_size - len(rows)))

    def _place(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        at = ids - self.start
        return torch.div(at, self.codes, rounding_mode="floor"), at % self.codes


def _features(vectors: list[Tensor]) -> Tensor:
    """[T, V, m] of T tables [V, d]: columns that are not zero throughout, their squares (summed if many), and one."""
    tables = []
    for table in vectors:
        table = table.detach().float().cpu()
        used = table[:, table.abs().amax(0) > 0]
        squares = used.square()
        if used.shape[1] > WIDE:
            squares = squares.sum(1, keepdim=True)
        tables.append(torch.cat([used, squares], 1))
    width = max(table.shape[1] for table in tables)
    padded = []
    for table in tables:
        spread = table.std(0, keepdim=True).clamp(min=1e-6)
        even = F.pad((table - table.mean(0)) / spread, (0, width - table.shape[1]))
        padded.append(torch.cat([even, torch.ones(len(even), 1)], 1))
    return torch.stack(padded)
