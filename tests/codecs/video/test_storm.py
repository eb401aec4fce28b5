"""STORM: reductions against the fixture, every length, batches, streams, and what it says no to."""

import pytest
import torch
from einops import rearrange

from anytok.codecs.video.storm import (
    MIXERS,
    Projector,
    Storm,
    StormConfig,
    fold,
    reduce,
    spatial_pool,
    temporal_pool,
)
from tests.golden.load import load_golden


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def storm(seed=0, **options):
    torch.manual_seed(seed)
    return Storm(StormConfig(**{"width": 16, "state": 4, **options})).eval()


def test_reductions_are_the_published_ones():
    golden = load_golden("video_storm_mamba")
    assert torch.equal(fold(golden["feat"]), golden["vila_down"])
    assert torch.equal(fold(golden["feat_odd"]), golden["vila_down_odd"])
    assert torch.equal(fold(golden["feat_odd"]), golden["vila_down_fix_odd"])
    x = golden["vila_down"][None]
    torch.testing.assert_close(temporal_pool(x, 4)[0], golden["t_pool_k4"])
    torch.testing.assert_close(spatial_pool(x, 2)[0], golden["s_pool_2x2"])
    sampled = reduce(x, counts=[8], grid=(4, 4), sample=2)
    assert torch.equal(sampled.x[0], golden["t_sample_s2"])
    both = reduce(x, counts=[8], grid=(4, 4), temporal=4, sample=2)
    torch.testing.assert_close(both.x[0], golden["t_pool_k4_then_sample_s2"])
    assert both.counts == (1,)


@pytest.mark.parametrize(("frames", "left"), [(8, 2), (9, 3), (3, 1), (1, 1), (7, 2)])
def test_frames_that_do_not_divide_are_the_last_mean(frames, left):
    x = torch.randn(2, frames, 4, 3, generator=rng())
    pooled = temporal_pool(x, 4)
    assert pooled.shape == (2, left, 4, 3)
    for group in range(left):
        torch.testing.assert_close(pooled[:, group], x[:, 4 * group : 4 * group + 4].mean(1))
    # Weighted by their frames, the groups' mean is the video's mean: none lost, none counted twice.
    sizes = torch.tensor([min(4, frames - 4 * g) for g in range(left)])
    total = (pooled * sizes[:, None, None]).sum(1) / frames
    torch.testing.assert_close(total, x.mean(1))


def test_windows_at_the_edge_are_smaller():
    x = torch.randn(1, 2, 15, 3, generator=rng())
    pooled = spatial_pool(x, 2, grid=(3, 5))
    assert pooled.shape == (1, 2, 6, 3)
    square = rearrange(x, "b t (h w) d -> b t h w d", h=3)
    torch.testing.assert_close(pooled[:, :, 5], square[:, :, 2, 4])
    torch.testing.assert_close(pooled[:, :, 2], square[:, :, :2, 4].mean(2))
    assert spatial_pool(x, 1, grid=(3, 5)) is x


@torch.no_grad()
@pytest.mark.parametrize("merge", MIXERS)
@pytest.mark.parametrize(
    ("options", "sample", "share"),
    [
        ({"temporal": 1}, 1, 1.0),
        ({"temporal": 4}, 1, 0.25),
        ({"temporal": 1, "spatial": 2}, 1, 0.25),
        ({"temporal": 4, "spatial": 2}, 1, 0.0625),
        ({"temporal": 4}, 2, 0.125),
        ({"temporal": 4, "spatial": 2}, 2, 0.03125),
    ],
)
def test_the_papers_combinations(merge, options, sample, share):
    reduced = storm(merge=merge, **options)(torch.randn(1, 32, 16, 16), sample=sample)
    assert reduced.tokens.shape[1] == 32 * 16 * share
    assert reduced.valid.all()
    assert reduced.x.shape[1:3] == (reduced.counts[0], reduced.grid[0] * reduced.grid[1])


