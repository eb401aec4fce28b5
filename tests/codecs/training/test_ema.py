import contextlib

import pytest
import torch
from torch import nn

from anytok.codecs.training.ema import Ema


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_average_with_its_ramp(decay):
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    ema, expected = Ema([weight], decay), weight.detach().double()
    for step in range(40):
        weight.data.add_(torch.tensor([0.1, 1.0]))
        ema.update(step)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * weight.detach().double()
    torch.testing.assert_close(ema.average[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_applied_changes_places_and_back_even_after_an_error():
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    ema = Ema(layer.parameters(), 0.9)
    ema.average[0].fill_(3.0)
    with contextlib.suppress(KeyError), ema.applied():
        assert (layer.weight == 3).all()
        raise KeyError
    assert torch.equal(layer.weight, before)
    assert (ema.average[0] == 3).all()


def test_state_comes_back():
    layer = nn.Linear(2, 2)
    ema, other = Ema(layer.parameters(), 0.9), Ema(layer.parameters(), 0.9)
    layer.weight.data.fill_(1.0)
    ema.update(0)
    other.load(ema.state())
    assert torch.equal(other.average[0], ema.average[0])


def test_nothing_to_average():
    Ema([], 0.9).update(0)
