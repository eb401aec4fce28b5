"""CosyVoice as a codec: model directories, voices, round trips, batches, streams, the hub, bad input."""

import json
import math
from dataclasses import replace

import pytest
import torch

from anytok.codecs import (
    CodecUnavailable,
    StreamError,
    TokenStream,
    WeightsError,
    load_codec,
    registry,
    save_codec,
)
from anytok.codecs.audio.cosyvoice import codec as module
from anytok.codecs.audio.cosyvoice.campplus import CAMPPlus, CAMPPlusConfig
from anytok.codecs.audio.cosyvoice.codec import CosyVoice, Keep, Speech, groups
from anytok.codecs.audio.cosyvoice.flow import FlowConfig, make_flow
from anytok.codecs.audio.cosyvoice.hift import PUBLISHED, HiFT
from anytok.codecs.audio.cosyvoice.s3 import S3Config, S3Tokenizer
from anytok.codecs.audio.cosyvoice.voice import Voice
from anytok.modalities import Audio

SPEAKER = CAMPPlusConfig(
    bands=16, embedding=6, channels=8, growth=4, bottleneck=2, layers=(2, 1), dilations=(1, 2)
)
RATES = {"v1": 50, "v2": 25, "v3": 25}
FLOWS = {
    "v1": {"width": 16, "channels": (16, 16)},
    "v2": {"width": 16, "channels": (16,)},
    "v3": {"width": 80, "dit_width": 64, "lookahead": 16},
}


