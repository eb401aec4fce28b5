"""One picture of xAR, random weights: what guidance costs where it is 1, what bf16 gives, beside the official sampler.

    python benchmarks/xar_speed.py                             # xAR-B, 40 steps: minutes on two cores
    python benchmarks/xar_speed.py --steps 4 --layers 2        # a quick look (the official sampler needs 3 steps)
    python benchmarks/xar_speed.py --reference ../xAR          # a clone of OliverRensu/xAR, same weights, same noise

Times are CPU seconds of this process over all threads, the best of `--rounds`, ways alternating; "off" is the mean
distance of the latents from those of the first row that has the same guidance, over their mean size.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from anytok.backbone.xar import SIZES, XAR, XARConfig
from anytok.generators.next_x import LatentRequest, NextX, NextXOptions

LABEL, SEED = 207, 0


class Doubled(NextX):
    """With the unguided half in every call, as the official sampler has it."""

    def run(self, requests, options=None, rng=None):
        options = options or NextXOptions()
        constant = NextXOptions(steps=options.steps, cfg=options.cfg, schedule="constant")
        return super().run(requests, constant, rng)


@contextlib.contextmanager
def unfilled():
    """Networks made here get no start values: theirs come afterwards, and drawing them takes longer than a picture."""
    kept = {n: f for n, f in vars(nn.init).items() if n.endswith("_") and callable(f)}
    for name in kept:
        setattr(nn.init, name, lambda tensor, *others, **named: tensor)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(nn.init, name, function)


def random_network(config: XARConfig) -> XAR:
    torch.manual_seed(SEED)
    with unfilled():
        network = XAR(config).eval()
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        elif name.endswith("bias"):
            parameter.zero_()
    return network


def drawn(generator: NextX, options: NextXOptions) -> Tensor:
    rng = [torch.Generator().manual_seed(SEED)]
    return generator.sample([LatentRequest(labels=(LABEL,))], options, rng)


def official(path: Path, network: XAR) -> Callable[[int, float], Tensor]:
    """The official sampler with our weights; it asks for a GPU and for flash-attn, which it does not use here."""
    sys.path.insert(0, str(path))
    stub = types.ModuleType("flash_attn")
    stub.flash_attn_func = None  # type: ignore[attr-defined]
    sys.modules.setdefault("flash_attn", stub)
    torch.Tensor.cuda = lambda self, *others, **named: self  # type: ignore[method-assign]
    from models import xar  # type: ignore[import-not-found]

    c = network.config
    with unfilled():
        model = xar.xAR(
            encoder_embed_dim=c.width,
            encoder_depth=c.encoder_layers,
            encoder_num_heads=c.heads,
            decoder_embed_dim=c.width,
            decoder_depth=c.decoder_layers,
            decoder_num_heads=c.heads,
            mlp_ratio=4,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        ).eval()
    result = model.load_state_dict(network.state_dict(), strict=False)
    buffers = [key for key in result.missing_keys if key != "mask" and ".rope." not in key]
    if buffers or result.unexpected_keys:
        raise typer.BadParameter(
            f"{path} has other parameters: {buffers}, {result.unexpected_keys}"
        )

    def run(steps: int, cfg: float) -> Tensor:
        torch.manual_seed(SEED)
        return model.sample_tokens(steps, cfg=cfg, label=torch.tensor([LABEL]))

    return run


def measure(ways: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, tuple[float, Tensor]]:
    best: dict[str, tuple[float, Tensor]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            latents = way()
            taken = time.process_time() - start
            if name not in best or taken < best[name][0]:
                best[name] = (taken, latents)
    return best


@torch.inference_mode()
def main(
    size: Annotated[str, typer.Option(help=" or ".join(SIZES))] = "b",
    steps: Annotated[int, typer.Option(min=3, help="calls of the network a cell")] = 40,
    layers: Annotated[int, typer.Option(help="blocks of each half; 0 for all")] = 0,
    cfg: Annotated[float, typer.Option(min=1)] = 2.7,
    rounds: Annotated[int, typer.Option(min=1)] = 1,
    half: Annotated[bool, typer.Option(help="also bf16")] = True,
    reference: Annotated[Path | None, typer.Option(help="a clone of OliverRensu/xAR")] = None,
) -> None:
    config = SIZES[size]
    if layers:
        config = dataclasses.replace(config, encoder_layers=layers, decoder_layers=layers)
    network = random_network(config)
    guided, plain = NextXOptions(steps=steps, cfg=cfg), NextXOptions(steps=steps, cfg=1.0)
    ours = NextX(network)
    ways: dict[str, Callable[[], Tensor]] = {}
    if reference is not None:
        theirs = official(reference, network)
        ways["official, guided"] = lambda: theirs(steps, cfg)
        ways["official, cfg 1"] = lambda: theirs(steps, 1.0)
    ways["both halves in every cell"] = lambda: drawn(Doubled(network), guided)
    ways["guided"] = lambda: drawn(ours, guided)
    ways["cfg 1"] = lambda: drawn(ours, plain)
    if half:
        rounded = NextX(copy.deepcopy(network).bfloat16())
        ways["guided, bf16"] = lambda: drawn(rounded, guided)
        ways["cfg 1, bf16"] = lambda: drawn(rounded, plain)
    drawn(ours, NextXOptions(steps=1, cfg=cfg))  # memory and kernels are set up by the first call
    taken = measure(ways, rounds)
    print(
        f"xAR-{size.upper()}, {config.layers} blocks, one picture, {steps} steps, {torch.get_num_threads()} threads\n"
    )
    if reference is None:
        print("official sampler: not run (give --reference PATH, a clone of OliverRensu/xAR)\n")
    base = taken.get("official, guided") or taken["both halves in every cell"]
    print("| | CPU s | times | off |\n|---|---|---|---|")
    for name, (seconds, latents) in taken.items():
        same = taken.get("official, guided") if "guided" in name else taken.get("official, cfg 1")
        same = same or (taken["guided"] if "guided" in name else taken["cfg 1"])
        off = ((latents - same[1]).abs().mean() / same[1].abs().mean()).item()
        shown = "other schedule" if name.startswith("both") else f"{off:.1e}"
        print(f"| {name} | {seconds:.2f} | {base[0] / seconds:.2f} | {shown} |")


if __name__ == "__main__":
    typer.run(main)
