"""OctGPT's VQ-VAE: octree in, split bits and binary codes in the middle, octree and local planes out.

- Encoder: octree convolutions from the deepest level (normals and displacements) up to the code depth.
- Quantiser: binary spherical (BSQ): each code is the signs of a unit vector, so a code is `code_bits` bits.
- Decoder: a U-Net on dual octree graphs from the codes up to full_depth and back, which then grows the octree below the
  code depth by its own predictions and gives each node a local plane; `surface` turns the planes into a mesh.

Wei et al., OctGPT: Octree-based Multiscale Autoregressive Models for 3D Shape Generation, SIGGRAPH 2025
(arXiv 2504.09975; github.com/octree-nn/octgpt). BSQ: Zhao et al., arXiv 2406.07548.
Letters: N nodes, C channels, D bits of a code, B batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..published import WeightsError, load_into
from . import surface
from .dualgraph import DualGraph, GraphDown, GraphHead, GraphStage, GraphUp, build_graphs
from .octree import NodeNorm, Octree, OctreeConv, OctreeDown

INPUTS = 4  # normal (3) and displacement (1)
MAX_NODES = 1 << 22  # of a level that the decoder grows; a 256^3 shape has some 300,000


class OctreeTooLarge(ValueError):
    """Codes ask for more nodes than any surface needs."""


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """The networks. Defaults are the published "large" model (33.8M parameters).

    Args:
        full_depth: levels up to here are complete grids.
        encoder_channels, encoder_blocks: per level, from the deepest up to the code depth.
        down_channels, down_blocks: the decoder's U-Net, per level from the code depth up to full_depth.
        up_channels, up_blocks: per level from full_depth down to the deepest.
        bottleneck: by how much residual blocks narrow their middle.
        node_types: types that the first graph convolution tells apart; one fewer per level up, one more per level down.
        code_bits: D.
    """

    full_depth: int = 3
    encoder_channels: tuple[int, ...] = (32, 32, 64)
    encoder_blocks: tuple[int, ...] = (2, 2, 2)
    down_channels: tuple[int, ...] = (64, 128, 256, 512)
    down_blocks: tuple[int, ...] = (2, 4, 8, 2)
    up_channels: tuple[int, ...] = (512, 256, 128, 64, 32, 32)
    up_blocks: tuple[int, ...] = (2, 4, 8, 2, 2, 2)
    bottleneck: int = 1
    node_types: int = 7
    code_bits: int = 32

    def __post_init__(self):
        for name in ("encoder", "down", "up"):
            channels, blocks = (f"{name}_{what}" for what in ("channels", "blocks"))
            for key in (channels, blocks):
                object.__setattr__(self, key, tuple(getattr(self, key)))  # JSON gives lists
            if len(getattr(self, channels)) != len(getattr(self, blocks)):
                raise ValueError(f"{channels} and {blocks} differ in length")
        below, all_levels = len(self.encoder_channels) - 1, len(self.up_channels)
        if len(self.down_channels) + below != all_levels:
            raise ValueError(
                f"down_channels has {len(self.down_channels)} levels, expected {all_levels - below} "
                "(up_channels less the levels below the code depth)"
            )
        if self.node_types < len(self.down_channels):
            raise ValueError(
                f"node_types is {self.node_types}, expected {len(self.down_channels)} or more"
            )

    @property
    def depth(self) -> int:
        """The deepest level."""
        return self.full_depth + len(self.up_channels) - 1

    @property
    def code_depth(self) -> int:
        """The level that is coded."""
        return self.full_depth + len(self.down_channels) - 1


LARGE = VQVAEConfig()
BIG = replace(
    LARGE,
    down_channels=(32, 64, 128, 256),
    down_blocks=(2, 4, 4, 2),
    up_channels=(256, 128, 64, 32, 32, 32),
    up_blocks=(2, 4, 4, 2, 2, 2),
)
DEFAULT = replace(
    BIG,
    bottleneck=2,
    encoder_blocks=(1, 1, 1),
    down_blocks=(1, 2, 4, 2),
    up_blocks=(2, 4, 2, 2, 1, 1),
)
HUGE = VQVAEConfig(
    encoder_channels=(32, 64, 128, 256),
    encoder_blocks=(2, 2, 2, 2),
    down_channels=(256, 256, 512, 1024),
    down_blocks=(2, 4, 4, 4),
    up_channels=(1024, 512, 256, 256, 128, 64, 32),
    up_blocks=(4, 4, 4, 2, 2, 2, 2),
)
MINI = VQVAEConfig(
    full_depth=2,
    encoder_channels=(16, 32, 64),
    encoder_blocks=(1, 1, 1),
    down_channels=(64, 96, 128),
    down_blocks=(1, 1, 1),
    up_channels=(128, 96, 64, 32, 24),
    up_blocks=(1, 1, 2, 1, 1),
    node_types=5,
    code_bits=12,
)
PRESETS = {"default": DEFAULT, "big": BIG, "large": LARGE, "huge": HUGE, "mini": MINI}


class _Conv(nn.Module):
    """Convolution and normalisation on one level of an octree."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = OctreeConv(in_channels, out_channels)
        self.gn = NodeNorm(out_channels)

    def forward(self, x: Tensor, tree: Octree, depth: int) -> Tensor:
        return self.gn(self.conv(x, tree, depth), tree.batch(depth), tree.batch_size)


