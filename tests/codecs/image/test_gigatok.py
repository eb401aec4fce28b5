"""GigaTok's tokenizer against the published implementation's numbers; sizes; bad input."""

import os

import pytest
import torch
from einops import rearrange

from anytok.codecs import CodecUnavailable, StreamError, WeightsError, load_codec, registry
from anytok.codecs.image.gigatok import (
    DISTILL,
    GigaTok,
    GigaTokConfig,
    infer_config,
    level_means,
    pointwise,
)
from anytok.modalities import Image
from tests.golden.load import load_golden

WHOLE = pytest.mark.skipif(
    "ANYTOK_PARITY" not in os.environ, reason="these tensors do not fit a golden"
)
# name: (encoder, decoder, parameters in millions with distill_mlp, tensors with codebook_used)
SIZES = {
    "s-s": ((512, 6), (512, 6), 136.1, 538),
    "s-b": ((512, 6), (768, 12), 232.4, 646),
    "b-l": ((768, 12), (1024, 24), 621.6, 970),
    "b-l-dino": ((768, 12), (1024, 24), 621.6, 970),
    "xl-xxl": ((1280, 36), (1536, 48), 2894, 1834),
}


@pytest.fixture(scope="module")
def golden():
    return load_golden("image_gigatok")


@pytest.fixture(scope="module")
def codec(golden):
    return GigaTok.from_published(golden["state_dict"], name="gigatok/test")


@torch.no_grad()
def test_averages_at_nine_levels(golden):
    out = golden["outputs"]
    means = level_means(out["cnn_features"], 256)
    torch.testing.assert_close(means, out["multi_level_pool_raw"], atol=1e-5, rtol=0)
    assert torch.equal(means[:, 0], means[:, 1])


@torch.no_grad()
def test_encoder_and_ids(codec, golden):
    out = golden["outputs"]
    features = codec.s2to1encoder(out["cnn_features"])
    expected = rearrange(out["vit_out"], "b c 1 n -> b n c")
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    z = codec.project(features)
    expected = rearrange(out["pre_quant"], "b c 1 n -> b n c")
    torch.testing.assert_close(z, expected, atol=1e-5, rtol=0)
    assert torch.equal(codec.quantize.ids(z), out["tokens"])


