"""Cut `audio_s3tokenizer.pt` and `audio_campplus.pt`: weights become recipes, every twelfth hidden state is kept.

    python tests/golden/cut_cosyvoice_tokens.py ../shared/parity

The sound is `wav16k` of the golden `audio_features`; v1's table of sinusoids is left out, the codec makes it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from load import apply_rule, expand
from torch import Tensor

HERE = Path(__file__).parent
EVERY = 12  # hidden states


def recipe(tensors: Mapping[str, Tensor], seed: int, drawn: Sequence[str]) -> dict[str, Any]:
    """`tensors` as a recipe: the names `drawn` spend a draw each; what no rule explains bit for bit is stored."""
    rng = torch.Generator().manual_seed(seed)
    entries, stored = [], {k: v.clone() for k, v in tensors.items() if k not in drawn}
    for name in drawn:
        value = tensors[name]
        draw = torch.randn(value.shape, generator=rng)
        fan_in = value[0].numel() if value.ndim > 1 else 1
        candidates = (("scaled", fan_in**-0.5), ("scaled", 0.1), ("one_plus", 0.1))
        rules = [r for r in candidates if torch.equal(apply_rule(draw, *r), value)]
        entries.append([name, list(value.shape), *(rules[0] if rules else ("stored", 1.0))])
        if not rules:
            stored[name] = value.clone()
    return {
        "__recipe__": {"seed": seed, "entries": entries},
        "stored": stored,
        "order": list(tensors),
    }


def whole(name: str) -> dict[str, Any]:
    """The fixture."""
    return torch.load(Path(sys.argv[1]) / f"{name}.pt", weights_only=True)


def s3() -> dict[str, Any]:
    """Mels, and for each model its weights, codes, long codes, values before rounding, some hidden states."""
    fixture = whole("audio_s3tokenizer")
    models = {}
    for name, model in fixture["models"].items():
        tensors = {k: v for k, v in model["state_dict"].items() if "positional" not in k}
        models[name] = {
            "state_dict": recipe(tensors, 1, list(tensors)),
            "hidden": model["hidden"][:, ::EVERY].clone(),
            "code_len": model["code_len"].clone(),
            "codes": model["codes"].to(torch.int16),
            "fsq_pre": None if model["fsq_pre"] is None else model["fsq_pre"].clone(),
            "long_codes": model["long_codes"].to(torch.int16),
        }
    one, other = (models[f"speech_tokenizer_v1{rate}"]["state_dict"] for rate in ("", "_25hz"))
    book = "quantizer._codebook.embed"
    assert torch.equal(one["stored"][book], other["stored"][book])
    other["stored"][book] = one["stored"][book]  # so that it is written once
    return {"mel": fixture["mel"].clone(), "mel2": fixture["mel2"].clone(), "models": models}


def campplus() -> dict[str, Any]:
    """Weights, the short input, both embeddings."""
    fixture = whole("audio_campplus")
    tensors = {k: v for k, v in fixture["state_dict"].items() if "num_batches" not in k}
    parameters = [k for k in tensors if "running" not in k]
    kept = {k: fixture[k].clone() for k in ("feat2", "emb", "emb2")}
    return {"cfg": fixture["cfg"], "state_dict": recipe(tensors, 5, parameters), **kept}


def main() -> None:
    """Write both goldens, each checked against its fixture."""
    for name, golden in (("audio_s3tokenizer", s3()), ("audio_campplus", campplus())):
        states = [golden, *golden.get("models", {}).values()]
        fixtures = [whole(name), *whole(name).get("models", {}).values()]
        for state, fixture in zip(states, fixtures):
            for key, value in expand(state).get("state_dict", {}).items():
                assert torch.equal(value, fixture["state_dict"][key]), f"{name}: {key} differs"
        torch.save(golden, HERE / f"{name}.pt")
        print(f"{name}.pt: {(HERE / f'{name}.pt').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
