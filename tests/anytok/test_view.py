"""The page in which a shape is turned: what it holds, and that it needs nothing else."""

import base64
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from anytok import report, view
from anytok.cli import app
from anytok.modalities import Image, Shape
from anytok.report import Row
from tests.anytok.test_report import cube


def stored(page: str, key: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(re.search(rf"data-{key}='([^']+)'", page)[1]), kind)


def test_a_mesh_is_stored_whole():
    mesh = cube().transformed(torch.tensor([5.0, -3.0, 100.0]), 7.0)
    page = report.to_html([Row("<cube>", {"it": mesh})], "A cube", 64)
    places = stored(page, "places", "<u2").reshape(-1, 3) / 65535 * 7 + np.array([5, -3, 100]) - 3.5
    assert np.abs(places - mesh.vertices.numpy()).max() < 7 / 65535
    assert (stored(page, "faces", "<u4").reshape(-1, 3) == mesh.faces.numpy()).all()
    assert "data-group='&lt;cube&gt;'" in page
    assert page.count("<script>") == 1


def test_the_page_asks_for_nothing_else():
    page = report.to_html([Row("cube", {"it": cube()})], "A cube", 64)
    assert not re.search(r"https?:|//[a-z]+\.|import |fetch\(|src='(?!data:)", page)
    assert len(view.SCRIPT.splitlines()) < 300


def test_points_keep_their_normals():
    cloud = Shape(
        torch.randn(50, 3), None, torch.nn.functional.normalize(torch.randn(50, 3), dim=1)
    )
    data = view.packed(cloud)
    normals = np.frombuffer(base64.b64decode(data["normals"]), np.int8).reshape(-1, 3) / 127
    assert np.abs(normals - cloud.normals.numpy()).max() < 0.01
    assert "faces" not in data
    assert set(view.packed(Shape(cloud.vertices))) == {"places"}


def test_many_faces_become_points(monkeypatch):
    monkeypatch.setattr(view, "MOST_FACES", 10)
    monkeypatch.setattr(view, "MOST_POINTS", 100)
    data = view.packed(cube())
    assert "faces" not in data
    assert len(base64.b64decode(data["places"])) == 100 * 6
    dots = view.packed(Shape(torch.randn(5000, 3)))
    assert len(base64.b64decode(dots["places"])) == 100 * 6


def test_pages_without_shapes_have_no_script():
    page = report.to_html([Row("picture", {"it": Image(torch.rand(3, 8, 8))})], "P", 64)
    assert "<script>" not in page
    assert "turnable" not in page


def test_command(tmp_path):
    cube().save(tmp_path / "cube.glb")
    done = CliRunner().invoke(app, ["view", str(tmp_path / "cube.glb")])
    assert done.exit_code == 0, done.output
    assert "data-faces" in (tmp_path / "cube.html").read_text()
    (tmp_path / "bad.obj").write_text("v nan nan nan\n")
    assert CliRunner().invoke(app, ["view", str(tmp_path / "bad.obj")]).exit_code == 3


@pytest.mark.skipif(shutil.which("node") is None, reason="node checks the script's syntax")
def test_the_script_parses(tmp_path):
    script = view.SCRIPT.removeprefix("<script>").removesuffix("</script>")
    (tmp_path / "view.js").write_text(script)
    done = subprocess.run(["node", "--check", tmp_path / "view.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
