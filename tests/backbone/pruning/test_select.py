"""Methods that choose before the model: parity, batches, degenerate input, and what becomes of the sequence."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from anytok.backbone.interleave import Packed, Segment
from anytok.backbone.pruning import baselines, divprune, globalcom2, packed, vtccls
from anytok.backbone.pruning.globalcom2 import AnyRes
from anytok.backbone.pruning.methods import METHODS, select
from anytok.backbone.pruning.select import Selection, Visual, budget, compact, kept_places, top
from tests.golden.load import load_golden


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def visual(features, **more):
    return Visual(features=features, **more)


@pytest.mark.parametrize("table", [divprune.TABLE, 100])
def test_divprune_chooses_as_published(table):
    golden = load_golden("backbone_divprune")
    for case in [c for c in golden["cases"] if c is not None] + [golden["brute"]]:
        one = visual(case["x"][None])
        (m,) = budget(case["ratio"], [len(case["x"])])
        assert m == len(case["selected"])
        assert torch.equal(divprune.order(one, m, table=table)[0], case["selected"])
        kept = divprune.select(one, m, table=table).indices[0]
        assert torch.equal(kept, case["selected"].sort().values)


def test_divprune_reaches_the_optimum_of_the_small_case():
    case = load_golden("backbone_divprune")["brute"]
    directions = F.normalize(case["x"], dim=1)
    distances = (1 - directions @ directions.T).fill_diagonal_(9)
    kept = divprune.select(visual(case["x"][None]), 4).indices[0].tolist()
    best = max(
        min(float(distances[i, j]) for i, j in itertools.combinations(chosen, 2))
        for chosen in itertools.combinations(range(len(case["x"])), 4)
    )
    mine = min(float(distances[i, j]) for i, j in itertools.combinations(kept, 2))
    assert mine == pytest.approx(best, abs=1e-6)
    assert best == pytest.approx(case["optimal"], abs=1e-6)


@pytest.mark.parametrize("table", [divprune.TABLE, 30])
def test_divprune_never_chooses_twice_where_directions_are_few(table):
    case = load_golden("backbone_divprune")["degenerate"]
    assert len(case["selected"].unique()) < 6  # the published code does
    found = divprune.order(visual(case["x"][None]), 6, table=table)[0].tolist()
    assert len(set(found)) == 6
    assert {index // 4 for index in found[:3]} == {0, 1, 2}  # all three directions first
    scaled = case["x"] * torch.arange(1, 13)[:, None]
    assert divprune.order(visual(scaled[None]), 6, table=table)[0].tolist() == found


@pytest.mark.parametrize("table", [divprune.TABLE, 30])
def test_divprune_takes_vectors_of_zeros_last(table):
    case = load_golden("backbone_divprune")["zero"]
    zero = int((case["x"].norm(dim=1) == 0).nonzero())
    found = divprune.order(visual(case["x"][None]), 16, table=table)[0].tolist()
    assert sorted(found) == list(range(16))
    assert found[-1] == zero
    nothing = divprune.select(visual(torch.zeros(1, 5, 3)), 3, table=table)
    assert nothing.indices.tolist() == [[0, 1, 2]]


def test_divprune_of_half_precision_is_that_of_the_same_numbers_in_float32():
    x = torch.randn(2, 60, 8, generator=rng()).half()
    assert torch.equal(
        divprune.select(visual(x), 20).indices, divprune.select(visual(x.float()), 20).indices
    )


def ragged(seed=1):
    """Four rows of different length, padded in different places with numbers that would be chosen."""
    counts, n = [30, 17, 1, 24], 30
    g = rng(seed)
    x = torch.randn(4, n, 8, generator=g) * 100
    valid = torch.arange(n) < torch.tensor(counts)[:, None]
    valid = torch.stack([v[torch.randperm(n, generator=g)] for v in valid])
    x[valid] = torch.randn(int(valid.sum()), 8, generator=g)
    attention = torch.rand(5, 4, n, generator=g)
    return Visual(features=x, valid=valid, cls_attention=attention), [10, 17, 1, 3]


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_batch_equal_single_rows(method):
    batch, keep = ragged()
    chosen = select(method, batch, keep)
    assert chosen.counts == keep
    for row, m in enumerate(keep):
        real = batch.valid[row]
        alone = Visual(
            features=batch.features[row : row + 1, real],
            cls_attention=batch.cls_attention[:, row : row + 1, real],
        )
        want = real.nonzero()[:, 0][select(method, alone, m).indices[0]]
        got = chosen.indices[row, : chosen.counts[row]]
        assert torch.equal(got, want), row
        assert (got.diff() > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_all_or_none_may_stay(method):
    batch, _ = ragged()
    assert torch.equal(select(method, batch, batch.counts).mask(30), batch.valid)
    assert select(method, batch, 0).counts == [0] * 4


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_named(method):
    batch, _ = ragged()
    with pytest.raises(ValueError, match="keep is 31, but row 2 has 1 tokens"):
        select(method, batch, [3, 3, 31, 3])
    with pytest.raises(ValueError, match="2 numbers for 4 rows"):
        select(method, batch, [3, 3])
    broken = batch.features.clone()
    broken[3, batch.valid[3].nonzero()[4, 0], 2] = torch.nan
    with pytest.raises(ValueError, match=r"features of row 3, token \d+ is NaN or infinite"):
        select(method, Visual(features=broken, valid=batch.valid), 1)
    broken = torch.where(batch.valid[..., None], batch.features, torch.nan)  # padding may be
    again = Visual(features=broken, valid=batch.valid, cls_attention=batch.cls_attention)
    assert torch.equal(select(method, again, 1).indices, select(method, batch, 1).indices)


def test_unknown_methods_and_shares_are_named():
    with pytest.raises(ValueError, match="method is 'divprun', expected one of divprune"):
        select("divprun", visual(torch.ones(1, 2, 2)), 1)
    for share in (0, 1.5, -1):
        with pytest.raises(ValueError, match="more than 0 and at most 1"):
            budget(share, [4])
    assert budget(0.098, [576, 1, 0]) == [56, 1, 0]
    with pytest.raises(ValueError, match="VTC-CLS needs cls_attention"):
        select("vtccls", visual(torch.ones(1, 2, 2)), 1)


def test_vtccls_takes_the_layers_that_are_asked_for():
    attention = torch.rand(4, 2, 9, generator=rng())
    assert torch.equal(vtccls.scores(attention, start=1), attention[1] + attention[2])
    assert torch.equal(vtccls.scores(attention, reduce="max"), attention[:3].amax(0))
    for start in (3, -1):
        with pytest.raises(ValueError, match="expected 0 to 2"):
            vtccls.scores(attention, start=start)


def test_equal_scores_go_to_the_first():
    one = visual(torch.ones(1, 6, 2))
    assert top(one, torch.tensor([[1.0, 2, 2, 1, 2, 1]]), 4).indices.tolist() == [[0, 1, 2, 4]]


def test_uniform_is_even():
    for n, m in ((576, 144), (10, 3), (7, 7), (5, 1)):
        kept = baselines.uniform(visual(torch.ones(1, n, 1)), m).indices[0]
        assert len(kept) == m
        assert int(kept.diff().max() - kept.diff().min() if m > 1 else 0) <= 1
    assert kept.tolist() == [2]  # the middle of five


def test_random_rows_have_their_own_draws():
    features = torch.ones(3, 50, 2)
    rows = baselines.random(visual(features), 10, rng=[rng(1), rng(2), rng(1)]).indices
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])


def anyres():
    golden = load_golden("backbone_vtccls")["globalcom2"]
    base = golden["base"][None]
    crops = Visual(features=torch.stack(golden["feats"]), cls_logits=torch.stack(golden["cls"]))
    thumbnail = Visual(features=torch.zeros(1, 36, 1), cls_logits=base)
    return golden, thumbnail, crops, AnyRes(grid=(2, 2), side=6, size=(100, 100))


def test_globalcom2_chooses_as_published():
    golden, thumbnail, crops, layout = anyres()
    ratios = globalcom2.crop_ratios(golden["base"], layout, 0.25)
    assert ratios.tolist() == pytest.approx(golden["scales"], abs=1e-7)
    whole, kept = globalcom2.select(thumbnail, crops, [layout])
    assert whole.counts == [9]
    assert kept.counts == [len(index) for index in golden["idx"]]
    for row, index in enumerate(golden["idx"]):
        assert torch.equal(kept.indices[row, : len(index)], index.sort().values)
    taken = kept.take(crops.features)
    for row, want in enumerate(golden["comp"]):
        order = golden["idx"][row].argsort()
        assert torch.equal(taken[row, : len(want)], want[order])


def crops_of(layout, most, seed):
    g = rng(seed)
    n = layout.side**2
    return (
        torch.randn(1, n, generator=g) * 5,
        torch.randn(most, n, 4, generator=g),
        torch.randn(most, n, generator=g),
    )


def test_globalcom2_of_pictures_of_different_grids_equals_one_by_one():
    layouts = [
        AnyRes(grid=(2, 2), side=6, size=(300, 500)),
        AnyRes(grid=(1, 3), side=6, size=(100, 300)),
        AnyRes(grid=(2, 1), side=6, size=(900, 130)),
    ]
    base, features, logits = zip(*(crops_of(one, 4, i) for i, one in enumerate(layouts)))
    thumbnail = Visual(features=torch.zeros(3, 36, 1), cls_logits=torch.cat(base))
    crops = Visual(features=torch.cat(features), cls_logits=torch.cat(logits))
    whole, kept = globalcom2.select(thumbnail, crops, layouts, share=0.4)
    newline = torch.full((4,), 7.0)
    pictures = globalcom2.stitch(crops.features, newline, layouts, kept)
    for i, layout in enumerate(layouts):
        inside = layout.by_crop(layout.inside())
        one, own = globalcom2.select(
            Visual(features=torch.zeros(1, 36, 1), cls_logits=base[i]),
            Visual(features=features[i][: layout.crops], cls_logits=logits[i][: layout.crops]),
            [layout],
            share=0.4,
        )
        assert torch.equal(one.indices[0], whole.indices[i])
        mine = kept.mask(36)[4 * i : 4 * i + 4]
        assert torch.equal(mine[: layout.crops], own.mask(36))
        assert not mine[layout.crops :].any()
        assert not (mine[: layout.crops] & ~inside).any()  # padding never stays
        lines = int((pictures[i] == newline).all(1).sum())
        assert lines == int(layout.inside().any(1).sum())
        assert len(pictures[i]) == lines + int(mine.sum())


def test_globalcom2_stitches_in_raster_order():
    layout = AnyRes(grid=(1, 2), side=2, size=(1, 2))
    features = torch.arange(8.0)[:, None].unflatten(0, (2, 4))
    everything = Selection(torch.arange(4).expand(2, 4))
    (picture,) = globalcom2.stitch(features, torch.tensor([-1.0]), [layout], everything)
    assert picture[:, 0].tolist() == [0, 1, 4, 5, -1, 2, 3, 6, 7, -1]


def test_globalcom2_finds_the_padding():
    wide = AnyRes(grid=(2, 2), side=6, size=(300, 500)).inside()
    assert wide.any(1).tolist() == [False] * 2 + [True] * 8 + [False] * 2
    tall = AnyRes(grid=(2, 2), side=6, size=(500, 300)).inside()
    assert torch.equal(tall, wide.T)
    assert AnyRes(grid=(3, 1), side=4, size=(3, 1)).inside().all()


def test_globalcom2_names_what_does_not_fit():
    _, thumbnail, crops, layout = anyres()
    with pytest.raises(ValueError, match="picture 0 has 6 crops of 36 tokens, given were 4"):
        globalcom2.select(thumbnail, crops, [AnyRes(grid=(2, 3), side=6, size=(1, 1))])
    with pytest.raises(ValueError, match="needs cls_logits"):
        globalcom2.select(visual(thumbnail.features), crops, [layout])
    with pytest.raises(ValueError, match="share is 0"):
        globalcom2.select(thumbnail, crops, [layout], share=0)
    with pytest.raises(ValueError, match="expected one layout a thumbnail"):
        globalcom2.select(thumbnail, crops, [layout, layout])


def test_a_sequence_is_compacted_with_an_index_map():
    # text, two pictures' worth of visual tokens with text between, padding in the second row
    visual_places = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1, 0, 0]]).bool()
    real = torch.tensor([[1] * 8, [1] * 7 + [0]]).bool()
    x = torch.arange(16.0).reshape(2, 8, 1)
    keep = kept_places(visual_places, Selection(torch.tensor([[1, 4], [0, -1]])), real=real)
    short = compact(x, keep)
    assert short.index.tolist() == [[0, 2, 4, 6, 7], [0, 2, 3, 6, -1]]
    assert short.x[..., 0].tolist() == [[0, 2, 4, 6, 7], [8, 10, 11, 14, 0]]
    assert short.positions[0].tolist() == [0, 1, 2, 3, 4]
    assert short.counts == [5, 4]
    same = compact(x, keep, positions="kept")
    assert same.positions[0].tolist() == [0, 2, 4, 6, 7]
    assert same.positions[1, :4].tolist() == [0, 2, 3, 6]
    with pytest.raises(ValueError, match="behind the sequence's last visual one"):
        kept_places(visual_places, Selection(torch.tensor([[5], [0]])))


def document():
    data = torch.arange(8.0).reshape(4, 2)
    return Packed(
        ids=torch.arange(12),
        weights=torch.tensor([0.0] * 8 + [1.0] * 4),
        positions=torch.cat([torch.arange(9), torch.arange(3)]),
        documents=torch.tensor([0] * 9 + [1] * 3),
        segments=(
            Segment(start=2, stop=6, kind="features", data=data, block="image"),
            Segment(start=7, stop=9, block="text"),
            Segment(start=10, stop=11, block="text", document=1),
        ),
    )


@pytest.mark.parametrize("positions", ["kept", "packed"])
def test_a_packed_sequence_is_pruned(positions):
    whole = document()
    short, index = packed.prune(whole, 0, torch.tensor([1, 3, -1]), positions=positions)
    assert index.tolist() == [0, 1, 3, 5, 6, 7, 8, 9, 10, 11]
    assert torch.equal(short.ids, whole.ids[index])
    assert torch.equal(short.documents, whole.documents[index])
    first, second, third = short.segments
    assert (first.start, first.stop) == (2, 4)
    assert first.data.tolist() == [[2, 3], [6, 7]]
    assert short.ids[second.start : second.stop].tolist() == [7, 8]
    assert short.ids[third.start : third.stop].tolist() == [10]
    kept = [0, 1, 3, 5, 6, 7, 8, 0, 1, 2]
    counted = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    assert short.positions.tolist() == (kept if positions == "kept" else counted)


def test_what_is_learned_is_not_pruned():
    with pytest.raises(ValueError, match=r"segment 1 \(text\) is learned"):
        packed.prune(document(), 1, torch.tensor([0]))
    with pytest.raises(ValueError, match="must ascend below 4"):
        packed.prune(document(), 0, torch.tensor([2, 2]))
