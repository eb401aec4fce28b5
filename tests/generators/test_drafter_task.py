import json

import pytest
import torch

from anytok.backbone.corpus import tokenize
from anytok.backbone.directory import save_model
from anytok.codecs.registry import _THIRD_PARTY, register_codec
from anytok.codecs.training import entry
from anytok.generators.drafter import Drafter, load_drafter
from anytok.generators.drafter_task import drafter_loss, start
from anytok.modalities.image import Image
from tests.backbone.tiny import Thumbnail, model, transformer

TASKS = {"drafter": "anytok.generators.drafter_task:DrafterTask"}


def test_the_first_prediction_is_the_best_linear_one():
    torch.manual_seed(0)
    target = transformer(context=24)
    drafter = Drafter(target)
    ids = torch.randint(64, (60, 20))
    batch = {
        "ids": ids,
        "positions": torch.arange(20).expand(60, -1),
        "weights": torch.ones(60, 20),
    }
    before = drafter_loss(drafter, batch, [(0, 64)])
    start(drafter, batch, ridge=1e-6)
    after = drafter_loss(drafter, batch, [(0, 64)])
    assert float(after["states"]) < 0.7 * float(before["states"])
    with torch.no_grad():
        drafter.fc.weight[3, 5] += 1.0
    worse = drafter_loss(drafter, batch, [(0, 64)])
    assert float(worse["states"]) > float(after["states"])


def test_overlap_grows_on_a_batch():
    torch.manual_seed(0)
    target = transformer(context=24)
    drafter = Drafter(target.requires_grad_(False))
    ids = torch.randint(64, (8, 20))
    batch = {"ids": ids, "positions": torch.arange(20).expand(8, -1), "weights": torch.ones(8, 20)}
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    overlaps = []
    for _ in range(40):
        parts = drafter_loss(drafter, batch, [(0, 40), (40, 64)])
        (parts["states"] + parts["laws"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        overlaps.append(float(parts["overlap"]))
    assert overlaps[-1] > overlaps[0] + 0.1
    assert all(p.grad is None for p in target.parameters())


@pytest.fixture
def config(tmp_path):
    register_codec("thumbnail/tiny", lambda path: Thumbnail())
    folder = tmp_path / "recipe"
    folder.mkdir()
    rows = []
    for i, split in enumerate(("train", "train", "held")):
        Image(torch.full((3, 8, 8), i / 3)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": "abc"[: i + 1], "split": split})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenize(folder, tmp_path / "corpora" / "tiny", {"image": Thumbnail()})
    save_model(model(), tmp_path / "target")
    yield {
        "task": "drafter",
        "run": {"out": str(tmp_path / "run"), "steps": 2, "batch_size": 2, "eval_every": 0},
        "model": {"target": str(tmp_path / "target")},
        "data": {
            "root": str(tmp_path),
            "corpora": ["corpora/tiny"],
            "codecs": {"image": "thumbnail/tiny"},
            "context": 64,
            "pairs": [{"read": "text", "write": "image", "units": [8], "drop": 0.1}],
        },
    }
    del _THIRD_PARTY["thumbnail/tiny"]


def test_a_run_writes_a_drafter_of_its_target(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    product = entry.train(TASKS, tmp_path, str(path), {})
    drafter = load_drafter(product, model().transformer)
    assert product.name == "final.safetensors"
    assert not drafter.fc.weight.equal(Drafter(model().transformer).fc.weight)
