"""OctGPT's transformer: masked tokens of an octree in, hidden states and logits out.

- One token a node: split bits of the levels full_depth ... code_depth - 1, then the codes of code_depth.
- An encoder reads the tokens that are known, a decoder all of them; masked ones carry a mask embedding. Both attend in
  windows (`octree_windows.py`), block i in those of kind i % 4.
- Position and level are added in every block, and turn queries and keys (mixed RoPE, Heo et al., arXiv 2403.13298).
- A condition becomes a prefix of each sample; features of a text or picture may be attended to as well.

Wei et al., OctGPT: Octree-based Multiscale Autoregressive Models for 3D Shape Generation, SIGGRAPH 2025
(arXiv 2504.09975; github.com/octree-nn/octgpt).
Letters: N tokens, C width, H heads, h head width, W windows, K tokens of a window, B samples, P prefix tokens, L rows
of features, F their width, D bits of a code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..codecs.published import WeightsError, load_into
from .octree_windows import Line, Tokens, sine_positions


@dataclass(frozen=True, kw_only=True)
class OctreeNetworkConfig:
    """The network. Defaults are the published unconditional models (170.3M parameters).

    Args:
        width, heads, blocks: C, H, and blocks of encoder and decoder together.
        window, dilation: K, and D of every other block.
        full_depth, code_depth, code_bits: what the codec's streams hold.
        levels, grid: level embeddings, and cells a side of the finest grid that positions are counted in.
        prefix: P, how many tokens the condition becomes.
        classes: labels of a category condition.
        unconditional: whether label 0 means "no condition", and the others nothing.
        features: width of a text's or picture's features; 0 where the condition is a label.
        cross: whether every other block attends to the features too.
        null: whether one more class, or a row of zeros as features, was trained to mean "no condition".
    """

    width: int = 768
    heads: int = 8
    blocks: int = 24
    window: int = 2048
    dilation: int = 2
    full_depth: int = 3
    code_depth: int = 6
    code_bits: int = 32
    levels: int = 4
    grid: int = 128
    prefix: int = 64
    classes: int = 1
    features: int = 0
    cross: bool = False
    null: bool = False
    unconditional: bool = False
    norm: Literal["layer", "rms"] = "layer"
    positions: Literal["sine", "table"] = "sine"
    dropout: float = 0.1

    def __post_init__(self):
        if self.width % (6 * self.heads):
            raise ValueError(
                f"width is {self.width}, expected a multiple of 6 x {self.heads} heads: rotations go over pairs in 3-D"
            )
        if self.blocks % 2:
            raise ValueError(f"blocks is {self.blocks}, expected an even number: half encode")
        if self.window % 2 or self.dilation < 1:
            raise ValueError(
                f"window is {self.window}, dilation {self.dilation}: expected even, 1+"
            )
        if not 0 < self.code_depth - self.full_depth < self.levels:
            raise ValueError(
                f"levels is {self.levels}, expected {self.code_depth - self.full_depth + 1} or more for depths "
                f"{self.full_depth} to {self.code_depth}"
            )
        if self.prefix < 1:
            raise ValueError(
                f"prefix is {self.prefix}, expected 1 or more: the encoder reads it first"
            )
        if self.grid < 2**self.code_depth:
            raise ValueError(f"grid is {self.grid}, expected {2**self.code_depth} or more")
        if self.null and self.unconditional:
            raise ValueError(
                "null and unconditional are set: label 0 is the null condition already"
            )
        if self.cross and not self.features:
            raise ValueError("cross is set, but features is 0: there is nothing to attend to")


class _Rope(nn.Module):
    """Rotations of pairs by x f_x + y f_y + z f_z with learnt frequencies; `freqs` [3, C / 2] as published."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.freqs = nn.Parameter(_frequencies(width // heads, heads))

    def forward(self, place: Tensor) -> Tensor:
        """Unit complex numbers [N, H, h / 2] of places [N, 3]."""
        phase = rearrange(place.float() @ self.freqs.float(), "n (h f) -> n h f", h=self.heads)
        return torch.polar(torch.ones_like(phase), phase)


