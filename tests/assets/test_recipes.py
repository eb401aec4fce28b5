"""The data format and the recipes' own rules: names, licences, splits. No network."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from anytok.assets.recipes import (
    clips,
    dataset,
    emoji,
    furniture,
    motion,
    photos,
    shapes,
    speech,
    speech_real,
)
from anytok.assets.recipes.dep5 import grant_of, grants, spdx
from anytok.assets.recipes.rcc import RccError, rcc_files

ALL = [clips, emoji, furniture, motion, photos, shapes, speech, speech_real]


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.__name__.rsplit(".")[-1])
def test_every_recipe_has_help_and_build(recipe):
    app = typer.Typer()
    app.command()(recipe.main)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "--out" in result.output
    assert recipe.build.__annotations__["return"].__name__ == "Path"


# --- the data format -------------------------------------------------------------------------


def row(**change):
    return {"image": "a.png", "split": "train", "source": "x@1", "licence": "MIT", **change}


def test_finish_marks_complete_and_begin_sees_it(tmp_path):
    folder = tmp_path / "set"
    assert not dataset.begin(folder, {"size": 64})
    (folder / "a.png").write_bytes(b"1")
    dataset.finish(folder, [row(text="köln")], "About.")
    assert dataset.read(folder) == [row(text="köln")]
    assert "| x@1 | MIT | train | 1 |" in (folder / "LICENCE.md").read_text()
    assert dataset.begin(folder, {"size": 64})


def test_other_settings_start_anew_and_the_same_go_on(tmp_path):
    folder = tmp_path / "set"
    dataset.begin(folder, {"size": 64})
    (folder / "a.png").write_bytes(b"1")
    assert not dataset.begin(folder, {"size": 64})
    assert (folder / "a.png").exists()
    assert not dataset.begin(folder, {"size": 32})
    assert not (folder / "a.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licence": "CC-BY-SA-4.0"}, "CC-BY-SA-4.0 may not stand in train"),
        ({"licence": "GPL-2+", "split": "held"}, "may not stand in held"),
        ({"licence": ""}, "lacks"),
        ({"split": "test"}, "split is 'test', expected one of"),
        ({"image": "missing.png"}, "missing.png is named in a row but was not written"),
    ],
)
def test_finish_refuses(tmp_path, change, message):
    (tmp_path / "a.png").write_bytes(b"1")
    with pytest.raises(ValueError, match=message):
        dataset.finish(tmp_path, [row(**change)], "")
    assert not (tmp_path / "data.jsonl").exists()


def test_finish_refuses_an_empty_set(tmp_path):
    with pytest.raises(ValueError, match="found no data"):
        dataset.finish(tmp_path, [], "")


@pytest.mark.parametrize(
    ("licence", "free"),
    [
        ("CC0-1.0", True),
        ("Apache-2.0 AND BSD-3-Clause", True),
        ("GPL-3.0-only OR MIT", True),
        ("CC-BY-3.0 AND GPL-3.0-only", False),
        ("CC-BY-SA-4.0", False),
        ("unclear", False),
        ("", False),
    ],
)
def test_is_permissive(licence, free):
    assert dataset.is_permissive(licence) is free


def test_split_by_hash_is_fixed():
    splits = [dataset.split_by_hash(str(i).encode()) for i in range(1000)]
    held = [i for i, split in enumerate(splits) if split == "held"]
    assert held[:6] == [11, 46, 70, 74, 76, 78]  # golden: the rule must never change
    assert 70 < len(held) < 130


# --- readers ---------------------------------------------------------------------------------

COPYRIGHT = """Format: x

Files: *
Copyright: 2010 Anna
License: GPL-3+

