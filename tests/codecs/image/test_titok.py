"""TiTok's fixed layout, VQ and VAE, against the published implementation's numbers; sizes; bad input."""

import dataclasses

import pytest
import torch

from anytok.codecs import StreamError, WeightsError, list_codecs, load_codec, registry
from anytok.codecs.codec import Codec
from anytok.codecs.image.titok import TiTok, TiTokConfig, TiTokVAE, build, with_pixels
from anytok.codecs.published import Weights
from anytok.modalities import Image
from tests.golden.load import load_golden


@pytest.fixture(scope="module")
def golden():
    return load_golden("image_titok")


@torch.no_grad()
def test_vq_layout(golden):
    golden = golden["vq8k"]
    codec = TiTok.from_published(golden["state_dict"])
    assert not codec.config.legacy
    assert not codec.config.normalize
    x, out = golden["inputs"]["x"], golden["outputs"]
    z = codec.latents(x)
    torch.testing.assert_close(z, out["z"][:, :, 0].transpose(1, 2), atol=1e-5, rtol=0)
    assert torch.equal(codec.tokenize(x), out["tokens"][:, 0])
    picture = codec.detokenize(out["tokens"][:, 0])
    torch.testing.assert_close(picture, out["image_from_tokens"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_vae_layout(golden):
    golden = golden["vae"]
    codec = TiTokVAE.from_published(golden["state_dict"])
    x, out = golden["inputs"]["x"], golden["outputs"]
    mean, logvar = codec.moments(x)
    torch.testing.assert_close(mean, out["mean"][:, :, 0].transpose(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(logvar, out["logvar"][:, :, 0].transpose(1, 2), atol=1e-5, rtol=0)
    latents = codec.encode_latents(2 * x - 1)
    torch.testing.assert_close(latents, mean, atol=1e-5, rtol=0)
    picture = codec.decode_latents(mean) / 2 + 0.5
    torch.testing.assert_close(picture, out["image"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_vae_samples_come_from_each_rows_own_generator(golden):
    codec = TiTokVAE.from_published(golden["vae"]["state_dict"])
    x = golden["vae"]["inputs"]["x"][:1].expand(2, -1, -1, -1)
    seeded = [torch.Generator().manual_seed(s) for s in (1, 2)]
    a, b = codec.encode_latents(x, rng=seeded)
    again = codec.encode_latents(x[:1], rng=[torch.Generator().manual_seed(2)])[0]
    assert not torch.allclose(a, b)
    torch.testing.assert_close(again, b)


def test_build_knows_vq_from_vae(golden):
    for name, kind in (("vq8k", TiTok), ("vae", TiTokVAE)):
        row = dataclasses.replace(registry.CODECS["titok/bl-64"], name="titok/bl-64")
        codec = build({"weights": Weights(golden[name]["state_dict"])}, row)
        assert type(codec) is kind
        assert isinstance(codec, Codec)
        assert "research" in codec.spec.weights_licence


def test_published_sizes_on_the_meta_device():
    # (config, tensors, millions of parameters in encoder and decoder), measured from the published code
    large = TiTokConfig(tokens=32, encoder=(1024, 24), decoder=(1024, 24))
    fixed = TiTokConfig(
        tokens=64, token_size=64, codes=8192, normalize=False, legacy=False,
        encoder=(768, 12), decoder=(1024, 24),
    )  # fmt: skip
    with torch.device("meta"):
        l32, bl64 = TiTok(large), TiTok(fixed)
    assert l32.latent_tokens.shape == (32, 1024)
    assert l32.encoder.conv_out.weight.shape == (12, 1024, 1, 1)
    assert bl64.decoder.ffn[0].weight.shape == (768, 1024, 1, 1)
    assert bl64.decoder.conv_out.weight.shape == (3, 3, 3, 3)
    assert bl64.quantize.embedding.weight.shape == (8192, 64)
    assert not any(k.startswith("pixel") for k in bl64.state_dict())
    # a size is inferred from shapes alone
    for codec in (l32, bl64):
        from anytok.codecs.image.titok import infer_config

        found = infer_config(codec.state_dict())
        assert dataclasses.replace(found, pixels=None) == codec.config


def test_every_row_names_its_file():
    for name in [*list_codecs("titok/*"), *list_codecs("onedpiece/?-256")]:
        file = registry.CODECS[name].files["weights"]
        assert file.repo.count("/") == 1
    assert len(list_codecs("titok/*")) == 9


def test_stage_one_checkpoints_and_other_models_are_named(golden):
    one = load_golden("image_onedpiece")["state_dict"]
    stage_one = {k: v for k, v in one.items() if not k.startswith("pixel_")}
    with pytest.raises(WeightsError, match="stage-1"):
        TiTok.from_published(stage_one)
    vqgan = {k.removeprefix("pixel_"): v for k, v in one.items() if k.startswith("pixel_")}
    joined = with_pixels(stage_one, {**vqgan, "encoder.conv_in.weight": torch.zeros(1)})
    assert set(joined) == set(one)
    with pytest.raises(WeightsError, match="latent_tokens"):
        TiTok.from_published({"a": torch.zeros(1)})


def test_a_fixed_stream_has_no_prefixes(golden):
    codec = TiTok.from_published(golden["vq8k"]["state_dict"])
    (stream,) = codec.encode([Image(torch.rand(3, 90, 70))])
    assert len(stream) == 16
    with pytest.raises(StreamError, match="no prefixes"):
        stream[:4]
    (picture,) = codec.decode([stream])
    assert picture.pixels.shape == (3, 64, 64)


def test_a_saved_codec_comes_back(golden, tmp_path):
    from anytok.codecs import save_codec

    codec = TiTok.from_published(golden["vq8k"]["state_dict"])
    save_codec(codec, tmp_path / "titok.safetensors")
    again = load_codec(tmp_path / "titok.safetensors")
    image = Image(torch.rand(3, 64, 64))
    assert torch.equal(again.encode([image])[0].codes, codec.encode([image])[0].codes)
