"""One-D-Piece against the published implementation's numbers, its prefixes, its sizes, bad input."""

import pytest
import torch

from anytok.codecs import StreamError, WeightsError
from anytok.codecs.image.fitting import PictureOptions
from anytok.codecs.image.onedpiece import OneDPiece, build
from anytok.codecs.image.titok import TiTokConfig
from anytok.codecs.published import Weights
from anytok.codecs.registry import Entry
from anytok.modalities import Image
from tests.golden.load import load_golden

GRADIENT = torch.linspace(0, 1, 100).expand(3, 80, 100)


@pytest.fixture(scope="module")
def golden():
    return load_golden("image_onedpiece")


@pytest.fixture(scope="module")
def codec(golden):
    return OneDPiece.from_published(golden["state_dict"])


@torch.no_grad()
def test_encoder_and_tokens(codec, golden):
    x, out = golden["inputs"]["x"], golden["outputs"]
    expected = out["z"][:, :, 0].transpose(1, 2)
    torch.testing.assert_close(codec.latents(x), expected, atol=1e-5, rtol=0)
    assert torch.equal(codec.tokenize(x), out["tokens"][:, 0])


@torch.no_grad()
def test_decoder_logits_and_picture(codec, golden):
    tokens, out = golden["outputs"]["tokens"][:, 0], golden["outputs"]
    logits = codec.decoder(codec.quantize.vectors(tokens))[: len(out["proxy_logits"])]
    scale = out["proxy_logits"].abs().max()  # 20: the tolerance of a transformer is relative here
    torch.testing.assert_close(logits / scale, out["proxy_logits"] / scale, atol=1e-5, rtol=0)
    picture = codec.detokenize(tokens)
    torch.testing.assert_close(picture, out["image_from_tokens"], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 5, 16])
def test_truncated_decodes(codec, golden, k):
    out = golden["outputs"]
    expected = out["image_from_tokens" if k == 16 else f"image_trunc{k}"]
    picture = codec.detokenize(out["tokens"][: len(expected), 0, :k])
    torch.testing.assert_close(picture, expected, atol=1e-4, rtol=0)


def test_published_sizes_on_the_meta_device():
    # (width, layers): tensors, millions of parameters in encoder, decoder, pixel part; measured from the published code
    sizes = {
        (512, 8): (308, 25.9, 27.1, 30.5, 83.9),
        (768, 12): (404, 86.1, 88.2, 30.5, 205.3),
        (1024, 24): (692, 303.6, 307.1, 30.5, 641.7),
    }
    for size, (tensors, *millions) in sizes.items():
        with torch.device("meta"):
            codec = OneDPiece(TiTokConfig(encoder=size, decoder=size))
        state = codec.state_dict()
        assert len(state) == tensors
        assert state["decoder.ffn.2.weight"].shape == (1024, 2 * size[0], 1, 1)
        assert state["encoder.positional_embedding"].shape == (257, size[0])
        assert state["pixel_decoder.up.4.upsample_conv.weight"].shape == (512, 512, 3, 3)

        def count(*prefixes, state=state):
            return sum(v.numel() for k, v in state.items() if k.startswith(prefixes)) / 1e6

        found = [count("encoder."), count("decoder."), count("pixel_decoder."), count("")]
        assert found == pytest.approx(millions, abs=0.06)


def test_every_prefix_is_a_stream_and_batches_equal_singles(codec):
    pictures = [Image(GRADIENT), Image(GRADIENT.flip(1) * 0.5), Image(torch.zeros(3, 1, 1))]
    streams = codec.encode(pictures)
    for picture, stream in zip(pictures, streams):
        assert torch.equal(codec.encode([picture])[0].codes, stream.codes)
    mixed = [streams[0][:3], streams[1], streams[2][:3]]
    together = codec.decode(mixed)
    for stream, picture in zip(mixed, together):
        alone = codec.decode([stream])[0]
        # the golden's random weights paint values up to 4; the tolerance is that of its pictures
        torch.testing.assert_close(alone.pixels, picture.pixels, atol=1e-4, rtol=0)
        assert picture.pixels.shape == (3, 64, 64)
    for k in (0, 17):
        with pytest.raises(StreamError, match=f"k = {k}, expected 1 to 16"):
            streams[0][:k]


def test_bad_input_is_named(codec):
    with pytest.raises(ValueError, match="picture 1 holds NaN"):
        codec.encode([Image(GRADIENT), Image(GRADIENT * float("nan"))])
    with pytest.raises(TypeError, match="item 0 is a str"):
        codec.encode(["cat.png"])
    with pytest.raises(StreamError, match="code 64 at depth 0"):
        codec.stream(torch.tensor([1, 64]))
    with pytest.raises(ValueError, match="fit is 'stretch'"):
        PictureOptions(fit="stretch")
    assert codec.encode([]) == []


def test_another_models_weights_are_refused(golden):
    row = Entry(system="onedpiece", modality="image", name="onedpiece/s-256")
    state = dict(golden["state_dict"])
    del state["decoder.ln_post.bias"]
    with pytest.raises(WeightsError, match=r"missing \(1\): decoder.ln_post.bias"):
        build({"weights": Weights(state)}, row)
    with pytest.raises(WeightsError, match="latent_tokens"):
        build({"weights": Weights({"x": torch.zeros(1)})}, row)


def test_alpha_goes_over_white(codec):
    clear = Image(torch.zeros(3, 64, 64), torch.zeros(1, 64, 64))
    white = Image(torch.ones(3, 64, 64))
    a, b = codec.encode([clear, white])
    assert torch.equal(a.codes, b.codes)


@pytest.mark.parametrize(
    ("fit", "restored"), [("resize", (80, 100)), ("pad", (80, 100)), ("crop", (64, 64))]
)
def test_decode_gives_the_source_size_where_the_fit_can_be_undone(codec, fit, restored):
    (stream,) = codec.encode([Image(GRADIENT)], options=PictureOptions(fit=fit))
    assert stream.meta == {"size": [80, 100], "fit": fit}
    (picture,) = codec.decode([stream])
    assert picture.pixels.shape[1:] == restored
    (native,) = codec.decode([stream], options=PictureOptions(native=True))
    assert native.pixels.shape[1:] == (64, 64)


def test_a_stream_cannot_ask_for_a_monstrous_picture(codec):
    meta = {"size": [10**6, 10**6], "fit": "resize"}
    with pytest.raises(ValueError, match=r"expected .height, width. up to"):
        codec.decode([codec.stream(torch.zeros(2, dtype=torch.long), meta=meta)])
