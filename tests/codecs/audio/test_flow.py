"""The flows against the published implementation's numbers; batches, chunks, guidance, published sizes, bad input."""

import math
from dataclasses import replace

import pytest
import torch

from anytok.codecs import WeightsError
from anytok.codecs.audio.cosyvoice import conformer, flow
from anytok.codecs.audio.cosyvoice.dit import Rotary, rotate_first
from anytok.codecs.audio.cosyvoice.flow import PUBLISHED, Flow, make_flow
from anytok.codecs.audio.cosyvoice.voice import Voice
from tests.golden.load import load_golden

VERSIONS = ("v1", "v2", "v3")
CAUSAL = ("v2", "v3")
VELOCITY = {"v1": 81_878_864, "v2": 71_302_480, "v3": 331_142_224}


@pytest.fixture(scope="module")
def golden():
    return load_golden("audio_cosy_flow")


@pytest.fixture(scope="module")
def flows(golden):
    states = {v: golden["models"][v]["state_dict"] for v in VERSIONS}
    return {v: Flow.from_published(state, {"head_width": 16}) for v, state in states.items()}


@pytest.fixture(scope="module")
def voices(golden):
    mels = {v: golden["models"][v]["prompt_feat"][0] for v in VERSIONS}
    return {
        v: Voice(embedding=golden["emb"][0], tokens=golden["ptok"][0], mel=mels[v]) for v in mels
    }


def noise(net, version, frames=110):
    """As the published runs drew it: seed 7 for v1, else the table."""
    if version == "v1":
        return torch.randn(80, frames, generator=torch.Generator().manual_seed(7))
    return net.noise_table(torch.Generator().manual_seed(0))


