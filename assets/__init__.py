"""Assets: mini weights, sample media, data recipes."""

from importlib import resources
from pathlib import Path


def sample(name: str) -> Path:
    """The path of a sample that ships, such as `photo-sunset.jpg`.

    Raises:
        FileNotFoundError: there is no such sample; the message lists those that there are.
    """
    folder = Path(str(resources.files(__name__))) / "samples"
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"no sample {name!r}; there are {', '.join(sorted(p.name for p in folder.iterdir()))}"
        )
    return folder / name
