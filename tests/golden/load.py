"""Goldens: what a published implementation computed, with tiny random weights, cut to what the tests need.

A state dict that was filled from a seed is stored as a recipe (names, shapes, a rule for each tensor) and is filled
again here, bit for bit. Where the environment variable ANYTOK_PARITY names a folder of whole fixtures, those are
loaded instead: they have the same tree, with more branches and more rows (`make parity DIR=...`).
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent


def load_golden(name: str) -> dict[str, Any]:
    """The golden `name` as nested dictionaries of tensors, recipes filled in."""
    folder = Path(os.environ.get("ANYTOK_PARITY") or HERE)
    return expand(torch.load(folder / f"{name}.pt", weights_only=True, map_location="cpu"))


def expand(node: Any) -> Any:
    """Replace every recipe below `node` by the state dict that it describes."""
    if isinstance(node, dict):
        if "__recipe__" in node:
            full = {**fill(node["__recipe__"]), **node["stored"]}
            return {name: full[name] for name in unpacked(node["order"])}
        return {key: expand(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(expand(value) for value in node)
    return node


def fill(recipe: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a recipe: one generator, entries in stored order; a "stored" entry only spends its draw."""
    rng = torch.Generator().manual_seed(recipe["seed"])
    tensors = {}
    for name, shape, rule, scale in unpacked(recipe["entries"]):
        kind = torch.rand if rule == "from" else torch.randn
        value = apply_rule(kind(tuple(shape), generator=rng), rule, scale)
        if value is not None:
            tensors[name] = value
    return tensors


def unpacked(table: list[Any] | Tensor) -> list[Any]:
    """A list, or the list that was packed into bytes."""
    return (
        json.loads(zlib.decompress(bytes(table.tolist()))) if isinstance(table, Tensor) else table
    )


def packed(table: list[Any]) -> Tensor:
    """A JSON list as compressed bytes: names of weights are long and alike."""
    return torch.tensor(list(zlib.compress(json.dumps(table).encode(), 9)), dtype=torch.uint8)


def apply_rule(draw: Tensor, rule: str, scale: Any) -> Tensor | None:
    """The tensor that `rule` makes of a standard normal draw; None where the value itself is stored.

    "from" wants a uniform draw, and its scale is (lowest, span).
    """
    if rule == "stored":
        return None
    if rule == "one_plus":
        return 1.0 + scale * draw
    if rule == "over_sqrt_fan_in":
        return draw * scale / draw[0].numel() ** 0.5
    if rule == "scaled":
        return scale * draw
    if rule == "from":
        return scale[0] + scale[1] * draw
    raise ValueError(
        f"rule is {rule!r}, expected stored, one_plus, over_sqrt_fan_in, scaled or from; "
        "the golden is newer than this loader"
    )
