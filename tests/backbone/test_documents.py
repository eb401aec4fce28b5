import json
from collections import Counter
from itertools import islice

import pytest
import torch

from anytok.backbone.corpus import CorpusError
from anytok.backbone.directory import load_model
from anytok.backbone.documents import DocumentsTask, scores
from anytok.backbone.shards import Shards, tokenize
from anytok.backbone.streaming import Rows, Stream
from anytok.backbone.train import train
from anytok.codecs.registry import _THIRD_PARTY, register_codec
from anytok.generators.pipeline import AnyToAny
from anytok.modalities.image import Image
from tests.backbone.tiny import Thumbnail

NAMES = ("red apple", "moon", "big cat", "dog", "a fish", "tree")


@pytest.fixture
def config(tmp_path):
    rng = torch.Generator().manual_seed(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i, name in enumerate(NAMES):
        Image(torch.rand(3, 8, 8, generator=rng)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": name, "split": "train"})
    rows.append({**rows[0], "split": "held"})
    rows.append(
        {
            "items": [
                {"text": "moon", "role": "user"},
                {"image": "1.png", "role": "assistant"},
                {"text": "big cat", "role": "user"},
            ],
            "split": "train",
        }
    )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    register_codec("thumbnail/tiny", lambda path: Thumbnail())
    tokenize([folder], tmp_path / "corpus", {"image": Thumbnail()}, shard=3)
    yield {
        "task": "documents",
        "name": "tiny/documents",
        "run": {"out": str(tmp_path / "run"), "steps": 6, "batch_size": 2, "warmup": 2,
                "save_every": 3, "eval_every": 0, "log_every": 1, "tensorboard": False},
        "optimizer": {"lr": 0.01},
        "model": {"width": 16, "ffn": 32, "layers": 1, "heads": 2, "kv_heads": 2, "context": 64},
        "data": {
            "root": str(tmp_path / "corpus"),
            "corpora": ["."],
            "units": {"image": [4, 8]},
            "roles": {"user": 0.0},
            "flip": 0.5,
            "context": 32,
            "generation": {"image": {"units": 4}, "text": {"units": 4}},
        },
    }  # fmt: skip
    del _THIRD_PARTY["thumbnail/tiny"]


def test_roles_and_modalities_weigh_what_is_learned(config):
    config["data"]["weights"] = {"text": 3.0}
    task = DocumentsTask(config)
    made = {d.name: d for n in range(3) for d in task.corpora[0].read(n)}
    pair = task.pack(made["data.jsonl:1"])
    # <bos> <text> red apple </text> <image> 8 codes </image> <eos>
    assert pair.weights.tolist() == [0, 1, 3, 3, 1, *[1] * 10, 1]
    talk = task.pack(made["data.jsonl:8"])
    assert [s.role for s in talk.segments] == ["user", "assistant", "user"]
    assert talk.weights.tolist() == [0, *[0] * 3, *[1] * 10, *[0] * 4, 0]
    drawn = [task.pack(made["data.jsonl:1"], torch.Generator().manual_seed(s)) for s in range(20)]
    assert {one.segments[0].block for one in drawn} == {"text", "image"}
    assert {len(one) for one in drawn} == {16, 12}
    assert max(len(one) for one in drawn) == len(pair)


def test_rows_hold_every_training_document_once_within_the_context(config):
    task = DocumentsTask(config)
    rows = task.dataset()
    held = Counter()
    for shard, row in rows.rows:
        held.update((shard, i) for i in row)
    assert set(held.values()) == {1}
    assert len(held) == 7
    assert all(len(rows[i]) <= 32 for i in range(len(rows)))
    assert any(len(row) == 2 for _, row in rows.rows)  # packed
    packed = rows[next(i for i, (_, row) in enumerate(rows.rows) if len(row) == 2)]
    assert packed.documents.unique().tolist() == [0, 1]
    with pytest.raises(CorpusError, match=r"'data\.jsonl:8' has 19 ids, the context has 17"):
        Rows(task.corpora, task.pack, context=17)
    assert Rows(task.corpora, task.pack, context=17, overlong="skip").skipped == 1


def test_a_stream_is_shared_by_ranks_and_goes_on_where_it_was(config):
    config["data"]["context"] = 19  # one document a row
    rows = DocumentsTask(config).dataset()
    assert len(rows) == 7
    ranks = [Stream(rows, seed=3, rank=r, processes=2, buffer=2) for r in range(2)]
    for epoch in range(3):
        given = [i for stream in ranks for i in stream.order(epoch)]
        assert len(given) == len(set(given)) == 6
    assert len({tuple(ranks[0].order(epoch)) for epoch in range(6)}) > 3
    whole = list(islice(ranks[0], 10))  # into the fourth epoch
    first = Stream(rows, seed=3, rank=0, processes=2, buffer=2)
    list(islice(first, 4))
    state = json.loads(json.dumps(first.state_dict()))
    again = Stream(rows, seed=3, rank=0, processes=2, buffer=2)
    again.load_state_dict(state)
    for a, b in zip(whole[4:], islice(again, 6), strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.weights, b.weights)


@pytest.mark.parametrize("ground", [None, "image"])
def test_a_few_steps_resume_exactly_and_the_model_answers(config, tmp_path, ground):
    config["data"]["ground"] = ground
    path = tmp_path / "config.json"

    def run(out, **changes):
        config["run"] = {**config["run"], "out": str(tmp_path / out), "steps": 6}
        path.write_text(json.dumps(config))
        return train(str(path), out=str(tmp_path / out), **changes)

    whole = run("whole")
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert {"text_loss", "image_loss"} < set(log[0])
    if ground is None:
        assert "image_accuracy" in log[0]
    measures = json.loads((tmp_path / "whole" / "result.json").read_text())["eval"]
    assert set(measures) == {"text_loss", "text_accuracy", "image_loss", "image_accuracy"}

    stopped = DocumentsTask(config)
    real, calls = stopped.losses, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    stopped.losses = killed
    from anytok.codecs.training.engine import RunConfig
    from anytok.codecs.training.engine import run as engine

    with pytest.raises(KeyboardInterrupt):
        engine(stopped, RunConfig(**{**config["run"], "out": str(tmp_path / "again")}))
    again = run("again")
    a, b = (load_model(p).transformer.state_dict() for p in (whole, again))
    assert all(torch.equal(a[key], b[key]) for key in a)

    model = AnyToAny.load(whole)
    assert set(model.model.pairs) == {("text", "image"), ("image", "text")}
    assert isinstance(model("moon", to="image")[0].items[-1], Image)


def test_accuracy_of_a_grounded_network_is_that_of_its_folded_one(config):
    config["data"]["ground"] = "image"
    task = DocumentsTask(config)
    torch.manual_seed(1)
    network = task.networks()["backbone"].eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    batch = task.collate([task.dataset()[0]])
    _, hits, targets, _ = scores(network, batch)
    folded = network.folded().eval()
    logits = folded(batch["ids"][:, :-1], positions=batch["positions"][:, :-1]).logits[0]
    slots = network.slots(batch["ids"])[0, 1:]
    for slot in slots.unique().tolist():  # what the grammar does not allow
        free = slots == slot
        allowed = torch.zeros(logits.shape[1], dtype=torch.bool)
        if slot == -1:
            allowed[: network.start] = True
        else:
            first = network.start + slot * network.codes
            allowed[first : first + network.codes] = allowed[network.closing] = True
        logits[free] = logits[free].masked_fill(~allowed, -torch.inf)
    first = batch["documents"][0, :-1] == 0  # the others' positions would see it here
    chosen = (batch["weights"][0, 1:] > 0) & (slots != -2)
    want = (logits.argmax(-1) == batch["ids"][0, 1:])[chosen]
    own = first[chosen]
    assert torch.equal(hits[own], want[own])
    assert len(targets) == len(hits)


def test_another_codec_version_is_refused_by_name(config):
    del _THIRD_PARTY["thumbnail/tiny"]
    register_codec("thumbnail/tiny", lambda path: Thumbnail(brightest=0.5))
    other = Thumbnail(brightest=0.5).identity
    with pytest.raises(CorpusError, match=f"was tokenised with .*, the model reads '{other}'"):
        DocumentsTask(config)
    assert Shards(config["data"]["root"]).rules["image"].codec != other
