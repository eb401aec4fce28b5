import itertools
import json
import math
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from anytok.codecs.training import checkpoint
from anytok.codecs.training.checkpoint import CheckpointError
from anytok.codecs.training.engine import RunConfig, StopRun, TrainingError, run
from anytok.codecs.training.journal import read_log

TOY = Path(__file__).with_name("toy.py")
Points, Toy = map(runpy.run_path(str(TOY)).get, ("Points", "Toy"))


def config(out, **changes):
    values = {"steps": 20, "batch_size": 4, "warmup": 5, "log_every": 1, "tensorboard": False}
    return RunConfig(out=str(out), **(values | changes))


def curve(out):
    """What was logged, without the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("minutes", "it_per_s")} for row in rows]


def weights(out):
    return torch.load(out / "final.safetensors")


def assert_same(a, b):
    assert curve(a) == curve(b)
    for key, value in weights(a).items():
        assert torch.equal(value, weights(b)[key]), key


def test_learns_and_leaves_its_product(tmp_path):
    path = run(Toy(), config(tmp_path, steps=150, ema=0.9, log_every=50, tensorboard=True))
    assert path == tmp_path / "final.safetensors"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["step"] == 150
    assert result["eval"]["error"] < 0.2 < read_log(tmp_path)[0]["error"]
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # keep
    assert len(read_log(tmp_path, "eval")) == 10  # one a tenth of the budget


def test_complete_run_is_not_run_again(tmp_path):
    run(Toy(), config(tmp_path))
    before = curve(tmp_path)
    run(Toy(fail_at=0), config(tmp_path))
    assert curve(tmp_path) == before


@pytest.mark.parametrize("fail_at", [0, 9, 14, 19])
def test_resume_goes_on_bit_for_bit(tmp_path, fail_at):
    # log_every divides neither save_every nor the failing steps: half-filled means must be resumed too.
    settings = {"save_every": 5, "log_every": 3, "accumulate": 2}
    run(Toy(adversary=True), config(tmp_path / "whole", **settings))
    with pytest.raises(InterruptedError):
        run(Toy(adversary=True, fail_at=fail_at), config(tmp_path / "broken", **settings))
    assert not (tmp_path / "broken" / "final.safetensors").exists()
    run(Toy(adversary=True), config(tmp_path / "broken", **settings))
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_workers_give_the_same_batches(tmp_path):
    run(Toy(), config(tmp_path / "0", steps=6))
    run(Toy(), config(tmp_path / "2", steps=6, workers=2))
    assert_same(tmp_path / "0", tmp_path / "2")


def test_another_seed_is_another_run(tmp_path):
    run(Toy(), config(tmp_path / "0", steps=2))
    run(Toy(), config(tmp_path / "1", steps=2, seed=1))
    assert curve(tmp_path / "0") != curve(tmp_path / "1")


def test_run_leaves_the_callers_randomness_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(Toy(), config(tmp_path, steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_accumulation_equals_a_larger_batch(tmp_path):
    run(Toy(chance=False), config(tmp_path / "one", batch_size=8))
    run(Toy(chance=False), config(tmp_path / "two", batch_size=4, accumulate=2))
    for key, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(value, weights(tmp_path / "two")[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "place"),
    [({"seed": 3}, "run.seed = 0"), ({"steps": 30}, "run.steps = 20"), ({"ema": 0.5}, "run.ema")],
)
def test_refuses_to_go_on_under_another_config(tmp_path, changes, place):
    with pytest.raises(InterruptedError):
        run(Toy(fail_at=9), config(tmp_path))
    with pytest.raises(CheckpointError, match=place):
        run(Toy(), config(tmp_path, **changes))


def test_refuses_to_go_on_with_another_task(tmp_path):
    with pytest.raises(InterruptedError):
        run(Toy(fail_at=9), config(tmp_path))
    with pytest.raises(CheckpointError, match=r"task\.model\.adversary = false, .* has true"):
        run(Toy(adversary=True), config(tmp_path))


def test_what_does_not_matter_may_change(tmp_path):
    with pytest.raises(InterruptedError):
        run(Toy(fail_at=9), config(tmp_path))
    run(Toy(), config(tmp_path, keep=1, save_every=2, eval_every=0))
    assert (tmp_path / "final.safetensors").exists()


def test_adversary_begins_late_and_main_learns_through_it(tmp_path):
    run(Toy(adversary=True), config(tmp_path, steps=8))
    rows = read_log(tmp_path)
    assert ["adversary/loss" in row for row in rows] == [False] * 4 + [True] * 4
    assert rows[6]["main/loss"] != rows[6]["main/error"]


def test_only_the_updated_network_has_gradients(tmp_path):
    seen = {}

    class Watching(Toy):
        def losses(self, name, networks, batch, step, rng):
            for other, network in networks.items():
                flags = {p.requires_grad for p in network.parameters()}
                seen.setdefault((name, other), set()).update(flags)
            return super().losses(name, networks, batch, step, rng)

    run(Watching(adversary=True), config(tmp_path, steps=6))
    assert seen["main", "main"] == seen["adversary", "adversary"] == {True}
    assert seen["main", "adversary"] == seen["adversary", "main"] == {False}


def test_evaluation_sees_averaged_weights_and_training_does_not(tmp_path):
    kept = {}

    class Watching(Toy):
        def losses(self, name, networks, batch, step, rng):
            kept["train"] = networks["main"][0].weight.detach().clone()
            assert networks["main"].training
            return super().losses(name, networks, batch, step, rng)

        def evaluate(self, networks, step):
            kept[step] = networks["main"][0].weight.detach().clone()
            assert not networks["main"].training
            return {}

    run(Watching(), config(tmp_path, steps=4, eval_every=1))
    assert not torch.equal(kept[3], kept["train"])  # both after three updates
    assert torch.equal(weights(tmp_path)["0.weight"], kept[4])


def test_initialise_is_called_once_in_a_runs_life(tmp_path):
    calls = []

    class Started(Toy):
        def initialise(self, networks, dataset):
            calls.append(len(dataset))
            networks["main"][3].bias.data.fill_(7.0)

    with pytest.raises(InterruptedError):
        run(Started(fail_at=9), config(tmp_path, save_every=4))
    run(Started(), config(tmp_path, save_every=4))
    assert calls == [23]
    assert read_log(tmp_path)[0]["error"] > 30


def test_nan_ends_the_run_and_keeps_the_batch(tmp_path):
    with pytest.raises(TrainingError, match=r"'main' at step 12: loss = nan.*step-000000010"):
        run(Toy(poison=12), config(tmp_path, save_every=5))
    (batch,) = torch.load(tmp_path / "failed-main-step-12-process-0.pt")
    assert batch["x"].shape == (4, 4)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-000000010"
    assert read_log(tmp_path)[-1]["step"] == 12


def test_gradient_that_is_not_finite_ends_the_run(tmp_path):
    class Steep(Toy):
        def losses(self, name, networks, batch, step, rng):
            losses = super().losses(name, networks, batch, step, rng)
            zero = networks["main"][0].weight.sum() * 0
            return losses | {"loss": losses["loss"] + zero.sqrt()}  # finite, its slope is not

    with pytest.raises(TrainingError, match="step 0: grad_norm = nan"):
        run(Steep(), config(tmp_path))


def test_missing_loss_is_named(tmp_path):
    class Lossless(Toy):
        def losses(self, name, networks, batch, step, rng):
            return {"error": batch["x"].sum()}

    with pytest.raises(TrainingError, match=r"losses\('main'\) gave error, expected .* 'loss'"):
        run(Lossless(), config(tmp_path))


def test_empty_data_set(tmp_path):
    class Empty(Toy):
        def dataset(self):
            return []

    with pytest.raises(TrainingError, match="empty"):
        run(Empty(), config(tmp_path))


def test_task_can_give_up(tmp_path):
    class Hopeless(Toy):
        def evaluate(self, networks, step):
            raise StopRun("4 tokens equal all")

    with pytest.raises(StopRun, match="4 tokens equal all"):
        run(Hopeless(), config(tmp_path, eval_every=6))
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-000000006"


def test_stop_exports_the_last_checkpoint(tmp_path):
    with pytest.raises(InterruptedError):
        run(Toy(fail_at=9), config(tmp_path, save_every=4))
    run(Toy(), config(tmp_path, save_every=4), stop=True)
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 8
    assert (tmp_path / "final.safetensors").exists()


def test_half_written_checkpoint_is_never_loaded(tmp_path):
    run(Toy(), config(tmp_path / "whole", save_every=5))
    with pytest.raises(InterruptedError):
        run(Toy(fail_at=12), config(tmp_path / "half", save_every=5))
    stale = checkpoint.begin(tmp_path / "half" / "checkpoints", 15)
    (stale / "state.json").write_text('{"step": 15')
    run(Toy(), config(tmp_path / "half", save_every=5))
    assert not stale.exists()
    assert_same(tmp_path / "whole", tmp_path / "half")


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    class Filling(Toy):
        """From step 7 on no file may grow beyond 100 bytes: every write fails half-way, as on a full disk."""

        def losses(self, name, networks, batch, step, rng):
            if step == 7:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            return super().losses(name, networks, batch, step, rng)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = {"save_every": 5, "log_every": 100, "eval_every": 0}
    try:
        with pytest.raises(CheckpointError, match=r"step 10 cannot be written.*step-000000005 is"):
            run(Filling(), config(tmp_path / "full", **settings))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    names = [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()]
    assert names == ["step-000000005"]
    run(Toy(), config(tmp_path / "full", **settings))
    run(Toy(), config(tmp_path / "whole", **settings))
    assert_same(tmp_path / "whole", tmp_path / "full")


def test_cosine_ends_when_the_time_does(tmp_path):
    settings = {"steps": None, "minutes": 2.5 / 60, "warmup": 0}
    began = time.monotonic()
    run(Toy(pause=0.01), config(tmp_path, **settings))
    assert 2.4 < time.monotonic() - began < 10
    rows = read_log(tmp_path)
    assert rows[0]["lr"] == pytest.approx(1e-2, rel=0.05)
    assert rows[-1]["lr"] < 1e-4
    for before, row in itertools.pairwise(rows):  # a step's rate is that of the time at its start
        share = before["minutes"] / settings["minutes"]
        assert row["lr"] == pytest.approx(5e-3 * (1 + math.cos(math.pi * share)), abs=1e-6)
    assert 2 <= len(read_log(tmp_path, "eval")) <= 10


def test_schedules(tmp_path):
    run(Toy(), config(tmp_path / "constant", schedule="constant", warmup=4))
    rates = [row["lr"] for row in read_log(tmp_path / "constant")]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 17)
    run(Toy(), config(tmp_path / "cosine", warmup=1, final_lr=0.1))
    rates = [row["lr"] for row in read_log(tmp_path / "cosine")]
    assert rates[0] == 0.01
    assert rates[10] == pytest.approx(0.0055)
    assert 0.001 < rates[-1] < 0.0011


def test_bf16_runs_under_autocast_with_float32_weights(tmp_path):
    seen = set()

    class Watching(Toy):
        def losses(self, name, networks, batch, step, rng):
            seen.add((networks["main"](batch["x"]).dtype, networks["main"][0].weight.dtype))
            return super().losses(name, networks, batch, step, rng)

    run(Watching(), config(tmp_path, precision="bf16", steps=3))
    assert seen == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "neither steps nor minutes"),
        ({"batch_size": 0}, "run.batch_size is 0, expected more than 0"),
        ({"precision": "fp8"}, "run.precision is 'fp8', expected one of no, bf16, fp16"),
        ({"ema": 1.0}, "run.ema is 1.0"),
    ],
)
def test_impossible_configs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


# --- real processes


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def test_kill_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path):
    settings = {"steps": 60, "save_every": 4}
    out = tmp_path / "killed"
    wish = config(out, **settings)
    command = [sys.executable, str(TOY), json.dumps(vars(wish)), json.dumps({"pause": 0.05})]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while checkpoint.latest(out / "checkpoints") is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    reached = curve(out)[-1]["step"]
    saved = int(checkpoint.latest(out / "checkpoints").name.removeprefix("step-"))
    # A step more: the kill can fall between a step's line and its checkpoint.
    assert reached - 4 <= saved < 60
    run(Toy(), wish)
    run(Toy(), config(tmp_path / "whole", **settings))
    assert_same(tmp_path / "whole", out)


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    wish = config(tmp_path / "two", steps=12, save_every=5, accumulate=2, batch_size=2)
    task = json.dumps({"adversary": True, "chance": False})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(TOY), json.dumps(vars(wish)), task]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2
    run(Toy(adversary=True, chance=False), config(tmp_path / "one", steps=12, batch_size=8))
    for key, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(value, weights(tmp_path / "two")[key], rtol=0, atol=1e-5)
    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert one["main/error"] == pytest.approx(two["main/error"], abs=1e-5)
    with pytest.raises(CheckpointError, match="processes = 2"):
        run(Toy(adversary=True, chance=False), wish)


def test_launch_that_starts_one_process_alone_is_refused(tmp_path, monkeypatch):
    # What `accelerate launch --cpu --num_processes 2` leaves in the environment.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(TrainingError, match="--multi_gpu --num_processes"):
        run(Toy(), config(tmp_path))


def test_points_differ_between_draws_but_not_between_looks():
    points = Points()
    first, second = (points.draw(3, torch.Generator().manual_seed(s))["y"] for s in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(points[3]["y"], points[3]["y"])
