import itertools
import random

import pytest
import torch

from anytok.generators.acceptance import (
    Ladder,
    Ledger,
    Published,
    emitted,
    passes,
    pulled,
)
from anytok.generators.neighbours import nearest
from anytok.generators.sampling import Sampling, guided, probabilities

SIZE = 24
GOLDEN = torch.load("tests/golden/lantern.pt", weights_only=True)
CONTEXTS = [(seed, sharp) for seed in range(3) for sharp in (0.5, 1.5, 3.0)]


def context(seed, sharp, size=SIZE):
    """A law with guidance and truncation in place, neighbours, and a drafter's law that is near it."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randn(size, 3, generator=rng)
    logits = [torch.randn(1, size, generator=rng) * sharp for _ in range(3)]
    law = probabilities(
        guided(logits[0], logits[1], 1.5), Sampling(top_k=max(size - 5, 4), top_p=0.97)
    )[0].double()
    draft = (law.clamp(min=1e-4).log() + logits[2][0] / 2).softmax(-1)
    return law / law.sum(), draft, nearest(codes, min(10, size - 1))


def distance(a, b):
    return float((a - b).abs().sum()) / 2


def over_draws(law, draft, count, size, near=None, budget=0.0):
    """What is emitted, and how often a sibling stands, over every order in which `draft` may give siblings."""
    total, stands = torch.zeros(size, dtype=torch.float64), 0.0
    for places in itertools.permutations(range(size), count):
        chance, left = 1.0, 1.0
        for x in places:
            chance *= float(draft[x]) / left
            left -= float(draft[x])
        own = () if near is None else (near.ids[list(places)].long(), near.distances[list(places)])
        out, stood = emitted(law, places, *own, q=draft, budget=budget)
        total += chance * out
        stands += chance * stood
    return total, stands


@pytest.mark.parametrize(("seed", "sharp"), CONTEXTS)
def test_lossless_with_the_likeliest_siblings_is_exact(seed, sharp):
    law, draft, _ = context(seed, sharp)
    for count in range(1, 6):
        siblings = draft.topk(count).indices.tolist()
        out, stood = emitted(law, siblings)
        assert distance(out, law) < 1e-9
        assert stood == pytest.approx(float(law[siblings].sum()), abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("seed", "sharp"), CONTEXTS[:2])
def test_lossless_with_drawn_siblings_is_exact(seed, sharp, count):
    size = 5 if count == 5 else 7
    law, draft, _ = context(seed, sharp, size)
    assert distance(over_draws(law, draft, count, size)[0], law) < 1e-9


@pytest.mark.parametrize("delta", [0.02, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("count", [1, 3, 5, 10])
def test_certified_siblings_stay_within_delta_and_nothing_stands_more_often(count, delta):
    for seed, sharp in CONTEXTS:
        law, draft, near = context(seed, sharp)
        siblings = draft.topk(count).indices
        own = near.ids[siblings].long()
        moved = pulled(
            law[None],
            siblings[None],
            own[None],
            near.distances[siblings][None],
            torch.tensor([delta], dtype=torch.float64),
        )
        assert float(moved.law.sum()) == pytest.approx(1, abs=1e-9)
        assert float(moved.law.min()) >= 0
        assert distance(moved.law[0], law) <= float(moved.mass) + 1e-9 <= delta + 2e-9
        others = sorted(set(own.flatten().tolist()) - set(siblings.tolist()))
        best = float(law[siblings].sum()) + min(delta, float(law[others].sum()))
        assert float(moved.law[0, siblings].sum()) == pytest.approx(best, abs=1e-9)


def test_certified_mass_goes_where_it_gains_most():
    law = torch.tensor([[0.1, 0.1, 0.4, 0.3, 0.1]], dtype=torch.float64)
    siblings = torch.tensor([[0, 1, -1]])
    near = torch.tensor([[[2, 3], [2, 0], [2, 3]]])
    far = torch.tensor([[[2.0, 1.0], [0.5, 1.0], [0.1, 0.1]]])

    def laws(budget, **more):
        budget = torch.tensor([budget], dtype=torch.float64)
        return pulled(law, siblings, near, far, budget, **more)

    # Nearest first: all of 2's goes to sibling 1, which is nearer, then 3's to sibling 0.
    assert laws(0.5).law[0].tolist() == pytest.approx([0.2, 0.5, 0.0, 0.2, 0.1])
    # More is expected behind sibling 0.
    values = torch.tensor([[2.0, 1.0, 1.0]])
    assert laws(0.5, values=values).law[0].tolist() == pytest.approx([0.6, 0.1, 0.2, 0.0, 0.1])
    # Sibling 0's own mass gains nothing at sibling 1; a price keeps cheap moves from being made.
    dear = laws(0.9, values=torch.tensor([[2.0, 1.0, 1.0]]), price=torch.tensor([1.5]))
    assert dear.law[0].tolist() == pytest.approx([0.8, 0.1, 0.0, 0.0, 0.1])
    assert float(laws(0.0).mass) == 0


@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_certified_with_drawn_siblings_stays_within_delta(delta):
    gained = 0.0
    for seed, sharp in CONTEXTS[:4]:
        law, draft, near = context(seed, sharp, 6)
        for count in (1, 2, 4):
            out, stood = over_draws(law, draft, count, 6, near, delta)
            assert distance(out, law) <= delta + 1e-9
            gained += stood - over_draws(law, draft, count, 6)[1]
    assert gained > 0.2 * delta * 12


def test_certified_with_one_law_is_the_pulled_law():
    law, draft, near = context(1, 1.5)
    siblings = draft.topk(4).indices
    own = near.ids[siblings].long()
    moved = pulled(
        law[None], siblings[None], own[None], near.distances[siblings][None], law.new_tensor([0.2])
    )
    out, stood = emitted(law, siblings.tolist(), own, near.distances[siblings], budget=0.2)
    # The ladder rejects what it may before mass is pulled; the law is the same.
    assert torch.allclose(out, moved.law[0], atol=1e-9)
    assert stood == pytest.approx(float(moved.law[0, siblings].sum()))


def test_the_published_rule_leaves_its_delta():
    law, draft, near = context(0, 0.5)
    siblings = draft.topk(5).indices.tolist()
    out, _ = emitted(
        law, siblings, near.ids[siblings].long(), relaxation=Published(k=9, delta=0.05)
    )
    assert float(out.sum()) == pytest.approx(1)
    assert distance(out, law) > 0.15


def test_a_ledger_keeps_a_total_and_spends_where_it_gains():
    ledger = Ledger(0.2, 1.0, 100)
    for _ in range(3):
        ledger.spend(0.15)
    assert ledger.price > 1
    assert ledger.allowance == pytest.approx(0.2)
    for _ in range(100):
        ledger.spend(0.0)
    assert ledger.price == 0
    ledger.spend(0.5)
    assert ledger.allowance == pytest.approx(0.05)
    ledger.spend(0.05)
    assert ledger.allowance == 0
    assert Ledger(0.3).allowance == 0.3


def test_bad_rules_are_refused():
    with pytest.raises(ValueError, match=r"delta is 5, expected 0 to 1; a factor goes in `factor`"):
        Published(delta=5)
    with pytest.raises(ValueError, match="factor is 1, expected more than 1"):
        Published(factor=1)


# The 36 recorded verifications


def processed(logits, kind):
    options = {"T1": Sampling(), "T0.8k12": Sampling(temperature=0.8, top_k=12)}
    return probabilities(logits[None], options[kind])[0]


def rule(one):
    if not one["lantern"]:
        return None
    name = "factor" if one["delta"] > 1 else "delta"
    return Published(k=one["k"], **{name: one["delta"]})


def walk(one, static):
    """The published walk over the table of a tree's branches, with our rule at each level."""
    draws = random.Random(one["seed"])
    given, near = GOLDEN["inputs"][one["tree"]], GOLDEN["nearest"]
    table, logits = given["candidates"], given["logits"]
    best, stood = 0, 1
    for level in range(1, table.shape[1]):
        rows = [j for j in range(len(table)) if table[j, :stood].equal(table[best, :stood])]
        law = processed(logits[rows[0], level - 1], one["proc"])
        ladder, seen, accepted = None, [], False
        for j in rows:
            x = int(table[j, level])
            drafted = float(given["cprob"][j, level])
            if x in seen or x < 0 or (static and drafted <= 0):
                continue
            seen.append(x)
            if ladder is None:
                q = given["ops"][level - 1][given["p_indices"][j][level]] if static else None
                ladder = Ladder(law, q, rule(one))
            own = near[x] if one["lantern"] else None
            if draws.random() <= ladder.chance(x, own, drafted=drafted):
                best, stood, accepted = j, stood + 1, True
                break
            ladder.reject(x, own)
        if not accepted:
            return best, stood - 1, ladder.rest if ladder is not None else law
    return best, stood - 1, processed(logits[best, stood - 1], one["proc"])


def walk_greedily(one):
    given, near = GOLDEN["inputs"][one["tree"]], GOLDEN["nearest"]
    table, logits = given["candidates"], given["logits"]
    lengths = []
    for j in range(len(table)):
        length = 0
        for level in range(1, table.shape[1]):
            x, law = int(table[j, level]), logits[j, level - 1].softmax(-1)
            if x < 0:
                break
            relaxed = rule(one)
            own = near[x]
            ok = int(law.argmax()) == x if relaxed is None else passes(law, x, own, relaxed)
            if not ok:
                break
            length += 1
        lengths.append(length)
    best = lengths.index(max(lengths))
    return best, lengths[best], logits[best, lengths[best]]


@pytest.mark.parametrize("number", range(36))
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_published_rules_to_the_letter(number, kind):
    one = GOLDEN["verified"][number]
    best, length, rest = (
        walk_greedily(one) if one["proc"] == "none" else walk(one, kind == "static")
    )
    assert (best, length) == one[kind]
    assert torch.allclose(rest, GOLDEN["rests"][kind][number], atol=1e-6)
