"""Train a backbone: `accelerate launch -m anytok.backbone.train CONFIG [--out DIR] [--data DIR] [--minutes M]`.

CONFIG is a JSON file, or the name of one in backbone/configs (`mini`). A run that lies in the folder goes on.
The product is the model directory `OUT/model`, which `AnyToAny.load` reads.
"""

from __future__ import annotations

from pathlib import Path

from ..codecs.training import entry

# name -> module and function; the function makes a Task of a config
TASKS: dict[str, str] = {
    "pairs": f"{__package__}.tasks:PairsTask",
    "documents": f"{__package__}.documents:DocumentsTask",
    "xar": f"{__package__}.xar_task:XARTask",
    "vision": f"{__package__}.vision_training:VisionTask",
    "dyvte": f"{__package__}.pruning.dyvte_training:DyVTETask",
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
    """Train a backbone; returns the model directory, or the file of what is no backbone. See `entry.train`.

    Args:
        config: a JSON file, or the name of a config that ships, such as `mini`.
        out: the run's folder.
        data: the folder in which the corpora lie.
        minutes: training time, instead of the config's budget.
        steps: updates, instead of the config's budget.
    """
    changes = {"out": out, "minutes": minutes, "steps": steps}
    final = entry.train(TASKS, CONFIGS, config, changes, data=data)
    model = final.with_name(
        "model"
    )  # vision encoders, gates and xAR write `final.safetensors` instead
    return final if final.is_file() else model


if __name__ == "__main__":
    entry.cli(TASKS, CONFIGS)
