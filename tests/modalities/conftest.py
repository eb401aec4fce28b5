"""Small valid files of every format that is read, made once."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anytok.modalities import Audio, Image, Shape, Video


def picture(height: int = 24, width: int = 32, seed: int = 0) -> Tensor:
    """[3, H, W] smooth colours."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=rng)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


def tone(seconds: float = 0.5, rate: int = 16_000, channels: int = 1) -> Audio:
    """A chord that fades in, exact in 16 bits."""
    time = torch.arange(round(seconds * rate)) / rate
    rows = [torch.sin(2 * math.pi * (220 + 110 * c) * time) * time for c in range(channels)]
    return Audio((torch.stack(rows) * 2**14).round() / 2**15, rate)


def film(frames: int = 12, height: int = 32, width: int = 48, sound: bool = True) -> Video:
    """A light square that moves over a smooth background."""
    base = (picture(height, width) * 200).to(torch.uint8)
    out = base.repeat(frames, 1, 1, 1)
    for index in range(frames):
        out[index, :, 8:16, 2 * index : 2 * index + 8] = 255
    return Video(out, 12.5, tone(frames / 12.5) if sound else None)


def cube() -> Shape:
    """The cube [0, 1]³, faces outwards."""
    corners = [[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = [face for a, b, c, d in quads for face in ([a, b, c], [a, c, d])]
    return Shape(torch.tensor(corners, dtype=torch.float32), torch.tensor(faces))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Name with extension → content."""
    folder = tmp_path_factory.mktemp("media")
    image = Image(picture(), picture(seed=1)[:1])
    for name in ("a.png", "a.jpg", "a.webp", "a.gif"):
        image.save(folder / name)
    image.save(folder / "deep.png", bits=16)
    for name in ("a.wav", "a.flac", "a.ogg", "a.mp3", "a.opus"):
        tone(channels=2).save(folder / name)
    film().save(folder / "a.mp4")
    film().save(folder / "a.webm")
    film().save(folder / "a.mkv")
    film().save(folder / "film.gif")
    for name in ("a.obj", "a.ply", "a.stl", "a.off", "a.glb"):
        cube().save(folder / name)
    cube().sample(50).save(folder / "cloud.ply")
    (folder / "text.stl").write_text(_ascii_stl(cube()))
    (folder / "text.ply").write_text(_ascii_ply(cube()))
    (folder / "a.txt").write_text("Grüße aus Köln\n" * 20, encoding="utf-8")
    (folder / "a.m4a").write_bytes(_m4a(tone()))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def folder(files: dict[str, bytes], tmp_path: Path) -> Path:
    """The same files on disk."""
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def _ascii_stl(shape: Shape) -> str:
    rows = ["solid cube"]
    for corners in shape.triangles().tolist():
        rows += ["facet normal 0 0 0", "outer loop"]
        rows += [f"vertex {x} {y} {z}" for x, y, z in corners]
        rows += ["endloop", "endfacet"]
    return "\n".join([*rows, "endsolid cube", ""])


def _ascii_ply(shape: Shape) -> str:
    assert shape.faces is not None
    rows = ["ply", "format ascii 1.0", f"element vertex {len(shape.vertices)}"]
    rows += [f"property float {axis}" for axis in "xyz"]
    rows += [f"element face {len(shape.faces)}", "property list uchar int vertex_indices"]
    rows += ["end_header", *(f"{x} {y} {z}" for x, y, z in shape.vertices.tolist())]
    rows += [f"3 {a} {b} {c}" for a, b, c in shape.faces.tolist()]
    return "\n".join([*rows, ""])


def _m4a(audio: Audio) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="ipod") as container:
        stream = container.add_stream("aac", rate=audio.rate)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(audio.to_numpy(), format="fltp", layout="mono")
        frame.sample_rate = audio.rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
