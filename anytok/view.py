"""`anytok view chair.glb`: a page in which a person turns a mesh. Self-contained, no network, no other package.

- Each shape is a picture; where the browser has WebGL 2, a canvas lies over it. One WebGL context draws all shapes of
  a page, so that a report may hold many; those of one row turn together.
- Drag or arrow keys turn, wheel or + and - zoom, a double click goes back. Faces seen from inside are red.
- Coordinates are stored in 16 bits of the bounding box's longest side. Above `MOST_FACES` points are shown instead.
"""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from .modalities import Shape

MOST_FACES = 300_000
MOST_POINTS = 200_000


def view(
    file: Annotated[Path, typer.Argument(help="A mesh or point cloud.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045 (typer reads annotations at run time on 3.10)
        typer.Option("--output", "-o", help="The HTML page; default: beside the file."),
    ] = None,
) -> None:
    """Write a page in which a shape can be turned with the mouse."""
    from .cli import _errors
    from .modalities import Shape
    from .report import Row, to_html

    page = output or file.with_suffix(".html")
    with _errors():
        shape = Shape.load(file)
        said = {"vertices": len(shape.vertices)}
        if shape.faces is not None:
            said |= {"faces": len(shape.faces), "watertight": str(shape.is_watertight)}
        page.write_text(
            to_html([Row(file.name, {file.name: shape}, said)], file.name, 640), encoding="utf-8"
        )
    typer.echo(page)


def turnable(shape: Shape, picture: str, title: str, *, group: str, size: int) -> str:
    """HTML of a picture (an `<img>` address) over which a shape can be turned; `SCRIPT` must follow once.

    Args:
        group: shapes of the same group turn together.
        size: pixels a side.
    """
    data = " ".join(f"data-{key}='{value}'" for key, value in packed(shape).items())
    return (
        f"<span class='turnable' style='position:relative;display:inline-block'>"
        f"<img src='{picture}' alt='{html.escape(title)}' width='{size}' height='{size}'>"
        f"<canvas width='{2 * size}' height='{2 * size}' tabindex='0' data-group='{html.escape(group)}' {data} "
        f"aria-label='{html.escape(title)}, can be turned' hidden "
        f"style='position:absolute;inset:0;width:{size}px;height:{size}px;touch-action:none;cursor:grab'>"
        "</canvas></span>"
    )


def packed(shape: Shape) -> dict[str, str]:
    """Base64 of a shape: "places" (3 x uint16 a vertex), then "faces" (3 x uint32) or "normals" (3 x int8)."""
    import numpy as np
    import torch

    if (shape.faces is not None and len(shape.faces) > MOST_FACES) or (
        shape.faces is None and len(shape.vertices) > MOST_POINTS
    ):
        shape = shape.sample(MOST_POINTS, torch.Generator().manual_seed(0))
    low, high = (corner.double() for corner in shape.bounds)
    side = float((high - low).max()) or 1.0
    places = ((shape.vertices.double() - (low + high) / 2) / side + 0.5).clamp(0, 1) * 65535
    data = {"places": _base64(places.round().numpy().astype("<u2"))}
    if shape.faces is not None:
        data["faces"] = _base64(shape.faces.numpy().astype("<u4"))
    elif shape.normals is not None:
        data["normals"] = _base64((shape.normals * 127).round().numpy().astype(np.int8))
    return data


def _base64(array) -> str:
    return base64.b64encode(array.tobytes()).decode()


SCRIPT = """<script>
(() => {
  "use strict";
  const sheet = document.createElement("canvas");
  const gl = sheet.getContext("webgl2", {antialias: true, preserveDrawingBuffer: true});
  if (!gl) return;  // the pictures stay
  const VERTEX = `#version 300 es
    in vec3 place; in vec3 normal;
    uniform mat3 turn; uniform float zoom, dot_;
    out vec3 at, facing;
    void main() {
      at = turn * (place - 0.5);
      facing = turn * normal;
      gl_Position = vec4(at.xy * zoom, -0.5 * at.z, 1.0);
      gl_PointSize = dot_;
    }`;
  const FRAGMENT = `#version 300 es
    precision highp float;
    in vec3 at, facing;
    uniform bool mesh;
    out vec4 colour;
    void main() {
      vec3 n = mesh ? normalize(cross(dFdx(at), dFdy(at))) : facing;
      float size = length(n);
      float light = size > 0.0 ? abs(dot(n / size, normalize(vec3(-0.4, 0.6, 0.7)))) : 0.7 + 0.5 * at.z;
      vec3 tint = mesh && !gl_FrontFacing ? vec3(0.95, 0.45, 0.4) : vec3(0.86, 0.88, 0.92);
      colour = vec4(tint * (0.2 + 0.8 * clamp(light, 0.0, 1.0)), 1.0);
    }`;
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) {
      console.error(gl.getShaderInfoLog(shader));
      return;
    }
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  gl.useProgram(program);
  const uniform = (name) => gl.getUniformLocation(program, name);
  const [TURN, ZOOM, DOT, MESH] = ["turn", "zoom", "dot_", "mesh"].map(uniform);
  const [PLACE, NORMAL] = ["place", "normal"].map((name) => gl.getAttribLocation(program, name));
  gl.enable(gl.DEPTH_TEST);

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const filled = (kind, data) => {
    const buffer = gl.createBuffer();
    gl.bindBuffer(kind, buffer);
    gl.bufferData(kind, data, gl.STATIC_DRAW);
    return buffer;
  };
  const START = {yaw: 0.7, pitch: 0.45, zoom: 1.15};
  const poses = new Map();

  class View {
    constructor(canvas) {
      this.canvas = canvas;
      this.ink = canvas.getContext("2d");
      this.group = canvas.dataset.group;
      if (!poses.has(this.group)) poses.set(this.group, {...START});
      canvas.hidden = false;
    }
    load() {  // only once it is seen: a long report has many shapes
      const {places, faces, normals} = this.canvas.dataset;
      this.array = gl.createVertexArray();
      gl.bindVertexArray(this.array);
      const raw = new Uint16Array(bytes(places));
      filled(gl.ARRAY_BUFFER, raw);
      gl.enableVertexAttribArray(PLACE);
      gl.vertexAttribPointer(PLACE, 3, gl.UNSIGNED_SHORT, true, 0, 0);
      this.count = raw.length / 3;
      if (normals) {
        filled(gl.ARRAY_BUFFER, new Int8Array(bytes(normals)));
        gl.enableVertexAttribArray(NORMAL);
        gl.vertexAttribPointer(NORMAL, 3, gl.BYTE, true, 0, 0);
      } else {
        gl.disableVertexAttribArray(NORMAL);
        gl.vertexAttrib3f(NORMAL, 0, 0, 0);
      }
      this.mesh = Boolean(faces);
      if (faces) {
        const corners = new Uint32Array(bytes(faces));
        filled(gl.ELEMENT_ARRAY_BUFFER, corners);
        this.count = corners.length;
      }
      gl.bindVertexArray(null);
    }
    draw() {
      if (!this.array) this.load();
      const {width, height} = this.canvas;
      if (sheet.width !== width || sheet.height !== height) [sheet.width, sheet.height] = [width, height];
      const {yaw, pitch, zoom} = poses.get(this.group);
      const [cy, sy, cp, sp] = [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)];
      gl.viewport(0, 0, width, height);
      gl.clearColor(1, 1, 1, 1);
      gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
      // columns of "nod after turn"
      gl.uniformMatrix3fv(TURN, false, [cy, -sp * sy, cp * sy, 0, cp, sp, -sy, -sp * cy, cp * cy]);
      gl.uniform1f(ZOOM, zoom);
      gl.uniform1f(DOT, Math.max(2, width / 250));
      gl.uniform1i(MESH, this.mesh ? 1 : 0);
      gl.bindVertexArray(this.array);
      if (this.mesh) gl.drawElements(gl.TRIANGLES, this.count, gl.UNSIGNED_INT, 0);
      else gl.drawArrays(gl.POINTS, 0, this.count);
      gl.bindVertexArray(null);
      this.ink.drawImage(sheet, 0, 0);
    }
  }

  const views = [...document.querySelectorAll(".turnable canvas")].map((canvas) => new View(canvas));
  const seen = new Set();
  let due = false;
  const redraw = (group) => {
    for (const view of views) if (view.group === group) view.stale = true;
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      for (const view of views) {
        if (view.stale && seen.has(view)) {
          view.stale = false;
          view.draw();
        }
      }
    });
  };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const view = views.find((one) => one.canvas === entry.target);
      if (entry.isIntersecting) seen.add(view);
      else seen.delete(view);
      redraw(view.group);
    }
  });
  const move = (view, change) => {
    const pose = poses.get(view.group);
    change(pose);
    pose.pitch = Math.max(-1.57, Math.min(1.57, pose.pitch));
    pose.zoom = Math.max(0.3, Math.min(30, pose.zoom));
    redraw(view.group);
  };
  for (const view of views) {
    const canvas = view.canvas;
    view.stale = true;
    watcher.observe(canvas);
    canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
    canvas.addEventListener("pointermove", (event) => {
      if (!event.buttons) return;
      move(view, (pose) => {
        pose.yaw -= event.movementX * 0.01;
        pose.pitch += event.movementY * 0.01;
      });
    });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      move(view, (pose) => { pose.zoom *= Math.exp(-event.deltaY * 0.001); });
    }, {passive: false});
    canvas.addEventListener("dblclick", () => move(view, (pose) => Object.assign(pose, START)));
    const keys = {
      ArrowLeft: (pose) => { pose.yaw += 0.1; }, ArrowRight: (pose) => { pose.yaw -= 0.1; },
      ArrowUp: (pose) => { pose.pitch -= 0.1; }, ArrowDown: (pose) => { pose.pitch += 0.1; },
      "+": (pose) => { pose.zoom *= 1.1; }, "-": (pose) => { pose.zoom /= 1.1; },
    };
    canvas.addEventListener("keydown", (event) => {
      if (!keys[event.key]) return;
      event.preventDefault();
      move(view, keys[event.key]);
    });
  }
})();
</script>"""
