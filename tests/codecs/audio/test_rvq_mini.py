"""rvq/mini: its transform, its latents, depths, lengths, batches, long sounds, channels, bad input, saving."""

import math

import pytest
import torch

from anytok.codecs import StreamError, WeightsError, load_codec
from anytok.codecs.audio.rvq_mini import (
    QUIET,
    RVQMini,
    RVQMiniConfig,
    Transform,
    best_path,
    interpolation,
    mdct,
)
from anytok.codecs.audio.waveform import AudioOptions
from anytok.codecs.published import load_into, save_codec
from anytok.codecs.training.rvq_mini import fit
from anytok.modalities import Audio

TINY = RVQMiniConfig(
    sample_rate=8000,
    hop=80,
    subframes=2,
    bands=10,
    coefficients=20,
    loudness_width=6,
    shape_width=10,
    codebooks=3,
    codebook_size=32,
    channels=8,
    blocks=2,
    expansion=2,
)


def sound(length, seed=0):
    """Gliding harmonics and some noise: [1, length]."""
    rng = torch.Generator().manual_seed(seed)
    t = torch.arange(length) / 8000
    phase = 2 * torch.pi * ((110 + 40 * seed) * t + 15 * t.square())
    harmonics = sum(torch.sin(k * phase) / k for k in range(1, 9))
    return (0.1 * harmonics + 0.005 * torch.randn(length, generator=rng))[None]


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    codec = RVQMini(TINY, name="rvq/tiny")
    crops = torch.stack([sound(8000, seed) for seed in range(4)])
    fit(codec, crops, torch.Generator().manual_seed(0), 3)
    return codec.eval()


def distance(a, b):
    return float((a - b).square().mean())


def test_the_lapped_transform_gives_the_sound_back():
    basis = mdct(16, 16)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16), atol=1e-5, rtol=0)
    transform, x = Transform(TINY), sound(800)
    coefficients = transform.coefficients(x)
    assert coefficients.shape == (1, 40, 20)
    back = transform.samples(coefficients)
    assert back.shape == x.shape
    torch.testing.assert_close(back[:, 20:-20], x[:, 20:-20], atol=1e-5, rtol=0)


def test_loudness_is_the_log_of_power():
    transform = Transform(TINY)
    noise = 0.1 * torch.randn(4, 8000, generator=torch.Generator().manual_seed(0))
    loudness = transform.loudness(noise)
    assert loudness.shape == (4, 10, 200)
    power = loudness[..., 4:-4].exp().mean((0, 2))
    torch.testing.assert_close(power, torch.full((10,), 0.01), rtol=0.15, atol=0)
    silence = transform.loudness(torch.zeros(1, 800))
    torch.testing.assert_close(silence, torch.full_like(silence, math.log(QUIET)))
    # every coefficient of noise is as loud as its level says
    expected = transform.coefficients(noise)[..., 4:-4].square().mean((0, 2))
    said = transform.level(loudness)[..., 4:-4].exp().mean((0, 2))
    assert (said / expected).log().abs().mean() < 0.2


def test_levels_between_bands_are_interpolated():
    matrix = interpolation(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 1.5, 3.0, 9.0]))
    expected = [[1, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1]]
    torch.testing.assert_close(matrix, torch.tensor(expected))


def test_a_wider_search_finds_a_nearer_sum():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=rng)
    tables = [torch.randn(16, 6, generator=rng) / 2**i for i in range(4)]

    def missed(codes):
        return distance(sum(t[c] for t, c in zip(tables, codes.T)), x)

    greedy, residual = [], x
    for table in tables:
        greedy.append(torch.cdist(residual, table).argmin(1))
        residual = residual - table[greedy[-1]]
    assert torch.equal(best_path(x, tables, 1), torch.stack(greedy, 1))
    errors = [missed(best_path(x, tables, width)) for width in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]
    # wide enough, it is exhaustive
    pairs = (tables[0][:, None] + tables[1]).flatten(0, 1)
    codes = best_path(x, tables[:2], 256)
    assert torch.equal(codes[:, 0] * 16 + codes[:, 1], torch.cdist(x, pairs).argmin(1))


@torch.no_grad()
def test_latents_and_codes_follow_the_sound(codec):
    x = sound(1600, 1)[None]
    z = codec.encode_latents(x)
    assert z.shape == (1, 16, 20)
    loudness, shape = codec.analyse(x[:, 0])
    back_loudness, back_shape = codec.latents.part(z)
    assert distance(back_loudness, loudness) < 0.2 * float(loudness.var())
    assert distance(back_shape, shape) < 0.7 * float(shape.var())
    errors = [distance(codec.dequantise(codec.quantise(z, n)), z) for n in (1, 2, 3)]
    assert float(z.var()) > errors[0] > errors[1] > errors[2]


@torch.no_grad()
def test_depths_of_a_batch(codec):
    codes = codec.tokenize(sound(1600)[None].expand(2, -1, -1))
    assert codes.shape == (2, 3, 20)
    mixed = codec.synthesise(codec.dequantise(codes, torch.tensor([1, 3])), torch.tensor([1, 3]))
    torch.testing.assert_close(mixed[0], codec.detokenize(codes[:1, :1])[0])
    torch.testing.assert_close(mixed[1], codec.detokenize(codes[1:])[0])
    assert mixed.shape == (2, 1, 1600)
    assert mixed.abs().max() <= 1
    total = sum(codec.code_vectors(depth=n)[codes[0, n]] for n in range(3))
    torch.testing.assert_close(total.T, codec.dequantise(codes)[0])
    with pytest.raises(ValueError, match="codes are 4 deep, expected 1 to 3"):
        codec.detokenize(torch.zeros(1, 4, 5, dtype=torch.long))


