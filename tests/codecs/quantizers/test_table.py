"""Tables of int8 rows, nearest rows, k-means."""

import torch

from anytok.codecs.quantizers.table import Table, kmeans, nearest


def test_rows_are_rounded_to_what_will_be_stored():
    numbers = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1, 10, 0.1, 0]
    )
    table = Table(3, 20, 4)
    table.store(numbers, 1)
    scale = numbers.abs().amax(0).clamp_min(1e-3) / 127
    assert ((table(1) - numbers).abs() <= 0.51 * scale * 1.01).all()
    assert (table(0) == 0).all()
    kept = Table(3, 20, 4)
    kept.load_state_dict(
        {k: v.half() if v.is_floating_point() else v for k, v in table.state_dict().items()}
    )
    assert torch.equal(kept(1), table(1))
    assert torch.equal(kept.to(torch.bfloat16)(1), table(1))
    assert kept.scale.dtype == torch.float32


def test_the_nearest_row_in_chunks():
    rng = torch.Generator().manual_seed(0)
    x, rows = torch.randn(50, 5, generator=rng), torch.randn(9, 5, generator=rng)
    assert torch.equal(nearest(x, rows, chunk=7), torch.cdist(x, rows).argmin(1))


def test_kmeans_finds_groups_and_uses_every_row():
    rng = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = (centres[:, None] + 0.1 * torch.randn(4, 30, 2, generator=rng)).flatten(0, 1)
    rows = kmeans(points, 8, rng, 20)
    assert torch.cdist(centres, rows).amin(1).max() < 0.5
    before = kmeans(points, 8, torch.Generator().manual_seed(1), 0)
    after = kmeans(points, 8, torch.Generator().manual_seed(1), 10)
    spread = [torch.cdist(points, r).amin(1).square().mean() for r in (before, after)]
    assert spread[1] < spread[0]
