"""KL-16 against the published implementation's numbers; sizes; bad input."""

import pytest
import torch

from anytok.codecs import CodecUnavailable, WeightsError, load_codec, save_codec
from anytok.codecs.image.kl16 import KL16, KL16Config
from tests.golden.load import load_golden


@pytest.fixture(scope="module")
def golden():
    return load_golden("backbone_kl16")


@pytest.fixture(scope="module")
def vae(golden):
    return KL16.from_published(golden["state_dict"])


@torch.no_grad()
def test_moments_and_pictures(vae, golden):
    assert vae.config == KL16Config(channels=32)
    mean, logvar = vae.moments(golden["img"])
    torch.testing.assert_close(mean, golden["mean"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logvar, golden["logvar"], atol=1e-5, rtol=0)
    # the fixture's z is scaled, and the published caller takes the scale off before decoding
    z = golden["z"]
    torch.testing.assert_close(
        golden["scale"] * (mean + golden["std"] * golden["eps"]), z, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(vae.decode_latents(z), golden["dec"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_mean_or_a_sample_from_each_rows_own_generator(vae, golden):
    x = golden["img"][:1].expand(2, -1, -1, -1)
    mean, logvar = vae.moments(x[:1])
    latents = vae.encode_latents(x)
    torch.testing.assert_close(latents[:1], 0.2325 * mean, atol=1e-6, rtol=0)
    seeds = [torch.Generator().manual_seed(s) for s in (3, 4)]
    sample = vae.encode_latents(x, rng=seeds)
    noise = torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(4))
    expected = 0.2325 * (mean[0] + (0.5 * logvar[0]).exp() * noise)
    torch.testing.assert_close(sample[1], expected, atol=1e-5, rtol=0)
    assert not torch.allclose(sample[0], sample[1])


def test_published_size_on_the_meta_device(golden):
    with torch.device("meta"):
        whole = KL16()
    shapes = {key: tuple(value.shape) for key, value in whole.state_dict().items()}
    assert shapes == {key: tuple(shape) for key, shape in golden["full"]["shapes"].items()}
    assert sum(p.numel() for p in whole.parameters()) == golden["full"]["n_params"] == 66_456_019


def test_training_files_may_carry_their_loss(golden):
    state = golden["state_dict"]
    extra = {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(1)}
    KL16.from_published({**state, **extra})
    with pytest.raises(WeightsError, match=r"unexpected \(1\): decoder.up.4.attn.0.q.weight"):
        KL16.from_published({**state, "decoder.up.4.attn.0.q.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"latent-diffusion keys: encoder.conv_in.weight"):
        KL16.from_published({"a": torch.zeros(1)})


def test_bad_input(vae):
    with pytest.raises(ValueError, match=r"\(1, 3, 40, 64\), expected .* multiples of 16"):
        vae.encode_latents(torch.zeros(1, 3, 40, 64))
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\), expected \[B, 16, h, w\]"):
        vae.decode_latents(torch.zeros(1, 4, 2, 2))
    with pytest.raises(CodecUnavailable, match="use encode_latents"):
        vae.encode([])
    with pytest.raises(CodecUnavailable, match="use decode_latents"):
        vae.decode([])
    with pytest.raises(ValueError, match="scale is 0"):
        KL16Config(scale=0.0)


def test_by_name_from_a_training_checkpoint_and_from_our_own_file(golden, tmp_path):
    torch.save({"model": golden["state_dict"]}, tmp_path / "kl16.ckpt")
    vae = load_codec("kl16/mar", tmp_path)
    assert vae.spec.weights_licence == "MIT"
    save_codec(vae, tmp_path / "own.safetensors")
    again = load_codec(tmp_path / "own.safetensors")
    assert again.config == vae.config
    x = golden["img"]
    with torch.no_grad():
        assert torch.equal(again.encode_latents(x), vae.encode_latents(x))
    with pytest.raises(CodecUnavailable, match=r"kl16\.ckpt.*dropbox\.com"):
        load_codec("kl16/mar")
