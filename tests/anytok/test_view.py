"""The page in which a shape is turned: what it holds, and that it needs nothing else."""

import base64
import json
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


# A browser in forty lines: elements that remember their listeners, and a WebGL that writes down what it is asked.
BROWSER = """
const calls = [];
const gl = new Proxy({}, {get: (_, name) => {
  if (name === name.toUpperCase()) return name;
  return (...args) => {
    calls.push([name, ...args]);
    if (name === "getShaderParameter") return true;
    if (name === "getAttribLocation") return args[1] === "place" ? 0 : 1;
    return {name, args};
  };
}});
const element = (dataset) => ({
  dataset, width: 8, height: 8, hidden: true, listeners: {},
  addEventListener(kind, act) { this.listeners[kind] = act; },
  setPointerCapture() {},
  getContext(kind) { return kind === "webgl2" ? gl : {drawImage: () => calls.push(["shown"])}; },
});
const canvases = DATA.map(element);
globalThis.document = {createElement: () => element({}), querySelectorAll: () => canvases};
const frames = [];
globalThis.requestAnimationFrame = (act) => frames.push(act);
globalThis.IntersectionObserver = class {
  constructor(act) { this.act = act; }
  observe(target) { this.act([{target, isIntersecting: true}]); }
};
SCRIPT
const run = () => { while (frames.length) frames.shift()(); };
run();
const first = calls.length;
canvases[0].listeners.pointermove({buttons: 1, movementX: 5, movementY: 2});
run();
const names = (list) => list.map((call) => call[0]);
const draws = (list) => list.filter((call) => call[0].startsWith("draw"));
console.log(JSON.stringify({
  hidden: canvases.map((c) => c.hidden),
  first: draws(calls.slice(0, first)),
  moved: draws(calls.slice(first)),
  shown: names(calls).filter((name) => name === "shown").length,
  turn: calls.filter((call) => call[0] === "uniformMatrix3fv").map((call) => call[3]),
}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the script")
def test_the_script_draws_and_turns(tmp_path):
    cloud = Shape(torch.randn(50, 3))
    said = [("a", cube()), ("a", cube()), ("b", cloud)]
    data = [{"group": group, **view.packed(shape)} for group, shape in said]
    script = view.SCRIPT.removeprefix("<script>").removesuffix("</script>")
    code = BROWSER.replace("DATA", json.dumps(data)).replace("SCRIPT", script)
    (tmp_path / "page.js").write_text(code)
    done = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["hidden"] == [False] * 3
    mesh = ["drawElements", "TRIANGLES", 36, "UNSIGNED_INT", 0]
    assert found["first"] == [mesh, mesh, ["drawArrays", "POINTS", 0, 50]]
    assert found["moved"] == [mesh, mesh]  # those of a row turn together
    assert found["shown"] == 5
    start = torch.tensor(found["turn"][0]).view(3, 3).T.double()
    torch.testing.assert_close(start, report._rotation(0.7, 0.45))
    assert found["turn"][0] == found["turn"][1] != found["turn"][3]
