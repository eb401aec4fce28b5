"""Named furniture and household objects: mesh, picture and words of the same thing.

Debian's sweethome3d-furniture holds 820 models in five catalogues, each under CC0 or CC BY (the
package's copyright file says which); anything else would be left out. The pictures are the
catalogue's own renderings (RGBA, 128 pixels and less). One in ten is `held`, by the hash of its OBJ.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from anytok.assets.recipes.dataset import (
    OUT,
    Row,
    begin,
    finish,
    is_permissive,
    progress,
    save,
    say,
    split_by_hash,
)
from anytok.assets.recipes.dep5 import grant_of, grants
from anytok.assets.recipes.fetch import apt_deb, unpack
from anytok.assets.recipes.shapes import geometry

PACKAGE = (
    "sweethome3d-furniture",
    "1.8-1",
    "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
)
CATALOGUE = "PluginFurnitureCatalog.properties"
Item = dict[str, str]


def build(out: Path) -> Path:
    """Write meshes, pictures and words to `out/furniture`; returns that folder."""
    folder = out / "furniture"
    if begin(folder, {"pin": "@".join(PACKAGE[:2])}):
        return folder
    root = unpack(apt_deb(*PACKAGE, cache=out / ".packages"), ("*.sh3f", "*/copyright"))
    found = grants(next(root.rglob("copyright")).read_text("utf-8"))
    rows: list[Row] = []
    for bundle in sorted(root.rglob("*.sh3f")):
        grant = grant_of(f"{bundle.stem}/catalogue", found)
        if grant is None or not is_permissive(grant.licence):
            say(f"{bundle.stem}: left out, its licence is {grant and grant.licence}")
            continue
        content = unpack(bundle, (CATALOGUE, "*.obj", "*.png"))
        items = catalogue((content / CATALOGUE).read_text("latin-1"))
        for item in progress(items, bundle.stem, len(items)):
            row = _row(item, content, folder / bundle.stem)
            rows.append(row | {"licence": grant.licence, "holder": grant.holder})
    return finish(folder, rows, __doc__ or "")


def catalogue(text: str) -> list[Item]:
    """A Sweet Home 3D catalogue (Java properties, `key#number=value`) → its items, in order."""
    items: dict[int, Item] = defaultdict(dict)
    text = re.sub(r"\\\n\s*", "", text.replace("\r\n", "\n"))  # a backslash joins lines
    for line in text.splitlines():
        match = re.match(r"\s*([\w]+)#(\d+)\s*[=:]\s*(.*)", line)
        if match:
            items[int(match[2])][match[1]] = _unescape(match[3].strip())
    return [items[number] for number in sorted(items) if "model" in items[number]]


def _unescape(value: str) -> str:
    value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), value)
    return re.sub(r"\\(.)", r"\1", value)


def _row(item: Item, content: Path, folder: Path) -> Row:
    model, icon = content / item["model"].lstrip("/"), content / item["icon"].lstrip("/")
    data = model.read_bytes()
    rotation = tuple(float(word) for word in item.get("modelRotation", "").split())
    folder.mkdir(exist_ok=True)
    save(folder / f"{model.stem}.obj", geometry(data.decode("latin-1"), rotation).encode())
    save(folder / f"{model.stem}.png", icon.read_bytes())
    return {
        "shape": f"{folder.name}/{model.stem}.obj",
        "image": f"{folder.name}/{model.stem}.png",
        "text": item["name"].lower(),
        "split": split_by_hash(data),
        "source": f"{PACKAGE[0]}@{PACKAGE[1]}",
        "category": item.get("category", "").lower(),
        "tags": [tag.strip().lower() for tag in item.get("tags", "").split(",") if tag.strip()],
        "creator": item.get("creator", ""),
        "size_cm": [float(item[key]) for key in ("width", "depth", "height")],
    }


def main(
    out: Annotated[Path, typer.Option(help="folder of all data sets")] = OUT,
) -> None:
    """Extract named furniture: OBJ geometry, PNG picture, name and category."""
    build(out)


if __name__ == "__main__":
    typer.run(main)
