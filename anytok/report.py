"""Reports: what a person looks at. Contact sheets, tables (terminal, Markdown, JSON) and self-contained HTML.

- `picture_of(medium)` shows any medium as one picture: the picture itself, a spectrogram, a strip of frames, a shaded
  mesh, a page of text. Everything else is built from it.
- The commands `roundtrip`, `compare`, `evaluate` and `bench` all print through this file.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image as Pil
from PIL import ImageDraw, ImageFont
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from .modalities import Audio, Image, Media, Shape, Video
from .view import SCRIPT, turnable

CELL = 160
INK, PAPER, FAINT = (32, 33, 36), (255, 255, 255), (120, 124, 130)
# Anchors of a perceptually even dark-to-light map (violet, blue, teal, green, yellow).
COLOURS = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float32
)


@dataclass(frozen=True)
class Row:
    """One item of a report.

    Args:
        name: what it is, as the first column shows it.
        cells: column title -> medium, in order; the first is the source.
        values: column title -> figure or word.
    """

    name: str
    cells: Mapping[str, Media] = field(default_factory=dict)
    values: Mapping[str, float | int | str | None] = field(default_factory=dict)


def picture_of(medium: Media, size: int = CELL) -> Pil.Image:
    """Any medium as one RGB picture, `size` high (spectrograms and strips are wider)."""
    if isinstance(medium, Image):
        return _fitted(medium.over().to_pil().convert("RGB"), size)
    if isinstance(medium, Audio):
        return spectrogram(medium, size)
    if isinstance(medium, Video):
        return frame_strip(medium, size)
    if isinstance(medium, Shape):
        return shaded(medium, size)
    return _page(medium.text, size)


def _fitted(picture: Pil.Image, size: int) -> Pil.Image:
    scale = size / max(picture.size)
    shape = [max(1, round(n * scale)) for n in picture.size]
    # Small pictures are enlarged without smoothing: what the codec made stays visible as it is.
    method = Pil.Resampling.NEAREST if scale > 1 else Pil.Resampling.LANCZOS
    sheet = Pil.new("RGB", (size, size), PAPER)
    sheet.paste(picture.resize(shape, method), ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return sheet


def spectrogram(audio: Audio, size: int = CELL) -> Pil.Image:
    """Log-magnitude spectrogram, low frequencies below, 80 dB of range; twice as wide as high."""
    wave = audio.mono().samples[0]
    n = 512
    if len(wave) < n:
        wave = torch.nn.functional.pad(wave, (0, n - len(wave)))
    window = torch.hann_window(n)
    magnitude = torch.stft(wave, n, hop_length=128, window=window, return_complex=True).abs()
    decibels = 20 * torch.log10(magnitude.clamp(min=1e-5))
    level = ((decibels - decibels.max() + 80) / 80).clamp(0, 1).flip(0).numpy()
    picture = Pil.fromarray(_colour(level))
    return picture.resize((2 * size, size), Pil.Resampling.BILINEAR)


def _colour(level: np.ndarray) -> np.ndarray:
    """Values [H, W] in [0, 1] as RGB bytes [H, W, 3]."""
    at = level * (len(COLOURS) - 1)
    low = np.clip(at.astype(int), 0, len(COLOURS) - 2)
    mix = (at - low)[..., None]
    return (COLOURS[low] * (1 - mix) + COLOURS[low + 1] * mix).astype(np.uint8)


def frame_strip(video: Video, size: int = CELL, frames: int = 6) -> Pil.Image:
    """Evenly spaced frames side by side."""
    total = len(video.frames)
    picks = np.linspace(0, total - 1, min(frames, total)).round().astype(int)
    cells = [_fitted(_frame(video, int(i)), size // 2) for i in picks]
    strip = Pil.new("RGB", (len(cells) * (size // 2), size // 2), PAPER)
    for i, cell in enumerate(cells):
        strip.paste(cell, (i * (size // 2), 0))
    return strip


def _frame(video: Video, i: int) -> Pil.Image:
    return Pil.fromarray(np.ascontiguousarray(video.frames[i].permute(1, 2, 0).numpy()))


def shaded(shape: Shape, size: int = CELL, yaw: float = 0.7, pitch: float = 0.45) -> Pil.Image:
    """A shaded view: dense oriented surface points, nearest one in each pixel, lit from the viewer's left.

    Points need no rasteriser and serve meshes and point clouds alike.
    """
    cloud = (
        shape
        if shape.faces is None
        else shape.sample(120_000, rng=torch.Generator().manual_seed(0))
    )
    points, normals = cloud.vertices.double(), cloud.normals
    center = (points.amin(0) + points.amax(0)) / 2
    scale = float((points.amax(0) - points.amin(0)).norm()) or 1.0
    turn = _rotation(yaw, pitch)
    points = (points - center) / scale @ turn.T
    light = torch.tensor([-0.4, 0.6, 0.7], dtype=torch.double)
    normals = torch.zeros_like(points) + light if normals is None else normals.double() @ turn.T
    tone = (normals @ (light / light.norm())).abs().clamp(0.15, 1)
    order = points[:, 2].argsort()  # far first: the highest index in a pixel is the nearest point
    column = ((points[order, 0] + 0.5) * (size - 1)).round().long().clamp(0, size - 1)
    row = ((0.5 - points[order, 1]) * (size - 1)).round().long().clamp(0, size - 1)
    nearest = torch.full((size * size,), -1)
    nearest.scatter_reduce_(0, row * size + column, torch.arange(len(order)), "amax")
    seen = nearest >= 0
    sheet = torch.ones(size * size, dtype=torch.double)
    sheet[seen] = 0.9 * tone[order][nearest[seen]]
    grey = (sheet * 255).byte().view(size, size).numpy()
    return Pil.fromarray(grey).convert("RGB")


def _rotation(yaw: float, pitch: float) -> torch.Tensor:
    """Turn about the vertical (y) axis, then nod about the horizontal one: [3, 3]."""
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    about_y = torch.tensor([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]], dtype=torch.double)
    about_x = torch.tensor([[1, 0, 0], [0, cp, -sp], [0, sp, cp]], dtype=torch.double)
    return about_x @ about_y


def _page(text: str, size: int) -> Pil.Image:
    sheet = Pil.new("RGB", (size, size), PAPER)
    draw, font = ImageDraw.Draw(sheet), _font(13)
    y = 6
    for line in _wrapped(text, font, size - 12):
        draw.text((6, y), line, INK, font)
        y += 16
        if y > size - 16:
            break
    return sheet


def _wrapped(text: str, font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        trial = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(trial) > width:
            lines.append(word)
        else:
            lines[-1] = trial
    return lines


def _font(size: int):
    return ImageFont.load_default(size)


def contact_sheet(rows: Sequence[Row], size: int = CELL) -> Pil.Image:
    """All rows under each other: name and figures at the left, then each cell under its title."""
    pictures = [{title: picture_of(m, size) for title, m in row.cells.items()} for row in rows]
    left, gap = 230, 8
    heights = [max([150, *(p.height + 18 for p in ps.values())]) + gap for ps in pictures]
    widths = [sum(p.width + gap for p in ps.values()) for ps in pictures]
    sheet = Pil.new("RGB", (left + max([0, *widths]) + gap, sum(heights) + gap), PAPER)
    draw, y = ImageDraw.Draw(sheet), gap
    for row, ps, height in zip(rows, pictures, heights):
        _label(draw, row, gap, y, left - 2 * gap)
        x = left
        for title, picture in ps.items():
            draw.text((x, y), title, FAINT, _font(12))
            sheet.paste(picture, (x, y + 16))
            x += picture.width + gap
        y += height
    return sheet


def _label(draw: ImageDraw.ImageDraw, row: Row, x: int, y: int, width: int) -> None:
    for line in _wrapped(row.name, _font(14), width)[:2]:
        draw.text((x, y), line, INK, _font(14))
        y += 18
    for title, value in list(row.values.items())[:7]:
        draw.text((x, y), f"{title}: {shown(value)}", FAINT, _font(12))
        y += 15


def shown(value: float | int | str | None) -> str:
    """A figure as people read it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def titles_of(rows: Sequence[Row]) -> list[str]:
    """Every column title of the rows' values, in the order of first use."""
    return list(dict.fromkeys(title for row in rows for title in row.values))


