"""RQ-Transformer: residual codes one position after another, and within a position one depth after another (arXiv
2203.01941; kakaobrain/rq-vae-transformer). The baseline that ResGen beats.

    [condition] [begin] z_1 ... z_{L-1} ─ body ─▶ h_1 ... h_L        z_i = e(x_i1; 1) + ... + e(x_iD; D)
    h_i ─ depth head ─▶ x_i1, then x_i2 given x_i1, ...

p(x) is the product of both; a picture or sound takes L passes of the body and L * D steps of the depth head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..backbone.cache import KVCache
from ..backbone.depth import DepthConfig, DepthHead
from ..codecs.codec import Rng, item_rngs
from .rvq_body import BodyConfig, CodeEvent, CodeRequest, RVQBody, after
from .sampling import Sampling, draw, guided


@dataclass(frozen=True, kw_only=True)
class RQTransformerConfig(BodyConfig):
    """Sizes of the body, and of the depth head.

    Args:
        depth_width, depth_layers, depth_heads: W, layers and heads of the head.
    """

    depth_width: int = 128
    depth_layers: int = 2
    depth_heads: int = 4


class RQTransformer(RVQBody):
    """Body and depth head; both read the same code vectors."""

    config: RQTransformerConfig

    def __init__(self, config: RQTransformerConfig):
        super().__init__(config)
        self.head = DepthHead(
            DepthConfig(
                vocab=config.vocab,
                hidden=config.width,
                width=config.depth_width,
                layers=config.depth_layers,
                heads=config.depth_heads,
                vectors=config.vectors,
                dropout=config.dropout,
            )
        )

    def ground(self, codec) -> None:
        """Take over the codec's vectors, in the body and in the head."""
        super().ground(codec)
        self.head.tables.weight.copy_(self.tables.weight)

    def losses(self, codes: Sequence[Tensor], conditions: Sequence[Tensor]) -> Tensor:
        """-log p in nats of each code of each position of all rows: [sum of L_i, D].

        Args:
            codes: [L_i, D] of each row.
            conditions: ids [P_i] of each row.
        """
        codes = [one.to(self.device) for one in codes]
        rows = [
            torch.cat([self.condition(c), self.begin(), self.tables.sums(x[:-1])[:, -1]])
            for x, c in zip(codes, conditions)
        ]
        hidden = self.body(embeddings=pad_sequence(rows, batch_first=True), keep=0).hidden
        states = after(hidden, [len(c) for c in conditions], [len(x) for x in codes])
        return self.head.losses(states, torch.cat(codes))

    def loss(
        self, codes: Sequence[Tensor], conditions: Sequence[Tensor], rng: torch.Generator
    ) -> dict[str, Tensor]:
        """What training minimises: nats a code. Nothing is random."""
        loss = self.losses(codes, conditions).mean()
        return {"loss": loss}

    def run(
        self,
        requests: Sequence[CodeRequest],
        options: Sampling | None = None,
        rng: Rng | None = None,
    ) -> Iterator[CodeEvent]:
        """One event a row and position. Rows of different length share a batch and leave it when finished."""
        for number, request in enumerate(requests):
            self.check(number, request)
        return self._loop(requests, options or Sampling(), item_rngs(rng, len(requests)))

    @torch.inference_mode()
    def _loop(
        self, requests: Sequence[CodeRequest], options: Sampling, rng: Sequence[torch.Generator]
    ) -> Iterator[CodeEvent]:
        if not requests:
            return
        live, halves = list(range(len(requests))), 1 if options.cfg == 1 else 2
        prompts = [torch.cat([self.condition(r.condition), self.begin()]) for r in requests]
        prompts += [self.begin()] * (len(requests) if halves == 2 else 0)
        counts = [len(p) for p in prompts]
        cache = self.body.cache(len(prompts), max(counts) + max(r.length for r in requests))
        x, written = pad_sequence(prompts, batch_first=True), 0
        codes = torch.zeros(len(requests), 0, self.config.depth, dtype=torch.int64)
        while live:
            states = self.body(embeddings=x, cache=cache, counts=counts, keep=0).hidden
            hidden = states[torch.arange(len(counts)), torch.tensor(counts) - 1]
            new = self._position(hidden, halves, options, [rng[i] for i in live])
            codes, written = torch.cat([codes, new.cpu()[:, None]], 1), written + 1
            ends = [written == requests[i].length for i in live]
            for row, i in enumerate(live):
                yield CodeEvent(i, codes[row], written * (1 + self.config.depth), ends[row])
            stay = [row for row, end in enumerate(ends) if not end]
            if not stay:
                return
            if len(stay) < len(live):
                cache.take([half * len(live) + row for half in range(halves) for row in stay])
                codes, new, live = codes[stay], new[stay], [live[row] for row in stay]
            x = self.tables.sums(new)[:, -1:].repeat(halves, 1, 1)
            counts = [1] * len(x)

    def _position(
        self, hidden: Tensor, halves: int, options: Sampling, rng: Sequence[torch.Generator]
    ) -> Tensor:
        """The codes [B, D] of one position, from states [halves * B, W]."""
        cache: KVCache = self.head.begin(len(hidden))
        x, codes = self.head.first(hidden), []
        for depth in range(self.config.depth):
            logits = self.head.step(x, cache)
            if halves == 2:
                with_it, without = logits.chunk(2)
                logits = guided(with_it, without, options.cfg)
            codes.append(torch.tensor(draw(logits, options, rng), device=logits.device))
            if depth + 1 < self.config.depth:
                x = self.head.tables.sums(torch.stack(codes, 1))[:, -1].repeat(halves, 1)
        return torch.stack(codes, 1)


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
