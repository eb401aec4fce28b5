"""The S3 tokenizers against the published implementation's numbers; ONNX files, batches, long sound, bad input."""

import itertools
import math
import re
import sys

import pytest
import torch

from anytok.codecs import CodecUnavailable, TokenStream, WeightsError, load_codec
from anytok.codecs.audio.cosyvoice import graph
from anytok.codecs.audio.cosyvoice.s3 import (
    BOUND,
    HOP,
    OVERLAP,
    V1,
    V1_25HZ,
    V2,
    V3,
    WINDOW,
    LongMel,
    Rounding,
    S3Config,
    S3Tokenizer,
    alike,
    infer_config,
    join_windows,
    window_starts,
)
from anytok.codecs.published import Weights, save_codec
from anytok.modalities import Audio
from anytok.modalities.features import whisper_mel
from tests.golden.load import load_golden

MODELS = {
    "speech_tokenizer_v1": {"version": "v1", "rate": 50},
    "speech_tokenizer_v1_25hz": {"version": "v1", "rate": 25},
    "speech_tokenizer_v2_25hz": {"version": "v2"},
    "speech_tokenizer_v3_25hz": {"version": "v3"},
}
TINY = {
    "v1": S3Config(version="v1", mels=16, width=64, heads=1, layers=1, codes=32, rate=50),
    "v2": S3Config(version="v2", mels=16, width=64, heads=1, layers=2, codes=81),
}


@pytest.fixture(scope="module")
def golden():
    return load_golden("audio_s3tokenizer")


@pytest.fixture(scope="module", params=sorted(TINY))
def tiny(request):
    return make(request.param)


def make(version):
    torch.manual_seed(0)
    codec = S3Tokenizer(TINY[version], name=f"cosyvoice/tiny-{version}").eval()
    if version == "v2":  # so that codes differ from frame to frame
        codec.quantizer._codebook.project_down.weight.data *= 20
    return codec


def speech(seconds=None, samples=None, rate=16_000, channels=1, seed=0):
    """Noise whose colour wanders."""
    rng = torch.Generator().manual_seed(seed)
    n = samples if samples is not None else int(seconds * rate)
    t = torch.arange(n) / rate
    noise = torch.randn(channels, n, generator=rng)
    tone = torch.sin(2 * math.pi * (300 + 200 * torch.sin(3 * t)) * t)
    return Audio(0.1 * noise * (1 + torch.sin(5 * t)) + 0.2 * tone, rate)


def batch(golden):
    mels = [golden["mel"], golden["mel2"]]
    x = torch.nn.utils.rnn.pad_sequence([mel.T for mel in mels], batch_first=True).mT
    return x, torch.tensor([mel.shape[1] for mel in mels])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_published_numbers(golden, name):
    model = golden["models"][name]
    codec = S3Tokenizer.from_published(model["state_dict"], MODELS[name])
    hidden, lengths = codec.encoder(*batch(golden))
    assert lengths.tolist() == model["code_len"].tolist()
    every = 1 if model["hidden"].shape[1] == hidden.shape[1] else 12
    ids = codec.tokenize(*batch(golden))
    for row, n in enumerate(lengths.tolist()):
        valid = hidden[row, :n:every]
        torch.testing.assert_close(valid, model["hidden"][row, : len(valid)], atol=1e-5, rtol=1e-5)
        assert torch.equal(ids[row, :n], model["codes"][row, :n].long())


@pytest.mark.parametrize("name", [name for name in MODELS if "v1" not in name])
@torch.no_grad()
def test_published_values_before_rounding(golden, name):
    model = golden["models"][name]
    codec = S3Tokenizer.from_published(model["state_dict"], MODELS[name])
    before = codec.quantizer.project(codec.encoder(*batch(golden))[0])
    near = 0
    for row, n in enumerate(model["code_len"].tolist()):
        expected = model["fsq_pre"][row, :n]
        torch.testing.assert_close(before[row, :n], expected, atol=1e-5, rtol=1e-5)
        near += int(((expected.tanh() * BOUND).abs() - 0.5).abs().lt(1e-4).sum())
    assert near <= 2  # of 1,216 numbers: so the equal tokens above mean something


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_published_long_sound(golden, name):
    model = golden["models"][name]
    codec = S3Tokenizer.from_published(model["state_dict"], MODELS[name])
    ids = codec.tokenize(golden["mel"].repeat(1, 9)[None])
    assert torch.equal(ids, model["long_codes"].long())


