"""FlexTok: what batching, merged tokens and shared modulations save, with random weights, beside the official code.

    python benchmarks/flextok_speed.py                                  # a small FlexTok at the published lengths
    python benchmarks/flextok_speed.py --size d12-d12 --batch 1         # a published size (minutes)
    python benchmarks/flextok_speed.py --reference ../ml-flextok        # the official clone, same weights

Times are CPU seconds of this process, the best of `--repeats` after one call to warm up; "off" is how far an output is
from the first row's. The official code needs diffusers, hydra-core, mup, requests and torchvision.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from anytok.codecs.image.flextok import Condition, FlexTok, FlexTokConfig, FlexTokOptions
from anytok.codecs.image.flextok_layers import decoder_patterns
from anytok.codecs.image.flextok_published import read_config
from tests.golden.load import load_golden

# (encoder width, depth), (decoder width, depth), latent channels, VAE widths
SIZES = {
    "small": ((192, 3), (320, 4), 4, (32, 32, 64, 64)),
    "d12-d12": ((768, 12), (768, 12), 16, (128, 256, 512, 512)),
    "d18-d18": ((1152, 18), (1152, 18), 16, (128, 256, 512, 512)),
    "d18-d28": ((1152, 18), (1792, 28), 16, (128, 256, 512, 512)),
}
TOKENS, GRID, CODES = 256, 16, 64_000


def published_config(size: str) -> dict:
    """The config of the reference fixture, in the published form, with other sizes."""
    (enc, enc_depth), (dec, dec_depth), channels, _ = SIZES[size]
    config = load_golden("image_flextok")["config"]
    config["vae"]["latent_channels"] = config["pipeline"]["out_channels"] = channels
    for side, width, depth in (("encoder", enc, enc_depth), ("decoder", dec, dec_depth)):
        for step in config[side]["module_dict"].values():
            sizes = {"dim": width, "depth": depth, "channels_in": channels, "n_min": TOKENS}
            sizes |= {"channels_out": channels, "n_max": TOKENS}
            step.update({key: value for key, value in sizes.items() if key in step})
            if "max_sizes" in step:
                step["max_sizes"] = [GRID, GRID] if len(step["max_sizes"]) == 2 else [TOKENS]
    return config


def random_codec(size: str) -> FlexTok:
    """Weights from a seed, heads and modulations too: at zero they would hide differences."""
    torch.manual_seed(0)
    said = read_config(published_config(size), "benchmark")
    _, _, channels, widths = SIZES[size]
    vae = {**said.pop("vae"), "latent_channels": channels, "channels": widths}
    codec = FlexTok(FlexTokConfig(vae=vae, **said)).eval()
    for weight in codec.parameters():
        if weight.requires_grad and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return codec


def seconds(work: Callable[[], object], repeats: int) -> float:
    work()  # memory and kernels are set up by the first call
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def dense(condition: Condition, codec: FlexTok) -> Condition:
    """The same condition with every absent token written out, as the published code computes it."""
    registers, start = [], 0
    for k in condition.kept:
        size = k + (k < TOKENS)
        index = start + torch.arange(TOKENS).clamp(max=size - 1)
        registers.append(condition.registers[index])
        start += size
    kept = (TOKENS,) * len(condition.kept)
    patterns = decoder_patterns(kept, GRID**2, TOKENS, codec.device)
    return Condition(torch.cat(registers), kept, *patterns)


def guided_step(codec: FlexTok, batch: int, k: int, repeats: int) -> None:
    """One guided step of the sampler, four ways."""
    decoder, config = codec.decoder, codec.config
    vectors = list(codec.quantize.vectors(torch.randint(CODES, (batch, k))))
    x = torch.randn(batch, config.autoencoder.latent_channels, *[config.latent_side] * 2)
    twice, free, time_now = x.repeat(2, 1, 1, 1), [None] * batch, torch.tensor([0.5])
    alone, none = decoder.condition(vectors), decoder.condition(free)
    both = decoder.condition([*vectors, *free])
    modulation = decoder.modulation(time_now).at(0)
    full, full_none = dense(alone, codec), dense(none, codec)

    def published() -> Tensor:
        own = decoder.modulation(time_now).at(0)
        again = decoder.modulation(time_now).at(0)
        return torch.cat([decoder.velocity(x, full, own), decoder.velocity(x, full_none, again)])

    def separate() -> Tensor:
        return torch.cat(
            [decoder.velocity(x, alone, modulation), decoder.velocity(x, none, modulation)]
        )

    ways = {
        "512 tokens, two passes, modulation each": published,
        "512 tokens, one forward": lambda: decoder.velocity(twice, dense(both, codec), modulation),
        "merged tokens, two passes": separate,
        "merged tokens, one forward (ours)": lambda: decoder.velocity(twice, both, modulation),
    }
    wanted, base = published(), None
    print(
        f"\nOne guided step, {batch} pictures, k = {k}\n\n| | s | times | off |\n|---|---|---|---|"
    )
    for name, way in ways.items():
        taken = seconds(way, repeats)
        base = base or taken
        off = (way() - wanted).abs().max().item()
        print(f"| {name} | {taken:.3f} | {base / taken:.2f} | {off:.1e} |")


def batches(codec: FlexTok, batch: int, steps: int, repeats: int) -> None:
    """A batch against as many single calls."""
    side, options = codec.config.image_size, FlexTokOptions(steps=steps)
    pixels, codes = torch.rand(batch, 3, side, side), torch.randint(CODES, (batch, TOKENS))
    ways = {
        "encode": lambda rows: codec.tokenize(pixels[rows]),
        f"decode, {steps} guided steps": lambda rows: codec.detokenize(
            codes[rows], options=options
        ),
    }
    print(f"\n{batch} pictures of {side} x {side}\n\n| | one batch, s | single calls, s | times |")
    print("|---|---|---|---|")
    for name, way in ways.items():
        whole = seconds(lambda way=way: way(slice(None)), repeats)
        singles = seconds(lambda way=way: [way(slice(i, i + 1)) for i in range(batch)], repeats)
        print(f"| {name} | {whole:.2f} | {singles:.2f} | {singles / whole:.2f} |")


def beside_the_official_code(
    codec: FlexTok, size: str, reference: str | None, steps: int, batch: int, repeats: int
) -> None:
    print(f"\nOfficial code, {batch} pictures, {steps} guided steps\n")
    if reference is None:
        print("not run (give --reference PATH, a clone of apple/ml-flextok)")
        return
    official = official_model(codec, size, reference)
    side = codec.config.image_size
    pixels, codes = torch.rand(batch, 3, side, side), torch.randint(CODES, (batch, TOKENS))
    latents, options = codec.config.latent_side, FlexTokOptions(steps=steps)

    def theirs(rng: torch.Generator) -> Tensor:
        return official.detokenize(
            list(codes.split(1)),
            vae_image_sizes=latents,
            timesteps=steps,
            guidance_scale=7.5,
            perform_norm_guidance=True,
            generator=rng,
            verbose=False,
        )

    def ours(rng: torch.Generator) -> Tensor:
        return 2 * codec.detokenize(codes, options=options, rng=[rng] * batch) - 1

    same = torch.equal(codec.tokenize(pixels), torch.cat(official.tokenize(2 * pixels - 1)))
    drawn = [way(torch.Generator().manual_seed(0)) for way in (ours, theirs)]
    off = (drawn[0] - drawn[1]).abs().max().item()
    times = {
        "encode": (
            seconds(lambda: codec.tokenize(pixels), repeats),
            seconds(lambda: official.tokenize(2 * pixels - 1), repeats),
        ),
        "decode": tuple(
            seconds(lambda way=way: way(torch.Generator().manual_seed(0)), repeats)
            for way in (ours, theirs)
        ),
    }
    print(f"tokens equal: {same}; pictures at most {off:.1e} apart\n")
    print("| | ours, s | official, s | times |\n|---|---|---|---|")
    for name, (a, b) in times.items():
        print(f"| {name} | {a:.2f} | {b:.2f} | {b / a:.2f} |")


def official_model(codec: FlexTok, size: str, reference: str) -> torch.nn.Module:
    """The official model with our weights, on its plain attention (its other one is for GPUs)."""
    sys.path.insert(0, reference)
    from flextok import vae_wrapper
    from flextok.flextok_wrapper import FlexTokFromHub

    vae_wrapper.VAE_BASE_CFG["block_out_channels"] = list(SIZES[size][3])
    model = FlexTokFromHub(published_config(size)).eval()
    for module in model.modules():
        if hasattr(module, "use_flex_attention"):
            module.use_flex_attention = False
        if hasattr(module, "return_materialized_mask"):
            module.return_materialized_mask = True
    model.load_state_dict(codec.state_dict())
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2, help="of the decodes")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--reference", help="a clone of apple/ml-flextok")
    given = parser.parse_args()
    codec = random_codec(given.size)
    print(f"FlexTok {given.size}, random weights, {torch.get_num_threads()} threads, fp32")
    for k in (16, TOKENS):
        guided_step(codec, 1, k, given.repeats)
    batches(codec, given.batch, given.steps, given.repeats)
    beside_the_official_code(
        codec, given.size, given.reference, given.steps, min(given.batch, 2), given.repeats
    )


if __name__ == "__main__":
    main()