@torch.no_grad()
@pytest.mark.parametrize("merge", MIXERS)
def test_videos_of_different_length_equal_single_ones(merge):
    model = storm(merge=merge, temporal=4, spatial=2)
    counts = [10, 1, 7]
    x = torch.randn(3, 10, 6, 16, generator=rng())
    x[torch.arange(10) >= torch.tensor(counts)[:, None]] = 1e3
    batch = model(x, counts=counts, grid=(2, 3), sample=2)
    assert batch.counts == (2, 1, 1)
    assert batch.grid == (1, 2)
    for row, n in enumerate(counts):
        alone = model(x[row : row + 1, :n], grid=(2, 3), sample=2)
        m = alone.x.shape[1]
        assert (m,) == alone.counts == batch.counts[row : row + 1]
        torch.testing.assert_close(batch.x[row, :m], alone.x[0], atol=1e-5, rtol=1e-5)
        assert not batch.x[row, m:].any()
        assert batch.valid[row].sum() == m * 2


@torch.no_grad()
def test_the_scan_reads_frame_behind_frame_in_both_directions():
    x = torch.randn(1, 6, 4, 16, generator=rng())
    changed = x.clone()
    changed[0, 3, 2, 0] += 3
    for merge, before in (("shared", True), ("two", True), ("forward", False)):
        model = storm(merge=merge, temporal=1, layers=1)
        moved = (model(x).x - model(changed).x).abs().amax(-1)[0].flatten() > 0
        place = 3 * 4 + 2
        assert moved[place : place + 6].all()  # into the next frame
        assert bool(moved[place - 6 : place].all()) is before
        assert bool(moved[:place].any()) is before


@torch.no_grad()
@pytest.mark.parametrize("sample", [1, 2])
def test_a_stream_is_the_whole(sample):
    model = storm(merge="forward", temporal=4, spatial=2)
    x = torch.randn(2, 19, 4, 16, generator=rng())
    want = model(x, sample=sample)
    stream = model.stream(sample=sample)
    parts = [stream.push(part) for part in x.split([1, 2, 9, 5, 1, 1], 1)]
    parts.append(stream.finish())
    torch.testing.assert_close(torch.cat(parts, 1), want.x, atol=1e-5, rtol=1e-5)
    held = sum(s.conv.numel() + s.scan.numel() for s in stream.states)
    longer = model.stream()
    longer.push(torch.cat([x] * 5, 1))
    assert held == sum(s.conv.numel() + s.scan.numel() for s in longer.states)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = storm(temporal=2, layers=2)
    projector = Projector(5, 16)
    features = torch.randn(2, 3, 9, 5, generator=rng())
    reduced = model(projector(features), counts=[3, 2])
    assert reduced.x.shape == (2, 2, 4, 16)
    reduced.x.square().sum().backward()
    for name, p in [*model.named_parameters(), *projector.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_a_picture_is_a_video_of_one_frame():
    reduced = storm()(torch.randn(2, 1, 16, 16))
    assert reduced.x.shape == (2, 1, 16, 16)


def test_what_cannot_be_is_named():
    model = storm()
    with pytest.raises(ValueError, match="expected \\[B, T, N, D\\] with D = 16"):
        model(torch.ones(1, 2, 4, 8))
    with pytest.raises(ValueError, match="expected 1 numbers of 1 to 0"):
        model(torch.ones(1, 0, 4, 16))
    with pytest.raises(ValueError, match="expected 2 numbers of 1 to 3"):
        model(torch.ones(2, 3, 4, 16), counts=[3, 4])
    with pytest.raises(ValueError, match="has 6 tokens, the grid is 2 x 2; give grid"):
        model(torch.ones(1, 2, 6, 16))
    with pytest.raises(ValueError, match=r"has 6 tokens, the grid is 4 x 2$"):
        model(torch.ones(1, 2, 6, 16), grid=(4, 2))
    with pytest.raises(ValueError, match="sample is 0"):
        model(torch.ones(1, 2, 4, 16), sample=0)
    with pytest.raises(ValueError, match="a stream needs 'forward'"):
        model.stream()
    with pytest.raises(ValueError, match="ends before any frame"):
        storm(merge="forward").stream().finish()
    with pytest.raises(ValueError, match="merge is 'sum'"):
        StormConfig(width=4, merge="sum")
    with pytest.raises(ValueError, match="temporal is 0"):
        StormConfig(width=4, temporal=0)
