"""Training xAR on named pictures: a few steps, resume, the product; patches as latents."""

import json
from pathlib import Path

import pytest
import torch

from anytok.backbone.train import CONFIGS, train
from anytok.backbone.xar import XARConfig
from anytok.backbone.xar_task import XARTask, load_pictures, row_words
from anytok.codecs import WeightsError, load_codec, save_codec
from anytok.codecs.codec import CodecUnavailable
from anytok.codecs.image.patches import PatchLatents, PatchLatentsConfig
from anytok.codecs.training import engine, entry
from anytok.codecs.training.entry import ConfigError
from anytok.generators.next_x import LatentRequest, NextX, NextXOptions, pictures
from anytok.modalities.image import Image

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "data" / "colours"
    folder.mkdir(parents=True)
    rows, rng = [], torch.Generator().manual_seed(0)
    for i, (name, colour) in enumerate(COLOURS.items()):
        for split in ("train", "held"):
            file = f"{i}-{split}.png"
            pixels = torch.tensor(colour).float()[:, None, None].expand(3, 8, 8)
            noisy = (pixels + 0.1 * torch.rand(3, 8, 8, generator=rng)).clamp(0, 1)
            Image(noisy).save(folder / file)
            rows.append({"image": file, "text": f"{name} square", "style": "Flat", "split": split})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"out": str(tmp_path / "run"), "steps": 40, "batch_size": 8, "warmup": 5, "ema": 0.9}
    return {
        "task": "xar",
        "name": "xar/colours",
        "run": {**run, "save_every": 10, "eval_every": 0, "tensorboard": False},
        "optimizer": {"lr": 0.01},
        "model": {
            "entity": "cell", "size": 2, "width": 32, "ffn": 48, "heads": 2,
            "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0,
        },
        "data": {"root": str(tmp_path / "data"), "sets": ["colours"], "image_size": 8, "patch": 2, "channels": 4},
    }  # fmt: skip


def write(config, path):
    path.write_text(json.dumps(config))
    return str(path)


def test_a_run_learns_and_its_product_draws(config, tmp_path):
    folder = train(write(config, tmp_path / "c.json"))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    held = [row["flow"] for row in log if "flow" in row]
    assert held[-1] < 1.2  # noise and latents of variance 1: a network that says nothing has 2
    product = load_pictures(folder)
    assert product.words == ("blue", "flat", "green", "red", "square", "white")
    assert product.labels("Red square flat red") == (3, 4, 1)
    assert product.network.config == XARConfig(
        channels=4, grid=(4, 4), classes=6, **config["model"]
    )
    requests = [LatentRequest(labels=product.labels("flat red square"))]
    latents = NextX(product.network).sample(requests, NextXOptions(steps=3))
    assert pictures(latents, product.codec)[0].pixels.shape == (3, 8, 8)
    with pytest.raises(ValueError, match="knows no 'purple'"):
        product.labels("purple square")


def test_a_run_goes_on_where_it_stopped(config, tmp_path):
    whole = train(write(config, tmp_path / "c.json"), out=str(tmp_path / "whole"))
    task = entry.make({"xar": "anytok.backbone.xar_task:XARTask"}, config)

    class Interrupted(Exception):
        pass

    def stops(self, name, networks, batch, step, rng, inner=task.losses):
        if step == 25:
            raise Interrupted
        return inner(name, networks, batch, step, rng)

    task.losses = stops.__get__(task)
    with pytest.raises(Interrupted):
        engine.run(task, entry.run_config(config))
    resumed = train(write(config, tmp_path / "c.json"))
    a, b = load_pictures(whole).network, load_pictures(resumed).network
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_the_condition_is_dropped_to_the_null(config):
    task = XARTask({**config, "data": {**config["data"], "drop": 1.0}})
    network = task.networks()["xar"]
    batch = {key: value[None] for key, value in task.dataset()[0].items()}
    rng = torch.Generator().manual_seed(0)
    task.losses("xar", {"xar": network}, batch, 0, rng)["loss"].backward()
    learned = network.class_emb.weight.grad.abs().sum(1)
    assert learned[-1] > 0
    assert not learned[:-1].any()


def test_words():
    assert row_words({"style": "noto", "text": "Cat face cat"}) == ["noto", "cat", "face"]
    assert row_words({"text": "a"}) == ["a"]


def test_configs_that_ship_are_five_kinds_of_one_size(config):
    paths = sorted(CONFIGS.glob("xar_*.json"))
    tables = [entry.read(path) for path in paths]
    kinds = {table["model"].pop("entity") for table in tables}
    assert kinds == {"token", "cell", "subsample", "scale", "image"}
    for table in tables:
        table["model"].pop("size", None)
        entry.run_config(table)
    first = tables[0]
    for table in tables:
        assert {k: table[k] for k in ("model", "data", "optimizer")} == {
            k: first[k] for k in ("model", "data", "optimizer")
        }
        assert {**table["run"], "out": ""} == {**first["run"], "out": ""}
    shipped = {**entry.read(CONFIGS / "xar_cell.json"), "data": config["data"]}
    sizes = {"grid": (4, 4), "channels": 4, "classes": 6}
    assert XARTask(shipped).model == XARConfig(**{**shipped["model"], **sizes})


def test_bad_configs(config, tmp_path):
    with pytest.raises(
        ConfigError, match="model has the unknown key 'entitty'; did you mean 'entity'"
    ):
        XARTask({**config, "model": {"entitty": "cell"}})
    with pytest.raises(ConfigError, match="entity is 'row'"):
        XARTask({**config, "model": {"entity": "row"}})
    with pytest.raises(ValueError, match="'text/bytes' has no continuous latents"):
        XARTask({**config, "data": {**config["data"], "latents": "text/bytes"}})


def test_latents_of_another_fit_are_refused(config, tmp_path):
    folder = train(write(config, tmp_path / "c.json"), steps=1)
    other = PatchLatents(PatchLatentsConfig(patch=2, channels=4, size=8))
    save_codec(other, Path(folder) / "latents.safetensors")
    with pytest.raises(WeightsError, match="was trained on latents of fingerprint"):
        load_pictures(folder)


def test_patches_are_principal_components(tmp_path):
    pixels = torch.rand(40, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    full = PatchLatents.fit(pixels, PatchLatentsConfig(patch=2, channels=12))
    torch.testing.assert_close(full.decode_latents(full.encode_latents(pixels)), pixels)
    codec = PatchLatents.fit(pixels, PatchLatentsConfig(patch=2, channels=5))
    latents = codec.encode_latents(pixels)
    assert latents.shape == (40, 5, 4, 6)
    assert latents.var().item() == pytest.approx(1, abs=0.01)
    flat = pixels.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    _, _, v = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    best = (flat - flat.mean(0)) @ v[:5].T @ v[:5] + flat.mean(0)
    ours = codec.decode_latents(latents)
    errors = (ours - pixels).square().mean(), (best - flat).square().mean()
    torch.testing.assert_close(*errors, rtol=1e-4, atol=0)
    save_codec(codec, tmp_path / "p.safetensors", name="patches/test")
    again = load_codec(tmp_path / "p.safetensors")
    assert torch.equal(again.encode_latents(pixels), latents)
    with pytest.raises(ValueError, match=r"multiples of 2"):
        codec.encode_latents(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match=r"expected \[B, 5, h, w\]"):
        codec.decode_latents(torch.zeros(1, 4, 2, 2))
    with pytest.raises(CodecUnavailable, match="use encode_latents"):
        codec.encode([])
    with pytest.raises(ValueError, match="channels is 13"):
        PatchLatentsConfig(patch=2, channels=13)
