"""EnCodec against the published implementation's numbers; lengths, depths, pieces, layouts, bad input."""

import math
from dataclasses import replace

import pytest
import torch

from anytok.codecs import StreamError, TokenStream, WeightsError, load_codec
from anytok.codecs.audio.encodec import Encodec, EncodecConfig, infer_config, pad
from anytok.codecs.audio.waveform import AudioOptions
from anytok.codecs.published import save_codec
from anytok.modalities import Audio
from tests.golden.load import load_golden

CAUSAL = EncodecConfig(
    sample_rate=8000,
    ratios=(5, 4, 2),
    width=4,
    latent_dim=8,
    codebooks=3,
    codebook_size=16,
)
CENTRED = replace(CAUSAL, causal=False, padding="constant", shortcut=False)
STEREO = replace(CAUSAL, channels=2, causal=False, group_norm=True, segment=0.1, normalize=True)


@pytest.fixture(scope="module")
def golden():
    models = load_golden("audio_encodec")["models"]
    for model in models.values():
        model["state_dict"] = whole(model)
        model.setdefault("x", models["noncausal48k"]["x"][:, :1])
    return models


def given(model):
    cfg = model["cfg"]
    return {
        "sample_rate": cfg["sr"],
        "causal": cfg["causal"],
        "segment": cfg["segment"],
        "normalize": cfg["normalize"],
    }


