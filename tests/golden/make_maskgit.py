"""Add sampled sequences, with their seeds, to the goldens of TiTok's generators, by the published code.

    python tests/golden/make_maskgit.py --code CHECKOUT_OF_1D_TOKENIZER [--also SITE_WITH_OMEGACONF]

The fixtures' own sequences do not say what seed drew them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from pathlib import Path

import torch
from load import expand

HERE = Path(__file__).parent
SAMPLES = (
    {"guidance_decay": "constant", "guidance_scale": 3.0, "num_sample_steps": 6},
    {"guidance_decay": "linear", "guidance_scale": 4.5, "randomize_temperature": 9.5},
    {
        "guidance_decay": "power-cosine",
        "guidance_scale": 5.5,
        "randomize_temperature": 3.0,
        "num_sample_steps": 16,
        "softmax_temperature_annealing": True,
    },
    {"guidance_decay": "constant", "guidance_scale": 0.0, "num_sample_steps": 20},
)


def main() -> None:
    """Run the published `generate` on the golden's weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--also", type=Path)
    args = parser.parse_args()
    sys.path[:0] = [str(path) for path in (args.code, args.also) if path]
    # The package's own __init__ imports losses and teachers.
    package = types.ModuleType("modeling.modules")
    package.__path__ = [str(args.code / "modeling" / "modules")]
    sys.modules["modeling.modules"] = package
    published = importlib.import_module("modeling.maskgit")
    config = importlib.import_module("omegaconf").OmegaConf.create(
        {
            "model": {
                "vq_model": {"codebook_size": 64},
                "generator": {
                    "hidden_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 128,
                    "dropout": 0.1,
                    "attn_drop": 0.1,
                    "image_seq_len": 16,
                    "condition_num_classes": 10,
                },
            }
        }
    )
    for name, branch, cls in (
        ("maskgit_bert", "generator", "ImageBert"),
        ("maskgit_uvit", "uvit", "UViTBert"),
    ):
        golden = torch.load(HERE / f"{name}.pt", weights_only=True)
        part = golden[branch]
        network = getattr(published, cls)(config).eval()
        print(network.load_state_dict(expand(part["state_dict"]), strict=False))
        part["sampled"] = []
        for seed, options in enumerate(SAMPLES):
            torch.manual_seed(seed)
            ids = network.generate(part["cond"].clone(), **options)
            part["sampled"].append({"seed": seed, "options": options, "ids": ids})
        torch.save(golden, HERE / f"{name}.pt")


if __name__ == "__main__":
    main()
