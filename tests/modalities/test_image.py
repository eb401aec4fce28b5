import io
import struct

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anytok.modalities import Image, MediaError
from tests.modalities.conftest import picture

SIDES = st.integers(1, 9)


@given(st.data(), st.sampled_from([(np.uint8, 8), (np.uint16, 16)]), st.sampled_from([3, 4]))
@settings(max_examples=40, deadline=None)
def test_integers_survive_tensors_and_png(tmp_path_factory, data, kind, channels):
    dtype, bits = kind
    array = data.draw(hnp.arrays(dtype, (data.draw(SIDES), data.draw(SIDES), channels)))
    image = Image.from_numpy(array)
    assert np.array_equal(image.to_numpy(dtype), array)
    path = tmp_path_factory.getbasetemp() / "round.png"
    image.save(path, bits=bits)
    assert np.array_equal(Image.load(path).to_numpy(dtype), array)


def test_webp_is_lossless_by_default_and_keeps_hidden_colours(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (7, 5, 4)).astype(np.uint8)
    Image.from_numpy(array).save(tmp_path / "a.webp")
    assert np.array_equal(Image.load(tmp_path / "a.webp").to_numpy(), array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = (picture(16, 24).permute(1, 2, 0) * 255).byte().numpy()
    upright[:4, :4] = (255, 0, 0)  # a red corner at the top left
    # How a camera stores it: the inverse of what the viewer must do.
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = PIL.Image.fromarray(np.ascontiguousarray(undo(upright)))
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    shown = Image.load(tmp_path / "a.jpg").to_numpy()
    assert shown.shape == upright.shape
    assert np.abs(shown.astype(int) - upright).mean() < 6


def png(mode: str, array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(array, mode=mode).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def test_grey_spreads_to_rgb():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    image = Image.load(png("L", grey))
    assert image.alpha is None
    assert np.array_equal(image.to_numpy(), np.repeat(grey[..., None], 3, axis=2))


def test_sixteen_bit_grey_is_exact():
    grey = np.random.default_rng(0).integers(0, 65536, (3, 4)).astype(np.uint16)
    buffer = io.BytesIO()
    PIL.Image.fromarray(grey).save(buffer, format="PNG")
    assert np.array_equal(Image.load(buffer.getvalue()).to_numpy(np.uint16)[..., 1], grey)


def test_grey_with_alpha():
    pair = np.random.default_rng(0).integers(0, 256, (3, 4, 2)).astype(np.uint8)
    image = Image.load(png("LA", pair))
    assert np.array_equal(image.to_numpy()[..., [0, 3]], pair)


def test_palette_with_transparency():
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    palette.save(buffer, format="PNG", transparency=1)
    assert Image.load(buffer.getvalue()).to_numpy().tolist() == [
        [[10, 20, 30, 255], [40, 50, 60, 0]]
    ]


def test_one_bit():
    buffer = io.BytesIO()
    PIL.Image.new("1", (3, 2), 1).save(buffer, format="PNG")
    assert (Image.load(buffer.getvalue()).pixels == 1).all()


def test_cmyk_jpeg_without_profile():
    buffer = io.BytesIO()
    PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(buffer, format="JPEG", quality=95)
    red = Image.load(buffer.getvalue()).pixels.mean(dim=(1, 2))
    assert torch.allclose(red, torch.tensor([1.0, 0.0, 0.0]), atol=0.05)


def test_a_profile_is_applied_and_a_broken_one_ignored():
    from PIL import ImageCms

    array = np.full((4, 4, 3), 128, np.uint8)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(Image.load(png("RGB", array, icc_profile=lab)).to_numpy(), array)
    assert np.array_equal(Image.load(png("RGB", array, icc_profile=b"junk" * 50)).to_numpy(), array)
    wide = lab.replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))  # its description
    shown = Image.load(png("RGB", array, icc_profile=wide)).to_numpy()
    assert np.abs(shown.astype(int) - 128).max() <= 1  # the same curves: converted to itself


def test_first_frame_of_a_gif(files):
    frame = Image.load(files["film.gif"])
    assert (frame.height, frame.width) == (32, 48)
    assert frame.pixels[:, 10:14, 2:6].mean() > 0.95  # the square, where the film begins


