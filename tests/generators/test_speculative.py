import itertools

import pytest
import torch

from anytok.backbone import checkpoints
from anytok.backbone.grammar import Grammar
from anytok.backbone.interleave import Interleaver
from anytok.generators.autoregressive import Autoregressive
from anytok.generators.drafter import Drafter
from anytok.generators.generator import Request
from anytok.generators.neighbours import Relatives, nearest
from anytok.generators.sampling import Sampling
from anytok.generators.speculative import MODES, Speculation, Speculative
from anytok.generators.trees import Dynamic, Static
from tests.backbone.tiny import RULES, transformer
from tests.golden.load import load_golden

DYNAMIC, STATIC = Dynamic(depth=3, width=4, nodes=12), Static(shape="mc_sim_7b_63")
OPTIONS = [Sampling(temperature=0), Sampling(), Sampling(cfg=2.0, top_k=9)]


def ids_of(events, n):
    written = [[] for _ in range(n)]
    for event in events:
        written[event.request] += event.ids
        assert len(written[event.request]) == event.total
    return written


def rngs(n, first=100):
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


def drafter(model, seed=1):
    """Neither good nor blind."""
    torch.manual_seed(seed)
    made = Drafter(model)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape) * 0.02)
    return made


def relatives(model, k=8):
    rng = torch.Generator().manual_seed(3)
    return Relatives.plain(nearest(torch.randn(model.config.vocab_size, 3, generator=rng), k))


