import torch

from anytok.judges.image import ranks, recall, thumbnails
from anytok.modalities.image import Image


def test_ranks_count_what_is_nearer_than_the_answer():
    gallery = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    places = ranks(gallery * 3 + 5, gallery, range(20))  # another scale and mean: standardised away
    assert places.tolist() == [0] * 20
    assert recall(places, 1) == 1
    shifted = ranks(gallery, gallery, [(i + 1) % 20 for i in range(20)])
    assert (shifted > 0).all()
    assert recall(torch.tensor([0, 3, 7, 1]), 2) == 0.5


def test_thumbnails_lay_alpha_over_white():
    clear = Image(torch.zeros(3, 32, 32), torch.zeros(1, 32, 32))
    assert torch.equal(thumbnails([clear]), torch.ones(1, 3 * 16 * 16))
