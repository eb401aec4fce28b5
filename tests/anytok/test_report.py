"""Reports: any medium as a picture, sheets, tables, pages."""

import json

import pytest
import torch

from anytok import report
from anytok.modalities import Audio, Image, Shape, Text, Video
from anytok.report import Row


def cube():
    import trimesh

    box = trimesh.creation.box()
    return Shape(torch.tensor(box.vertices).float(), torch.tensor(box.faces).long(), None)


MEDIA = {
    "image": Image(torch.rand(3, 20, 40)),
    "audio": Audio(torch.sin(torch.arange(8000) * 0.3)[None], 16000),
    "short audio": Audio(torch.zeros(1, 7), 16000),
    "video": Video((torch.rand(9, 3, 16, 16) * 255).byte(), 8.0),
    "mesh": cube(),
    "cloud": Shape(
        torch.randn(500, 3), None, torch.nn.functional.normalize(torch.randn(500, 3), dim=1)
    ),
    "text": Text("some words that are longer than one line of the little page"),
}


@pytest.mark.parametrize("kind", MEDIA)
def test_every_medium_has_a_picture(kind):
    picture = report.picture_of(MEDIA[kind], 96)
    assert picture.mode == "RGB"
    assert len(picture.getcolors(100_000)) > (0 if kind == "short audio" else 1)


def test_a_spectrogram_shows_the_tone_at_its_height():
    # 0.3 rad a sample is 764 Hz of 8000: a tenth from the bottom.
    picture = report.spectrogram(MEDIA["audio"], 100)
    column = [sum(picture.getpixel((100, y))) for y in range(100)]
    assert 87 <= max(range(100), key=column.__getitem__) <= 93


def test_a_shaded_cube_shows_three_faces():
    picture = report.shaded(cube(), 120)
    tones = [n for n, colour in picture.getcolors(10_000) if n > 300 and colour != (255, 255, 255)]
    assert len(tones) == 3


def test_sheets_tables_and_pages():
    rows = [
        Row(
            "one",
            {"source": MEDIA["image"], "16 tokens": MEDIA["image"]},
            {"PSNR dB": 20.123456, "bytes": 48},
        ),
        Row("<two>", {"source": MEDIA["audio"]}, {"bytes": 1200}),
    ]
    sheet = report.contact_sheet(rows, 64)
    assert sheet.width > 300
    assert sheet.height > 130
    assert "| one | 20.1 | 48 |" in report.markdown(rows)
    assert "| <two> |  | 1,200 |" in report.markdown(rows)
    assert json.loads(report.to_json(rows))[0] == {"name": "one", "PSNR dB": 20.123456, "bytes": 48}
    page = report.to_html(rows, "A & B")
    assert "<h1>A &amp; B</h1>" in page
    assert "&lt;two&gt;" in page
    assert page.count("data:image/png") == 3