def table(rows: Sequence[Row], title: str = "") -> Group:
    """The rows' values for the terminal: one table for each codec, since measures differ between media."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.values.get("codec", title)), []).append(row)
    return Group(*(_table(group, name) for name, group in groups.items()))


def _table(rows: Sequence[Row], title: str) -> Table:
    columns = [c for c in titles_of(rows) if c != "codec"]
    made = Table(title=title or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    made.add_column("", no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(row.name, *(shown(row.values.get(column)) for column in columns))
    return made


def markdown(rows: Sequence[Row]) -> str:
    """The rows' values as a Markdown table."""
    columns = titles_of(rows)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [shown(row.values.get(column)) for column in columns]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_json(rows: Sequence[Row]) -> str:
    """The rows' values as a JSON list."""
    return json.dumps([{"name": row.name, **row.values} for row in rows], indent=2)


def to_html(
    rows: Sequence[Row], title: str, size: int = CELL, *, above: str = "", notes: Sequence[str] = ()
) -> str:
    """One self-contained page: every cell as an embedded PNG, the figures in a table.

    Args:
        above: HTML that stands before the table, such as `curves`.
        notes: sentences under the title.
    """
    columns = titles_of(rows)
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = []
    for row in rows:
        figures = "".join(f"<td>{html.escape(shown(row.values.get(c)))}</td>" for c in columns)
        cells = "".join(
            f"<figure>{_figure(m, t, size, row.name)}"
            f"<figcaption>{html.escape(t)}</figcaption></figure>"
            for t, m in row.cells.items()
        )
        body.append(f"<tr><th>{html.escape(row.name)}</th>{figures}</tr>")
        if cells:
            body.append(f"<tr><td colspan='{len(columns) + 1}' class='cells'>{cells}</td></tr>")
    style = (
        "body{font:15px system-ui;margin:2em;color:#202124}table{border-collapse:collapse}"
        "td,th{padding:4px 10px;text-align:right}th:first-child{text-align:left}"
        ".cells{text-align:left;border-bottom:1px solid #ddd}figure{display:inline-block;margin:4px}"
        "figcaption{font-size:12px;color:#787c82;max-width:170px}svg{margin:0 2em 1em 0}"
    )
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{style}</style>"
        f"<h1>{html.escape(title)}</h1>{said}{above}<table><tr><th></th>{head}</tr>{''.join(body)}</table>\n"
        f"{SCRIPT if any(isinstance(m, Shape) for r in rows for m in r.cells.values()) else ''}"
    )