def _frequencies(head_width: int, heads: int) -> Tensor:
    """Three orthogonal directions a head, drawn by chance, and magnitudes that fall from 1 to 1/100."""
    magnitude = 100.0 ** (-torch.arange(head_width // 6) * 6 / head_width)
    theta, phi = torch.rand(2, heads, 1) * 2 * math.pi
    along = torch.cat([phi, phi + math.pi / 2, phi], 1)[..., None]
    lift = torch.cat([theta, theta, theta + math.pi / 2], 1)[..., None]
    lift[:, 1] = math.pi / 2
    x, y, z = lift.sin() * along.cos(), lift.sin() * along.sin(), lift.cos()
    return torch.stack([(a * magnitude).flatten() for a in (x, y, z)])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn neighbouring pairs of x [N, H, h] by unit complex numbers [N, H, h / 2]."""
    pairs = torch.view_as_complex(rearrange(x.float(), "n h (f two) -> n h f two", two=2))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class _Attention(nn.Module):
    """Attention within windows."""

    def __init__(self, config: OctreeNetworkConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.rope = _Rope(config.width, config.heads)

    def forward(self, x: Tensor, line: Line, kind: int) -> Tensor:
        windows = line.windows[kind]
        q, k, v = rearrange(self.qkv(x), "n (three h d) -> three n h d", three=3, h=self.heads)
        turn = self.rope(line.tokens.place)
        q, k, v = (
            rearrange(F.pad(part, (0, 0, 0, 0, 0, 1))[windows.index], "w k h d -> w h k d")
            for part in (rotate(q, turn), rotate(k, turn), v)
        )
        y = F.scaled_dot_product_attention(q, k, v, windows.mask[:, None])
        y = rearrange(y, "w h k d -> (w k) (h d)")[windows.slot]
        return F.dropout(self.proj(y), self.dropout, self.training)


class _CrossAttention(nn.Module):
    """Each token attends to its own sample's features; parameters as torch's MultiheadAttention names them."""

    def __init__(self, config: OctreeNetworkConfig):
        super().__init__()
        width, features = config.width, config.features
        self.heads = config.heads
        self.q_proj_weight = nn.Parameter(_xavier(width, width))
        self.k_proj_weight = nn.Parameter(_xavier(width, features))
        self.v_proj_weight = nn.Parameter(_xavier(width, features))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, sample: Tensor, features: Tensor) -> Tensor:
        """x [N, C] of samples [N], sorted by sample, and features [L, F] of each of B samples."""
        bias_q, bias_k, bias_v = self.in_proj_bias.chunk(3)
        rows = torch.cat(list(features)).to(x)
        lengths = [len(part) for part in features]
        counts = torch.bincount(sample, minlength=len(lengths)).tolist()
        q, k, v = (
            rearrange(part, "n (h d) -> h n d", h=self.heads)
            for part in (
                F.linear(x, self.q_proj_weight, bias_q),
                F.linear(rows, self.k_proj_weight, bias_k),
                F.linear(rows, self.v_proj_weight, bias_v),
            )
        )
        each = zip(q.split(counts, 1), k.split(lengths, 1), v.split(lengths, 1))
        out = [F.scaled_dot_product_attention(a[None], b[None], c[None])[0] for a, b, c in each]
        return self.out_proj(rearrange(torch.cat(out, 1), "h n d -> n (h d)"))


def _xavier(rows: int, columns: int) -> Tensor:
    return nn.init.xavier_uniform_(torch.empty(rows, columns))


class _Positions(nn.Module):
    """What a block adds for place and level: waves or a learnt table [grid, C], and a level embedding."""

    def __init__(self, config: OctreeNetworkConfig):
        super().__init__()
        self.depth_emb = nn.Embedding(config.levels, config.width)
        self.absolute_emb: nn.Parameter | None = None
        if config.positions == "table":
            waves = sine_positions(torch.arange(config.grid)[:, None].expand(-1, 3), config.width)
            # columns 3 j, 3 j + 1, 3 j + 2 belong to x, y, z
            self.absolute_emb = nn.Parameter(rearrange(waves, "n (a j) -> n (j a)", a=3).clone())

    def forward(self, line: Line) -> Tensor:
        level = self.depth_emb(line.tokens.level)
        if self.absolute_emb is None:
            return sine_positions(line.tokens.place, level.shape[1]).to(level) + level
        table = rearrange(self.absolute_emb, "n (j a) -> a n j", a=3)
        parts = [table[a][line.tokens.place[:, a]] for a in range(3)]
        return torch.stack(parts, -1).flatten(1) + level


class _MLP(nn.Module):
    def __init__(self, config: OctreeNetworkConfig):
        super().__init__()
        self.dropout = config.dropout
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training)


class _Block(nn.Module):
    """Position, attention in windows of one kind, cross-attention in even blocks where there are features, MLP."""

    def __init__(self, config: OctreeNetworkConfig, number: int):
        super().__init__()
        self.kind = number % 4
        self.pos_emb = _Positions(config)
        self.norm1 = _norm(config, config.width)
        self.attention = _Attention(config)
        self.cross = config.cross and number % 2 == 0
        if self.cross:
            self.cross_norm = _norm(config, config.width)
            self.cross_attn = _CrossAttention(config)
        self.norm2 = _norm(config, config.width)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor, line: Line, features: Sequence[Tensor] | None) -> Tensor:
        x = x + self.pos_emb(line)
        x = x + self.attention(self.norm1(x), line, self.kind)
        if self.cross:
            assert features is not None, "the network has cross-attention"
            x = x + self.cross_attn(self.cross_norm(x), line.tokens.sample, features)
        return x + self.mlp(self.norm2(x))


def _norm(config: OctreeNetworkConfig, width: int) -> nn.Module:
    return nn.LayerNorm(width) if config.norm == "layer" else nn.RMSNorm(width, eps=1e-6)


class _Blocks(nn.Module):
    def __init__(self, config: OctreeNetworkConfig):
        super().__init__()
        self.blocks = nn.ModuleList(_Block(config, i) for i in range(config.blocks // 2))


class _Stack(nn.Module):
    """Half of the blocks, under the published names."""

    def __init__(self, config: OctreeNetworkConfig):
        super().__init__()
        self.layers = _Blocks(config)

    def forward(self, x: Tensor, line: Line, features: Sequence[Tensor] | None) -> Tensor:
        for block in self.layers.blocks:
            x = block(x, line, features)
        return x


@dataclass(frozen=True)
class Conditioned:
    """What a condition means to the network.

    Args:
        prefix: [B, P, C], in front of each sample.
        mask: [B, C], what masked tokens carry.
        features: [L, F] of each sample for cross-attention, or None.
    """

    prefix: Tensor
    mask: Tensor
    features: Sequence[Tensor] | None

    @property
    def samples(self) -> int:
        """B."""
        return len(self.mask)


class OctreeNetwork(nn.Module):
    """Encoder, decoder, embeddings and heads under the published names."""

    def __init__(self, config: OctreeNetworkConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.split_emb = nn.Embedding(2, width)
        self.class_emb = nn.Embedding(config.classes + (config.null and not config.features), width)
        self.vq_proj = nn.Linear(config.code_bits, width)
        if config.features:
            self.mask_token = nn.Parameter(torch.randn(1, width) * 0.02)
            self.ln_cond = _norm(config, config.features)
            self.cond_proj = nn.Linear(config.features, width)
        self.encoder = _Stack(config)
        self.encoder_ln = _norm(config, width)
        self.decoder = _Stack(config)
        self.decoder_ln = _norm(config, width)
        self.split_head = nn.Linear(width, 2)
        self.vq_head = nn.Linear(width, 2 * config.code_bits)
        self.apply(_initialise)

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, object] | None = None,
        *,
        source: str = "<memory>",
    ) -> OctreeNetwork:
        """The network of a published state dict; `config` gives what no shape tells: window, dilation, prefix, ..."""
        state = {k.removeprefix("module."): v for k, v in state_dict.items()}
        network = cls(infer_config(state, config or {}, source=source))
        load_into(network, state, source=source)
        return network

    def condition(self, given: Sequence[int | Tensor]) -> Conditioned:
        """A condition for B samples: labels, or features [L, F] of each, L up to P.

        Raises:
            ValueError: another kind or size than the network was built for, or an unknown label.
        """
        if self.config.features:
            return self._features([torch.as_tensor(one) for one in given])
        known = self.class_emb.num_embeddings
        wrong = [one for one in given if not isinstance(one, int) or not 0 <= one < known]
        if wrong:
            raise ValueError(
                f"the condition is {wrong[0]!r}, expected a label from 0 to {known - 1}"
            )
        mask = self.class_emb(torch.tensor(given, device=self.device))
        return Conditioned(repeat(mask, "b c -> b p c", p=self.config.prefix), mask, None)

    def _features(self, given: Sequence[Tensor]) -> Conditioned:
        c = self.config
        for one in given:
            if one.ndim != 2 or one.shape[1] != c.features or not 0 < len(one) <= c.prefix:
                raise ValueError(
                    f"the condition is {tuple(one.shape)}, expected features [1 to {c.prefix}, {c.features}]"
                )
        given = [one.to(self.mask_token) for one in given]
        projected = [self.cond_proj(self.ln_cond(one)) for one in given]
        prefix = torch.stack([F.pad(one, (0, 0, 0, c.prefix - len(one))) for one in projected])
        mask = self.mask_token.expand(len(given), -1)
        return Conditioned(prefix, mask, given if c.cross else None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.split_emb.weight.device

    @property
    def no_condition(self) -> int | Tensor:
        """The condition of one sample that means none.

        Raises:
            ValueError: the network was not trained with one.
        """
        c = self.config
        if c.features and c.null:
            return torch.zeros(1, c.features)
        if c.null or c.unconditional:
            return 0 if c.unconditional else c.classes
        raise ValueError(
            "the network was trained without a null condition: give every request one, and leave cfg at 1"
        )

    def embed(self, splits: Tensor, codes: Tensor | None = None) -> Tensor:
        """Split bits [n] and code bits [m, D] to embeddings [n + m, C]."""
        x = self.split_emb(splits)
        return x if codes is None else torch.cat([x, self.embed_codes(codes)])

    def embed_codes(self, bits: Tensor) -> Tensor:
        """Code bits [n, D] to embeddings [n, C]."""
        value = (2 * bits - 1).to(self.vq_proj.weight) * self.config.code_bits**-0.5
        return self.vq_proj(value)

    def forward(
        self,
        x: Tensor,
        tokens: Tokens,
        masked: Tensor,
        condition: Conditioned,
        *,
        joint: bool = False,
    ) -> Tensor:
        """Hidden states [N, C] of embeddings [N, C], of which `masked` [N] stand for nothing yet."""
        width, count = x.shape[1], condition.samples
        front = count * self.config.prefix
        x = torch.where(masked[:, None], condition.mask[tokens.sample].to(x), x)
        x = torch.cat([condition.prefix.reshape(-1, width).to(x), x])
        whole = tokens.behind(self.config.prefix, count)
        known = (~F.pad(masked, (front, 0))).nonzero()[:, 0]
        known = known[whole[known].regrouped()]
        line = self._line(whole[known], joint)
        encoded = self.encoder_ln(self.encoder(x[known], line, condition.features))
        x = x.index_copy(0, known, encoded.to(x))
        order = whole.regrouped()
        line = self._line(whole[order], joint)
        x = self.decoder_ln(self.decoder(x[order], line, condition.features))
        return torch.empty_like(x).index_copy(0, order, x)[front:]

    def _line(self, tokens: Tokens, joint: bool) -> Line:
        return Line(tokens, self.config.window, self.config.dilation, joint)

    def split_logits(self, hidden: Tensor) -> Tensor:
        """[n, C] to logits of "not split" and "split" [n, 2]."""
        return self.split_head(hidden)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """[n, C] to logits of the two values of each code bit [n, D, 2]."""
        return rearrange(self.vq_head(hidden), "n (d two) -> n d two", two=2)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def infer_config(
    state: Mapping[str, Tensor], given: Mapping[str, object], *, source: str = "<memory>"
) -> OctreeNetworkConfig:
    """The configuration that the shapes of a state dict tell, and `given` for the rest.

    Raises:
        WeightsError: it is no OctGPT transformer.
    """
    first = "encoder.layers.blocks.0"
    try:
        width = state["split_emb.weight"].shape[1]
        classes = state["class_emb.weight"].shape[0]
        code_bits = state["vq_proj.weight"].shape[1]
        levels = state[f"{first}.pos_emb.depth_emb.weight"].shape[0]
    except KeyError as error:
        raise WeightsError(f"{source}: not an OctGPT transformer, key {error} missing") from error
    table = state.get(f"{first}.pos_emb.absolute_emb")
    projection = state.get("cond_proj.weight")
    names = {key.split(".")[3] for key in state if key.startswith("encoder.layers.blocks.")}
    inferred: dict[str, object] = {
        "width": width,
        "classes": classes,
        "code_bits": code_bits,
        "levels": levels,
        "grid": 128 if table is None else len(table),
        "blocks": 2 * len(names),
        "features": 0 if projection is None else projection.shape[1],
        "cross": f"{first}.cross_attn.q_proj_weight" in state,
        "norm": "layer" if f"{first}.norm1.bias" in state else "rms",
        "positions": "sine" if table is None else "table",
    }
    return OctreeNetworkConfig(**{**inferred, **given})  # type: ignore[arg-type]