class _Down(nn.Module):
    """Strided convolution, normalisation, ReLU: one level up."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = OctreeDown(in_channels, out_channels)
        self.gn = NodeNorm(out_channels)

    def forward(self, x: Tensor, tree: Octree, depth: int) -> Tensor:
        x = self.conv(x, tree, depth)
        return torch.relu(self.gn(x, tree.batch(depth - 1), tree.batch_size))


class _ResBlock(nn.Module):
    def __init__(self, channels: int, bottleneck: int):
        super().__init__()
        self.conv3x3a = _Conv(channels, channels // bottleneck)
        self.conv3x3b = _Conv(channels // bottleneck, channels)

    def forward(self, x: Tensor, tree: Octree, depth: int) -> Tensor:
        y = torch.relu(self.conv3x3a(x, tree, depth))
        return torch.relu(self.conv3x3b(y, tree, depth) + x)


class _Stage(nn.Module):
    def __init__(self, channels: int, blocks: int, bottleneck: int):
        super().__init__()
        self.resblks = nn.ModuleList(_ResBlock(channels, bottleneck) for _ in range(blocks))

    def forward(self, x: Tensor, tree: Octree, depth: int) -> Tensor:
        for block in self.resblks:
            x = block(x, tree, depth)
        return x


class Encoder(nn.Module):
    """Features of the deepest level to features of every node of the code depth."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        channels = config.encoder_channels
        self.conv1 = _Conv(INPUTS, channels[0])
        self.blocks = nn.ModuleList(
            _Stage(c, n, config.bottleneck) for c, n in zip(channels, config.encoder_blocks)
        )
        self.downsample = nn.ModuleList(_Down(a, b) for a, b in pairwise(channels))

    def forward(self, tree: Octree) -> Tensor:
        """An octree built from points to [N_code, C]."""
        depth = tree.depth
        x = torch.relu(self.conv1(tree.features().to(self.conv1.conv.weights), tree, depth))
        x = self.blocks[0](x, tree, depth)
        for down, block in zip(self.downsample, self.blocks[1:]):
            x = down(x, tree, depth)
            depth -= 1
            x = block(x, tree, depth)
        return x


class BinarySphericalQuantizer(nn.Module):
    """Signs of a unit vector. `basis` is unused, and in the published files.

    Codes are plus or minus 1 / sqrt(D); gradients pass straight through.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits
        self.register_buffer("basis", 2 ** torch.arange(bits - 1, -1, -1))

    def forward(
        self, z: Tensor, *, flip: float = 0.0, rng: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] to codes [N, D], bits [N, D] (0 or 1) and the entropy loss.

        Args:
            flip: training noise; a share of the bits, drawn from [0, flip), is flipped.
        """
        unit = F.normalize(z, dim=-1)
        bits = (unit > 0).long()
        signs = (2 * bits - 1).to(unit)
        if flip > 0:
            share = flip * torch.rand(1, generator=rng).item()
            flipped = torch.rand(unit.shape, generator=rng) < share
            signs = torch.where(flipped.to(unit.device), -signs, signs)
        codes = (unit + (signs - unit).detach()) * self.bits**-0.5
        return codes, bits, self.entropy(unit)

    def codes(self, bits: Tensor) -> Tensor:
        """Bits [N, D] to codes [N, D]."""
        return (2 * bits - 1).to(torch.float32) * self.bits**-0.5

    def entropy(self, unit: Tensor) -> Tensor:
        """Mean entropy of each code's bits less the entropy of the mean bits: certain codes, all of them used."""
        # log-odds of bit 1 for a unit vector and codes of +-1/sqrt(D), both in the published scale
        p = torch.sigmoid(-4 * unit * self.bits**-0.5)
        return _binary_entropy(p).sum(-1).mean() - _binary_entropy(p.mean(0)).sum()


