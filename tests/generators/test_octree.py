"""OctGPT's generation: schedule, independence, guidance, given levels, and (with ANYTOK_PARITY) recorded traces."""

import math
from dataclasses import replace

import pytest
import torch

from anytok.codecs.shape.octgpt import OctGPT, OctGPTConfig
from anytok.codecs.shape.vqvae import VQVAE, VQVAEConfig
from anytok.generators import octree
from anytok.generators.octree import (
    Draws,
    OctreeGenerator,
    OctreeOptions,
    OctreeTooBig,
    ShapeRequest,
)
from anytok.generators.octree_windows import Tokens
from tests.generators.test_octree_network import (
    fixture_conditions,
    fixture_network,
    tiny,
    whole_fixture,
)
from tests.golden.load import load_golden

STEPS = OctreeOptions(iterations=(3, 4, 5), temperatures=(1.0, 1.2, 0.5))


@pytest.fixture(scope="module")
def codec() -> OctGPT:
    torch.manual_seed(0)
    network = VQVAEConfig(
        full_depth=1,
        encoder_channels=(8, 8, 8),
        encoder_blocks=(1, 1, 1),
        down_channels=(8, 8, 8),
        down_blocks=(1, 1, 1),
        up_channels=(8, 8, 8, 8, 8),
        up_blocks=(1, 1, 1, 1, 1),
        node_types=5,
        code_bits=4,
    )
    return OctGPT(OctGPTConfig(network=network))


def bound(network, codec):
    """What writes streams of the codec for requests."""
    generator = OctreeGenerator(network)
    return lambda requests, options=None, rng=None: generator.streams(
        codec, requests, options=options, rng=rng
    )


