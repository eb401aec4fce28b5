"""OctGPT's transformer against the published one: sizes, windows, and (with ANYTOK_PARITY) the whole fixture."""

import os
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from anytok.codecs.published import Weights, WeightsError
from anytok.codecs.shape.octree import full_octree
from anytok.generators.octree import OctreeGenerator, OctreeOptions
from anytok.generators.octree_condition import Labels
from anytok.generators.octree_files import CATEGORIES, build, save
from anytok.generators.octree_network import OctreeNetwork, OctreeNetworkConfig, infer_config
from anytok.generators.octree_windows import Tokens, cut_windows
from anytok.generators.published import Row, load_generator
from tests.golden.load import HERE, load_golden

TINY = OctreeNetworkConfig(
    width=24,
    heads=2,
    blocks=4,
    window=16,
    dilation=2,
    full_depth=1,
    code_depth=3,
    code_bits=4,
    levels=3,
    grid=16,
    prefix=4,
    classes=3,
    dropout=0.0,
)
whole_fixture = pytest.mark.skipif(
    not os.environ.get("ANYTOK_PARITY"), reason="the whole fixture is 13 MB; name its folder"
)


def tiny(**changes) -> OctreeNetwork:
    torch.manual_seed(0)
    network = OctreeNetwork(replace(TINY, **changes)).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return network


def tree_of(*splits):
    """One octree of two levels: which of the 8 nodes of each sample are split."""
    tree = full_octree(1, len(splits))
    labels = torch.zeros(len(splits), 8, dtype=torch.long)
    for row, nodes in enumerate(splits):
        labels[row, nodes] = 1
    return tree.split(1, labels.flatten()).grow()


@pytest.mark.parametrize(
    ("changes", "millions"),
    [
        ({}, 170.29),
        ({"norm": "rms", "positions": "table"}, 172.61),
        (
            {
                "width": 1152,
                "features": 768,
                "cross": True,
                "prefix": 77,
                "norm": "rms",
                "positions": "table",
            },
            440.36,
        ),
    ],
)
def test_published_sizes(changes, millions):
    config = OctreeNetworkConfig(**changes)
    with torch.device("meta"):
        network = OctreeNetwork(config)
    state = network.state_dict()
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions
    if not config.features and config.norm == "layer":
        assert len(state) == 348
    given = {"prefix": config.prefix}
    assert infer_config(state, given) == config


def test_windows_equal_the_published_ones():
    golden = torch.load(HERE / "octree_windows.pt", weights_only=True)
    sample, level = golden["sample"].long(), golden["level"].long()
    # the published code gives tail pads a sample and a level of their own
    n = int((sample < 2).sum())
    tokens = Tokens(sample[:n], level[:n], torch.zeros(n, 3, dtype=torch.long))
    kinds = {
        "local": (1, False),
        "dilated": (golden["dilation"], False),
        "local shifted": (1, True),
    }
    for name, (dilation, shifted) in kinds.items():
        windows = cut_windows(
            tokens, window=golden["window"], dilation=dilation, shifted=shifted, joint=True
        )
        packed = golden["seen"][name]
        bits = np.unpackbits(np.frombuffer(zlib.decompress(bytes(packed["bits"])), np.uint8))
        theirs = torch.from_numpy(bits).bool()[: np.prod(packed["shape"])].view(packed["shape"])
        theirs = theirs[: len(windows.index)]
        real = windows.index < n
        both = real[:, :, None] & real[:, None, :]
        assert torch.equal(windows.mask & both, theirs & both), name
        assert not (theirs & real[:, :, None] & ~real[:, None, :]).any()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", range(4))