def _binary_entropy(p: Tensor) -> Tensor:
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


@dataclass
class Decoded:
    """What the decoder says.

    Args:
        tree: the octree it ends with.
        logits: per depth from the code depth on, whether each node is split [N_d, 2].
        planes: per depth, the local planes of all nodes of levels full_depth ... d [.., 4].
    """

    tree: Octree
    logits: dict[int, Tensor]
    planes: dict[int, Tensor]

    def field(self, depth: int | None = None) -> surface.Field:
        """The signed distance field that the planes down to `depth` (the deepest where None) describe."""
        depth = max(self.planes) if depth is None else depth
        return surface.Field(self.tree, depth, self.planes[depth])


class Decoder(nn.Module):
    """A U-Net on dual octree graphs that ends in split bits and local planes."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.code_depth = config.code_depth
        down, up = config.down_channels, config.up_channels
        types = config.node_types
        bottom = types - len(down) + 1
        heads = up[len(down) - 1 :]
        self.encoder = nn.ModuleList(
            GraphStage(c, n, types - i, config.bottleneck)
            for i, (c, n) in enumerate(zip(down, config.down_blocks))
        )
        self.downsample = nn.ModuleList(GraphDown(a, b) for a, b in pairwise(down))
        self.upsample = nn.ModuleList(GraphUp(a, b) for a, b in pairwise(up))
        self.decoder = nn.ModuleList(
            GraphStage(c, n, bottom + i, config.bottleneck)
            for i, (c, n) in enumerate(zip(up, config.up_blocks))
        )
        self.predict = nn.ModuleList(GraphHead(c, 2) for c in heads)
        self.regress = nn.ModuleList(GraphHead(c, 4) for c in heads)

    def forward(self, x: Tensor, tree: Octree, *, grow: bool) -> Decoded:
        """Codes of every node of the code depth [N_code, C] to logits and planes.

        Args:
            tree: where `grow`, only its levels above the code depth are read; else it is followed to its deepest.
            grow: split by the predictions instead of following `tree`.
        """
        graphs = build_graphs(tree, tree.full_depth, self.code_depth)
        x, skips = self._down(x, tree, graphs)
        out = Decoded(tree, {}, {})
        for i, block in enumerate(self.decoder):
            depth = tree.full_depth + i
            if i > 0:
                if depth not in graphs:
                    graphs |= build_graphs(out.tree, depth, depth)
                x = self.upsample[i - 1](x, out.tree, graphs, depth - 1)
                if depth in skips:
                    x = x + skips[depth]
            x = block(x, graphs[depth])
            if depth >= self.code_depth:
                last = i == len(self.decoder) - 1
                self._read(x, out, graphs[depth], depth, grow=grow, last=last)
        return out

    def _down(
        self, x: Tensor, tree: Octree, graphs: dict[int, DualGraph]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The way from the code depth to full_depth: the last features, and those of each finer depth."""
        x = F.pad(x, (0, 0, graphs[self.code_depth].leaves, 0))
        skips = {}
        for i, block in enumerate(self.encoder):
            depth = self.code_depth - i
            if i > 0:
                x = self.downsample[i - 1](x, tree, graphs, depth + 1)
            x = block(x, graphs[depth])
            if depth > tree.full_depth:
                skips[depth] = x
        return x, skips

    def _read(
        self, x: Tensor, out: Decoded, graph: DualGraph, depth: int, *, grow: bool, last: bool
    ) -> None:
        """Split logits and planes of one depth, and the octree one level deeper where it grows."""
        head = depth - self.code_depth
        out.logits[depth] = self.predict[head](x, graph)[graph.leaves :]
        planes = self.regress[head](x, graph)
        nodes = sum(out.tree.count(d) for d in range(out.tree.full_depth, depth + 1))
        out.planes[depth] = planes.new_zeros(nodes, 4).index_put((graph.rows,), planes)
        if grow:
            labels = out.logits[depth].argmax(-1)
            if 8 * int(labels.sum()) > MAX_NODES:
                raise OctreeTooLarge(
                    f"the codes split {int(labels.sum())} nodes at depth {depth}, expected at most {MAX_NODES // 8}"
                )
            out.tree = out.tree.split(depth, labels)
            if not last:
                out.tree = out.tree.grow()


