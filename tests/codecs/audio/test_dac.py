"""DAC against the published implementation's numbers; depths, lengths, batches, long sounds, layouts, bad input."""

import math

import pytest
import torch

from anytok.codecs import StreamError, TokenStream, WeightsError
from anytok.codecs.audio.dac import DAC, DACConfig, infer_config
from anytok.codecs.audio.waveform import AudioOptions
from anytok.codecs.audio.windows import Windowed, reach
from anytok.codecs.layers.conv import (
    fuse_weight_norm,
    train_with_weight_norm,
    without_weight_norm,
)
from anytok.codecs.published import save_codec
from anytok.codecs.quantizers.rvq import draw_depths
from anytok.modalities import Audio
from tests.golden.load import load_golden

MODELS = ("rates_2488_44k", "rates_2458_16k_latent")
TINY = DACConfig(
    sample_rate=8000,
    encoder_dim=4,
    encoder_rates=(2, 5, 4),
    decoder_dim=16,
    decoder_rates=(4, 5, 2),
    latent_dim=12,
    codebooks=3,
    codebook_size=16,
    codebook_dim=4,
)


@pytest.fixture(scope="module")
def golden():
    models = load_golden("audio_dac")["models"]
    for name in MODELS:
        models[name]["state_dict"] = whole(models[name])
    return models


