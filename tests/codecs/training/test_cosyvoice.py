"""The semantic chain trains: tokenizer, flow, vocoder, a few steps each, and their products make one codec."""

import json
import math

import pytest
import torch

from anytok.codecs import WeightsError, load_codec
from anytok.codecs.audio.cosyvoice.codec import CosyVoice, Speech
from anytok.codecs.audio.cosyvoice.s3 import S3Tokenizer
from anytok.codecs.train import TASKS
from anytok.codecs.training import flow, hift, s3
from anytok.codecs.training.engine import RunConfig, run
from anytok.codecs.training.entry import ConfigError, make, read
from anytok.codecs.training.hift_pitch import pitch
from anytok.modalities import Audio

RATE = 16_000
MEL = {"rate": RATE, "n_fft": 640, "hop": 320, "n_mels": 80}
S3 = {"mels": 20, "width": 64, "heads": 1, "layers": 1, "codes": 81}
FLOW = {
    "vocab": 81, "speaker": 6, "width": 16, "heads": 2, "hidden": 16, "layers": 1, "up_layers": 1,
    "channels": [16], "blocks": 1, "middle": 1, "velocity_heads": 1, "head_width": 16,
}  # fmt: skip
SPEAKER = {
    "bands": 16, "embedding": 6, "channels": 8, "growth": 4, "bottleneck": 2, "layers": [2, 1],
    "dilations": [1, 2],
}  # fmt: skip
HIFT = {
    "rate": RATE, "channels": 16, "f0_channels": 8, "ups": [8, 5, 2], "up_kernels": [16, 11, 4],
    "source_kernels": [7, 7, 11],
}  # fmt: skip


def voice(seconds, hertz, seed=0):
    t = torch.arange(int(RATE * seconds)) / RATE
    tone = sum(torch.sin(2 * math.pi * k * hertz * t) / k for k in range(1, 6))
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(seed))
    return (0.1 * tone + 0.01 * noise)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("speech")
    rows = []
    for i in range(4):
        Audio(voice(0.5 + 0.1 * i, 110 + 20 * i, i), RATE).save(root / f"{i}.wav")
        split = "held" if i == 3 else "train"
        rows.append(
            {"audio": f"{i}.wav", "split": split, "text": ["A be.", "cab", "bee!", "ace"][i]}
        )
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def steps(out, count=2):
    return RunConfig(
        out=str(out), steps=count, batch_size=2, log_every=1, warmup=1, ema=0.0, tensorboard=False
    )


def logged(out, kind):
    rows = [json.loads(line) for line in (out / "log.jsonl").open(encoding="utf-8")]
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def chain(folder, tmp_path_factory):
    """The three runs, one after the other."""
    out = tmp_path_factory.mktemp("runs")
    data = {"root": str(folder), "sets": ["."]}
    first = {"model": S3, "data": data, "loss": {"upper_layers": 1}, "name": "cosyvoice/s3-tiny"}
    tokenizer = run(s3.task(first), steps(out / "s3"))
    training = {"tokenizer": str(tokenizer), "mel": MEL, "speaker": SPEAKER}
    second = {"model": FLOW, "data": data, "training": training}
    middle = run(flow.task(second), steps(out / "flow"))
    training = {"tokenizer": str(tokenizer), "flow": str(middle), "mel": MEL}
    loss = {"seconds": 0.4, "discriminators_from": 1, "discriminator_width": 2}
    third = {
        "model": HIFT,
        "data": data,
        "training": training,
        "loss": loss,
        "name": "cosyvoice/tiny",
    }
    return out, run(hift.task(third), steps(out / "hift"))


def test_the_chain_ends_in_a_codec(chain):
    out, product = chain
    tokenizer, codec = load_codec(out / "s3" / "final.safetensors"), load_codec(product)
    assert isinstance(tokenizer, S3Tokenizer)
    assert isinstance(codec, CosyVoice)
    assert (tokenizer.spec.name, codec.spec.name) == ("cosyvoice/s3-tiny", "cosyvoice/tiny")
    audio = Audio(voice(0.6, 130), RATE)
    (stream,) = codec.encode([audio])
    assert torch.equal(stream.codes, tokenizer.encode([audio])[0].codes)
    (again,) = codec.decode([stream], options=Speech(steps=1))
    assert again.samples.shape == audio.samples.shape


def test_what_is_logged(chain):
    out, _ = chain
    train, final = logged(out / "s3", "train"), logged(out / "s3", "eval")[-1]
    assert all(0 < row["used"] <= 1 and math.isfinite(row["loss"]) for row in train)
    assert {"errors", "different", "perplexity"} <= final.keys()
    assert {"loss", "mel"} <= logged(out / "flow", "eval")[-1].keys()
    assert {"mel", "f0", "voicing"} <= logged(out / "hift", "eval")[-1].keys()
    keys = {key for row in logged(out / "hift", "train") for key in row}
    assert any("relative" in key for key in keys)


