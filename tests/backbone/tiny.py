"""Small codecs, rules and models for the tests of backbone and generators."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from anytok.backbone.directory import Model
from anytok.backbone.interleave import Interleaver
from anytok.backbone.rules import Rule
from anytok.backbone.transformer import Transformer, TransformerConfig
from anytok.codecs.codec import Codec, CodecSpec
from anytok.codecs.layout import Fixed, Frames, Grid, Octree, Prefix
from anytok.codecs.text import TextCodec
from anytok.modalities.image import Image


class Thumbnail(Codec):
    """A picture as sixteen grey levels of a 4x4 thumbnail, in order of rows; any prefix decodes."""

    system = "thumbnail"

    def __init__(self, name: str = "thumbnail/tiny", levels: int = 16, brightest: float = 1.0):
        super().__init__()
        self.levels = torch.nn.Parameter(torch.linspace(0, brightest, levels), requires_grad=False)
        self.spec = CodecSpec(
            name=name,
            modality="image",
            vocab=((levels,),),
            layout=Prefix(16),
            prefix_step=1,
            size=(4, 4),
        )

    def code_vectors(self, part=0, depth=0):
        return self.levels[:, None]

    def encode(self, media, *, options=None, rng=None):
        grey = [F.interpolate(m.pixels.mean(0)[None, None], (4, 4), mode="area") for m in media]
        table = self.levels.expand(16, -1)
        return [self.stream((g.flatten()[:, None] - table).abs().argmin(-1), meta={}) for g in grey]

    def decode(self, streams, *, options=None, rng=None):
        for stream in streams:
            self.check(stream)
        pixels = [
            self.levels[F.pad(s.codes[:, 0], (0, 16 - len(s)))].view(1, 4, 4) for s in streams
        ]
        return [Image(p.expand(3, 4, 4).contiguous()) for p in pixels]


RULES = {
    "text": Rule(codec="text/t@0", modality="text", vocab=((50,),), layout=Frames(), prefix_step=1),
    "prefix": Rule(
        codec="image/p@0", modality="image", vocab=((64,),), layout=Prefix(8), prefix_step=1
    ),
    "grid": Rule(codec="image/g@0", modality="image", vocab=((16,),), layout=Grid((2, 3))),
    "fixed": Rule(codec="image/f@0", modality="image", vocab=((16, 4),), layout=Fixed(3)),
    "frames": Rule(
        codec="video/v@0", modality="video", vocab=((10,),), layout=Frames((2, 2), 3), prefix_step=4
    ),
    "depths": Rule(
        codec="audio/r@0", modality="audio", vocab=((10, 11, 12),), layout=Frames(), limit=6
    ),
    "runs": Rule(
        codec="audio/m@0",
        modality="audio",
        vocab=((10, 11, 12, 13),),
        layout=Frames(),
        flatten="depth",
    ),
    "octree": Rule(
        codec="shape/o@0",
        modality="shape",
        vocab=((2,), (2,), (2,) * 16),
        layout=Octree(1, 3),
        flatten="octree",
    ),
}


def transformer(vocab_size: int = 64, seed: int = 0, **sizes) -> Transformer:
    """A small model with weights large enough that its choices differ."""
    defaults = {"width": 32, "ffn": 48, "layers": 2, "heads": 4, "kv_heads": 2, "context": 64}
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(vocab_size=vocab_size, **{**defaults, **sizes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    return model.eval()


def model(codec: Codec | None = None, **sizes) -> Model:
    """An untrained text <-> image model over bytes and thumbnails."""
    codec = codec or Thumbnail()
    text = TextCodec()
    interleaver = Interleaver.build([Rule.of(text, limit=12), Rule.of(codec)])
    return Model(
        name="tiny",
        transformer=transformer(interleaver.vocabulary.size, **sizes),
        interleaver=interleaver,
        text=text,
        pairs=(("text", "image"), ("image", "text")),
        generation={"image": {"cfg": 2.0, "units": 10}, "text": {"temperature": 0.0, "units": 8}},
        codecs={"image": codec},
    )
