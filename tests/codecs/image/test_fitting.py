"""Fitting pictures to a square and back: what comes out is the source, as far as the fit allows."""

import pytest
import torch

from anytok.codecs.image.fitting import fit_pictures, restore_picture
from anytok.modalities import Image


def smooth(height: int, width: int) -> Image:
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    return Image(torch.stack([x * y, 1 - y + 0 * x, x + 0 * y]))


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (33, 200), (1, 7)])
@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_smooth_pictures_survive(fit, size):
    picture = smooth(*size)
    pixels, (meta,) = fit_pictures([picture], 64, fit)
    assert pixels.shape == (1, 3, 64, 64)
    back = restore_picture(pixels[0], meta)
    assert back.pixels.shape == picture.pixels.shape
    assert (back.pixels - picture.pixels).abs().mean() < 0.03


def test_crop_takes_the_centre_of_the_shorter_side():
    picture = Image(torch.zeros(3, 64, 192).index_fill(2, torch.arange(64, 128), 1.0))
    pixels, (meta,) = fit_pictures([picture], 64, "crop")
    assert torch.equal(pixels, torch.ones(1, 3, 64, 64))
    assert restore_picture(pixels[0], meta).pixels.shape == (3, 64, 64)


def test_pad_is_white_and_goes_away():
    picture = Image(torch.zeros(3, 16, 64))
    pixels, (meta,) = fit_pictures([picture], 64, "pad")
    assert pixels[0, :, 0].eq(1).all()
    assert pixels[0, :, 32].eq(0).all()
    assert restore_picture(pixels[0], meta).pixels.eq(0).all()
