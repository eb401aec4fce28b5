"""Next-X sampling against the published sampler's traces; batches; guidance that is not computed where it is 1."""

from itertools import pairwise

import pytest
import torch

from anytok.backbone.entities import KINDS
from anytok.backbone.xar import XAR, XARConfig
from anytok.codecs.image.kl16 import KL16, KL16Config
from anytok.generators import next_x
from anytok.generators.next_x import LatentRequest, NextX, NextXOptions, pictures
from anytok.generators.published import load_generator
from tests.golden.load import load_golden


@pytest.fixture(scope="module")
def golden():
    return load_golden("backbone_xar")


@pytest.fixture(scope="module")
def network(golden):
    return XAR.from_published(golden["state_dict"])


@pytest.fixture
def calls(network, monkeypatch):
    """Positions and times of each call of the network."""
    made, forward = [], network.forward

    def recorded(z, labels, times, **others):
        made.append((z.shape[0], z.shape[1], times[0].tolist()))
        return forward(z, labels, times, **others)

    monkeypatch.setattr(network, "forward", recorded)
    return made


def replay(draws, monkeypatch):
    """The recorded draws, whole batches, in the place of each row's own."""
    rng = torch.Generator().manual_seed(draws) if isinstance(draws, int) else None
    left = None if rng else iter(draws)

    def normal(rngs, shape, dtype):
        whole = (len(rngs), *shape)
        one = torch.randn(whole, generator=rng, dtype=dtype) if left is None else next(left)
        assert (one.shape, one.dtype) == (whole, dtype)
        return one

    monkeypatch.setattr(next_x, "normal", normal)


def tiny(**changes):
    torch.manual_seed(0)
    defaults = {"channels": 4, "grid": (4, 4), "width": 32, "ffn": 48, "heads": 2, "classes": 5}
    sizes = {"encoder_layers": 1, "decoder_layers": 1}
    return XAR(XARConfig(**{**defaults, **sizes, **changes})).eval()


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


@pytest.mark.parametrize("name", ["s5_cfg3", "s3_cfg1"])
def test_published_traces(network, golden, calls, monkeypatch, name):
    sample = golden["samples"][name]
    replay(sample["draws"], monkeypatch)
    requests = [LatentRequest(labels=(int(label),)) for label in sample["label"]]
    options = NextXOptions(steps=sample["num_steps"], cfg=sample["cfg"])
    latents = NextX(network).sample(requests, options)
    tokens = sample["tokens"]
    torch.testing.assert_close(latents[: len(tokens)], tokens, atol=2e-6, rtol=0)
    assert len(calls) == sample["network_calls"]
    # the golden keeps (times, thousandths) of a call, the whole fixture more before them
    assert [times for _, _, times in calls] == [list(call[-1]) for call in sample["calls"]]
    # two rows a picture from the second cell on, and only with guidance; the official code always runs both
    guided = sample["cfg"] > 1
    steps = sample["num_steps"]
    assert [rows for rows, _, _ in calls] == [2] * steps + [4 if guided else 2] * (3 * steps)
    lengths = [n for _, n, _ in calls]
    assert lengths == [64] * steps + 3 * [128, *[64] * (steps - 1)]