LINES = ("#1a73e8", "#d93025", "#188038", "#f9ab00", "#9334e6", "#12858d", "#80868b", "#b06000")


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    *,
    width: int = 460,
    height: int = 300,
) -> str:
    """Lines through points (x > 0 on a logarithmic axis, y), as an SVG element with a legend."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    left, right = math.log(min(p[0] for p in points)), math.log(max(p[0] for p in points))
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    right, high = max(right, left + 1e-9), max(high, low + 1e-9)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (math.log(point[0]) - left) / (right - left)
        up = (point[1] - low) / (high - low)
        return 50 + across * (width - 70), height - 40 - up * (height - 60)

    parts = [
        f"<svg width='{width}' height='{height + 18 * len(series)}' font-family='system-ui' font-size='11'>"
    ]
    parts.append(
        f"<rect x='50' y='20' width='{width - 70}' height='{height - 60}' fill='none' stroke='#dadce0'/>"
    )
    for text, px, py in (
        (f"{math.exp(left):,.0f}", 50, height - 26),
        (f"{math.exp(right):,.0f} {x}", width - 90, height - 26),
        (f"{high:.4g} {y}", 50, 14),
        (f"{low:.4g}", 4, height - 40),
    ):
        parts.append(f"<text x='{px}' y='{py}' fill='#5f6368'>{html.escape(text)}</text>")
    for i, (name, line) in enumerate(series.items()):
        colour = LINES[i % len(LINES)]
        placed = [place(point) for point in sorted(line)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in placed)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        parts += [
            f"<circle cx='{px:.1f}' cy='{py:.1f}' r='3' fill='{colour}'/>" for px, py in placed
        ]
        below = height + 18 * i
        parts.append(f"<text x='50' y='{below}' fill='{colour}'>{html.escape(name)}</text>")
    return "".join(parts) + "</svg>"


def _figure(medium: Media, title: str, size: int, group: str) -> str:
    """A medium's picture; shapes can be turned, those of one row together."""
    picture = _data_url(picture_of(medium, size))
    if isinstance(medium, Shape):
        return turnable(medium, picture, title, group=group, size=size)
    return f"<img src='{picture}' alt='{html.escape(title)}'>"


def _data_url(picture: Pil.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
