import json
import math

import pytest
import torch

from anytok.codecs.training.data import DataError
from anytok.codecs.training.octgpt import DataConfig, Fields, OctGPTTask, measured
from anytok.modalities.shape import Shape
from tests.codecs.shape.test_octgpt import FACES, box

NETWORK = {
    "full_depth": 2,
    "encoder_channels": [8, 8],
    "encoder_blocks": [1, 1],
    "down_channels": [8, 8],
    "down_blocks": [1, 1],
    "up_channels": [8, 8, 8],
    "up_blocks": [1, 1, 1],
    "node_types": 3,
    "code_bits": 4,
}


@pytest.fixture
def folder(tmp_path):
    """A data set of a box, a broken file and an open mesh, with the box held out once more."""
    box().save(tmp_path / "box.obj")
    (tmp_path / "broken.obj").write_text("v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    Shape(box().vertices, FACES[:-2]).save(tmp_path / "open.obj")
    names = (("box", "train"), ("broken", "train"), ("open", "train"), ("box", "held"))
    lines = [json.dumps({"shape": f"{name}.obj", "split": split}) for name, split in names]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path


def config(folder) -> dict:
    return {
        "model": {"network": NETWORK, "points": 2000, "grid": 24},
        "data": {"root": str(folder), "sets": ["."], "cache": str(folder / "cache")},
        "loss": {"split": [1.0, 0.1]},
    }


def test_a_sample_is_the_turned_and_scaled_mesh(folder):
    data = OctGPTTask(config(folder)).dataset()
    for seed in range(4):
        sample = data.draw(0, torch.Generator().manual_seed(seed))
        again = data.draw(0, torch.Generator().manual_seed(seed))
        assert all(torch.equal(sample[k], again[k]) for k in sample)
        assert sample["points"].abs().max() <= 0.5 * 1.6 * 1.08 + 1e-4
        # a point on the surface, moved along its normal, is that far away
        near = data.config.queries
        assert sample["distance"][near:].abs().max() == 0
        inner = sample["query"][:near], sample["distance"][:near]
        nearest = torch.cdist(inner[0], sample["points"]).amin(1)
        expected = inner[1].abs()
        short = expected < data.config.truncate - 1e-3
        assert (nearest[short] - expected[short]).median() < 0.02
        assert ((nearest - expected)[short] > -3e-3).all()


def test_broken_and_open_meshes_are_left_out(folder, caplog):
    data = OctGPTTask(config(folder)).dataset()
    assert len(data) == 3
    for index in range(3):
        assert len(data.item(index)["faces"]) == 12
    assert "broken.obj" in caplog.text
    rows = data.rows[1:]
    with pytest.raises(DataError, match="none of the meshes is closed"):
        Fields(rows, data.config, points=100, extent=1.6).item(0)
    assert measured(Shape(box().vertices, FACES[:-2])) == {}


def test_the_cache_is_used(folder):
    task = OctGPTTask(config(folder))
    first = task.dataset().item(0)
    (folder / "box.obj").unlink()
    assert torch.equal(task.dataset().item(0)["distance"], first["distance"])


def test_a_few_steps_lower_the_loss_and_export_loads(folder, tmp_path):
    from anytok.codecs import load_codec

    torch.manual_seed(0)
    task = OctGPTTask(config(folder))
    networks = task.networks()
    data = task.dataset()
    optimizer = task.optimizer("codec", list(networks["codec"].parameters()))
    losses = []
    for step in range(12):
        rng = torch.Generator().manual_seed(step)
        batch = task.collate([data.draw(0, rng) for _ in range(2)])
        out = task.losses("codec", networks, batch, step, rng)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    assert all(math.isfinite(value) for value in losses)
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        measures = task.evaluate(networks, 12)
    assert measures["bits"] > 64
    task.export(networks, tmp_path / "mini.safetensors")
    assert load_codec(tmp_path / "mini.safetensors").spec.name == "octgpt/mini"


def test_the_shipped_config_is_whole():
    from anytok.codecs.shape.octgpt import MINI_CODEC
    from anytok.codecs.train import CONFIGS

    shipped = json.loads((CONFIGS / "octgpt_mini.json").read_text())
    task = OctGPTTask(shipped)
    assert task.model.network == MINI_CODEC.network
    levels = task.model.network.depth - task.model.network.code_depth + 1
    assert len(task.weights.split) == levels
    assert DataConfig(**{"root": "x"}).sets == ("shapes",)
