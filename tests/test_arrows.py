"""Imports run one way: modalities <- codecs <- backbone <- generators <- anytok; and importing costs little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["modalities", "codecs", "backbone", "generators", "anytok"]
FILES = [path for folder in ORDER for path in sorted((ROOT / folder).rglob("*.py"))]


def layer(path: Path) -> int:
    return ORDER.index(path.relative_to(ROOT).parts[0])


def imported_layers(path: Path):
    """The layers that a file imports, by relative and by absolute imports."""
    package = ["anytok", *path.relative_to(ROOT).parts[:-1]]
    if package[1] == "anytok":
        package.pop(1)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, node.module or ""]).rstrip(".")]
            names += [f"{names[0]}.{alias.name}" for alias in node.names if names[0] == "anytok"]
        for name in names:
            parts = name.split(".")
            if parts[0] == "anytok" and len(parts) > 1 and parts[1] in ORDER:
                yield ORDER.index(parts[1]), name, node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    for target, name, line in imported_layers(path):
        assert target <= layer(path), f"{path.relative_to(ROOT)}:{line} imports upwards: {name}"


def test_the_front_door_imports_nothing_below_itself():
    tree = ast.parse((ROOT / "anytok" / "__init__.py").read_text())
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(n) for n in names] == ["from importlib import import_module"]


HEAVY = [
    "torchaudio",
    "torchvision",
    "timm",
    "trimesh",
    "av",
    "transformers",
    "accelerate",
    "skimage",
]


def test_importing_is_light():
    code = (
        "import time, sys, torch; t = time.perf_counter()\n"
        "import anytok, anytok.codecs, anytok.modalities\n"
        "anytok.load_codec, anytok.TokenStream, anytok.Image, anytok.list_codecs()\n"
        f"heavy = [m for m in {HEAVY} if m in sys.modules]\n"
        "print(time.perf_counter() - t, *heavy)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    seconds, *heavy = out.split()
    assert heavy == []
    # The promise is 0.3 s on an idle machine (README); here it is held with room for a busy one.
    assert float(seconds) < 1.5


def test_every_public_name_exists():
    import anytok

    for name in anytok.__all__:
        assert getattr(anytok, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        anytok.nonsense  # noqa: B018
