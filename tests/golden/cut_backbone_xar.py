"""Cut the xAR fixture: what a seed explains is stored as that seed, one rotary table stands for all, the mask goes.

python tests/golden/cut_backbone_xar.py --from ../shared/parity
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from cut import HERE, compact
from torch import Tensor

SEEDS = {
    "imgs": 5,
    "tok": 6,
    "ode": 9,
    "draws": 11,
}  # of torch's global generator, when it was recorded


def explained(value: Tensor, seed: int) -> dict[str, Any]:
    """The seed and shape of a standard normal draw, checked."""
    draw = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    if not torch.equal(draw, value):
        raise SystemExit(f"seed {seed} does not give a tensor of {tuple(value.shape)}")
    return {"seed": seed, "shape": list(value.shape)}


def check_draws(draws: list[Tensor], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for draw in draws:
        if not torch.equal(torch.randn(draw.shape, generator=rng, dtype=draw.dtype), draw):
            raise SystemExit(f"seed {seed} does not give the recorded draws")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="source", type=Path, required=True, help="whole fixtures")
    args = parser.parse_args()
    whole = torch.load(args.source / "backbone_xar.pt", weights_only=True, map_location="cpu")
    state = compact(whole["state_dict"])
    tables = {}
    for key, value in list(state["stored"].items()):
        same = tables.setdefault(key.rsplit(".", 1)[-1], value)
        if key == "mask":
            del state["stored"][key]
        elif not torch.equal(same, value):
            raise SystemExit(f"{key} differs from the other tables")
        else:
            state["stored"][key] = same
    state["order"] = [name for name in state["order"] if name != "mask"]
    train, samples = whole["train"], whole["samples"]
    for sample in samples.values():
        check_draws(sample["draws"], SEEDS["draws"])
    golden = {
        "state_dict": state,
        "shapes": whole["shapes"],
        "train": {
            **{
                k: train[k] for k in ("labels", "t", "label_drop_u", "noises", "loss", "grad_norms")
            },
            "imgs": explained(train["imgs"], SEEDS["imgs"]),
        },
        "tok": explained(whole["tok"], SEEDS["tok"]),
        **{k: whole[k] for k in ("t4", "lab", "v_train", "trap")},
        "samples": {
            name: {
                **{k: sample[k] for k in ("label", "num_steps", "cfg", "network_calls")},
                "tokens": sample["tokens"][:1].clone(),
                "calls": [list(call[3:]) for call in sample["calls"]],
                "draws": SEEDS["draws"],
            }
            for name, sample in samples.items()
        },
        "ode": {
            "latents": explained(whole["ode"]["latents"], SEEDS["ode"]),
            "out": whole["ode"]["out"].float(),
        },
    }
    target = HERE / "backbone_xar.pt"
    torch.save(golden, target)
    print(f"{target.name}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
