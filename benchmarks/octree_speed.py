"""OctGPT's transformer: parallel levels beside token by token, and windows beside full attention; random weights.

    python benchmarks/octree_speed.py [--size mini|published] [--nodes 64] [--lengths 1024,4096,16384]

- Decoding: both runs use the same network on the same octree. Token by token asks for one forward pass a token; of
  these, `--timed` evenly spread ones are timed and scaled up, as the whole takes hours at published lengths.
- Attention: one layer's attention, forward, for growing sequences; the full one has no mask (its fastest form).
Times are CPU seconds of this process. The paper states 69x for decoding at 40k tokens and 13x for training a network
with windows at 160k tokens, on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import typer
from einops import rearrange

from anytok.codecs.shape.octree import Octree, full_octree
from anytok.generators.octree import OctreeOptions
from anytok.generators.octree_network import OctreeNetwork, OctreeNetworkConfig
from anytok.generators.octree_windows import Line, Tokens

MINI = OctreeNetworkConfig(
    width=192,
    heads=4,
    blocks=8,
    window=512,
    full_depth=2,
    code_depth=4,
    code_bits=12,
    levels=3,
    grid=32,
    prefix=8,
    unconditional=True,
)
SIZES = {
    "mini": (MINI, OctreeOptions(iterations=(16, 16, 24), temperatures=(1.0, 1.2, 0.5))),
    "published": (OctreeNetworkConfig(unconditional=True), OctreeOptions()),
}


def main(
    size: str = "mini", nodes: int = 16, timed: int = 6, lengths: str = "1024,2048,4096,8192"
) -> None:
    """Print two tables.

    Args:
        nodes: how many nodes of the first level are split; half of those below are.
    """
    config, options = SIZES[size]
    torch.manual_seed(0)
    network = OctreeNetwork(config).eval()
    with torch.inference_mode():
        decoding(network, options, nodes, timed)
        attention(network, [int(n) for n in lengths.split(",")])


def decoding(network: OctreeNetwork, options: OctreeOptions, nodes: int, timed: int) -> None:
    """Forward passes and seconds of both ways."""
    config = network.config
    tree = shape_like(config, nodes)
    parallel, serial, passes, tokens = 0.0, 0.0, 0, 0
    for depth, steps in zip(range(config.full_depth, config.code_depth + 1), options.iterations):
        count = tree.count(depth)
        one = per_pass(network, tree, depth, min(timed, steps))
        parallel += one * min(steps, count)
        serial += one * count
        passes += min(steps, count)
        tokens += count
    print(f"{tokens} tokens, {torch.get_num_threads()} thread(s).\n")
    print("| decoding | forward passes | CPU s (scaled from timed passes) |\n|---|---|---|")
    print(f"| token by token | {tokens} | {serial:.1f} |")
    print(f"| parallel levels | {passes} | {parallel:.1f} |")
    print(f"| factor | {tokens / passes:.1f} | {serial / parallel:.1f} |\n")


def shape_like(config: OctreeNetworkConfig, nodes: int) -> Octree:
    """An octree that grows as surfaces do: half of the nodes of a level are split."""
    tree = full_octree(config.full_depth)
    for depth in range(config.full_depth, config.code_depth):
        bits = torch.zeros(tree.count(depth), dtype=torch.long)
        bits[::2] = 1
        if depth == config.full_depth:
            bits[:] = 0
            bits[:: max(1, len(bits) // nodes)] = 1
        tree = tree.split(depth, bits).grow()
    return tree


def per_pass(network: OctreeNetwork, tree: Octree, depth: int, timed: int) -> float:
    """Mean seconds of a forward pass at one level, over shares of masked tokens from all to none."""
    tokens = Tokens.of(tree, depth, grid=network.config.grid)
    condition = network.condition([0])
    x, own = torch.randn(len(tokens), network.config.width), tree.count(depth)
    start = time.process_time()
    for i in range(timed):
        masked = torch.zeros(len(tokens), dtype=torch.bool)
        masked[len(tokens) - own :] = torch.rand(own) < 1 - (i + 0.5) / timed
        network(x, tokens, masked, condition)
    return (time.process_time() - start) / timed


def attention(network: OctreeNetwork, lengths: list[int]) -> None:
    """Seconds of one layer's attention in windows and in full."""
    config, layer = network.config, network.decoder.layers.blocks[0].attention
    print(
        f"| tokens | windows of {config.window}, CPU s | full, CPU s | factor |\n|---|---|---|---|"
    )
    for n in lengths:
        x, zero = torch.randn(n, config.width), torch.zeros(n, dtype=torch.long)
        place = torch.randint(config.grid, (n, 3))
        line = Line(Tokens(zero, zero, place), config.window, config.dilation, False)
        line.windows  # noqa: B018 (once a forward pass, for all layers)
        windowed = seconds(lambda x=x, line=line: layer(x, line, 0))
        whole = seconds(lambda x=x: full(layer, x))
        print(f"| {n} | {windowed:.3f} | {whole:.3f} | {whole / windowed:.1f} |")


def full(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer over the whole sequence; without its rotations, which cost both the same."""
    q, k, v = rearrange(layer.qkv(x), "n (three h d) -> three 1 h n d", three=3, h=layer.heads)
    y = F.scaled_dot_product_attention(q, k, v)
    return layer.proj(rearrange(y, "1 h n d -> n (h d)"))


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a call, after one to warm up."""
    work()
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    typer.run(main)