def test_published_ode(network, golden, monkeypatch):
    ode = golden["ode"]
    # 6 Euler steps of the first cell alone, labels 7 and 42, constant guidance 2
    latents = ode["latents"]
    draws = 9 if isinstance(latents, dict) else [latents]
    replay(draws, monkeypatch)
    options = NextXOptions(steps=6, cfg=2.0, schedule="constant", method="ode")
    events = NextX(network).run([LatentRequest(labels=(n,)) for n in (7, 42)], options)
    first = torch.stack([next(events).latents, next(events).latents])
    events.close()
    cell = network.entities.split(first)[:, :64]
    torch.testing.assert_close(cell.double(), ode["out"].double(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["sde", "ode"])
@torch.no_grad()
def test_a_reference_without_cache_shared_modulations_and_skipped_rows(kind, method):
    """The sampler written out: the whole sequence is computed anew in every step, guided or not."""
    network = tiny(entity=kind, size={"cell": 2}.get(kind), grid=(4, 3))
    entities, steps, cfg = network.entities, 3, 2.5
    options = NextXOptions(steps=steps, cfg=cfg, method=method)
    latents = NextX(network).sample([LatentRequest(labels=(2,))], options, seeds(8))

    rng = torch.Generator().manual_seed(8)
    times = options.times().tolist()
    done = torch.zeros(1, 0, 4)
    for entity, size in enumerate(entities.sizes):
        x = torch.randn(size, 4, generator=rng)[None].double()
        weight = 1 + (cfg - 1) * entity / (len(entities) - 1) if len(entities) > 1 else cfg
        for now, after in pairwise(times):
            rest = torch.zeros(1, sum(entities.sizes[entity + 1 :]), 4)
            whole = torch.cat([done, x.float(), rest], 1)
            clock = torch.full((1, len(entities)), 500)
            clock[:, :entity], clock[:, entity] = 0, int(torch.tensor(now).float() * 1000)
            v, free = (network(whole, torch.tensor([c]), clock) for c in (2, 5))
            start = done.shape[1]
            v, free = (t[:, start : start + size].double() for t in (v, free))
            v = free + weight * (v - free)
            if method == "ode":
                x = x + (after - now) * v
                continue
            score = -(x + (1 - now) * v) / now
            x = x + (after - now) * (v - now * score)
            if after > 0:
                noise = torch.randn(size, 4, generator=rng, dtype=torch.float64)
                x = x + (2 * now) ** 0.5 * (now - after) ** 0.5 * noise
        done = torch.cat([done, x.float()], 1)
    torch.testing.assert_close(latents, entities.join(done), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_neighbours(kind):
    generator = NextX(tiny(entity=kind))
    requests = [LatentRequest(labels=labels) for labels in ((1,), (), (0, 4))]
    options = NextXOptions(steps=2)
    together = generator.sample(requests, options, seeds(1, 2, 3))
    for i, request in enumerate(requests):
        alone = generator.sample([request], options, seeds(i + 1))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[1])


def test_without_classes_nothing_is_guided(network, calls):
    NextX(network).sample([LatentRequest()] * 3, NextXOptions(steps=1))
    assert [rows for rows, _, _ in calls] == [3] * 4


def test_many_rows_need_no_shared_modulations(monkeypatch):
    generator, options = NextX(tiny()), NextXOptions(steps=2)
    few = generator.sample([LatentRequest(labels=(1,))], options)
    monkeypatch.setattr(next_x, "SHARED_ROWS", 0)
    many = generator.sample([LatentRequest(labels=(1,))], options)
    torch.testing.assert_close(few, many, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["cell", "scale"])
def test_events_and_kept_entities(kind):
    generator = NextX(tiny(entity=kind, size=2))
    options, count = NextXOptions(steps=2), len(generator.entities)
    events = list(generator.run([LatentRequest(labels=(1,))] * 2, options, seeds(1, 2)))
    assert [(e.request, e.total) for e in events] == [
        (row, total) for total in range(1, count + 1) for row in (0, 1)
    ]
    assert [e.reason for e in events] == [None] * (2 * count - 2) + ["end"] * 2
    if kind == "cell":
        assert not events[0].latents[:, 2:].any()
        assert torch.equal(events[0].latents[:, :2, :2], events[-2].latents[:, :2, :2])
    whole = torch.randn(4, 4, 4)
    kept = LatentRequest(labels=(1,), latents=whole, keep=1)
    events = list(generator.run([LatentRequest(labels=(2,)), kept], options, seeds(1, 2)))
    assert [e.total for e in events if e.request == 1] == list(range(2, count + 1))
    split = generator.entities.split
    size = generator.entities.sizes[0]
    if kind == "cell":
        assert torch.equal(split(events[-1].latents[None])[:, :size], split(whole[None])[:, :size])
    other = LatentRequest(labels=(1,), latents=whole + 1, keep=1)
    again = generator.sample([other], options, seeds(2))
    assert not torch.allclose(again[0][:, 2:], events[-1].latents[:, 2:])  # what is kept is read


def test_bf16_stays_near(network):
    options, requests = NextXOptions(steps=4), [LatentRequest(labels=(3,))]
    exact = NextX(network).sample(requests, options)
    half = XAR(network.config)
    half.load_state_dict(network.state_dict())
    near = NextX(half.bfloat16()).sample(requests, options)
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_pictures_through_the_latent_codec():
    codec, generator = KL16(KL16Config(channels=32)).eval(), NextX(tiny(channels=16))
    latents = generator.sample([LatentRequest(labels=(3,))] * 2, NextXOptions(steps=1))
    images = pictures(latents, codec)
    assert [tuple(image.pixels.shape) for image in images] == [(3, 64, 64)] * 2
    with torch.no_grad():
        expected = (codec.decode_latents(latents).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(images[1].pixels, expected[1])


def test_published_names(golden, tmp_path):
    torch.save(golden["state_dict"], tmp_path / "xAR-L.pth")
    generator = load_generator("xar/l", tmp_path)
    assert (generator.options.steps, generator.options.cfg) == (50, 2.3)
    assert generator.codec == "kl16/mar"
    assert generator.network.config.width == 32


def test_bad_input(network):
    generator = NextX(network)
    with pytest.raises(ValueError, match=r"request 0 has the labels \(1000,\), expected"):
        generator.run([LatentRequest(labels=(1000,))])
    with pytest.raises(ValueError, match=r"request 1 keeps 4 entities, expected 0 ... 3"):
        generator.run([LatentRequest(), LatentRequest(keep=4)])
    with pytest.raises(ValueError, match="keeps 1 entities of no latents"):
        generator.run([LatentRequest(keep=1)])
    with pytest.raises(ValueError, match="rng has 1 generators for 2"):
        generator.run([LatentRequest()] * 2, rng=seeds(1))
    for options, message in (
        ({"steps": 0}, "steps is 0"),
        ({"cfg": 0.5}, "cfg is 0.5"),
        ({"schedule": "cosine"}, "schedule is 'cosine'"),
        ({"method": "heun"}, "method is 'heun'"),
    ):
        with pytest.raises(ValueError, match=message):
            NextXOptions(**options)
