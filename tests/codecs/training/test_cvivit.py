"""C-ViViT's training: the analytic start, what learns, what is measured."""

import json

import pytest
import torch

from anytok.codecs.registry import load_codec
from anytok.codecs.training.cvivit import (
    CViViTLoss,
    CViViTTask,
    initialise,
    psnr,
    quantiser_loss,
    refit_pixels,
    repeat_still,
    spherical_kmeans,
)
from anytok.codecs.training.engine import RunConfig, StopRun, run
from anytok.codecs.video.cvivit import CViViT, CViViTConfig
from anytok.modalities import Video

MODEL = {
    "size": [16, 16],
    "patch": [8, 8],
    "temporal_patch": 2,
    "dim": 24,
    "heads": 2,
    "head_dim": 8,
    "encoder_depth": [1, 1],
    "decoder_depth": [1, 1],
    "quantizer": "vq",
    "codebook_size": 32,
    "codebook_dim": 8,
    "embed_norm": False,
    "temporal_window": 3,
    "fit": "resize",
}


def smooth_clips(n, frames=5, side=16, seed=0):
    """Random gradients that drift: uint8 [N, F, 3, H, W]."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n * 2, 3, 2, 2, generator=rng)
    ends = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    a, b = ends.reshape(2, n, 1, 3, side, side)
    t = torch.linspace(0, 1, frames).reshape(1, -1, 1, 1, 1)
    return ((a * (1 - t) + b * t) * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "toy").mkdir()
    rows = []
    for i, clip in enumerate(smooth_clips(14)):
        Video(frames=clip, fps=8.0).save(root / "toy" / f"{i}.mp4", crf=1)
        split = "held" if i % 7 == 0 else "train"
        rows.append({"video": f"{i}.mp4", "split": split, "source": "test", "licence": "CC0-1.0"})
    (root / "toy" / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root


def config(folder, **loss):
    return {
        "task": "cvivit",
        "model": MODEL,
        "loss": loss,
        "data": {"root": str(folder), "sets": ["toy"], "frames": 5},
    }


def started():
    torch.manual_seed(0)
    codec = CViViT(CViViTConfig(**MODEL))
    initialise(codec, smooth_clips(60), torch.Generator().manual_seed(0))
    return codec


def test_analytic_start_reconstructs():
    codec, x = started(), smooth_clips(20, seed=1).float() / 255
    y = codec.detokenize(codec.tokenize(x))
    flat = x.mean((1, 3, 4), keepdim=True).expand(x.shape)
    assert psnr(x, y).mean() > psnr(x, flat).mean() + 3


def test_analytic_start_streams_pictures_like_films():
    """A first frame and a tube that does not move are the same point before the quantiser."""
    codec = started()
    x = smooth_clips(3, frames=1).float() / 255
    still = codec.to_patch_emb_first_frame(x)
    moving = codec.to_patch_emb(x.expand(-1, 2, -1, -1, -1))
    torch.testing.assert_close(still, moving, atol=1e-5, rtol=1e-5)


def test_refit_finds_the_best_linear_layer():
    codec, clips = started(), smooth_clips(30, seed=2)
    x = clips.float() / 255
    for layer in (codec.to_pixels[0], codec.to_pixels_first_frame[0]):
        layer.weight.data += 0.02 * torch.randn_like(layer.weight)
    worse = (codec.detokenize(codec.tokenize(x)) - x).square().mean()
    refit_pixels(codec, clips)
    best = (codec.detokenize(codec.tokenize(x)) - x).square().mean()
    assert best < worse
    codec.to_pixels[0].weight.data *= 1.01
    assert (codec.detokenize(codec.tokenize(x)) - x).square().mean() > best


def test_repeat_still_matches_the_cutting():
    codec = CViViT(CViViTConfig(**MODEL))
    x = torch.rand(1, 1, 3, 16, 16)
    still = codec.to_patch_emb_first_frame[0](x)
    tubes = codec.to_patch_emb[0](x.expand(-1, 2, -1, -1, -1))
    assert torch.equal(repeat_still(still.flatten(0, 3), codec.config), tubes.flatten(0, 3))


def test_analytic_start_needs_the_plain_layout():
    codec = CViViT(CViViTConfig(**{**MODEL, "embed_norm": True}))
    with pytest.raises(ValueError, match="embed_norm=False"):
        initialise(codec, smooth_clips(2), torch.Generator())


def test_kmeans_finds_separate_directions():
    rng = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(6, 5, generator=rng), dim=-1)
    noise = 0.01 * torch.randn(600, 5, generator=rng)
    unit = torch.nn.functional.normalize(true.repeat(100, 1) + noise, dim=-1)
    centres = spherical_kmeans(unit, 12, rng)
    assert (true @ centres.T).max(-1).values.min() > 0.999


def test_kmeans_with_fewer_vectors_than_codes():
    unit = torch.eye(4)
    centres = spherical_kmeans(unit, 9, torch.Generator().manual_seed(0))
    assert centres.shape == (9, 4)
    assert (unit @ centres.T).max(-1).values.min() > 0.999


@pytest.mark.parametrize("encoder_from", [None, 0])
def test_encoder_learns_only_where_it_should(folder, encoder_from):
    task = CViViTTask(config(folder, encoder_from=encoder_from))
    codec = task.networks()["codec"]
    batch = task.augment(task.clips[0][None], torch.Generator().manual_seed(0))
    losses = task.losses("codec", {"codec": codec}, batch, 0, torch.Generator())
    losses["loss"].backward()
    learns = codec.to_patch_emb[2].weight.grad is not None
    assert learns == (encoder_from == 0)
    assert codec.to_pixels[0].weight.grad.any()


def test_half_precision_trains_on_the_codes_that_inference_uses(folder):
    task, codec = CViViTTask(config(folder, encoder_from=None)), started()
    batch = smooth_clips(12, seed=3).float() / 255
    seen = []
    codec.vq.register_forward_hook(lambda module, given, result: seen.append(result[1]))
    with torch.autocast("cpu", torch.bfloat16):
        task.losses("codec", {"codec": codec}, batch, 0, torch.Generator())
    with torch.no_grad():
        exact = codec.vq(codec.encode_latents(batch))[1]
    assert torch.equal(seen[0], exact)


def test_lfq_is_trained_by_entropies():
    codec = CViViT(CViViTConfig(**{**MODEL, "quantizer": "lfq"}))
    _, codes, inner = codec(torch.rand(1, 3, 3, 16, 16))
    loss = quantiser_loss(codec, inner, codes, CViViTLoss())
    loss.backward()
    assert codec.vq.project_in.weight.grad.any()


def test_run_evaluates_and_exports(folder, tmp_path):
    task = CViViTTask({**config(folder, encoder_from=None, refit=4), "name": "cvivit/toy"})
    settings = RunConfig(out=str(tmp_path / "run"), steps=2, batch_size=2, tensorboard=False)
    codec = load_codec(run(task, settings))
    assert codec.spec.name == "cvivit/toy"
    assert codec.config == CViViTConfig(**MODEL)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "psnr_toy" in log


def test_collapse_ends_the_run(folder):
    task = CViViTTask(config(folder))
    codec = task.networks()["codec"].eval()
    codec.vq.project_in.weight.data.zero_()
    with pytest.raises(StopRun, match="collapsed"):
        task.evaluate({"codec": codec}, 1)
