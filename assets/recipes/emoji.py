"""Named emoji in three free styles, and a fourth that training never sees.

Noto (Apache-2.0), Twemoji (CC BY 4.0) and Fluent (MIT) as vectors, rendered at any size; keywords
and categories from emojibase (MIT). The same concept has one name in every style. Left out: skin
tones, and old drawings that a set keeps as hidden.

- 150 name × style cells (50 a style, of names that exist in the two other styles) are `held`.
- OpenMoji (CC BY-SA 4.0) is `unseen`, an evaluation style, for names that the others have.
"""

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from anytok.assets.recipes.dataset import OUT, Row, begin, finish, progress, save
from anytok.assets.recipes.fetch import npm_pack, unpack

HELD_PER_STYLE = 50
SEED = 1234
TONE = re.compile(r"-(?:medium-)?(?:light|medium|dark)$")
TONE_NAME = re.compile(r"(?:^|-)(?:skin-tone|tone[1-5])(?:-|$)")


@dataclass(frozen=True, kw_only=True)
class Style:
    """One artist's set: the pinned package, its licence and whom to credit."""

    name: str
    package: str
    version: str
    sha256: str
    licence: str
    credit: str


STYLES = (
    Style(
        name="noto",
        package="@iconify-json/noto",
        version="1.2.9",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        licence="Apache-2.0",
        credit="Noto Emoji by Google Inc",
    ),
    Style(
        name="twemoji",
        package="@iconify-json/twemoji",
        version="1.2.5",
        sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        licence="CC-BY-4.0",
        credit="Twemoji by Twitter, Inc and other contributors (jdecked/twemoji)",
    ),
    Style(
        name="fluent",
        package="@iconify-json/fluent-emoji",
        version="1.2.7",
        sha256="8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        licence="MIT",
        credit="Fluent Emoji by Microsoft Corporation",
    ),
)
UNSEEN = Style(
    name="openmoji",
    package="@iconify-json/openmoji",
    version="1.2.29",
    sha256="03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    licence="CC-BY-SA-4.0",
    credit="OpenMoji, the open-source emoji and icon project",
)
WORDS = (
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
# Fluent spells some concepts in its own way; the others follow Unicode's names.
FLUENT_NAMES = {
    "blackbird": "black-bird",
    "hugging-face": "smiling-face-with-open-hands",
    "keycap-hashtag": "keycap-pound",
    "knocked-out-face": "face-with-crossed-out-eyes",
    "man-blonde-hair": "man-blond-hair",
    "man-deaf": "deaf-man",
    "man-merpeople": "merman",
    "man-with-bunny-ears": "men-with-bunny-ears",
    "man-wrestling": "men-wrestling",
    "on-arrow": "on-exclamation-arrow",
    "person-blonde-hair": "person-blond-hair",
    "person-deaf": "deaf-person",
    "person-elf": "elf",
    "person-fairy": "fairy",
    "person-genie": "genie",
    "person-mage": "mage",
    "person-merpeople": "merperson",
    "person-superhero": "superhero",
    "person-supervillain": "supervillain",
    "person-vampire": "vampire",
    "person-with-bunny-ears": "people-with-bunny-ears",
    "person-wrestling": "people-wrestling",
    "person-zombie": "zombie",
    "phoenix-bird": "phoenix",
    "piata": "pinata",
    "pouting-face": "enraged-face",
    "red-triangle": "red-triangle-pointed-up",
    "up-button": "up-exclamation-button",
    "woman-blonde-hair": "woman-blond-hair",
    "woman-deaf": "deaf-woman",
    "woman-merpeople": "mermaid",
    "woman-with-bunny-ears": "women-with-bunny-ears",
    "woman-wrestling": "women-wrestling",
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One emoji as a vector, with its words."""

    style: Style
    name: str  # "red apple"
    svg: str
    category: str
    keywords: list[str]


def build(
    out: Path, *, size: int = 128, workers: int = 2, styles: tuple[Style, ...] = STYLES
) -> Path:
    """Render everything to `out/emoji`; returns that folder."""
    folder = out / "emoji"
    pins = [f"{style.package}@{style.version}" for style in (*styles, UNSEEN)]
    if begin(folder, {"size": size, "seed": SEED, "pins": pins}):
        return folder
    drawings = collect(out / ".packages", styles)
    held = held_cells([(d.style.name, d.name) for d in drawings if d.style is not UNSEEN])
    for style in (*styles, UNSEEN):
        (folder / style.name).mkdir(exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        done = pool.map(partial(_render, folder=folder, size=size), drawings, chunksize=16)
        rows = [
            _row(drawing, path, held)
            for drawing, path in progress(zip(drawings, done), "emoji", len(drawings))
        ]
    return finish(folder, rows, _about((*styles, UNSEEN)))


def names(cache: Path) -> list[str]:
    """Every name of the training styles, sorted: the vocabulary that other recipes speak."""
    return sorted({d.name for d in collect(cache, STYLES) if d.style is not UNSEEN})


def collect(cache: Path, styles: tuple[Style, ...] = STYLES) -> list[Drawing]:
    """Every drawing that the data set holds, in a fixed order."""
    sets = {style.name: _icons(style, cache) for style in (*styles, UNSEEN)}
    chars = {style.name: _chars(style, cache) for style in (*styles, UNSEEN)}
    unicode_names = {code: key for name in ("twemoji", "noto") for code, key in chars[name].items()}
    words = _words(cache, unicode_names)
    drawings: list[Drawing] = []
    seen: set[str] = set()
    for style in (*styles, UNSEEN):
        renames = _renames(style, chars[style.name], unicode_names)
        for key, svg in svgs(sets[style.name], set(unicode_names.values())):
            name = plain(renames.get(key, key))
            if style is UNSEEN and name not in seen:
                continue
            category, keywords = words.get(name, ("other", []))
            drawings.append(
                Drawing(style=style, name=name, svg=svg, category=category, keywords=keywords)
            )
        seen |= {d.name for d in drawings}
    cells = Counter((d.style.name, d.name) for d in drawings)
    twice = [cell for cell, count in cells.items() if count > 1]
    if twice:
        raise ValueError(f"two drawings share one name: {twice}; add the key to FLUENT_NAMES")
    return drawings


def svgs(icons: dict[str, Any], known: set[str]) -> Iterator[tuple[str, str]]:
    """Key and whole SVG of each drawing of one Iconify set, without skin tones and hidden drawings.

    `known` holds names that are no skin tone although they end like one (`police-car-light`).
    """
    keys = icons["icons"]
    for key, icon in sorted(keys.items()):
        if not icon.get("hidden") and not has_tone(key, keys.keys(), known):
            yield key, _svg(icons, icon)
    for key, alias in sorted(icons.get("aliases", {}).items()):
        if alias.get("hFlip") and not has_tone(key, icons["aliases"].keys(), known):
            yield key, _svg(icons, keys[alias["parent"]], flip=True)


def has_tone(key: str, keys: Any, known: set[str]) -> bool:
    """Whether a key names a skin tone: `…-skin-tone`, `…-tone3`, or `X-medium-dark` beside `X`."""
    stem = TONE.sub("", key)
    return bool(TONE_NAME.search(key)) or (stem != key and stem in keys and key not in known)


def plain(key: str) -> str:
    """`Red-Apple` → `red apple`; no accents, no punctuation: a small closed vocabulary."""
    ascii_only = unicodedata.normalize("NFKD", key).encode("ascii", "ignore").decode()
    return " ".join(re.findall(r"[a-z0-9]+", ascii_only.lower().replace("'", "")))


def held_cells(cells: list[tuple[str, str]]) -> set[tuple[str, str]]:
    """The (style, name) pairs that training never sees: 50 a style, each name once."""
    styles = sorted({style for style, _ in cells})
    by_style = {style: {name for s, name in cells if s == style} for style in styles}
    common = sorted(set.intersection(*by_style.values()))
    count = min(HELD_PER_STYLE, len(common) // len(styles))
    picked = random.Random(SEED).sample(common, count * len(styles))
    return {(styles[i // count], name) for i, name in enumerate(picked)}


def _svg(icons: dict[str, Any], icon: dict[str, Any], *, flip: bool = False) -> str:
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = icon["body"]
    if flip:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="{left} {top} {width} {height}">{body}</svg>'


def _render(drawing: Drawing, *, folder: Path, size: int) -> str:
    import resvg_py

    path = Path(drawing.style.name) / f"{drawing.name.replace(' ', '-')}.png"
    if not (folder / path).exists():
        svg = drawing.svg.replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)
        save(folder / path, bytes(resvg_py.svg_to_bytes(svg_string=svg)))
    return path.as_posix()


def _row(drawing: Drawing, path: str, held: set[tuple[str, str]]) -> Row:
    style = drawing.style
    split = "held" if (style.name, drawing.name) in held else "train"
    return {
        "image": path,
        "text": drawing.name,
        "split": "unseen" if style is UNSEEN else split,
        "source": f"{style.package}@{style.version}",
        "licence": style.licence,
        "style": style.name,
        "name": drawing.name,
        "category": drawing.category,
        "keywords": drawing.keywords,
    }


def _icons(style: Style, cache: Path) -> dict[str, Any]:
    return _json(style, cache, "icons.json")


def _chars(style: Style, cache: Path) -> dict[str, str]:
    """Code points → key; Fluent's package has none."""
    return _json(style, cache, "chars.json")


def _json(style: Style, cache: Path, file: str) -> dict[str, Any]:
    archive = npm_pack(style.package, style.version, style.sha256, cache=cache)
    folder = unpack(archive, ("package/icons.json", "package/chars.json"))
    return json.loads((folder / "package" / file).read_text(encoding="utf-8"))


def _renames(style: Style, chars: dict[str, str], common: dict[str, str]) -> dict[str, str]:
    """This style's own keys → the common key, through the code point where the package knows it."""
    own = FLUENT_NAMES if style.name == "fluent" else {}
    return own | {key: common[code] for code, key in chars.items() if code in common}


def _words(cache: Path, unicode_names: dict[str, str]) -> dict[str, tuple[str, list[str]]]:
    """Name → (category, keywords), from emojibase's English."""
    only = ("package/en/data.json", "package/meta/groups.json")
    package = unpack(npm_pack(*WORDS, cache=cache), only) / "package"
    groups = json.loads((package / "meta/groups.json").read_text(encoding="utf-8"))["groups"]
    words: dict[str, tuple[str, list[str]]] = {}
    for entry in json.loads((package / "en/data.json").read_text(encoding="utf-8")):
        code = re.sub("-fe0f", "", entry["hexcode"].lower())
        name = plain(unicode_names.get(code, entry["label"]))
        category = groups.get(str(entry.get("group")), "other")
        words[name] = (category, [plain(tag) for tag in entry.get("tags", []) if plain(tag)])
    return words


def _about(styles: tuple[Style, ...]) -> str:
    lines = [f"- {s.name}: {s.credit}, {s.licence}, from {s.package} {s.version}" for s in styles]
    lines.append(f"- names, keywords and categories: {WORDS[0]} {WORDS[1]}, MIT")
    return "Rendered from vectors by assets/recipes/emoji.py.\n\n" + "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="folder of all data sets")] = OUT,
    size: Annotated[int, typer.Option(min=16, max=512, help="pixels a side")] = 128,
    workers: Annotated[int, typer.Option(min=1, help="processes that render")] = 2,
) -> None:
    """Render named emoji (Noto, Twemoji, Fluent; OpenMoji for evaluation) as RGBA PNG."""
    build(out, size=size, workers=workers)


if __name__ == "__main__":
    typer.run(main)
