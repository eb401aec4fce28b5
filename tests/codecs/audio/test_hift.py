"""HiFT against the published implementation's numbers; noise tables, batches, streaming, types, bad weights."""

import math

import pytest
import torch

from anytok.codecs import WeightsError
from anytok.codecs.audio.cosyvoice import hift
from anytok.codecs.audio.cosyvoice.hift import (
    PUBLISHED,
    HiFT,
    HiFTConfig,
    Noise,
    SourceNoise,
    reach,
)
from anytok.codecs.layers.conv import train_with_weight_norm
from tests.golden.load import load_golden

VERSIONS = ("v1", "v2", "v3")
# Parameters of the published vocoders, weight norm's gains included.
COUNTS = {"v1": 20_460_591, "v2": 20_821_295, "v3": 20_779_887}


@pytest.fixture(scope="module")
def golden():
    return load_golden("audio_cosy_hift")["models"]


@pytest.fixture(scope="module")
def nets(golden):
    return {v: HiFT.from_published(golden[v]["state_dict"]) for v in VERSIONS}


def thin(x, like):
    """Every so many numbers of the last axis, as the golden kept them."""
    return x[..., :: math.ceil(x.shape[-1] / like.shape[-1])]


def close(x, golden, tolerance):
    torch.testing.assert_close(thin(x, golden), golden, atol=tolerance, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_pitch(nets, golden, version):
    """Around 120 Hz, in float32."""
    close(nets[version].pitch(golden[version]["mel"]), golden[version]["f0"], 2e-5)


@torch.no_grad()
def test_v1_with_its_noise_drawn_again(nets, golden):
    """Seed 9, one uniform phase a harmonic, then normal numbers harmonic by harmonic."""
    data, net = golden["v1"], nets["v1"]
    rng = torch.Generator().manual_seed(9)
    phase = math.pi * (2 * torch.rand(1, 9, generator=rng) - 1)
    phase[:, 0] = 0
    noise = Noise(phase, torch.randn(1, 9, 30 * 256, generator=rng).mT)
    source = net.source(net.pitch(data["mel"]), noise)
    close(source, data["s"][:, 0], 2e-5)
    close(net.decode(data["mel"], source), data["y"], 2e-5)


@torch.no_grad()
def test_v2_with_its_noise_drawn_again(nets, golden):
    """Seed 9, start phases that do not matter, then normal numbers by the slow path of a transposed tensor."""
    data, net = golden["v2"], nets["v2"]
    with torch.random.fork_rng():
        torch.manual_seed(9)
        torch.rand(1, 9)
        noise = torch.randn_like(torch.empty(1, 9, 14_400).mT)
    source = net.source(net.pitch(data["mel"]), Noise(torch.zeros(1, 9), noise))
    # The published phases are summed in float32.
    close(source, data["s"][:, 0], 1e-4)
    close(net.decode(data["mel"], source), data["y"], 5e-4)


@torch.no_grad()
def test_v3_with_the_published_tables(nets):
    """The recipe is held to what the published yaml draws."""
    tables = load_golden("audio_cosy3_noise_tables")["sine_head"][0]
    noise = SourceNoise(hift.V3, None).draw(100)
    assert torch.equal(noise[:: 48_000 // len(tables)], tables)


@torch.no_grad()
def test_v3_samples(nets, golden):
    """The fixture's vocoder was built alone: its table follows 8,298 draws of other things from seed 0."""
    data, net = golden["v3"], nets["v3"]
    rng = torch.Generator().manual_seed(0)
    torch.rand(8298, generator=rng)
    noise = Noise(torch.zeros(1, 9), torch.rand(1, 14_400, 9, generator=rng))
    source = net.source(net.pitch(data["mel"]), noise)
    close(source, data["s"][:, 0], 3e-5)
    y = net.decode(data["mel"], source)
    # Rounding in the source's phases, 2e-5, is what the samples differ by, not the network (2e-6 from one source).
    close(y, data["y"], 1e-4)
    close(y[:, :10_560], data["y_nofinal"], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_batch_equals_single_calls(nets, version):
    net, rng = nets[version], torch.Generator().manual_seed(1)
    mels = [torch.randn(1, 80, t, generator=rng) for t in (23, 30, 7)]
    noises = [net.draw(m.shape[-1], torch.Generator().manual_seed(i)) for i, m in enumerate(mels)]
    singles = [net(mel, noise)[0] for mel, noise in zip(mels, noises)]
    n, longest = torch.tensor([23, 30, 7]), 30 * net.config.hop
    # Whatever lies beyond a row's end must not matter.
    batch = torch.stack(
        [torch.nn.functional.pad(m[0], (0, 30 - m.shape[-1]), value=3) for m in mels]
    )
    samples = torch.stack(
        [
            torch.nn.functional.pad(x.samples[0], (0, 0, 0, longest - x.samples.shape[1]), value=5)
            for x in noises
        ]
    )
    both = net(batch, Noise(torch.cat([x.phase for x in noises]), samples), n)
    for row, single in zip(both, singles):
        torch.testing.assert_close(row[: len(single)], single, atol=1e-5, rtol=0)
        assert not row[len(single) :].any()


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [13, 60])
def test_stream_equals_the_whole(nets, version, size):
    net = nets[version]
    mel = torch.randn(80, 60, generator=torch.Generator().manual_seed(2))
    whole = net(mel[None], net.draw(60, torch.Generator().manual_seed(3)))[0]
    stream = net.stream(torch.Generator().manual_seed(3))
    pieces = [stream.push(part) for part in mel.split(size, 1)] + [stream.finish()]
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-5, rtol=0)
    # What has not come yet holds sound back by no more than the network's reach.
    late = sum(reach(net.config)[1:]) + hift.f0_reach(net.config)[1] + 1
    if size < 60:
        assert len(pieces[-1]) <= late * net.config.hop


@torch.no_grad()
def test_v3_prefix_is_final(nets, golden):
    """Published: 30 frames give 14,400 samples, or 10,560 where more will come, the same ones."""
    data, net = golden["v3"], nets["v3"]
    stream = net.stream(torch.Generator().manual_seed(0))
    first = stream.push(data["mel"][0])
    assert len(first) >= 10_560
    assert len(first) + len(stream.finish()) == 14_400


def test_stream_memory_is_constant(nets):
    stream = nets["v2"].stream(torch.Generator().manual_seed(0))
    sizes = set()
    for _ in range(12):
        stream.push(torch.randn(80, 10))
        sizes.add(stream._mel.shape[-1])
    assert max(sizes) < 80


@pytest.mark.parametrize("version", VERSIONS)
def test_published_size(version):
    with torch.device("meta"):
        net = HiFT(PUBLISHED[version])
    convs = [
        m
        for name, m in net.named_modules()
        if isinstance(m, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)) and "source_downs" not in name
    ]
    gains = sum(len(conv.weight) for conv in convs)
    assert sum(p.numel() for p in net.parameters()) + gains == COUNTS[version]


def test_all_spellings_of_weight_norm_load(nets, golden):
    new = golden["v2"]["state_dict"]
    old = {
        "generator."
        + k.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): v
        for k, v in new.items()
    }
    fused = nets["v2"].state_dict()
    for state in (old, fused):
        other = HiFT.from_published(state).state_dict()
        assert all(torch.equal(other[k], v) for k, v in fused.items())


