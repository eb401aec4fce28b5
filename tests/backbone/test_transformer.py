import pytest
import torch

from anytok.backbone import masks
from anytok.backbone.cache import KVCache
from anytok.backbone.conditions import ClassCondition, FeatureCondition, IdCondition
from anytok.backbone.heads import next_token_loss
from anytok.backbone.rope import rotary_1d
from anytok.backbone.transformer import Transformer, TransformerConfig
from tests.backbone.tiny import transformer

KINDS = {
    "llama": {},
    "mha": {"kv_heads": 4},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_width": 12},
    "learned": {"positions": "learned"},
    "tied": {"tied": True},
    "rope2d": {"positions": "rope2d", "grid": (4, 5), "prefix": 1, "context": 21},
}


@pytest.fixture(params=KINDS, name="model")
def any_model(request):
    return transformer(**KINDS[request.param])


@torch.no_grad()
def test_cache_gives_what_no_cache_gives(model):
    ids = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(1))
    whole = model(ids).logits
    cache = model.cache(3, 4)  # smaller than needed: it grows
    pieces = [model(part, cache=cache).logits for part in ids.split([5, 1, 4, 1, 6], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)
    assert cache.lengths.tolist() == [[17] * 3] * 2


@torch.no_grad()
def test_rows_of_different_length_equal_single_rows(model):
    rng = torch.Generator().manual_seed(2)
    prompts = [torch.randint(64, (n,), generator=rng) for n in (3, 9, 1)]
    cache = model.cache(3, 16)
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    first = model(padded, cache=cache, counts=[3, 9, 1]).logits
    then = [torch.randint(64, (3, 1), generator=rng) for _ in range(4)]
    steps = [model(ids, cache=cache).logits for ids in then]
    for i, prompt in enumerate(prompts):
        alone = model.cache(1, 16)
        want = model(prompt[None], cache=alone).logits[0]
        torch.testing.assert_close(first[i, : len(prompt)], want, atol=1e-5, rtol=1e-4)
        for ids, got in zip(then, steps):
            want = model(ids[i : i + 1], cache=alone).logits[0]
            torch.testing.assert_close(got[i], want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_left_and_right_padding_change_nothing():
    model = transformer()
    ids = torch.randint(64, (1, 6), generator=torch.Generator().manual_seed(3))
    want = model(ids).logits[0]
    for left, right in ((4, 0), (0, 4), (2, 3)):
        padded = torch.nn.functional.pad(ids, (left, right))
        valid = torch.nn.functional.pad(torch.ones_like(ids).bool(), (left, right))
        out = model(
            padded,
            positions=masks.padded_positions(valid),
            mask=masks.causal(padded.shape[1], valid=valid),
        ).logits
        assert out.isfinite().all()
        torch.testing.assert_close(out[0, left : left + 6], want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other():
    model = transformer()
    rng = torch.Generator().manual_seed(4)
    documents = [torch.randint(64, (n,), generator=rng) for n in (5, 3, 7)]
    numbers = torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)])
    positions = torch.cat([torch.arange(len(d)) for d in documents])
    mask = masks.causal(15, documents=numbers)
    out = model(torch.cat(documents)[None], positions=positions, mask=mask).logits[0]
    alone = torch.cat([model(d[None]).logits[0] for d in documents])
    torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-4)


def test_block_causal_masks():
    blocks = torch.tensor([0, 0, 1, 2, 2])
    seen = masks.build(blocks)[0, 0]
    assert seen.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]
    ones = masks.build(torch.arange(5))
    assert torch.equal(ones, torch.ones(1, 1, 5, 5).tril().bool())
    assert torch.equal(ones, masks.causal(5))


@torch.no_grad()
def test_fusing_changes_nothing_and_stores_nothing_twice(model):
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(5))
    want, before = model(ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    model.fuse()
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-4)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.mul_(2)
    assert not torch.equal(attention.fused[0], before["model.layers.0.self_attn.q_proj.weight"])
    start = attention.q_proj.weight.shape[0]
    assert torch.equal(
        attention.fused[0][start : start + attention.k_proj.weight.shape[0]],
        attention.k_proj.weight,
    )