@torch.no_grad()
def test_published_tokens_from_sound(golden):
    samples = load_golden("audio_features")["wav16k"].reshape(1, -1)
    samples = samples if samples.is_floating_point() else samples / 2**15
    for name, config in MODELS.items():
        model = golden["models"][name]
        codec = S3Tokenizer.from_published(model["state_dict"], config)
        streams = codec.encode([Audio(samples, 16_000), Audio(samples[:, :30_000], 16_000)])
        for row, stream in enumerate(streams):
            expected = model["codes"][row, : int(model["code_len"][row])].long()
            assert torch.equal(stream.codes[:, 0], expected)


def test_published_sinusoids_where_the_fixture_has_them(golden):
    state = golden["models"]["speech_tokenizer_v1"]["state_dict"]
    codec = S3Tokenizer.from_published(state, {"rate": 50})
    table = codec.encoder.positional_embedding
    step = math.log(10_000) / 63
    assert table[7, 3] == pytest.approx(math.sin(7 * math.exp(-3 * step)), abs=1e-6)
    assert table[7, 67] == pytest.approx(math.cos(7 * math.exp(-3 * step)), abs=1e-6)
    if "encoder.positional_embedding" in state:  # the whole fixture
        fresh = S3Tokenizer(codec.config).encoder.positional_embedding
        torch.testing.assert_close(fresh, state["encoder.positional_embedding"], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("config", "millions", "keys"),
    [(V1, 123.5, 96), (V1_25HZ, 123.5, 96), (V2, 123.7, 102), (V3, 242.0, 198)],
)
def test_published_sizes(config, millions, keys):
    with torch.device("meta"):
        codec = S3Tokenizer(config)
    assert sum(p.numel() for p in codec.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    state = codec.state_dict()
    assert len(state) == keys
    assert infer_config(state, {"rate": config.rate}) == config


def test_rounding_is_exact():
    rounding = Rounding([3, 3])
    edge = math.atanh(0.5 / BOUND)
    z = torch.tensor([[0.0, 0.0], [edge + 1e-4, 0], [edge - 1e-4, 0], [0, -edge - 1e-4], [9, 9]])
    assert rounding.ids(z).tolist() == [4, 5, 4, 1, 8]  # the first digit is the least
    assert rounding.vectors(torch.tensor([5])).tolist() == [[1, 0]]


def test_a_batch_of_unequal_lengths_equals_single_calls(tiny):
    sounds = [speech(samples=n, seed=n) for n in (1, 5000, 16_000, 333, 21_111, 16_000)]
    together = tiny.encode(sounds)
    for sound, stream in zip(sounds, together):
        assert torch.equal(stream.codes, tiny.encode([sound])[0].codes)
    assert len(torch.unique(together[4].codes)) > 5


@torch.no_grad()
def test_padding_is_not_seen(tiny):
    x = torch.randn(2, 16, 90, generator=torch.Generator().manual_seed(1))
    n = torch.tensor([90, 53])
    hidden, lengths = tiny.encoder(x, n)  # what lies beyond row 1's end is noise, not zeros
    alone, _ = tiny.encoder(x[1:, :, :53])
    torch.testing.assert_close(hidden[1, : lengths[1]], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", [3001, 3400, 5599, 5600, 5601, 5750, 6000, 8450])
def test_windows_cover_every_frame_once(frames):
    rate, starts = 25, window_starts(frames)
    ends = [min(start + WINDOW, frames) for start in starts]
    ids = [torch.arange(a // 4, math.ceil(b / 4)) for a, b in zip(starts, ends)]
    joined = join_windows(ids, 2 * rate)
    assert joined.tolist() == list(range(math.ceil(frames / 4)))
    assert ends[-1] == frames
    assert all(a + WINDOW >= b + OVERLAP for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("extra", [0, 77, 159])
def test_long_features_equal_whole_ones(extra):
    sound = speech(samples=31 * 16_000 + extra).samples[0]
    sound[200_000:] *= 1e-3  # so that the floor of the loud half reaches the soft one
    whole, mel = whisper_mel(sound), LongMel(sound, 128)
    assert mel.frames == whole.shape[1]
    for start, stop in ((0, 40), (1, 500), (2600, 3100), (3090, 3100)):
        torch.testing.assert_close(mel[:, start:stop], whole[:, start:stop], atol=1e-5, rtol=0)


def test_long_sound_is_coded_in_windows(tiny):
    rate = tiny.config.rate
    sound = speech(34)
    (stream,) = tiny.encode([sound])
    assert len(stream) == 34 * rate
    assert stream.meta == {"rate": 16_000, "length": 34 * 16_000}
    ids = tiny.tokenize(whisper_mel(sound.samples[0], LongMel(sound.samples[0], 16)._config)[None])
    assert torch.equal(stream.codes[:, 0], ids[0])
    short = speech(3, seed=5)
    assert torch.equal(tiny.encode([short, sound])[0].codes, tiny.encode([short])[0].codes)


@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_other_rates(tiny, rate):
    (stream,) = tiny.encode([speech(1, rate=rate)])
    assert len(stream) == tiny.config.rate
    assert stream.meta == {"rate": rate, "length": rate}


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(tiny, channels):
    sound = speech(0.5, channels=channels)
    (stream,) = tiny.encode([sound])
    assert torch.equal(stream.codes, tiny.encode([sound.mono()])[0].codes)


@pytest.mark.parametrize(
    "samples",
    [torch.zeros(1, 8000), torch.ones(1, 8000), 1e4 * torch.ones(1, 8000), torch.ones(1, 1)],
    ids=["silence", "dc", "clipped", "one sample"],
)
def test_odd_sounds_are_coded(tiny, samples):
    (stream,) = tiny.encode([Audio(samples, 16_000)])
    assert len(stream) == max(1, math.ceil(samples.shape[1] // HOP * tiny.config.rate / 100))


def test_passes_hold_sounds_of_about_one_length():
    mels = [torch.zeros(2, frames) for frames in (100, 120, 160, 900, 1000, 3000)]
    groups = []
    while group := alike(mels[sum(map(len, groups)) :]):
        groups.append([mel.shape[1] for mel in group])
    assert groups == [[100, 120, 160], [900, 1000], [3000]]


def test_bad_input(tiny):
    nan = torch.zeros(1, 1000)
    nan[0, 7] = math.nan
    with pytest.raises(ValueError, match="not finite at sample 7"):
        tiny.encode([Audio(nan, 16_000)])
    with pytest.raises(ValueError, match="empty"):
        tiny.encode([Audio(torch.zeros(1, 0), 16_000)])
    assert tiny.encode([]) == []
    assert not tiny.spec.decodes
    with pytest.raises(CodecUnavailable, match="cosyvoice/v2"):
        tiny.decode(tiny.encode([speech(0.1)]))
    with pytest.raises(ValueError, match="version is 'v4'"):
        S3Config(version="v4")
    with pytest.raises(ValueError, match="rate is 30"):
        S3Config(rate=30)
    with pytest.raises(ValueError, match="power of 3"):
        S3Config(codes=6560)
    with pytest.raises(ValueError, match="positions is 100"):
        S3Config(version="v1", codes=4096, positions=100)
    with pytest.raises(ValueError, match="multiple of 2 · heads"):
        S3Config(heads=7)


def test_streams_and_codecs_survive_a_file(tiny, tmp_path):
    save_codec(tiny, tmp_path / "tiny.safetensors", name=tiny.spec.name)
    codec = load_codec(tmp_path / "tiny.safetensors")
    assert codec.config == tiny.config
    (stream,) = codec.encode([speech(1)])
    assert torch.equal(stream.codes, tiny.encode([speech(1)])[0].codes)
    stream.save(tmp_path / "a.tok")
    back = TokenStream.load(tmp_path / "a.tok")
    assert torch.equal(back.codes, stream.codes)
    assert back.grid == (codec.config.rate,)


def test_code_vectors_are_the_quantisers(tiny):
    vectors = tiny.code_vectors()
    assert len(vectors) == tiny.config.codes
    if tiny.config.version == "v2":
        assert vectors[0].tolist() == [-1] * 4
        assert vectors[1].tolist() == [0, -1, -1, -1]


def test_gradients_reach_every_parameter():
    codec = make("v2")
    x = torch.randn(1, 16, 40)
    hidden, _ = codec.encoder(x)
    codec.quantizer.rounding(codec.quantizer.project(hidden)).vectors.square().mean().backward()
    assert [k for k, p in codec.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["cosyvoice/s3-v2", "cosyvoice/s3-v3"])
def test_torch_files_load_by_name(golden, name, tmp_path):
    version = name[-2:]
    state = golden["models"][f"speech_tokenizer_{version}_25hz"]["state_dict"]
    torch.save(state, tmp_path / f"speech_tokenizer_{version}.pt")
    codec = load_codec(name, path=tmp_path)
    assert (codec.spec.name, codec.config.version, codec.spec.rate) == (name, version, 25)


def test_v1_has_two_rates(golden, tmp_path):
    state = golden["models"]["speech_tokenizer_v1"]["state_dict"]
    torch.save(state, tmp_path / "speech_tokenizer_v1.pt")
    for name, rate in (("cosyvoice/s3-v1", 50), ("cosyvoice/s3-v1-25hz", 25)):
        assert load_codec(name, path=tmp_path).spec.rate == rate


def test_foreign_weights_are_refused(golden, tmp_path):
    state = dict(golden["models"]["speech_tokenizer_v2_25hz"]["state_dict"])
    with pytest.raises(WeightsError, match="not an S3 tokenizer"):
        infer_config({"a": torch.zeros(1)}, {})
    with pytest.raises(WeightsError, match="expected an S3 v1"):
        S3Tokenizer.from_published(state, {"version": "v1"})
    with torch.device("meta"):
        six = S3Tokenizer(V2).state_dict()
    with pytest.raises(WeightsError, match="6 blocks of an S3 v2, expected an S3 v3"):
        infer_config(six, {"version": "v3"}, "speech_tokenizer_v2.onnx")
    del state["encoder.conv1.bias"]
    with pytest.raises(WeightsError, match=r"encoder\.conv1\.bias"):
        S3Tokenizer.from_published(state)


# ONNX: graphs with the operations and names that the published exports have.


def onnx_file(codec, path, style):
    """A graph that holds `codec`'s weights; its operations are not connected, since only constants are read."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    state = {k: v.detach() for k, v in codec.state_dict().items()}
    nodes, initializers = [], []

    def constant(tensor, name=None, node=False):
        name = name or f"onnx::{len(initializers) + len(nodes)}_{style}"
        value = numpy_helper.from_array(tensor.contiguous().numpy(), name)
        if node:
            nodes.append(helper.make_node("Constant", [], [name], value=value))
        else:
            initializers.append(value)
        return name

    def node(op, name, *inputs, **attributes):
        nodes.append(helper.make_node(op, list(inputs), [f"{name}_out"], name=name, **attributes))

    def linear(path, key, separate=False):
        node("MatMul", f"{path}/MatMul", "x", constant(state[f"{key}.weight"].T))
        if f"{key}.bias" in state:
            node("Add", f"{path}/Add", constant(state[f"{key}.bias"], node=separate), "x")

    for conv in ("conv1", "conv2"):
        weight, bias = (constant(state[f"encoder.{conv}.{p}"]) for p in ("weight", "bias"))
        node("Conv", f"/{conv}/Conv", "x", weight, bias)
    if style == "v1":
        table = constant(state["encoder.positional_embedding"], "encoders.positional_embedding")
        node("Slice", "/Slice", table, "from", "to")
    for i in range(codec.config.layers):
        for norm in ("attn_ln", "mlp_ln"):
            scale, shift = (state[f"encoder.blocks.{i}.{norm}.{p}"] for p in ("weight", "bias"))
            where = f"/blocks.{i}/{norm}"
            if style == "v2":
                names = [constant(scale), constant(shift)]
                node("LayerNormalization", f"{where}/LayerNormalization", "x", *names, epsilon=3e-6)
            else:
                last = "Add_1" if style == "v1" else "Add"
                node(
                    "Add", f"{where}/Add{'_0' * (style == 'v3')}", "x", constant(torch.tensor(4e-6))
                )
                node("Mul", f"{where}/Mul", "x", constant(scale))
                node("Add", f"{where}/{last}", "x", constant(shift, node=style == "v3"))
        for part in ("query", "key", "value", "out"):
            linear(f"/blocks.{i}/attn/{part}", f"encoder.blocks.{i}.attn.{part}", style == "v3")
        node("Mul", f"/blocks.{i}/attn/Mul", "x", constant(torch.tensor(64**-0.25)))
        if style != "v1":
            kernel = state[f"encoder.blocks.{i}.attn.fsmn_block.weight"]
            name = f"encoder.blocks.{i}.attn.fsmn_block.weight"
            node("Conv", f"/blocks.{i}/attn/fsmn_block/Conv", "x", constant(kernel, name))
        linear(f"/blocks.{i}/mlp/mlp.0", f"encoder.blocks.{i}.mlp.0")
        linear(f"/blocks.{i}/mlp/mlp.2", f"encoder.blocks.{i}.mlp.2")
    if style == "v1":
        where = "/quantizer/rq/model/layers.0/_codebook"
        book = constant(state["quantizer._codebook.embed"].T)
        node("Pow", f"{where}/Pow_1", book, constant(torch.tensor(2.0)))
        node("MatMul", f"{where}/MatMul", "x", book)
    else:
        key = "quantizer._codebook.project_down"
        node("MatMul", "/quantizer/project_in/MatMul", "x", constant(state[f"{key}.weight"].T))
        bias = constant(state[f"{key}.bias"], "quantizer.project_in.bias")
        node("Add", "/quantizer/project_in/Add", bias, "x")
        node("Add", "/quantizer/Add", "x", constant(torch.ones(4)))
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "s3", ports[:1], ports[1:], initializers))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("style", "version"), [("v1", "v1"), ("v2", "v2"), ("v3", "v2")])
def test_onnx_files_are_read(style, version, tmp_path):
    codec = make(version)
    path = onnx_file(codec, tmp_path / "speech_tokenizer.onnx", style)
    name = "cosyvoice/s3-v1" if version == "v1" else f"cosyvoice/s3-{style}"
    back = load_codec(name, path=path)
    assert back.spec.name == name
    assert back.config.attn_eps == (3e-6 if style == "v2" else 4e-6)
    expected = codec.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for key, value in back.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_an_onnx_file_of_something_else_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = onnx_file(make("v2"), tmp_path / "a.onnx", "v2")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=r"a\.onnx"):
        load_codec("cosyvoice/s3-v2", path=path)
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.save(empty, path)
    with pytest.raises(WeightsError, match="no constants"):
        load_codec("cosyvoice/s3-v2", path=path)


def test_without_the_onnx_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "speech_tokenizer_v2.onnx").write_bytes(b"\x08\x07")
    with pytest.raises(CodecUnavailable, match=re.escape("pip install 'anytok[onnx]'")):
        load_codec("cosyvoice/s3-v2", path=tmp_path)


def test_scopes_lose_their_doubles():
    tensors = {"0 MatMul 1 blocks.0.mlp.0 onnx::1": torch.zeros(2, 3)}
    (found,) = graph.constants(tensors)
    assert (found.op, found.slot, found.scope, found.initializer) == (
        "MatMul",
        1,
        "blocks.0.mlp.0",
        "onnx::1",
    )
    assert not graph.is_graph(Weights(tensors))
