"""Pictures: float RGB in [0, 1] with an optional alpha, read from and written to PNG, JPEG, WebP and GIF.

- Reading gives sRGB as a viewer shows it: EXIF orientation applied, palettes and grey spread to RGB, a colour profile
  (CMYK, Display P3, …) converted. A profile that LittleCMS cannot read is ignored, as browsers do.
- 8- and 16-bit values survive the way through float32 and back exactly. Pillow reads 16-bit RGB as 8-bit, so
  16-bit PNGs are decoded by torchvision and written here.
- The header's size is checked before a pixel is decoded.

Letters: C channels, H height, W width.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from .complete import refuse_truncated
from .errors import MediaError, translating
from .files import Source, describe, format_of, name_of, read_bytes, sniff, write_bytes

if TYPE_CHECKING:
    import PIL.Image

MAX_PIXELS = 2**25  # 33 million: 400 MB as float32; pass `max_pixels` for more
MAX_BYTES = 2**28  # of a file
FORMATS = ("png", "jpeg", "webp", "gif")
SAVE_SUFFIXES = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".gif": "gif",
}
WHITE = (1.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Image:
    """A picture.

    Attributes:
        pixels: [3, H, W] float32 in [0, 1], sRGB. What lies outside is clamped on conversion to integers.
        alpha: [1, H, W] float32 in [0, 1], 1 = opaque, or None for an opaque picture. Not premultiplied.
    """

    pixels: Tensor
    alpha: Tensor | None = None
    modality: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        _check_plane("pixels", self.pixels, 3)
        if self.alpha is not None:
            _check_plane("alpha", self.alpha, 1)
            if self.alpha.shape[1:] != self.pixels.shape[1:]:
                raise ValueError(
                    f"alpha is {tuple(self.alpha.shape)}, expected {(1, self.height, self.width)}"
                )

    @property
    def height(self) -> int:
        """Rows."""
        return self.pixels.shape[1]

    @property
    def width(self) -> int:
        """Columns."""
        return self.pixels.shape[2]

    @classmethod
    def load(cls, source: Source, *, max_pixels: int = MAX_PIXELS) -> Image:
        """Read PNG, JPEG, WebP or the first frame of a GIF, from a path or from bytes.

        Raises:
            MediaError: empty, cut short, of another kind, or larger than `max_pixels`.
        """
        content, name = read_bytes(source, MAX_BYTES), name_of(source)
        kind = sniff(content)
        if kind not in FORMATS:
            raise MediaError(
                name, f"begins {describe(content)}, which is no PNG, JPEG, WebP or GIF"
            )
        refuse_truncated(io.BytesIO(content), kind, name)
        with (
            translating(name, _pillow_failures(), f"cannot be read as {kind.upper()}"),
            _open(content) as picture,
        ):
            _refuse_bomb(name, picture.size, max_pixels)
            picture.load()
            if kind == "png" and content[_PNG_BIT_DEPTH] == 16:
                return cls.from_numpy(_decode_png16(content, picture.info.get("transparency")))
            return cls.from_pil(_upright(picture))

    def save(
        self, path: str | os.PathLike[str], *, quality: int | None = None, bits: int = 8
    ) -> None:
        """Write PNG, JPEG, WebP or GIF, as the extension says.

        JPEG has no alpha: the picture is laid over white.

        Args:
            path: where to.
            quality: 1 … 100 for JPEG (default 95) and WebP (default: lossless).
            bits: 8, or 16 for PNG only.

        Raises:
            MediaError: unknown extension, or the folder cannot be written.
            ValueError: a quality for a lossless format, or 16 bits for another than PNG.
        """
        kind = format_of(path, SAVE_SUFFIXES)
        if quality is not None and (kind not in ("jpeg", "webp") or not 1 <= quality <= 100):
            raise ValueError(f"quality is {quality} for {kind}, expected 1 … 100 for JPEG or WebP")
        if bits not in ((8, 16) if kind == "png" else (8,)):
            raise ValueError(f"bits is {bits} for {kind}, expected 8, or 16 for PNG")
        if bits == 16:
            write_bytes(path, _encode_png16(self.to_numpy(np.uint16)))
            return
        buffer = io.BytesIO()
        with translating(os.fspath(path), _pillow_failures(), f"cannot be written as {kind}"):
            picture = self.over().to_pil() if kind == "jpeg" else self.to_pil()
            picture.save(buffer, format=kind.upper(), **_save_options(kind, quality))
        write_bytes(path, buffer.getvalue())

    @classmethod
    def from_pil(cls, picture: PIL.Image.Image) -> Image:
        """From any 8-bit, palette, CMYK or 16-bit grey Pillow image; its profile is applied."""
        if picture.mode.startswith("I;16"):
            return cls.from_numpy(np.asarray(picture).astype(np.uint16))
        return cls.from_numpy(np.asarray(_to_srgb(picture)))

    def to_pil(self) -> PIL.Image.Image:
        """An 8-bit Pillow image, RGB or RGBA."""
        import PIL.Image

        return PIL.Image.fromarray(self.to_numpy(np.uint8))

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> Image:
        """From [H, W] or [H, W, C]: grey, grey + alpha, RGB or RGBA (C = 1 … 4).

        Args:
            array: uint8 (0 … 255), uint16 (0 … 65535), or floats in [0, 1].
        """
        if array.ndim == 2:
            array = array[..., None]
        if array.ndim != 3 or not 1 <= array.shape[2] <= 4:
            raise ValueError(f"array is {array.shape}, expected [H, W] or [H, W, C] with C = 1 … 4")
        planes = _scaled(rearrange(torch.from_numpy(_native(array)), "h w c -> c h w").contiguous())
        colours = planes.shape[0] - 1 + planes.shape[0] % 2  # 1, 1, 3, 3
        pixels = planes[:colours]
        if colours == 1:
            pixels = repeat(pixels, "1 h w -> 3 h w")
        alpha = planes[colours:].contiguous() if planes.shape[0] > colours else None
        return cls(pixels.contiguous(), alpha)

    def to_numpy(self, dtype: type = np.uint8) -> np.ndarray:
        """[H, W, 3], or [H, W, 4] with alpha, as `np.uint8`, `np.uint16` or `np.float32`."""
        planes = self.pixels if self.alpha is None else torch.cat([self.pixels, self.alpha])
        planes = rearrange(planes.detach().cpu(), "c h w -> h w c")
        if dtype is np.float32:
            return planes.contiguous().numpy()
        peak = {np.uint8: 255, np.uint16: 65535}.get(dtype)
        if peak is None:
            raise ValueError(f"dtype is {dtype}, expected np.uint8, np.uint16 or np.float32")
        if not torch.isfinite(planes).all():
            raise ValueError("the picture holds NaN or infinite values, expected [0, 1]")
        return (planes.clamp(0, 1) * peak).round().numpy().astype(dtype, order="C")

    def over(self, background: tuple[float, float, float] = WHITE) -> Image:
        """The opaque picture that is seen in front of a background (sRGB values in [0, 1])."""
        if self.alpha is None:
            return self
        behind = self.pixels.new_tensor(background)[:, None, None]  # [3, 1, 1]
        return Image(self.pixels * self.alpha + behind * (1 - self.alpha))

    def resize(self, height: int, width: int, *, interpolation: str = "bicubic") -> Image:
        """Resample to [height, width] with antialiasing; colours are weighted by alpha.

        Args:
            height: of the result.
            width: of the result.
            interpolation: `bicubic` or `bilinear`.
        """
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resize

        modes = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
        if interpolation not in modes:
            raise ValueError(f"interpolation is {interpolation!r}, expected one of {list(modes)}")
        if min(height, width) < 1:
            raise ValueError(f"size is {height} × {width}, expected at least 1 × 1")

        def resample(planes: Tensor) -> Tensor:
            result = resize(planes, [height, width], modes[interpolation], antialias=True)
            return result.clamp(0, 1)

        if self.alpha is None:
            return Image(resample(self.pixels))
        alpha = resample(self.alpha)
        weighted = resample(self.pixels * self.alpha)
        return Image((weighted / alpha.clamp(min=1e-6)).clamp(0, 1), alpha)

    def crop_center(self, height: int, width: int) -> Image:
        """The middle [height, width]; an odd remainder stays at the bottom and on the right."""
        if not (1 <= height <= self.height and 1 <= width <= self.width):
            raise ValueError(
                f"crop is {height} × {width}, expected at most {self.height} × {self.width}"
            )
        top, left = (self.height - height) // 2, (self.width - width) // 2
        window = (slice(None), slice(top, top + height), slice(left, left + width))
        return Image(self.pixels[window], None if self.alpha is None else self.alpha[window])


def is_animated(source: Source) -> bool:
    """Whether a picture file has a second frame (which is all that is looked at)."""
    content, name = read_bytes(source, MAX_BYTES), name_of(source)
    with (
        translating(name, _pillow_failures(), "cannot be read as a picture"),
        _open(content) as picture,
    ):
        _refuse_bomb(name, picture.size, MAX_PIXELS)
        return bool(getattr(picture, "is_animated", False))


_PNG_BIT_DEPTH = 24  # offset: signature 8, length and name of IHDR 8, width 4, height 4
_UPRIGHT = {  # EXIF orientation → Pillow's transposition
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def _pillow_failures() -> tuple[type[BaseException], ...]:
    """What Pillow and torchvision raise on broken files (found by truncating and flipping)."""
    import PIL.Image

    return (
        OSError,  # UnidentifiedImageError, truncated data
        SyntaxError,  # a broken PNG
        ValueError,
        EOFError,
        TypeError,
        IndexError,
        KeyError,
        struct.error,
        zlib.error,
        RuntimeError,  # torchvision's decoders
        OverflowError,
        MemoryError,
        PIL.Image.DecompressionBombError,
        PIL.Image.DecompressionBombWarning,
    )


def _open(content: bytes) -> PIL.Image.Image:
    import PIL.Image

    return PIL.Image.open(io.BytesIO(content), formats=[kind.upper() for kind in FORMATS])


def _refuse_bomb(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        cause = f"is {width} × {height}, more than max_pixels={max_pixels}; pass a larger one"
        raise MediaError(name, cause)


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    import PIL.Image

    turn = _UPRIGHT.get(picture.getexif().get(0x0112, 1))
    return picture if turn is None else picture.transpose(PIL.Image.Transpose[turn])


def _to_srgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """L, RGB or RGBA with 8 bits, in sRGB."""
    profile = picture.info.get("icc_profile")
    if picture.mode in ("LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    elif picture.mode not in ("L", "RGB", "RGBA", "CMYK"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    if profile and picture.mode != "L":
        picture = _apply_profile(picture, profile)
    return picture.convert("RGB") if picture.mode == "CMYK" else picture


def _apply_profile(picture: PIL.Image.Image, profile: bytes) -> PIL.Image.Image:
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return picture  # a conversion would only move values by rounding
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(
            picture, source, ImageCms.createProfile("sRGB"), outputMode=mode
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture  # documented above: an unreadable profile is no reason to refuse the picture
    return converted if converted is not None else picture


def _save_options(kind: str, quality: int | None) -> dict[str, Any]:
    if kind == "jpeg":
        return {"quality": 95 if quality is None else quality, "subsampling": 0}
    if kind == "webp":
        return {"lossless": True, "exact": True} if quality is None else {"quality": quality}
    return {}


def _decode_png16(content: bytes, transparent: Any) -> np.ndarray:
    """[H, W, C] uint16; `transparent` is the colour that a tRNS chunk makes see-through."""
    from torchvision.io import ImageReadMode, decode_png

    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    planes = decode_png(data, ImageReadMode.UNCHANGED).numpy()
    if transparent is not None and planes.shape[0] in (1, 3):
        key = np.asarray(transparent, dtype=np.uint16).reshape(-1, 1, 1)
        opaque = (planes != key).any(axis=0, keepdims=True)
        planes = np.concatenate([planes, opaque.astype(np.uint16) * 65535])
    return rearrange(planes, "c h w -> h w c")


def _encode_png16(array: np.ndarray) -> bytes:
    """A 16-bit PNG of [H, W, 3 or 4] uint16, rows unfiltered."""
    height, width, channels = array.shape
    rows = np.zeros((height, 1 + width * channels * 2), np.uint8)  # first byte: filter type 0
    rows[:, 1:] = array.astype(">u2", order="C").reshape(height, -1).view(np.uint8)
    colour_type = {3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, body) for name, body in chunks)


def _png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _check_plane(name: str, plane: Tensor, channels: int) -> None:
    if plane.ndim != 3 or plane.shape[0] != channels or 0 in plane.shape:
        raise ValueError(f"{name} is {tuple(plane.shape)}, expected [{channels}, H, W]")
    if plane.dtype != torch.float32:
        raise ValueError(f"{name} is {plane.dtype}, expected torch.float32 in [0, 1]")


def _native(array: np.ndarray) -> np.ndarray:
    """C-contiguous, writable and of native byte order, as `torch.from_numpy` wants it."""
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _scaled(planes: Tensor) -> Tensor:
    """Integers or floats to float32 in [0, 1]."""
    peak = {torch.uint8: 255, torch.uint16: 65535}.get(planes.dtype)
    if peak is not None:
        return planes.to(torch.float32).div_(peak)  # in place: pictures are large
    if not planes.is_floating_point():
        raise ValueError(f"array is {planes.dtype}, expected uint8, uint16 or floats")
    low, high = planes.min().item(), planes.max().item()
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ValueError(f"float pixels span [{low:g}, {high:g}], expected [0, 1]")
    return planes.to(torch.float32)
