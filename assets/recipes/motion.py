"""Our own little films with exact captions: an emoji or a plain shape that does one thing.

"A red circle moves left", "a dog grows": 17 frames at 64 pixels, as many as wished. Emoji are drawn
from the data of `emoji.py` (its training cells only, so its held-out drawings stay unseen), plain
shapes by this file. One (thing, motion) pair in ten is `held`: both words are known from training,
together they are new.
"""

import hashlib
import math
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw

from anytok.assets.recipes import emoji
from anytok.assets.recipes.dataset import OUT, Row, begin, finish, progress, read
from anytok.assets.recipes.mp4 import write_clip

FRAMES, RATE, SIDE = 17, 8, 64
FINE = 2  # drawn at twice the size, then reduced
HELD_ONE_IN = 10
PLAIN_PART = 0.4
CATEGORIES = ("animals-nature", "food-drink", "travel-places", "objects", "activities")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 50),
    "green": (50, 160, 70),
    "blue": (50, 100, 220),
    "purple": (140, 70, 190),
    "pink": (245, 130, 180),
    "brown": (130, 85, 50),
    "black": (25, 25, 25),
    "grey": (140, 140, 140),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "light blue": (200, 225, 250),
    "light green": (210, 240, 205),
    "light yellow": (252, 246, 205),
    "light pink": (252, 220, 230),
    "light grey": (222, 222, 222),
}


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Where the thing is: shift in widths of the picture, size as a part of it, angle, opacity."""

    x: float = 0.0
    y: float = 0.0
    size: float = 0.5
    angle: float = 0.0
    opacity: float = 1.0


def _sideways(t: float) -> float:
    return 0.5 * (t - 0.5)


# What a thing does, as a function of time from 0 to 1.
MOTIONS: dict[str, Callable[[float], Pose]] = {
    "moves left": lambda t: Pose(x=-_sideways(t), size=0.45),
    "moves right": lambda t: Pose(x=_sideways(t), size=0.45),
    "moves up": lambda t: Pose(y=-_sideways(t), size=0.45),
    "moves down": lambda t: Pose(y=_sideways(t), size=0.45),
    "grows": lambda t: Pose(size=0.2 + 0.65 * t),
    "shrinks": lambda t: Pose(size=0.85 - 0.65 * t),
    "turns left": lambda t: Pose(size=0.6, angle=180 * t),
    "turns right": lambda t: Pose(size=0.6, angle=-180 * t),
    "jumps": lambda t: Pose(y=0.2 - 0.4 * abs(math.sin(2 * math.pi * t)), size=0.45),
    "swings": lambda t: Pose(size=0.6, angle=40 * math.sin(2 * math.pi * t)),
    "appears": lambda t: Pose(size=0.6, opacity=t),
    "disappears": lambda t: Pose(size=0.6, opacity=1 - t),
    "stands still": lambda t: Pose(size=0.6),
}
ROUND = ("circle", "ring")  # whose turning nobody sees
POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(0.12, 0.12), (0.88, 0.12), (0.88, 0.88), (0.12, 0.88)],
    "triangle": [(0.5, 0.06), (0.95, 0.86), (0.05, 0.86)],
    "diamond": [(0.5, 0.02), (0.86, 0.5), (0.5, 0.98), (0.14, 0.5)],
    "arrow": [
        *((0.05, 0.36), (0.5, 0.36), (0.5, 0.1), (0.97, 0.5)),
        *((0.5, 0.9), (0.5, 0.64), (0.05, 0.64)),
    ],
    "star": [
        (0.5 + r * math.sin(math.pi * i / 5), 0.53 - r * math.cos(math.pi * i / 5))
        for i, r in enumerate([0.5, 0.2] * 5)
    ],
    "cross": [
        *((0.36, 0.08), (0.64, 0.08), (0.64, 0.36), (0.92, 0.36), (0.92, 0.64), (0.64, 0.64)),
        *((0.64, 0.92), (0.36, 0.92), (0.36, 0.64), (0.08, 0.64), (0.08, 0.36), (0.36, 0.36)),
    ],
}
PLAIN = (*POLYGONS, *ROUND)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one clip shows, completely: two equal scenes give equal frames."""

    thing: str  # "dog", "red circle"
    motion: str
    background: str
    shift: tuple[float, float]  # off the middle, in widths
    zoom: float
    picture: str = ""  # an emoji's file; empty for a plain shape
    style: str = "plain"
    licence: str = "own-rendering"
    source: str = "motion.py"

    @property
    def caption(self) -> str:
        """`a red circle moves left`."""
        return f"{article(self.thing)} {self.thing} {self.motion}"


