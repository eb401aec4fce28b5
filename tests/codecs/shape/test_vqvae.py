from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anytok.codecs.published import WeightsError
from anytok.codecs.shape.octree import Octree, Points, build_octree
from anytok.codecs.shape.surface import GridConfig, dense
from anytok.codecs.shape.vqvae import (
    DEFAULT,
    LARGE,
    MINI,
    PRESETS,
    VQVAE,
    BinarySphericalQuantizer,
    infer_config,
)
from anytok.codecs.training.octgpt import LossConfig, Queries, field_losses, split_losses
from tests.golden.load import load_golden


@pytest.fixture(scope="module")
def golden() -> dict:
    return load_golden("shape3d_vqvae")


@pytest.fixture(scope="module")
def vqvae(golden) -> VQVAE:
    return VQVAE.from_published(golden["state_dict"], {"full_depth": 2})


@pytest.fixture(scope="module")
def tree(golden) -> Octree:
    clouds = [Points(p, n) for p, n in zip(golden["points"], golden["normals"])]
    return build_octree(clouds, depth=5, full_depth=2)


@pytest.fixture(scope="module")
def known(vqvae, tree):
    """Decoded along the true octree."""
    with torch.no_grad():
        return vqvae.decode(vqvae.encode(tree)[0], tree, grow=False)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "millions", "entries"),
    [("default", 4.21, 214), ("big", 7.96, 274), ("large", 33.80, 325), ("huge", 185.6, 339)],
)
def test_published_sizes(name, millions, entries):
    with torch.device("meta"):
        module = VQVAE(PRESETS[name])
    count = sum(p.numel() for p in module.parameters()) / 1e6
    assert round(count, 1 if millions > 100 else 2) == millions
    assert len(module.state_dict()) == entries


@pytest.mark.parametrize("name", ["default", "large", "mini"])
def test_sizes_are_read_from_the_shapes(name):
    config = PRESETS[name]
    with torch.device("meta"):
        state = VQVAE(config).state_dict()
    assert infer_config(state, full_depth=config.full_depth) == config


def test_bits_equal_the_published_ones(golden, vqvae, tree):
    with torch.no_grad():
        _, bits, entropy = vqvae.encode(tree)
    assert torch.equal(bits, golden["indices"])
    torch.testing.assert_close(entropy, golden["vq_loss"])


def test_logits_and_planes_on_the_known_octree(golden, known):
    for depth, logits in golden["logits"].items():
        close(known.logits[depth], logits)
    for depth, planes in golden["signals"].items():
        close(known.planes[depth], planes)


def test_field_on_the_known_octree(golden, known):
    points, batch = golden["pos"][:, :3], golden["pos"][:, 3].long()
    with torch.no_grad():
        for depth, values in golden["mpus"].items():
            close(known.field(depth)(points, batch), values)
        rows = len(golden["field32"])
        grid = dense(known.field(), GridConfig(size=32), points.device)
    close(grid[:rows], golden["field32"])


def test_growing_by_its_own_predictions(golden, vqvae, tree):
    with torch.no_grad():
        out = vqvae.decode(vqvae.encode(tree)[0], tree, grow=True)
        value = out.field()(golden["pos"][:, :3], golden["pos"][:, 3].long())
    assert [out.tree.count(d) for d in range(6)] == golden["pred_nnum"].tolist()
    close(out.logits[5], golden["pred_logits"][5])
    close(value, golden["pred_mpu"])


def test_losses_equal_the_published_ones(golden, known, tree):
    points, batch = golden["pos"][:, :3], golden["pos"][:, 3].long()
    queries = Queries(points, golden["sdf_gt"], golden["grad_gt"], batch)
    split = split_losses(known, tree, (1.0, 1.0, 0.1))
    fields = field_losses(known, queries, LossConfig())
    theirs = golden["losses"]
    for depth, weight in ((3, 1.0), (4, 1.0), (5, 0.1)):
        torch.testing.assert_close(split[f"split_{depth}"], weight * theirs[f"loss_{depth}"])
        for ours, name in (("distance", "sdf_loss"), ("gradient", "grad_loss")):
            torch.testing.assert_close(
                fields[f"{ours}_{depth}"].detach(), theirs[f"{name}_{depth}"], rtol=1e-4, atol=1e-4
            )
    with pytest.raises(ValueError, match="2 split weights, expected 3"):
        split_losses(known, tree, (1.0, 1.0))


def test_gradients_reach_every_parameter(tree):
    tiny = replace(
        MINI,
        encoder_channels=(8, 8, 8),
        down_channels=(8, 8),
        down_blocks=(1, 1),
        up_channels=(8, 8, 8, 8),
        up_blocks=(1, 1, 1, 1),
        code_bits=4,
    )
    torch.manual_seed(0)
    module = VQVAE(tiny)
    codes, _, entropy = module.encode(tree)
    out = module.decode(codes, tree, grow=False)
    rng = torch.Generator().manual_seed(0)
    where = torch.rand(50, 3, generator=rng) - 0.5
    queries = Queries(where, torch.rand(50, generator=rng), where, torch.zeros(50).long())
    loss = sum(split_losses(out, tree, (1, 1, 1)).values()) + entropy
    (loss + sum(field_losses(out, queries, LossConfig()).values())).backward()
    still = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_foreign_weights_are_refused(golden):
    with pytest.raises(WeightsError, match="not an OctGPT VQ-VAE"):
        VQVAE.from_published({"weight": torch.zeros(3)})
    state = dict(golden["state_dict"])
    del state["post_proj.bias"]
    with pytest.raises(WeightsError, match=r"missing \(1\): post_proj.bias"):
        VQVAE.from_published(state, {"full_depth": 2})


def test_a_config_whose_levels_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="down_channels has 4 levels, expected 5"):
        replace(LARGE, encoder_channels=(32, 32), encoder_blocks=(1, 1))
    with pytest.raises(ValueError, match="up_channels and up_blocks differ"):
        replace(DEFAULT, up_blocks=(1, 1))
    with pytest.raises(ValueError, match="node_types is 2"):
        replace(DEFAULT, node_types=2)


def test_quantiser_flips_bits_in_training():
    quantizer = BinarySphericalQuantizer(16)
    z = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    codes, bits, _ = quantizer(z)
    torch.testing.assert_close(codes, quantizer.codes(bits))
    noisy, _, _ = quantizer(z, flip=0.5, rng=torch.Generator().manual_seed(1))
    share = ((noisy > 0) != (codes > 0)).float().mean()
    assert 0.02 < share < 0.5
