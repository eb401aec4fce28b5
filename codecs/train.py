"""Train a codec: `accelerate launch -m anytok.codecs.train CONFIG [--out DIR] [--data DIR] [--minutes M]`.

CONFIG is a JSON file, or the name of one in codecs/training (`onedpiece_mini`). A run that lies in the folder goes on.
"""

from __future__ import annotations

from pathlib import Path

from .training import entry

# name -> module and function; the function makes a Task of a config
TASKS: dict[str, str] = {
    name: f"{__package__}.training.{name}:task"
    for name in ("onedpiece", "dac", "rvq_mini", "s3", "flow", "hift", "cvivit", "octgpt")
}
CONFIGS = Path(__file__).parent / "training"


def train(
    config: str,
    *,
    out: str | None = None,
    data: str | None = None,
    minutes: float | None = None,
    steps: int | None = None,
) -> Path:
    """Train a codec; returns the saved codec's path, which `load_codec` reads. See `entry.train`.

    Args:
        config: a JSON file, or the name of a config that ships, such as `onedpiece_mini`.
        out: the run's folder.
        data: the folder of the config's data sets, or one folder of media files.
        minutes: training time, instead of the config's budget.
        steps: updates, instead of the config's budget.
    """
    changes = {"out": out, "minutes": minutes, "steps": steps}
    return entry.train(TASKS, CONFIGS, config, changes, data=data)


if __name__ == "__main__":
    entry.cli(TASKS, CONFIGS)