def build(out: Path, *, count: int = 4000, seed: int = 1234, workers: int = 2) -> Path:
    """Render `count` clips to `out/motion` (renders `out/emoji` first where it is missing)."""
    folder = out / "motion"
    if begin(folder, {"count": count, "seed": seed}):
        return folder
    pictures = emoji.build(out, workers=workers)
    todo = list(enumerate(scenes(drawable(read(pictures)), count, seed)))
    for i in range(0, count, 1000):
        (folder / f"{i // 1000:03d}").mkdir(exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        work = partial(_film, folder=folder, pictures=pictures)
        rows = list(progress(pool.map(work, todo, chunksize=8), "motion", count))
    return finish(folder, rows, f"{__doc__}\nEmoji artwork: see ../emoji/LICENCE.md.")


def drawable(rows: list[Row]) -> list[Row]:
    """Emoji of the training split that are single, plainly named things."""
    return [
        row
        for row in rows
        if row["split"] == "train"
        and row["category"] in CATEGORIES
        and len(row["name"].split()) <= 2
        and not row["name"].endswith(("s", " oclock", " thirty"))
        and not any(character.isdigit() for character in row["name"])
    ]


def scenes(rows: list[Row], count: int, seed: int) -> list[Scene]:
    """`count` random scenes; a longer list starts with the shorter one."""
    rng = random.Random(seed)
    return [_scene(rows, rng) for _ in range(count)]


def is_held(thing: str, motion: str) -> bool:
    """One (thing, motion) pair in ten, by its hash, whatever the style."""
    mark = hashlib.sha256(f"{thing}/{motion}".encode()).hexdigest()
    return int(mark[:8], 16) % HELD_ONE_IN == 0


def article(thing: str) -> str:
    """`a` or `an`, by the sound of the first letters."""
    first = thing.split()[0]
    vowel = first[0] in "aeiou" and not first.startswith(("uni", "eu", "one", "use"))
    return "an" if vowel or first in ("hourglass", "x") else "a"


def frames_of(scene: Scene, sprite: Image.Image) -> list[np.ndarray]:
    """The 17 frames, each [64, 64, 3] uint8."""
    return [_frame(scene, sprite, t / (FRAMES - 1)) for t in range(FRAMES)]


def plain_shape(thing: str, side: int = 128) -> Image.Image:
    """`red star` → its picture, RGBA."""
    colour, shape = thing.split()
    big = side * 4
    picture = Image.new("RGBA", (big, big), (*COLOURS[colour], 0))
    draw = ImageDraw.Draw(picture)
    fill = (*COLOURS[colour], 255)
    if shape == "circle":
        draw.ellipse((big * 0.06, big * 0.06, big * 0.94, big * 0.94), fill=fill)
    elif shape == "ring":
        box = (big * 0.06, big * 0.06, big * 0.94, big * 0.94)
        draw.ellipse(box, outline=fill, width=round(big * 0.16))
    else:
        draw.polygon([(x * big, y * big) for x, y in POLYGONS[shape]], fill=fill)
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def _scene(rows: list[Row], rng: random.Random) -> Scene:
    motion = rng.choice(list(MOTIONS))
    background = rng.choice(list(BACKGROUNDS))
    shift = (rng.uniform(-0.04, 0.04), rng.uniform(-0.04, 0.04))
    zoom = rng.uniform(0.85, 1.1)
    if rng.random() < PLAIN_PART:
        shapes = POLYGONS if motion.startswith(("turns", "swings")) else PLAIN
        thing = f"{rng.choice(list(COLOURS))} {rng.choice(list(shapes))}"
        return Scene(thing=thing, motion=motion, background=background, shift=shift, zoom=zoom)
    row = rng.choice(rows)
    return Scene(
        thing=row["name"],
        motion=motion,
        background=background,
        shift=shift,
        zoom=zoom,
        picture=row["image"],
        style=row["style"],
        licence=row["licence"],
        source=row["source"],
    )


def _frame(scene: Scene, sprite: Image.Image, t: float) -> np.ndarray:
    """Put the sprite where the motion says at time `t`: one affine map, then reduce."""
    pose, big = MOTIONS[scene.motion](t), SIDE * FINE
    scale = pose.size * scene.zoom * big / sprite.width  # pixels of the frame per sprite pixel
    cosine, sine = (f(math.radians(pose.angle)) / scale for f in (math.cos, math.sin))
    cx = big * (0.5 + pose.x + scene.shift[0])
    cy = big * (0.5 + pose.y + scene.shift[1])
    middle = sprite.width / 2
    row_x = (cosine, -sine, middle - cosine * cx + sine * cy)
    row_y = (sine, cosine, middle - sine * cx - cosine * cy)
    inverse = (*row_x, *row_y)  # sprite position of each frame position
    placed = sprite.transform((big, big), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    placed.putalpha(placed.getchannel("A").point(lambda a: round(a * pose.opacity)))
    frame = Image.new("RGBA", (big, big), (*BACKGROUNDS[scene.background], 255))
    frame.alpha_composite(placed)
    return np.asarray(frame.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


@lru_cache(maxsize=256)
def _sprite(path: Path) -> Image.Image:
    """An emoji with a clear border, so that turning and enlarging never smear its edge."""
    picture = Image.open(path).convert("RGBA")
    framed = Image.new("RGBA", (picture.width + 8, picture.height + 8))
    framed.paste(picture, (4, 4))
    return framed


def _film(numbered: tuple[int, Scene], *, folder: Path, pictures: Path) -> Row:
    number, scene = numbered
    path = f"{number // 1000:03d}/{number:06d}.mp4"
    if not (folder / path).is_file():
        sprite = _sprite(pictures / scene.picture) if scene.picture else plain_shape(scene.thing)
        write_clip(folder / path, frames_of(scene, sprite), RATE)
    return {
        "video": path,
        "text": scene.caption,
        "split": "held" if is_held(scene.thing, scene.motion) else "train",
        "source": scene.source,
        "licence": scene.licence,
        "name": scene.thing,
        "motion": scene.motion,
        "style": scene.style,
        "background": scene.background,
        "frames": FRAMES,
        "rate": RATE,
    }


def main(
    out: Annotated[Path, typer.Option(help="folder of all data sets")] = OUT,
    count: Annotated[int, typer.Option(min=1, help="clips")] = 4000,
    seed: Annotated[int, typer.Option(help="another seed, other clips")] = 1234,
    workers: Annotated[int, typer.Option(min=1, help="processes that render")] = 2,
) -> None:
    """Render captioned clips of moving emoji and shapes (17 frames, 64 pixels, 8 a second)."""
    build(out, count=count, seed=seed, workers=workers)


if __name__ == "__main__":
    typer.run(main)
