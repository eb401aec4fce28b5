"""onedpiece/mini trains from a folder of pictures: basis, tail drop, evaluation, export."""

import json

import pytest
import torch
from safetensors.torch import save_file

from anytok.codecs import load_codec
from anytok.codecs.image.onedpiece import OneDPiece
from anytok.codecs.image.vqgan import MaskGitVQGAN, VQGANConfig
from anytok.codecs.training.engine import RunConfig, StopRun, run
from anytok.codecs.training.onedpiece import OneDPieceMiniTask, augment, task
from anytok.codecs.training.onedpiece_stage1 import StageOneTask
from anytok.modalities import Image

MODEL = dict(
    image_size=16, coefficients=96, components=16, head_tokens=4,
    block=8, block_width=12, stages=2, codes=16, widths=(8, 8, 32),
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two sets: drawn pictures with alpha and a few photographs, both with held-out rows."""
    root = tmp_path_factory.mktemp("pictures")
    rng = torch.Generator().manual_seed(0)
    for name, count, alpha in (("drawn", 24, True), ("photos", 3, False)):
        (root / name).mkdir()
        rows = []
        for i in range(count):
            small = torch.rand(3, 6, 6, generator=rng)
            picture = Image(small).resize(80, 96).pixels
            mask = torch.zeros(1, 80, 96)
            mask[:, 10:70, 10:80] = 1
            Image(picture, mask if alpha else None).save(root / name / f"{i}.png")
            split = "held" if i % 3 == 0 else "train"
            rows.append({"image": f"{i}.png", "split": split, "text": str(i)})
        (root / name / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def make(root, **training) -> OneDPieceMiniTask:
    data = {"root": str(root), "sets": ["drawn"], "photos": ["photos"], "basis": 256, "unseen": 0}
    return OneDPieceMiniTask({"model": MODEL, "data": data, "training": training})


def test_a_run_ends_in_a_codec_that_loads(root, tmp_path):
    config = RunConfig(
        out=str(tmp_path / "run"), steps=3, batch_size=4, eval_every=0, tensorboard=False
    )
    codec = load_codec(run(make(root), config))
    picture = Image.load(root / "drawn" / "0.png")
    (stream,) = codec.encode([picture])
    assert len(stream) == codec.config.tokens == 12
    (back,) = codec.decode([stream[:5]])
    assert back.pixels.shape == (3, 80, 96)
    # another run may start from it
    second = make(root, start=str(tmp_path / "run" / "final.safetensors"))
    networks = second.networks()
    second.initialise(networks, second.dataset())
    assert torch.equal(networks["codec"].encode([picture])[0].codes, stream.codes)
    some = stream.codes[None, :5, 0]
    torch.testing.assert_close(networks["codec"].detokenize(some), codec.detokenize(some))


def test_one_k_a_pass_and_a_quarter_of_all():
    task = OneDPieceMiniTask({"model": MODEL})
    rng = torch.Generator().manual_seed(0)
    lengths = torch.tensor([task.draw_length(rng) for _ in range(2000)])
    assert lengths.min() == 1
    assert lengths.max() == 12
    assert 0.22 < (lengths == 12).float().mean() < 0.28
    assert set(lengths.tolist()) == set(range(1, 13))


def test_augmentation_keeps_photographs_opaque_and_draws_from_its_rng():
    batch = torch.randint(0, 256, (6, 4, 32, 32), dtype=torch.uint8)
    batch[:3, 3] = 255
    batch[3:, 3] = 0
    a, b, c = (augment(batch, 16, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (6, 3, 16, 16)
    clear = a[3:].flatten(2)
    assert (clear.amax(2) - clear.amin(2)).max() < 1e-5  # nothing but its flat background


def test_a_codec_that_ignores_its_tokens_stops_the_run(root):
    task = make(root)
    networks = task.networks()  # tables of zeros: every prefix decodes to the same picture
    with pytest.raises(StopRun, match="4 tokens"):
        task.evaluate(networks, 0)


@pytest.fixture(scope="module")
def stage_one(root, tmp_path_factory):
    """A config of the published kind, in small, with a random teacher."""
    torch.manual_seed(0)
    teacher = MaskGitVQGAN(VQGANConfig(channels=32, code_width=16, codes=32, blocks=1))
    file = tmp_path_factory.mktemp("teacher") / "vqgan.safetensors"
    save_file(teacher.state_dict(), file)
    return {
        "model": {
            "image_size": 32,
            "tokens": 8,
            "codes": 16,
            "encoder": [64, 1],
            "decoder": [64, 1],
        },
        "data": {"root": str(root), "sets": ["photos"]},
        "training": {"stage": 1, "teacher": str(file)},
    }


def test_stage_one_runs_and_exports_the_published_keys(stage_one, tmp_path):
    config = RunConfig(
        out=str(tmp_path / "run"), steps=2, batch_size=2, eval_every=0, tensorboard=False
    )
    made = task(stage_one)
    assert isinstance(made, StageOneTask)
    codec = load_codec(run(made, config))
    assert isinstance(codec, OneDPiece)
    again = OneDPiece.from_published(codec.state_dict())  # by shapes, so under the published keys
    assert VQGANConfig(**again.config.pixels) == VQGANConfig(**codec.config.pixels)
    assert torch.equal(codec.pixel_quantize.table, made.teacher.quantize.table)


def test_stage_one_trains_all_but_the_pixels_and_drops_tails(stage_one):
    made = task(stage_one)
    networks = made.networks()
    codec, rng = networks["codec"], torch.Generator().manual_seed(0)
    lengths = []
    codec.decoder.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    batch = made.augment(torch.stack([made.dataset()[i] for i in (0, 1)]), rng)
    for step in range(30):
        losses = made.losses("codec", networks, batch, step, rng)
    assert set(lengths) == set(range(1, 9))
    assert losses["loss"].item() == pytest.approx((losses["proxy"] + losses["vq"]).item())
    losses["loss"].backward()
    without = {n for n, p in codec.named_parameters() if p.grad is None}
    assert without == {n for n, _ in codec.named_parameters() if n.startswith("pixel_")}
    decayed, plain = made.optimizer(
        "codec", [p for p in codec.parameters() if p.requires_grad]
    ).param_groups
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert any(p is codec.latent_tokens for p in plain["params"])
    assert any(p is codec.quantize.embedding.weight for p in plain["params"])
