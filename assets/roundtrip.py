"""The demo: the sample assets through tokens and back, then sentences into pictures and pictures into words.

Run as `make demo`, or `python assets/roundtrip.py [--out DIR]`. Needs no download: samples and mini weights ship.
"""

from __future__ import annotations

import argparse
import time
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from anytok import AnyToAny, Image, Text, load_codec, modalities, report
from anytok.codecs import CodecUnavailable
from anytok.roundtrip import DEFAULT_CODECS, SUFFIXES, merged, roundtrip

console = Console()
PROMPTS = [
    "noto red apple",
    "twemoji panda",
    "fluent soccer ball",
    "noto rainbow",
    "twemoji airplane",
    "noto pizza",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where results go")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = round_trips(folder)
    console.print(report.table(rows, title="Round trips"))
    answers = any_to_any(folder)
    report.contact_sheet(merged(rows) + answers).save(folder / "contact_sheet.png")
    page = report.to_html(merged(rows) + answers, "anytok demo")
    (folder / "report.html").write_text(page, encoding="utf-8")
    console.print(
        f"{folder / 'contact_sheet.png'} and {folder / 'report.html'} show everything above."
    )
    console.print(f"Done in {time.perf_counter() - start:.1f} s.")


def samples() -> list[Path]:
    """The media files that ship."""
    folder = Path(str(resources.files("anytok.assets") / "samples"))
    return sorted(path for path in folder.iterdir() if path.suffix not in {".md", ".json"})


def round_trips(folder: Path) -> list[report.Row]:
    """Every sample through its medium's codec; what has no weights yet is said, not skipped silently."""
    rows, codecs = [], {}
    for path in samples():
        modality = modalities.medium_of(path).modality
        name = DEFAULT_CODECS[modality]
        try:
            codec = codecs.setdefault(name, load_codec(name))
        except CodecUnavailable as error:
            console.print(f"[yellow]{path.name}: {escape(str(error))}")
            continue
        for row, result in roundtrip(path, codec, lambda: load_codec(DEFAULT_CODECS["audio"])):
            rows.append(row)
            last = result
        modalities.save(last, folder / f"{path.stem}{SUFFIXES[modality]}")
    return rows


def any_to_any(folder: Path) -> list[report.Row]:
    """Sentences into pictures, and those pictures' real counterparts into words."""
    try:
        model = AnyToAny.load("anytok/mini")
    except CodecUnavailable as error:
        console.print(f"[yellow]anytok/mini: {escape(str(error))}")
        return []
    rows = []
    # A direction that does not reach its floor is not offered (README): the model then has no such pair.
    drawn = (
        model([Text(p) for p in PROMPTS], to="image")
        if ("text", "image") in model.model.pairs
        else []
    )
    for answer, prompt in zip(drawn, PROMPTS):
        answer.items[-1].save(folder / f"{prompt.replace(' ', '-')}.png")
        values = {"seconds": sum(answer.seconds.values()) / len(PROMPTS)}
        rows.append(report.Row(f"“{prompt}”", {"text to image": answer.items[-1]}, values))
        console.print(f"“{prompt}” became {prompt.replace(' ', '-')}.png")
    for path in (p for p in samples() if p.name.startswith("emoji")):
        picture = Image.load(path)
        (answer,) = model([picture], to="text")
        text = answer.items[-1].text
        console.print(f"{path.name} was read as “{text}”")
        rows.append(
            report.Row(path.name, {"image": picture, "image to text": answer.items[-1]}, {})
        )
    return rows


if __name__ == "__main__":
    main()
