"""Depth head: the codes of one position, one depth after another, by a small transformer (RQ-Transformer, arXiv
2203.01941; kakaobrain/rq-vae-transformer).

At each position it reads the hidden state h of what came before and the sum of the depths that stand already:

    v_1 = h          v_d = e(x_1; 1) + ... + e(x_{d-1}; d-1)          p(x_d | x_<d, h) = softmax(W_d f(v_1 ... v_d))

Its sequence is as long as codes are deep, positions are its batch, so a model of L positions costs L + D steps of
attention's length, not L * D. The tables e are the codec's own code vectors (frozen, mapped by one matrix) where given.
For stacked positions of `Packed` (`segments` of kind "codes") give `losses` the hidden states before each position.

P positions (any leading shape, flattened), D depths, W width, V codes of a depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache
from .interleave import Packed
from .transformer import Transformer, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """Sizes.

    Args:
        vocab: V of each depth.
        hidden: width of the states that come in.
        width, layers, heads: of the small transformer.
        vectors: d of the codec's code vectors; None for tables that are learned here.
    """

    vocab: tuple[int, ...]
    hidden: int
    width: int = 256
    layers: int = 2
    heads: int = 4
    vectors: int | None = None
    dropout: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "vocab", tuple(self.vocab))
        if not self.vocab:
            raise ValueError("vocab is empty, expected the size of each depth")


class DepthHead(nn.Module):
    """The small transformer over depths, and one output map a depth."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.config = c = config
        self.project = nn.Linear(c.hidden, c.width)
        self.tables = CodeTables(c.vocab, c.width, c.vectors)
        self.body = Transformer(
            TransformerConfig(
                vocab_size=1,  # nothing is embedded here
                width=c.width,
                ffn=4 * c.width,
                layers=c.layers,
                heads=c.heads,
                kv_heads=c.heads,
                context=len(c.vocab),
                positions="learned",
                dropout=c.dropout,
            )
        )
        self.outputs = nn.ModuleList(nn.Linear(c.width, v) for v in c.vocab)

    def forward(self, hidden: Tensor, codes: Tensor) -> list[Tensor]:
        """Logits of each depth, D tensors [P, V_d].

        Args:
            hidden: [P, hidden], what came before each position.
            codes: [P, D], the position's own codes; the last is not read.
        """
        x = torch.cat([self.project(hidden)[:, None], self.tables.sums(codes)[:, :-1]], 1)
        states = self.body(embeddings=x, keep=0).hidden
        return [output(states[:, d]) for d, output in enumerate(self.outputs)]

    def losses(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Cross-entropy in nats of each depth of each position, 0 where the code is -1: [P, D]."""
        logits = self(hidden, codes)
        each = [
            F.cross_entropy(scores.float(), codes[:, d], ignore_index=-1, reduction="none")
            for d, scores in enumerate(logits)
        ]
        return torch.stack(each, 1)

    def begin(self, rows: int) -> KVCache:
        """An empty cache for `rows` positions."""
        return self.body.cache(rows, len(self.config.vocab))

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """Logits [P, V_d] of the next depth, after `x` [P, W] (`first`, then sums of codes)."""
        depth = cache.row_lengths()[0]
        state = self.body(embeddings=x[:, None], cache=cache, keep=0).hidden[:, 0]
        return self.outputs[depth](state)

    def first(self, hidden: Tensor) -> Tensor:
        """The first input [P, W], of states [P, hidden]."""
        return self.project(hidden)


class CodeTables(nn.Module):
    """What each code of each depth adds to an input: learned tables, or the codec's frozen vectors and one map.

    Args:
        vectors: width d of the codec's vectors, which `ground` sets; None for learned tables.
    """

    weight: Tensor
    starts: Tensor

    def __init__(self, vocab: Sequence[int], width: int, vectors: int | None):
        super().__init__()
        self.vocab = tuple(vocab)
        inner = width if vectors is None else vectors
        whole = torch.randn(sum(vocab), inner) * 0.02
        if vectors is None:
            self.weight = nn.Parameter(whole)
        else:
            self.register_buffer("weight", whole)
            self.map = nn.Linear(vectors, width)
        starts = torch.tensor([0, *self.vocab]).cumsum(0)[:-1]
        self.register_buffer("starts", starts, persistent=False)
        self.grounded = vectors is not None

    @torch.no_grad()
    def ground(self, tables: Sequence[Tensor]) -> None:
        """Take over the code vectors of a codec, [V_d, d] for each depth."""
        whole = torch.cat(list(tables))
        if not self.grounded or whole.shape != self.weight.shape:
            raise ValueError(
                f"code vectors are {tuple(whole.shape)} in all, expected {tuple(self.weight.shape)} "
                "and a config with `vectors`"
            )
        self.weight.copy_(whole)

    def vectors(self, codes: Tensor) -> Tensor:
        """Table rows [..., n, d] of codes [..., n] of the first n depths; zeros for -1 (no code)."""
        rows = F.embedding(codes.clamp(min=0) + self.starts[: codes.shape[-1]], self.weight)
        return rows * (codes >= 0)[..., None]

    def sums(self, codes: Tensor) -> Tensor:
        """Inputs [..., n, W]: entry d is the sum of depths 0 ... d."""
        return self.mapped(self.vectors(codes).cumsum(-2))

    def mapped(self, vectors: Tensor) -> Tensor:
        """Sums of table rows [..., d] to inputs [..., W]."""
        return self.map(vectors) if self.grounded else vectors


def stacked_positions(packed: Packed) -> tuple[Tensor, Tensor]:
    """Positions [P] before each stacked position of a sequence, and its ids [P, D].

    `hidden[positions]` with the ids, made codes by their block's start, are what `DepthHead.losses` takes.
    -1 stands for no id, where a last position is not full.
    """
    places, codes = [], []
    for segment in packed.segments:
        if segment.kind == "codes" and segment.data is not None:
            places.append(torch.arange(segment.start, segment.stop) - 1)
            codes.append(segment.data)
    if not places:
        raise ValueError("the sequence has no stacked positions (segments of kind 'codes')")
    return torch.cat(places), torch.cat(codes)
