"""Training of OctGPT's transformer: masks, losses, a few steps on the engine, and what comes out."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from anytok.codecs.training.engine import RunConfig, run
from anytok.generators.octree_condition import Labels, Words, from_header
from anytok.generators.octree_task import Item, MaskConfig, join, masked_losses, task
from anytok.generators.published import load_generator
from tests.golden.load import load_golden

SAMPLES = Path(__file__).parents[2] / "assets" / "samples"


def config(folder: Path, **model) -> dict:
    tiny = {"width": 48, "heads": 2, "blocks": 4, "window": 128, "levels": 3, "grid": 32}
    return {
        "task": "octree",
        "model": {**tiny, "prefix": 4, "null": True, "dropout": 0.0, **model},
        "data": {
            "root": str(folder),
            "sets": ["."],
            "cache": str(folder / "streams"),
            "condition": "text" if "features" in model else "category",
        },
        "loss": {"lr": 3e-3, "flip": 0.05},
        "training": {"iterations": [2, 2, 2], "temperatures": [1.0, 1.0, 0.5], "cfg": 1.5},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    for name, split in (("shape-blocks", "train"), ("shape-smooth", "held")):
        shutil.copy(SAMPLES / f"{name}.obj", folder)
        row = {"shape": f"{name}.obj", "split": split, "text": name.replace("-", " ")}
        rows.append(row | {"category": "blocks"})
    (folder / "broken.obj").write_text("v 0 0 0\n")
    rows.append({"shape": "broken.obj", "split": "train", "text": "none", "category": "blocks"})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_few_steps_lower_the_loss(folder, tmp_path):
    made = task(config(folder, features=24, cross=True))
    data = made.dataset()
    assert [item.condition for item in data.items] == ["shape blocks"]
    assert len(list((folder / "streams").rglob("*.none"))) == 1
    settings = RunConfig(
        out=str(tmp_path), steps=12, batch_size=1, warmup=2, log_every=1, ema=0.0, tensorboard=False
    )
    product = run(made, settings)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    generator = load_generator(product)
    assert (generator.codec, generator.reader) == ("octgpt/mini", Words(24, 4))
    assert generator.options.iterations == (2, 2, 2)
    (stream,) = generator.streams(made.codec, ["shape blocks"])
    made.codec.check(stream)


def test_categories_become_labels(folder):
    made = task(config(folder))
    assert made.reader == Labels(("blocks",))
    network = made.networks()["network"]
    assert network.class_emb.num_embeddings == 2  # and none
    with torch.no_grad():
        scores = made.evaluate({"network": network.eval()}, 0)
    assert 1.0 < scores["split"] + scores["code"] < 2.0  # two bits by chance: 2 ln 2


def test_batches_keep_rows_apart():
    splits = torch.zeros(8, dtype=torch.long)
    a, b = splits.clone(), splits.clone()
    a[2], b[[0, 7]] = 1, 1
    batch = join(
        [Item((a,), torch.zeros(8, 3).long(), ""), Item((b,), torch.ones(16, 3).long(), "")],
        full_depth=1,
        device=torch.device("cpu"),
    )
    assert torch.equal(batch.splits, torch.cat([a, b]))
    assert torch.equal(batch.tree.batch(2), torch.tensor([0] * 8 + [1] * 16))
    assert torch.equal(batch.codes[:, 0], batch.tree.batch(2))


def test_shares_stay_in_their_range():
    rng = torch.Generator().manual_seed(0)
    shares = [MaskConfig().share(rng) for _ in range(200)]
    assert 0.5 <= min(shares) < 0.6
    assert 0.95 < max(shares) <= 1
    with pytest.raises(ValueError, match=r"low is 1\.5"):
        MaskConfig(low=1.5)


def test_losses_cover_what_was_masked():
    logits = torch.tensor([[0.0, 9.0], [9.0, 0.0]])
    codes = torch.zeros(1, 1, 2)
    masked = torch.tensor([True, False, False])
    out = masked_losses(logits, torch.tensor([1, 1]), codes, torch.zeros(1, 1).long(), masked)
    assert float(out["split"]) < 1e-3
    assert float(out["code"]) == 0
    out = masked_losses(
        logits, torch.tensor([1, 1]), codes, torch.zeros(1, 1).long(), masked, every_code=True
    )
    assert float(out["code"]) == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.skipif(not os.environ.get("ANYTOK_PARITY"), reason="needs the whole fixture")
@pytest.mark.parametrize("name", ["uncond", "category_rms_abs", "text_xattn"])
def test_losses_equal_the_published_ones(name):
    golden = load_golden("shape3d_octgpt")[name]
    codes = golden["vq_logits"].view(len(golden["indices"]), -1, 2)
    masked = golden["train_mask"].bool()
    out = masked_losses(golden["split_logits"], golden["split"], codes, golden["indices"], masked)
    torch.testing.assert_close(out["split"], golden["out"]["split_loss"])
    torch.testing.assert_close(out["code"], golden["out"]["vq_loss"])
    torch.testing.assert_close(out["split_right"], golden["out"]["split_accuracy"])


def test_words():
    words = Words(64, 3)
    chair, chairs, lamp = (words(w)[0] for w in ("chair", "chairs", "lamp"))
    assert float(chair @ chairs) > 0.4 > float(chair @ lamp)
    assert torch.equal(words("Office CHAIR"), words("office chair"))
    assert words("a b c d").shape == (3, 64)
    with pytest.raises(ValueError, match="no words"):
        words("  ")
    assert from_header({"condition": words.to_json()}) == words
    assert from_header({"condition": {"kind": "none"}}) is None
    with pytest.raises(ValueError, match="expected words, labels or none"):
        from_header({"condition": {"kind": "clip"}})
    labels = Labels(("bed", "chair"))
    assert labels("chair") == 1
    assert from_header({"condition": labels.to_json()}) == labels
    with pytest.raises(ValueError, match="expected one of bed, chair"):
        labels("car")
