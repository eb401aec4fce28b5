"""OctGPT as a codec: a mesh or an oriented point cloud to a stream, and back to a closed mesh where the source was.

- A stream has one part of split bits for each level full_depth ... code_depth - 1, then one part of codes for every
  node of the code depth, the empty ones included; the side tensor "frame" holds the source's centre (3) and scale (1).
- The source is centred and scaled into the cube before it is cut into an octree. `max_codes` scales a shape with much
  surface down a little further, so that its stream fits a language model's context.
- Open or inside-out meshes are repaired first (`modalities.watertight`); textures are out of scope.

Networks and paper: `vqvae.py`. Letters: N nodes, D bits of a code.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...modalities.shape import Shape
from ..codec import Codec, CodecSpec, CodecUnavailable, Rng, item_rngs
from ..layout import Octree as OctreeLayout
from ..published import Weights, load_into
from ..stream import StreamError, TokenStream
from .octree import Octree, Points, build_octree, encode_keys, full_octree
from .surface import Field, GridConfig, mesh, sparse
from .vqvae import MINI, PRESETS, VQVAE, Decoded, OctreeTooLarge, VQVAEConfig

if TYPE_CHECKING:
    from ..registry import Entry

SHRINK = 0.96
MAX_FACES = 2_000_000  # of a source: repairing and sampling take memory and minutes above
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OctGPTConfig:
    """A codec: its networks, how a source is prepared, and how a mesh is read from the field.

    Args:
        network: the VQ-VAE.
        points: how many points the octree is built from.
        extent: the longest side of a prepared source; the cube has 2.
        max_codes: scale a source down until it has at most so many codes; 0 for no limit.
        grid: samples of the field a side; grid_box: they span [-grid_box, grid_box); level: the iso-value.
    """

    network: VQVAEConfig = field(default_factory=VQVAEConfig)
    points: int = 120_000
    extent: float = 1.6
    max_codes: int = 0
    grid: int = 256
    grid_box: float = 0.9
    level: float = 0.002

    def __post_init__(self):
        if isinstance(self.network, Mapping):  # JSON gives a dictionary
            object.__setattr__(self, "network", VQVAEConfig(**self.network))
        if not 0 < self.extent < 2:
            raise ValueError(f"extent is {self.extent}, expected above 0 and below 2")


MINI_CODEC = OctGPTConfig(network=MINI, points=20_000, max_codes=960, grid=96, level=0.0)


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """Options of one call; None takes the codec's own.

    Args:
        points: points to sample from a mesh when encoding.
        repair: turn faces outwards and close an open mesh before encoding; where False, its faces are taken as they
            are.
        grid: samples a side of the field when decoding.
    """

    points: int | None = None
    repair: bool = True
    grid: int | None = None


class OctGPT(Codec):
    """The codec around `VQVAE`. Streams: split bits per level, then code bits; side tensor "frame"."""

    system = "octgpt"

    def __init__(
        self,
        config: OctGPTConfig,
        *,
        name: str = "octgpt/custom",
        weights_licence: str = "Apache-2.0",
    ):
        super().__init__()
        self.config = config
        self.vqvae = VQVAE(config.network)
        net = config.network
        splits = net.code_depth - net.full_depth
        self.spec = CodecSpec(
            name=name,
            modality="shape",
            vocab=((2,),) * splits + ((2,) * net.code_bits,),
            layout=OctreeLayout(net.full_depth, net.code_depth),
            compose="concat",
            weights_licence=weights_licence,
        )

    def encode(
        self,
        media: Sequence[Shape],
        *,
        options: ShapeOptions | None = None,
        rng: Rng | None = None,
    ) -> list[TokenStream]:
        """Meshes or point clouds with outward normals to streams.

        Raises:
            ValueError: a point cloud without normals, a shape without extent or area, or more than `MAX_FACES` faces.
        """
        options = options or ShapeOptions()
        streams = []
        for shape, generator in zip(media, item_rngs(rng, len(media))):
            cloud, frame = self.prepare(shape, options=options, rng=generator)
            tree = self.octree([cloud])
            parts = self.tokenize(tree)
            streams.append(self.stream(parts, side={"frame": frame}))
        return streams

    def decode(
        self,
        streams: Sequence[TokenStream],
        *,
        options: ShapeOptions | None = None,
        rng: Rng | None = None,
    ) -> list[Shape]:
        """Streams to closed meshes with outward faces, at the source's place and size.

        A stream without "frame" (a generated one) gives a mesh in the codec's own cube.

        Raises:
            StreamError: another codec's stream, split bits that do not fit, or codes that describe no surface.
        """
        options = options or ShapeOptions()
        return [self._decode(stream, options) for stream in streams]

    def _decode(self, stream: TokenStream, options: ShapeOptions) -> Shape:
        self.check(stream)
        frame = stream.side.get("frame", torch.tensor([0.0, 0.0, 0.0, 1.0]))
        if frame.shape != (4,) or not bool(frame.isfinite().all()) or frame[3] <= 0:
            raise StreamError(
                f"side tensor 'frame' is {frame.tolist()}, expected centre (3) and a scale above 0"
            )
        decoded = self.detokenize([part.codes.to(self.device) for part in stream.parts])
        vertices, faces = self.mesh(decoded.field(), size=options.grid)
        if len(faces) == 0:
            raise StreamError(f"stream of '{stream.codec}' describes no surface")
        shape = Shape(vertices, faces)
        return shape.transformed(frame[:3].float(), float(frame[3]))

    def prepare(
        self,
        shape: Shape,
        *,
        options: ShapeOptions | None = None,
        rng: torch.Generator | None = None,
    ) -> tuple[Points, Tensor]:
        """A source to oriented points in the cube, and the frame [4] (centre, scale) that leads back."""
        options = options or ShapeOptions()
        count = options.points or self.config.points
        if shape.faces is None and shape.normals is None:
            raise ValueError(
                "the point cloud has no normals, expected outward ones; "
                "estimate them first, or give a mesh"
            )
        if shape.faces is not None and len(shape.faces) > MAX_FACES:
            raise ValueError(
                f"the mesh has {len(shape.faces)} faces, expected at most {MAX_FACES}; simplify it, or give "
                "points with normals: shape.sample(200_000)"
            )
        if not bool((shape.bounds[1] - shape.bounds[0]).isfinite().all()):
            raise ValueError("the shape's extent is beyond float32; scale it down first")
        small, centre, scale = shape.normalized(self.config.extent)
        if not scale > 1e-30:
            raise ValueError(
                f"the shape's extent is {scale}, too small for float32; scale it up first"
            )
        if small.faces is not None:
            if options.repair:
                small = oriented(small, resolution=2**self.config.network.depth)
            cloud = small.sample(count, rng)
        else:
            cloud = small.sample(min(count, len(small.vertices)), rng)
        shrink = self._shrink(cloud.vertices)
        frame = torch.cat([centre.float(), torch.tensor([scale / shrink])])
        normals = torch.nn.functional.normalize(cloud.normals, dim=-1)
        return Points((cloud.vertices * shrink).to(self.device), normals.to(self.device)), frame

    def _shrink(self, points: Tensor) -> float:
        """The largest power of `SHRINK` at which the points need at most `max_codes` codes."""
        shrink, limit = 1.0, self.config.max_codes
        depth = self.config.network.code_depth - 1
        while limit:
            cells = ((points * shrink + 1) * 2 ** (depth - 1)).long()
            if 8 * len(torch.unique(encode_keys(cells))) <= limit or shrink < 0.2:
                return shrink
            shrink *= SHRINK
        return shrink

    def octree(self, clouds: Sequence[Points]) -> Octree:
        """The octrees of prepared clouds, one a batch row."""
        net = self.config.network
        return build_octree(clouds, depth=net.depth, full_depth=net.full_depth)

    @torch.no_grad()
    def tokenize(self, tree: Octree) -> list[Tensor]:
        """An octree to the parts of a stream: split bits [N_d] per level, then code bits [N, D]."""
        net = self.config.network
        bits = self.vqvae.encode(tree)[1]
        return [tree.split_bits(d) for d in range(net.full_depth, net.code_depth)] + [bits]

    @torch.no_grad()
    def detokenize(self, parts: Sequence[Tensor]) -> Decoded:
        """The parts of one stream (split bits [N_d] or [N_d, 1], code bits [N, D]) to a field.

        Raises:
            StreamError: a level with no bit set, below which there is nothing to decode; or codes that ask for more
                nodes than any surface needs.
        """
        *splits, bits = parts
        tree = full_octree(self.config.network.full_depth, device=bits.device)
        for labels in splits:
            if not bool(labels.any()):
                raise StreamError(f"no split bit is set at depth {tree.depth}: the shape is empty")
            tree = tree.split(tree.depth, labels.reshape(-1)).grow()
        if tree.count(tree.depth) != len(bits):
            raise StreamError(
                f"{len(bits)} codes given, the split bits ask for {tree.count(tree.depth)}"
            )
        try:
            return self.vqvae.decode(self.vqvae.quantizer.codes(bits), tree, grow=True)
        except OctreeTooLarge as error:
            raise StreamError(str(error)) from error

    def mesh(self, field: Field, *, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Vertices [V, 3] in the cube and faces [F, 3] of a field; empty where it has no surface."""
        config = self.config
        grid = GridConfig(size=size or config.grid, box=config.grid_box, level=config.level)
        return mesh(sparse(field, grid), grid)

    def code_vectors(self, part: int = -1, depth: int = 0) -> Tensor:
        """What the decoder receives for the two values of a code bit: [2, 1]."""
        if part not in (-1, len(self.spec.vocab) - 1):
            raise CodecUnavailable(f"'{self.spec.name}' has vectors for its codes only, not splits")
        value = self.config.network.code_bits**-0.5
        return torch.tensor([[-value], [value]], device=self.device)


