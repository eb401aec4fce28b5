"""Training masked generators: published losses, masks, tiny runs that learn, resume and share two processes."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from anytok.backbone.corpus import Corpus, tokenize
from anytok.codecs.published import save_codec
from anytok.codecs.registry import load_codec
from anytok.codecs.training import checkpoint
from anytok.codecs.training.entry import ConfigError, find, make, read
from anytok.codecs.video.cvivit import from_published
from anytok.generators import train
from anytok.generators.masked_task import (
    MaskedLoss,
    MaskGITTask,
    PhenakiTask,
    masked_loss,
    masks,
)
from anytok.generators.published import load_generator
from anytok.generators.video_maskgit import SelfCritic, video_from_published
from anytok.modalities.video import Video
from tests.golden.load import load_golden

SIZES = {"dim": 32, "depth": 1, "heads": 2, "head_dim": 16, "shrink": 1.0}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="module")
def fx():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ANYTOK_PARITY", raising=False)
        return load_golden("video_phenaki_maskgit")


@pytest.fixture(scope="module")
def root(fx, tmp_path_factory):
    """Twelve clips of a moving bar in two colours, tokenised by a saved C-ViViT."""
    folder = tmp_path_factory.mktemp("corpus")
    codec = from_published(fx["cvivit_sd"], {"size": (16, 24)})
    save_codec(codec, folder / "codec.safetensors", name="cvivit/tiny-corpus")
    source = folder / "clips"
    source.mkdir()
    rows = []
    for i in range(12):
        frames = torch.zeros(7, 3, 16, 24, dtype=torch.uint8)
        for t in range(7):
            frames[t, i % 2, :, (3 * t + i) % 20 : (3 * t + i) % 20 + 4] = 255
        Video(frames=frames, fps=8).save(source / f"{i}.mp4")
        name = ("red", "green")[i % 2]
        split = "held" if i >= 10 else "train"
        rows.append({"video": f"{i}.mp4", "text": f"a {name} bar", "name": name, "split": split})
    lines = "\n".join(json.dumps(row) for row in rows)
    (source / "data.jsonl").write_text(lines + "\n")
    codec = load_codec(folder / "codec.safetensors")
    tokenize(source, folder / "tokens", {"video": codec})
    return folder


def config(root, task="phenaki", **changes):
    model = SIZES
    if task == "maskgit":
        model = {"dim": 32, "layers": 2, "heads": 2, "inner": 64, "dropout": 0.0}
    table = {
        "task": task,
        "name": f"{task}/tiny",
        "run": {
            "out": str(root / "run"),
            "steps": 20,
            "batch_size": 5,
            "warmup": 1,
            "log_every": 1,
            "eval_every": 0,
            "save_every": 10,
            "tensorboard": False,
            "ema": 0.5,
        },
        "model": model,
        "data": {
            "root": str(root),
            "corpora": ["tokens"],
            "codec": str(root / "codec.safetensors"),
            "condition": "name" if task == "maskgit" else "text",
            "units": 3,
        },
        "loss": {},
        "optimizer": {"lr": 0.01},
    }
    for section, values in changes.items():
        table[section] = {**table[section], **values}
    return table


def write(table, path):
    path.write_text(json.dumps(table))
    return str(path)


def log(out, kind="train"):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row.get("kind", kind) == kind]


# Losses.


def test_losses_are_the_published_ones(fx, root):
    changes = {"drop": 0.0, "places": 6, "critic": "token", "critic_labels": "published"}
    task = PhenakiTask(config(root, loss=changes, data={"condition": None}))
    assert task.grid == (3, 2, 3)
    networks = {
        "generator": video_from_published(fx["maskgit_sd"]),
        "critic": video_from_published(fx["critic_sd"]),
    }
    context = [row[there] for row, there in zip(fx["context"], fx["text_mask"])]
    batch = {"codes": fx["ids"].flatten(1), "conditions": context}
    for name, wanted in fx["losses"].items():
        rng = torch.Generator().manual_seed(8)
        found = task.losses(name, networks, batch, 0, rng)["loss"]
        torch.testing.assert_close(found.detach(), wanted, atol=1e-5, rtol=0)


def test_loss_of_a_class_generator_by_hand():
    logits = torch.randn(2, 3, 5)
    codes = torch.tensor([[0, 1, 2], [3, 4, 0]])
    is_masked = torch.tensor([[True, False, True], [False, False, True]])
    logs, total, weights = logits.log_softmax(-1), 0.0, 0.0
    for b in range(2):
        for n in range(3):
            target = torch.full((5,), 0.1 / 5)
            target[codes[b, n]] += 0.9
            weight = 1.0 if is_masked[b, n] else 0.1
            total -= weight * float((target * logs[b, n]).sum())
            weights += weight
    found = masked_loss(logits, codes, is_masked, MaskedLoss())
    assert float(found) == pytest.approx(total / weights, abs=1e-5)


@pytest.mark.parametrize(("curve", "mean"), [("arccos", 2 / math.pi), ("cosine", 2 / math.pi)])
def test_masks_follow_their_curve(curve, mean):
    rng = torch.Generator().manual_seed(0)
    drawn = masks(torch.Size((4000, 40)), MaskedLoss(curve=curve), rng)
    shares = drawn.float().mean(1)
    assert float(shares.mean()) == pytest.approx(mean, abs=0.02)
    assert int(drawn.sum(1).min()) >= 1
    assert float(drawn.float().mean(0).std()) < 0.02  # no position is preferred
    drawn = masks(torch.Size((500, 18)), MaskedLoss(curve="cosine", places=6), rng)
    assert set(drawn.sum(1).tolist()) == {18, 17, 16, 13, 9, 5}


def test_conditions_are_dropped_as_often_as_asked(root):
    task = PhenakiTask(config(root, loss={"drop": 0.25}))
    kept = task.kept([1] * 4000, torch.Generator().manual_seed(1))
    assert sum(c is None for c in kept) / 4000 == pytest.approx(0.25, abs=0.03)


# Data.


def test_samples_are_streams_cut_to_size(root):
    task = PhenakiTask(config(root, data={"crop": True}))
    items = Corpus(root / "tokens").items("train")
    whole = items[0][0].stream("video").codes[:, 0]
    assert len(whole) == 4 * 6
    starts = set()
    for seed in range(20):
        sample = task.dataset().draw(0, torch.Generator().manual_seed(seed))
        starts |= {s for s in (0, 6) if torch.equal(sample["codes"], whole[s : s + 18])}
    assert starts == {0, 6}
    assert torch.equal(task.sample(items[0][0])["codes"], whole[:18])
    assert task.encoder(["a red bar"])[0].tolist() == sample["condition"].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"units": 9}}, "12 of 12 streams have fewer than the 54 positions"),
        ({"data": {"colour": 1}}, "unknown key 'colour'"),
        ({"loss": {"critic": "both"}}, "critic is 'both', expected one of none, token, self"),
        ({"model": {"depht": 1}}, "did you mean 'depth'"),
    ],
)
def test_configs_that_cannot_be(root, changes, message):
    with pytest.raises(ConfigError, match=message):
        PhenakiTask(config(root, **changes))


def test_configs_that_ship_are_read():
    for path in sorted(train.CONFIGS.glob("*.json")):
        assert read(find(path.stem, train.CONFIGS))["task"] in train.TASKS
    with pytest.raises(ConfigError, match="did you mean 'phenaki'"):
        make(train.TASKS, {"task": "phenaky"})


# Runs.


@pytest.mark.parametrize("critic", ["token", "self"])
def test_a_tiny_run_learns_and_resumes_bit_for_bit(root, tmp_path, critic):
    table = config(root, run={"out": str(tmp_path / "a")}, loss={"critic": critic})
    final = train.train(write(table, tmp_path / "a.json"))
    rows = log(tmp_path / "a")
    key = "generator/loss" if critic == "token" else "mask"
    losses = [row[key] for row in rows]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    generator = load_generator(final)
    assert generator.video_codec.spec.name == "cvivit/tiny-corpus"
    assert generator.codes(["a red bar"], 5).shape == (1, 3, 2, 3)
    assert (type(generator.critic) is SelfCritic) == (critic == "self")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("result.json", "final.safetensors"):
        (tmp_path / "b" / name).unlink()
    shutil.rmtree(checkpoint.latest(tmp_path / "b" / "checkpoints"))
    assert checkpoint.latest(tmp_path / "b" / "checkpoints") is not None
    again = train.train(write(table, tmp_path / "b.json"), out=str(tmp_path / "b"))
    assert again.read_bytes() == final.read_bytes()


def test_a_class_generator_learns_and_is_saved(root, tmp_path):
    table = config(root, "maskgit", run={"out": str(tmp_path)})
    final = train.train(write(table, tmp_path / "c.json"))
    losses = [row["loss"] for row in log(tmp_path)]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    generator = load_generator(final)
    assert generator.network.config.classes == 2
    task = MaskGITTask(table)
    assert [int(task.conditions[name]) for name in ("green", "red")] == [0, 1]
    measures = json.loads((tmp_path / "result.json").read_text())["eval"]
    assert set(measures) == {"loss", "accuracy"}


def test_two_processes(root, tmp_path):
    run = {"out": str(tmp_path / "two"), "steps": 3, "batch_size": 2}
    table = config(root, run=run, loss={"critic": "token"})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "anytok.generators.train", write(table, tmp_path / "two.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2
    assert load_generator(tmp_path / "two" / "final.safetensors").network.vocab == 64
