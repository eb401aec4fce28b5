"""Cut `audio_cosy_flow.pt`, `audio_cosy_hift.pt` and `audio_cosy3_noise_tables.pt`.

    python tests/golden/cut_cosyvoice_speech.py ../shared/parity

Weights become recipes. Of mels every sixteenth band is kept, of samples every eighth. Tests draw the rest again: the
noise of v1's flow from seed 7, the vocoders' from seeds 9 (v1, v2) and 0 (v3), the tables from their recipes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from cut_cosyvoice_tokens import recipe
from load import apply_rule, expand, packed
from torch import Tensor

HERE = Path(__file__).parent
FLOW_SEEDS = {"v1": 11, "v2": 12, "v3": 13}
HIFT_SEED = 5
NOISE_SEED = 7  # of v1's noise
BANDS, SAMPLES = 16, 8


def whole(name: str) -> dict[str, Any]:
    """A fixture."""
    return torch.load(Path(sys.argv[1]) / f"{name}.pt", weights_only=True)


def hift_recipe(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Gains and alphas were uniform draws, the rest normal ones; the pitch's bias is stored."""
    rng = torch.Generator().manual_seed(HIFT_SEED)
    entries, stored = [], {}
    for name, value in tensors.items():
        uniform = name.endswith(("original0", "alpha"))
        draw = (torch.rand if uniform else torch.randn)(value.shape, generator=rng)
        fan_in = value[0].numel() if value.ndim > 1 else 1
        normal = [("scaled", s) for s in (0.02, 0.05, fan_in**-0.5, 5.0)]
        candidates = [("from", (0.4, 0.6)), ("from", (0.5, 1.0))] if uniform else normal
        value = value.float()  # v3's pitch predictor is float64 there, with float32 numbers
        rules = [r for r in candidates if torch.equal(apply_rule(draw, *r), value)]
        entries.append([name, list(value.shape), *(rules[0] if rules else ("stored", 1.0))])
        if not rules:
            stored[name] = value.clone()
    return {
        "__recipe__": {"seed": HIFT_SEED, "entries": entries},
        "stored": stored,
        "order": list(tensors),
    }


def pack(node: dict[str, Any]) -> dict[str, Any]:
    """A recipe with its names compressed."""
    entries = node["__recipe__"]["entries"]
    return {
        "__recipe__": {**node["__recipe__"], "entries": packed(entries)},
        "stored": node["stored"],
        "order": packed(node["order"]),
    }


def once(value: Tensor, seen: list[Tensor]) -> Tensor:
    """The same object for the same numbers, so that they are written once."""
    for other in seen:
        if torch.equal(other, value):
            return other
    seen.append(value.clone())
    return seen[-1]


def flows() -> dict[str, Any]:
    """Inputs, and for each flow its weights and mels."""
    fixture = whole("audio_cosy_flow")
    golden: dict[str, Any] = {k: fixture[k].clone() for k in ("tok", "ptok", "emb")} | {
        "models": {}
    }
    prompts: list[Tensor] = []
    for name, model in fixture["models"].items():
        tensors = model["state_dict"]
        drawn = [k for k in tensors if "inv_freq" not in k]
        kept = {k: v[:, ::BANDS].clone() for k, v in model.items() if k.startswith("mel")}
        kept["prompt_feat"] = once(model["prompt_feat"], prompts)
        golden["models"][name] = {
            "state_dict": pack(recipe(tensors, FLOW_SEEDS[name], drawn)),
            **kept,
        }
    rng = torch.Generator().manual_seed(NOISE_SEED)
    noise = fixture["models"]["v1"]["noise"]
    assert torch.equal(torch.randn(noise.shape, generator=rng), noise)
    return golden


def vocoders() -> dict[str, Any]:
    """For each vocoder its weights, mel, pitch, source and samples; v2's source whole."""
    golden: dict[str, Any] = {"models": {}}
    mels: list[Tensor] = []
    for name, model in whole("audio_cosy_hift")["models"].items():
        kept = {"mel": once(model["mel"], mels), "f0": model["f0"].clone()}
        kept |= {k: model[k][..., ::SAMPLES].clone() for k in ("s", "y")}
        if name == "v3":
            kept["y_nofinal"] = model["y_nofinal"][..., ::SAMPLES].clone()
        golden["models"][name] = {"state_dict": pack(hift_recipe(model["state_dict"])), **kept}
    return golden


def tables() -> dict[str, Any]:
    """A few numbers of each table of v3."""
    fixture = whole("audio_cosy3_noise_tables")
    return {
        "rand_noise_head": fixture["rand_noise_head"][:, ::40, ::100].clone(),
        "sine_head": fixture["sine_head"][:, ::480].clone(),
    }


def main() -> None:
    """Write the goldens, their weights checked against the fixtures."""
    goldens = {
        "audio_cosy_flow": flows(),
        "audio_cosy_hift": vocoders(),
        "audio_cosy3_noise_tables": tables(),
    }
    for name, golden in goldens.items():
        for version, model in golden.get("models", {}).items():
            filled = expand(model["state_dict"])
            for key, value in whole(name)["models"][version]["state_dict"].items():
                assert torch.equal(filled[key], value.float()), f"{name} {version}: {key} differs"
        target = HERE / f"{name}.pt"
        torch.save(golden, target)
        print(f"{target.name}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
