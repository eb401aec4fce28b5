"""What a text <-> image model over named emoji can do, beside the floors and the ceiling.

    python benchmarks/mini_backbone.py MODEL_DIRECTORY --data data/emoji [--json]

image -> text: share of exactly right names, on held-out cells (a style x name that training never saw; the name it did)
and on an unseen style (OpenMoji), beside the name of the nearest training picture on 16 x 16 pixels.

text -> image: pictures for 240 concepts in a style A, each looked up among real pictures of the 240 concepts in a style
B (EfficientNet-Lite2 features, standardised per style, cosine). R@1 and R@5, for all and for the cells that training
never saw; beside chance, the training picture of A with the nearest other name (floor), real pictures of A through the
codec at as many tokens, and real pictures of A (ceiling).
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from anytok.codecs import load_codec
from anytok.generators.pipeline import AnyToAny
from anytok.generators.sampling import Sampling
from anytok.judges.image import PictureJudge, ranks, recall, thumbnails
from anytok.modalities.image import Image

CONCEPTS, SEED = 240, 1234
STYLES = (("noto", "twemoji"), ("noto", "fluent"), ("twemoji", "fluent"))


def pictures(folder: Path, rows: list[dict]) -> list[Image]:
    return [Image.load(folder / row["image"]) for row in rows]


def names(model: AnyToAny, folder: Path, rows: list[dict]) -> float:
    """Share of exactly right names."""
    answers = model(pictures(folder, rows), to="text")
    return sum(a.items[0].text == row["name"] for a, row in zip(answers, rows)) / len(rows)


def nearest_names(folder: Path, rows: list[dict], train: list[dict], known: torch.Tensor) -> float:
    """The same, for the name of the nearest training picture on 16 x 16 pixels."""
    nearest = torch.cdist(thumbnails(pictures(folder, rows)), known).argmin(1).tolist()
    return sum(train[n]["name"] == row["name"] for n, row in zip(nearest, rows)) / len(rows)


def concepts(rows: list[dict]) -> list[str]:
    """240 names that all styles have, no flags: the held-out ones first, then drawn at random."""
    styles = {style for pair in STYLES for style in pair}
    cells = {(row["style"], row["name"]) for row in rows if row["category"] != "flags"}
    common = sorted({n for _, n in cells if all((s, n) in cells for s in styles)})
    held = sorted({row["name"] for row in rows if row["split"] == "held"} & set(common))
    rest = [name for name in common if name not in set(held)]
    return (held + random.Random(SEED).sample(rest, CONCEPTS))[:CONCEPTS]


def nearest_other(name: str, style: str, train: list[dict]) -> dict:
    """The training picture of `style` whose name shares most words with `name`, without being it."""
    words = set(name.split())

    def likeness(row: dict) -> float:
        own = set(row["name"].split())
        return len(words & own) / len(words | own)

    return max((r for r in train if r["style"] == style and r["name"] != name), key=likeness)


def retrieval(
    model: AnyToAny, folder: Path, rows: list[dict], options: Sampling | None, units: int | None
) -> dict[str, dict[str, float]]:
    """R@1 and R@5 of each way to make a picture, by pair of styles."""
    judge = PictureJudge()
    names_240 = concepts(rows)
    cell = {(row["style"], row["name"]): row for row in rows}
    train = [row for row in rows if row["split"] == "train"]
    table: dict[str, dict[str, float]] = {}
    given = {} if options is None else {"options": options}
    most = units or model.model.generation.get("image", {}).get("units")
    made: dict[str, dict[str, torch.Tensor]] = {}
    for style in dict.fromkeys(a for a, _ in STYLES):
        real = pictures(folder, [cell[style, n] for n in names_240])
        codec = model.model.codec("image")
        streams = [s[: min(most, len(s))] for s in codec.encode(real)]
        answers = model(
            [f"{style} {n}" for n in names_240],
            to="image",
            units=None if most is None else {"image": most},
            **given,
        )
        floor = pictures(folder, [nearest_other(n, style, train) for n in names_240])
        made[style] = {
            "real pictures (ceiling)": judge.features(real),
            f"real, through the codec ({most} tokens)": judge.features(codec.decode(streams)),
            "generated": judge.features([a.items[0] for a in answers]),
            "nearest other name (floor)": judge.features(floor),
        }
    for style, other in STYLES:
        gallery = judge.features(pictures(folder, [cell[other, n] for n in names_240]))
        held = [i for i, n in enumerate(names_240) if cell[style, n]["split"] == "held"]
        for way, features in made[style].items():
            places = ranks(features, gallery, range(CONCEPTS))
            table.setdefault(way, {}).update(
                {
                    f"{style}->{other} R@1": recall(places, 1),
                    f"{style}->{other} R@5": recall(places, 5),
                    f"{style}->{other} held R@1": recall(places[held], 1),
                    f"{style}->{other} held R@5": recall(places[held], 5),
                }
            )
    return table


def show(console: Console, table: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(table.values())))
    grid = Table("", *columns)
    for way, values in table.items():
        grid.add_row(way, *(f"{values[c]:.3f}" for c in columns))
    console.print(grid)


def main(
    model: Annotated[str, typer.Argument(help="model directory or name")],
    data: Annotated[Path, typer.Option(help="the emoji recipe's folder")] = Path("data/emoji"),
    cfg: Annotated[float | None, typer.Option(help="guidance")] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int, typer.Option()] = 0,
    units: Annotated[int | None, typer.Option(help="image tokens to write")] = None,
    codec: Annotated[Path | None, typer.Option(help="file of the picture codec")] = None,
    unseen: Annotated[int, typer.Option(help="pictures of the unseen style")] = 300,
    only: Annotated[str, typer.Option(help="text, image or both")] = "both",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure a text <-> image model over named emoji."""
    began = time.time()
    codecs = {} if codec is None else {"image": load_codec(codec)}
    machine = AnyToAny.load(model, codecs=codecs)
    rows = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    result: dict[str, object] = {}
    if only in ("text", "both"):
        train = [row for row in rows if row["split"] == "train"]
        known = thumbnails(pictures(data, train))
        names_known = {row["name"] for row in train}
        pool = [r for r in rows if r["split"] == "unseen" and r["name"] in names_known]
        sets = {
            "held-out cells": [row for row in rows if row["split"] == "held"],
            "unseen style": random.Random(SEED).sample(pool, min(unseen, len(pool))),
            "training": random.Random(SEED).sample(train, 150),
        }
        result["exact names"] = {
            which: {
                "model": names(machine, data, some),
                "nearest": nearest_names(data, some, train, known),
            }
            for which, some in sets.items()
        }
    if only in ("image", "both"):
        options = None
        if cfg is not None or temperature is not None:
            options = Sampling(temperature=temperature or 1.0, cfg=cfg or 1.0, top_k=top_k)
        result["retrieval"] = retrieval(machine, data, rows, options, units)
    result["seconds"] = time.time() - began
    if as_json:
        typer.echo(json.dumps(result))
        return
    console = Console()
    for title in ("exact names", "retrieval"):
        if title in result:
            console.print(title)
            show(console, result[title])


if __name__ == "__main__":
    typer.run(main)