def tiny_networks(version):
    """Random weights; a quantiser whose tokens vary and a pitch that is voiced."""
    torch.manual_seed(0)
    tokenizer = S3Tokenizer(
        S3Config(version=version, width=64, heads=1, layers=1, rate=RATES[version], codes=81)
    )
    if version != "v1":
        torch.nn.init.normal_(tokenizer.quantizer._codebook.project_down.weight)
    sizes = {"vocab": 81, "speaker": 6, "heads": 2, "hidden": 16, "layers": 1, "up_layers": 1}
    sizes |= {"blocks": 1, "middle": 1, "velocity_heads": 1, "dit_layers": 1, "dit_hidden": 16}
    flow = make_flow(
        FlowConfig(version=version, token_rate=RATES[version], **{**sizes, **FLOWS[version]})
    )
    vocoder = HiFT(replace(PUBLISHED[version], channels=16, f0_channels=8))
    torch.nn.init.constant_(vocoder.f0_predictor.classifier.bias, 150)
    return {
        f"speech_tokenizer_{version}.pt": tokenizer,
        "campplus.pt": CAMPPlus(SPEAKER),
        "flow.pt": flow,
        "hift.pt": vocoder,
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model directory a version."""
    root = tmp_path_factory.mktemp("cosyvoice")
    for version in RATES:
        (root / version).mkdir()
        for name, network in tiny_networks(version).items():
            torch.save(network.state_dict(), root / version / name)
    return root


@pytest.fixture(scope="module")
def codecs(folders):
    return {v: load_codec(f"cosyvoice/{v}", folders / v) for v in RATES}


def sound(seconds, rate=16_000, seed=0):
    t = torch.arange(int(seconds * rate)) / rate
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(seed))
    return Audio((0.3 * torch.sin(2 * math.pi * 200 * t) + 0.1 * noise)[None], rate)


def tokens(codec, count, seed=0):
    ids = torch.randint(0, 81, (count,), generator=torch.Generator().manual_seed(seed))
    return codec.stream(ids, grid=(count,))


def some_voice(codec, prompt=0, seed=1):
    rng = torch.Generator().manual_seed(seed)
    vector = torch.randn(6, generator=rng)
    ids = torch.randint(0, 81, (prompt,), generator=rng)
    return Voice(embedding=vector, tokens=ids, mel=torch.randn(2 * prompt, 80, generator=rng))


@pytest.mark.parametrize("version", RATES)
def test_round_trip_through_a_file(codecs, version, tmp_path):
    """Rate and length are the source's, and the voice travels along."""
    codec, audio = codecs[version], sound(0.9, 22_050)
    (stream,) = codec.encode([audio])
    assert stream.grid == (len(stream.codes),)
    assert len(stream.codes) == pytest.approx(0.9 * RATES[version], abs=2)
    stream.save(tmp_path / "a.tok")
    (again,) = codec.decode([TokenStream.load(tmp_path / "a.tok")], options=Speech(steps=2))
    assert (again.rate, again.samples.shape) == (22_050, audio.samples.shape)
    assert again.samples.abs().max() > 1e-4


def test_what_encoding_keeps_of_a_voice(codecs):
    codec, audio = codecs["v2"], sound(1.5)
    none, speaker, prompt = (
        codec.encode([audio], options=Keep(voice=kind, seconds=1))[0]
        for kind in ("none", "speaker", "prompt")
    )
    assert not none.side
    assert set(speaker.side) == {"voice.embedding"}
    voice = Voice.from_side(prompt.side)
    assert len(voice.mel) == 2 * len(voice.tokens) == 50
    torch.testing.assert_close(speaker.side["voice.embedding"], codec.campplus.embed([audio])[0])


@pytest.mark.parametrize("version", RATES)
def test_batch_equals_single_calls(codecs, version):
    codec = codecs[version]
    streams = [tokens(codec, n, seed=n) for n in (20, 50, 7)]
    sides = [some_voice(codec, 0, seed=n).side() for n in range(3)]
    streams = [replace(stream, side=side) for stream, side in zip(streams, sides)]
    options = Speech(steps=2)
    for stream, item in zip(streams, codec.decode(streams, options=options)):
        (single,) = codec.decode([stream], options=options)
        torch.testing.assert_close(item.samples, single.samples, atol=1e-5, rtol=0)
    hop, frames = codec.config.vocoder.hop, codec.flow.frames(20)
    assert codec.decode(streams[:1], options=options)[0].samples.shape[1] == hop * frames


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize(("pushed", "prompt"), [(1, 0), (40, 11)])
def test_stream_equals_decoding_in_chunks(codecs, version, pushed, prompt):
    codec = codecs[version]
    options = Speech(voice=some_voice(codec, prompt), steps=2)
    whole = tokens(codec, 90)
    (expected,) = codec.decode([whole], options=replace(options, chunked=True))
    stream = codec.decoder_stream(options=options)
    heard, first = [], None
    for start in range(0, 90, pushed):
        ids = whole.codes[start : start + pushed]
        sound = stream.push(codec.stream(ids, grid=(len(ids),)))
        if sound is not None:
            first = start + len(ids) if first is None else first
            heard.append(sound.samples)
    heard.append(stream.finish().samples)
    torch.testing.assert_close(torch.cat(heard, 1), expected.samples, atol=1e-5, rtol=0)
    # The first chunk fills prompt and tokens up to 25, and sees 3 tokens more.
    assert first == 28 if pushed == 1 else 40


def test_stream_gives_back_the_sources_rate(codecs):
    codec, audio = codecs["v2"], sound(1.6, 16_000)
    (whole,) = codec.encode([audio])
    (expected,) = codec.decode([whole], options=Speech(steps=1, chunked=True))
    stream = codec.decoder_stream(options=Speech(steps=1))
    parts = [stream.push(whole), stream.finish()]
    heard = torch.cat([p.samples for p in parts if p is not None], 1)
    assert parts[-1].rate == 16_000
    torch.testing.assert_close(heard, expected.samples, atol=1e-4, rtol=0)


def test_who_speaks(codecs, folders, tmp_path):
    """The options' voice, else a named speaker, else the stream's, else the checkpoint's first."""
    codec = codecs["v2"]
    mine, kept = some_voice(codec, seed=3), some_voice(codec, seed=4)
    first, second = some_voice(codec, seed=5), some_voice(codec, 4, seed=6)
    silent = tokens(codec, 5)
    with pytest.raises(CodecUnavailable, match=r"Voice\.from_audio"):
        codec.decode([silent])
    for name in ("speech_tokenizer_v2.pt", "campplus.pt", "flow.pt", "hift.pt"):
        (tmp_path / name).symlink_to(folders / "v2" / name)
    table = {
        "anna": {"embedding": first.embedding[None]},
        "berta": {
            "flow_embedding": second.embedding[None],
            "flow_prompt_speech_token": second.tokens[None],
            "prompt_speech_feat": second.mel[None],
        },
    }
    torch.save(table, tmp_path / "spk2info.pt")
    spoken = load_codec("cosyvoice/v2", tmp_path)
    side = kept.side()
    cases = [
        (side, Speech(voice=mine), mine),
        (side, Speech(speaker="berta"), second),
        (side, Speech(), kept),
        ({}, Speech(), first),
    ]
    for tensors, options, expected in cases:
        found = spoken.voice_of(tensors, options)
        assert torch.equal(found.embedding, expected.embedding)
        assert torch.equal(found.mel, expected.mel)
    with pytest.raises(ValueError, match="no speaker 'carl'; there are anna, berta"):
        spoken.decode([replace(silent, codec=spoken.identity)], options=Speech(speaker="carl"))
    torch.save([1], tmp_path / "spk2info.pt")
    with pytest.raises(WeightsError, match="not a table of speakers"):
        load_codec("cosyvoice/v2", tmp_path)


def test_a_voice_of_a_recording(codecs):
    for version, codec in codecs.items():
        voice = Voice.from_audio(sound(2.03, 44_100), codec, text="hello")
        assert voice.text == "hello"
        assert len(voice.tokens) == pytest.approx(2.03 * RATES[version], abs=2)
        frames = len(voice.mel)
        assert frames == (int(2.03 * 22_050) // 256 if version == "v1" else 2 * len(voice.tokens))
        (spoken,) = codec.decode([tokens(codec, 10)], options=Speech(voice=voice, steps=1))
        assert spoken.rate == codec.config.mel.rate
    codec = codecs["v2"]
    for wrong, message in (
        (sound(31), "lasts 31.0 s"),
        (Audio(torch.zeros(1, 16_000), 16_000), "silent"),
        (Audio(torch.full((1, 9000), math.nan), 16_000), "not finite"),
        (Audio(torch.empty(1, 0), 16_000), "empty"),
        (sound(0.02), "20.0 ms"),
    ):
        with pytest.raises(ValueError, match=message):
            Voice.from_audio(wrong, codec)


def test_chance_comes_from_outside(codecs):
    for codec in codecs.values():
        stream = replace(tokens(codec, 12), side=some_voice(codec).side())

        def speak(*seeds, codec=codec, stream=stream):
            rng = [torch.Generator().manual_seed(s) for s in seeds] or None
            streams = [stream] * max(1, len(seeds))
            return [a.samples for a in codec.decode(streams, options=Speech(steps=1), rng=rng)]

        one, other = speak(1, 2)
        assert torch.allclose(speak(1)[0], one, atol=1e-5)
        assert not torch.allclose(one, other, atol=1e-3)
        assert torch.equal(speak()[0], speak()[0])


def test_tensor_verbs(codecs):
    codec = codecs["v2"]
    stream = tokens(codec, 10)
    (audio,) = codec.decode([stream], options=Speech(voice=some_voice(codec)))
    samples = codec.detokenize(stream.codes[:, 0][None], [some_voice(codec)])
    torch.testing.assert_close(samples, audio.samples)
    assert codec.code_vectors().shape == (81, 16)


def test_saved_as_one_file(codecs, tmp_path):
    codec = codecs["v3"]
    save_codec(codec, tmp_path / "mini.safetensors", name="cosyvoice/mine")
    again = load_codec(tmp_path / "mini.safetensors")
    assert isinstance(again, CosyVoice)
    assert again.config == codec.config
    (stream,) = again.encode([sound(0.5)])
    assert torch.equal(stream.codes, codec.encode([sound(0.5)])[0].codes)
    (audio,) = again.decode([stream], options=Speech(steps=1))
    (other,) = codec.decode([replace(stream, codec=codec.identity)], options=Speech(steps=1))
    assert torch.equal(audio.samples, other.samples)


@pytest.mark.parametrize("has_speakers", [False, True])
def test_from_the_hub(codecs, folders, monkeypatch, tmp_path, has_speakers):
    """Four files of the repository, and its speakers where it has some."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []
    anna = some_voice(codecs["v2"])
    torch.save({"anna": {"embedding": anna.embedding[None]}}, tmp_path / "spk2info.pt")

    def fetch(repo, name):
        asked.append((repo, name))
        if name != "spk2info.pt":
            return str(folders / "v2" / name.replace(".onnx", ".pt"))
        if not has_speakers:
            raise EntryNotFoundError("no such file")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folders))
    codec = load_codec("cosyvoice/v2")
    names = {"speech_tokenizer_v2.onnx", "campplus.onnx", "flow.pt", "hift.pt", "spk2info.pt"}
    assert {name for _, name in asked} == names
    assert {repo for repo, _ in asked} == {"FunAudioLLM/CosyVoice2-0.5B"}
    assert list(codec.speakers) == (["anna"] if has_speakers else [])


def test_rows_name_their_licences():
    for name in ("v1", "v1-sft", "v1-instruct", "v1-25hz", "v2", "v3"):
        row = json.loads(registry.describe(f"cosyvoice/{name}"))
        assert row["code_licence"] == "Apache-2.0"
        assert "academic" in row["weights_licence"]
        assert len(row["files"]) == 4
    with pytest.raises(CodecUnavailable, match="modelscope"):
        load_codec("cosyvoice/v1-25hz")


def test_bad_input_is_named(codecs, folders):
    codec = codecs["v2"]
    voice = some_voice(codec)
    with pytest.raises(StreamError, match="decode needs"):
        codec.decode([tokens(codecs["v3"], 5)], options=Speech(voice=voice))
    with pytest.raises(ValueError, match="vector of 7"):
        codec.decode([tokens(codec, 5)], options=Speech(voice=Voice(embedding=torch.ones(7))))
    with pytest.raises(StreamError, match="outside"):
        codec.stream(torch.tensor([81]), grid=(1,))
    with pytest.raises(CodecUnavailable, match="cannot stream"):
        codecs["v1"].decoder_stream()
    with pytest.raises(CodecUnavailable, match="encode a recording as a whole"):
        codec.encoder_stream()
    with pytest.raises(ValueError, match="before anything was pushed"):
        codec.decoder_stream().finish()
    with pytest.raises(ValueError, match="steps is 0"):
        Speech(steps=0)
    with pytest.raises(ValueError, match="expected one of them"):
        Speech(voice=voice, speaker="anna")
    with pytest.raises(ValueError, match="disagree about tokens: 6561 and 81"):
        CosyVoice(replace(codec.config, tokenizer=S3Config()))
    (folders / "mixed").mkdir()
    for part in ("speech_tokenizer_v2.pt", "campplus.pt", "hift.pt"):
        (folders / "mixed" / part).symlink_to(folders / "v2" / part)
    (folders / "mixed" / "flow.pt").symlink_to(folders / "v3" / "flow.pt")
    with pytest.raises(WeightsError, match="flow v3, expected v2"):
        load_codec("cosyvoice/v2", folders / "mixed")


def test_any_sound_goes_in(codecs):
    """One sample, silence, clipping, stereo, 8 kHz and 192 kHz: tokens, and speech of the same length."""
    codec = codecs["v2"]
    sounds = [
        Audio(torch.ones(1, 1), 16_000),
        Audio(torch.zeros(1, 4000), 8000),
        Audio(torch.full((2, 9600), 3.0), 192_000),
        Audio(torch.randn(6, 4410), 44_100),
    ]
    streams = codec.encode(sounds)
    for audio, again in zip(sounds, codec.decode(streams, options=Speech(steps=1))):
        assert again.samples.shape == (1, audio.samples.shape[1])
        assert torch.isfinite(again.samples).all()


@pytest.mark.parametrize("version", RATES)
def test_what_is_too_long_is_spoken_in_pieces(codecs, version, monkeypatch):
    """Begin and length are those of one pass; memory is that of a piece."""
    codec, rate = codecs[version], RATES[version]
    options = Speech(voice=some_voice(codec, 0 if version == "v1" else 6), steps=1)
    short, long = tokens(codec, 12), tokens(codec, 50)
    (first,) = codec.decode([short], options=options)
    (whole,) = codec.decode([long], options=options)
    seen = []
    hook = codec.flow.decoder.estimator.register_forward_hook(
        lambda m, x, y: seen.append(y.shape[1])
    )
    monkeypatch.setattr(module, "LONGEST", codec.flow.frames(30))
    monkeypatch.setattr(module, "PIECE", 20 / rate)
    monkeypatch.setattr(module, "CONTEXT", 4 / rate)
    again, same = codec.decode([long, short], options=options)
    hook.remove()
    torch.testing.assert_close(same.samples, first.samples, atol=1e-5, rtol=0)
    assert max(seen) <= codec.flow.frames(30) + 2
    assert again.samples.shape[1] == pytest.approx(
        whole.samples.shape[1], abs=3 * codec.config.mel.hop
    )


def test_a_stream_may_be_longer_than_the_noise_table(codecs, monkeypatch):
    codec = codecs["v2"]
    options = Speech(voice=some_voice(codec, 6), steps=1)
    monkeypatch.setattr(module, "LARGEST_CHUNK", 25)
    monkeypatch.setattr(module, "LONGEST", 140)
    monkeypatch.setattr(module, "CONTEXT", 0.4)
    long = tokens(codec, 120)
    stream = codec.decoder_stream(options=options)
    parts = [stream.push(long), stream.finish()]
    heard = torch.cat([part.samples for part in parts], 1)
    assert heard.shape[1] == 120 * 960
    assert heard.abs().amax() > 0
    monkeypatch.undo()
    (whole,) = codec.decode([long], options=replace(options, chunked=True))
    # Up to where it began anew, with the vocoder's reach to either side, it is the same sound.
    torch.testing.assert_close(
        heard[:, : 32 * 960], whole.samples[:, : 32 * 960], atol=1e-5, rtol=0
    )


def test_groups_bound_the_memory():
    assert groups({0: 5000, 1: 100, 2: 90, 3: 2900}) == [[2, 1], [3], [0]]
    assert groups(dict.fromkeys(range(7), 2000)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert groups({4: 9000}) == [[4]]
