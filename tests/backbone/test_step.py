import pytest
import torch

from anytok.backbone.int8 import Int8Linear
from anytok.backbone.step import Stepper
from tests.backbone.test_transformer import KINDS
from tests.backbone.tiny import transformer


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_step_is_the_forward_of_one_position(kind):
    model = transformer(**KINDS[kind]).fuse()
    step = Stepper(model)
    rng = torch.Generator().manual_seed(1)
    for lengths in ([4, 4], [2, 7]):
        padded = torch.randint(64, (2, max(lengths)), generator=rng)
        caches = [model.cache(2, 12) for _ in range(2)]
        for cache in caches:
            model(padded, cache=cache, counts=lengths, keep=0)
        for _ in range(4):
            ids = torch.randint(64, (2,), generator=rng)
            want = model(ids[:, None], cache=caches[0], keep=0).hidden[:, 0]
            torch.testing.assert_close(step(ids, caches[1]), want, atol=1e-5, rtol=1e-4)
        assert torch.equal(caches[0].lengths, caches[1].lengths)


@torch.no_grad()
def test_a_step_stops_at_the_context():
    model = transformer(context=3).fuse()
    cache = model.cache(1, 3)
    model(torch.zeros(1, 3, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="context is 3"):
        Stepper(model)(torch.zeros(1, dtype=torch.long), cache)


@torch.no_grad()
def test_half_precision_steps_as_it_runs():
    model = transformer().to(torch.bfloat16).fuse()
    caches = [model.cache(1, 4) for _ in range(2)]
    ids = torch.tensor([5])
    want = model(ids[:, None], cache=caches[0], keep=0).hidden[:, 0]
    torch.testing.assert_close(Stepper(model)(ids, caches[1]), want, atol=0.05, rtol=0.05)


def test_int8_steps_stay_near_float_and_say_where_they_run():
    model = transformer().fuse()
    exact, rounded = Stepper(model), Stepper(model, int8=True)
    caches = [model.cache(3, 12) for _ in range(2)]
    ids = torch.randint(64, (12, 3), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for step in ids:
            a, b = exact(step, caches[0]), rounded(step, caches[1])
            drift = (a - b).norm(dim=-1) / a.norm(dim=-1)
    assert 0 < float(drift.max()) < 0.1
    with pytest.raises(ValueError, match="int8 is for CPUs, the weights are on meta"):
        Int8Linear(torch.empty(3, 3, device="meta"))
