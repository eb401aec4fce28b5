"""xAR (arXiv 2502.20388, OliverRensu/xAR): next-X prediction by flow matching over continuous latents.

- A sequence of entities (`entities.py`); each is drawn by integrating a flow, given all earlier ones
  (`generators/next_x.py`). Attention is block-causal: full inside an entity, and back to earlier ones.
- Noisy context: in training every entity has a time of its own and all are noised, context too; a clean context is
  time 0. So one network serves both halves of a call that reads a finished entity and moves the next one.
- A block is modulated by class and time (AdaLN: gains on both branches, scales and shifts on both inputs). The
  modulation depends on the entity alone, so it is computed once an entity, not once a position.
- Only cells of 8 x 8 are published. The "encoder" and "decoder" of the key names see the same positions.

B rows, T positions, L of all entities, E entities of a call, C latent channels, D width, N heads, H head width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..codecs.published import KEY, Weights, WeightsError, load_into, read_weights
from ..codecs.published import write_safetensors as write
from . import masks
from .cache import KVCache
from .entities import Entities, Kind
from .heads import Flow, TimeEmbedding, flow_loss, noised, thousandths
from .rope import Rotary, frequencies

SYSTEM = "xar"
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class XARConfig:
    """Sizes; the defaults are xAR-B's.

    Args:
        channels: C.
        grid: sides of the latents.
        entity, size: how they are cut, as `Entities` has it.
        width, ffn, heads: D, the width inside the feed-forward part, N.
        encoder_layers, decoder_layers: blocks before and after the second table of positions.
        classes: labels 0 ... classes - 1; the null is one more. A row may have several, whose embeddings are added.
        dropout: of attention and its projection, in training.
    """

    channels: int = 16
    grid: tuple[int, int] = (16, 16)
    entity: Kind = "cell"
    size: int | None = None
    width: int = 768
    ffn: int = 2048
    heads: int = 12
    encoder_layers: int = 8
    decoder_layers: int = 8
    classes: int = 1000
    dropout: float = 0.1
    theta: float = 10000.0

    def __post_init__(self):
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width is {self.width}, expected a multiple of 4 * heads = {4 * self.heads}"
            )
        Entities(self.entity, self.grid, self.size)  # raises where they do not fit

    @property
    def layers(self) -> int:
        """Blocks in all."""
        return self.encoder_layers + self.decoder_layers


SIZES = {
    "b": XARConfig(),
    "l": XARConfig(width=1024, ffn=2730, heads=16, encoder_layers=16, decoder_layers=16),
    "h": XARConfig(width=1280, ffn=3413, heads=16, encoder_layers=20, decoder_layers=20),
}


class Attention(nn.Module):
    """Full attention under a mask, with rotary positions and a cache."""

    def __init__(self, config: XARConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.dropout = config.dropout

    def forward(self, x: Tensor, call: _Call, layer: int) -> Tensor:
        """x [B, T, D] to [B, T, D]."""
        q, k, v = rearrange(self.qkv(x), "b t (three n h) -> three b n t h", three=3, n=self.heads)
        q, k = call.rotary.turn(q, *call.turns), call.rotary.turn(k, *call.turns)
        if call.cache is not None:
            k, v = call.cache.append(layer, k, v)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=call.mask, dropout_p=p)
        return F.dropout(self.proj(rearrange(y, "b n t h -> b t (n h)")), p)


class FeedForward(nn.Module):
    """A gated layer; the gate is GELU, though the published class is called SwiGLU."""

    def __init__(self, config: XARConfig):
        super().__init__()
        self.fc1_g = nn.Linear(config.width, config.ffn)
        self.fc1_x = nn.Linear(config.width, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] to [B, T, D]."""
        return self.fc2(F.gelu(self.fc1_g(x)) * self.fc1_x(x))


