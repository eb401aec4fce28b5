"""ResGen's probabilistic claims, on cases small enough to enumerate; then its network and sampling."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical as Choice
from torch.distributions import Independent, MixtureSameFamily, Normal

from anytok.generators.resgen import (
    Mixture,
    ResGen,
    ResGenConfig,
    ResGenSampling,
    draw_less,
    draw_masked,
    log_forward,
    log_marginal,
    log_posterior,
    residual_codes,
)
from anytok.generators.rvq_body import CodeRequest

L, D, V = 2, 3, 2  # positions, depths, codes of the enumerated case
SIZES = {
    "vocab": (8,) * 4, "vectors": 6, "conditions": 5, "longest": 24, "width": 32, "layers": 2,
    "components": 7, "rank": 3, "blocks": 2,
}  # fmt: skip


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def counts(n, length=L, depth=D):
    """All k with sum n: [m, L]."""
    every = itertools.product(range(depth + 1), repeat=length)
    return torch.tensor([k for k in every if sum(k) == n])


def model(**changes):
    torch.manual_seed(0)
    net = ResGen(ResGenConfig(**{**SIZES, **changes})).eval()
    books = (
        torch.randn(4, 8, 6, generator=rng(5)) * torch.tensor([1, 0.5, 0.25, 0.12])[:, None, None]
    )
    net.tables.ground(list(books))
    for p in net.parameters():
        p.data.add_(torch.randn(p.shape, generator=rng(6)) * 0.05)
    return net


def draw(net, requests, options=None, rngs=None):
    last = {}
    for event in net.run(requests, options, rngs):
        last[event.request] = event
    assert all(event.done for event in last.values())
    return [last[i].codes for i in range(len(requests))], last[0].forwards


# --- the process ---------------------------------------------------------------------------------------------------


def test_forward_marginal_is_a_distribution_and_what_is_drawn():
    for n in range(L * D + 1):
        k = counts(n)
        p = log_marginal(k, D).exp()
        assert torch.isclose(p.sum(), torch.tensor(1.0, dtype=torch.float64))
        g, drawn = rng(n), torch.zeros(len(k))
        for _ in range(2000):
            drawn += (k == draw_masked(n, L, D, g)).all(1)
        assert (drawn / 2000 - p).abs().max() < 0.05


@pytest.mark.parametrize(("s", "t"), [(0, 2), (1, 4), (2, 3), (3, 6), (2, 2)])
def test_steps_compose_and_posterior_is_bayes(s, t):
    before, after = counts(s), counts(t)
    pairs = [(a, b) for a in after for b in before]
    a, b = (torch.stack(part).view(len(after), len(before), L) for part in zip(*pairs))
    joint = log_marginal(before, D) + log_forward(a, b, D)
    marginal = joint.logsumexp(1)
    torch.testing.assert_close(marginal.exp(), log_marginal(after, D).exp())
    expected = (joint - marginal[:, None]).exp()
    torch.testing.assert_close(log_posterior(b, a).exp(), expected)


def test_balls_are_taken_back_as_the_posterior_says():
    k = torch.tensor([3, 1])
    before = counts(2)
    p = log_posterior(before, k.expand_as(before)).exp()
    g, drawn = rng(), torch.zeros(len(before))
    for _ in range(2000):
        less = draw_less(k, 2, g)
        drawn += (before == less).all(1)
    assert (drawn / 2000 - p).abs().max() < 0.04
    assert torch.isclose(p.sum(), torch.tensor(1.0, dtype=torch.float64))


def visible(x, k):
    return tuple(tuple(row[: D - int(n)]) for row, n in zip(x, k))


@pytest.fixture(scope="module")
def toy():
    """All x [64, L, D], p(x), and p(x | what is visible) by summing."""
    xs = [tuple(zip(*[iter(c)] * D)) for c in itertools.product(range(V), repeat=L * D)]
    p = torch.rand(len(xs), generator=rng(3), dtype=torch.float64) ** 3
    p = p / p.sum()
    table = {}
    for x, weight in zip(xs, p.tolist()):
        for k in itertools.product(range(D + 1), repeat=L):
            seen = visible(x, k)
            table[seen] = table.get(seen, 0.0) + weight
    return xs, p, table


def bound(x, levels, log_shown, k=None):
    """E over the forward process of the -log of what each step back shows, exact by recursion over counts."""
    k = torch.full((L,), D) if k is None else k
    if not levels:
        return 0.0
    before = counts(levels[0])
    q = log_posterior(before, k.expand_as(before)).exp()
    return sum(
        float(w) * (-log_shown(x, k, b) + bound(x, levels[1:], log_shown, b))
        for w, b in zip(q, before)
        if w > 0
    )


@pytest.mark.parametrize("levels", [(0,), (3, 0), (4, 2, 0), (5, 4, 3, 2, 1, 0)])
def test_likelihood_bound_is_tight_for_the_true_conditionals_and_above_else(toy, levels):
    xs, p, table = toy

    def exact(x, k, b):
        return math.log(table[visible(x, b)] / table[visible(x, k)])

    def wrong(x, k, b):  # codes of a step treated as independent given what is seen
        total, seen = 0.0, visible(x, k)
        for i in range(L):
            for j in range(D - int(k[i]), D - int(b[i])):
                same = [
                    w
                    for y, w in zip(xs, p.tolist())
                    if visible(y, k) == seen and y[i][j] == x[i][j]
                ]
                total += math.log(sum(same) / table[seen])
        return total

    for x in xs[:: 1 if len(levels) < 3 else 13]:
        nll = -math.log(table[visible(x, (0, 0))])
        assert bound(x, levels, exact) == pytest.approx(nll, abs=1e-9)
        whole = bound(
            x, levels, lambda x, k, b: exact(x, k, (0, 0))
        )  # L_simple: all of x at each step
        assert whole >= nll - 1e-9
    if len(levels) < 3:
        gaps = torch.tensor([bound(x, levels, wrong) - bound(x, levels, exact) for x in xs])
        assert float((gaps * p).sum()) > 1e-3  # parallel independent depths cost nats


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [2.0, 3.0])
def test_arc_is_its_own_inverse_and_falls(power):
    config = ResGenConfig(**SIZES, power=power)
    r = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(config.share(config.share(r)), r)
    assert (config.share(r).diff() < 0).all()


@pytest.mark.parametrize("schedule", ["arc", "cosine"])
def test_all_is_masked_at_first_and_nothing_in_the_end(schedule):
    config = ResGenConfig(**SIZES, schedule=schedule)
    n = [config.masked(t / 8, 10) for t in range(9)]
    assert (n[0], n[-1]) == (40, 0)
    assert n == sorted(n, reverse=True)


# --- the mixture ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture():
    g = rng(1)
    P, K, r, d = 5, 4, 2, 3
    return Mixture(
        torch.randn(P, K, generator=g), torch.randn(P, K, r, generator=g),
        torch.randn(P, d, generator=g), torch.randn(P, generator=g) * 0.5,
        torch.randn(K, d, r, generator=g),
    )  # fmt: skip


def test_densities_equal_dense_gaussians(mixture):
    z = torch.randn(5, 3, generator=rng(2))
    means = torch.stack([mixture.means(torch.full((5,), k)) for k in range(4)], 1)
    spread = mixture.log_scale.exp()[:, None, None].expand_as(means)
    parts = Independent(Normal(means, spread), 1)
    torch.testing.assert_close(mixture.log_densities(z), parts.log_prob(z[:, None]))


@pytest.mark.parametrize("smoothing", [0.0, 0.01, 0.5, 1.0])
def test_two_terms_bound_the_mixture_from_above(mixture, smoothing):
    z = torch.randn(5, 3, generator=rng(2))
    means = torch.stack([mixture.means(torch.full((5,), k)) for k in range(4)], 1)
    spread = mixture.log_scale.exp()[:, None, None].expand_as(means)
    whole = MixtureSameFamily(Choice(logits=mixture.logits), Independent(Normal(means, spread), 1))
    density, choice = mixture.losses(z, smoothing)
    # Jensen: -log sum pi N <= -sum q log N + KL(q | pi), for every q.
    assert ((density + choice) >= -whole.log_prob(z) - 1e-5).all()
    assert (choice >= -1e-6).all()


def test_choice_costs_nothing_where_weights_are_the_posterior(mixture):
    z = torch.randn(5, 3, generator=rng(2))
    q = 0.99 * mixture.log_densities(z).softmax(-1) + 0.01 / 4
    _, choice = mixture._replace(logits=q.log()).losses(z, 0.01)
    assert choice.abs().max() < 1e-5


# --- the network ----------------------------------------------------------------------------------------------------


def test_visible_and_masked_sums_join_to_the_whole():
    net, g = model(), rng()
    codes = torch.randint(8, (6, 4), generator=g)
    k = draw_masked(13, 6, 4, g)
    whole = torch.stack([net.books[j][codes[:, j]] for j in range(4)]).sum(0)
    torch.testing.assert_close(net.visible_sum(codes, k) + net.masked_sum(codes, k), whole)
    none = torch.zeros(6, dtype=torch.int64)
    assert net.masked_sum(codes, none).abs().max() == 0
    assert net.visible_sum(codes, none + 4).abs().max() == 0


def test_what_is_masked_is_not_read_and_positions_are_seen_both_ways():
    net, g = model(), rng()
    codes = torch.randint(8, (6, 4), generator=g)
    k = torch.tensor([4, 1, 2, 0, 3, 4])
    other = torch.where(net._seen(k), codes, (codes + 1) % 8)
    none = [torch.zeros(0, dtype=torch.int64)]
    states = net.hidden([codes], [k], none)
    torch.testing.assert_close(net.hidden([other], [k], none), states)
    codes[3, 0] = (codes[3, 0] + 1) % 8
    moved = (net.hidden([codes], [k], none) - states).abs().amax(1)
    assert (moved > 1e-4).all()


def test_quantising_an_exact_sum_gives_the_codes_back():
    books = torch.eye(8)[None] * torch.tensor([1.0, 0.2, 0.04, 0.008])[:, None, None]
    codes = torch.randint(8, (50, 4), generator=rng())
    for k in range(5):
        masked = torch.full((50,), k)
        own = torch.arange(4) >= 4 - k
        z = (torch.stack([books[j][codes[:, j]] for j in range(4)], 1) * own[:, None]).sum(1)
        start = torch.where(own, 0, codes)
        assert torch.equal(residual_codes(z, books, start, masked), codes)


@pytest.mark.parametrize("head", ["mixture", "discrete"])
@pytest.mark.parametrize("order", ["confidence", "random"])
def test_sampling_reveals_prefixes_and_keeps_them(head, order):
    net = model(head=head)
    options = ResGenSampling(steps=5, order=order, cfg=1.5, top_p=0.9)
    asks = [CodeRequest(length=7, condition=torch.tensor([1, 3])), CodeRequest(length=4)]
    known = [torch.full((r.length, 4), -1) for r in asks]
    step = [0, 0]
    for event in net.run(asks, options):
        i, stood = event.request, known[event.request] >= 0
        step[i] += 1
        shown = event.codes >= 0
        assert int((~shown).sum()) == net.config.masked(step[i] / 5, asks[i].length)
        assert torch.equal(shown, shown.cummin(1).values.bool())  # a prefix in depth
        assert torch.equal(event.codes[stood], known[i][stood])
        known[i] = event.codes
        assert event.forwards == 2 * step[i]
    assert step == [5, 5]
    assert all((k >= 0).all() and (k < 8).all() for k in known)


@pytest.mark.parametrize("head", ["mixture", "discrete"])
def test_rows_do_not_depend_on_their_neighbours(head):
    net, options = model(head=head), ResGenSampling(steps=4)
    asks = [CodeRequest(length=n, condition=torch.tensor([n % 5])) for n in (5, 9, 2)]
    together, forwards = draw(net, asks, options, [rng(i) for i in range(3)])
    alone = [draw(net, [a], options, [rng(i)])[0][0] for i, a in enumerate(asks)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone))
    assert forwards == 4


def test_passes_do_not_grow_with_depth():
    for depth in (2, 4):
        net = ResGen(ResGenConfig(**{**SIZES, "vocab": (8,) * depth}))
        assert draw(net, [CodeRequest(length=3)], ResGenSampling(steps=6))[1] == 6


def test_loss_counts_only_masked_positions_and_learns():
    net, g = model(), rng()
    codes = [torch.randint(8, (n, 4), generator=g) for n in (6, 3)]
    masks = [torch.tensor([0, 4, 0, 1, 0, 0]), torch.tensor([0, 0, 2])]
    none = [c[:0, 0] for c in codes]
    loss = net.losses(codes, masks, none)["loss"]
    hidden, k = net.hidden(codes, masks, none), torch.cat(masks)
    z = torch.cat([net.masked_sum(x, m) for x, m in zip(codes, masks)])
    each = [
        sum(net.head.mixture(hidden[i][None]).losses(z[i][None], 0.01))
        for i in torch.nonzero(k)[:, 0]
    ]
    torch.testing.assert_close(loss, torch.cat(each).sum() / 7)

    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    first = last = 0.0
    for step in range(60):
        loss = net.loss(codes, [torch.tensor([1]), torch.tensor([2])], g)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        first, last = (loss.item(), last) if step == 0 else (first, loss.item())
    assert last < first - 1
    assert net.tables.weight.grad is None  # the codec's vectors stay


def test_discrete_loss_is_the_cross_entropy_of_what_is_masked():
    net = model(head="discrete")
    codes, k = torch.randint(8, (3, 4), generator=rng()), torch.tensor([1, 0, 3])
    none = [torch.zeros(0, dtype=torch.int64)]
    logits = net.head.discrete(net.hidden([codes], [k], none))
    each = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")
    expected = (each[0, 3:].sum() + each[2, 1:].sum()) / 4
    torch.testing.assert_close(net.losses([codes], [k], none)["loss"], expected)


def test_bad_input_is_named():
    net = model()
    with pytest.raises(ValueError, match="length 0"):
        net.run([CodeRequest(length=0)])
    with pytest.raises(ValueError, match="has 25 positions"):
        net.run([CodeRequest(length=25)])
    with pytest.raises(ValueError, match=r"expected 0\.\.\.4"):
        draw(net, [CodeRequest(length=2, condition=torch.tensor([5]))])
    with pytest.raises(ValueError, match="vectors is None"):
        ResGenConfig(**{**SIZES, "vectors": None})
    with pytest.raises(ValueError, match="one size for all depths"):
        ResGenConfig(**{**SIZES, "vocab": (8, 4)})
    with pytest.raises(ValueError, match="steps 0"):
        ResGenSampling(steps=0)