def test_gradients_reach_every_parameter():
    model = transformer(qkv_bias=True).train()
    model(torch.randint(64, (2, 8))).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_context_ends_with_a_clear_error():
    model = transformer(context=8)
    with pytest.raises(ValueError, match="9 positions, the model's context is 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    cache = model.cache(1, 8)
    model(torch.zeros(1, 8, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="context is 8"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_configs_are_checked():
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        TransformerConfig(vocab_size=8, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="multiple of heads"):
        TransformerConfig(vocab_size=8, width=30, heads=4, kv_heads=4)
    with pytest.raises(ValueError, match="grid"):
        TransformerConfig(vocab_size=8, positions="rope2d")


def test_cache_takes_forks_gathers_and_rewinds():
    cache = KVCache(layers=2, rows=2, kv_heads=1, head_width=1, capacity=4)
    k = torch.arange(6.0).view(2, 1, 3, 1)
    for layer in range(2):
        cache.append(layer, k, k, counts=[3, 2])
    assert cache.lengths.tolist() == [[3, 2], [3, 2]]
    forked = cache.fork(2)
    assert forked.lengths.tolist() == [[3, 3, 2, 2]] * 2
    forked.take([3, 0])
    assert forked.row_lengths() == [2, 3]
    forked.rewind([1, 2])
    assert forked.row_lengths(1) == [1, 2]
    with pytest.raises(ValueError, match="rewind to"):
        forked.rewind([2, 2])
    cache.gather(torch.tensor([[2, 0], [1, 0]]), layer=0)
    assert cache.keys[0, :, 0, :2, 0].tolist() == [[2, 0], [4, 3]]
    assert cache.lengths.tolist() == [[2, 2], [3, 2]]
    assert cache.keys[1, :, 0, :3, 0].tolist() == [
        [0, 1, 2],
        [3, 4, 5],
    ]  # the original is untouched


def test_rotary_keeps_relative_positions():
    rotary = rotary_1d(32, 8, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()

    def score(i, j):
        a = rotary.turn(q, *rotary.at(torch.tensor([i]), q.dtype))
        b = rotary.turn(k, *rotary.at(torch.tensor([j]), k.dtype))
        return (a * b).sum()

    torch.testing.assert_close(score(7, 3), score(20, 16))


def test_conditions_have_a_null():
    rng = torch.Generator().manual_seed(0)
    classes = ClassCondition(10, 4)
    labels = torch.arange(10)
    assert classes.null(labels).tolist() == [10] * 10
    assert classes(labels).shape == (10, 1, 4)
    dropped = classes.drop(labels, 0.5, rng)
    assert 0 < (dropped == 10).sum() < 10
    assert torch.equal(classes.drop(labels, 0.0, rng), labels)
    features = FeatureCondition(3, 5, 4)
    given = torch.randn(8, 3, 5)
    assert features(given).shape == (8, 3, 4)
    some = features.drop(given, 0.5, rng)
    lost = (some == features.uncond_embedding).all((1, 2))
    assert 0 < lost.sum() < 8
    assert torch.equal(some[~lost], given[~lost])
    ids = torch.arange(3)
    assert len(IdCondition().null(ids)) == 0
    assert IdCondition().drop(ids, 0.0, rng) is ids
    assert len(IdCondition().drop(ids, 1.0, rng)) == 0


def test_the_loss_is_weighted():
    logits, targets = torch.randn(4, 7), torch.tensor([0, 1, 2, 3])
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    weights = torch.tensor([1.0, 0, 3, 0])
    want = (each[0] + 3 * each[2]) / 4
    torch.testing.assert_close(next_token_loss(logits, targets, weights), want)
    assert next_token_loss(logits, targets, torch.zeros(4)) == 0


def test_deep_models_start_calmly():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=64, width=32, ffn=64, heads=2, kv_heads=2))
    logits = model(torch.randint(64, (2, 16))).logits
    assert logits.std() < 0.5
