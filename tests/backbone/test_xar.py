"""xAR's network against the published implementation's numbers; five kinds of entities; files."""

import json

import pytest
import torch

from anytok.backbone import masks
from anytok.backbone.entities import KINDS
from anytok.backbone.heads import thousandths
from anytok.backbone.xar import (
    SIZES,
    XAR,
    XARConfig,
    infer_config,
    load_xar,
    save_xar,
)
from anytok.codecs.published import WeightsError, write_safetensors
from tests.golden.load import load_golden


def drawn(value):
    """A tensor of the whole fixture, or the draw that the golden names by its seed."""
    if isinstance(value, torch.Tensor):
        return value
    rng = torch.Generator().manual_seed(value["seed"])
    return torch.randn(value["shape"], generator=rng)


@pytest.fixture(scope="module")
def golden():
    return load_golden("backbone_xar")


@pytest.fixture(scope="module")
def network(golden):
    return XAR.from_published(golden["state_dict"])


def tiny(**changes):
    torch.manual_seed(0)
    defaults = {"channels": 4, "grid": (6, 4), "width": 32, "ffn": 48, "heads": 2, "classes": 5}
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
    return XAR(XARConfig(**{**defaults, **sizes, **changes})).eval()


def test_published_numbers(network, golden):
    assert network.config == XARConfig(
        width=32, ffn=85, heads=2, encoder_layers=2, decoder_layers=2
    )
    times = thousandths(golden["t4"].view(4, 2).T)  # recorded cell by cell
    with torch.no_grad():
        velocity = network(drawn(golden["tok"]), golden["lab"], times)
    torch.testing.assert_close(velocity, golden["v_train"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_one_entity_after_another_through_the_cache(network, golden):
    tokens, times = drawn(golden["tok"]), thousandths(golden["t4"].view(4, 2).T)
    cache, velocities = network.open(golden["lab"]), []
    for entity in range(4):
        start, stop = network.entities.span(entity, entity + 1)
        one = times[:, entity : entity + 1]
        call = {"first": entity, "cache": cache, "keep": 1}
        velocities.append(network(tokens[:, start:stop], golden["lab"], one, **call))
    torch.testing.assert_close(torch.cat(velocities, 1), golden["v_train"], atol=1e-6, rtol=0)


def test_noisy_context_loss_and_gradients(golden):
    train = golden["train"]
    network = XAR.from_published(golden["state_dict"], {"dropout": 0.0}).train()
    labels = torch.where(train["label_drop_u"] < 0.5, 1000, train["labels"])
    times, noise = train["t"].view(4, 3).T, torch.cat(train["noises"], 1)
    loss = network.loss(drawn(train["imgs"]), labels, times, noise)
    torch.testing.assert_close(loss, train["loss"], atol=1e-6, rtol=0)
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(train["grad_norms"][name], abs=1e-6)


def test_integer_times(golden):
    for steps, expected in golden["trap"].items():
        grid = torch.linspace(1, 0.04, int(steps), dtype=torch.float64)
        grid = torch.cat([grid, torch.zeros(1, dtype=torch.float64)])
        assert torch.equal(thousandths(grid), expected["f32"])
        assert int(thousandths(grid)[-2]) == 40


@pytest.mark.parametrize(
    ("size", "parameters", "tensors"),
    [("b", 172_638_224, 257), ("l", 608_397_968, 497), ("h", 1_186_024_096, 617)],
)
def test_published_sizes_on_the_meta_device(size, parameters, tensors):
    with torch.device("meta"):
        network = XAR(SIZES[size])
    assert sum(p.numel() for p in network.parameters()) == parameters
    # published files also carry three rotary tensors in every block, and the mask
    state = network.state_dict()
    assert len(state) + 3 * network.config.layers + 1 == tensors
    head = network.config.width // network.config.heads
    rope = {"encoder_blocks.0.attn.rope.freqs_cos": torch.empty(256, head)}
    assert infer_config({**state, **rope}) == SIZES[size]


def test_published_keys_and_shapes(network, golden):
    published = {k: tuple(v) for k, v in golden["shapes"].items()}
    ours = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    assert ours == {k: v for k, v in published.items() if k != "mask" and ".rope." not in k}


def test_the_published_mask_is_the_shared_builders(network, golden):
    mask = masks.build(network.entities.blocks())
    stored = golden["state_dict"].get("mask")
    if stored is not None:  # only in the whole fixture
        assert torch.equal(mask, stored == 0)
    token_wise = XAR(XARConfig(width=8, ffn=8, heads=1, entity="token", grid=(2, 3)))
    assert torch.equal(masks.build(token_wise.entities.blocks()), masks.causal(6))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_entity_sees_itself_and_earlier_ones_only(kind):
    network = tiny(entity=kind, size={"cell": 3, "subsample": 2}.get(kind))
    count = len(network.entities)
    x, labels = torch.randn(1, network.entities.length, 4), torch.tensor([1])
    times = torch.randint(1000, (1, count))
    base = network(x, labels, times)
    for entity in range(0, count, max(1, count // 4)):
        start, stop = network.entities.span(entity, entity + 1)
        changed = x.clone()
        changed[:, stop - 1] += 1
        off = (network(changed, labels, times) - base).abs().amax(-1)[0]
        assert (off[:start] == 0).all()
        assert (off[start:stop] > 0).all()
        later = times.clone()
        later[:, entity] += 1
        off = (network(x, labels, later) - base).abs().amax(-1)[0]
        assert (off[:start] == 0).all()
        assert (off[start:stop] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    network = tiny(entity=kind).train()
    latents, labels = torch.randn(3, 4, 6, 4), torch.tensor([[0, 2], [1, -1], [5, -1]])
    rng = torch.Generator().manual_seed(0)
    times = torch.rand(3, len(network.entities), generator=rng)
    noise = torch.randn(3, network.entities.length, 4, generator=rng)
    network.loss(latents, labels, times, noise).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_labels_add_up_and_null_is_the_last(network):
    labels = torch.tensor([[3, 7], [1, -1]])
    table = network.class_emb.weight
    expected = torch.stack([table[3] + table[7], table[1]])
    torch.testing.assert_close(network.label(labels), expected)
    assert torch.equal(network.label(network.null(labels)), table[1000].expand(2, -1))
    assert network.null(torch.tensor([4])).tolist() == [1000]


def test_files(network, golden, tmp_path):
    state = {**golden["state_dict"], "mask": torch.zeros(1, 1, 256, 256)}
    torch.save(state, tmp_path / "xAR-B.pth")
    published = load_xar(tmp_path / "xAR-B.pth")
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in published.state_dict().items())
    torch.save({"model": state, "model_ema": state, "epoch": 3}, tmp_path / "training.pth")
    assert load_xar(tmp_path / "training.pth").config == network.config
    ours = tiny(entity="scale", size=2)
    save_xar(ours, tmp_path / "a.safetensors", name="xar/tiny", about={"steps": 1})
    again = load_xar(tmp_path / "a.safetensors")
    assert again.config == ours.config
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in again.state_dict().items())


def test_files_of_others_are_refused(golden, tmp_path):
    state = golden["state_dict"]
    with pytest.raises(WeightsError, match=r"rotary table .* not that of entity='subsample'"):
        XAR.from_published(state, {"entity": "subsample"})
    with pytest.raises(WeightsError, match=r"unexpected \(1\): other"):
        XAR.from_published({**state, "other": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"missing \(1\): pred.bias"):
        XAR.from_published({k: v for k, v in state.items() if k != "pred.bias"})
    with pytest.raises(WeightsError, match="not an xAR network"):
        XAR.from_published({"a": torch.zeros(1)})
    header = {"anytok": json.dumps({"system": "kl16", "config": {}})}
    write_safetensors({"a": torch.zeros(1)}, tmp_path / "b.safetensors", header)
    with pytest.raises(WeightsError, match="holds 'kl16', expected 'xar'"):
        load_xar(tmp_path / "b.safetensors")
    header = {"anytok": json.dumps({"system": "xar", "config": {"wide": 3}})}
    write_safetensors({"a": torch.zeros(1)}, tmp_path / "c.safetensors", header)
    with pytest.raises(WeightsError, match="unknown settings wide"):
        load_xar(tmp_path / "c.safetensors")


def test_bad_input(network):
    labels, times = torch.tensor([0]), torch.tensor([[0]])
    with pytest.raises(ValueError, match=r"60 positions .* entities 0 ... 0 have 64"):
        network(torch.zeros(1, 60, 16), labels, times)
    with pytest.raises(ValueError, match=r"entity 1 needs a cache"):
        network(torch.zeros(1, 64, 16), labels, times, first=1)
    with pytest.raises(ValueError, match="come after 64"):
        network(torch.zeros(1, 64, 16), labels, times, first=1, cache=network.open(labels))
    with pytest.raises(ValueError, match="multiple of 4"):
        XARConfig(width=30, heads=4)
