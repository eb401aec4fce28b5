"""The methods that choose before the model, by name. TransPrune and DyVTE choose inside it (`inside.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import baselines, divprune, vtccls
from .select import Keep, Selection, Visual

METHODS: Mapping[str, Callable[[Visual, Keep], Selection]] = {
    "divprune": divprune.select,
    "vtccls": vtccls.select,
    "random": baselines.random,
    "uniform": baselines.uniform,
    "norm": baselines.norm,
}


def select(method: str, visual: Visual, keep: Keep) -> Selection:
    """What `method` keeps.

    Raises:
        ValueError: no such method, or one that needs what `visual` does not hold.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    return METHODS[method](visual, keep)
