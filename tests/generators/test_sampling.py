import pytest
import torch

from anytok.generators.sampling import Sampling, draw, guided, probabilities


def rngs(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def test_top_k_keeps_ties_and_top_p_keeps_what_crosses():
    logits = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    kept = probabilities(logits, Sampling(top_k=2))[0] > 0
    assert kept.tolist() == [True, True, True, False]
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert (probabilities(shares, Sampling(top_p=0.6))[0] > 0).tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert (probabilities(shares, Sampling(top_p=1.0))[0] > 0).all()


def test_temperature_zero_is_the_likeliest():
    assert draw(torch.tensor([[0.0, 2, 1], [5, 0, 0]]), Sampling(temperature=0), rngs(2)) == [1, 0]


def test_draws_follow_the_probabilities():
    shares = torch.tensor([0.6, 0.3, 0.1, 0.0])
    rng = torch.Generator().manual_seed(0)
    drawn = draw(shares.log().expand(4000, 4), Sampling(), [rng] * 4000)
    counts = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    assert counts[3] == 0
    torch.testing.assert_close(counts, shares, atol=0.03, rtol=0)


def test_a_row_draws_from_its_own_generator():
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(9))
    together = draw(logits, Sampling(), rngs(5))
    alone = [draw(logits[i : i + 1], Sampling(), rngs(1, i))[0] for i in range(5)]
    assert together == alone


def test_guidance():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert guided(a, b, 1.0).tolist() == [1, 2]
    assert guided(a, b, 0.0).tolist() == [0, 4]
    assert guided(a, b, 2.0).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0}, "top_p")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
