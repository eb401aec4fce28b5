import copy

import pytest
import torch

from anytok.backbone.transformer import Transformer, TransformerConfig
from anytok.codecs.published import WeightsError
from anytok.generators.drafter import (
    Drafter,
    DrafterError,
    Session,
    from_published,
    load_drafter,
    save_drafter,
    target_print,
)
from anytok.generators.drafting import _Draft
from anytok.generators.generator import Request
from anytok.generators.sampling import Sampling
from anytok.generators.speculative import Speculation, Speculative
from anytok.generators.trees import SHAPES, Dynamic, Static, Tree, padded
from tests.backbone.tiny import transformer

GOLDEN = torch.load("tests/golden/lantern.pt", weights_only=True)
CFG = 3.0  # of the recorded drafts


@pytest.fixture(scope="module")
def published():
    """The recorded drafter beside a target of which only the head and the positions matter."""
    given = GOLDEN["drafter"]
    config = TransformerConfig(
        vocab_size=24,
        width=32,
        ffn=48,
        layers=1,
        heads=4,
        kv_heads=4,
        context=120 + 256,
        positions="rope2d",
        grid=(16, 16),
        prefix=120,
    )
    target = Transformer(config).eval()
    with torch.no_grad():
        target.lm_head.weight.copy_(given["head"])
    return from_published(given["state_dict"], target, norm_eps=1e-6), given


def read(drafter, given):
    """A session that has read the recorded prefix, and its prediction for the root."""
    session = Session(drafter, 2, 160)
    ids = given["ids"]
    return session, session.read(drafter.embed(ids[:, 1:]), given["hidden"], [120, 120])


@torch.no_grad()
def test_states_equal_the_published_drafter(published):
    drafter, given = published
    ids = given["ids"]
    out = drafter(drafter.embed(ids[:, 1:]), given["hidden"], torch.arange(1, 121))
    assert torch.allclose(out[:, -32:], given["plain"], atol=1e-5)


def decoder(drafter, tree):
    return Speculative(drafter.target, drafter, speculation=Speculation(tree=tree))


def row(root, seed=0):
    request = Request(ids=torch.tensor([0]), max_tokens=100)
    one = _Draft(0, request, torch.Generator().manual_seed(seed), None, True)
    one.feed = [root]
    return one


@torch.no_grad()
def test_dynamic_trees_equal_the_published_ones(published):
    drafter, given = published
    shape = Dynamic(depth=given["depth"] + 1, width=given["top_k"], nodes=given["total_tokens"] - 1)
    session, ahead = read(drafter, given)
    for name, ids in (("draft", given["ids"]), ("draft2", given["ids2"])):
        if name == "draft2":
            session.forget()
            ahead = session.read(drafter.embed(ids[:, -3:]), given["hidden2"], [3, 3])
        root = int(ids[0, -1])
        speculative = decoder(drafter, shape)
        (tree,) = speculative._grow([row(root)], session, ahead, Sampling(cfg=CFG), [99])
        tokens, _, mask, depths = given[name]
        assert tree.ids == tokens[0].tolist()
        assert tree.depths == depths.tolist()
        assert padded([tree], torch.device("cpu"))[2][0].equal(mask[0, 0].bool())