def test_letters_and_edits():
    assert s3.spelled("Ab,  c'd") == [2, 3, 1, 4, 38, 5]
    assert s3.letters_of(torch.tensor([0, 2, 2, 0, 2, 3, 0])) == [2, 2, 3]
    assert [s3.edits(a, b) for a, b in (("abc", "abc"), ("abc", "adc"), ("", "ab"), ("xab", "ab"))] == [
        0, 1, 2, 1,
    ]  # fmt: skip
    masked = s3.spans(50, 30, 10, torch.Generator().manual_seed(0))
    widths = masked.sum(1)
    assert 0 <= int(widths.min()) <= int(widths.max()) <= 10
    changes = (masked[:, 1:] != masked[:, :-1]).sum(1)
    assert int(changes.max()) <= 2


def test_padding_does_not_change_the_recogniser():
    torch.manual_seed(0)
    task = s3.task({"model": S3, "data": {}, "loss": {"upper_layers": 1}})
    net = task.networks()["recogniser"].eval()
    short = torch.randn(20, 61).half()
    alone = task.collate([(short, torch.tensor([1, 2]))])
    beside = task.collate(
        [(short, torch.tensor([1, 2])), (torch.randn(20, 90).half(), torch.tensor([3]))]
    )
    out, ids, n = net(beside.mels, beside.n)
    expected, expected_ids, length = net(alone.mels, alone.n)
    count = int(length[0])
    assert int(n[0]) == count
    torch.testing.assert_close(out[:1, :count], expected[:, :count], atol=1e-5, rtol=1e-4)
    assert torch.equal(ids[0, :count], expected_ids[0, :count])


def test_the_quantiser_passes_gradients():
    task = s3.task({"model": S3, "data": {}, "loss": {"upper_layers": 1, "target": "mel"}})
    net = task.networks()["recogniser"]
    batch = task.collate([(torch.randn(20, 60).half(), torch.tensor([1]))])
    task.losses("recogniser", {"recogniser": net}, batch, 0, torch.Generator())["loss"].backward()
    assert net.codec.encoder.conv1.weight.grad.abs().sum() > 0


def test_the_true_velocity_has_no_loss(chain, folder):
    """With the network replaced by x - (1 - σ) z, the flow's loss is zero."""
    out, _ = chain
    speakers, mel = flow.load_flow(out / "flow" / "final.safetensors")
    training = {"tokenizer": str(out / "s3" / "final.safetensors"), "mel": MEL, "speaker": SPEAKER}
    data = {"root": str(folder), "sets": ["."]}
    task = flow.task({"model": FLOW, "data": data, "training": training})
    assert mel == task.mel
    batch = task.collate([task.dataset()[0]])
    z, time = torch.randn(batch.mels.shape), torch.tensor([0.3])
    speakers.flow.velocity = lambda *args, **kwargs: batch.mels - (1 - flow.SIGMA) * z
    kept, prompt = torch.ones(1, dtype=torch.bool), torch.zeros_like(z)
    assert float(task._error(speakers, batch, time, z, prompt, kept, 0)) == 0


@pytest.mark.parametrize("hertz", [80.0, 133.0, 310.0])
def test_pitch_of_tones(hertz):
    found = pitch(voice(0.6, hertz), RATE, 320)[0, 3:-3]
    assert (found > 0).float().mean() > 0.9
    assert float((found[found > 0] - hertz).abs().median()) < 0.02 * hertz


def test_noise_and_silence_have_no_pitch():
    noise = 0.1 * torch.randn(1, 9600, generator=torch.Generator().manual_seed(0))
    assert (pitch(noise, RATE, 320) > 0).float().mean() < 0.2
    assert not pitch(torch.zeros(1, 9600), RATE, 320).any()


def test_relative_loss_punishes_stragglers_up_to_a_limit():
    real, fake = torch.zeros(1, 1, 9), torch.zeros(1, 1, 9)
    assert float(hift.relative_loss([[real]], [[fake]])) == 0
    real[..., 0] = -0.1
    assert float(hift.relative_loss([[real]], [[fake]])) == pytest.approx(0.01)
    real[..., 0] = -9
    assert float(hift.relative_loss([[real]], [[fake]])) == pytest.approx(0.04)


def test_shipped_configs_make_tasks():
    from anytok.codecs.train import CONFIGS

    for name in ("s3", "flow", "hift"):
        task = make(TASKS, read(CONFIGS / f"{name}_mini.json"))
        assert task.networks()


def test_bad_configs_are_named(chain, tmp_path):
    out, product = chain
    with pytest.raises(ConfigError, match="did you mean 'layers'"):
        s3.task({"model": {**S3, "layer": 2}, "data": {}})
    with pytest.raises(ValueError, match="only FSQ"):
        s3.task({"model": {**S3, "version": "v1", "codes": 64}, "data": {}}).networks()
    with pytest.raises(ValueError, match="hop 480"):
        hift.task({"model": HIFT, "training": {}, "data": {}})
    with pytest.raises(WeightsError, match="not a flow"):
        flow.load_flow(product)
    wrong = {"tokenizer": str(out / "s3" / "final.safetensors"), "mel": MEL, "speaker": SPEAKER}
    with pytest.raises(WeightsError, match="expected an S3 tokenizer of 9 tokens"):
        flow.task({"model": {**FLOW, "vocab": 9}, "training": wrong, "data": {}})._codec()
