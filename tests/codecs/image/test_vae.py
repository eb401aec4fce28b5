"""AutoencoderKL against the published implementation's numbers; sizes; bad input."""

import pytest
import torch

from anytok.codecs import WeightsError
from anytok.codecs.image.vae import AutoencoderConfig, AutoencoderKL, draw, infer_autoencoder
from tests.golden.load import load_golden

PREFIX = "vae.vae."
TINY = AutoencoderConfig(scaling_factor=1.0, latent_channels=2, channels=(4, 8), blocks=1, groups=4)


@pytest.fixture(scope="module")
def golden():
    return load_golden("image_flextok")


@pytest.fixture(scope="module")
def state(golden):
    return {
        k.removeprefix(PREFIX): v for k, v in golden["state_dict"].items() if k.startswith(PREFIX)
    }


@torch.no_grad()
def test_latents_and_pictures_as_published(golden, state):
    vae = AutoencoderKL.from_published(state, {"scaling_factor": 0.7, "_class_name": "x"})
    latents = vae.encode_latents(golden["inputs"]["images"])
    torch.testing.assert_close(latents, golden["outputs"]["latents"], atol=1e-5, rtol=0)
    painted = vae.decode_latents(golden["outputs"]["sample_apg7.5_keep_latents"])
    wanted = golden["outputs"]["sample_apg7.5_keep_images"]
    torch.testing.assert_close(painted, wanted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_samples_come_from_each_rows_own_generator():
    torch.manual_seed(0)
    vae = AutoencoderKL(TINY)
    x = torch.rand(1, 3, 8, 12).expand(2, -1, -1, -1)
    a, b = vae.encode_latents(x, rng=[torch.Generator().manual_seed(s) for s in (1, 2)])
    (again,) = vae.encode_latents(x[:1], rng=[torch.Generator().manual_seed(2)])
    assert a.shape == (2, 4, 6)
    assert not torch.allclose(a, b)
    torch.testing.assert_close(again, b)
    mean, logvar = vae.moments(x[:1])
    noise = draw([torch.Generator().manual_seed(2)], mean)
    torch.testing.assert_close(again, (mean + (logvar / 2).exp() * noise)[0])
    assert vae.decode_latents(a[None]).shape == (1, 3, 8, 12)


def test_published_size_on_the_meta_device():
    with torch.device("meta"):
        vae = AutoencoderKL(AutoencoderConfig(scaling_factor=1.0))
    state = vae.state_dict()
    assert round(sum(t.numel() for t in state.values()) / 1e6) == 84
    assert state["encoder.conv_out.weight"].shape == (32, 512, 3, 3)
    assert state["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"].shape == (256, 128, 1, 1)
    assert state["decoder.up_blocks.0.resnets.2.conv2.weight"].shape == (512, 512, 3, 3)
    assert state["decoder.mid_block.attentions.0.to_out.0.weight"].shape == (512, 512)
    assert "encoder.down_blocks.3.downsamplers.0.conv.weight" not in state
    assert "decoder.up_blocks.3.upsamplers.0.conv.weight" not in state
    found = infer_autoencoder(state)
    assert AutoencoderConfig(scaling_factor=1.0, **found) == vae.config


def test_autocast_where_the_published_model_runs_in_it():
    import dataclasses

    vae = AutoencoderKL(dataclasses.replace(TINY, autocast="bfloat16"))
    assert vae.moments(torch.rand(1, 3, 8, 8))[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="autocast is 'int8', expected bfloat16, float16"):
        dataclasses.replace(TINY, autocast="int8")


def test_what_does_not_fit_is_named(state):
    with pytest.raises(ValueError, match="pixels are 9 x 8, expected multiples of 2"):
        AutoencoderKL(TINY).encode_latents(torch.rand(1, 3, 9, 8))
    with pytest.raises(WeightsError, match="gives no scaling_factor"):
        AutoencoderKL.from_published(state, {})
    with pytest.raises(WeightsError, match=r"act_fn = 'relu', which this VAE does not know"):
        AutoencoderKL.from_published(state, {"scaling_factor": 1.0, "act_fn": "relu"})
    with pytest.raises(WeightsError, match="wings = 2"):
        AutoencoderKL.from_published(state, {"scaling_factor": 1.0, "wings": 2})
    with pytest.raises(WeightsError, match="not an AutoencoderKL"):
        AutoencoderKL.from_published({"a": torch.zeros(1)}, {"scaling_factor": 1.0})
    fewer = {k: v for k, v in state.items() if "quant_conv.bias" not in k}
    with pytest.raises(WeightsError, match=r"missing \(2\): .*quant_conv.bias"):
        AutoencoderKL.from_published(fewer, {"scaling_factor": 1.0})
    with pytest.raises(ValueError, match="scaling_factor is 0"):
        AutoencoderConfig(scaling_factor=0)
    with pytest.raises(ValueError, match="multiples of 32"):
        AutoencoderConfig(scaling_factor=1.0, channels=(48,))
