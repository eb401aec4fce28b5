"""Train a codec: `accelerate launch -m anytok.codecs.train CONFIG [--out DIR] [--data DIR] [--minutes M]`.

CONFIG is a JSON file, or the name of one in codecs/training (`onedpiece_mini`). A run that lies in the folder goes on.
"""

from __future__ import annotations

from pathlib import Path

from .training.entry import cli

# name -> module and function; the function makes a Task of a config
TASKS: dict[str, str] = {
    name: f"{__package__}.training.{name}:task" for name in ("onedpiece", "rvq", "cvivit", "octgpt")
}
CONFIGS = Path(__file__).parent / "training"

if __name__ == "__main__":
    cli(TASKS, CONFIGS)
