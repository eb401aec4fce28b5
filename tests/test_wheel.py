"""The wheel holds the tree, and works installed elsewhere, beside the standard library's `codecs`."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "anytok": "anytok",
    **{f: f"anytok/{f}" for f in ("modalities", "codecs", "backbone", "generators", "assets")},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    # Built from a copy, so that a left-over build/ folder cannot hide a file that is missing from the lists.
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(copy(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl"))


def tracked():
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [n for n in names if (ROOT / n).is_file()]


def copy(out: Path) -> Path:
    import shutil

    target = out / "source"
    for name in tracked():
        if name.split("/")[0] in {
            *FOLDERS,
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "ATTRIBUTION.md",
        }:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def test_the_wheel_holds_every_module(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in tracked():
        folder, _, rest = name.partition("/")
        if folder in FOLDERS and name.endswith((".py", ".json", ".safetensors", "py.typed")):
            assert f"{FOLDERS[folder]}/{rest}" in inside, f"{name} is missing from the wheel"


def test_the_wheel_works_elsewhere(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import codecs, anytok, anytok.codecs\n"
        "assert codecs.lookup('utf-8') and 'anytok' not in codecs.__file__\n"
        f"assert anytok.__file__.startswith({str(site)!r}), anytok.__file__\n"
        f"assert anytok.codecs.__file__.startswith({str(site)!r}), anytok.codecs.__file__\n"
        "codec = anytok.load_codec('text/bytes')\n"
        "text = [anytok.Text('two words')]\n"
        "assert codec.decode(codec.encode(text)) == text\n"
        "print('works', len(anytok.list_codecs()))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("works")
