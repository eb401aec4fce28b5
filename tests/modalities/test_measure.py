import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from anytok.modalities import Shape
from anytok.modalities.measure import (
    chamfer,
    f_score,
    mel_distance,
    psnr,
    si_sdr,
    ssim,
    volume_iou,
)
from tests.modalities.conftest import cube, picture, tone


def noisy(image: torch.Tensor, amount: float) -> torch.Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(7))
    return (image + amount * noise).clamp(0, 1)


@pytest.mark.parametrize("amount", [0.01, 0.2])
def test_psnr_and_ssim_are_scikit_images(amount):
    original = picture(40, 52)
    other = noisy(original, amount)
    a, b = other.double().numpy(), original.double().numpy()
    assert psnr(other, original) == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1))
    expected = structural_similarity(
        b,
        a,
        channel_axis=0,
        data_range=1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim(other, original) == pytest.approx(expected, abs=1e-6)


def test_psnr_by_hand():
    assert psnr(torch.full((2, 2), 0.1), torch.zeros(2, 2)) == pytest.approx(20)
    assert (
        psnr(torch.tensor([255], dtype=torch.uint8), torch.tensor([0], dtype=torch.uint8), 255) == 0
    )
    assert psnr(torch.zeros(3), torch.zeros(3)) == math.inf
    assert ssim(picture(), picture()) == pytest.approx(1)


def test_si_sdr_by_hand():
    original = torch.tensor([1.0, 0.0, 1.0, 0.0])
    across = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert si_sdr(3 * original + 0.3 * across, original) == pytest.approx(20)
    assert si_sdr(0.1 * original, original) == math.inf
    assert si_sdr(across, original) == -math.inf
    two = torch.stack([original + 0.1 * across, original + 0.01 * across])
    assert si_sdr(two, torch.stack([original, original])) == pytest.approx(30)


@given(st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_si_sdr_does_not_see_loudness(gain):
    original = tone(0.1).samples
    other = original + 0.01 * torch.randn(
        original.shape, generator=torch.Generator().manual_seed(0)
    )
    assert si_sdr(gain * other, original) == pytest.approx(si_sdr(other, original), abs=1e-3)


def test_mel_distance_grows_with_damage():
    original = tone(0.5).samples
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
    near, far = (mel_distance(original + a * noise, original, 16_000) for a in (1e-3, 1e-1))
    assert mel_distance(original, original, 16_000) == 0
    assert 0 < near < far
    # Ten times as loud is one power of ten in every band that is not at the floor: seven scales, distance 7.
    loud = noise / 4
    assert mel_distance(10 * loud, loud, 16_000) == pytest.approx(7, abs=1e-2)


def grid(offset: float = 0.0) -> Shape:
    points = torch.cartesian_prod(*[torch.arange(5.0)] * 3)
    return Shape(points + torch.tensor([offset, 0, 0]))


def test_chamfer_and_f_score_by_hand():
    assert chamfer(grid(), grid()) == 0
    assert chamfer(grid(0.25), grid()) == pytest.approx(0.25)
    assert f_score(grid(0.25), grid(), threshold=0.26 / math.sqrt(48)) == 1
    assert f_score(grid(0.25), grid(), threshold=0.24 / math.sqrt(48)) == 0
    # Half of the points are missing: precision 1, recall 1/2.
    half = Shape(grid().vertices[:62])
    assert f_score(half, grid(), threshold=1e-3) == pytest.approx(2 * (62 / 125) / (1 + 62 / 125))


def test_chamfer_against_brute_force():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.rand(n, 3, generator=rng) for n in (200, 300))
    table = torch.cdist(a.double(), b.double())
    expected = (table.amin(1).mean() + table.amin(0).mean()).item() / 2
    assert chamfer(Shape(a), Shape(b)) == pytest.approx(expected)


def test_meshes_are_sampled():
    moved = Shape(cube().vertices + torch.tensor([0.0, 0.0, 0.02]), cube().faces)
    assert f_score(cube(), cube()) == pytest.approx(1, abs=1e-3)
    assert 0.5 < f_score(moved, cube()) < 1  # two of six faces are off by more than 1 % of √3
    assert chamfer(cube(), cube()) < 0.01


def test_volume_iou_by_hand():
    def moved(x: float) -> Shape:
        return Shape(cube().vertices + torch.tensor([x, 0.0, 0.0]), cube().faces)

    assert volume_iou(cube(), cube()) == 1
    assert volume_iou(moved(0.5), cube()) == pytest.approx(1 / 3, abs=0.01)
    assert volume_iou(moved(2.0), cube()) == 0
    half = Shape(cube().vertices * torch.tensor([0.5, 1, 1]), cube().faces)
    assert volume_iou(half, cube()) == pytest.approx(0.5, abs=0.01)


NAN = torch.full((1, 12, 12), torch.nan)


@pytest.mark.parametrize("measure", [psnr, ssim, si_sdr, lambda a, b: mel_distance(a, b, 16_000)])
def test_other_shapes_and_nan_are_refused(measure):
    with pytest.raises(
        ValueError, match=r"\(1, 12, 11\), original \(1, 12, 12\), expected equal shapes"
    ):
        measure(torch.zeros(1, 12, 11), torch.zeros(1, 12, 12))
    with pytest.raises(ValueError, match="the reconstruction holds NaN"):
        measure(NAN, torch.ones(1, 12, 12))
    with pytest.raises(ValueError, match="the original holds NaN"):
        measure(torch.ones(1, 12, 12), NAN)
    with pytest.raises(ValueError, match="both are empty"):
        measure(torch.zeros(1, 0), torch.zeros(1, 0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ssim(torch.zeros(10, 20), torch.zeros(10, 20)), "at least 11 × 11"),
        (lambda: si_sdr(torch.ones(4), torch.zeros(4)), "original is silent"),
        (lambda: si_sdr(torch.zeros(4), torch.ones(4)), "reconstruction is silent"),
        (lambda: f_score(grid(), grid(), threshold=0), "more than 0"),
        (lambda: volume_iou(grid(), cube()), "reconstruction is not watertight"),
        (lambda: volume_iou(cube(), cube(), resolution=1), "at least 2"),
    ],
)
def test_wrong_use_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_are_plain_floats():
    values = [
        psnr(picture(), noisy(picture(), 0.1)),
        chamfer(grid(), grid(0.1)),
        f_score(grid(), grid()),
    ]
    assert all(type(value) is float for value in values)
    assert np.isfinite(values).all()