class VQVAE(nn.Module):
    """The published module: encoder, quantiser, decoder, under the published names."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = BinarySphericalQuantizer(config.code_bits)
        self.pre_proj = nn.Linear(config.encoder_channels[-1], config.code_bits)
        self.post_proj = nn.Linear(config.code_bits, config.down_channels[0])

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, object] | None = None,
        *,
        source: str = "<memory>",
    ) -> VQVAE:
        """The module of a published state dict; `config` gives `full_depth`, which no shape tells (3 where absent)."""
        state = {k.removeprefix("module."): v for k, v in state_dict.items()}
        module = cls(infer_config(state, source=source, **(config or {})))
        load_into(module, state, source=source)
        return module

    def encode(self, tree: Octree) -> tuple[Tensor, Tensor, Tensor]:
        """An octree built from points to codes [N_code, D], bits [N_code, D] and the entropy loss."""
        return self.quantizer(self.pre_proj(self.encoder(tree)))

    def decode(self, codes: Tensor, tree: Octree, *, grow: bool) -> Decoded:
        """Codes [N_code, D] and the octree above them to logits and planes; see `Decoder.forward`."""
        return self.decoder(self.post_proj(codes.to(self.post_proj.weight)), tree, grow=grow)


def infer_config(
    state: Mapping[str, Tensor], *, full_depth: int = 3, source: str = "<memory>"
) -> VQVAEConfig:
    """The configuration that the shapes of a state dict tell.

    Raises:
        WeightsError: it is no OctGPT VQ-VAE.
    """
    try:
        first = state["decoder.encoder.0.resblks.0.conva.conv.weights"]
        width = state["decoder.encoder.0.resblks.0.convb.conv.weights"].shape[1]
        encoder = _channels(state, "encoder.blocks.{}.resblks.0.conv3x3b.conv.weights", -1)
        down = _channels(state, "decoder.encoder.{}.resblks.0.convb.conv.weights", -1)
        up = _channels(state, "decoder.decoder.{}.resblks.0.convb.conv.weights", -1)
        bits = state["pre_proj.weight"].shape[0]
    except KeyError as error:
        raise WeightsError(f"{source}: not an OctGPT VQ-VAE, key {error} is missing") from error
    return VQVAEConfig(
        full_depth=full_depth,
        encoder_channels=encoder,
        encoder_blocks=_blocks(state, "encoder.blocks", len(encoder)),
        down_channels=down,
        down_blocks=_blocks(state, "decoder.encoder", len(down)),
        up_channels=up,
        up_blocks=_blocks(state, "decoder.decoder", len(up)),
        bottleneck=width // first.shape[1],
        node_types=first.shape[0] // 7 - width,
        code_bits=bits,
    )


def _channels(state: Mapping[str, Tensor], pattern: str, axis: int) -> tuple[int, ...]:
    sizes: list[int] = []
    while (key := pattern.format(len(sizes))) in state:
        sizes.append(state[key].shape[axis])
    return tuple(sizes)


def _blocks(state: Mapping[str, Tensor], prefix: str, levels: int) -> tuple[int, ...]:
    names = {tuple(k.split(".")) for k in state if k.startswith(prefix)}
    at = len(prefix.split("."))
    return tuple(
        len({name[at + 2] for name in names if name[at] == str(level)}) for level in range(levels)
    )
