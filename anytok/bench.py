"""`anytok bench`: measure a model of yours on your machine. `decode`: plain and speculative decoding in one run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from .bench_prune import prune

if TYPE_CHECKING:
    from .generators.pipeline import AnyToAny
    from .generators.speculative import Speculation

app = typer.Typer(
    no_args_is_help=True, help="Measure speed, and what it costs, on your machine in one run."
)
out = Console()
MODES = "plain, lossless, certified:DELTA, lantern:DELTA, lantern++:FACTOR"


app.command("prune")(prune)


@app.callback()
def bench() -> None:
    """Measure speed, and what it costs, on your machine in one run."""


@app.command()
def decode(
    model: Annotated[str, typer.Argument(help="Model directory, or the name of one that ships.")],
    prompt: Annotated[list[str], typer.Argument(help="Texts to write from.")],
    drafter: Annotated[Path, typer.Option(help="The drafter's file.")],
    to: Annotated[str, typer.Option(help="Modality to write.")] = "image",
    mode: Annotated[Optional[list[str]], typer.Option(help=f"Any of {MODES}; may repeat.")] = None,  # noqa: UP045
    tree: Annotated[
        str, typer.Option(help="dynamic:DEPTH,WIDTH,NODES or the name of a static tree.")
    ] = "dynamic:4,4,12",
    k: Annotated[int, typer.Option(min=1, help="Neighbours of a code.")] = 32,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each prompt, as one batch.")] = 1,
    temperature: Annotated[float, typer.Option(min=0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    cfg: Annotated[float, typer.Option(help="Guidance; 1 for none.")] = 1.0,
    save: Annotated[Optional[Path], typer.Option(help="Folder for what was written.")] = None,  # noqa: UP045
    as_json: Annotated[
        bool, typer.Option("--json", help="Print machine-readable results.")
    ] = False,
) -> None:
    """Speed, step compression, acceptance by depth and exact distance of plain and speculative decoding."""
    from .generators.drafter import load_drafter
    from .generators.pipeline import AnyToAny
    from .generators.sampling import Sampling

    loaded = AnyToAny.load(model)
    own = load_drafter(drafter, loaded.model.transformer)
    options = Sampling(temperature=temperature, top_k=top_k, cfg=cfg)
    rows = []
    for name in ["plain", *(mode or ["lossless", "certified:0.2", "lantern:0.2"])]:
        loaded.speculate(None if name == "plain" else own, speculation(name, tree, k))
        row, answers = measured(loaded, prompt, to, samples, options)
        if name != "plain" and not name.startswith("lossless"):
            # What the audit costs is not part of the speed.
            loaded.speculate(own, speculation(name, tree, k), audit=True)
            row |= distances(measured(loaded, prompt, to, samples, options)[0])
        row.pop("distances", None)
        row["mode"] = name
        row["speed-up"] = row["ids/s"] / rows[0]["ids/s"] if rows else 1.0
        rows.append(row)
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            for answer in answers:
                stem = f"{name.replace(':', '-')}_{answer.prompt}_{answer.sample}"
                answer.items[0].save(save / f"{stem}{SUFFIX.get(to, '')}")
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        from .report import Row, table

        out.print(table([Row(row.pop("mode"), values=shown(row)) for row in rows], "decoding"))


SUFFIX = {"image": ".png", "audio": ".wav", "video": ".mp4", "shape": ".obj", "text": ".txt"}
COLUMNS = ("ids/s", "speed-up", "compression", "acceptance", "TV mean", "TV max", "seconds")


def speculation(name: str, tree: str, k: int) -> Speculation | None:
    """What `mode` and `tree` on the command line mean; None for plain decoding.

    Raises:
        typer.BadParameter: neither is known.
    """
    from .generators.speculative import Speculation
    from .generators.trees import Dynamic, Static

    kind, _, number = name.partition(":")
    if kind == "plain":
        return None
    try:
        if tree.startswith("dynamic:"):
            depth, width, nodes = map(int, tree.removeprefix("dynamic:").split(","))
            shape: Dynamic | Static = Dynamic(depth=depth, width=width, nodes=nodes)
        else:
            shape = Static(shape=tree)
        given = {"factor" if kind == "lantern++" else "delta": float(number)} if number else {}
        return Speculation(mode=kind, tree=shape, k=k, **given)  # type: ignore[arg-type]
    except ValueError as error:
        raise typer.BadParameter(f"{name!r} with tree {tree!r}: {error}") from error


def measured(
    model: AnyToAny, prompts: list[str], to: str, samples: int, options: Any
) -> tuple[dict[str, Any], list[Any]]:
    """Figures of one run (after a short one that warms up), and what it wrote.

    On a CPU time is that of the process, so that other work on the machine counts little.
    """
    model(prompts[:1], to=to, options=options)
    cpu = model.model.transformer.lm_head.weight.device.type == "cpu"
    clock = time.process_time if cpu else time.perf_counter
    ids, answers, began = 0, [], clock()
    spent = 0.0
    for event in model.stream(prompts, to, samples=samples, options=options, every=None):
        if event.answer is None:
            spent = clock() - began
        else:
            answers.append(event.answer)
            ids += event.written
    row: dict[str, Any] = {"ids/s": ids / spent, "compression": 1.0}
    statistics = getattr(model.decoder, "statistics", None)
    if statistics is not None:
        tested = zip(statistics.stood, statistics.tested)
        row |= {
            "compression": statistics.compression,
            "acceptance": [stood / max(count, 1) for stood, count in tested],
            "seconds": statistics.seconds,
            "distances": statistics.distances,
        }
    return row, answers


def distances(row: dict[str, Any]) -> dict[str, float]:
    """Mean and largest total variation of what an audit enumerated."""
    found = row.get("distances") or [float("nan")]
    return {"TV mean": sum(found) / len(found), "TV max": max(found)}


def shown(row: dict[str, Any]) -> dict[str, float | str | None]:
    """Figures as the cells of a report."""
    cells: dict[str, float | str | None] = {}
    for title in COLUMNS:
        value = row.get(title)
        if isinstance(value, dict):
            value = " ".join(f"{key} {part:.2f}" for key, part in value.items())
        elif isinstance(value, list):
            value = " ".join(f"{part:.2f}" for part in value)
        cells[title] = value
    return cells
