"""The masked loop against the published code's draws, an independent loop, and its own promises."""

import math
import os

import pytest
import torch

from anytok.codecs.layout import Fixed, Frames, Grid, Octree, Prefix
from anytok.codecs.video.cvivit import CViViT, CViViTConfig
from anytok.generators.generator import Canvas
from anytok.generators.image_maskgit import ClassMaskConfig, class_network, from_published
from anytok.generators.maskgit import (
    MaskGIT,
    Numbers,
    Unmasking,
    gumbel,
    most,
    open_positions,
    shape_of,
)
from tests.golden.load import load_golden

# The published name of what decays guidance, its offset of one, and what draws the passes spend.
PUBLISHED = {"bert": ("image_onedpiece", "generator"), "uvit": ("image_titok", "uvit")}


def golden(kind):
    """The whole fixture where there is one; sampled sequences stand in the cut golden alone."""
    whole, branch = PUBLISHED[kind]
    name = whole if os.environ.get("ANYTOK_PARITY") else f"maskgit_{kind}"
    return load_golden(name)[branch]


def sampled(kind):
    folder = os.environ.pop("ANYTOK_PARITY", None)
    try:
        return load_golden(f"maskgit_{kind}")[PUBLISHED[kind][1]]
    finally:
        if folder is not None:
            os.environ["ANYTOK_PARITY"] = folder


