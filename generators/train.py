"""Train a generator: `accelerate launch -m anytok.generators.train CONFIG [--out DIR] [--data DIR] [--minutes M]`.

CONFIG is a JSON file, or the name of one in generators/configs (`phenaki_mini`). A run that lies in the folder goes on.
"""

from __future__ import annotations

from pathlib import Path

from ..codecs.training import entry

# name -> module and function; the function makes a Task of a config
TASKS: dict[str, str] = {
    "maskgit": f"{__package__}.masked_task:MaskGITTask",
    "phenaki": f"{__package__}.masked_task:PhenakiTask",
    "octree": f"{__package__}.octree_task:task",
    "codes": f"{__package__}.rvq_task:task",
    "drafter": f"{__package__}.drafter_task:DrafterTask",
    "cosyvoice_lm": f"{__package__}.cosyvoice_lm_task:task",
}
CONFIGS = Path(__file__).parent / "configs"


def train(
    config: str,
    *,
    out: str | None = None,
    data: str | None = None,
    minutes: float | None = None,
    steps: int | None = None,
) -> Path:
    """Train a generator; returns the saved generator's path. See `entry.train`.

    Args:
        config: a JSON file, or the name of a config that ships, such as `phenaki_mini`.
        out: the run's folder.
        data: the folder in which the data sets or corpora lie.
        minutes: training time, instead of the config's budget.
        steps: updates, instead of the config's budget.
    """
    changes = {"out": out, "minutes": minutes, "steps": steps}
    return entry.train(TASKS, CONFIGS, config, changes, data=data)


if __name__ == "__main__":
    entry.cli(TASKS, CONFIGS)