def whole(model):
    """The golden leaves convolutions' and the LSTMs' weights out: they are torch's start values after seed 0."""
    config = EncodecConfig(
        channels=model["cfg"]["ch"],
        width=4,
        latent_dim=16,
        codebooks=8,
        codebook_size=32,
        group_norm=model["cfg"]["norm"] == "time_group_norm",
        **given(model),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = Encodec(config)
    fresh = codec.state_dict()
    if not config.group_norm:
        fresh = {
            k + "_v" if k.endswith(("conv.conv.weight", "convtr.convtr.weight")) else k: v
            for k, v in fresh.items()
        }
    fresh = {k: v for k, v in fresh.items() if not k.endswith("embed")}
    return {**fresh, **model["state_dict"]}


def tiny(config):
    torch.manual_seed(0)
    return Encodec(config, name="encodec/tiny").eval()


def sound(length, rate=8000, channels=1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Audio(0.3 * torch.randn(channels, length, generator=rng), rate)


@torch.no_grad()
def test_published_numbers_causal(golden):
    model = golden["causal24k"]
    codec = Encodec.from_published(model["state_dict"], given(model))
    torch.testing.assert_close(codec.encoder(model["x"]), model["emb"], atol=1e-5, rtol=0)
    codes = codec.tokenize(model["x"])
    assert torch.equal(codes, model["codes"][0])
    torch.testing.assert_close(codec.detokenize(codes), model["y"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_published_numbers_in_stereo_pieces(golden):
    model = golden["noncausal48k"]
    codec = Encodec.from_published(model["state_dict"], given(model))
    (stream,) = codec.encode([Audio(model["x"][0], 48_000)])
    assert torch.equal(stream.codes.T, torch.cat([c[0] for c in model["codes"]], -1))
    scales = torch.cat([s.flatten() for s in model["scales"]])
    torch.testing.assert_close(stream.side["scale"], scales, atol=1e-7, rtol=1e-6)
    (back,) = codec.decode([stream])
    length = model["x"].shape[-1]
    torch.testing.assert_close(back.samples, model["y"][0, :, :length], atol=1e-5, rtol=0)


def test_bandwidths_are_depths():
    codec = tiny(replace(CAUSAL, sample_rate=24_000, ratios=(8, 5, 4, 2), codebooks=32))
    codec.config = replace(codec.config, codebook_size=1024)
    assert [codec.depth_of(kbps) for kbps in (1.5, 3, 6, 12, 24)] == [2, 4, 8, 16, 32]


def test_published_size(monkeypatch):
    for layer in (torch.nn.Conv1d, torch.nn.ConvTranspose1d, torch.nn.LSTM):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    with torch.device("meta"):
        codec = Encodec(EncodecConfig())
    assert sum(p.numel() for p in codec.parameters()) / 1e6 == pytest.approx(14.85, abs=0.01)
    assert sum(b.numel() for b in codec.buffers()) == 32 * 1024 * 128


@pytest.mark.parametrize("stereo", [False, True])
@torch.no_grad()
def test_huggingface_port_agrees(stereo):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.EncodecConfig(
        num_filters=4,
        hidden_size=16,
        codebook_size=32,
        codebook_dim=16,
        upsampling_ratios=[5, 4, 2],
        audio_channels=2 if stereo else 1,
        use_causal_conv=not stereo,
        norm_type="time_group_norm" if stereo else "weight_norm",
    )
    port = transformers.EncodecModel(config).eval()
    for layer in port.quantizer.layers:
        layer.codebook.embed.normal_()
    codec = Encodec.from_published(port.state_dict(), {"causal": not stereo})
    x = 0.1 * torch.randn(1, config.audio_channels, 2011)
    z = port.encoder(x)
    torch.testing.assert_close(codec.encoder(x), z, atol=1e-5, rtol=0)
    codes = codec.tokenize(x)
    assert torch.equal(
        codes, port.quantizer.encode(z, config.target_bandwidths[-1])[:, :].transpose(0, 1)
    )
    torch.testing.assert_close(
        codec.detokenize(codes),
        port.decoder(port.quantizer.decode(codes.transpose(0, 1))),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("config", [CAUSAL, CENTRED], ids=["causal", "centred"])
@pytest.mark.parametrize("length", [1, 40, 41, 1000])
def test_lengths_are_exact(config, length):
    codec = tiny(config)
    (stream,) = codec.encode([sound(length)])
    assert len(stream) == math.ceil(length / 40)
    (back,) = codec.decode([stream])
    assert back.samples.shape == (1, length)
    for n in (1, 2):
        assert codec.decode([stream.depths(n)])[0].samples.shape == (1, length)


@pytest.mark.parametrize("length", [1, 799, 800, 801, 1583, 1590, 4000])
def test_pieces_cover_every_length(length):
    codec = tiny(STEREO)
    (stream,) = codec.encode([sound(length, channels=2)])
    assert stream.side["scale"].shape == (math.ceil(length / 792),)
    (back,) = codec.decode([stream])
    assert back.samples.shape == (2, length)
    assert torch.isfinite(back.samples).all()
    mono = sound(length)
    (back,) = codec.decode(codec.encode([mono]))
    assert back.samples.shape == (1, length)


def test_batches_equal_single_calls():
    for config, channels in ((CAUSAL, 1), (STEREO, 2)):
        codec = tiny(config)
        sounds = [sound(n, channels=channels, seed=n) for n in (500, 900, 500, 1700)]
        together = codec.encode(sounds)
        for audio, stream, back in zip(sounds, together, codec.decode(together)):
            (alone,) = codec.encode([audio])
            assert torch.equal(alone.codes, stream.codes)
            (expected,) = codec.decode([alone])
            torch.testing.assert_close(back.samples, expected.samples, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [CAUSAL, CENTRED], ids=["causal", "centred"])
def test_long_sounds_and_pieces_equal_one_pass(config, monkeypatch):
    codec, audio = tiny(config), sound(9_011)
    (whole_stream,) = codec.encode([audio])
    (whole_sound,) = codec.decode([whole_stream])
    monkeypatch.setattr(Encodec, "_window", 2000)
    (stream,) = codec.encode([audio])
    assert torch.equal(stream.codes, whole_stream.codes)
    (back,) = codec.decode([stream])
    torch.testing.assert_close(back.samples, whole_sound.samples, atol=1e-5, rtol=0)
    encoder, decoder = codec.encoder_stream(), codec.decoder_stream()
    parts = [encoder.push(Audio(x, 8000)) for x in audio.samples.split(1500, 1)]
    streams = [part for part in [*parts, encoder.finish()] if part is not None]
    assert torch.equal(torch.cat([s.codes for s in streams]), whole_stream.codes)
    sounds = [s for s in [*map(decoder.push, streams), decoder.finish()] if s is not None]
    samples = torch.cat([s.samples for s in sounds], 1)
    torch.testing.assert_close(samples, whole_sound.samples, atol=1e-5, rtol=0)


def test_short_sounds_are_reflected_as_published():
    x = torch.tensor([[[1.0, 2.0]]])
    assert pad(x, 3, 0, "reflect").tolist() == [[[0.0, 0.0, 2.0, 1.0, 2.0]]]
    assert pad(x, 1, 1, "reflect").tolist() == [[[2.0, 1.0, 2.0, 1.0]]]
    assert pad(x, 1, 2, "constant").tolist() == [[[0.0, 1.0, 2.0, 0.0, 0.0]]]


def test_saved_codec_and_stream_come_back(tmp_path):
    codec = tiny(STEREO)
    save_codec(codec, tmp_path / "tiny.safetensors", name="encodec/tiny")
    loaded = load_codec(tmp_path / "tiny.safetensors")
    assert loaded.config == STEREO
    (stream,) = loaded.encode([sound(1000, channels=2)])
    stream.save(tmp_path / "a.tok")
    back = TokenStream.load(tmp_path / "a.tok")
    torch.testing.assert_close(
        loaded.decode([back])[0].samples, loaded.decode([stream])[0].samples, atol=0, rtol=0
    )


def test_names_know_their_files(tmp_path):
    from anytok.codecs import list_codecs

    assert list_codecs("encodec/*") == ["encodec/24khz", "encodec/32khz", "encodec/48khz"]
    state = {f"{k}": v for k, v in tiny(replace(CAUSAL, ratios=(5, 4, 2))).state_dict().items()}
    torch.save({"best_state": state, "xp.cfg": "nothing"}, tmp_path / "compression_state_dict.bin")
    codec = load_codec("encodec/32khz", tmp_path)
    assert codec.config.padding == "constant"
    assert not codec.config.causal
    assert codec.spec.weights_licence == "CC-BY-NC-4.0"
    torch.save(state, tmp_path / "encodec_24khz-d7cc33bc.th")
    assert load_codec("encodec/24khz", tmp_path).config.causal


def test_code_vectors_add_up():
    codec = tiny(CAUSAL)
    (stream,) = codec.encode([sound(800)])
    z = sum(codec.code_vectors(0, i)[stream.codes[:, i]] for i in range(3))
    torch.testing.assert_close(codec.quantizer.decode(stream.codes.T[None])[0].T, z)


def test_bad_input():
    codec, stereo = tiny(CAUSAL), tiny(STEREO)
    with pytest.raises(ValueError, match="depth is 4"):
        codec.encode([sound(100)], options=AudioOptions(depth=4))
    with pytest.raises(ValueError, match="codes stereo as it is"):
        stereo.encode([sound(100, channels=2)], options=AudioOptions(channels="each"))
    with pytest.raises(ValueError, match="has no encoder_stream"):
        stereo.encoder_stream()
    (stream,) = stereo.encode([sound(1000, channels=2)])
    with pytest.raises(StreamError, match="'scale' is missing"):
        stereo.decode([replace(stream, side={})])
    with pytest.raises(StreamError, match="its length asks for 64"):
        stereo.decode([replace(stream, meta={**stream.meta, "length": 2500})])
    with pytest.raises(WeightsError, match="not an EnCodec state dict"):
        infer_config({"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="'reflect' or 'constant'"):
        EncodecConfig(padding="zeros")
