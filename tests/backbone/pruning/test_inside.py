"""Pruning between layers and in the cache: against masks over the whole sequence, batches, trees."""

import pytest
import torch
import torch.nn.functional as F

from anytok.backbone.pruning.cache import LayeredCache
from anytok.backbone.pruning.dyvte import DyVTE, Gates, text_features
from anytok.backbone.pruning.inside import Prompt, PrunedTransformer
from anytok.backbone.pruning.methods import select
from anytok.backbone.pruning.select import Visual, compact, kept_places
from anytok.backbone.pruning.transprune import TransPrune, attention_of_text, transition
from tests.backbone.tiny import transformer
from tests.golden.load import load_golden

LAYERS, WIDTH = 5, 32
KINDS = {
    "llama": {},
    "qwen3": {"qk_norm": True, "head_width": 12, "kv_heads": 4},
    "learned": {"positions": "learned"},
    "rope2d": {"positions": "rope2d", "grid": (6, 10), "prefix": 1, "context": 61},
}


def network(kind="llama"):
    return transformer(layers=LAYERS, **KINDS[kind])


def prompts(lengths=(20, 13, 16), spans=((3, 11), (0, 6), (9, 12)), seed=0):
    """Embeddings, padded at the right with large numbers, visual places, counts."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), WIDTH, generator=g)
    places = torch.arange(max(lengths))
    visual = torch.stack([(places >= a) & (places < b) for a, b in spans])
    x[places >= torch.tensor(lengths)[:, None]] *= 50
    return x, visual, list(lengths)


class Fixed:
    """Drops given places behind given layers."""

    def __init__(self, drops, positions="kept"):
        self.drops, self.positions = drops, positions

    def start(self, model, prompt):
        return self

    def watches(self, layer):
        return False

    def cut(self, layer, prompt):
        gone = torch.tensor(self.drops.get(layer, []), dtype=torch.long)
        return ~torch.isin(prompt.index, gone)


@torch.no_grad()
def masked(model, x, drops):
    """Hidden states [1, T, D] where what left behind a layer is hidden from the deeper ones; positions stay."""
    length = x.shape[1]
    at = torch.arange(length)
    if model.config.positions == "learned":
        x = x + model.model.embed_positions(at)
    turns = None if model.rotary is None else model.rotary.at(at, x.dtype)
    sees = torch.ones(length, length).tril().bool()
    for i, layer in enumerate(model.model.layers):
        x = layer(x, model.rotary, turns, sees[None, None], None, None)
        for place in drops.get(i, []):
            sees[:, place] = False
            sees[place, place] = True  # its own row must stay finite
    return model.model.norm(x)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_pruner_nothing_changes(kind):
    model = network(kind)
    x, visual, counts = prompts()
    cache = model.cache(3, 8)
    want = model(embeddings=x, cache=cache, counts=counts, keep=0).hidden
    run = PrunedTransformer(model)
    got = run.prefill(x, visual, counts=counts, room=2)
    for row, n in enumerate(counts):
        close(got.hidden[row, :n], want[row, :n])
        close(got.last[row], want[row, n - 1])
    ids = torch.tensor([3, 9, 11])
    for _ in range(4):  # more than there is room for
        close(
            run.step(ids, got.cache), model(ids[:, None], cache=cache, keep=0).hidden[:, 0].detach()
        )
    assert torch.equal(got.cache.lengths, cache.lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_what_left_is_what_a_mask_hides(kind):
    model = network(kind)
    drops = {0: [4, 5], 2: [3, 8, 9]}
    x, visual, _ = prompts((20,), ((3, 11),))
    more = torch.tensor([7, 2])
    whole = torch.cat([x, model.embed(more)[None]], 1)
    want = masked(model, whole, drops)[0]
    run = PrunedTransformer(model, Fixed(drops))
    got = run.prefill(x, visual)
    kept = [i for i in range(20) if i not in (3, 4, 5, 8, 9)]
    assert got.index[0].tolist() == kept
    close(got.hidden[0], want[kept])
    assert got.cache.lengths[:, 0].tolist() == [20, 18, 18, 15, 15]
    assert got.layers[2][0].tolist() == [i for i in range(20) if i not in (4, 5)]
    close(run.step(more[:1], got.cache)[0], want[20])
    close(run.step(more[1:], got.cache)[0], want[21])


def test_packed_positions_count_anew():
    model = network()
    x, visual, _ = prompts((20,), ((3, 11),))
    run = PrunedTransformer(model, Fixed({1: [3, 4, 8]}, "packed"))
    got = run.prefill(x, visual)
    assert [got.cache.next_positions(i)[0] for i in range(LAYERS)] == [20, 20, 17, 17, 17]
    kept = PrunedTransformer(model, Fixed({1: [3, 4, 8]}), positions="kept").prefill(x, visual)
    assert [kept.cache.next_positions(i)[0] for i in range(LAYERS)] == [20] * LAYERS
    assert (got.last - kept.last).abs().max() > 1e-3  # positions do matter
    # What is cut behind the first layer at packed positions is what a shorter prompt gives from there on.
    first = PrunedTransformer(model, Fixed({0: [3, 4, 8]}, "packed")).prefill(x, visual)
    layer = model.model.layers[0]
    turns = model.rotary.at(torch.arange(20), x.dtype)
    with torch.no_grad():
        y = layer(x, model.rotary, turns, None, None, None)[:, first.index[0]]
        turns = model.rotary.at(torch.arange(17), x.dtype)
        for layer in model.model.layers[1:]:
            y = layer(y, model.rotary, turns, None, None, None)
        close(first.hidden, model.model.norm(y))


def gates(seed=0, scale=3.0):
    torch.manual_seed(seed)
    made = Gates(width=WIDTH, layers=LAYERS, hidden=16)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape) * scale)
    return made


def pruners():
    return {
        "transprune": TransPrune.scaled(LAYERS, 0.25),
        "dyvte": DyVTE(gates()),
    }


@pytest.mark.parametrize("kind", ["llama", "qwen3", "learned"])
@pytest.mark.parametrize("positions", ["kept", "packed"])
@pytest.mark.parametrize("method", ["transprune", "dyvte"])
def test_rows_of_a_batch_equal_single_rows(kind, positions, method):
    model = network(kind)
    x, visual, counts = prompts()
    run = PrunedTransformer(model, pruners()[method], positions=positions)
    batch = run.prefill(x, visual, counts=counts, room=4)
    ids = torch.tensor([[3, 9, 11], [8, 1, 0]])
    steps = [run.step(row, batch.cache) for row in ids]
    cuts = set()
    for row, n in enumerate(counts):
        alone = run.prefill(x[row : row + 1, :n], visual[row : row + 1, :n])
        m = alone.index.shape[1]
        assert torch.equal(batch.index[row, :m], alone.index[0])
        assert not (batch.index[row, m:] >= 0).any()
        for a, b in zip(batch.layers, alone.layers):
            assert torch.equal(a[row, : b.shape[1]], b[0])
        close(batch.hidden[row, :m], alone.hidden[0])
        close(batch.last[row], alone.last[0])
        for given, got in zip(ids[:, row], steps):
            close(got[row], run.step(given[None], alone.cache)[0])
        assert torch.equal(batch.cache.lengths[:, row], alone.cache.lengths[:, 0])
        cuts.add(tuple(alone.cache.lengths[:, 0].tolist()))
    assert len(cuts) == 3


def test_transitions_are_the_published_ones():
    golden = load_golden("backbone_vtccls")["transprune"]
    real = torch.ones(1, 20).bool()
    got = transition(golden["before"], golden["after"], real)
    torch.testing.assert_close(got, golden["weight"], atol=1e-7, rtol=1e-5)
    padded = [F.pad(golden[k], (0, 0, 0, 3), value=9.0) for k in ("before", "after")]
    again = transition(*padded, F.pad(real, (0, 3)))
    torch.testing.assert_close(again[:, :20], golden["weight"], atol=1e-7, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_transprune_by_hand(kind):
    """One row, one cut, each step written out."""
    model = network(kind)
    x, visual, _ = prompts((20,), ((3, 11),))
    plan = TransPrune(cuts=((3, 0.5),), watch=(2, 3), positions="kept")
    at, h = torch.arange(20), x
    if kind == "learned":
        h = h + model.model.embed_positions(at)
    turns = None if model.rotary is None else model.rotary.at(at, x.dtype)
    moved = torch.zeros(20)
    for i, layer in enumerate(model.model.layers[:3]):
        a = layer.input_layernorm(h)
        b = layer.self_attn(a, model.rotary, turns, None, None, None)
        h = h + b
        c = layer.post_attention_layernorm(h)
        d = layer.mlp(c)
        h = h + d
        if i >= 1:
            for before, after in ((a[0], b[0]), (c[0], d[0])):
                e = (1 - F.cosine_similarity(before, after, dim=-1)).exp()
                moved += after.norm(dim=-1) / before.norm(dim=-1) * e / e.sum()
    attention = model.model.layers[3].self_attn
    q, k, _ = attention._project(model.model.layers[3].input_layernorm(h))
    if turns is not None:
        q, k = model.rotary.turn(q, *turns), model.rotary.turn(k, *turns)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    paid = logits.masked_fill(~torch.ones(20, 20).tril().bool(), -torch.inf).softmax(-1)
    asked = paid[0, :, 11:].mean((0, 1))
    state = Prompt(x=h, positions=at[None], index=at[None], visual=visual)
    close(attention_of_text(model, 3, state)[0, 3:11], asked[3:11])
    score = moved[3:11] / moved[3:11].sum() + asked[3:11] / asked[3:11].sum()
    stays = sorted((score.topk(4).indices + 3).tolist())
    got = PrunedTransformer(model, plan).prefill(x, visual)
    assert got.index[0].tolist() == [0, 1, 2, *stays, *range(11, 20)]
    close(
        got.hidden[0],
        masked(model, x, {2: [i for i in range(3, 11) if i not in stays]})[0, got.index[0]],
    )


def test_transprune_keeps_the_published_numbers():
    plan = TransPrune()
    assert [int(576 * share) for _, share in plan.cuts] == [504, 360, 72]
    for depth in (4, 12, 32):
        scaled = TransPrune.scaled(depth)
        assert [s for _, s in scaled.cuts] == pytest.approx([0.875, 0.625, 0.125])
        assert scaled.cuts[-1][0] < depth
    assert TransPrune.scaled(32).cuts[0][0] == 7


def test_rows_without_pictures_stay_whole():
    model = network()
    x, visual, counts = prompts()
    visual[1] = False
    for method in pruners().values():
        got = PrunedTransformer(model, method).prefill(x, visual, counts=counts)
        assert got.index[1, :13].tolist() == list(range(13))


@pytest.mark.parametrize("method", ["transprune", "dyvte"])
def test_bad_prompts_are_named(method):
    model = network()
    x, visual, counts = prompts()
    visual[1, 6:13] = True
    run = PrunedTransformer(model, pruners()[method])
    with pytest.raises(ValueError, match="row 1 has no text behind its visual tokens"):
        run.prefill(x, visual, counts=counts)
    with pytest.raises(ValueError, match="the model's context is 64"):
        run.prefill(torch.randn(1, 70, WIDTH), torch.zeros(1, 70).bool())
    with pytest.raises(ValueError, match="visual is"):
        run.prefill(x, visual[:, :4])


def test_impossible_plans_are_named():
    with pytest.raises(ValueError, match="ascending"):
        TransPrune(cuts=((9, 0.5), (7, 0.2)))
    with pytest.raises(ValueError, match="descending"):
        TransPrune(cuts=((7, 0.2), (9, 0.5)))
    with pytest.raises(ValueError, match="at most the first cut"):
        TransPrune(cuts=((7, 0.2),), watch=(8, 12))
    with pytest.raises(ValueError, match=r"take TransPrune.scaled\(5\)"):
        PrunedTransformer(network(), TransPrune()).prefill(*prompts()[:2])
    with pytest.raises(ValueError, match="three cuts need 4"):
        TransPrune.scaled(3)
    with pytest.raises(ValueError, match="model of 5 layers and width 32, this one has 2 and 32"):
        PrunedTransformer(transformer(), DyVTE(gates())).prefill(*prompts()[:2])


@torch.no_grad()
@pytest.mark.parametrize("exit_layer", range(LAYERS))
def test_dyvte_leaves_behind_the_first_gate_that_says_so(exit_layer):
    model, made = network(), Gates(width=WIDTH, layers=LAYERS, hidden=2)
    x, visual, _ = prompts((20,), ((3, 11),))
    for i, gate in enumerate(made.visual_gates_router):
        # GELU(z) + GELU(-z) is positive: the row of w2 that has ones wins, whatever the features are.
        gate.w1.weight[1] = -gate.w1.weight[0]
        gate.w2.weight.zero_()
        gate.w2.weight[int(i >= exit_layer)] = 1.0
    got = PrunedTransformer(model, DyVTE(made)).prefill(x, visual)
    held = [20] * (exit_layer + 1) + [12] * (LAYERS - exit_layer - 1)
    assert got.cache.lengths[:, 0].tolist() == held
    drops = {exit_layer: list(range(3, 11))}
    close(got.hidden[0], masked(model, x, drops)[0, got.index[0]])


def test_dyvte_reads_the_text_behind():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 3, generator=g)
    at = torch.arange(6)
    state = Prompt(
        x=x,
        positions=at.expand(2, -1),
        index=torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, -1, -1, -1]]),
        visual=torch.tensor([[0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).bool(),
    )
    got = text_features(state)
    close(got[0], torch.cat([x[0, 3:5].mean(0), x[0, 5]]))
    close(got[1], torch.cat([x[1, 2], x[1, 2]]))  # one position of text stands for both


def test_gates_load_by_their_published_names():
    made = gates()
    state = {f"model.{k}": v for k, v in made.state_dict().items()} | {
        "model.norm.weight": torch.ones(2)
    }
    again = Gates.from_published(state)
    for k, v in made.state_dict().items():
        assert torch.equal(again.state_dict()[k], v)
    with torch.device("meta"):
        published = Gates(width=4096, layers=32)
    assert published.state_dict()["visual_gates_router.31.w1.weight"].shape == (2048, 8192)
    with pytest.raises(ValueError, match="no DyVTE gates"):
        Gates.from_published({"lm_head.weight": torch.ones(1)})


@pytest.mark.parametrize("positions", ["kept", "packed"])
def test_a_tree_over_a_pruned_cache_is_its_branches(positions):
    model = network()
    x, visual, counts = prompts()
    run = PrunedTransformer(model, TransPrune.scaled(LAYERS, 0.25), positions=positions)
    got = run.prefill(x, visual, counts=counts, room=8)
    # 0 -> 1, 2; 1 -> 3; 2 -> 4
    parents = [-1, 0, 0, 1, 2]
    tree = torch.zeros(5, 5).bool()
    for node, parent in enumerate(parents):
        tree[node, node] = True
        if parent >= 0:
            tree[node] |= tree[parent]
    ids = torch.randint(64, (3, 5), generator=torch.Generator().manual_seed(5))
    plain = got.cache.fork(1)
    hidden = run.extend(
        model.embed(ids), got.cache, tree=tree, depths=torch.tensor([0, 1, 1, 2, 2])
    )
    for branch in ([0, 1, 3], [0, 2, 4]):
        cache = plain.fork(1)
        for node in branch:
            close(run.step(ids[:, node], cache), hidden[:, node])
    chosen = torch.tensor([[0, 2, 4], [0, 1, -1], [0, -1, -1]])
    got.cache.accept(5, chosen)
    after = torch.tensor([7, 5, 1])
    step = run.step(after, got.cache)
    for row, branch in enumerate(chosen.tolist()):
        cache = plain.fork(1)
        cache.take([row])
        for node in branch:
            if node >= 0:
                run.step(ids[row : row + 1, node], cache)
        close(run.step(after[row : row + 1], cache)[0], step[row])


@pytest.mark.parametrize("kind", KINDS)
def test_what_leaves_the_cache_while_generating_is_what_a_mask_hides(kind):
    model = network(kind)
    x, visual, _ = prompts((20,), ((3, 11),))
    more = torch.tensor([7, 2, 5])
    run = PrunedTransformer(model)
    got = run.prefill(x, visual, room=3)
    run.step(more[:1], got.cache)
    before = got.cache.allocated
    stays = torch.tensor([[i for i in range(21) if i not in (4, 5, 9)]])
    for layer in (2, 3, 4):
        got.cache.prune(layer, stays)
    assert got.cache.lengths[:, 0].tolist() == [21, 21, 18, 18, 18]
    assert got.cache.allocated < before
    position = 2 * model.config.kv_heads * model.config.head_size * 4
    assert got.cache.bytes == position * (2 * 21 + 3 * 18)
    # New positions see what stayed in layers 2 to 4, and everything in 0 and 1.
    whole = torch.cat([x, model.embed(more)[None]], 1)
    with torch.no_grad():
        at, h = torch.arange(23), whole
        if kind == "learned":
            h = h + model.model.embed_positions(at)
        turns = None if model.rotary is None else model.rotary.at(at, h.dtype)
        for i, layer in enumerate(model.model.layers):
            sees = torch.ones(23, 23).tril().bool()
            if i >= 2:
                sees[21:, [4, 5, 9]] = False
            h = layer(h, model.rotary, turns, sees[None, None], None, None)
        want = model.model.norm(h)[0]
    close(run.step(more[1:2], got.cache)[0], want[21])
    close(run.step(more[2:], got.cache)[0], want[22])


def test_caches_name_what_they_do_not_hold():
    cache = LayeredCache(layers=2, room=0)
    with pytest.raises(ValueError, match="layer 1 holds nothing"):
        cache.prune(1, torch.tensor([[0]]))
    model = network()
    got = PrunedTransformer(model).prefill(*prompts()[:2], counts=prompts()[2])
    with pytest.raises(ValueError, match="row 1 of layer 0 holds 13 positions, not 15"):
        got.cache.prune(0, torch.tensor([[0], [15], [0]]))


def test_rows_of_a_cache_prune_to_different_lengths():
    model = network()
    x, visual, counts = prompts()
    run = PrunedTransformer(model)
    batch = run.prefill(x, visual, counts=counts, room=2)
    stays = torch.full((3, 14), -1)
    for row, keep in enumerate(([*range(14)], [0, 2, 12], [*range(5, 16)])):
        stays[row, : len(keep)] = torch.tensor(keep)
    for layer in range(1, LAYERS):
        batch.cache.prune(layer, stays)
    got = run.step(torch.tensor([1, 2, 3]), batch.cache)
    for row, n in enumerate(counts):
        alone = run.prefill(x[row : row + 1, :n], visual[row : row + 1, :n])
        keep = stays[row][stays[row] >= 0][None]
        for layer in range(1, LAYERS):
            alone.cache.prune(layer, keep)
        close(got[row], run.step(torch.tensor([row + 1]), alone.cache)[0])


@pytest.mark.parametrize("positions", ["kept", "packed"])
def test_before_and_inside_go_together(positions):
    """DivPrune on the embeddings, then TransPrune between layers; rows alone and in a batch."""
    model = network()
    x, visual, counts = prompts((40, 33), ((3, 35), (0, 20)))
    real = torch.arange(40) < torch.tensor(counts)[:, None]

    def run(x, visual, real):
        tokens = visual.sum(1).tolist()
        features = torch.zeros(len(x), max(tokens), WIDTH)
        valid = torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]
        features[valid] = x[visual]
        chosen = select(
            "divprune", Visual(features=features, valid=valid), [n // 2 for n in tokens]
        )
        short = compact(x, kept_places(visual, chosen, real=real), positions=positions)
        left = visual.gather(1, short.index.clamp(min=0)) & (short.index >= 0)
        pruned = PrunedTransformer(model, TransPrune.scaled(LAYERS, 0.25), positions=positions)
        done = pruned.prefill(short.x, left, counts=short.counts, at=short.positions, room=2)
        return short, done, pruned.step(torch.full((len(x),), 5), done.cache)

    short, done, step = run(x, visual, real)
    assert short.counts == [24, 23]
    assert done.cache.lengths[0].tolist() == [25, 24]  # with the step
    assert done.cache.lengths[-1].tolist() == [13, 16]  # a quarter of 16 and of 10 visual ones
    for row, n in enumerate(counts):
        one, alone, then = run(
            x[row : row + 1, :n], visual[row : row + 1, :n], real[row : row + 1, :n]
        )
        assert torch.equal(one.index[0], short.index[row, : one.index.shape[1]])
        close(done.last[row], alone.last[0])
        close(step[row], then[0])
        assert torch.equal(done.cache.lengths[:, row], alone.cache.lengths[:, 0])