def rngs(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def blank(n, condition=None, grid=()):
    return Canvas(
        codes=torch.full((n,), -1),
        grid=grid,
        condition=None if condition is None else torch.as_tensor(condition),
    )


def tiny(**changes):
    torch.manual_seed(0)
    config = ClassMaskConfig(
        **{"vocab": 32, "classes": 5, "length": 12, "dim": 32, "layers": 2, "heads": 4, "inner": 64}
        | changes
    )
    network = class_network(config).eval()
    for parameter in network.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return network


# Networks.


@pytest.mark.parametrize("kind", ["bert", "uvit"])
def test_logits_are_the_published_ones(kind):
    fx = golden(kind)
    network = from_published(fx["state_dict"], {"heads": 4})
    with torch.inference_mode():
        logits = network(fx["ids_in"], network.prepare(list(fx["cond"]), ()))
    wanted = fx["logits_cond"] if kind == "bert" else fx["logits"]
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
    if kind == "bert":
        with torch.inference_mode():
            logits = network(fx["ids_in"], network.prepare([None, None], ()))
        torch.testing.assert_close(logits, fx["logits_uncond"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bert", "uvit"])
def test_every_parameter_is_used(kind):
    network = tiny(network=kind)
    ids = torch.full((2, 12), 32)
    network(ids, network.prepare([torch.tensor(1), None], ())).square().sum().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None]
    assert unused in ([], ["model.embeddings.token_type_embeddings.weight"])


# The loop.


class Spending:
    """A network that spends the published code's idle draws: one a row and pass, for dropping the condition."""

    def __init__(self, network, rng, passes):
        self.network, self.rng, self.passes, self.step = network, rng, passes, 0
        self.vocab, self.prepare, self.check = network.vocab, network.prepare, network.check

    def __call__(self, ids, prepared):
        for _ in range(self.passes(self.step)):
            torch.rand(2, generator=self.rng)
        self.step += 1
        return self.network(ids, prepared)


def options_of(published):
    """Our options of the published `generate`'s."""
    decay, scale = published["guidance_decay"], published["guidance_scale"]
    return Unmasking(
        steps=published.get("num_sample_steps", 8),
        curve="arccos",
        temperature=published.get("randomize_temperature", 4.5),
        softmax=(1.3, 0.5) if published.get("softmax_temperature_annealing") else (1.0, 1.0),
        cfg=scale if decay == "power-cosine" else 1 + scale,
        guidance=decay,
    )


@pytest.mark.parametrize("kind", ["bert", "uvit"])
@pytest.mark.parametrize("number", range(4))
def test_draws_are_the_published_ones(kind, number):
    fx = sampled(kind)
    case = fx["sampled"][number]
    decay, scale = case["options"]["guidance_decay"], case["options"]["guidance_scale"]
    rng = torch.Generator().manual_seed(case["seed"])

    def passes(step):
        return 1 if scale == 0 or (decay == "linear" and step == 0) else 2

    network = from_published(fx["state_dict"], {"heads": 4})
    generator = MaskGIT(Spending(network, rng, passes))
    canvases = [blank(16, label) for label in fx["cond"]]
    codes = generator.fill(canvases, options_of(case["options"]), [rng, rng])
    assert torch.equal(torch.stack(codes), case["ids"])


def plain_loop(network, label, n, o, rng):
    """One canvas, written down from the paper, with the published counts."""
    ids = torch.full((1, n), network.vocab)
    for step in range(o.steps):
        r = (step + 1) / o.steps
        logits = network(ids, network.prepare([label], ()))
        null = network(ids, network.prepare([None], ()))
        logits = null + (logits - null) * (1 + (o.cfg - 1) * step / o.steps)
        noise = -torch.log(-torch.log(torch.rand(n, network.vocab, generator=rng)))
        drawn = (logits + o.temperature * (1 - r) * noise).argmax(-1)
        sure = logits.gather(-1, drawn[..., None])[0, :, 0]
        is_open = ids[0] == network.vocab
        ids = torch.where(is_open, drawn, ids)
        if r == 1:
            return ids[0]
        sure = sure - o.temperature * (1 - r) * torch.log(-torch.log(torch.rand(n, generator=rng)))
        keep = min(int(is_open.sum()) - 1, math.floor(n * math.acos(r) * 2 / math.pi))
        places = sorted(range(n), key=lambda i: float(sure[i]) if is_open[i] else math.inf)
        ids[0, places[: max(1, keep)]] = network.vocab


@torch.inference_mode()
def test_a_batch_does_what_an_independent_loop_does_row_by_row():
    network, labels = tiny(), [0, 4, 2]
    o = Unmasking(steps=7, curve="arccos", temperature=2.0, cfg=3.0, guidance="linear")
    codes = MaskGIT(network).fill([blank(12, label) for label in labels], o, rngs(3))
    for label, rng, mine in zip(labels, rngs(3), codes):
        assert torch.equal(mine, plain_loop(network, torch.tensor(label), 12, o, rng))


@pytest.mark.parametrize("doubt", ["logit", "probability", "chance"])
def test_a_row_does_not_depend_on_its_batch_mates(doubt):
    generator = MaskGIT(tiny(), options=Unmasking(steps=5, cfg=2.5, doubt=doubt))
    frozen = torch.full((12,), -1)
    frozen[[0, 3, 7]] = torch.tensor([5, 6, 7])
    canvases = [
        blank(12, 1),
        Canvas(codes=frozen, condition=torch.tensor(3)),
        blank(9, 2),
        blank(12),
    ]
    together = generator.fill(canvases, rng=rngs(4))
    for i, canvas in enumerate(canvases):
        assert torch.equal(together[i], generator.fill([canvas], rng=[rngs(4)[i]])[0])
    assert together[1][[0, 3, 7]].tolist() == [5, 6, 7]


def test_events_tell_what_stands_and_what_is_open():
    generator = MaskGIT(tiny(), options=Unmasking(steps=4))
    frozen = torch.full((12,), -1)
    frozen[:4] = 9
    events = list(generator.run([Canvas(codes=frozen), blank(12)], rng=rngs(2)))
    assert [e.request for e in events] == [0, 1] * 4
    before = {0: frozen, 1: blank(12).codes}
    for event in events:
        codes, old = event.codes, before[event.request]
        assert torch.equal(codes[old >= 0], old[old >= 0])  # without a critic nothing is taken back
        assert event.total == int((codes >= 0).sum()) - (4 if event.request == 0 else 0)
        before[event.request] = codes
    assert [e.reason for e in events[-2:]] == ["end", "end"]
    assert (events[-1].codes >= 0).all()
    assert all(e.reason is None for e in events[:-2])


def test_closing_the_iterator_stops_the_network():
    network, calls = tiny(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    events = MaskGIT(network, options=Unmasking(steps=50)).run([blank(12)])
    next(events)
    events.close()
    assert len(calls) == 1


def test_a_full_canvas_stays_and_an_empty_batch_is_nothing():
    generator = MaskGIT(tiny(), options=Unmasking(steps=3))
    full = torch.arange(12)
    assert torch.equal(generator.fill([Canvas(codes=full)])[0], full)
    assert generator.fill([]) == []


def test_one_step_and_more_steps_than_positions():
    generator = MaskGIT(tiny())
    for steps in (1, 40):
        codes = generator.fill([blank(12)], Unmasking(steps=steps))[0]
        assert set(codes.tolist()) <= set(range(32))


def test_without_temperature_nothing_is_drawn():
    generator, rng = MaskGIT(tiny()), torch.Generator().manual_seed(3)
    before = rng.get_state()
    generator.fill([blank(12, 1)], Unmasking(steps=4, temperature=0), [rng])
    assert torch.equal(rng.get_state(), before)


def test_the_null_pass_is_left_out_where_guidance_is_one():
    network, rows = tiny(), []
    network.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    o = Unmasking(steps=4, cfg=3.0, guidance="linear")
    MaskGIT(network).fill([blank(12, 1), blank(12)], o)
    assert rows == [2, 4, 4, 4]
    rows.clear()
    MaskGIT(network).fill([blank(12), blank(12)], o)  # nothing to guide
    assert rows == [2, 2, 2, 2]


# Its parts.


def test_counts_of_open_positions():
    published = [open_positions(s / 6, 18, "cosine", "round") for s in range(1, 6)]
    assert published == [17, 16, 13, 9, 5]
    assert open_positions(0.5, 256, "arccos") == math.floor(256 * 2 / 3)
    assert open_positions(1.0, 256, "arccos") == 0
    o = Unmasking(steps=100, curve="arccos")
    opened, counts = 10, []
    for step in range(99):
        opened = o.open_after(step, 10, opened)
        counts.append(opened)
    assert counts[:10] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 1]  # each step settles one or more
    assert counts[-1] == 1  # and one is left for the last


def test_most_takes_as_many_as_it_is_told():
    doubt = torch.tensor([[0.1, 0.9, 0.5, 0.5], [3.0, 2, 1, 0]])
    assert most(doubt, [2, 0]).tolist() == [[False, True, True, False], [False] * 4]


def test_numbers_are_each_rows_own_and_for_what_is_free():
    free = torch.ones(3, 10, dtype=torch.bool)
    free[1, 4:] = False
    drawn = Numbers(rngs(3), free)(20)
    assert drawn.shape == (3, 10, 20)
    assert torch.equal(drawn[1, :4], torch.rand(4, 20, generator=rngs(3)[1]))
    assert (drawn[1, 4:] == 0.5).all()
    noise = gumbel(torch.rand(20_000, generator=rngs(1)[0]))
    assert abs(float(noise.mean()) - 0.5772) < 0.03
    assert torch.isfinite(gumbel(torch.zeros(1))).all()


def test_draws_follow_the_softmax():
    class Fixed3:
        vocab = 3

        def prepare(self, conditions, grid):
            return None

        def check(self, canvas):
            pass

        def __call__(self, ids, prepared):
            return torch.tensor([0.6, 0.3, 0.1]).log().expand(*ids.shape, 3)

    # Half of the temperature is left at the first of two steps; chance keeps half of what it drew.
    o = Unmasking(steps=2, curve="linear", temperature=2.0, doubt="chance")
    first = next(MaskGIT(Fixed3()).run([blank(20_000)], o)).codes
    counts = torch.bincount(first[first >= 0], minlength=3) / 10_000
    torch.testing.assert_close(counts, torch.tensor([0.6, 0.3, 0.1]), atol=0.015, rtol=0)


def test_layouts_tell_how_many_positions():
    assert shape_of(Fixed(32)) == ((), 32)
    assert shape_of(Prefix(256)) == ((), 256)
    assert shape_of(Grid((4, 5))) == ((4, 5), 20)
    assert shape_of(Frames((2, 3)), 4) == ((4, 2, 3), 24)
    with pytest.raises(ValueError, match="fill a Canvas"):
        shape_of(Octree(3, 6))


def test_streams_of_a_codec():
    config = CViViTConfig(
        size=(16, 24),
        patch=(8, 8),
        temporal_patch=2,
        dim=16,
        heads=2,
        head_dim=8,
        encoder_depth=(1, 1),
        decoder_depth=(1, 1),
        quantizer="lfq",
        codebook_size=32,
    )
    codec = CViViT(config, name="cvivit/tiny").eval()
    generator = MaskGIT(tiny(), options=Unmasking(steps=2))
    streams = generator.streams(codec, [3, None], units=2)
    assert [s.grid for s in streams] == [(2, 2, 3)] * 2
    assert codec.decode(streams)[0].frames.shape == (3, 3, 16, 24)
    with pytest.raises(ValueError, match="the generator writes 64 codes"):
        MaskGIT(tiny(vocab=64)).streams(codec, [3])


# Bad input.


@pytest.mark.parametrize(
    ("canvas", "message"),
    [
        (blank(13, 1), "13 positions, expected at most 12"),
        (blank(12, 5), "the class is 5, expected 0 to 4"),
        (blank(12, [1, 2]), r"expected one class \(an integer \[\]\)"),
        (Canvas(codes=torch.full((12,), 32)), "holds code 32, expected -1"),
    ],
)
def test_canvases_that_do_not_fit(canvas, message):
    with pytest.raises(ValueError, match=message):
        MaskGIT(tiny()).run([canvas])


def test_canvases_that_are_none():
    with pytest.raises(ValueError, match="expected integers"):
        Canvas(codes=torch.zeros(3))
    with pytest.raises(ValueError, match="4 codes for the grid"):
        Canvas(codes=torch.zeros(4, dtype=torch.long), grid=(2, 3))
    with pytest.raises(ValueError, match="rng has 1 generators for 2"):
        MaskGIT(tiny()).run([blank(12), blank(12)], rng=rngs(1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"curve": "sine"}, "curve is 'sine', expected one of arccos, cosine, linear"),
        ({"softmax": (1.0, 0.0)}, "softmax is"),
        ({"guidance": "decay"}, "guidance is 'decay'"),
    ],
)
def test_options_that_make_no_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        Unmasking(**wrong)


def test_a_critic_that_is_not_there():
    with pytest.raises(ValueError, match="there is no critic"):
        MaskGIT(tiny()).run([blank(12)], Unmasking(doubt="critic"))
