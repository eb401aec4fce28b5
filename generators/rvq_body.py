"""What models of residual codes share: requests, events, and a transformer that reads summed code vectors.

A codec qualifies whose `spec.compose` is "sum" (DAC, EnCodec, RQ-VAE): position i of a stream is the sum over depths of
`code_vectors`. A condition is a short row of ids (a class, characters, words) before the positions; the null is no ids.

B rows, L positions, D depths, V codes of a depth, d width of code vectors, W width, P ids of a condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..backbone.depth import CodeTables
from ..backbone.transformer import Transformer, TransformerConfig
from ..codecs.codec import Codec


@dataclass(frozen=True, kw_only=True)
class BodyConfig:
    """Sizes.

    Args:
        vocab: V of each depth.
        vectors: d of the codec's frozen vectors; None for learned tables (`RQTransformer` only).
        conditions: ids that a condition may hold.
        longest: the most positions, with those of the condition.
    """

    vocab: tuple[int, ...]
    vectors: int | None = None
    conditions: int = 0
    longest: int = 1024
    width: int = 256
    layers: int = 4
    heads: int = 4
    dropout: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "vocab", tuple(self.vocab))

    @property
    def depth(self) -> int:
        """D."""
        return len(self.vocab)

    def transformer(self) -> TransformerConfig:
        """The body's sizes; its one id beside the condition's is "begin"."""
        return TransformerConfig(
            vocab_size=self.conditions + 1,
            width=self.width,
            ffn=4 * self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.heads,
            context=self.longest + 1,
            dropout=self.dropout,
        )


@dataclass(frozen=True, kw_only=True)
class CodeRequest:
    """Codes to draw.

    Args:
        length: L.
        condition: ids [P]; none for no condition.
    """

    length: int
    condition: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


class CodeEvent(NamedTuple):
    """What one step wrote.

    Args:
        request: its number.
        codes: [L', D] as known now; -1 where nothing stands yet.
        forwards: passes of the body (and of the depth head) so far.
        done: whether nothing more comes.
    """

    request: int
    codes: Tensor
    forwards: int
    done: bool


class RVQBody(nn.Module):
    """Conditions and summed code vectors through one transformer."""

    def __init__(self, config: BodyConfig):
        super().__init__()
        self.config = config
        self.tables = CodeTables(config.vocab, config.width, config.vectors)
        self.body = Transformer(config.transformer())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.body.lm_head.weight.device

    def ground(self, codec: Codec) -> None:
        """Take over the code vectors of a codec, scaled so that those of the first depth have the rms 1.

        Raises:
            ValueError: the codec does not add its codes, or has other sizes.
        """
        if codec.spec.compose != "sum":
            raise ValueError(
                f"'{codec.spec.name}' joins codes by '{codec.spec.compose}', expected a residual codec ('sum')"
            )
        tables = [codec.code_vectors(0, depth) for depth in range(self.config.depth)]
        scale = tables[0].square().mean().sqrt()
        self.tables.ground([table / scale for table in tables])

    def begin(self) -> Tensor:
        """The vector [1, W] that stands before the first position."""
        return self.body.embed(torch.tensor([self.config.conditions], device=self.device))

    def condition(self, ids: Tensor) -> Tensor:
        """Vectors [P, W] of a condition."""
        ids = ids.to(self.device)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.conditions:
            raise ValueError(
                f"condition ids reach from {int(ids.min())} to {int(ids.max())}, "
                f"expected 0...{self.config.conditions - 1}"
            )
        return self.body.embed(ids)

    def both_ways(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows [n_i, W] to hidden states [B, n, W]; every position sees every other of its row."""
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        x = pad_sequence(list(rows), batch_first=True)
        seen = torch.arange(x.shape[1], device=self.device) < lengths[:, None]
        mask = seen[:, None, None].expand(-1, 1, x.shape[1], -1)
        return self.body(embeddings=x, mask=mask, keep=0).hidden

    def check(self, number: int, request: CodeRequest) -> None:
        """Raise ValueError where a request does not fit."""
        if request.length < 1:
            raise ValueError(
                f"request {number} has the length {request.length}, expected 1 or more"
            )
        whole = request.length + len(request.condition)
        if whole > self.config.longest:
            raise ValueError(
                f"request {number} has {whole} positions with its condition, the model has {self.config.longest}"
            )


def after(hidden: Tensor, skip: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The states of all rows' positions, one behind another: [sum of lengths, W].

    Args:
        hidden: [B, n, W].
        skip: states of each row that come before.
    """
    return torch.cat([h[s : s + n] for h, s, n in zip(hidden, skip, lengths)])
