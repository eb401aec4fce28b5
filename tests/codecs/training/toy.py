"""A task of a few numbers, and a command that runs it: the tests of the engine train it."""

import argparse
import json
import time

import torch
from torch import nn

from anytok.codecs.training.engine import RunConfig, Task, adamw, run
from anytok.codecs.training.loader import RandomDataset


class Points(RandomDataset):
    """x in R^4, y a fixed linear map of x, plus noise that each draw makes anew."""

    def __init__(self, noise=0.01):
        self.noise = noise

    def __len__(self):
        return 23

    def draw(self, index, rng):
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "y": x[:2] - x[2:] + self.noise * torch.randn(2, generator=rng)}


class Toy(Task):
    """A regression, with an adversary that begins at step 4 if one is asked for.

    chance: noise and dropout, so that a test sees every source of randomness. fail_at: a step that raises.
    poison: a step whose loss is NaN. pause: seconds a step takes.
    """

    def __init__(self, *, adversary=False, chance=True, fail_at=None, poison=None, pause=0.0):
        self.chance, self.fail_at, self.poison, self.pause = chance, fail_at, poison, pause
        self.config = {"task": "toy", "model": {"adversary": adversary, "chance": chance}}

    def networks(self):
        drop = nn.Dropout(0.1 if self.chance else 0.0)
        main = nn.Sequential(nn.Linear(4, 8), drop, nn.Tanh(), nn.Linear(8, 2))
        main.spare = nn.Parameter(torch.ones(3))  # logged, never learned
        adversary = {"adversary": nn.Linear(2, 1)} if self.config["model"]["adversary"] else {}
        return {"main": main, **adversary, "frozen": nn.Identity()}

    def dataset(self):
        return Points(noise=0.01 * self.chance)

    def optimizer(self, name, parameters):
        return adamw(parameters, lr=1e-2)

    def active(self, name, step):
        return name == "main" or step >= 4

    def augment(self, batch, rng):
        noise = torch.randn(batch["x"].shape, generator=rng, device=rng.device)
        return batch | {"x": batch["x"] + 0.01 * self.chance * noise}

    def losses(self, name, networks, batch, step, rng):
        time.sleep(self.pause)
        if step == self.fail_at:
            raise InterruptedError("the toy was told to fail")
        out = networks["main"](networks["frozen"](batch["x"]))
        if name == "adversary":
            real, fake = networks[name](batch["y"]), networks[name](out.detach())
            return {"loss": (1 - real).relu().mean() + (1 + fake).relu().mean()}
        error = (out.float() - batch["y"]).square().mean()
        loss = error + (float("nan") if step == self.poison else 0.0)
        if "adversary" in networks and step >= 4:
            loss = loss - 0.1 * networks["adversary"](out).mean()
        return {"loss": loss, "error": error, "draw": torch.rand((), generator=rng)} | {
            "spare": networks["main"].spare.sum()
        }

    def evaluate(self, networks, step):
        points = [Points()[i] for i in range(23)]
        x, y = (torch.stack([p[k] for p in points]) for k in "xy")
        return {"error": float((networks["main"](x) - y).square().mean())}

    def export(self, networks, path):
        torch.save(networks["main"].state_dict(), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=json.loads)
    parser.add_argument("task", type=json.loads)
    arguments = parser.parse_args()
    run(Toy(**arguments.task), RunConfig(**arguments.run))
