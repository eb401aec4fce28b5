"""Make the C-ViViT goldens anew, by the published code, with weights that a recipe fills.

    python tests/golden/make_video_cvivit.py phenaki --code SITE_WITH_PHENAKI_PYTORCH_0.5.0
    python tests/golden/make_video_cvivit.py obvious --code CHECKOUT_OF_OBVIOUS_RESEARCH --also SITE

The whole fixtures hold weights that no seed explains, and are too large to keep; these have the same tree, and any
fixture of it passes the same tests (ANYTOK_PARITY). SITE needs vector-quantize-pytorch, einx, beartype and their needs.
Codebooks are unit vectors, which is no rule of a recipe, so they are stored.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from pathlib import Path

import torch
from load import fill
from torch import Tensor, nn

HERE = Path(__file__).parent
# What the published modules import and C-ViViT does not use.
ABSENT = (
    "frozen_models",
    "frozen_models.pytorch_i3d",
    "frozen_models.pytorch_i3d.pytorch_i3d",
    "lpips",
    "wandb",
)
COMMON = {
    "dim": 32,
    "codebook_size": 64,
    "temporal_patch_size": 2,
    "spatial_depth": 2,
    "temporal_depth": 2,
    "dim_head": 8,
    "heads": 4,
    "use_vgg_and_gan": False,
}


class Absent(types.ModuleType):
    """A module whose every name is an empty class."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def published(code: Path, also: list[Path]):
    """The published `cvivit` and `attention` modules, without the package's own imports."""
    sys.path[:0] = [str(p) for p in also] + [str(code)]
    package = types.ModuleType("phenaki_pytorch")
    package.__path__ = [str(code / "phenaki_pytorch")]
    sys.modules["phenaki_pytorch"] = package
    for name in ABSENT:
        sys.modules[name] = Absent(name)
    return (importlib.import_module(f"phenaki_pytorch.{n}") for n in ("cvivit", "attention"))


def fill_weights(model: nn.Module, seed: int) -> dict:
    """Fill a model from a recipe; returns the recipe as goldens hold it."""
    state, entries, stored = model.state_dict(), [], {}
    for name, value in state.items():
        rule = rule_of(name, value)
        entries.append([name, list(value.shape), *rule])
        if rule[0] == "stored":
            stored[name] = value.clone()
    node = {
        "__recipe__": {"seed": seed, "entries": entries},
        "stored": stored,
        "order": list(state),
    }
    full = {**fill(node["__recipe__"]), **stored}
    model.load_state_dict({name: full[name] for name in state})
    model.eval()
    return node


def rule_of(name: str, value: Tensor) -> tuple[str, float]:
    if not value.is_floating_point() or not value.numel() or name.endswith("beta"):
        return "stored", 0.0
    if "_codebook." in name:
        return "stored", 0.0
    if value.ndim == 1:
        return ("scaled", 0.1) if name.endswith("bias") else ("one_plus", 0.1)
    return "over_sqrt_fan_in", 1.0


@torch.no_grad()
def outputs(model: nn.Module, video: Tensor, image: Tensor) -> dict[str, Tensor]:
    patches = (model.to_patch_emb_first_frame(video[:, :, :1]), model.to_patch_emb(video[:, :, 1:]))
    return {
        "video": video,
        "image": image,
        "enc": model.encode(torch.cat(patches, 1)),
        "ids": model(video, return_only_codebook_ids=True),
        "recon": model(video, return_recons_only=True),
        "ids_image": model(image, return_only_codebook_ids=True),
        "recon_image": model(image, return_recons_only=True),
    }


def repair(attention) -> None:
    """PEG reads rows that are ordered (B h w) T as what they are; only temporal rows differ in number from B."""
    as_published = attention.PEG.forward

    def forward(self, x: Tensor, shape=None) -> Tensor:
        if x.ndim != 3 or x.shape[0] == shape[0]:
            return as_published(self, x, shape=shape)
        b, t, h, w = shape
        ordered = x.reshape(b, h, w, t, -1).permute(0, 3, 1, 2, 4).contiguous()
        return as_published(self, ordered).permute(0, 2, 3, 1, 4).reshape(x.shape)

    attention.PEG.forward = forward


def phenaki(cvivit, attention, rng: torch.Generator) -> dict:
    golden, as_published = {}, attention.PEG.forward
    for name, lookup_free in (("lfq", True), ("vq_cosine", False)):
        config = {**COMMON, "image_size": (16, 24), "patch_size": (8, 8)}
        config["lookup_free_quantization"] = lookup_free
        torch.manual_seed(0)
        model = cvivit.CViViT(**config)
        weights = fill_weights(model, 11)
        media = (torch.randn(2, 3, *n, 16, 24, generator=rng) for n in ((5,), ()))
        found = outputs(model, *media)
        repair(attention)
        fixed = outputs(model, found["video"], found["image"])
        attention.PEG.forward = as_published
        mended = {f"{key}_fixed_peg": fixed[key] for key in ("enc", "ids", "recon")}
        golden[name] = {"cfg": config, "state_dict": weights, **found, **mended}
    return golden


def obvious(cvivit, attention, rng: torch.Generator) -> dict:
    config = {**COMMON, "codebook_dim": 8, "image_size": 16, "patch_size": 8, "force_cpu": True}
    torch.manual_seed(0)
    model = cvivit.CViViT(**config)
    weights = fill_weights(model, 12)
    media = (torch.rand(2, 3, *n, 16, 16, generator=rng) for n in ((11,), ()))
    return {"cfg": config, "state_dict": weights, **outputs(model, *media)}


def main() -> None:
    """Make one golden."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=("phenaki", "obvious"))
    parser.add_argument(
        "--code", type=Path, required=True, help="holds the package phenaki_pytorch"
    )
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="other site folders")
    args = parser.parse_args()
    make = {"phenaki": phenaki, "obvious": obvious}[args.which]
    golden = make(*published(args.code, args.also), torch.Generator().manual_seed(7))
    target = HERE / f"video_{args.which}_cvivit.pt"
    torch.save(golden, target)
    print(f"{target.name}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