def rngs(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def same(a, b) -> bool:
    return all(torch.equal(p.codes, q.codes) for p, q in zip(a.parts, b.parts))


def test_streams_are_the_codecs(codec):
    streams = bound(tiny(), codec)([0, 2], STEPS, rngs(0, 1))
    for stream in streams:
        codec.check(stream)
        assert len(stream.parts[0].codes) == 8
    assert not same(*streams)


def test_samples_are_independent_of_their_batch(codec):
    generator = bound(tiny(), codec)
    requests = [ShapeRequest(condition=c) for c in (0, 1, 2)]
    together = generator(requests, STEPS, rngs(3, 4, 5))
    for i, request in enumerate(requests):
        assert same(together[i], generator([request], STEPS, rngs(3 + i))[0])
    again = generator(requests[::-1], STEPS, rngs(5, 4, 3))
    assert all(same(a, b) for a, b in zip(together, again[::-1]))


@pytest.mark.parametrize("joint", [False, True])
def test_schedule(codec, joint):
    options = replace(STEPS, joint=joint)
    requests = [ShapeRequest(condition=0), ShapeRequest(condition=1)]
    events = list(OctreeGenerator(tiny(), options=options).run(requests, rng=rngs(0, 1)))
    assert len(events) == 12
    assert [e.iteration for e in events[:3]] == [0, 1, 2]
    assert [e.done for e in events] == [False] * 11 + [True]
    for e in events:
        last = e.iteration + 1 == e.iterations
        sizes = [len(levels[e.depth - 1]) for levels in events[-1].levels]
        part = math.cos(math.pi / 2 * (e.iteration + 1) / e.iterations)
        if joint:
            expected = 0 if last else math.floor(sum(sizes) * part)
            assert sum(e.masked) == expected
        else:
            assert e.masked == tuple(0 if last else max(1, math.floor(n * part)) for n in sizes)
        assert all(len(levels) == e.depth - 1 + e.done for levels in e.levels)


def test_more_iterations_than_tokens(codec):
    options = OctreeOptions(iterations=(20, 3, 3), temperatures=(1.0, 1.0, 1.0))
    (stream,) = bound(tiny(), codec)([ShapeRequest(condition=0)], options)
    codec.check(stream)


def test_given_levels_are_kept(codec):
    generator = bound(tiny(), codec)
    bits = torch.tensor([1, 0, 0, 0, 0, 1, 0, 0])
    requests = [ShapeRequest(condition=0, given=(bits,)), ShapeRequest(condition=1)]
    kept, free = generator(requests, STEPS, rngs(0, 1))
    assert torch.equal(kept.parts[0].codes[:, 0], bits)
    assert same(free, generator(requests[1:], STEPS, rngs(1))[0])
    second = torch.zeros(16, dtype=torch.long).index_fill(0, torch.tensor([3]), 1)
    (stream,) = generator([ShapeRequest(condition=0, given=(bits, second))], STEPS)
    assert [len(p.codes) for p in stream.parts] == [8, 16, 8]
    for given, message in (
        ((bits[:4],), "has 4 values, expected 8 bits"),
        ((bits * 2,), "expected 8 bits"),
        ((bits * 0,), "splits nothing"),
        ((bits, second, second), "gives 3 levels, expected 2 or fewer"),
    ):
        with pytest.raises(ValueError, match=message):
            generator([ShapeRequest(condition=0, given=given)], STEPS)
    with pytest.raises(ValueError, match="set joint=False"):
        generator([ShapeRequest(condition=0, given=(bits,))], replace(STEPS, joint=True))


def test_guidance(codec):
    network = tiny(null=True)
    generator = bound(network, codec)
    plain, guided = (
        generator([ShapeRequest(condition=0)], replace(STEPS, cfg=cfg))[0] for cfg in (1.0, 6.0)
    )
    assert not same(plain, guided)
    # where the condition is none, guidance changes nothing
    none = ShapeRequest()
    free = generator([none, none], replace(STEPS, cfg=6.0), rngs(2, 3))
    assert all(same(a, b) for a, b in zip(free, generator([none, none], STEPS, rngs(2, 3))))
    with pytest.raises(ValueError, match="without a null condition"):
        bound(tiny(), codec)([ShapeRequest(condition=0)], replace(STEPS, cfg=2.0))


def test_features_steer_and_do_not_mix(codec):
    network = tiny(features=6, cross=True, null=True)
    generator = bound(network, codec)
    rng = torch.Generator().manual_seed(0)
    short, long = torch.randn(1, 6, generator=rng) * 9, torch.randn(4, 6, generator=rng) * 9
    requests = [ShapeRequest(condition=c) for c in (short, long, None)]
    together = generator(requests, STEPS, rngs(0, 0, 0))
    assert not same(together[0], together[1])
    assert not same(together[1], together[2])
    for stream, request in zip(together, requests):
        assert same(stream, generator([request], STEPS)[0])


def test_an_empty_level_splits_its_likeliest_node(codec):
    network = tiny()
    with torch.no_grad():
        network.split_head.weight.zero_()
        network.split_head.bias.copy_(torch.tensor([60.0, -60.0]))
    for joint in (False, True):
        requests = [ShapeRequest(condition=0), ShapeRequest(condition=1)]
        options = replace(STEPS, joint=joint)
        for stream in bound(network, codec)(requests, options, rngs(0, 1)):
            assert [int(p.codes.sum()) for p in stream.parts[:2]] == [1, 1]


def test_bounds(codec):
    network = tiny()
    with torch.no_grad():
        network.split_head.bias.copy_(torch.tensor([-60.0, 60.0]))
    generator = bound(network, codec)
    with pytest.raises(OctreeTooBig, match="sample 0 has 64 nodes at depth 2, expected at most 50"):
        generator([ShapeRequest(condition=0)], replace(STEPS, max_nodes=50))
    with pytest.raises(ValueError, match="4 iteration counts given, the network has 3 levels"):
        generator([ShapeRequest(condition=0)])
    with pytest.raises(ValueError, match="reads no words"):
        generator(["chair"], STEPS)
    with pytest.raises(ValueError, match="no requests"):
        generator([], STEPS)
    with pytest.raises(ValueError, match="the network's code_bits is 5"):
        bound(tiny(code_bits=5), codec)([0], STEPS)
    with pytest.raises(ValueError, match="temperatures"):
        replace(STEPS, temperatures=(1.0, 0.0, 1.0))


@whole_fixture
@pytest.mark.parametrize("name", ["uncond", "category_rms_abs", "text_xattn"])
def test_traces_equal_the_published_ones(name, monkeypatch):
    """Orders and picks are replayed; every logit that was drawn from, and the result, must be the published one.

    Equal counts of wrong bits are ranked as the fixture's library ranked them, read off its logits.
    """
    golden = load_golden("shape3d_octgpt")[name]
    monkeypatch.setattr(Tokens, "regrouped", lambda self: self.sample.sort().indices)
    orders, recorded = iter(golden["gen_orders"]), iter(golden["gen_logits"])
    picks, upcoming = iter(golden["gen_picks"]), []

    class Replay(Draws):
        def order(self, n):
            return next(orders)

        def pick(self, logits):
            theirs = upcoming.pop() if upcoming else next(recorded)
            temperature, chosen = next(picks)
            torch.testing.assert_close(logits * temperature, theirs, rtol=0, atol=1e-5)
            return chosen

    own = octree._doubtful

    def doubtful(logits, value, masked, doubt):
        if value.shape[1] == 1:
            return own(logits, value, masked, doubt)
        upcoming.append(next(recorded))
        theirs = upcoming[0].view(-1, logits[0].numel())
        rows = torch.cdist(theirs, logits.flatten(1)).argmin(1)
        again = torch.zeros_like(masked).index_fill(0, rows, True) & ~masked
        counts = (logits.argmax(-1) != value).sum(-1)
        ranked = counts.sort(descending=True).values
        least = ranked[int(doubt[1] * int((counts > 0).sum())) - 1]
        assert (counts[again] >= least).all()
        assert again[(counts > least) & ~masked].all()
        return again

    monkeypatch.setattr(octree, "_doubtful", doubtful)
    cfg = golden["cfg"]
    options = OctreeOptions(
        iterations=tuple(cfg["num_iters"]), temperatures=tuple(cfg["start_temperature"]), joint=True
    )
    vqvae = VQVAE.from_published(golden["vq_state_dict"], {"full_depth": 3})
    codec = OctGPT(OctGPTConfig(network=vqvae.config))
    generator = OctreeGenerator(fixture_network(golden), options=options, draws=Replay)
    streams = generator.streams(codec, fixture_conditions(golden, len(golden["points"])))
    bits = torch.cat([s.parts[0].codes[:, 0] for s in streams])
    assert torch.equal(bits, (golden["gen_children"][3] >= 0).long())
    codes = torch.cat([s.parts[1].codes for s in streams])
    assert torch.equal(codes, (golden["gen_vq_code"] > 0).long())