def whole(model):
    """The golden leaves the directions `weight_v` out: they are torch's own start values after seed 0."""
    cfg = model["cfg"]
    config = DACConfig(
        sample_rate=cfg["sample_rate"],
        encoder_dim=cfg["encoder_dim"],
        encoder_rates=cfg["encoder_rates"],
        decoder_dim=cfg["decoder_dim"],
        decoder_rates=cfg["decoder_rates"],
        latent_dim=cfg.get("latent_dim", 128),
        codebooks=cfg["n_codebooks"],
        codebook_size=cfg["codebook_size"],
        codebook_dim=cfg["codebook_dim"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = DAC(config).state_dict()
    directions = {f"{k}_v": v for k, v in fresh.items() if k.endswith("weight") and v.ndim == 3}
    return {**directions, **model["state_dict"]}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    codec = DAC(TINY, name="dac/tiny")
    for stage in codec.quantizer.quantizers:  # so that codes differ from frame to frame
        stage.in_proj.weight.data *= 10
    return codec.eval()


def sound(length, rate=8000, channels=1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Audio(0.3 * torch.randn(channels, length, generator=rng), rate)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_published_numbers(golden, name, dtype):
    model = golden[name]
    weights = {k: v.to(dtype) for k, v in model["state_dict"].items()}
    codec = DAC.from_published(weights, {"sample_rate": model["cfg"]["sample_rate"]})
    x = model["x"].to(dtype)[None, None]
    assert torch.equal(codec.tokenize(x), model["codes"])
    assert torch.equal(codec.tokenize(x, depth=2), model["codes_2q"])
    q = codec.quantizer(codec.encoder(codec.pad(x))[0])
    assert torch.equal(q.codes, model["codes"])
    torch.testing.assert_close(q.z.float(), model["z"], atol=5e-4, rtol=0)
    torch.testing.assert_close(q.commitment.float(), model["commit"], rtol=1e-5, atol=0)
    torch.testing.assert_close(q.codebook.float(), model["codebook"], rtol=1e-5, atol=0)
    # The golden itself is float32 in a network of random, high gain: its own rounding is of this size.
    y = codec.decoder(model["z"].to(dtype))[0]
    assert y.shape == model["y"].shape
    torch.testing.assert_close(y.float(), model["y"], atol=1.5e-2, rtol=0)
    assert (y.float() - model["y"]).square().mean().sqrt() < 1e-3


@torch.no_grad()
def test_quantiser_dropout_as_published(golden):
    train = golden["train_quant"]
    codec = DAC.from_published(golden["rates_2488_44k"]["state_dict"])
    keep = draw_depths(4, 4, 0.5, torch.Generator().manual_seed(train["seed"]))
    q = codec.quantizer(train["z"], keep)
    assert torch.equal(q.codes, train["codes"])
    torch.testing.assert_close(q.z, train["zq"], atol=1e-4, rtol=0)
    torch.testing.assert_close(q.commitment, train["commit"], rtol=1e-5, atol=0)
    torch.testing.assert_close(q.codebook, train["codebook"], rtol=1e-5, atol=0)


def test_sizes_come_from_the_weights(golden):
    codec = DAC.from_published(golden["rates_2458_16k_latent"]["state_dict"])
    assert codec.config.encoder_rates == (2, 4, 5, 8)
    assert codec.config.decoder_rates == (8, 5, 4, 2)
    assert (codec.config.latent_dim, codec.config.codebooks, codec.config.codebook_dim) == (
        24,
        4,
        4,
    )


@pytest.mark.parametrize(
    ("rates", "codebooks", "latent", "millions"),
    [((2, 4, 8, 8), 9, 1024, 76.7), ((2, 4, 5, 8), 12, 1024, 74.2)],
)
def test_published_sizes(rates, codebooks, latent, millions, monkeypatch):
    for layer in (torch.nn.Conv1d, torch.nn.ConvTranspose1d, torch.nn.Embedding):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    config = DACConfig(
        encoder_rates=rates, decoder_rates=rates[::-1], codebooks=codebooks, latent_dim=latent
    )
    with torch.device("meta"):
        codec = DAC(config)
    assert sum(p.numel() for p in codec.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@torch.no_grad()
def test_huggingface_port_agrees():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    port = transformers.DacModel(
        transformers.DacConfig(
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4, 5],
            upsampling_ratios=[5, 4, 2],
            decoder_hidden_size=32,
            n_codebooks=3,
            codebook_size=32,
            codebook_dim=4,
            sampling_rate=16000,
        )
    )
    port = port.double().eval()
    codec = DAC.from_published(port.state_dict(), {"sample_rate": 16000})
    x = torch.randn(2, 1, 2000, dtype=torch.float64)
    assert torch.equal(codec.tokenize(x), port.encode(x).audio_codes)
    codes = codec.tokenize(x)
    expected = port.decode(audio_codes=codes).audio_values
    torch.testing.assert_close(codec.detokenize(codes)[:, 0], expected, atol=1e-10, rtol=0)


def test_weight_norm_in_three_spellings(tiny):
    plain = {k: v.clone() for k, v in tiny.state_dict().items()}
    normed = DAC(TINY)
    normed.load_state_dict(plain)
    train_with_weight_norm(normed)
    new = normed.state_dict()
    assert any(k.endswith("original0") for k in new)
    old = {
        k.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): v
        for k, v in new.items()
    }
    for spelling in (new, old):
        fused = fuse_weight_norm(spelling)
        assert fused.keys() == plain.keys()
        for key, value in plain.items():
            torch.testing.assert_close(fused[key], value, atol=1e-6, rtol=1e-5)
    without_weight_norm(normed)
    assert normed.state_dict().keys() == plain.keys()


@pytest.mark.parametrize("length", [1, 39, 40, 41, 1000])
def test_lengths_are_exact(tiny, length):
    audio = sound(length)
    (stream,) = tiny.encode([audio])
    assert len(stream) == math.ceil(length / 40)
    (back,) = tiny.decode([stream])
    assert back.samples.shape == audio.samples.shape
    assert back.rate == audio.rate


def test_an_odd_stride_loses_samples_that_decode_replaces(tiny):
    (stream,) = tiny.encode([sound(400)])
    assert tiny.detokenize(stream.codes.T[None]).shape[-1] == 398
    (back,) = tiny.decode([stream])
    assert back.samples.shape == (1, 400)
    assert not back.samples[:, 398:].any()
    assert back.samples[:, 300:398].any()


def test_every_depth_decodes_and_is_a_sum_of_code_vectors(tiny):
    audio = sound(800)
    (stream,) = tiny.encode([audio])
    for n in (1, 2, 3):
        (first,) = tiny.encode([audio], options=AudioOptions(depth=n))
        assert torch.equal(first.codes, stream.depths(n).codes)
        z = sum(tiny.code_vectors(0, i)[stream.codes[:, i]] for i in range(n))
        expected = tiny.decoder(z.T[None])[0][0]
        (back,) = tiny.decode([stream.depths(n)])
        torch.testing.assert_close(back.samples[:, :798], expected, atol=1e-5, rtol=0)
    assert tiny.spec.compose == "sum"
    assert tiny.spec.depth_prefix


def test_a_batch_of_unequal_lengths_equals_single_calls(tiny):
    sounds = [sound(n, seed=n) for n in (1, 333, 2000, 1999, 40, 777)]
    together = tiny.encode(sounds)
    for audio, stream in zip(sounds, together):
        assert torch.equal(stream.codes, tiny.encode([audio])[0].codes)
    for back, stream in zip(tiny.decode(together), together):
        (alone,) = tiny.decode([stream])
        torch.testing.assert_close(back.samples, alone.samples, atol=1e-5, rtol=0)


def test_a_batch_of_unequal_depths_equals_single_calls(tiny):
    streams = tiny.encode([sound(500), sound(900)])
    mixed = [streams[0].depths(1), streams[1]]
    for back, stream in zip(tiny.decode(mixed), mixed):
        torch.testing.assert_close(
            back.samples, tiny.decode([stream])[0].samples, atol=1e-5, rtol=0
        )


def test_long_sound_goes_through_windows_with_the_same_result(tiny, monkeypatch):
    audio = sound(30_011)
    (whole_stream,) = tiny.encode([audio])
    (whole_sound,) = tiny.decode([whole_stream])
    longest = []
    forward = tiny.encoder.forward
    monkeypatch.setattr(DAC, "_window", lambda self, unit: 2400 // unit)
    monkeypatch.setattr(
        tiny.encoder, "forward", lambda x, n=None: (longest.append(x.shape[-1]), forward(x, n))[1]
    )
    (stream,) = tiny.encode([audio])
    assert torch.equal(stream.codes, whole_stream.codes)
    assert max(longest) < 6000
    (back,) = tiny.decode([stream])
    torch.testing.assert_close(back.samples, whole_sound.samples, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (11025, 1), (16000, 2)])
def test_pieces_of_a_sound_equal_the_whole(tiny, monkeypatch, rate, channels):
    monkeypatch.setattr(DAC, "_window", lambda self, unit: 2400 // unit)
    audio = sound(20_123, rate, channels)
    options = AudioOptions(channels="each")
    (whole_stream,) = tiny.encode([audio], options=options)
    encoder, decoder = tiny.encoder_stream(options), tiny.decoder_stream()
    pieces = [encoder.push(Audio(x, rate)) for x in audio.samples.split(700, 1)]
    streams = [piece for piece in [*pieces, encoder.finish()] if piece is not None]
    joined = streams[0]
    for stream in streams[1:]:
        joined = joined + stream
    assert len(streams) > 1
    assert torch.equal(joined.codes, whole_stream.codes)
    assert joined.meta == whole_stream.meta
    sounds = [s for s in [*map(decoder.push, streams), decoder.finish()] if s is not None]
    assert len(sounds) > 1
    (expected,) = tiny.decode([whole_stream])
    samples = torch.cat([s.samples for s in sounds], 1)
    torch.testing.assert_close(samples, expected.samples, atol=1e-5, rtol=0)


def test_channels_mixed_or_each(tiny):
    stereo = sound(900, channels=2)
    (mixed,) = tiny.encode([stereo])
    (mono,) = tiny.encode([stereo.mono()])
    assert torch.equal(mixed.codes, mono.codes)
    (each,) = tiny.encode([stereo], options=AudioOptions(channels="each"))
    (left,) = tiny.encode([Audio(stereo.samples[:1], 8000)])
    assert len(each) == 2 * len(left)
    assert torch.equal(each.codes[::2], left.codes)
    assert tiny.decode([each])[0].samples.shape == (2, 900)
    assert tiny.decode([mixed])[0].samples.shape == (1, 900)


def test_a_stream_without_source_has_the_codecs_rate(tiny):
    stream = tiny.stream(torch.randint(0, 16, (7, 3)), grid=(7,))
    (back,) = tiny.decode([stream])
    assert back.samples.shape == (1, 280)
    assert back.rate == 8000


def test_a_saved_codec_and_a_saved_stream_come_back(tiny, tmp_path):
    from anytok.codecs import load_codec

    save_codec(tiny, tmp_path / "tiny.safetensors", name="dac/tiny")
    codec = load_codec(tmp_path / "tiny.safetensors")
    assert codec.config == TINY
    (stream,) = codec.encode([sound(500)])
    stream.save(tmp_path / "a.tok")
    back = TokenStream.load(tmp_path / "a.tok")
    assert torch.equal(codec.decode([back])[0].samples, codec.decode([stream])[0].samples)


def test_names_know_their_files(tiny, tmp_path):
    from anytok.codecs import CodecUnavailable, list_codecs, load_codec

    assert list_codecs("dac/*") == ["dac/16khz", "dac/24khz", "dac/44khz", "dac/44khz-16kbps"]
    content = {"state_dict": tiny.state_dict(), "metadata": {"kwargs": {"sample_rate": 24000}}}
    torch.save(content, tmp_path / "weights_24khz.pth")
    codec = load_codec("dac/24khz", tmp_path)
    assert codec.config.sample_rate == 24_000
    assert codec.spec.weights_licence == "MIT"
    with pytest.raises(CodecUnavailable, match="descript-audio-codec, release 1"):
        load_codec("dac/44khz-16kbps")


@pytest.mark.parametrize(
    "samples",
    [torch.zeros(1, 500), torch.ones(1, 500), 1e4 * torch.ones(1, 500), torch.ones(6, 500)],
    ids=["silence", "dc", "clipped", "5.1"],
)
def test_odd_sounds_are_coded(tiny, samples):
    (back,) = tiny.decode(tiny.encode([Audio(samples, 8000)]))
    assert torch.isfinite(back.samples).all()


def test_bad_input(tiny):
    nan = torch.zeros(1, 100)
    nan[0, 7] = math.nan
    with pytest.raises(ValueError, match="not finite at sample 7"):
        tiny.encode([Audio(nan, 8000)])
    with pytest.raises(ValueError, match="empty"):
        tiny.encode([Audio(torch.zeros(1, 0), 8000)])
    with pytest.raises(ValueError, match="depth is 4, 'dac/tiny' has 1 to 3"):
        tiny.encode([sound(100)], options=AudioOptions(depth=4))
    with pytest.raises(ValueError, match="'mix' or 'each'"):
        AudioOptions(channels="left")
    with pytest.raises(StreamError, match=r"outside 0\.\.\.15"):
        tiny.stream(torch.full((2, 3), 16), grid=(2,))
    other = DAC(TINY, name="dac/other")
    with pytest.raises(StreamError, match="written by codec"):
        tiny.decode(other.encode([sound(100)]))
    with pytest.raises(ValueError, match="before anything was pushed"):
        tiny.encoder_stream().finish()
    stream = tiny.encoder_stream()
    stream.push(sound(100))
    with pytest.raises(ValueError, match="first one had 1 at 8000 Hz"):
        stream.push(sound(100, rate=16000))


def test_foreign_weights_are_refused(tiny):
    with pytest.raises(WeightsError, match="not a DAC state dict"):
        infer_config({"a": torch.zeros(1)}, 16000)
    weights = dict(tiny.state_dict())
    del weights["encoder.block.0.bias"]
    with pytest.raises(WeightsError, match=r"encoder\.block\.0\.bias"):
        DAC.from_published(weights)
    with pytest.raises(ValueError, match="different hops"):
        DACConfig(encoder_rates=(2, 4), decoder_rates=(4, 4))


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    codec = DAC(TINY)
    z, _ = codec.encoder(0.1 * torch.randn(2, 1, 800))
    q = codec.quantizer(z)
    y, _ = codec.decoder(q.z)
    (y.square().mean() + q.commitment + q.codebook).backward()
    assert [k for k, p in codec.named_parameters() if p.grad is None] == []


def test_windows_need_the_reach(tiny):
    margin = math.ceil(reach(tiny.encoder, 1) / TINY.hop)
    x = sound(8000).samples
    with torch.no_grad():
        whole_latents = tiny.encoder(x[None])[0][0]

        def run(width):
            windows = Windowed(
                lambda s: tiny.encoder(s[None])[0][0], unit_in=40, unit_out=1, margin=width, step=10
            )
            return torch.cat([*windows.push(x), windows.finish()], -1)

        torch.testing.assert_close(run(margin), whole_latents, atol=1e-5, rtol=0)
        assert (run(1) - whole_latents).abs().max() > 1e-4