Files: pictures/*
       extra/a.png
Copyright: 2011 Ben
           2012 Clara
License: CC-BY-3.0

# a remark
Files: pictures/old.jpg
Copyright: none
License: public-domain
 Given to all.
"""


@pytest.mark.parametrize(
    ("path", "licence"),
    [
        ("main.c", "GPL-3+"),
        ("pictures/new.jpg", "CC-BY-3.0"),
        ("extra/a.png", "CC-BY-3.0"),
        ("pictures/old.jpg", "public-domain"),
    ],
)
def test_the_last_matching_paragraph_decides(path, licence):
    assert grant_of(path, grants(COPYRIGHT)).licence == licence


def test_holders_are_joined():
    assert grants(COPYRIGHT)[1].holder == "2011 Ben 2012 Clara"


@pytest.mark.parametrize(
    ("debian", "name"),
    [
        ("CC0", "CC0-1.0"),
        ("CC-BY-3.0-USA", "CC-BY-3.0-US"),
        ("CC-BY-SA-3.0", "CC-BY-SA-3.0"),
        ("GPL-2+ or Expat", "GPL-2+ OR MIT"),
        ("CC-BY-3.0 and CC0-1.0", "CC-BY-3.0 AND CC0-1.0"),
    ],
)
def test_spdx(debian, name):
    assert spdx(debian) == name


def rcc_bytes(files: dict[str, bytes]) -> bytes:
    """A version 1 bundle with one folder `d`; every second file deflated."""
    names, data, nodes = b"", b"", []
    for name in ("", "d", *files):
        nodes.append(len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    tree = struct.pack(">IHII", nodes[0], 2, 1, 1) + struct.pack(
        ">IHII", nodes[1], 2, len(files), 2
    )
    for i, content in enumerate(files.values()):
        packed = struct.pack(">I", len(content)) + zlib.compress(content) if i % 2 else content
        tree += struct.pack(">IHHHI", nodes[2 + i], i % 2, 0, 0, len(data))
        data += struct.pack(">I", len(packed)) + packed
    head = struct.pack(">4s4I", b"qres", 1, 20, 20 + len(tree), 20 + len(tree) + len(data))
    return head + tree + data + names


def test_rcc_round_trip():
    files = {"a.png": b"plain", "b.png": b"deflated" * 9}
    assert dict(rcc_files(rcc_bytes(files))) == {f"d/{k}": v for k, v in files.items()}


@pytest.mark.parametrize("cut", [3, 19, 40, 70])
def test_damaged_rcc(cut):
    with pytest.raises(RccError):
        list(rcc_files(rcc_bytes({"a.png": b"x" * 40, "b.png": b"y" * 40})[:cut]))


def test_rcc_bomb_is_refused():
    with pytest.raises(RccError, match="unpacks to more than"):
        list(rcc_files(rcc_bytes({"a": b"1", "b": bytes(65 * 1024**2)})))


# --- emoji -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("red-apple", "red apple"),
        ("A button (blood type)", "a button blood type"),
        ("flag: Côte d’Ivoire", "flag cote divoire"),
        ("woman's-hat", "womans hat"),
    ],
)
def test_plain_names(key, name):
    assert emoji.plain(key) == name


@pytest.mark.parametrize(
    ("key", "toned"),
    [
        ("waving-hand-medium-dark", True),
        ("waving-hand-light-skin-tone", True),
        ("man-elf-tone3", True),
        ("waving-hand", False),
        ("police-car-light", False),  # although `police-car` exists
        ("vertical-traffic-light", False),
    ],
)
def test_skin_tones(key, toned):
    keys = {"waving-hand", "police-car", key}
    assert emoji.has_tone(key, keys, {"police-car-light"}) is toned


def test_held_cells_are_fixed_and_known_elsewhere():
    cells = [(style, f"n{i}") for style in ("a", "b", "c") for i in range(300)]
    cells += [("a", "only here")]
    held = emoji.held_cells(cells)
    assert held == emoji.held_cells(cells[::-1])
    assert len(held) == 150
    assert len({name for _, name in held}) == 150
    assert {style: sum(s == style for s, _ in held) for style in "abc"} == dict.fromkeys("abc", 50)
    assert "only here" not in {name for _, name in held}


def tgz(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as bundle:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            bundle.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def fake_packages(folder):
    """Three tiny sets, the unseen one and the words, as npm would bring them."""
    dot = '<circle cx="8" cy="8" r="6" fill="red"/>'
    keys = ["red-apple", "dog", "dog-dark", "cat", "old-cat"]
    icons = {key: {"body": dot} for key in keys}
    icons["old-cat"]["hidden"] = True
    wide = {"cat": {"body": dot, "width": 32}}
    chars = {"1f34e": "red-apple", "1f415": "dog", "1f408": "cat"}
    words = [{"label": "red apple", "hexcode": "1F34E", "tags": ["fruit"], "group": 4}]
    files = {emoji.WORDS[0]: {"en/data.json": words, "meta/groups.json": {"groups": {"4": "food"}}}}
    for style in (*emoji.STYLES, emoji.UNSEEN):
        extra = {"adilette": {"body": dot}} if style is emoji.UNSEEN else wide
        body = {"prefix": style.name, "icons": icons | extra, "width": 16, "height": 16}
        body["aliases"] = {"cat-left": {"parent": "cat", "hFlip": True}}
        files[style.package] = {
            "icons.json": body,
            "chars.json": {} if style.name == "fluent" else chars,
        }
    for package, contents in files.items():
        archive = folder / f"{package.strip('@').replace('/', '-')}.tgz"
        archive.write_bytes(
            tgz({f"package/{k}": json.dumps(v).encode() for k, v in contents.items()})
        )
    return lambda name, *_, cache: folder / f"{name.strip('@').replace('/', '-')}.tgz"


def test_emoji_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py", reason="the extra 'recipes' is not installed")
    monkeypatch.setattr(emoji, "npm_pack", fake_packages(tmp_path))
    folder = emoji.build(tmp_path, size=32, workers=1)
    rows = dataset.read(folder)
    assert {r["name"] for r in rows} == {"red apple", "dog", "cat", "cat left"}
    assert {r["split"] for r in rows if r["style"] == "openmoji"} == {"unseen"}
    splits = [r["split"] for r in rows if r["style"] != "openmoji"]
    assert splits.count("held") == 3  # one a style: four common names are enough for no more
    apple = next(r for r in rows if r["name"] == "red apple" and r["style"] == "noto")
    assert (apple["category"], apple["keywords"]) == ("food", ["fruit"])
    picture = Image.open(folder / apple["image"])
    assert (picture.size, picture.mode) == ((32, 32), "RGBA")
    assert picture.getpixel((16, 16)) == (255, 0, 0, 255)
    assert picture.getpixel((0, 0))[3] == 0
    before = (folder / "data.jsonl").stat().st_mtime_ns
    emoji.build(tmp_path, size=32, workers=1)
    assert (folder / "data.jsonl").stat().st_mtime_ns == before


def test_two_drawings_of_one_name_are_an_error(tmp_path, monkeypatch):
    fetched = fake_packages(tmp_path)
    monkeypatch.setattr(emoji, "npm_pack", fetched)
    monkeypatch.setitem(emoji.FLUENT_NAMES, "cat", "dog")
    with pytest.raises(ValueError, match=r"\('fluent', 'dog'\)"):
        emoji.collect(tmp_path)


# --- photographs -----------------------------------------------------------------------------


def test_photographs_are_told_from_drawings():
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    assert photos.is_photograph(Image.fromarray(noise))
    drawing = np.full((200, 300, 3), 255, np.uint8)
    drawing[50:150, 100:200] = (200, 30, 30)
    assert not photos.is_photograph(Image.fromarray(drawing))
    cut_out = Image.fromarray(noise).convert("RGBA")
    cut_out.putalpha(Image.linear_gradient("L").resize((300, 200)))
    assert not photos.is_photograph(cut_out)


def test_difference_hash_survives_scaling():
    x = np.linspace(0, 6, 300)
    wave = (127 + 120 * np.sin(x)[None] * np.cos(x[:200])[:, None]).astype(np.uint8)
    picture = Image.fromarray(wave)
    mark = photos.difference_hash(picture)
    small = photos.difference_hash(picture.resize((150, 100)))
    turned = photos.difference_hash(picture.transpose(Image.Transpose.ROTATE_90))
    assert (mark ^ small).bit_count() <= photos.DUPLICATE_BITS
    assert (mark ^ turned).bit_count() > photos.DUPLICATE_BITS


def test_shrink_turns_upright():
    picture = Image.new("RGB", (2000, 1000))
    picture.getexif()[0x0112] = 6  # taken with the camera on its side
    assert photos.shrink(picture).size == (512, 1024)


def test_photograph_sources_are_pinned_and_separated():
    for source in photos.SOURCES:
        assert len(source.sha256) == 64
        if source.licence and not source.extra:
            assert dataset.is_permissive(source.licence)


def test_webp_is_found_under_its_jpeg_name():
    source = photos.Source(
        package="x", version="1", sha256="", only=("*",), installed="app/", original="src/"
    )
    found = grants("Files: *\nLicense: GPL-3+\n\nFiles: src/cat.jpg\nLicense: CC0\n")
    assert photos._grant(source, "app/cat.webp", found).licence == "CC0-1.0"
    assert photos._grant(source, "app/dog.webp", found).licence == "GPL-3+"


# --- shapes ----------------------------------------------------------------------------------


def test_geometry_keeps_triangles_only():
    obj = "mtllib x\nv 0 0 0\nv 1 0 0 9\nv 1 1 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 3/1 4/1\nf -1 -2 -3\n"
    lines = shapes.geometry(obj).splitlines()
    assert lines[1] == "v 1 0 0"
    assert lines[4:] == ["f 1 2 3", "f 1 3 4", "f 4 3 2"]


def test_geometry_rotates():
    quarter = (1, 0, 0, 0, 0, -1, 0, 1, 0)  # about x: y becomes z
    obj = "v 0 1 0\nv 0 0 0\nv 1 0 0\nf 1 2 3\n"
    assert shapes.geometry(obj, quarter).splitlines()[0] == "v 0 0 1"


@pytest.mark.parametrize("obj", ["v 0 0 0\n", "v 0 0 0\nv 1 0 0\nf 1 2 3\n", ""])
def test_geometry_refuses_broken_meshes(obj):
    with pytest.raises(ValueError, match="no faces"):
        shapes.geometry(obj)


def test_catalogue():
    text = (
        "# remark\nid=x\nname#2=Caf\\u00e9 table\nmodel#2=/a/b.obj\nicon#2=/a/b.png\n"
        "name#10=Long\\\n   name\nmodel#10=/c.obj\nname#3=no model\n"
    )
    items = furniture.catalogue(text)
    assert [item["name"] for item in items] == ["Café table", "Longname"]
    assert items[0]["model"] == "/a/b.obj"