def close(mel, golden, tolerance=1e-5):
    golden = golden[0]
    torch.testing.assert_close(mel[:: 80 // len(golden)], golden, atol=tolerance, rtol=0)


def test_v1_mel(flows, voices, golden):
    mel = flows["v1"].generate([golden["tok"][0]], [voices["v1"]], [noise(flows["v1"], "v1")])[0]
    assert mel.shape == (80, 91)
    close(mel, golden["models"]["v1"]["mel"])


@pytest.mark.parametrize("version", CAUSAL)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("last", [True, False])
def test_mel(flows, voices, golden, version, chunked, last):
    net = flows[version]
    mel = net.generate(
        [golden["tok"][0]], [voices[version]], [noise(net, version)], chunked=chunked, last=last
    )[0]
    assert mel.shape == (80, 106 if last else 100)
    close(mel, golden["models"][version][f"mel_{chunked}_{last}"])


def test_the_noise_table(flows):
    kept = load_golden("audio_cosy3_noise_tables")["rand_noise_head"][0]
    table = flows["v3"].noise_table(torch.Generator().manual_seed(0))
    assert table.shape == (80, 15_000)
    assert torch.equal(table[:: 80 // len(kept), : 2000 : 2000 // kept.shape[1]], kept)


@pytest.mark.parametrize("version", VERSIONS)
def test_batch_equals_single_calls(flows, voices, golden, version):
    net, token = flows[version], golden["tok"][0]
    rows = [token, token.flip(0)[:30], token[7:10]]
    who = [voices[version], Voice(embedding=-golden["emb"][0]), voices[version]]
    chunks = [False] if version == "v1" else [False, True]
    for chunked in chunks:
        table = net.noise_table(torch.Generator().manual_seed(0))
        batch = net.generate(rows, who, [table] * 3, chunked=chunked)
        for row, voice, mel in zip(rows, who, batch):
            single = net.generate([row], [voice], [table], chunked=chunked)[0]
            torch.testing.assert_close(mel, single, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", CAUSAL)
def test_a_prefix_in_chunks_is_final(flows, voices, golden, version):
    """11 tokens of prompt and 14 make the first chunk of 25."""
    net, token, voice = flows[version], golden["tok"][0], voices[version]
    whole = net.generate([token], [voice], [noise(net, version)], chunked=True)[0]
    for tokens in (14, 39):
        first = net.generate(
            [token[: tokens + 3]], [voice], [noise(net, version)], chunked=True, last=False
        )[0]
        torch.testing.assert_close(first, whole[:, : 2 * tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_no_guidance_needs_no_second_velocity(flows, voices, golden, version):
    """Guidance 0 runs half a batch, and is what a tiny guidance tends to."""
    net, rows = flows[version], [golden["tok"][0][:20]]
    seen = []
    hook = net.decoder.estimator.register_forward_hook(lambda m, x, y: seen.append(len(y)))
    table = [noise(net, version)]
    none = net.generate(rows, [voices[version]], table, guidance=0)[0]
    little = net.generate(rows, [voices[version]], table, guidance=1e-6)[0]
    hook.remove()
    assert seen == [1] * 10 + [2] * 10
    torch.testing.assert_close(none, little, atol=1e-4, rtol=0)


def test_only_the_first_head_turns():
    x = torch.randn(1, 5, 64)
    turns = Rotary(32)(x)
    turned = rotate_first(x, turns)
    assert torch.equal(turned[..., 32:], x[..., 32:])
    assert torch.equal(turned[:, 0], x[:, 0])
    assert not torch.allclose(turned[:, 1:, :32], x[:, 1:, :32])
    # Pairs (0, 1), (2, 3) keep their lengths.
    pairs = turned[..., :32].unflatten(-1, (16, 2)).norm(dim=-1)
    torch.testing.assert_close(pairs, x[..., :32].unflatten(-1, (16, 2)).norm(dim=-1))


def test_half_precision_keeps_angles_and_stays_near(flows, golden):
    """In bf16 a mel stays within a few percent of its range; angles are not rounded."""
    net = make_flow(flows["v3"].config).to(torch.bfloat16)
    assert net.decoder.estimator.rotary_embed.inv_freq.dtype == torch.float32
    assert net.spk_embed_affine_layer.weight.dtype == torch.bfloat16
    net.load_state_dict(flows["v3"].state_dict())
    voice, table = [Voice(embedding=golden["emb"][0])], [noise(net, "v3")]
    rows = [golden["tok"][0][:20]]
    exact = flows["v3"].generate(rows, voice, table)[0]
    rough = net.generate(rows, voice, table)[0]
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05 * exact.std()


def test_relative_attention_in_blocks_of_queries(monkeypatch):
    torch.manual_seed(0)
    layer = conformer.Layer(16, 2, 32)
    torch.nn.init.normal_(layer.self_attn.pos_bias_u)
    torch.nn.init.normal_(layer.self_attn.pos_bias_v)
    x, n = torch.randn(2, 37, 16), torch.tensor([37, 20])
    table = conformer.distances(37, 16, x)
    whole = layer(x, table, n, 10)
    monkeypatch.setattr(conformer, "QUERIES", 8)
    torch.testing.assert_close(layer(x, table, n, 10), whole, atol=1e-5, rtol=1e-5)


def test_distances_against_a_plain_loop():
    x, width, length = torch.randn(1, 1, 4, 2 * 4 - 1), 6, 4
    table = conformer.distances(length, width, torch.ones(1))
    for row, step in enumerate(range(length - 1, -length, -1)):
        for i in range(width // 2):
            angle = step / 10_000 ** (2 * i / width)
            assert table[row, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[row, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    by_key = conformer.shifted(x)
    for i in range(4):
        for j in range(4):
            assert by_key[0, 0, i, j] == x[0, 0, i, length - 1 - i + j]


@pytest.mark.parametrize("version", VERSIONS)
def test_published_size(version):
    with torch.device("meta"):
        net = make_flow(PUBLISHED[version])
        state = net.state_dict()
    assert sum(p.numel() for p in net.decoder.parameters()) == VELOCITY[version]
    assert flow.infer_config(state, {}) == PUBLISHED[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_reach_every_weight(flows, version):
    net = make_flow(replace(flows[version].config))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, 64, (2, 12))
    mu, _ = net.encode(ids, None)
    if version == "v1":
        mu = torch.stack([net.stretch(row, 20) for row in mu])
    speaker = net.speaker(torch.randn(2, 192))
    frames = mu.shape[1]
    x = torch.randn(2, frames, 80)
    y = net.velocity(x, mu, speaker, torch.randn(2, frames, 80), torch.rand(2))
    y.square().mean().backward()
    assert not [k for k, p in net.named_parameters() if p.grad is None]


def test_bad_input_is_named(flows, voices, golden):
    net, token, voice = flows["v2"], golden["tok"][0], voices["v2"]
    table = net.noise_table(torch.Generator().manual_seed(0))
    cases = [
        (token[:0], voice, {}, "0 tokens"),
        (token[:3], voice, {"last": False}, "3 tokens"),
        (token + 64, voice, {}, "outside 0...63"),
        (token.repeat(150), voice, {}, "at most 15000"),
        (token, Voice(embedding=torch.ones(7)), {}, "vector of 7"),
        (token, replace(voice, mel=voice.mel[:5]), {}, "5 frames for 11 tokens"),
    ]
    for tokens, who, options, message in cases:
        with pytest.raises(ValueError, match=message):
            net.generate([tokens], [who], [table], **options)
    with pytest.raises(ValueError, match="noise of row 0 is too short"):
        net.generate([token], [voice], [table[:, :9]])
    with pytest.raises(ValueError, match=r"v1 flow .* cannot stream"):
        flows["v1"].generate([token], [voices["v1"]], [table], chunked=True)


def test_voice_says_what_is_wrong():
    vector = torch.ones(192)
    side = Voice(
        embedding=vector, tokens=torch.arange(4), mel=torch.ones(8, 80), text="Grüß Gott"
    ).side()
    again = Voice.from_side(side)
    assert again is not None
    assert again.text == "Grüß Gott"
    assert torch.equal(again.tokens, torch.arange(4))
    assert Voice.from_side({}) is None
    assert not len(again.speaker.tokens)
    assert torch.equal(again.speaker.embedding, vector)
    for wrong, message in (
        ({"embedding": torch.ones(1, 192)}, "one vector"),
        ({"embedding": vector, "tokens": torch.arange(4)}, "expected both or neither"),
        ({"embedding": vector * math.nan}, "NaN"),
        ({"embedding": vector, "tokens": torch.ones(4), "mel": torch.ones(8, 80)}, "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            Voice(**wrong)


def test_other_weights_are_named(golden):
    state = golden["models"]["v3"]["state_dict"]
    with pytest.raises(WeightsError, match="flow v3, expected v2"):
        Flow.from_published(state, {"version": "v2"})
    with pytest.raises(WeightsError, match="not a CosyVoice flow"):
        Flow.from_published({"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"proj_out\.bias"):
        Flow.from_published({k: v for k, v in state.items() if not k.endswith("proj_out.bias")})
    trained = {**state, "epoch": torch.tensor(3), "step": torch.tensor(9)}
    assert Flow.from_published(trained).config == Flow.from_published(state).config
