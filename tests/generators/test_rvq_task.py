"""Training models of residual codes on a folder of pictures: runs, files, equal terms, bad configs."""

import json

import pytest
import torch

from anytok.codecs import save_codec
from anytok.codecs.image.rqvae import RQVAE, RQVAEConfig
from anytok.codecs.published import WeightsError
from anytok.codecs.training.engine import run
from anytok.codecs.training.entry import ConfigError
from anytok.codecs.training.task import RunConfig
from anytok.generators.resgen import ResGenSampling
from anytok.generators.rvq_body import CodeRequest
from anytok.generators.rvq_task import KINDS, load_model, task
from anytok.modalities import Image

SIZES = {
    "rq": {"depth_width": 8, "depth_layers": 1, "depth_heads": 2},
    "resgen": {"components": 3, "rank": 2, "blocks": 1},
    "discrete": {"blocks": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A residual codec of 2 x 2 positions, and eight pictures of two sorts."""
    root = tmp_path_factory.mktemp("rvq")
    torch.manual_seed(0)
    sizes = {"channels": 32, "multipliers": (1, 1), "latent_channels": 8, "code_width": 4}
    codec = RQVAE(RQVAEConfig(**sizes, image_size=4, codes=16, depth=3))
    save_codec(codec, root / "codec.safetensors", name="rqvae/tiny")
    (root / "cells").mkdir()
    rows = []
    for i in range(8):
        Image(torch.rand(3, 4, 4)).save(root / "cells" / f"{i}.png")
        split = "held" if i > 5 else "train"
        rows.append({"image": f"{i}.png", "text": f"cell {i}", "sort": "ab"[i % 2], "split": split})
    (root / "cells" / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def config(folder, kind, **data):
    own = {"root": str(folder), "sets": ["cells"], "codec": str(folder / "codec.safetensors")}
    body = {"width": 16, "layers": 1, "heads": 2}
    return {
        "task": "codes",
        "model": {"kind": kind, **body, **SIZES.get(kind, {})},
        "data": {**own, "limit": 16, "words": 8, **data},
    }


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_trains_and_its_file_draws(folder, tmp_path, kind):
    own = task(config(folder, kind, depth=2))
    settings = RunConfig(out=str(tmp_path / kind), steps=2, batch_size=3, tensorboard=False)
    net, header = load_model(run(own, settings))
    assert header["kind"] == kind
    assert net.config.vocab == (16, 16)
    text = torch.tensor(list(b"cell 1"))
    options = ResGenSampling(steps=3) if kind != "rq" else None
    *_, last = net.run([CodeRequest(length=4, condition=text)], options)
    stream = own.codec.stream(last.codes, grid=(2, 2))
    assert own.codec.decode([stream])[0].pixels.shape == (3, 4, 4)
    again = torch.Generator().manual_seed(0)
    samples = [own.sample(row) for row in own.rows[:2]]
    loss = net.loss(*map(list, zip(*samples)), again)["loss"]
    assert torch.isfinite(loss)


def test_labels_are_numbers_of_the_training_rows(folder):
    own = task(config(folder, "resgen", condition="sort"))
    assert own.labels == ["a", "b"]
    assert own.model.conditions == 2
    assert [own.sample(row)[1].tolist() for row in own.rows[:2]] == [[0], [1]]
    with pytest.raises(ConfigError, match="'c' is no sort"):
        own.condition({"sort": "c"})
    assert len(task(config(folder, "rq", condition="none")).sample(own.rows[0])[1]) == 0


def test_bad_configs_are_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="expected one of rq, resgen, discrete"):
        task(config(folder, "gan"))
    with pytest.raises(ConfigError, match="6 rows have no 'colour'"):
        task(config(folder, "rq", condition="colour"))
    bad = config(folder, "rq")
    bad["model"]["layrs"] = 2
    with pytest.raises(ConfigError, match="layrs"):
        task(bad)
    path = tmp_path / "x.safetensors"
    path.write_bytes((folder / "codec.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="kind is None"):
        load_model(path)
