"""rvq/mini trains from a folder of recordings: fitting, varied microphones, losses, evaluation, export."""

import json

import pytest
import torch

from anytok.codecs import load_codec
from anytok.codecs.audio.rvq_mini import RVQMini
from anytok.codecs.training.engine import RunConfig, run
from anytok.codecs.training.entry import ConfigError
from anytok.codecs.training.rvq_mini import RVQMiniTask, colour, principal
from anytok.modalities import Audio

MODEL = {
    "sample_rate": 8000, "hop": 80, "bands": 10, "coefficients": 20, "loudness_width": 6, "shape_width": 10,
    "codebooks": 3, "codebook_size": 16, "channels": 8, "blocks": 1, "expansion": 2,
}  # fmt: skip
LOSS = {"seconds": 0.2, "crops": 16, "rounds": 2}


def voice(length, seed):
    rng = torch.Generator().manual_seed(seed)
    t = torch.arange(length) / 8000
    harmonics = sum(torch.sin(2 * torch.pi * k * (110 + 20 * seed) * t) / k for k in range(1, 9))
    return (0.1 * harmonics + 0.002 * torch.randn(length, generator=rng))[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("speech")
    rows = []
    for i in range(6):
        Audio(voice(8_000, i), 8000).save(root / f"{i}.wav")
        rows.append({"audio": f"{i}.wav", "split": "held" if i == 5 else "train"})
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def config(folder, **loss):
    data = {"root": str(folder), "sets": ["."]}
    return {"name": "rvq/tiny", "model": MODEL, "data": data, "loss": {**LOSS, **loss}}


def test_a_run_ends_in_a_codec_that_loads(folder, tmp_path):
    settings = RunConfig(
        out=str(tmp_path),
        steps=40,
        batch_size=4,
        log_every=1,
        eval_every=40,
        warmup=1,
        ema=0.0,
        tensorboard=False,
    )
    codec = load_codec(run(RVQMiniTask(config(folder, lr=5e-3)), settings))
    assert codec.spec.name == "rvq/tiny"
    (stream,) = codec.encode([Audio(voice(4000, 9), 8000)])
    assert stream.codes.shape == (50, 3)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").open(encoding="utf-8")]
    losses = [row["loss"] for row in log if row["kind"] == "train"]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:5]) * 2
    final = [row for row in log if row["kind"] == "eval"][-1]
    assert {"mel/1", "mel/2", "mel/3", "sisdr/3"} <= final.keys()
    assert final["sisdr/3"] > final["sisdr/1"]


def test_discriminators_begin_late(folder, tmp_path):
    settings = RunConfig(out=str(tmp_path), steps=3, batch_size=2, log_every=1, tensorboard=False)
    late = config(folder, discriminators_from=1, discriminator_width=2, seconds=0.4)
    run(RVQMiniTask(late), settings)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").open(encoding="utf-8")]
    judged = ["codec/adversarial" in row for row in log if row["kind"] == "train"]
    assert judged == [False, True, True]


def test_only_the_decoder_learns(folder):
    task = RVQMiniTask(config(folder))
    networks, data = task.networks(), task.dataset()
    task.initialise(networks, data)
    codec = networks["codec"]
    assert isinstance(codec, RVQMini)
    assert all(name.startswith("decoder.") for name, _ in codec.named_parameters())
    batch = torch.stack([data[i][..., : task.length] for i in range(4)])
    losses = task.losses("codec", networks, batch, 0, torch.Generator().manual_seed(0))
    losses["loss"].backward()
    assert [name for name, p in codec.named_parameters() if p.grad is None] == []
    fitted = codec.tables.values.float().std()
    assert fitted > 10  # the rows fill the range of int8


def test_microphones_differ_and_keep_the_sound():
    x = voice(2400, 0)[None].expand(4, -1, -1)
    a = colour(x, torch.Generator().manual_seed(1))
    assert torch.equal(a, colour(x, torch.Generator().manual_seed(1)))
    assert a.shape == x.shape
    assert a.abs().max() <= 1
    assert not torch.allclose(a[0], a[1], atol=1e-2)
    like = torch.nn.functional.cosine_similarity(a.flatten(1), x.flatten(1))
    assert (like > 0.5).all()


def test_principal_directions():
    rng = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(5, 5, generator=rng)).Q
    x = torch.randn(500, 5, generator=rng) * torch.tensor([5.0, 4.0, 0.1, 0.1, 0.1]) @ directions
    found = principal(x, 2)
    torch.testing.assert_close(directions[:2] @ found @ found.T, directions[:2], atol=2e-2, rtol=0)


def test_unknown_settings_are_refused(folder):
    with pytest.raises(ConfigError, match="blocks"):
        RVQMiniTask({**config(folder), "model": {**MODEL, "block": 2}})
