"""A task of a few numbers, and a command that runs it: tests of the engine train it."""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn

from anytok.codecs.training.engine import RunConfig, Task, adamw, run
from anytok.codecs.training.loader import RandomDataset


class Points(RandomDataset):
    """x in R^4, y = a fixed linear map of x plus noise that each draw makes anew."""

    def __len__(self):
        return 23

    def draw(self, index, rng):
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "y": x[:2] - x[2:] + 0.01 * torch.randn(2, generator=rng)}


class Toy(Task):
    def __init__(self, *, poison=None, adversary=False, pause=0.0):
        self.poison, self.adversary, self.pause = poison, adversary, pause
        self.config = {"task": "toy", "adversary": adversary}

    def networks(self):
        main = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 2))
        return {"main": main} | ({"adversary": nn.Linear(2, 1)} if self.adversary else {})

    def dataset(self):
        return Points()

    def optimizer(self, name, parameters):
        return adamw(parameters, lr=1e-2)

    def augment(self, batch, rng):
        noise = torch.randn(batch["x"].shape, generator=rng, device=rng.device)
        return batch | {"x": batch["x"] + 0.01 * noise}

    def losses(self, name, networks, batch, step, rng):
        time.sleep(self.pause)
        out = networks["main"](batch["x"])
        if name == "adversary":
            real, fake = networks[name](batch["y"]), networks[name](out.detach())
            return {"loss": (1 - real).relu().mean() + (1 + fake).relu().mean()}
        error = (out.float() - batch["y"]).square().mean()
        bad = float("nan") if step == self.poison else 0.0
        hinge = -networks["adversary"](out).mean() * 0.1 if self.adversary and step >= 4 else 0.0
        return {"loss": error + hinge + bad, "error": error}

    def active(self, name, step):
        return name == "main" or step >= 4

    @torch.no_grad()
    def evaluate(self, networks, step):
        points = [Points()[i] for i in range(23)]
        x, y = (torch.stack([p[k] for p in points]) for k in "xy")
        device = next(networks["main"].parameters()).device
        return {"error": float((networks["main"](x.to(device)) - y.to(device)).square().mean())}

    def export(self, networks, path):
        torch.save(networks["main"].state_dict(), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=json.loads)
    parser.add_argument("task", type=json.loads, nargs="?", default={})
    arguments = parser.parse_args()
    print(run(Toy(**arguments.task), RunConfig(**arguments.run)), Path.cwd())