def test_streams_keep_rate_length_and_prefix(codec):
    audio = Audio(sound(1234), 8000)
    (stream,) = codec.encode([audio])
    assert stream.codes.shape == (16, 3)
    assert stream.bits == 16 * 3 * 5
    assert codec.spec.rate == 100
    (back,) = codec.decode([stream])
    assert (back.samples.shape, back.rate) == ((1, 1234), 8000)
    (shallow,) = codec.encode([audio], options=AudioOptions(depth=2))
    (first,) = codec.decode([stream.depths(1)])
    assert first.samples.shape == (1, 1234)
    assert shallow.codes.shape == (16, 2)
    with pytest.raises(ValueError, match=r"depth is 4, 'rvq/tiny' has 1 to 3"):
        codec.encode([audio], options=AudioOptions(depth=4))
    other = Audio(sound(1000).repeat(2, 1), 22_050)
    (stream,) = codec.encode([other], options=AudioOptions(channels="each"))
    (back,) = codec.decode([stream])
    assert (back.samples.shape, back.rate) == ((2, 1000), 22_050)


def test_a_batch_equals_single_calls(codec):
    sounds = [Audio(sound(n, n), 8000) for n in (400, 1111, 80, 801)]
    together = codec.encode(sounds)
    for item, stream in zip(sounds, together):
        assert torch.equal(codec.encode([item])[0].codes, stream.codes)
    for stream, back in zip(together, codec.decode(together)):
        alone = codec.decode([stream])[0].samples
        torch.testing.assert_close(back.samples, alone, atol=1e-5, rtol=0)
    mixed = [together[0].depths(1), together[1]]
    for stream, back in zip(mixed, codec.decode(mixed)):
        alone = codec.decode([stream])[0].samples
        torch.testing.assert_close(back.samples, alone, atol=1e-5, rtol=0)


def test_pieces_and_long_sounds_equal_the_whole(codec, monkeypatch):
    audio = Audio(sound(20_350), 8000)
    (whole,) = codec.encode([audio])
    (sounding,) = codec.decode([whole])
    monkeypatch.setattr("anytok.codecs.audio.residual.SECONDS", 1)
    (windowed,) = codec.encode([audio])
    assert torch.equal(windowed.codes, whole.codes)
    (back,) = codec.decode([windowed])
    torch.testing.assert_close(back.samples, sounding.samples, atol=1e-5, rtol=0)
    encoder, decoder = codec.encoder_stream(), codec.decoder_stream()
    pieces = [encoder.push(Audio(p, 8000)) for p in audio.samples.split(4500, 1)]
    pieces = [p for p in [*pieces, encoder.finish()] if p is not None]
    assert len(pieces) > 2
    assert torch.equal(torch.cat([p.codes for p in pieces]), whole.codes)
    heard = [decoder.push(p) for p in pieces]
    heard = [p.samples for p in [*heard, decoder.finish()] if p is not None]
    torch.testing.assert_close(torch.cat(heard, 1), sounding.samples, atol=1e-5, rtol=0)


def test_silence_is_coded_as_silence_or_nearly(codec):
    (stream,) = codec.encode([Audio(torch.zeros(1, 800), 8000)])
    (back,) = codec.decode([stream])
    assert torch.isfinite(back.samples).all()


def test_bad_sounds_and_foreign_streams_are_refused(codec):
    with pytest.raises(ValueError, match="empty"):
        codec.encode([Audio(torch.zeros(1, 0), 8000)])
    with pytest.raises(ValueError, match="not finite at sample 5"):
        codec.encode([Audio(torch.tensor([[0.0] * 5 + [math.nan]]), 8000)])
    stranger = RVQMini(TINY, name="rvq/stranger")
    (stream,) = codec.encode([Audio(sound(400), 8000)])
    with pytest.raises(StreamError, match="rvq/stranger"):
        stranger.decode([stream])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hop": 81}, "hop is 81"),
        ({"coefficients": 41}, "coefficients is 41, a subframe has 40"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    fields = {**{k: getattr(TINY, k) for k in TINY.__dataclass_fields__}, **sizes}
    with pytest.raises(ValueError, match=message):
        RVQMiniConfig(**fields)


def test_saved_in_half_precision_it_gives_the_same_codes(codec, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_codec(codec, path, name="rvq/tiny", dtype=torch.float16)
    loaded, audio = load_codec(path), Audio(sound(4000, 2), 8000)
    (a,), (b,) = codec.encode([audio]), loaded.encode([audio])
    assert torch.equal(a.codes, b.codes)
    (x,), (y,) = codec.decode([a]), loaded.decode([b])
    torch.testing.assert_close(x.samples, y.samples, atol=2e-3, rtol=0)
    half = load_codec(path, dtype=torch.bfloat16)
    (c,) = half.encode([audio])
    assert torch.equal(a.codes, c.codes)
    (z,) = half.decode([c])
    torch.testing.assert_close(x.samples, z.samples, atol=3e-2, rtol=0)


def test_another_models_weights_are_refused(codec):
    other = RVQMini(RVQMiniConfig(**{**TINY.__dict__, "channels": 16}), name="rvq/other")
    with pytest.raises(WeightsError, match="other shapes"):
        load_into(other, codec.state_dict(), source="tiny")