def requests(lengths=((3, 12), (9, 4), (1, 7), (5, 1), (4, 20))):
    return [
        Request(
            ids=torch.arange(n) + i, null_ids=torch.arange(1 + n // 3), max_tokens=most, end=7 * i
        )
        for i, (n, most) in enumerate(lengths)
    ]


@pytest.mark.parametrize("options", OPTIONS, ids=("greedy", "plain", "guided"))
def test_lossless_dynamic_trees_write_what_plain_decoding_writes(options):
    model = transformer()
    decoder = Speculative(model, drafter(model), speculation=Speculation(tree=DYNAMIC))
    many = requests()
    fast = ids_of(decoder.run(many, options, rngs(5)), 5)
    assert fast == ids_of(Autoregressive(model).run(many, options, rngs(5)), 5)
    assert decoder.statistics.compression > 1 or not options.greedy


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tree", [DYNAMIC, STATIC], ids=("dynamic", "static"))
def test_batch_rows_equal_single_rows(tree, mode):
    model = transformer()
    decoder = Speculative(
        model,
        drafter(model),
        speculation=Speculation(tree=tree, mode=mode, k=5, delta=0.3),
        relatives=relatives(model),
    )
    for options in OPTIONS[1:]:
        together = ids_of(decoder.run(requests(), options, rngs(5)), 5)
        alone = [
            ids_of(decoder.run([request], options, [rng]), 1)[0]
            for request, rng in zip(requests(), rngs(5))
        ]
        assert together == alone


@pytest.fixture(scope="module")
def interleaver():
    return Interleaver.build(
        [RULES[name] for name in ("text", "prefix", "runs", "frames", "octree")], multiple=16
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("plan", [["image", "text"], ["video"], None])
def test_every_mode_keeps_to_the_grammar(interleaver, plan, mode):
    grammar = Grammar(interleaver, limits={"text": 5, "video": 2, "audio": 4})
    model = transformer(interleaver.vocabulary.size, context=400)
    many = [
        Request(ids=torch.tensor([1]), state=grammar.start(plan), max_tokens=60) for _ in range(3)
    ]
    hot = Sampling(temperature=3.0)
    for tree in (DYNAMIC, STATIC):
        decoder = Speculative(
            model,
            drafter(model),
            grammar,
            speculation=Speculation(tree=tree, mode=mode, k=5),
            relatives=relatives(model),
        )
        written = ids_of(decoder.run(many, hot, rngs(3)), 3)
        for ids in written:
            state = grammar.advance(grammar.start(plan), ids)
            assert state.done or len(ids) == 60
        if mode == "lossless" and tree is DYNAMIC:
            plain = Autoregressive(model, grammar).run(many, hot, rngs(3))
            assert written == ids_of(plain, 3)


def test_the_same_law_as_plain_sampling_on_20000_draws():
    """Static lossless trees with guidance: 10,000 runs of two drawn ids behind the first, against the exact law.

    The statistic is Pearson's over all sequences; a right decoder exceeds the limit for one set of seeds in 10,000.
    """
    size, runs = 5, 10_000
    model = transformer(size, context=8)
    decoder = Speculative(
        model, drafter(model), speculation=Speculation(tree=Static(shape=((2,), (1, 1))))
    )
    options = Sampling(cfg=1.5, temperature=2.0)
    request = Request(ids=torch.tensor([1, 2]), null_ids=torch.tensor([3]), max_tokens=3)
    counts = torch.zeros((size,) * 3)
    for start in range(0, runs, 1000):
        written = ids_of(decoder.run([request] * 1000, options, rngs(1000, start)), 1000)
        counts.index_put_(tuple(torch.tensor(written).T), torch.ones(1000), accumulate=True)
    expected = torch.stack(
        [law_of(model, request, options, ids) for ids in itertools.product(range(size), repeat=3)]
    ).view(counts.shape)
    assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
    cells = expected * runs >= 5
    found = torch.cat([counts[cells], counts[~cells].sum()[None]])
    wanted = torch.cat([expected[cells], expected[~cells].sum()[None]]) * runs
    statistic = float(((found - wanted).square() / wanted.clamp(min=1)).sum())
    freedom = len(found) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit
    assert sum(decoder.statistics.tested) >= 1000


@torch.no_grad()
def law_of(model, request, options, ids):
    """The probability of a sequence under plain decoding."""
    total = torch.tensor(1.0)
    more = torch.tensor(ids)
    seen = [torch.cat([one, more]) for one in (request.ids, request.null_ids)]
    logits = [model(one[None]).logits[0, -4:-1] for one in seen]
    laws = ((logits[1] + options.cfg * (logits[0] - logits[1])) / options.temperature).softmax(-1)
    for law, id in zip(laws, ids):
        total = total * law[id]
    return total


def test_a_total_is_kept():
    model = transformer()
    decoder = Speculative(
        model,
        drafter(model),
        speculation=Speculation(mode="certified", tree=DYNAMIC, k=8, delta=0.5, total=0.9),
        relatives=relatives(model),
    )
    ids_of(decoder.run(requests(((3, 40),)), Sampling(temperature=2.0), rngs(1)), 1)
    assert 0.3 < decoder.statistics.moved <= 0.9 + 1e-5


def test_nothing_to_spend_is_lossless():
    model = transformer()
    for tree in (DYNAMIC, STATIC):
        tight, plain = (
            Speculative(
                model,
                drafter(model),
                speculation=Speculation(tree=tree, mode=mode, delta=0.0, k=4),
                relatives=relatives(model),
            )
            for mode in ("certified", "lossless")
        )
        runs = [ids_of(d.run(requests(), Sampling(), rngs(5)), 5) for d in (tight, plain)]
        assert runs[0] == runs[1]
        assert tight.statistics.moved == 0


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
@torch.no_grad()
def test_llamagen_writes_the_published_ids_in_leaps(kind):
    golden = load_golden("backbone_llamagen")[kind]
    model = checkpoints.from_llamagen(golden["state_dict"], heads=4, grid=(4, 4))
    condition = model.model.cls_embedding
    given = golden["cls"] if kind == "c2i" else golden["cap"]
    rows, nulls = condition(given), condition(condition.null(given))
    many = [
        Request(embeddings=row, null_embeddings=null, max_tokens=16)
        for row, null in zip(rows, nulls)
    ]
    decoder = Speculative(model, drafter(model), speculation=Speculation(tree=DYNAMIC))
    options = Sampling(temperature=0, cfg=3.0)
    fast = ids_of(decoder.run(many, options), len(many))
    assert fast == ids_of(Autoregressive(model).run(many, options), len(many))
    if kind == "c2i":
        assert fast == golden["greedy"].tolist()


def test_closing_the_iterator_stops_the_work():
    model = transformer()
    decoder = Speculative(model, drafter(model), speculation=Speculation(tree=DYNAMIC))
    events = decoder.run([Request(ids=torch.tensor([1]), max_tokens=50)])
    next(events)
    next(events)
    done = decoder.statistics.passes
    events.close()
    assert decoder.statistics.passes == done <= 2
    assert next(events, None) is None


def test_bad_speculation_is_refused():
    for wrong, message in (
        ({"mode": "fast"}, "mode is 'fast', expected one of lossless"),
        ({"k": 0}, "k is 0, expected 1 or more"),
        ({"delta": 1.5}, "delta is 1.5, expected 0 to 1"),
        ({"delta": -0.1}, "delta is -0.1, expected 0 to 1"),
        ({"total": 1.0}, "total is 1.0 in mode 'lossless'"),
        ({"factor": 1.0}, "factor is 1.0, expected more than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Speculation(**wrong)
    model = transformer()
    certified = Speculation(mode="certified", k=9)
    with pytest.raises(ValueError, match="needs `relatives`"):
        Speculative(model, drafter(model), speculation=certified)
    with pytest.raises(ValueError, match="k is 9, the table of neighbours has 8"):
        Speculative(model, drafter(model), speculation=certified, relatives=relatives(model))
    other = relatives(transformer(16))
    with pytest.raises(ValueError, match="neighbours are of 16 ids, the model has 64"):
        Speculative(model, drafter(model), speculation=certified, relatives=other)
    decoder = Speculative(model, drafter(model))
    with pytest.raises(ValueError, match="no null condition"):
        decoder.run([Request(ids=torch.arange(3), max_tokens=2)], Sampling(cfg=2.0))


@pytest.mark.parametrize("tree", [DYNAMIC, STATIC], ids=("dynamic", "static"))
def test_refilled_batches_and_guidance_intervals(tree):
    model = transformer()
    options = Sampling(cfg=2.0, guide=4)
    one, three = (
        Speculative(model, drafter(model), speculation=Speculation(tree=tree), rows=rows)
        for rows in (None, 2)
    )
    whole = ids_of(one.run(requests(), options, rngs(5)), 5)
    assert ids_of(three.run(requests(), options, rngs(5)), 5) == whole
    if tree is DYNAMIC:
        assert whole == ids_of(Autoregressive(model).run(requests(), options, rngs(5)), 5)
