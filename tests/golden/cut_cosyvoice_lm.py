"""Cut `audio_cosy_llm.pt`: weights become recipes, v1's trace and the vectors of repetition-aware sampling are kept.

    python tests/golden/cut_cosyvoice_lm.py ../shared/parity

The recorded losses and tokens of v2 and v3 are left out: with the stored weights, transformers 5.23 itself gives other
ones (v2: loss 4.4902, recorded 4.4956), so they were not made with these weights. Their keys are kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from cut_cosyvoice_tokens import recipe
from load import expand

HERE = Path(__file__).parent
SEEDS = {"v1": 21, "v2": 22, "v3": 22}


def main() -> None:
    """Write the golden, checked against its fixture."""
    fixture = torch.load(Path(sys.argv[1]) / "audio_cosy_llm.pt", weights_only=True)
    models: dict[str, object] = {"ras": fixture["models"]["ras"]}
    for name, seed in SEEDS.items():
        whole = fixture["models"][name]
        tensors = {k: v for k, v in whole["state_dict"].items() if not k.endswith("lm_head.weight")}
        cut = {"state_dict": recipe(tensors, seed, list(tensors))}
        for key, value in expand(cut)["state_dict"].items():
            assert torch.equal(value, tensors[key]), key
        kept = ("loss", "tokens") if name == "v1" else ("qwen_cfg",)
        models[name] = cut | {key: whole[key] for key in kept}
    golden = {k: fixture[k] for k in ("text", "ptext", "psp", "emb", "batch")} | {"models": models}
    torch.save(golden, HERE / "audio_cosy_llm.pt")


if __name__ == "__main__":
    main()
