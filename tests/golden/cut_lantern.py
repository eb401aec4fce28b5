"""Make lantern.pt of a fixture: `python tests/golden/cut_lantern.py ../shared/parity/backbone_lantern.pt`.

The fixture repeats a tree's logits for every setting and for every leaf below a node; here each stands once. Nothing
else is changed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
KINDS = ("dynamic", "static")
SHARED = ("logits", "candidates", "cprob", "p_indices", "ops")


def cut_lantern(fixture: dict[str, Any]) -> dict[str, Any]:
    """Trees, their verifications, the drafter, and the means of exact laws."""
    inputs, verified = {}, []
    for pair in fixture["pairs"]:
        inputs[pair["tree"]] = {key: pair[key] for key in SHARED}
        names = ("tree", "lantern", "k", "delta", "proc", "seed")
        stood = {kind: tuple(map(int, pair[kind][:2])) for kind in KINDS}
        verified.append({key: pair[key] for key in names} | stood)
    rests = {
        kind: torch.stack([pair[kind][2].flatten() for pair in fixture["pairs"]]) for kind in KINDS
    }
    shapes = {
        name: {"depths": tree["tree_position_ids"], "seen": tree["tree_attn_mask"][0, 0].bool()}
        for name, tree in fixture["trees"].items()
    }
    drafter = {**fixture["drafter"], "plain": fixture["drafter"]["plain"][:, -32:].clone()}
    kept = {key: fixture[key] for key in ("codebook", "nearest", "certified")}
    return {
        **kept,
        "inputs": inputs,
        "verified": verified,
        "rests": rests,
        "trees": shapes,
        "drafter": drafter,
    }


if __name__ == "__main__":
    whole = torch.load(sys.argv[1], weights_only=True, map_location="cpu")
    torch.save(cut_lantern(whole), HERE / "lantern.pt")
