"""MaskGIT-VQGAN against the published implementation's numbers."""

import pytest
import torch

from anytok.codecs import WeightsError
from anytok.codecs.image.vqgan import MaskGitVQGAN, PixelEncoder, VQGANConfig
from tests.golden.load import load_golden

SMALL = VQGANConfig(channels=32, code_width=256)


@pytest.fixture(scope="module")
def golden():
    return load_golden("image_onedpiece")


@torch.no_grad()
def test_proxy_encoder_and_its_ids(golden):
    proxy = golden["proxy_tokenizer"]
    encoder = PixelEncoder(SMALL)
    encoder.load_state_dict(proxy["state_dict"])
    hidden = encoder(golden["inputs"]["x"])
    torch.testing.assert_close(hidden, proxy["hidden"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_whole_model_loads_by_key_and_quantises(golden):
    pixel = {
        k.removeprefix("pixel_"): v
        for k, v in golden["state_dict"].items()
        if k.startswith("pixel_")
    }
    encoder = {f"encoder.{k}": v for k, v in golden["proxy_tokenizer"]["state_dict"].items()}
    model = MaskGitVQGAN.from_published({**pixel, **encoder})
    assert model.config == SMALL
    ids = model.tokenize(golden["inputs"]["x"])
    assert torch.equal(ids, golden["proxy_tokenizer"]["ids"])
    assert model.detokenize(ids).shape == (2, 3, 64, 64)
    del encoder["encoder.conv_in.weight"]
    with pytest.raises(WeightsError, match=r"missing \(1\): encoder.conv_in.weight"):
        MaskGitVQGAN.from_published({**pixel, **encoder})


@torch.no_grad()
def test_pictures_that_are_not_square():
    model = MaskGitVQGAN(VQGANConfig(channels=32, code_width=8, codes=16))
    ids = model.tokenize(torch.rand(1, 3, 32, 48))
    assert ids.shape == (1, 6)
    assert model.detokenize(ids, (2, 3)).shape == (1, 3, 32, 48)
