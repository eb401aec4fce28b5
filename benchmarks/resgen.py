"""ResGen beside the RQ-Transformer and depth-parallel prediction: equal size, data and steps, one residual codec.

    python benchmarks/resgen.py --codec CODEC.safetensors --data data --sets emoji --steps 20000
    python benchmarks/resgen.py --dry          # no training, random codes: passes and seconds only

One run, at several depths of the codec. Sizes are matched: the head of the other two is widened until each model has as
many trained numbers as the RQ-Transformer. Pictures are judged by retrieval: the share of drawn pictures that
`PictureJudge` takes for the held-out picture of their text. Speech has no judge here yet ("not run").
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from anytok.codecs.training.engine import run
from anytok.codecs.training.task import RunConfig
from anytok.generators.resgen import ResGen, ResGenConfig, ResGenSampling
from anytok.generators.rq_transformer import RQTransformer, RQTransformerConfig, parameters
from anytok.generators.rvq_body import CodeRequest
from anytok.generators.rvq_task import CodesTask, load_model
from anytok.generators.sampling import Sampling
from anytok.judges.image import PictureJudge, ranks, recall

NAMES = {"rq": "RQ-Transformer", "resgen": "ResGen", "discrete": "depth-parallel"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What all models share."""

    width: int
    layers: int
    codes: int = 256
    vectors: int = 32
    conditions: int = 256
    longest: int = 512

    def body(self, depth: int) -> dict[str, Any]:
        """Arguments of every config."""
        return {"width": self.width, "layers": self.layers, "heads": self.width // 32}

    def ends(self, depth: int) -> dict[str, Any]:
        """What the codec and the data decide."""
        return {
            "vocab": (self.codes,) * depth,
            "vectors": self.vectors,
            "conditions": self.conditions,
            "longest": self.longest,
        }


def models(sizes: Sizes, depth: int) -> dict[str, dict[str, Any]]:
    """Model sections of the three configs, as many trained numbers each as their common width allows."""
    body, ends = sizes.body(depth), sizes.ends(depth)
    rq = {**body, "depth_width": sizes.width // 2, "depth_heads": sizes.width // 64 or 1}
    with torch.device("meta"):
        goal = parameters(RQTransformer(RQTransformerConfig(**rq, **ends)))
        found = {"rq": rq}
        for kind, head in (("resgen", "mixture"), ("discrete", "discrete")):
            own = {**body, "head": head, "components": 64, "rank": 16, "blocks": 2}

            def size(ffn: int, own: dict[str, Any] = own) -> int:
                return parameters(ResGen(ResGenConfig(**own, **ends, head_ffn=ffn)))

            each = (size(32) - size(16)) / 16
            ffn = 16 * max(1, round((goal - size(16)) / each / 16) + 1)
            found[kind] = {**own, "head_ffn": ffn}
    return found


def drawn(net: Any, requests: list[CodeRequest], steps: int) -> tuple[list[torch.Tensor], dict]:
    """Codes of all requests, and what drawing them took."""
    options = Sampling() if isinstance(net, RQTransformer) else ResGenSampling(steps=steps)
    began, cpu = time.perf_counter(), time.process_time()
    last = {event.request: event for event in net.run(requests, options)}
    row = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    row["forwards"] = last[0].forwards
    return [last[i].codes for i in range(len(requests))], row


def dry(sizes: Sizes, depth: int, batch: int, length: int, steps: int) -> list[dict[str, Any]]:
    """Random models and codes: passes and seconds."""
    rows = []
    requests = [CodeRequest(length=length, condition=torch.arange(12)) for _ in range(batch)]
    for kind, section in models(sizes, depth).items():
        torch.manual_seed(0)
        cls, make = (RQTransformer, RQTransformerConfig) if kind == "rq" else (ResGen, ResGenConfig)
        net = cls(make(**section, **sizes.ends(depth))).eval()
        _, row = drawn(net, requests, steps)
        rows.append({"model": NAMES[kind], "depth": depth, "size": parameters(net), **row})
    return rows


def whole(
    sizes: Sizes, depth: int, data: dict[str, Any], settings: RunConfig, items: int, steps: int
) -> list[dict[str, Any]]:
    """Train the three, draw held-out items, judge."""
    rows = []
    for kind, section in models(sizes, depth).items():
        section = {k: v for k, v in section.items() if k != "head"}
        config = {"model": {"kind": kind, **section}, "data": {**data, "depth": depth}}
        own = CodesTask(config)
        out = Path(settings.out) / f"{kind}-{depth}"
        path = run(own, RunConfig(**{**vars(settings), "out": str(out)}))
        net, _ = load_model(path)
        held = own.rows_of("held")[:items]
        samples = [own.sample(row) for row in held]
        requests = [CodeRequest(length=len(c), condition=i) for c, i in samples]
        codes, row = drawn(net, requests, steps)
        row["score"] = score(own, held, samples, codes)
        rows.append({"model": NAMES[kind], "depth": depth, "size": parameters(net), **row})
    return rows


def score(own: CodesTask, held: list, samples: list, codes: list) -> float | str:
    """Retrieval of pictures; "not run" for other media."""
    if own.codec.spec.modality != "image":
        return "not run"
    streams = [own.codec.encode([own.medium(row)])[0] for row in held]
    pictures = [
        own.codec.decode([own.codec.stream(c, grid=s.grid, meta=s.meta)])[0]
        for c, s in zip(codes, streams)
    ]
    judge = PictureJudge()
    gallery = judge.features([own.medium(row) for row in held])
    return recall(ranks(judge.features(pictures), gallery, list(range(len(held)))), 1)


def main(
    codec: Annotated[str, typer.Option(help="a residual codec: name or file")] = "rvq/mini",
    data: Annotated[Path, typer.Option(help="folder of the data sets")] = Path("data"),
    sets: Annotated[str, typer.Option(help="data sets, with commas")] = "speech",
    depths: Annotated[str, typer.Option(help="depths, with commas")] = "4,8,16",
    steps: Annotated[int, typer.Option(help="training steps of each model")] = 20_000,
    out: Annotated[Path, typer.Option(help="where runs lie")] = Path("runs/resgen_benchmark"),
    width: int = 192,
    layers: int = 6,
    batch: int = 8,
    length: Annotated[int, typer.Option(help="positions (dry run)")] = 64,
    passes: Annotated[int, typer.Option(help="steps of sampling, T")] = 16,
    items: Annotated[int, typer.Option(help="held-out items that are drawn")] = 64,
    dry_run: Annotated[bool, typer.Option("--dry", help="no training, random codes")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print a table, or JSON."""
    rows = []
    for depth in (int(d) for d in depths.split(",")):
        if dry_run:
            rows += dry(Sizes(width=width, layers=layers), depth, batch, length, passes)
            continue
        section = {"root": str(data), "sets": sets.split(","), "codec": codec, "depth": depth}
        first = CodesTask({"model": {"kind": "rq", "width": width}, "data": section})
        table = first.codec.code_vectors(0, 0)
        own = Sizes(
            width=width,
            layers=layers,
            codes=len(table),
            vectors=table.shape[1],
            conditions=first.model.conditions,
            longest=first.model.longest,
        )
        settings = RunConfig(out=str(out), steps=steps, batch_size=batch)
        rows += whole(own, depth, section, settings, items, passes)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    typer.echo(f"{'model':16} {'depth':>5} {'size':>9} {'passes':>6} {'s':>7} {'CPU s':>7}  score")
    for row in rows:
        typer.echo(
            f"{row['model']:16} {row['depth']:5} {row['size']:9,} {row['forwards']:6} "
            f"{row['seconds']:7.2f} {row['cpu_seconds']:7.2f}  {row.get('score', 'not run')}"
        )


if __name__ == "__main__":
    typer.run(main)
