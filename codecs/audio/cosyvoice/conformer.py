"""The flow's token encoders: transformers with relative positions (Conformer without convolutions, as in ESPnet).

| version | blocks | rate |
|---|---|---|
| v1 | 6 | of the tokens; `flow.LengthRegulator` stretches its output |
| v2 | lookahead, 6, twice the rate, 4 | two frames a token |

- Scores are (q + u)·k + (q + v)·p with p of the distance between query and key. Queries go in blocks, so that memory
  grows with the length and not with its square.
- v2 streams: in chunks a position sees its chunk and all before; the lookahead layer alone sees 3 tokens more.

Letters: B batch, T positions, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LOOKAHEAD = 3  # tokens
QUERIES = 512  # of a block


class Layer(nn.Module):
    """One block [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.self_attn = RelativeAttention(width, heads)
        self.feed_forward = FeedForward(width, hidden)
        self.norm_mha = nn.LayerNorm(width, eps=1e-12)
        self.norm_ff = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, table: Tensor, n: Tensor | None, chunk: int) -> Tensor:
        """See `RelativeAttention`."""
        x = x + self.self_attn(self.norm_mha(x), table, n, chunk)
        return x + self.feed_forward(self.norm_ff(x))


class RelativeAttention(nn.Module):
    """Attention whose scores know the distance (Transformer-XL, arXiv 1901.02860)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("linear_q", "linear_k", "linear_v", "linear_out"):
            setattr(self, name, nn.Linear(width, width))
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, width // heads))

    def forward(self, x: Tensor, table: Tensor, n: Tensor | None, chunk: int) -> Tensor:
        """x [B, T, D].

        Args:
            table: [2 T - 1, D], the distances T - 1 to 1 - T.
            n: positions [B] that count; None for all.
            chunk: positions of a chunk; a query sees its own chunk and those before. 0: it sees all.
        """
        q, k, v = (
            rearrange(layer(x), "b t (h d) -> b h t d", h=self.heads)
            for layer in (self.linear_q, self.linear_k, self.linear_v)
        )
        p = rearrange(self.linear_pos(table), "t (h d) -> h d t", h=self.heads)
        length, parts = x.shape[1], []
        for start in range(0, length, QUERIES):
            stop = min(start + QUERIES, length)
            # The distances from stop - 1 down to start - (T - 1).
            near = p[..., length - stop : 2 * length - 1 - start]
            part = q[:, :, start:stop]
            bias = shifted((part + self.pos_bias_v[:, None]) @ near) / math.sqrt(q.shape[-1])
            seen = visible(start, stop, length, n, chunk, x.device)
            bias = bias if seen is None else bias.masked_fill(~seen, -math.inf)
            query = part + self.pos_bias_u[:, None]
            parts.append(F.scaled_dot_product_attention(query, k, v, attn_mask=bias))
        return self.linear_out(rearrange(torch.cat(parts, 2), "b h t d -> b t (h d)"))


def shifted(scores: Tensor) -> Tensor:
    """[B, H, Q, T + Q - 1] by distance (farthest behind first) to [B, H, Q, T] by key."""
    b, h, q, distances = scores.shape
    strides = (h * q * distances, q * distances, distances - 1, 1)
    # Row i's distance to key j stands at column q - 1 - i + j.
    return scores.contiguous().as_strided((b, h, q, distances - q + 1), strides, q - 1)


def visible(
    start: int, stop: int, length: int, n: Tensor | None, chunk: int, device: torch.device
) -> Tensor | None:
    """Which keys the queries `start` to `stop` see, broadcast to [B, H, Q, T]; None for all."""
    keys = torch.arange(length, device=device)
    seen = None if n is None else (keys < n[:, None])[:, None, None]
    if chunk:
        queries = torch.arange(start, stop, device=device)[:, None]
        before = keys < (queries // chunk + 1) * chunk
        seen = before if seen is None else before & seen
    return seen


def distances(length: int, width: int, like: Tensor) -> Tensor:
    """Sines and cosines, interleaved, of the distances T - 1 to 1 - T: [2 T - 1, D]."""
    rates = torch.exp(-math.log(10_000) / width * torch.arange(0, width, 2, device=like.device))
    steps = torch.arange(length - 1, -length, -1, device=like.device)
    angles = steps[:, None] * rates
    return rearrange(torch.stack([angles.sin(), angles.cos()], -1), "t d two -> t (d two)").to(
        like.dtype
    )


class FeedForward(nn.Module):
    """[..., D] -> [..., D]."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Every position by itself."""
        return self.w_2(F.silu(self.w_1(x)))


class Embed(nn.Module):
    """Projected, normalised, scaled: [..., D] -> [..., D]."""

    def __init__(self, width: int):
        super().__init__()
        self.out = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        """Every position by itself."""
        return self.out(x) * math.sqrt(x.shape[-1])


class Encoder(nn.Module):
    """v1's: [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int, hidden: int, layers: int):
        super().__init__()
        self.embed = Embed(width)
        self.encoders = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.after_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, n: Tensor | None = None) -> Tensor:
        """Embedded tokens, of which n [B] count."""
        x = through(self.encoders, self.embed(x), n, 0)
        return self.after_norm(x)


class UpsamplingEncoder(nn.Module):
    """v2's: [B, T, D] -> [B, 2 T, D]."""

    def __init__(self, width: int, heads: int, hidden: int, layers: int, up_layers: int):
        super().__init__()
        self.embed = Embed(width)
        self.pre_lookahead_layer = Lookahead(width, width)
        self.encoders = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.up_layer = nn.Module()
        self.up_layer.conv = nn.Conv1d(width, width, 5)
        self.up_embed = Embed(width)
        self.up_encoders = nn.ModuleList(Layer(width, heads, hidden) for _ in range(up_layers))
        self.after_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, n: Tensor | None, chunk: int, *, last: bool) -> Tensor:
        """Embedded tokens, of which n [B] count, in chunks of so many tokens (0: none).

        Without `last`, the last 3 of each row are only looked at: the result is for n - 3 tokens.
        """
        x = self.pre_lookahead_layer(self.embed(x), n)
        if not last:
            x, n = x[:, :-LOOKAHEAD], None if n is None else n - LOOKAHEAD
        x = through(self.encoders, x, n, chunk)
        x = F.pad(x.repeat_interleave(2, 1), (0, 0, 4, 0))
        x = self.up_embed(self.up_layer.conv(x.mT).mT)
        x = through(self.up_encoders, x, None if n is None else 2 * n, 2 * chunk)
        return self.after_norm(x)


def through(layers: Iterable[nn.Module], x: Tensor, n: Tensor | None, chunk: int) -> Tensor:
    """[B, T, D] through blocks."""
    table = distances(x.shape[1], x.shape[2], x)
    for layer in layers:
        x = layer(x, table, n, chunk)
    return x


class Lookahead(nn.Module):
    """Each token sees 3 more: [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv1d(width, hidden, LOOKAHEAD + 1)
        self.conv2 = nn.Conv1d(hidden, width, 3)

    def forward(self, x: Tensor, n: Tensor | None = None) -> Tensor:
        """Beyond a row's end there is nothing to see."""
        if n is not None:
            x = x.masked_fill(
                (torch.arange(x.shape[1], device=x.device) >= n[:, None])[..., None], 0
            )
        y = F.leaky_relu(self.conv1(F.pad(x.mT, (0, LOOKAHEAD))))
        return x + self.conv2(F.pad(y, (2, 0))).mT