def test_windows_say_what_the_definition_says(kind, joint):
    dilation, shifted = (2 if kind % 2 else 1), kind // 2 == 1
    rng = torch.Generator().manual_seed(kind)
    counts = [37, 5, 70]
    sample = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    level = torch.cat([torch.randint(3, (n,), generator=rng).sort().values for n in counts])
    tokens = Tokens(sample, level, torch.zeros(len(sample), 3, dtype=torch.long))
    windows = cut_windows(tokens, window=8, dilation=dilation, shifted=shifted, joint=joint)
    seen = torch.zeros(len(sample), len(sample), dtype=torch.bool)
    for index, mask in zip(windows.index, windows.mask):
        for q, a in enumerate(index.tolist()):
            for k, b in enumerate(index.tolist()):
                if mask[q, k] and a < len(sample) and b < len(sample):
                    seen[a, b] = True
    at = torch.arange(len(sample))
    if not joint:
        at = torch.cat([torch.arange(n) for n in counts])
    at = at + (4 if shifted else 0)
    block, inside = at // (8 * dilation), at % (8 * dilation)
    window = torch.stack([block, inside % dilation], 1)
    if dilation == 1:
        window = torch.stack([at // 8, 0 * at], 1)
    expected = (window[:, None] == window[None]).all(-1)
    expected &= (sample[:, None] == sample) & (level[None] <= level[:, None])
    assert torch.equal(seen, expected)
    assert torch.equal(windows.index.flatten()[windows.slot], torch.arange(len(sample)))


def test_no_row_depends_on_its_batch_mates():
    network = tiny()
    splits = ([0, 3, 5], [1], [2, 3, 4, 5, 6, 7])
    masked, hidden = [], []
    tree = tree_of(*splits)
    tokens = Tokens.of(tree, 2, grid=16)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(len(tokens), 24, generator=rng)
    masked = torch.rand(len(tokens), generator=rng) < 0.6
    with torch.no_grad():
        hidden = network(x, tokens, masked, network.condition([0, 1, 2]))
        for b, nodes in enumerate(splits):
            own = tokens.sample == b
            alone = Tokens.of(tree_of(nodes), 2, grid=16)
            single = network(x[own], alone, masked[own], network.condition([b]))
            torch.testing.assert_close(hidden[own], single, rtol=0, atol=1e-5)


def test_finer_levels_are_not_seen():
    network = tiny()
    tree = tree_of([0, 3, 5])
    tokens = Tokens.of(tree, 2, grid=16)
    x = torch.randn(len(tokens), 24, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[8:] = other[8:].flip(1)
    masked = torch.zeros(len(tokens), dtype=torch.bool)
    with torch.no_grad():
        a, b = (network(y, tokens, masked, network.condition([0])) for y in (x, other))
    torch.testing.assert_close(a[:8], b[:8])
    assert (a[8:] - b[8:]).abs().amax(1).min() > 1e-4


def test_masked_embeddings_do_not_matter():
    network = tiny()
    tokens = Tokens.of(tree_of([0, 3]), 2, grid=16)
    x = torch.randn(len(tokens), 24, generator=torch.Generator().manual_seed(0))
    masked = torch.arange(len(tokens)) % 3 == 0
    with torch.no_grad():
        a, b = (
            network(y, tokens, masked, network.condition([0]))
            for y in (x, x + 5 * masked[:, None].float())
        )
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "changes",
    [
        {"null": True},
        {"features": 8, "cross": True, "null": True, "norm": "rms", "positions": "table"},
    ],
)
def test_gradients_reach_every_parameter(changes):
    network = tiny(**changes).train()
    tokens = Tokens.of(tree_of([0, 3], [5]), 2, grid=16)
    n = len(tokens)
    rng = torch.Generator().manual_seed(0)
    splits = torch.randint(2, (n // 2,), generator=rng)
    codes = torch.randint(2, (n - n // 2, 4), generator=rng)
    masked = torch.rand(n, generator=rng) < 0.5
    given = [0, 3] if "features" not in changes else [torch.randn(3, 8), torch.zeros(1, 8)]
    hidden = network(network.embed(splits, codes), tokens, masked, network.condition(given))
    (network.split_logits(hidden).square().sum() + network.code_logits(hidden).sum()).backward()
    still = [k for k, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == (["class_emb.weight"] if "features" in changes else [])


def test_files(tmp_path):
    options = OctreeOptions(iterations=(2, 3, 4), temperatures=(1.0, 1.0, 0.5), cfg=1.5)
    reader = Labels(("a", "b", "c"))
    generator = OctreeGenerator(tiny(), options=options, codec="octgpt/mini", reader=reader)
    save(generator, tmp_path / "own.safetensors", name="octgpt/test generator")
    again = load_generator(tmp_path / "own.safetensors")
    assert again.network.config == generator.network.config
    assert (again.options, again.codec, again.reader) == (options, "octgpt/mini", reader)
    for a, b in zip(generator.network.parameters(), again.network.parameters()):
        assert torch.equal(a, b)


def test_published_files(tmp_path):
    five = tiny(classes=5).state_dict()
    given = {"full_depth": 1, "code_depth": 3, "heads": 2, "grid": 16, "prefix": 4}
    row = Row(system="octgpt", codec="octgpt/large-category", config=given)
    built = build({"weights": Weights({f"module.{k}": v for k, v in five.items()})}, row)
    assert built.reader == CATEGORIES
    assert built.network.config == replace(TINY, classes=5, window=2048, dilation=2, dropout=0.1)
    with pytest.raises(WeightsError, match=r"not an OctGPT transformer, key .* missing"):
        build({"weights": Weights({"weight": torch.zeros(1)}, source="other.pth")}, row)


def test_errors():
    with pytest.raises(ValueError, match="a label from 0 to 2"):
        tiny().condition([3])
    with pytest.raises(ValueError, match=r"expected features \[1 to 4, 8\]"):
        tiny(features=8).condition([torch.zeros(9, 8)])
    with pytest.raises(ValueError, match="without a null condition"):
        tiny().no_condition  # noqa: B018
    for changes in (
        {"width": 32},
        {"blocks": 3},
        {"window": 7},
        {"levels": 2},
        {"prefix": 0},
        {"cross": True},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            replace(TINY, **changes)
    with pytest.raises(ValueError, match="grid is 4"):
        replace(TINY, grid=4)


@whole_fixture
@pytest.mark.parametrize("name", ["uncond", "category_rms_abs", "text_xattn"])
def test_hidden_states_and_logits_equal_the_published_ones(name, monkeypatch):
    golden = load_golden("shape3d_octgpt")[name]
    # the fixture's order within a sample is what its library's sort made of equal keys
    monkeypatch.setattr(Tokens, "regrouped", lambda self: self.sample.sort().indices)
    network = fixture_network(golden)
    count = 1 + int(golden["octreeT"]["batch_idx"].max())
    tree = full_octree(3, count).split(3, golden["split"]).grow()
    tokens = Tokens.of(tree, 4, grid=128)
    order = tokens.behind(8, count).regrouped()
    assert torch.equal(order, golden["octreeT"]["indices"])
    x = network.embed(golden["split"], golden["indices"])
    with torch.no_grad():
        condition = network.condition(fixture_conditions(golden, count))
        hidden = network(x, tokens, golden["train_mask"].bool(), condition, joint=True)
        torch.testing.assert_close(hidden, golden["train_hidden"], rtol=0, atol=1e-5)
        n = len(golden["split"])
        split = network.split_logits(hidden[:n])
        torch.testing.assert_close(split, golden["split_logits"], rtol=0, atol=1e-5)
        codes = network.code_logits(hidden[n:]).flatten(1)
        torch.testing.assert_close(codes, golden["vq_logits"], rtol=0, atol=1e-5)


def fixture_network(golden) -> OctreeNetwork:
    cfg = golden["cfg"]
    given = {
        "heads": cfg["num_heads"],
        "window": cfg["patch_size"],
        "dilation": cfg["dilation"],
        "prefix": cfg["buffer_size"],
        "full_depth": 3,
        "code_depth": 4,
    }
    return OctreeNetwork.from_published(golden["state_dict"], given).eval()


def fixture_conditions(golden, count: int) -> list:
    if golden["cond"] is None:
        return [0] * count
    return [c if c.ndim else int(c) for c in golden["cond"]]