def oriented(shape: Shape, *, resolution: int) -> Shape:
    """A mesh whose faces look outwards, closed where it was open, on a grid of `resolution`; a repair is logged."""
    from ...modalities.watertight import make_watertight

    closed = make_watertight(shape, resolution=resolution)
    if closed.method == "turned":
        logger.warning("faces of the mesh looked inwards: they were turned before encoding")
    elif closed.method != "unchanged":
        logger.warning(
            "the mesh is not watertight: it was closed by %s before encoding, %.2g outside the original",
            closed.method,
            closed.offset,
        )
    return closed.shape


def build(files: Mapping[str, Weights], entry: Entry) -> OctGPT:
    """The codec of a registry row: our own file with its whole config, or a published one with `full_depth`."""
    weights = files["weights"]
    if weights.config:
        codec = OctGPT(
            OctGPTConfig(**entry.config), name=entry.name, weights_licence=entry.weights_licence
        )
        load_into(codec, weights.tensors, source=weights.source)
        return codec
    vqvae = VQVAE.from_published(weights.tensors, entry.config, source=weights.source)
    codec = OctGPT(
        OctGPTConfig(network=vqvae.config), name=entry.name, weights_licence=entry.weights_licence
    )
    codec.vqvae = vqvae
    return codec


__all__ = ["MINI_CODEC", "PRESETS", "OctGPT", "OctGPTConfig", "ShapeOptions", "build"]
