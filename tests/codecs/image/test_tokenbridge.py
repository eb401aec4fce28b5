"""TokenBridge's tokenizer against the published implementation's numbers; options; bad input."""

import pytest
import torch
from einops import rearrange

from anytok.codecs import StreamError, TokenStream, WeightsError, list_codecs, load_codec, registry
from anytok.codecs.image.tokenbridge import TokenBridge, TokenBridgeConfig, TokenBridgeOptions
from anytok.modalities import Image
from tests.golden.load import load_golden


@pytest.fixture(scope="module")
def golden():
    return load_golden("image_tokenbridge")


@pytest.fixture(scope="module")
def codec(golden):
    config = {"image_size": 64}
    return TokenBridge.from_published(golden["vae_state_dict"], config, name="tokenbridge/test")


@pytest.fixture(scope="module")
def pictures():
    rng = torch.Generator().manual_seed(0)
    return [Image(torch.rand(3, h, w, generator=rng)) for h, w in ((64, 64), (80, 130), (1, 1))]


@torch.no_grad()
def test_latents_codes_and_pictures(codec, golden):
    x, out = golden["inputs"]["x"], golden["outputs"]
    mean, logvar = codec.vae.moments(x)
    torch.testing.assert_close(mean, out["mean"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logvar, out["logvar"], atol=1e-5, rtol=0)
    # codes as published: nearest level of the published latents, by the published table
    levels = out["reconstruction_values"]
    y = (out["latent_norm"] * 0.6).clamp(-3, 3)
    nearest = (y[..., None] - levels).abs().argmin(-1)
    expected = rearrange(nearest, "b c h w -> b (h w) c")
    assert torch.equal(codec.tokenize(x / 2 + 0.5), expected)
    codes = rearrange(out["quant"]["b6_r5"]["idx"], "b c h w -> b (h w) c")
    assert torch.equal(codes, out["model_quant_idx"])
    picture = 2 * codec.detokenize(codes[:1]) - 1
    torch.testing.assert_close(picture, out["image_from_codes"][:1], atol=1e-4, rtol=0)


def test_streams_there_and_back(codec, pictures, tmp_path):
    streams = codec.encode(pictures)
    assert [s.grid for s in streams] == [(4, 4)] * 3
    assert streams[0].codes.shape == (16, 16)
    assert streams[0].bits == 16 * 16 * 6
    for stream, picture in zip(streams, pictures):
        assert torch.equal(codec.encode([picture])[0].codes, stream.codes)
    streams[1].save(tmp_path / "a.tok")
    again = TokenStream.load(tmp_path / "a.tok")
    both = codec.decode([streams[0], again])
    torch.testing.assert_close(both[1].pixels, codec.decode([again])[0].pixels, atol=1e-5, rtol=0)


def test_the_mean_is_the_default_and_samples_are_seeded(codec, pictures):
    same = [pictures[0], pictures[0]]
    plain = codec.encode(same, rng=[torch.Generator().manual_seed(s) for s in (1, 2)])
    assert torch.equal(plain[0].codes, codec.encode(same[:1])[0].codes)
    sample = TokenBridgeOptions(sample=True)
    a, b = codec.encode(
        same, options=sample, rng=[torch.Generator().manual_seed(s) for s in (1, 2)]
    )
    (again,) = codec.encode(same[:1], options=sample, rng=[torch.Generator().manual_seed(2)])
    assert not torch.equal(a.codes, b.codes)
    assert torch.equal(again.codes, b.codes)
    first, second = codec.encode(same, options=sample)  # no rng: each picture from seed 0
    assert torch.equal(first.codes, second.codes)


@torch.no_grad()
def test_code_vectors_are_what_the_decoder_receives(codec):
    codes = torch.randint(0, 64, (1, 16, 16), generator=torch.Generator().manual_seed(0))
    tables = [codec.code_vectors(0, depth) for depth in range(16)]
    assert tables[0].shape == (64, 1)
    latents = torch.cat([table[codes[..., i]] for i, table in enumerate(tables)], dim=-1)
    latents = rearrange(latents, "b (h w) c -> b c h w", h=4)
    picture = codec.vae.decode_latents(latents) / 2 + 0.5
    torch.testing.assert_close(picture, codec.detokenize(codes), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="depth is 16"):
        codec.code_vectors(0, 16)


def test_every_published_size_and_its_bits():
    assert len(list_codecs("tokenbridge/*bit")) == 6
    for name in list_codecs("tokenbridge/*bit"):
        row = registry.CODECS[name]
        with torch.device("meta"):
            codec = TokenBridge(TokenBridgeConfig(**row.config))
        assert name == f"tokenbridge/kl16-{codec.config.bits}bit"
        assert codec.spec.vocab == ((2**codec.config.bits,) * 16,)
        assert codec.spec.layout.shape == (16, 16)
        assert row.files["weights"].repo == "Epiphqny/TokenBridge"
        assert sum(p.numel() for p in codec.parameters()) == 66_456_019


def test_bad_input(codec, pictures, golden):
    with pytest.raises(ValueError, match="picture 0 holds NaN"):
        codec.encode([Image(torch.full((3, 64, 64), float("nan")))])
    with pytest.raises(TypeError, match="item 0 is a Tensor"):
        codec.encode([torch.zeros(3, 64, 64)])
    (stream,) = codec.encode(pictures[:1])
    with pytest.raises(StreamError, match="no prefixes"):
        stream[:8]
    with pytest.raises(StreamError, match="code 64 at depth 0 is outside"):
        codec.stream(torch.full((16, 16), 64), grid=(4, 4))
    with pytest.raises(StreamError, match=r"grid \(2, 8\), expected \(4, 4\)"):
        codec.stream(stream.codes, grid=(2, 8))
    other = TokenBridge.from_published(
        golden["vae_state_dict"], {"image_size": 64, "bits": 4}, name="tokenbridge/other"
    )
    with pytest.raises(StreamError, match="decode needs 'tokenbridge/other"):
        other.decode([stream])
    with pytest.raises(WeightsError, match="latent-diffusion keys"):
        TokenBridge.from_published(load_golden("image_titok")["vae"]["state_dict"])
    with pytest.raises(ValueError, match="image_size is 40"):
        TokenBridgeConfig(image_size=40)
    assert codec.encode([]) == []


def test_by_name_and_from_our_own_file(golden, pictures, tmp_path):
    from anytok.codecs import save_codec

    folder = tmp_path / "vae"
    folder.mkdir()
    torch.save({"model": golden["vae_state_dict"]}, folder / "kl16.ckpt")
    codec = load_codec("tokenbridge/kl16-10bit", tmp_path)
    assert codec.config.bits == 10
    save_codec(codec, tmp_path / "own.safetensors")
    again = load_codec(tmp_path / "own.safetensors")
    assert torch.equal(
        again.tokenize(torch.full((1, 3, 64, 64), 0.3)),
        codec.tokenize(torch.full((1, 3, 64, 64), 0.3)),
    )
    assert again.config == codec.config