class Block(nn.Module):
    """Attention and feed-forward, each between a scale and shift of its input and a gain of its output."""

    def __init__(self, config: XARConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = FeedForward(config)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def modulate(self, condition: Tensor) -> Tensor:
        """Condition [B, E, D] to [B, E, 6 D]."""
        return self.ada_lin(condition)

    def forward(self, x: Tensor, modulation: Tensor, call: _Call, layer: int) -> Tensor:
        """x [B, T, D], with modulation [B, E, 6 D] of its entities, to [B, T, D]."""
        parts = call.spread(modulation).chunk(6, -1)
        gain_1, gain_2, scale_1, scale_2, shift_1, shift_2 = parts
        x = x + gain_1 * self.attn(_moved(x, scale_1, shift_1), call, layer)
        return x + gain_2 * self.mlp(_moved(x, scale_2, shift_2))


class Norm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x [..., D]."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), EPS).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What all blocks of one call share."""

    rotary: Rotary
    turns: tuple[Tensor, Tensor]
    mask: Tensor | None  # [1, 1, T, S]
    cache: KVCache | None
    entity: Tensor | None  # [T], the entity of each position in this call; None where there is one

    def spread(self, modulation: Tensor) -> Tensor:
        """[B, E, d] of entities to [B, T or 1, d] of positions."""
        return modulation if self.entity is None else modulation[:, self.entity]


class XAR(nn.Module):
    """Noisy entities in, their velocities out; parameters under the published names."""

    def __init__(self, config: XARConfig | None = None):
        super().__init__()
        self.config = c = config or XARConfig()
        self.entities = Entities(c.entity, c.grid, c.size)
        length = self.entities.length
        self.class_emb = nn.Embedding(c.classes + 1, c.width)
        self.time_embed = TimeEmbedding(c.width)
        self.z_proj = nn.Linear(c.channels, c.width)
        self.z_proj_ln = Norm(c.width)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, c.width))
        self.encoder_blocks = nn.ModuleList(Block(c) for _ in range(c.encoder_layers))
        self.encoder_norm = Norm(c.width)
        self.decoder_embed = nn.Linear(c.width, c.width)
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, c.width))
        self.decoder_blocks = nn.ModuleList(Block(c) for _ in range(c.decoder_layers))
        self.decoder_norm = Norm(c.width)
        self.pred = Flow(c.width, c.channels)
        self.rotary = _rotary(self.entities, c)
        self._initialise()

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        source: str = "state dict",
    ) -> XAR:
        """The network of a published state dict, sizes inferred from its shapes.

        Args:
            config: what shapes do not say (entity, size, grid where it is not square); fields of `XARConfig`.

        Raises:
            WeightsError: keys or shapes are not these, or its rotary table belongs to other entities.
        """
        network = cls(replace(infer_config(state_dict, source), **(config or {})))
        _check_tables(network, state_dict, source)
        load_into(network, dict(_parameters(state_dict)), source=source)
        return network.eval()

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        times: Tensor,
        *,
        first: int = 0,
        cache: KVCache | None = None,
        keep: int = 0,
        modulations: Tensor | None = None,
    ) -> Tensor:
        """Velocities [B, T, C] of consecutive entities.

        Args:
            z: [B, T, C], entities first ... first + E - 1, one behind another.
            labels: [B], or [B, n] with -1 where a row has fewer.
            times: [B, E] integers, 0 (clean) to 1000 (noise).
            first: the first entity's number; where it is not 0, `cache` holds the earlier ones.
            keep: how many of the E entities stay in the cache.
            modulations: what `modulate` gave for these labels and times, to save computing it again.
        """
        count = times.shape[1]
        call = self._call(z, first, count, cache)
        if modulations is None:
            modulations = self.modulate(labels, times)
        start, stop = self.entities.span(first, first + count)
        x = self.z_proj(z) + self.encoder_pos_embed_learned[:, start:stop]
        x = self.z_proj_ln(x)
        for i, block in enumerate(self.encoder_blocks):
            x = block(x, modulations[i], call, i)
        x = self.decoder_embed(self.encoder_norm(x))
        x = x + self.decoder_pos_embed_learned[:, start:stop]
        for i, block in enumerate(self.decoder_blocks, len(self.encoder_blocks)):
            x = block(x, modulations[i], call, i)
        if cache is not None:
            cache.rewind([self.entities.span(0, first + keep)[1]] * cache.rows)
        return self.pred(self.decoder_norm(x))

    def modulate(self, labels: Tensor, times: Tensor) -> Tensor:
        """Gains, scales and shifts of every block: [layers, B, E, 6 D]."""
        condition = self.time_embed(times) + self.label(labels)[:, None]
        blocks: list[Block] = [*self.encoder_blocks, *self.decoder_blocks]  # type: ignore[list-item]
        return torch.stack([block.modulate(condition) for block in blocks])

    def label(self, labels: Tensor) -> Tensor:
        """Embeddings [B, D] of labels [B], or sums of those of [B, n] without the -1."""
        if labels.ndim == 1:
            return self.class_emb(labels)
        there = (labels >= 0)[..., None]
        return (self.class_emb(labels.clamp(min=0)) * there).sum(1)

    def null(self, labels: Tensor) -> Tensor:
        """Labels of the same shape that mean no class."""
        none = torch.full_like(labels, -1 if labels.ndim == 2 else self.config.classes)
        if labels.ndim == 2:
            none[:, 0] = self.config.classes
        return none

    @property
    def channels(self) -> int:
        """C."""
        return self.config.channels

    @property
    def classes(self) -> int:
        """Labels are 0 ... classes - 1; the next one is the null."""
        return self.config.classes

    def open(self, labels: Tensor) -> KVCache:
        """An empty cache for rows of these labels: all but the last entity, and room for the one in progress."""
        c = self.config
        return KVCache(
            layers=c.layers,
            rows=len(labels),
            kv_heads=c.heads,
            head_width=c.width // c.heads,
            capacity=self.entities.length,
            dtype=self.pred.weight.dtype,
            device=self.pred.weight.device,
        )

    def loss(self, latents: Tensor, labels: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Flow matching with noisy context: mean squared error of the velocities.

        Args:
            latents: [B, C, h, w], scaled.
            labels: as in `forward`; nulls where the condition is left out.
            times: [B, E] in 0 ... 1, one an entity.
            noise: [B, L, C], standard normal, in entity order.
        """
        clean = self.entities.split(latents)
        spread = times[:, self.entities.blocks().to(times.device)]
        velocity = self(noised(clean, noise, spread), labels, thousandths(times))
        return flow_loss(velocity, clean, noise)

    def _call(self, z: Tensor, first: int, count: int, cache: KVCache | None) -> _Call:
        start, stop = self.entities.span(first, first + count)
        held = 0 if cache is None else cache.row_lengths()[0]
        if z.shape[1] != stop - start or (cache is not None and held != start):
            raise ValueError(
                f"{z.shape[1]} positions over {held} held ones; entities {first} ... {first + count - 1} "
                f"have {stop - start} and come after {start}"
            )
        if cache is None and first > 0:
            raise ValueError(f"entity {first} needs a cache that holds the earlier ones")
        positions = torch.arange(start, stop, device=z.device)
        mask = entity = None
        if count > 1:
            blocks = self.entities.blocks(0, first + count).to(z.device)
            mask = masks.build(blocks)[..., start:, :]
            entity = blocks[start:] - first
        turns = self.rotary.at(positions, z.dtype)
        return _Call(rotary=self.rotary, turns=turns, mask=mask, cache=cache, entity=entity)

    def _initialise(self) -> None:
        """As published: Xavier for matrices, N(0, .02) for tables."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = (self.encoder_pos_embed_learned, self.decoder_pos_embed_learned)
        for table in (self.class_emb.weight, *tables):
            nn.init.normal_(table, std=0.02)


def load_xar(path: str | Path) -> XAR:
    """A network from a published file, or from one that `save_xar` wrote.

    Raises:
        WeightsError: another system's file, or a damaged one.
    """
    return _from_weights(read_weights(path))


def save_xar(
    network: XAR, path: str | Path, *, name: str, about: Mapping[str, object] | None = None
) -> None:
    """Write a network as one safetensors file, its config in the metadata; `about` adds to it."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in network.state_dict().items()}
    header = {"system": SYSTEM, "name": name, "config": asdict(network.config), **(about or {})}
    write(tensors, path, {KEY: json.dumps(header)})


def _from_weights(weights: Weights) -> XAR:
    if not weights.config:
        return XAR.from_published(weights.tensors, source=weights.source)
    if weights.config.get("system") != SYSTEM:
        raise WeightsError(
            f"{weights.source}: holds '{weights.config.get('system')}', expected '{SYSTEM}'"
        )
    network = XAR(config_of(weights.config["config"], weights.source))
    load_into(network, weights.tensors, source=weights.source)
    return network.eval()


def config_of(table: Mapping[str, Any], source: str) -> XARConfig:
    """A config from JSON values.

    Raises:
        WeightsError: a key that this version does not know.
    """
    known = {field.name for field in fields(XARConfig)}
    if unknown := set(table) - known:
        raise WeightsError(f"{source}: unknown settings {', '.join(sorted(unknown))}")
    return XARConfig(**table)


def infer_config(state: Mapping[str, Tensor], source: str = "state dict") -> XARConfig:
    """Sizes from the shapes of a published state dict; a square grid, cells of 8 x 8."""
    needed = (
        "encoder_blocks.0.attn.rope.freqs_cos",
        "encoder_pos_embed_learned",
        "class_emb.weight",
        "encoder_blocks.0.mlp.fc1_g.weight",
        "z_proj.weight",
    )
    if missing := [key for key in needed if key not in state]:
        raise WeightsError(f"{source}: not an xAR network: {', '.join(missing)} missing")
    table, positions, classes, gate, entry = (state[key].shape for key in needed)
    side = round(positions[1] ** 0.5)
    return XARConfig(
        channels=entry[1],
        grid=(side, side),
        width=entry[0],
        ffn=gate[0],
        heads=entry[0] // table[1],
        encoder_layers=_count(state, "encoder_blocks"),
        decoder_layers=_count(state, "decoder_blocks"),
        classes=classes[0] - 1,
    )


def _count(state: Mapping[str, Tensor], stem: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{stem}.")})


def _parameters(state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Without the buffers that published files carry: the mask, and a rotary table in every block."""
    return ((k, v) for k, v in state.items() if k != "mask" and ".attn.rope." not in k)


def _check_tables(network: XAR, state: Mapping[str, Tensor], source: str) -> None:
    """The stored rotary table says in which order the file's positions stand; ours must be that one."""
    stored = state["encoder_blocks.0.attn.rope.freqs_cos"]
    ours = network.rotary.cos.repeat_interleave(2, -1)
    if stored.shape != ours.shape or (stored.float() - ours).abs().max() > 1e-3:
        c = network.config
        raise WeightsError(
            f"{source}: its rotary table [{', '.join(map(str, stored.shape))}] is not that of entity={c.entity!r}, "
            f"size={c.size}, grid={c.grid}; give the config that it was trained with"
        )


def _rotary(entities: Entities, config: XARConfig) -> Rotary:
    """The first half of a head turns with the row, the second with the column; pairs are neighbours."""
    with torch.device("cpu"):  # a table, not a weight: it has values on the meta device too
        freqs = frequencies(config.width // config.heads // 2, config.theta)
        rows, columns = entities.coordinates.unbind(-1)
        angles = torch.cat([torch.outer(rows, freqs), torch.outer(columns, freqs)], 1)
    return Rotary(angles.cos(), angles.sin(), interleaved=True)


def _moved(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """RMS-normed in float32, scaled and shifted."""
    normed = F.rms_norm(x.float(), x.shape[-1:], None, EPS).to(x.dtype)
    return normed * (1 + scale) + shift
