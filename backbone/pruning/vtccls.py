"""VTC-CLS (arXiv 2412.05819): the tokens that the vision model's CLS attends to, over several of its layers.

A token's score is the attention that CLS pays to it after the softmax, mean over heads, summed over the layers from
`start` to the last but one (features are taken before the last layer, whose attention therefore does not count). The
highest m stay, in raster order. Every row is its own here; the published code averages over the batch.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .select import Keep, Selection, Visual, top


def select(
    visual: Visual, keep: Keep, *, start: int = 0, reduce: Literal["sum", "min", "max"] = "sum"
) -> Selection:
    """The m tokens of each row that CLS attends to most.

    Args:
        start: the first layer that counts.
        reduce: how layers are joined.

    Raises:
        ValueError: no attention given, or no layer left to count.
    """
    if visual.cls_attention is None:
        raise ValueError(
            "VTC-CLS needs cls_attention (backbone.vision gives it); for tokens without a CLS take divprune"
        )
    return top(visual, scores(visual.cls_attention, start=start, reduce=reduce), keep)


def scores(
    attention: Tensor, *, start: int = 0, reduce: Literal["sum", "min", "max"] = "sum"
) -> Tensor:
    """[B, n] of CLS attention [layers, B, n] of all layers of the vision model."""
    layers = len(attention)
    if not 0 <= start < layers - 1:
        raise ValueError(
            f"start is {start}, expected 0 to {layers - 2}: the last of {layers} layers does not count"
        )
    counted = attention[start:-1]
    if reduce == "sum":
        return counted.sum(0)
    if reduce not in ("min", "max"):
        raise ValueError(f"reduce is {reduce!r}, expected 'sum', 'min' or 'max'")
    return counted.amin(0) if reduce == "min" else counted.amax(0)
