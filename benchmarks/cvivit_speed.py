"""Speed and memory of C-ViViT beside phenaki-pytorch with the same weights, and of streaming, as Markdown tables.

    python benchmarks/cvivit_speed.py [--reference] [--frames 11 --size 128] [--repeats 3]

`--reference` needs phenaki-pytorch (pip install phenaki-pytorch). Both run on one clip, in float32, with random weights
of the published size (dim 512, 4 + 4 layers a side, LFQ with 8,192 codes, PEG as published), in turns; the figure is
the fastest of the repeats. Streaming uses `cvivit/mini`'s layout.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch

from anytok.codecs.train import CONFIGS
from anytok.codecs.training.entry import read, settings
from anytok.codecs.video.cvivit import CViViT, CViViTConfig, from_published


def published(size: int) -> dict:
    return dict(
        dim=512,
        codebook_size=8192,
        image_size=size,
        patch_size=8,
        temporal_patch_size=2,
        spatial_depth=4,
        temporal_depth=4,
        dim_head=64,
        heads=8,
        use_vgg_and_gan=False,
    )


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@torch.no_grad()
def against_reference(frames: int, size: int, repeats: int) -> None:
    from phenaki_pytorch.cvivit import CViViT as Reference

    torch.manual_seed(0)
    theirs = Reference(**published(size)).eval()
    ours = from_published(theirs.state_dict(), {"size": (size, size)})
    x = torch.rand(1, frames, 3, size, size)
    y = x.transpose(1, 2).contiguous()
    codes, ids = ours.tokenize(x), theirs(y, return_only_codebook_ids=True)
    print(f"codes equal: {(codes == ids).float().mean():.4%}\n")
    flat = ids.flatten(1)
    verbs = {
        "encode": (lambda: ours.tokenize(x), lambda: theirs(y, return_only_codebook_ids=True)),
        "decode": (lambda: ours.detokenize(ids), lambda: theirs.decode_from_codebook_indices(flat)),
    }
    print("| verb | ours, s | phenaki-pytorch, s | times as fast |\n|---|---|---|---|")
    for name, (mine, other) in verbs.items():
        pairs = [(seconds(mine), seconds(other)) for _ in range(repeats)]
        best, rival = (min(times) for times in zip(*pairs))
        print(f"| {name} | {best:.2f} | {rival:.2f} | {rival / best:.2f} |", flush=True)


@torch.no_grad()
def streaming(latents: int) -> None:
    config = settings(CViViTConfig, read(CONFIGS / "cvivit_mini.json")["model"], "model")
    torch.manual_seed(0)
    codec = CViViT(config).eval()
    state = codec.encoder_state()
    print(
        "\n| latent frames | s a latent frame | peak memory so far, MiB | cache, MiB |\n|---|---|---|---|"
    )
    begin, chunk = time.perf_counter(), max(1, latents // 10)
    for n in range(1, latents + 1):
        frames = 1 if n == 1 else config.temporal_patch
        codec.encode_chunk(torch.rand(1, frames, 3, *config.size), state)
        if n % chunk == 0:
            now = time.perf_counter()
            cache = sum(t.numel() * 4 for s in state.layers for t in (s.keys, s.values, s.tail))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"| {n} | {(now - begin) / chunk:.4f} | {peak:.0f} | {cache / 2**20:.2f} |")
            begin = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reference", action="store_true", help="compare with phenaki-pytorch")
    parser.add_argument("--frames", type=int, default=11)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latents", type=int, default=500, help="of the streaming run")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {args.frames} frames of {args.size}x{args.size}")
    if args.reference:
        against_reference(args.frames, args.size, args.repeats)
    streaming(args.latents)


if __name__ == "__main__":
    main()
