"""Phenaki's networks: a transformer that sees all video tokens at once, with text by cross-attention, and its critics.

Phenaki (arXiv 2210.02399), in the layout of lucidrains/phenaki-pytorch 0.5 under its names. A layer: PEG (a depthwise
3x3x3 convolution over the grid), self-attention with a bias from distances in time and space, cross-attention to the
text and to two learned keys that always stand there, a gated feed-forward. Queries and keys are unit vectors; only the
queries' input is normalised. Without a condition the text is hidden and the two keys remain: that is the null.

- `VideoMaskGIT`: tokens in, logits out.
- `TokenCritic` (arXiv 2209.04439): a network of its own, tokens in, one doubt each out, without the distance bias.
- `SelfCritic`: one linear layer on the generator's own features.

Keys and values of the text and the distance bias do not change from step to step: `prepare` computes them.

Letters: R rows, N = T h w positions, V codes, D width, n heads, d head width, L text positions, C text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..codecs.published import WeightsError, load_into
from ..codecs.video.cvivit import GEGLU, LOGIT_SCALE, Norm
from .generator import Canvas

NULL_KEYS = 2


@dataclass(frozen=True, kw_only=True)
class VideoMaskConfig:
    """One network.

    Args:
        vocab: V, the codec's codes.
        length: the most positions of a canvas.
        heads, head_dim: of all attention; the gated feed-forward is 8/3 `dim` wide.
        text_dim: C, width of the text's features; 0 for a network without text.
        text_vocab: where positive the condition is ids, and the network has their table (ours).
        critic: one doubt a position in place of logits, and no distance bias.
        dropout: of attention and feed-forward, while training.
        shrink: the share of the gradient that reaches the tables (as in CogView; 1 for all).
    """

    vocab: int
    length: int
    dim: int
    depth: int
    heads: int = 8
    head_dim: int = 64
    text_dim: int = 768
    text_vocab: int = 0
    critic: bool = False
    dropout: float = 0.0
    shrink: float = 0.1

    def __post_init__(self):
        if self.text_vocab and not self.text_dim:
            raise ValueError("text_vocab is given and text_dim is 0, expected the table's width")


@dataclass(frozen=True)
class Prepared:
    """What no step changes.

    Args:
        grid: (T, h, w).
        bias: added to the logits of self-attention, [n, N, N] or [R, n, N, N]; None for none.
        text: keys and values [R, n, L', d] of each layer, L' with the null keys; None without text.
        seen: which of these keys a row sees, [R, 1, 1, L'].
    """

    grid: tuple[int, int, int]
    bias: Tensor | None
    text: tuple[tuple[Tensor, Tensor], ...] | None
    seen: Tensor | None


class VideoMasked(nn.Module):
    """Tables, transformer, and what a condition becomes."""

    def __init__(self, config: VideoMaskConfig):
        super().__init__()
        self.config = c = config
        self.vocab = c.vocab
        self.token_emb = nn.Embedding(c.vocab + 1, c.dim)
        self.pos_emb = nn.Embedding(c.length, c.dim)
        if c.text_vocab:
            self.text_emb = nn.Embedding(c.text_vocab, c.text_dim)
        self.transformer = VideoTransformer(c)

    def check(self, canvas: Canvas) -> None:
        """Raise ValueError where a canvas is too long, has no grid, or a condition of another kind."""
        c, given = self.config, canvas.condition
        if len(canvas.grid) != 3:
            raise ValueError(f"the canvas has the grid {canvas.grid}, expected (T, h, w)")
        if len(canvas.codes) > c.length:
            raise ValueError(
                f"the canvas has {len(canvas.codes)} positions {canvas.grid}, expected at most {c.length}"
            )
        if given is None:
            return
        if not c.text_dim:
            raise ValueError("there is a condition, but the network was made without text")
        ids = given.ndim == 1 and not given.is_floating_point()
        features = given.ndim == 2 and given.is_floating_point() and given.shape[1] == c.text_dim
        if c.text_vocab and not ids:
            raise ValueError(f"the condition is {_kind(given)}, expected ids [L]")
        if not c.text_vocab and not features:
            raise ValueError(
                f"the condition is {_kind(given)}, expected features [L, {c.text_dim}]"
            )
        if ids and len(given) and not 0 <= int(given.min()) <= int(given.max()) < c.text_vocab:
            raise ValueError(f"the condition has ids outside 0 to {c.text_vocab - 1}")

    def prepare(
        self,
        conditions: Sequence[Tensor | None],
        grid: tuple[int, ...],
        *,
        present: Tensor | None = None,
    ) -> Prepared:
        """Text keys and values, and biases, for R rows; `present` [R, N]: padded positions are not attended to."""
        t, h, w = grid
        bias = self._bias((t, h, w))
        if present is not None:
            hidden = torch.zeros(present.shape, device=present.device, dtype=self.dtype)
            hidden = hidden.masked_fill(~present, -torch.inf)[:, None, None]
            bias = hidden if bias is None else bias + hidden
        if not self.config.text_dim:
            return Prepared((t, h, w), bias, None, None)
        features, seen = self._features(conditions)
        text = tuple(layer["2"].remembered(features) for layer in self.transformer.stack())
        seen = F.pad(seen, (NULL_KEYS, 0), value=True)[:, None, None]
        return Prepared((t, h, w), bias, text, seen)

    def hidden(self, ids: Tensor, prepared: Prepared) -> Tensor:
        """Ids [R, N] (V for the mask) to features [R, N, D]."""
        x = self.token_emb(ids) + self.pos_emb.weight[: ids.shape[1]]
        if self.config.shrink != 1 and x.requires_grad:
            x = x * self.config.shrink + x.detach() * (1 - self.config.shrink)
        return self.transformer(x, prepared)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.token_emb.weight.dtype

    def _bias(self, grid: tuple[int, int, int]) -> Tensor | None:
        """A network's own bias for pairs of positions."""
        return None

    def _features(self, conditions: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Text features [R, L, C], padded with zeros, and which are there [R, L].

        As published, a position whose features are all zero is padding.
        """
        weight = self.token_emb.weight
        empty = weight.new_zeros(0, self.config.text_dim)
        rows = []
        for condition in conditions:
            if condition is None:
                rows.append(empty)
            elif self.config.text_vocab:
                rows.append(self.text_emb(condition.to(weight.device)))
            else:
                rows.append(condition.to(weight))
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return padded, (padded != 0).any(-1)


class VideoMaskGIT(VideoMasked):
    """Video tokens to logits."""

    def __init__(self, config: VideoMaskConfig):
        super().__init__(config)
        self.continuous_pos_bias = DistanceBias(config.head_dim, config.heads)
        self.to_logits = nn.Linear(config.dim, config.vocab)

    def forward(self, ids: Tensor, prepared: Prepared) -> Tensor:
        """Ids [R, N] (V for the mask) to logits [R, N, V]."""
        return self.to_logits(self.hidden(ids, prepared))

    def _bias(self, grid: tuple[int, int, int]) -> Tensor:
        return self.continuous_pos_bias(grid)


class TokenCritic(VideoMasked):
    """Which tokens do not belong: doubt, high where a token looks drawn."""

    def __init__(self, config: VideoMaskConfig):
        super().__init__(config)
        self.to_logits = nn.Sequential(nn.Linear(config.dim, 1))

    def forward(self, ids: Tensor, prepared: Prepared) -> Tensor:
        """Whole ids [R, N] to doubt [R, N]."""
        return self.to_logits(self.hidden(ids, prepared)).squeeze(-1)


class SelfCritic(nn.Module):
    """Doubt from the generator's own features."""

    def __init__(self, maskgit: VideoMaskGIT):
        super().__init__()
        self.maskgit = maskgit
        self.vocab = maskgit.vocab
        self.to_pred = nn.Sequential(nn.Linear(maskgit.config.dim, 1))

    def check(self, canvas: Canvas) -> None:
        """As the generator's."""
        self.maskgit.check(canvas)

    def prepare(self, conditions: Sequence[Tensor | None], grid: tuple[int, ...], **given: Any):
        """As the generator's."""
        return self.maskgit.prepare(conditions, grid, **given)

    def forward(self, ids: Tensor, prepared: Prepared) -> Tensor:
        """Whole ids [R, N] to doubt [R, N]."""
        return self.to_pred(self.maskgit.hidden(ids, prepared)).squeeze(-1)


class VideoTransformer(nn.Module):
    """The layers, under the published numbers: 0 PEG, 1 self-attention, 2 cross-attention, 3 feed-forward."""

    def __init__(self, c: VideoMaskConfig):
        super().__init__()
        self.layers = nn.ModuleList(_layer(c) for _ in range(c.depth))
        self.norm_out = Norm(c.dim)

    def stack(self) -> list[Any]:
        """The layers' parts by number."""
        return list(self.layers)

    def forward(self, x: Tensor, prepared: Prepared) -> Tensor:
        """[R, N, D] to the same."""
        for i, layer in enumerate(self.stack()):
            x = x + layer["0"](x, prepared.grid)
            x = x + layer["1"](x, prepared.bias)
            if prepared.text is not None:
                x = x + layer["2"](x, *prepared.text[i], prepared.seen)
            x = x + layer["3"](x)
        return self.norm_out(x)


class PEG(nn.Module):
    """Position from a depthwise 3x3x3 convolution over the grid, both ways in time."""

    def __init__(self, dim: int):
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[R, N, D] to the same; three convolutions over pictures are faster on a CPU than one over clips."""
        t, h = grid[:2]
        frames = F.pad(rearrange(x, "r (t h w) d -> r t d h w", t=t, h=h), (0,) * 6 + (1, 1))
        kernel, bias = self.dsconv.weight, self.dsconv.bias
        assert bias is not None
        parts = [
            F.conv2d(
                rearrange(frames[:, step : step + t], "r t d h w -> (r t) d h w"),
                kernel[:, :, step],
                padding=1,
                groups=x.shape[-1],
            )
            for step in range(3)
        ]
        y = parts[0] + parts[1] + parts[2]
        return rearrange(y, "(r t) d h w -> r (t h w) d", t=t) + bias


class Attention(nn.Module):
    """Unit queries and keys with learned scales; keys and values from the input as it is, or from normalised text."""

    def __init__(self, c: VideoMaskConfig, *, cross: bool = False):
        super().__init__()
        inner = c.heads * c.head_dim
        self.heads, self.rate = c.heads, c.dropout
        self.norm = Norm(c.dim)
        self.to_q = nn.Linear(c.dim, inner, bias=False)
        self.to_kv = nn.Linear(c.text_dim if cross else c.dim, 2 * inner, bias=False)
        self.q_scale = nn.Parameter(torch.ones(c.head_dim))
        self.k_scale = nn.Parameter(torch.ones(c.head_dim))
        self.to_out = nn.Linear(inner, c.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[R, N, D] to the same; `bias` [n, N, N] or [R, n, N, N]."""
        return self.attend(x, *self.keys_values(x), bias)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, not yet of unit length, and values: [R, n, S, d] of [R, S, *]."""
        k, v = rearrange(self.to_kv(x), "r s (kv n d) -> kv r n s d", kv=2, n=self.heads)
        return k, v

    def attend(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """What x [R, N, D] takes from keys and values [R, n, S, d]."""
        q = rearrange(self.to_q(self.norm(x)), "r s (n d) -> r n s d", n=self.heads)
        q = F.normalize(q, dim=-1) * self.q_scale
        k = F.normalize(k, dim=-1) * self.k_scale
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=rate, scale=LOGIT_SCALE
        )
        return self.to_out(rearrange(y, "r n s d -> r s (n d)"))


class CrossAttention(Attention):
    """Attention to text, with learned keys in front that no mask hides."""

    def __init__(self, c: VideoMaskConfig):
        super().__init__(c, cross=True)
        self.context_norm = Norm(c.text_dim)
        self.null_kv = nn.Parameter(torch.randn(c.heads, 2 * NULL_KEYS, c.head_dim))

    def remembered(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, n, 2 + L, d] of text [R, L, C]."""
        k, v = self.keys_values(self.context_norm(text))
        null_k, null_v = repeat(self.null_kv, "n (s kv) d -> kv r n s d", kv=2, r=len(text))
        return torch.cat([null_k, k], 2), torch.cat([null_v, v], 2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:  # type: ignore[override]
        """[R, N, D] to the same; `seen` [R, 1, 1, 2 + L]."""
        return self.attend(x, k, v, seen)


class DistanceBias(nn.Module):
    """A bias for each pair of positions, from the log of their distances, by a small network; any grid goes."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.net = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(3, width), nn.LeakyReLU(0.1)),
                nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.1)),
                nn.Linear(width, heads),
            ]
        )

    def forward(self, grid: tuple[int, int, int]) -> Tensor:
        """[n, N, N]; the network runs once an offset, not once a pair."""
        weight = next(self.net.parameters())
        device = weight.device
        offsets = [torch.arange(1 - n, n, device=device, dtype=weight.dtype) for n in grid]
        x = torch.stack(torch.meshgrid(*offsets, indexing="ij"), -1)
        x = x.sign() * x.abs().log1p()
        for part in self.net:
            x = part(x)
        places = [torch.arange(n, device=device) for n in grid]
        t, y, z = (p[:, None] - p + len(p) - 1 for p in places)
        table = x[
            rearrange(t, "a b -> a 1 1 b 1 1"),
            rearrange(y, "a b -> 1 a 1 1 b 1"),
            rearrange(z, "a b -> 1 1 a 1 1 b"),
        ]
        return rearrange(table, "a b c e f g n -> n (a b c) (e f g)")


def video_from_published(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    maskgit: VideoMaskGIT | None = None,
    source: str = "Phenaki state dict",
) -> VideoMaskGIT | TokenCritic | SelfCritic:
    """A network from the state dict of lucidrains' `MaskGit`, `TokenCritic` or `SelfCritic`; shapes tell its sizes.

    Args:
        config: fields of `VideoMaskConfig` that shapes do not tell (`dropout`, `shrink`).
        maskgit: of a self critic, the generator whose features it reads; read from the file where not given.
    """
    tensors = inference_tensors(state_dict)
    if any(key.startswith("to_pred.") for key in tensors):
        inner = {k.removeprefix("maskgit."): v for k, v in tensors.items() if "to_pred" not in k}
        if maskgit is None:
            read = video_from_published(inner, config, source=source)
            assert isinstance(read, VideoMaskGIT)
            maskgit = read
        critic = SelfCritic(maskgit)
        head = {k: v for k, v in tensors.items() if k.startswith("to_pred.")}
        load_into(critic.to_pred, {k[8:]: v for k, v in head.items()}, source=source)
        return critic.eval()
    sizes = infer_config(tensors, config or {}, source=source)
    network = TokenCritic(sizes) if sizes.critic else VideoMaskGIT(sizes)
    load_into(network, tensors, source=source)
    return network.eval()


def infer_config(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any], *, source: str = "state dict"
) -> VideoMaskConfig:
    """The config that the shapes of published tensors tell."""
    first = "transformer.layers.0."
    try:
        head_dim = len(tensors[f"{first}1.q_scale"])
        told = {
            "vocab": len(tensors["token_emb.weight"]) - 1,
            "length": len(tensors["pos_emb.weight"]),
            "dim": tensors["token_emb.weight"].shape[1],
            "heads": len(tensors[f"{first}1.to_q.weight"]) // head_dim,
            "head_dim": head_dim,
        }
    except KeyError as error:
        raise WeightsError(
            f"{source}: no key {error}; expected the state dict of lucidrains' MaskGit or TokenCritic"
        ) from error
    text = tensors.get(f"{first}2.context_norm.gamma")
    table = tensors.get("text_emb.weight")
    numbers = [int(key.split(".")[2]) for key in tensors if key.startswith("transformer.layers.")]
    told |= {
        "depth": 1 + max(numbers),
        "text_dim": 0 if text is None else len(text),
        "text_vocab": 0 if table is None else len(table),
        "critic": "to_logits.0.weight" in tensors,
    }
    return VideoMaskConfig(**{**told, **given})


def inference_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what self-attention stores and does not use: a norm of text, and no null keys."""
    return {
        key: value
        for key, value in state_dict.items()
        if ".1.context_norm." not in key and not (key.endswith(".null_kv") and value.numel() == 0)
    }


def _layer(c: VideoMaskConfig) -> nn.ModuleDict:
    inner = int(c.dim * 8 / 3)
    parts = {
        "0": PEG(c.dim),
        "1": Attention(c),
        "3": nn.Sequential(
            nn.LayerNorm(c.dim),
            nn.Linear(c.dim, 2 * inner, bias=False),
            GEGLU(),
            nn.Dropout(c.dropout),
            nn.Linear(inner, c.dim, bias=False),
        ),
    }
    if c.text_dim:
        parts["2"] = CrossAttention(c)
    return nn.ModuleDict(dict(sorted(parts.items())))


def _kind(given: Tensor) -> str:
    return f"{given.dtype} of shape {tuple(given.shape)}"
