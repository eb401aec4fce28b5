"""Tokenise the named emoji once, for the backbone: `data/corpora/emoji` (see anytok/backbone/corpus.py).

Training items are there several times, each time drawn a little differently, so that the backbone learns what a drawing
shows and not its codes by heart.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from anytok.assets.recipes.dataset import OUT

COPIES = 16


def build(out: Path, *, codec: str = "onedpiece/mini", copies: int = COPIES) -> Path:
    """Tokenise `out/emoji` to `out/corpora/emoji`; goes on where it was interrupted."""
    from anytok.backbone.corpus import changed_picture, tokenize
    from anytok.codecs import load_codec

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("emoji tokens")
        return tokenize(
            out / "emoji",
            out / "corpora" / "emoji",
            {"image": load_codec(codec)},
            copies=copies,
            augment={"image": changed_picture},
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def main(
    out: Annotated[Path, typer.Option(help="folder of all data sets")] = OUT,
    codec: Annotated[str, typer.Option(help="name or file of the picture codec")] = (
        "onedpiece/mini"
    ),
    copies: Annotated[int, typer.Option(min=1, help="of each training item")] = COPIES,
) -> None:
    """Tokenise the emoji for the backbone."""
    build(out, codec=codec, copies=copies)


if __name__ == "__main__":
    typer.run(main)