def test_weights_stay_float32(nets):
    net = HiFT(HiFTConfig(channels=16, f0_channels=8)).to(torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert {p.dtype for p in net.to(torch.float64).parameters()} == {torch.float64}


def test_gradients_reach_every_weight():
    torch.manual_seed(0)
    for version in VERSIONS:
        config = PUBLISHED[version]
        net = HiFT(HiFTConfig(**{**vars(config), "channels": 16, "f0_channels": 8}))
        train_with_weight_norm(net)
        mel = torch.randn(1, 80, 12)
        f0 = net.pitch(mel)
        noise = net.draw(12, torch.Generator().manual_seed(0))
        y = net.decode(mel, net.source(f0.detach(), noise))
        (y.square().mean() + f0.mean()).backward()
        missing = [k for k, p in net.named_parameters() if p.grad is None]
        assert not missing


def test_other_weights_are_named(golden):
    state = golden["v1"]["state_dict"]
    with pytest.raises(WeightsError, match="HiFT v1, expected a HiFT v3"):
        HiFT.from_published(state, {"version": "v3"})
    with pytest.raises(WeightsError, match="not a HiFT vocoder"):
        HiFT.from_published({"a.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="conv_post"):
        HiFT.from_published({k: v for k, v in state.items() if "conv_post" not in k})
    with pytest.raises(ValueError, match="differ in length"):
        HiFTConfig(ups=(8, 8))
