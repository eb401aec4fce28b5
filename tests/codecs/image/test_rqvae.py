"""RQ-VAE: residual quantisation against plain arithmetic, depth prefixes, published layout, bad input."""

import numpy as np
import pytest
import torch

from anytok.codecs import StreamError, WeightsError, load_codec, save_codec
from anytok.codecs.image.rqvae import RQVAE, ResidualCodebooks, RQVAEConfig, infer_config
from anytok.modalities import Image

SMALL = RQVAEConfig(
    channels=32, multipliers=(1, 1, 2), blocks=1, image_size=16, latent_channels=16, code_width=6,
    codes=32, depth=4,
)  # fmt: skip


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    rng = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))


@pytest.fixture(scope="module")
def codec():
    codec = RQVAE(SMALL, name="rqvae/test").eval()
    fill(codec)
    return codec


def published(codec: RQVAE) -> dict[str, torch.Tensor]:
    """The codec's weights under the published names: a shared codebook once a depth, with EMA buffers."""
    state = {k: v for k, v in codec.state_dict().items() if not k.startswith("quantizer.")}
    for depth in range(codec.config.depth):
        key = f"quantizer.codebooks.{depth}"
        book = codec.quantizer.codebooks[depth % len(codec.quantizer.codebooks)].weight.detach()
        state[f"{key}.weight"] = book.clone()
        state[f"{key}.cluster_size_ema"] = torch.zeros(len(book) - 1)
        state[f"{key}.embed_ema"] = torch.zeros_like(book[:-1])
    return state


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_codes_are_greedy_nearest_rows_of_what_is_left(shared):
    books = ResidualCodebooks(20, 5, 3, shared=shared)
    fill(books)
    z = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))
    ids = books.ids(z)
    for index in np.ndindex(2, 7):
        left = z[index].double().numpy()
        for depth in range(3):
            table = books.table(depth).double().numpy()
            nearest = int(((left - table) ** 2).sum(1).argmin())
            assert ids[(*index, depth)] == nearest
            left = left - table[nearest]
    for n in (1, 2, 3):
        total = sum(books.table(i)[ids[..., i]] for i in range(n))
        torch.testing.assert_close(books.vectors(ids[..., :n]), total, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="codes have 4 depths, expected 1 to 3"):
        books.vectors(torch.zeros(1, 4, dtype=torch.int64))


def test_the_padding_row_is_no_code():
    books = ResidualCodebooks(4, 2, 1, shared=True)
    fill(books)
    with torch.no_grad():
        books.codebooks[0].weight[4] = 0
    assert len(books.table(0)) == 4
    assert books.ids(torch.zeros(10, 2)).max() < 4


def test_any_first_depths_decode_and_rows_do_not_meet(codec):
    rng = torch.Generator().manual_seed(0)
    pictures = [Image(torch.rand(3, *size, generator=rng)) for size in ((16, 16), (40, 16))]
    streams = codec.encode(pictures)
    assert streams[0].codes.shape == (16, 4)
    assert streams[0].grid == (4, 4)
    for stream, picture in zip(streams, pictures):
        assert torch.equal(codec.encode([picture])[0].codes, stream.codes)
    mixed = [streams[0], streams[1].depths(2), streams[0].depths(1)]
    for stream, picture in zip(mixed, codec.decode(mixed)):
        (single,) = codec.decode([stream])
        torch.testing.assert_close(single.pixels, picture.pixels, atol=1e-5, rtol=0)
    with pytest.raises(StreamError, match="5 depths asked for"):
        streams[0].depths(5)
    with pytest.raises(StreamError, match="no prefixes"):
        streams[0][:4]


@torch.no_grad()
def test_the_decoder_receives_the_sum_of_code_vectors(codec):
    codes = torch.randint(0, 32, (1, 16, 3), generator=torch.Generator().manual_seed(0))
    total = sum(codec.code_vectors(0, i)[codes[..., i]] for i in range(3))
    torch.testing.assert_close(codec.quantizer.vectors(codes), total, atol=1e-6, rtol=0)
    assert codec.spec.compose == "sum"
    with pytest.raises(ValueError, match="depth is 4, expected 0 to 3"):
        codec.code_vectors(0, 4)


def test_published_names(codec, tmp_path):
    state = published(codec)
    found = RQVAE.from_published(state, {"image_size": 16}, name="rqvae/test")
    assert found.config == SMALL
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.tokenize(x), codec.tokenize(x))
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    named = load_codec("rqvae/imagenet-8x8x4", tmp_path / "model.pt")
    assert named.spec.depth_prefix
    state["quantizer.codebooks.2.weight"] = state["quantizer.codebooks.2.weight"] + 1
    assert not infer_config(state).shared
    with pytest.raises(WeightsError, match=r"codebooks.2.weight differs"):
        RQVAE.from_published(state, {"shared": True})
    with pytest.raises(WeightsError, match=r"not an RQ-VAE: quantizer.codebooks.0.weight"):
        RQVAE.from_published({k: v for k, v in state.items() if "codebooks" not in k})


def test_a_saved_codec_keeps_one_shared_codebook(codec, tmp_path):
    assert [k for k in codec.state_dict() if "codebooks" in k] == ["quantizer.codebooks.0.weight"]
    save_codec(codec, tmp_path / "own.safetensors")
    again = load_codec(tmp_path / "own.safetensors")
    assert again.config == codec.config
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.tokenize(x), codec.tokenize(x))


def test_published_size_on_the_meta_device():
    with torch.device("meta"):
        codec = RQVAE()
    shapes = {k: tuple(v.shape) for k, v in codec.state_dict().items()}
    assert shapes["quantizer.codebooks.0.weight"] == (16385, 256)
    assert shapes["encoder.down.5.attn.1.q.weight"] == (512, 512, 1, 1)
    assert shapes["decoder.up.5.attn.2.q.weight"] == (512, 512, 1, 1)
    assert shapes["decoder.up.1.upsample.conv.weight"] == (128, 128, 3, 3)
    assert "decoder.up.4.attn.0.q.weight" not in shapes
    assert shapes["encoder.conv_out.weight"] == (256, 512, 3, 3)
    assert shapes["post_quant_conv.weight"] == (256, 256, 1, 1)
    assert codec.spec.vocab == ((16384,) * 4,)
    assert codec.spec.layout.shape == (8, 8)


def test_bad_configs():
    with pytest.raises(ValueError, match="image_size is 100, expected a multiple of 32"):
        RQVAEConfig(image_size=100)
    with pytest.raises(ValueError, match="depth is 0"):
        RQVAEConfig(depth=0)
