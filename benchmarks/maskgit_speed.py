"""Masked generation: what a step costs, what a batch saves, and what is not computed at every step.

    python benchmarks/maskgit_speed.py                                  # small networks
    python benchmarks/maskgit_speed.py --size titok-l-32                # a published size, random weights
    python benchmarks/maskgit_speed.py --reference ../1d-tokenizer      # beside the official code, same weights

Times are CPU seconds of this process, the best of `--repeats` after one call to warm up. The official code needs
transformers, omegaconf and huggingface_hub.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from anytok.generators.generator import Canvas
from anytok.generators.image_maskgit import ClassMaskConfig, class_network
from anytok.generators.maskgit import MaskGIT, Unmasking
from anytok.generators.video_maskgit import VideoMaskConfig, VideoMaskGIT

SIZES = {
    "small": {"length": 32, "dim": 256, "layers": 6, "heads": 4, "inner": 1024},
    "titok-l-32": {"length": 32, "dim": 768, "layers": 24, "heads": 16, "inner": 3072},
    "onedpiece": {"length": 256, "dim": 768, "layers": 24, "heads": 16, "inner": 3072},
}
STEPS = 8


def seconds(work: Callable[[], object], repeats: int) -> float:
    work()  # memory and kernels are set up by the first call
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def rngs(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def main(
    size: str = "small",
    repeats: int = 3,
    reference: Optional[Path] = None,  # noqa: UP045 (typer on Python 3.10)
) -> None:
    """Print the table."""
    torch.manual_seed(0)
    sizes = SIZES[size]
    network = class_network(ClassMaskConfig(vocab=4096, classes=1000, **sizes)).eval()
    print(f"# {size}: BERT, {sizes['length']} codes of 4096, {STEPS} steps, guided at each")
    options = Unmasking(steps=STEPS, curve="arccos", temperature=4.5, cfg=4.0)
    classes(network, options, repeats)
    official(network, sizes, options, repeats, reference)
    video(repeats)


def classes(network, options: Unmasking, repeats: int) -> None:
    """Batches, guidance and drawing."""
    n = network.config.length

    def fill(batch: int, options: Unmasking):
        canvases = [
            Canvas(codes=torch.full((n,), -1), condition=torch.tensor(i)) for i in range(batch)
        ]
        return lambda: MaskGIT(network).fill(canvases, options, rngs(batch))

    single = seconds(fill(1, options), repeats)
    print(f"one picture                  {single:8.3f} s")
    for batch in (4, 16):
        each = seconds(fill(batch, options), repeats) / batch
        print(f"one of {batch:2d} in a batch         {each:8.3f} s   {single / each:5.2f} x")
    plain = Unmasking(steps=STEPS, curve="arccos", temperature=4.5)
    print(f"one, without guidance        {seconds(fill(1, plain), repeats):8.3f} s")
    greedy = Unmasking(steps=STEPS, curve="arccos", temperature=0, cfg=4.0)
    print(f"one, without noise           {seconds(fill(1, greedy), repeats):8.3f} s")


def official(network, sizes, options: Unmasking, repeats: int, reference: Path | None) -> None:
    """The published `generate`, which makes two passes a step."""
    if reference is None:
        print("official code                not run (--reference PATH of 1d-tokenizer)")
        return
    sys.path.insert(0, str(reference))
    package = types.ModuleType("modeling.modules")
    package.__path__ = [str(reference / "modeling" / "modules")]
    sys.modules["modeling.modules"] = package
    config = importlib.import_module("omegaconf").OmegaConf.create(
        {
            "model": {
                "vq_model": {"codebook_size": 4096},
                "generator": {
                    "hidden_size": sizes["dim"],
                    "num_hidden_layers": sizes["layers"],
                    "num_attention_heads": sizes["heads"],
                    "intermediate_size": sizes["inner"],
                    "dropout": 0.1,
                    "attn_drop": 0.1,
                    "image_seq_len": sizes["length"],
                    "condition_num_classes": 1000,
                },
            }
        }
    )
    theirs = importlib.import_module("modeling.maskgit").ImageBert(config).eval()
    theirs.load_state_dict(network.state_dict())
    for batch in (1, 4):
        labels = torch.arange(batch)
        canvases = [
            Canvas(codes=torch.full((sizes["length"],), -1), condition=label) for label in labels
        ]

        def run(labels=labels):
            return theirs.generate(labels, guidance_scale=3.0, num_sample_steps=STEPS)

        ours = seconds(lambda c=canvases: MaskGIT(network).fill(c, options, rngs(len(c))), repeats)
        published = seconds(run, repeats)
        print(
            f"official code, batch {batch}       {published / batch:8.3f} s   ours {published / ours:5.2f} x"
        )


def video(repeats: int) -> None:
    """Phenaki: what `prepare` saves."""
    torch.manual_seed(0)
    grid, text = (5, 8, 8), 32
    config = VideoMaskConfig(
        vocab=4096, length=320, dim=256, depth=6, heads=4, head_dim=64, text_dim=256
    )
    network = VideoMaskGIT(config).eval()
    captions = [torch.randn(text, 256) for _ in range(4)]
    ids = torch.full((8, 320), 4096)
    print(f"# video: {config.depth} layers, {grid}, captions of {text}, 4 guided clips")
    with torch.inference_mode():
        prepared = network.prepare([*captions, *[None] * 4], grid)
        step = seconds(lambda: network(ids, prepared), repeats)
        once = seconds(lambda: network.prepare([*captions, *[None] * 4], grid), repeats)
    print(f"a step                       {step:8.3f} s")
    print(f"text and distances, once     {once:8.3f} s   {once / step:5.1%} of a step")


if __name__ == "__main__":
    typer.run(main)
