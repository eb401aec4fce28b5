"""Gates learn where a picture may leave: labels by hand, and a run of the task."""

import json

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

from anytok.backbone.corpus import tokenize
from anytok.backbone.pruning.dyvte import DyVTE, Gates
from anytok.backbone.pruning.dyvte_training import Batch, DyVTETask, Labels, outcome
from anytok.backbone.pruning.inside import PrunedTransformer
from anytok.backbone.tasks import PairsTask
from anytok.codecs.registry import _THIRD_PARTY, register_codec
from anytok.codecs.training.engine import RunConfig, run
from anytok.codecs.training.entry import ConfigError
from anytok.modalities.image import Image
from tests.backbone.tiny import Thumbnail, transformer


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state a process; each test begins without."""
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


def documents(model, rows=3, length=14, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (rows, length), generator=g)
    places = torch.arange(length)
    return Batch(
        x=model.embed(ids).detach(),
        visual=((places >= 2) & (places < 7)).expand(rows, -1),
        prompt=(places < 10).expand(rows, -1),
        answers=((places >= 9) & (places < 13)).expand(rows, -1),
        targets=F.pad(ids[:, 1:], (0, 1)),
    )


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"positions": "learned"}])
def test_labels_are_what_pruning_would_do(options):
    """Hidden behind a layer is left out behind it: a batch pruned by gates at that layer gives the same answers."""
    model = transformer(layers=3, **options)
    batch = documents(model)
    for layer in range(2):
        features, leaves = outcome(model, batch, layer, Labels(agree=0.49, worse=1.2))
        want = []
        for row in range(3):
            x, visual = batch.x[row : row + 1], batch.visual[row : row + 1]
            whole = PrunedTransformer(model).prefill(x, visual).hidden[0, 9:13]
            gates = Gates(width=32, layers=3, hidden=2)
            for i, gate in enumerate(gates.visual_gates_router):
                gate.w1.weight[1] = -gate.w1.weight[0]
                gate.w2.weight.zero_()
                gate.w2.weight[int(i >= layer)] = 1.0
            left = PrunedTransformer(model, DyVTE(gates)).prefill(x, visual).hidden[0, 4:8]
            logits = [model.lm_head(h) for h in (whole, left)]
            agree = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()
            losses = [F.cross_entropy(one, batch.targets[row, 9:13]) for one in logits]
            want.append(bool(agree > 0.49) and bool(losses[1] < 1.2 * losses[0]))
        assert leaves.tolist() == want
        assert features.shape == (3, 64)


@torch.no_grad()
def test_a_picture_that_nothing_reads_may_leave():
    model = transformer(layers=3)
    for block in model.model.layers:
        block.self_attn.o_proj.weight.zero_()  # attention says nothing
    _, leaves = outcome(model, documents(model), 0, Labels())
    assert leaves.all()


@torch.no_grad()
def test_gates_see_the_prompt_and_not_the_answer():
    model = transformer(layers=3)
    batch = documents(model)
    features, _ = outcome(model, batch, 1, Labels())
    other = batch.x.clone()
    other[:, 10:] += 1
    again, _ = outcome(model, Batch(**{**vars(batch), "x": other}), 1, Labels())
    assert torch.equal(features, again)


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    rows = []
    for i, name in enumerate(("red apple", "moon", "big cat", "dog")):
        Image(torch.rand(3, 8, 8, generator=rng)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": name, "style": "noto", "split": "train"})
    rows.append({**rows[0], "split": "held"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    register_codec("thumbnail/tiny", lambda path: Thumbnail())
    tokenize(folder, tmp_path / "corpora" / "tiny", {"image": Thumbnail()})
    yield {
        "model": {"width": 32, "ffn": 48, "layers": 3, "heads": 2, "kv_heads": 2, "context": 64},
        "data": {
            "root": str(tmp_path),
            "corpora": ["corpora/tiny"],
            "codecs": {"image": "thumbnail/tiny"},
            "context": 64,
            "stack": {"image": 2},
            "pairs": [
                {"read": "text", "write": "image", "units": [8]},
                {"read": "image", "write": "text", "units": [8], "drop": 0.5},
            ],
        },
        "optimizer": {"lr": 3e-3},
        "training": {"hidden": 16},
    }
    del _THIRD_PARTY["thumbnail/tiny"]


def test_gates_are_trained_for_a_trained_model(config, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.start names no model"):
        DyVTETask(config)
    before = PairsTask(config)
    torch.manual_seed(0)
    before.export(before.networks(), tmp_path / "final.safetensors")
    config["data"]["start"] = str(tmp_path / "model")
    task = DyVTETask(config)
    assert [p.drop for p in task.data.pairs] == [0.0]
    batch = task.collate([task.dataset().draw(0, torch.Generator().manual_seed(0))])
    assert int(batch["visual"].sum()) == 4  # eight codes, two a position
    made = run(
        task,
        RunConfig(
            out=str(tmp_path / "run"), steps=30, batch_size=4, warmup=2, ema=0.5, tensorboard=False
        ),
    )
    gates = Gates.from_published(load_file(made))
    assert gates.layers == 3
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["eval"]["right"] > 0.5
    frozen = task.trained.transformer
    x = frozen.embed(batch["ids"])
    PrunedTransformer(frozen, DyVTE(gates)).prefill(x[:, :8], batch["visual"][:, :8])


def test_pairs_that_only_read_text_are_refused(config, tmp_path):
    config["data"]["start"] = str(tmp_path / "model")
    config["data"]["pairs"] = config["data"]["pairs"][:1]
    with pytest.raises(ConfigError, match="none that reads more than text"):
        DyVTETask(config)