@torch.no_grad()
def test_decoder(codec, golden):
    out = golden["outputs"]
    vectors = codec.quantize.vectors(out["tokens"])
    expected = rearrange(out["quant_codebook"], "b c 1 n -> b n c")
    torch.testing.assert_close(vectors, expected, atol=1e-6, rtol=0)
    grid = codec.s1to2decoder(codec.embed(out["tokens"]))
    torch.testing.assert_close(grid, out["rec_spatial"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_picture(codec, golden):
    published = golden["outputs"]["image_from_tokens"]
    picture = 2 * codec.detokenize(golden["outputs"]["tokens"]) - 1
    step = picture.shape[-1] // published.shape[-1]
    torch.testing.assert_close(picture[..., ::step, ::step], published, atol=1e-4, rtol=0)


@WHOLE
@torch.no_grad()
def test_pixels_to_ids_and_semantic_features(codec, golden):
    x, out = golden["inputs"]["x"], golden["outputs"]
    torch.testing.assert_close(codec.encoder(x), out["cnn_features"], atol=1e-4, rtol=0)
    assert torch.equal(codec.tokenize(x / 2 + 0.5), out["tokens"])
    for row in range(len(x)):
        assert torch.equal(codec.tokenize(x[row : row + 1] / 2 + 0.5)[0], out["tokens"][row])
    vectors = rearrange(out["quant_rot"], "b c 1 n -> b n c")
    semantic = codec.s1to2decoder.semantic(pointwise(codec.post_quant_conv, vectors))
    torch.testing.assert_close(semantic, out["distill_feat"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_on_the_meta_device(name):
    encoder, decoder, millions, tensors = SIZES[name]
    with torch.device("meta"):
        codec = GigaTok(GigaTokConfig(encoder=encoder, decoder=decoder))
    state = codec.state_dict()
    parameters = sum(p.numel() for p in codec.parameters()) / 1e6
    assert parameters == pytest.approx(millions, abs=0.5 if millions > 1000 else 0.05)
    assert len(state) + 1 == tensors  # and `quantize.codebook_used`, which we do not keep
    assert infer_config(state) == codec.config
    shares = {
        part: sum(p.numel() for p in getattr(codec, part).parameters()) / 1e6
        for part in ("encoder", "decoder")
    }
    assert shares == {
        "encoder": pytest.approx(26.1, abs=0.05),
        "decoder": pytest.approx(50.2, abs=0.05),
    }
    assert registry.CODECS[f"gigatok/{name}"].files["weights"].name.startswith("VQ_")


@torch.no_grad()
def small_codec() -> GigaTok:
    config = GigaTokConfig(
        channels=32, multipliers=(1, 1), blocks=1, image_size=8, latent_channels=32, tokens=16,
        codes=64, encoder=(64, 1), decoder=(64, 1), teacher_width=0,
    )  # fmt: skip
    codec = GigaTok(config, name="gigatok/small").eval()
    rng = torch.Generator().manual_seed(0)
    for parameter in codec.parameters():
        if parameter.ndim > 1:
            draw = torch.randn(parameter.shape, generator=rng)
            parameter.copy_(draw / parameter[0].numel() ** 0.5)
    # float64: random weights amplify float32's rounding, and a leak between rows would still show
    return codec.double()


def test_streams_there_and_back_without_the_teacher():
    codec = small_codec()
    rng = torch.Generator().manual_seed(0)
    pictures = [Image(torch.rand(3, *size, generator=rng)) for size in ((8, 8), (20, 9))]
    streams = codec.encode(pictures)
    assert [len(s) for s in streams] == [16, 16]
    for stream, picture in zip(streams, pictures):
        assert torch.equal(codec.encode([picture])[0].codes, stream.codes)
    decoded = codec.decode(streams)
    (single,) = codec.decode(streams[1:])
    torch.testing.assert_close(single.pixels, decoded[1].pixels, atol=1e-6, rtol=0)
    with pytest.raises(StreamError, match="no prefixes"):
        streams[0][:8]
    with pytest.raises(StreamError, match="code 64 at depth 0"):
        codec.stream(torch.full((16,), 64))
    with pytest.raises(StreamError, match="has 8 positions, expected 16"):
        codec.stream(torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected \[B, 3, 8, 8\]"):
        codec.tokenize(torch.zeros(1, 3, 16, 16))


def test_the_teachers_head_may_be_there_or_not(golden):
    state = golden["state_dict"]
    assert infer_config(state).teacher_width == 768
    lean = GigaTok.from_published(state, {"teacher_width": 0})
    assert not any(key.startswith(DISTILL) for key in lean.state_dict())
    bare = {key: value for key, value in state.items() if not key.startswith(DISTILL)}
    assert GigaTok.from_published(bare).config.teacher_width == 0


def test_bad_weights_and_addresses(golden, tmp_path):
    with pytest.raises(CodecUnavailable, match=r"VQ_BL256_e200\.pt.*drive\.google\.com"):
        load_codec("gigatok/b-l")
    with pytest.raises(WeightsError, match="not a GigaTok: "):
        GigaTok.from_published(load_golden("backbone_llamagen")["vq"]["state_dict"])
    broken = dict(golden["state_dict"])
    broken["s2to1encoder.global_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(
        WeightsError, match=r"global_proj.weight is \(3, 3\), expected \(256, 256\)"
    ):
        GigaTok.from_published(broken)
    for bad, message in (
        ({"tokens": 100}, "power of two"),
        ({"encoder": (100, 1)}, "multiple of 64"),
        ({"image_size": 100}, "multiple of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            GigaTokConfig(**bad)
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "VQ_SS256_e100.pt")
    with pytest.raises(WeightsError, match="LlamaGen's keys"):
        load_codec("gigatok/s-s", tmp_path)
