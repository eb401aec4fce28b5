"""Pruning a `Packed` sequence: tokens of one segment leave, everything that is counted by place follows."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..interleave import Packed, Segment
from .select import Positions


def prune(
    packed: Packed, segment: int, indices: Tensor, *, positions: Positions = "kept"
) -> tuple[Packed, Tensor]:
    """Keep `indices` [m] of one segment, ascending, and all that lies outside of it.

    Args:
        segment: its number in `packed.segments`; one that is only read (weights 0).
        positions: "kept", or "packed": each document counts on without gaps.

    Returns:
        The shorter sequence, and for each of its places the place before, [L'].

    Raises:
        ValueError: indices that are not ascending or that the segment does not have; a segment that is learned.
    """
    part = packed.segments[segment]
    indices = indices[indices >= 0]
    length = part.stop - part.start
    if len(indices) and (bool((indices.diff() <= 0).any()) or int(indices[-1]) >= length):
        raise ValueError(f"indices must ascend below {length}, the segment's length")
    if bool((packed.weights[part.start : part.stop] != 0).any()):
        raise ValueError(
            f"segment {segment} ({part.block}) is learned; only what is read is pruned"
        )
    keep = torch.ones(len(packed), dtype=torch.bool)
    keep[part.start : part.stop] = False
    keep[part.start + indices] = True
    index = keep.nonzero()[:, 0]
    shorter = length - len(indices)
    at = packed.positions[index]
    if positions == "packed":
        behind = (index >= part.stop) & (packed.documents[index] == part.document)
        at = at - shorter * behind.long()
        inside = (index >= part.start) & (index < part.stop)
        at[inside] = packed.positions[part.start] + torch.arange(len(indices))
    return (
        Packed(
            ids=packed.ids[index],
            weights=packed.weights[index],
            positions=at,
            documents=packed.documents[index],
            segments=tuple(
                _moved(s, part, shorter, indices, i == segment)
                for i, s in enumerate(packed.segments)
            ),
        ),
        index,
    )


def _moved(other: Segment, part: Segment, by: int, indices: Tensor, itself: bool) -> Segment:
    if itself:
        data = None if other.data is None else other.data[indices]
        return dataclasses.replace(other, stop=other.stop - by, data=data)
    if other.start < part.stop:
        return other
    return dataclasses.replace(other, start=other.start - by, stop=other.stop - by)
