"""The five ways to cut a grid, against plain loops."""

import pytest
import torch

from anytok.backbone.entities import KINDS, Entities


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(16, 16), (5, 7), (1, 1), (8, 3)])
def test_any_grid_comes_back(kind, grid):
    entities = Entities(kind, grid, {"cell": 4, "subsample": 3}.get(kind))
    latents = torch.randn(2, 3, *grid)
    sequence = entities.split(latents)
    assert sequence.shape == (2, entities.length, 3)
    assert entities.blocks().bincount().tolist() == list(entities.sizes)
    torch.testing.assert_close(entities.join(sequence), latents)
    for first in range(len(entities)):
        start, stop = entities.span(first, first + 1)
        assert stop - start == entities.sizes[first] > 0
        assert (entities.blocks()[start:stop] == first).all()


def test_cells_are_squares_in_raster_order():
    entities = Entities("cell", (16, 16))
    assert entities.sizes == (64,) * 4
    grid = torch.arange(256.0).view(1, 1, 16, 16)
    expected = [grid[0, 0, i : i + 8, j : j + 8].flatten() for i in (0, 8) for j in (0, 8)]
    assert torch.equal(entities.split(grid)[0, :, 0], torch.cat(expected))
    ragged = Entities("cell", (5, 7), 4)
    assert ragged.sizes == (16, 12, 4, 3)


def test_subsamples_are_strided():
    entities = Entities("subsample", (4, 4), 2)
    assert entities.order.tolist() == [
        *(0, 2, 8, 10), *(1, 3, 9, 11), *(4, 6, 12, 14), *(5, 7, 13, 15),
    ]  # fmt: skip
    # the paper's figure: a stride of half the side, 4 positions a step
    figure = Entities("subsample", (8, 8), 4)
    assert len(figure) == 16
    assert set(figure.sizes) == {4}
    assert figure.coordinates[figure.sizes[0]].tolist() == [0, 1]  # then the next column offset


def test_scales_are_means_from_coarse_to_fine():
    entities = Entities("scale", (16, 16))
    assert entities.sizes == (1, 4, 16, 64, 256)
    latents = torch.randn(1, 2, 16, 16)
    sequence = entities.split(latents)
    torch.testing.assert_close(sequence[0, 0], latents.mean((2, 3))[0])
    torch.testing.assert_close(sequence[0, 2], latents[0, :, :8, 8:].mean((1, 2)))
    half = entities.join(sequence[:, :5])  # what is there fills the grid
    torch.testing.assert_close(half[0, :, 3, 12], latents[0, :, :8, 8:].mean((1, 2)))
    assert entities.coordinates[0].tolist() == [7.5, 7.5]
    assert entities.coordinates[-1].tolist() == [15, 15]
    assert Entities("scale", (16, 16), 2).sizes == (64, 256)
    assert Entities("scale", (5, 3)).scales == ((1, 1), (2, 1), (3, 2), (5, 3))


def test_what_is_not_there_is_zero():
    entities = Entities("cell", (4, 4), 2)
    latents = torch.rand(1, 3, 4, 4) + 1
    part = entities.join(entities.split(latents)[:, :4])
    assert torch.equal(part[..., :2, :2], latents[..., :2, :2])
    assert part.count_nonzero() == 12
    for kind in KINDS:
        nothing = Entities(kind, (4, 4)).join(torch.zeros(1, 0, 3))
        assert nothing.shape == (1, 3, 4, 4)
        assert not nothing.any()


def test_bad_input():
    with pytest.raises(ValueError, match=r"entity is 'row', expected one of token"):
        Entities("row", (4, 4))
    with pytest.raises(ValueError, match=r"size is 2, image takes none"):
        Entities("image", (4, 4), 2)
    with pytest.raises(ValueError, match=r"size is 0, cell takes 1 or more"):
        Entities("cell", (4, 4), 0)
    with pytest.raises(ValueError, match=r"size is 9, a grid of \(4, 4\) has at most 3 scales"):
        Entities("scale", (4, 4), 9)
    with pytest.raises(ValueError, match=r"latents are \(1, 3, 4, 5\), expected \[B, C, 4, 4\]"):
        Entities("cell", (4, 4)).split(torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"grid is \(0, 4\)"):
        Entities("cell", (0, 4))
