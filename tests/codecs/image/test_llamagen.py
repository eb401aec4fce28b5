"""LlamaGen's VQ models against the published implementation's numbers; sizes; bad input."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from anytok.codecs import StreamError, WeightsError, list_codecs, load_codec, registry, save_codec
from anytok.codecs.image.llamagen import GridOptions, LlamaGenConfig, LlamaGenVQ, infer_config
from anytok.modalities import Image
from tests.golden.load import load_golden


@pytest.fixture(scope="module")
def golden():
    return load_golden("backbone_llamagen")["vq"]


@pytest.fixture(scope="module")
def codec(golden):
    return LlamaGenVQ.from_published(golden["state_dict"], {"image_size": 16}, name="llamagen/test")


@torch.no_grad()
def test_ids_vectors_and_picture(codec, golden):
    x = golden["img"]
    ids = codec.quantize.ids(codec.latents(x))
    assert torch.equal(ids[0], golden["codes"])
    assert torch.equal(codec.tokenize(x / 2 + 0.5), ids)
    vectors = codec.quantize.vectors(ids)
    expected = rearrange(golden["quant"], "b d h w -> b (h w) d")
    torch.testing.assert_close(vectors, expected, atol=1e-6, rtol=0)
    picture = codec.detokenize(ids, (8, 8))
    torch.testing.assert_close(2 * picture - 1, golden["dec"], atol=1e-4, rtol=0)
    torch.testing.assert_close(codec.code_vectors().norm(dim=1), torch.ones(64))
    raw = golden["state_dict"]["quantize.embedding.weight"]
    torch.testing.assert_close(codec.code_vectors(), F.normalize(raw))


def test_streams_of_several_sizes_in_one_call(codec):
    rng = torch.Generator().manual_seed(0)
    pictures = [Image(torch.rand(3, *size, generator=rng)) for size in ((16, 16), (30, 20))]
    small = codec.encode(pictures)
    wide = codec.encode(pictures, options=GridOptions(side=24, fit="resize"))
    assert [s.grid for s in (*small, *wide)] == [(8, 8)] * 2 + [(12, 12)] * 2
    for stream, picture in zip(small, pictures):
        assert torch.equal(codec.encode([picture])[0].codes, stream.codes)
    decoded = codec.decode([small[0], wide[0], small[1], wide[1]])
    assert [tuple(p.pixels.shape[1:]) for p in decoded] == [(16, 16), (16, 16), (16, 16), (30, 20)]
    for stream, picture in zip((small[0], wide[0], small[1], wide[1]), decoded):
        (single,) = codec.decode([stream])
        torch.testing.assert_close(single.pixels, picture.pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("multipliers", "stride"), [((1, 1, 2, 2, 4), 16), ((1, 2, 2, 4), 8)], ids=["ds16", "ds8"]
)
def test_published_sizes_on_the_meta_device(multipliers, stride):
    config = LlamaGenConfig(multipliers=multipliers)
    with torch.device("meta"):
        codec = LlamaGenVQ(config)
    shapes = {k: tuple(v.shape) for k, v in codec.state_dict().items()}
    last = len(multipliers) - 1
    assert codec.config.stride == stride
    assert shapes["quantize.embedding.weight"] == (16384, 8)
    assert shapes["quant_conv.weight"] == (8, 256, 1, 1)
    assert shapes["encoder.conv_out.weight"] == (256, 512, 3, 3)
    assert shapes[f"encoder.conv_blocks.{last}.attn.1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["decoder.conv_blocks.0.attn.2.q.weight"] == (512, 512, 1, 1)
    assert shapes["decoder.conv_blocks.0.upsample.conv.weight"] == (512, 512, 3, 3)
    assert shapes["encoder.mid.1.k.weight"] == (512, 512, 1, 1)
    assert f"decoder.conv_blocks.{last}.upsample.conv.weight" not in shapes
    assert f"encoder.conv_blocks.{last}.downsample.conv.weight" not in shapes
    assert infer_config(codec.state_dict()) == config


def test_rows_name_their_files():
    assert list_codecs("llamagen/*") == [
        "llamagen/vq-ds16-c2i",
        "llamagen/vq-ds16-t2i",
        "llamagen/vq-ds8-c2i",
    ]
    assert registry.CODECS["llamagen/vq-ds16-t2i"].files["weights"].name == "vq_ds16_t2i.pt"


def test_averaged_weights_come_first_and_the_usage_record_is_ignored(golden, tmp_path):
    state = {**golden["state_dict"], "quantize.codebook_used": torch.zeros(65536)}
    other = {key: value + 1 for key, value in golden["state_dict"].items()}
    torch.save({"ema": state, "model": other, "steps": 3}, tmp_path / "vq_ds16_c2i.pt")
    codec = load_codec("llamagen/vq-ds16-c2i", tmp_path)
    x = golden["img"] / 2 + 0.5
    with torch.no_grad():
        assert torch.equal(codec.tokenize(x)[0], golden["codes"])
    assert codec.spec.weights_licence == "MIT"
    save_codec(codec, tmp_path / "own.safetensors")
    assert load_codec(tmp_path / "own.safetensors").config == codec.config


def test_bad_input(codec, golden):
    with pytest.raises(ValueError, match=r"multiples of 2"):
        codec.tokenize(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match="side is 9999999, expected a multiple of 2"):
        codec.encode([Image(torch.zeros(3, 4, 4))], options=GridOptions(side=9999999))
    with pytest.raises(StreamError, match=r"64 positions for the grid \(8, 9\)"):
        codec.stream(golden["codes"], grid=(8, 9))
    with pytest.raises(StreamError, match=r"code 126 at depth 0 is outside 0\.\.\.63"):
        codec.stream(golden["codes"] + 64, grid=(8, 8))
    with pytest.raises(WeightsError, match=r"LlamaGen's keys: encoder.conv_in.weight"):
        LlamaGenVQ.from_published({"a": torch.zeros(1)})
    broken = dict(golden["state_dict"])
    del broken["decoder.mid.1.q.weight"]
    with pytest.raises(WeightsError, match=r"missing \(1\): decoder.mid.1.q.weight"):
        LlamaGenVQ.from_published(broken)
