"""Ids and latents in one sequence: what sees what, time 0, both losses, and drawing behind prompts."""

import pytest
import torch

from anytok.backbone.entities import KINDS, Entities
from anytok.backbone.interleave import Interleaver, Item, Packed
from anytok.backbone.mixed import Mixed, Prompted, collate, latent_document
from anytok.backbone.rules import Rule
from anytok.codecs.text import TextCodec
from anytok.generators.next_x import LatentRequest, NextX, NextXOptions
from anytok.modalities.text import Text
from tests.backbone.tiny import Thumbnail, transformer

TEXT = TextCodec()
INTERLEAVER = Interleaver.build([Rule.of(TEXT, limit=12), Rule.of(Thumbnail())])


def mixed(kind="cell", size=2, **sizes):
    model = transformer(INTERLEAVER.vocabulary.size, **sizes)
    torch.manual_seed(1)
    return Mixed(model, Entities(kind, (4, 2), size), 3).eval()


def prompt(text):
    streams = TEXT.encode([Text(text)])
    return INTERLEAVER.pack([Item(stream=s, target=False) for s in streams], end=False)


def document(model, text, seed=0, target=True):
    latents = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(seed))
    before = prompt(text)
    return latent_document(INTERLEAVER, before, latents, model.entities, target=target)


@torch.no_grad()
def test_without_latents_it_is_the_transformer():
    model = mixed()
    streams = TEXT.encode([Text("a cat")])
    row = INTERLEAVER.pack([Item(stream=streams[0])])
    batch = collate([row], model.entities, 3)
    out = model(batch, batch.data, torch.zeros(0, dtype=torch.int64))
    assert out.velocity.shape == (0, 3)
    assert torch.equal(out.hidden, model.transformer(row.ids[None], keep=0).hidden)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_sees_what(kind):
    model = mixed(kind, {"cell": 2}.get(kind))
    rows = [Packed.join([document(model, "ab"), document(model, "c", 1)]), document(model, "x", 2)]
    batch = collate(rows, model.entities, 3)
    times = torch.randint(1000, (int(batch.entity.max()) + 1,))[batch.entity]
    base = model(batch, batch.data, times)
    place = torch.arange(batch.ids.shape[1])
    for changed in range(0, len(batch.data), 3):
        data = batch.data.clone()
        data[changed] += 1
        off = (model(batch, data, times).hidden - base.hidden).abs().amax(-1) > 0
        row, at = batch.latent.nonzero()[changed].tolist()
        block = batch.blocks[row, at]
        expected = torch.zeros_like(off)
        same = batch.documents[row] == batch.documents[row, at]
        expected[row] = same & (batch.blocks[row] >= block)
        assert torch.equal(off, expected)
        # inside an entity everything is seen, also what stands later
        members = batch.entity == batch.entity[changed]
        assert off[batch.latent][members].all()
    # an id is seen by what comes behind it, and by its own document only
    ids = batch.ids.clone()
    ids[0, 2] += 1
    off = (model(batch._replace(ids=ids), batch.data, times).hidden - base.hidden).abs().amax(
        -1
    ) > 0
    assert torch.equal(off[0], (place >= 2) & (batch.documents[0] == 0))
    assert not off[1].any()


@torch.no_grad()
def test_time_zero_adds_nothing():
    model = mixed()
    data, place = torch.randn(5, 3), torch.arange(5)
    rows = model.embed(data, place, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(rows, model.z_proj(data) + model.place[place])
    moved = model.embed(data, place, torch.full((5,), 300))
    assert (moved - rows).abs().max() > 0.01


def test_both_losses_and_every_gradient():
    model = mixed().train()
    words = INTERLEAVER.pack([Item(stream=TEXT.encode([Text("go")])[0])])
    rows = [document(model, "ab"), Packed.join([document(model, "c", 1, target=False), words])]
    losses = model.losses(collate(rows, model.entities, 3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses["loss"], losses["flow"] + losses["words"])
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # a time's embedding is taken relative to that of time 0: the last bias cancels
        assert (parameter.grad.abs().sum() > 0) == (name != "time_embed.mlp.2.bias"), name


@torch.no_grad()
def test_what_is_only_read_is_clean(monkeypatch):
    model = mixed()
    rows = [document(model, "ab", target=False)]
    batch, seen = collate(rows, model.entities, 3), []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda b, latents, times: seen.append((latents, times)) or forward(b, latents, times),
    )
    losses = model.losses(batch, torch.Generator().manual_seed(0))
    ((latents, times),) = seen
    assert torch.equal(latents, batch.data)
    assert not times.any()
    assert losses["flow"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 2.0])
@torch.no_grad()
def test_drawing_behind_prompts_is_the_whole_sequence(kind, cfg):
    """Euler steps through the cache against whole sequences computed anew, prompts of different length."""
    model = mixed(kind, {"cell": 2}.get(kind))
    opening = INTERLEAVER.tags("image")[0]
    prompts = [torch.cat([prompt(t).ids, torch.tensor([opening])]) for t in ("ab", "longer")]
    null = torch.tensor([prompts[0][0], opening])
    steps = 2
    options = NextXOptions(steps=steps, cfg=cfg, method="ode")
    rng = [torch.Generator().manual_seed(n) for n in (1, 2)]
    requests = [LatentRequest(labels=(n,)) for n in (0, 1)]
    drawn = NextX(Prompted(model, prompts, null)).sample(requests, options, rng)

    entities, place = model.entities, INTERLEAVER.vocabulary.special("<place>")
    for number in (0, 1):
        generator, done = torch.Generator().manual_seed(number + 1), torch.zeros(0, 3)
        for entity, size in enumerate(entities.sizes):
            x = torch.randn(size, 3, generator=generator).double()
            weight = options.guidance(entity, len(entities))
            for i in range(steps):
                now = torch.cat([done, x.float()])
                rest = torch.cat([now, torch.zeros(entities.length - len(now), 3)])
                times = torch.zeros(entities.length, dtype=torch.int64)
                times[len(done) : len(now)] = 1000 - 500 * i
                velocities = []
                for before in (prompts[number], null):
                    ids = torch.cat([before, torch.full((entities.length,), place)])
                    row = Packed(
                        ids=ids, weights=torch.zeros(len(ids)), positions=torch.arange(len(ids)),
                        documents=torch.zeros(len(ids), dtype=torch.int64),
                    )  # fmt: skip
                    batch = collate([row], entities, 3)
                    batch.latent[0, len(before) :] = True
                    starts = torch.tensor([entities.span(0, k)[1] for k in range(len(entities))])
                    batch.blocks[0, len(before) :] = len(before) + starts[entities.blocks()]
                    batch = batch._replace(place=torch.arange(entities.length))
                    v = model(batch, rest, times).velocity[len(done) : len(now)]
                    velocities.append(v.double())
                x = x - (velocities[1] + weight * (velocities[0] - velocities[1])) / steps
            done = torch.cat([done, x.float()])
        expected = entities.join(done[None])[0]
        torch.testing.assert_close(drawn[number], expected, atol=2e-5, rtol=1e-4)


def test_bad_input():
    model = mixed()
    row = document(model, "a")
    other = Entities("cell", (4, 4), 2)
    with pytest.raises(ValueError, match="a segment of 8 latents, entities have 16"):
        collate([row], other, 3)
    short = mixed(context=10)
    prompts = [torch.zeros(4, dtype=torch.int64)]
    generator = NextX(Prompted(short, prompts, prompts[0][:1]))
    with pytest.raises(ValueError, match="the prompt with its latents has 12 positions"):
        generator.sample([LatentRequest(labels=(0,))], NextXOptions(steps=1))