def test_over_blends_alpha():
    image = Image(torch.zeros(3, 1, 1), torch.full((1, 1, 1), 0.25))
    assert image.over((1, 0.5, 0)).pixels.flatten().tolist() == pytest.approx([0.75, 0.375, 0])
    assert image.over().alpha is None


def test_jpeg_shows_alpha_over_white(tmp_path):
    Image(torch.zeros(3, 16, 16), torch.zeros(1, 16, 16)).save(tmp_path / "a.jpg")
    assert (Image.load(tmp_path / "a.jpg").pixels > 0.98).all()


def test_resize_keeps_flat_colours_and_weighs_by_alpha():
    flat = Image(torch.full((3, 8, 8), 0.3)).resize(5, 3)
    assert flat.pixels.shape == (3, 5, 3)
    assert torch.allclose(flat.pixels, torch.tensor(0.3), atol=1e-6)
    # Red beside invisible green: shrunk to one pixel it is still pure red.
    pixels = torch.zeros(3, 2, 2)
    pixels[0, :, 0], pixels[1, :, 1] = 1, 1
    alpha = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    small = Image(pixels, alpha).resize(1, 1, interpolation="bilinear")
    assert small.pixels.flatten().tolist() == pytest.approx([1, 0, 0], abs=1e-5)
    assert small.alpha.item() == pytest.approx(0.5)


def test_crop_center():
    pixels = torch.arange(3 * 5 * 4, dtype=torch.float32).reshape(3, 5, 4) / 60
    crop = Image(pixels).crop_center(2, 2)
    assert torch.equal(crop.pixels, pixels[:, 1:3, 1:3])
    with pytest.raises(ValueError, match="at most 5 × 4"):
        Image(pixels).crop_center(6, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Image(torch.zeros(1, 4, 4)), r"expected \[3, H, W\]"),
        (lambda: Image(torch.zeros(3, 0, 4)), r"expected \[3, H, W\]"),
        (lambda: Image(torch.zeros(3, 4, 4, dtype=torch.uint8)), "torch.uint8"),
        (lambda: Image(torch.zeros(3, 4, 4), torch.zeros(1, 3, 4)), r"expected \(1, 4, 4\)"),
        (lambda: Image.from_numpy(np.zeros((4, 4, 5))), "C = 1 … 4"),
        (lambda: Image.from_numpy(np.full((4, 4), 255.0)), r"\[255, 255\], expected \[0, 1\]"),
        (lambda: Image.from_numpy(np.full((4, 4), np.nan)), "expected"),
        (lambda: Image.from_numpy(np.zeros((4, 4), np.int32)), "int32"),
        (lambda: Image(torch.full((3, 2, 2), torch.nan)).to_numpy(), "NaN"),
        (lambda: Image(torch.zeros(3, 2, 2)).save("x.png", quality=5), "quality is 5"),
        (lambda: Image(torch.zeros(3, 2, 2)).save("x.jpg", quality=101), "1 … 100"),
        (lambda: Image(torch.zeros(3, 2, 2)).save("x.jpg", bits=16), "bits is 16"),
        (lambda: Image(torch.zeros(3, 2, 2)).resize(0, 2), "at least 1"),
        (lambda: Image(torch.zeros(3, 2, 2)).resize(1, 2, interpolation="best"), "bilinear"),
    ],
)
def test_wrong_use_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_saving_elsewhere_is_refused(tmp_path):
    image = Image(torch.zeros(3, 2, 2))
    with pytest.raises(MediaError, match=r"'\.tga', expected \.gif, \.jpeg"):
        image.save(tmp_path / "a.tga")
    with pytest.raises(MediaError, match="cannot be written"):
        image.save(tmp_path / "missing" / "a.png")
    assert list(tmp_path.iterdir()) == []


def bomb_png(width: int, height: int) -> bytes:
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1_000_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(8000, 8000), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_dimensions_are_refused_before_decoding(size):
    with pytest.raises(MediaError, match=r"max_pixels|bomb|exceeds limit"):
        Image.load(bomb_png(*size))


def test_max_pixels_can_be_chosen(files):
    with pytest.raises(MediaError, match="32 × 24, more than max_pixels=100"):
        Image.load(files["a.png"], max_pixels=100)
