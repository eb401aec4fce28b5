"""One-D-Piece (arXiv 2501.10064, turingmotors/One-D-Piece): TiTok with 256 ordered tokens, of which any prefix decodes.

- In training one k is drawn for each forward pass and the decoder sees the first k tokens, so that information moves
  to the front ("tail token drop"); the architecture is legacy TiTok's, key by key.
- A missing suffix is absent: it is neither padded nor replaced by a token.
- `onedpiece/mini` keeps the contract (ordered tokens, any prefix, tail drop) on an analytic basis: `onedpiece_mini.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..codec import CodecSpec
from ..layout import Layout, Prefix
from ..published import Weights
from .onedpiece_mini import OneDPieceMini, OneDPieceMiniConfig
from .titok import TiTok

if TYPE_CHECKING:
    from ..registry import Entry


class OneDPiece(TiTok):
    """Pictures to 1-256 ordered ids and back; `stream[:k]` decodes for every k."""

    system = "onedpiece"

    def _layout(self) -> Layout:
        return Prefix(self.config.tokens)

    def _spec(self, name: str) -> CodecSpec:
        return replace(super()._spec(name), prefix_step=1)


def build(files: Mapping[str, Weights], entry: Entry) -> OneDPiece | OneDPieceMini:
    """The codec of a registry row, or of a file that `save_codec` wrote."""
    weights = files["weights"]
    codec: OneDPiece | OneDPieceMini
    if "basis.values" in weights.tensors:
        codec = OneDPieceMini(OneDPieceMiniConfig(**entry.config), name=entry.name)
        codec.load_weights(weights.tensors, source=weights.source)
    else:
        codec = OneDPiece.from_published(
            weights.tensors, entry.config, name=entry.name, source=weights.source
        )
    codec.spec = replace(
        codec.spec, code_licence=entry.code_licence, weights_licence=entry.weights_licence
    )
    return codec.eval()