@torch.no_grad()
def test_static_trees_equal_the_published_ones(published):
    drafter, given = published
    session, ahead = read(drafter, given)
    static = given["static"]
    speculative = decoder(drafter, Static(shape=static["tree"]))
    one = row(int(given["ids"][0, -1]), static["seed"])
    (tree,) = speculative._cast([one], session, ahead, Sampling(cfg=CFG), [99])
    expanded = [node for node in range(len(tree)) if tree.children[node]]
    laws = torch.cat(static["ops"])
    for i, node in enumerate(expanded):
        drafts = [tree.ids[c] for c in tree.children[node]]
        assert drafts == static["tokens"][i, : len(drafts)].tolist()
        assert torch.allclose(tree.laws[node], laws[i], atol=1e-5)
        own = torch.tensor([tree.chances[c] for c in tree.children[node]])
        left = 1 - laws[i, drafts].cumsum(0) + laws[i, drafts]
        sure = left > 1e-3  # below that the published quotient is rounding
        assert torch.allclose(own[sure], static["probs"][i, : len(drafts)][sure], atol=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_named_trees_equal_the_published_ones(name):
    parents, level = [-1], [0]
    for counts in SHAPES[name]:
        following = []
        for node, count in zip(level, counts):
            following += range(len(parents), len(parents) + count)
            parents += [node] * count
        level = following
    tree = Tree([0] * len(parents), parents, [1.0] * len(parents))
    assert tree.depths == GOLDEN["trees"][name]["depths"].tolist()
    assert padded([tree], torch.device("cpu"))[2][0].equal(GOLDEN["trees"][name]["seen"])


def test_trees_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="nodes of a tree is 0"):
        Dynamic(nodes=0)
    with pytest.raises(ValueError, match="none of chain"):
        Static(shape="oak")
    with pytest.raises(ValueError, match="expected 1 to 2 counts"):
        Static(shape=((2,), (1, 1, 1)))


def test_values_count_what_may_stand():
    tree = Tree([0, 1, 2, 3], [-1, 0, 1, 1], [1.0, 0.5, 0.6, 0.2])
    assert tree.values() == pytest.approx([1.0, 1.8, 1.0, 1.0])


@torch.no_grad()
def test_reading_in_pieces_equals_reading_at_once():
    target = transformer()
    drafter = Drafter(target)
    embeddings, hidden = torch.randn(2, 3, 7, 32).unbind(0)
    whole = drafter(embeddings, hidden, torch.arange(1, 8))
    session = Session(drafter, 3, 8)
    session.read(embeddings[:, :4], hidden[:, :4], [4, 4, 2])
    # A branch of two ids, tried and forgotten, leaves nothing behind.
    session.branch(torch.tensor([[1], [2], [3]]), hidden[:, :1], torch.ones(3, 1, 1) > 0, 1)
    session.forget()
    rest = [[4, 5, 6], [4, 5, 6], [2, 3, 4]]
    index = torch.tensor(rest)[..., None].expand(-1, -1, 32)
    last = session.read(embeddings.gather(1, index), hidden.gather(1, index), [3, 2, 3])
    for i, place in enumerate((6, 5, 4)):
        assert torch.allclose(last[i], whole[i, place], atol=1e-5)


def test_files_name_their_target(tmp_path):
    target, other = transformer(), transformer(seed=1)
    drafter = Drafter(target)
    save_drafter(drafter, tmp_path / "d.safetensors", about={"steps": 3})
    again = load_drafter(tmp_path / "d.safetensors", target)
    assert all(a.equal(b) for a, b in zip(drafter.parameters(), again.parameters()))
    with pytest.raises(DrafterError, match="this one is"):
        load_drafter(tmp_path / "d.safetensors", other)
    with pytest.raises(DrafterError, match="of width 32, the target's is 16"):
        load_drafter(tmp_path / "d.safetensors", transformer(width=16))
    with pytest.raises(DrafterError, match="another target"):
        Speculative(other, drafter)
    with pytest.raises(WeightsError, match="no drafter"):
        from_published({}, target)
    with pytest.raises(DrafterError, match="drafts 24 ids, the target has 64"):
        from_published(GOLDEN["drafter"]["state_dict"], target)


def test_a_copy_runs_beside_the_same_target():
    target = transformer()
    twin = copy.deepcopy(Drafter(target))
    assert twin.target is target
    assert twin.fc.weight is not Drafter(target).fc.weight


def test_a_fingerprint_does_not_depend_on_the_type():
    target = transformer()
    assert target_print(target) == target_print(copy.deepcopy(target).bfloat16())
    assert target_print(target) != target_print(transformer(seed=1))
