"""Training a DAC: the transform it starts from, its codebooks' start values and restarts, losses, a short run."""

import json

import pytest
import torch

from anytok.codecs import load_codec
from anytok.codecs.audio.dac import DAC, DACConfig
from anytok.codecs.quantizers.rvq import ProjectedVQ
from anytok.codecs.training.adversarial import (
    PERIODS,
    WINDOWS,
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)
from anytok.codecs.training.dac import DACTask, Trainee, fit_stage, spherical_kmeans, vary
from anytok.codecs.training.engine import RunConfig, run
from anytok.codecs.training.lapped_start import mdct, start_as_transform
from anytok.codecs.training.spectral import ComplexSTFT, MultiScaleMel, si_sdr
from anytok.modalities import Audio
from anytok.modalities.measure import mel_distance

MODEL = {
    "sample_rate": 8000,
    "encoder_dim": 8,
    "encoder_rates": [5, 4, 4],
    "decoder_dim": 64,
    "decoder_rates": [4, 4, 5],
    "latent_dim": 40,
    "codebooks": 3,
    "codebook_size": 32,
    "codebook_dim": 8,
}


def voice(length, rate=8000, seed=0):
    """Something like a vowel: harmonics that glide, a little noise. [1, length]."""
    rng = torch.Generator().manual_seed(seed)
    t = torch.arange(length) / rate
    phase = 2 * torch.pi * (110 * t + 15 * t.square())
    harmonics = sum(torch.sin(k * phase) / k for k in range(1, 9))
    return (0.1 * harmonics + 0.002 * torch.randn(length, generator=rng))[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("speech")
    rows = []
    for i in range(6):
        Audio(voice(12_000, seed=i), 8000).save(root / f"{i}.wav")
        rows.append({"audio": f"{i}.wav", "split": "held" if i == 5 else "train"})
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def test_mdct_frames_overlap_to_the_signal():
    basis = mdct(16, 16)
    frame = basis @ basis.T
    torch.testing.assert_close(frame, torch.eye(16), atol=1e-5, rtol=0)
    x = torch.randn(96, generator=torch.Generator().manual_seed(0))
    back = torch.zeros(96)
    for start in range(0, 80, 16):
        back[start : start + 32] += (x[start : start + 32] @ basis.T) @ basis
    torch.testing.assert_close(back[16:80], x[16:80], atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_untrained_codec_is_a_transform_codec():
    torch.manual_seed(0)
    codec, x = DAC(DACConfig(**MODEL)), voice(8000)[None]
    random, _ = codec.decoder(codec.encoder(x)[0])
    start_as_transform(codec)
    started, _ = codec.decoder(codec.encoder(x)[0])
    n = started.shape[-1]
    assert si_sdr(started, x[..., :n]) > 12
    assert si_sdr(random, x[..., :n]) < 0


def test_a_transform_must_fit():
    with pytest.raises(ValueError, match="4 channels for 5 samples"):
        start_as_transform(DAC(DACConfig(**{**MODEL, "encoder_dim": 2})))
    with pytest.raises(ValueError, match="decoder_rates are"):
        start_as_transform(DAC(DACConfig(**{**MODEL, "decoder_rates": [5, 4, 4]})))


@torch.no_grad()
def test_a_fitted_stage_takes_most_of_its_input_away():
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 3, generator=rng)
    z = (mixing @ torch.randn(3, 4000, generator=rng))[None] + 2
    stage = ProjectedVQ(24, 64, 8)
    fit_stage(stage, z, rng)
    z_q, codes, _, _ = stage(z)
    spread = (z - z.mean(-1, keepdim=True)).square().mean()
    assert (z - z_q).square().mean() < 0.3 * spread
    assert len(codes.unique()) > 50


def test_kmeans_groups_by_direction():
    rng = torch.Generator().manual_seed(0)
    points = torch.cat([torch.tensor([[1.0, 0.0]]) * s for s in (1, 2, 3)])
    points = torch.cat([points, points.flip(1)])
    rows = spherical_kmeans(points, 2, torch.Generator().manual_seed(3), 10)
    assert sorted(rows.tolist()) in ([[0, 2], [2, 0]], [[0.0, 2.0], [2.0, 0.0]])
    assert len(spherical_kmeans(points, 4, rng, 3)) == 4


def test_dead_rows_are_replaced_by_recent_inputs():
    torch.manual_seed(0)
    trainee = Trainee(DACConfig(**MODEL), start="random", remembered=64)
    trainee.train()
    trainee.reconstruct(voice(1600)[None], torch.tensor([3]))
    assert trainee.usage.sum() > 0
    trainee.usage[1, :30] = 0
    before = trainee.codec.quantizer.quantizers[1].codebook.weight.detach().clone()
    assert trainee.restart_dead(torch.Generator().manual_seed(0)) >= 30
    after = trainee.codec.quantizer.quantizers[1].codebook.weight
    changed = (after != before).any(1)
    assert changed[:30].all()
    recent = trainee.recent[1]
    assert all((recent == row).all(1).any() for row in after[:30])
    assert trainee.perplexity().shape == (3,)


def test_varied_crops_keep_shape_and_chance():
    x = voice(2400)[None].expand(4, -1, -1)
    a = vary(x, 2000, torch.Generator().manual_seed(1))
    b = vary(x, 2000, torch.Generator().manual_seed(1))
    assert a.shape == (4, 1, 2000)
    assert torch.equal(a, b)
    assert not torch.allclose(a[0], a[1])
    assert (a.abs() <= x.abs().max() + 1e-6).all()


def test_losses_are_zero_for_the_same_and_one_for_silence():
    x = voice(8000)[None]
    mel, stft = MultiScaleMel(8000), ComplexSTFT()
    assert mel(x, x) == 0
    assert stft(x, x) == 0
    assert stft(torch.zeros_like(x), x) == pytest.approx(1, abs=0.2)
    noisy = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ours, judge = float(mel(noisy, x)), mel_distance(noisy, x, 8000)
    assert ours == pytest.approx(judge, rel=0.1)


def test_discriminators():
    torch.manual_seed(0)
    judge, x = Discriminators(width=2), voice(4096)[None]
    real, fake = judge(x), judge(0.5 * x.flip(-1))
    assert len(real) == len(PERIODS) + len(WINDOWS)
    assert [len(f) for f in real] == [6] * 5 + [26] * 3
    same = judge(0.5 * x + 0.1)
    for a, b in zip(real, same):  # neither loudness nor offset tells anything
        torch.testing.assert_close(a[-1], b[-1], atol=1e-4, rtol=1e-4)
    discriminator_loss(real, fake).backward()
    assert [k for k, p in judge.named_parameters() if p.grad is None] == []
    assert adversarial_loss(real) > 0
    assert feature_loss(real, real) == 0
    assert feature_loss(real, fake) > 0


def test_a_short_run_with_discriminators_gives_a_codec(folder, tmp_path):
    config = {
        "model": MODEL,
        "data": {"root": str(folder), "sets": ["."]},
        "loss": {
            "seconds": 0.2,
            "plain_steps": 1,
            "restart_every": 2,
            "discriminators_from": 3,
            "discriminator_width": 2,
        },
    }
    settings = RunConfig(
        out=str(tmp_path / "run"), steps=5, batch_size=2, log_every=1, tensorboard=False
    )
    path = run(DACTask(config), settings)
    codec = load_codec(path)
    (stream,) = codec.encode([Audio(voice(4000), 8000)])
    assert stream.codes.shape == (50, 3)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open(encoding="utf-8")]
    assert any("codec/adversarial" in row for row in log)
    assert any("discriminators/loss" in row for row in log)
    final = [row for row in log if row["kind"] == "eval"][-1]
    assert {f"mel/depth{n}" for n in (1, 2, 3)} <= final.keys()


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="'transform' or 'random'"):
        DACTask({"model": MODEL, "data": {}, "loss": {"start": "warm"}})
