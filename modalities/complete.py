"""Is a file all there? The outer structure of each container says how long it ought to be.

The decoding libraries play a file that was cut short as far as it goes and say nothing. A medium that silently lost its
end is worse than an error, so the walk over the outermost boxes is done here, without decoding anything. MP3, ADTS
and live streams promise no length; they pass.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import BinaryIO

from .errors import MediaError

MAX_BOXES = 100_000  # top-level boxes or GIF blocks; real files have tens, long GIFs thousands
_UNKNOWN_SIZES = (0, 0xFFFFFFFF, 0x7FFFFFFF)  # written by encoders that could not seek back


def refuse_truncated(file: BinaryIO, kind: str, name: str) -> None:
    """Raise unless the file is as long as it claims. The file's position is put back.

    Args:
        file: seekable.
        kind: as `files.sniff` names it; kinds that promise nothing pass.
        name: for the message.

    Raises:
        MediaError: bytes are missing at the end.
    """
    walk = _WALKS.get(kind)
    if walk is None:
        return
    position = file.tell()
    present = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        promised = walk(file, present)
    except (struct.error, IndexError) as error:
        raise MediaError(name, f"is cut short: its {kind} structure ends early") from error
    finally:
        file.seek(position)
    if promised > present:
        raise MediaError(
            name, f"is cut short: {kind} promises {promised} bytes, {present} are there"
        )


def _png(file: BinaryIO, present: int) -> int:
    """The end of the chunk IEND."""
    offset = 8
    for _ in range(MAX_BOXES):
        file.seek(offset)
        length, chunk = struct.unpack(">I4s", file.read(8))
        offset += 12 + length
        if chunk == b"IEND":
            break
    return offset


def _riff(file: BinaryIO, present: int) -> int:
    (size,) = struct.unpack("<4xI", file.read(8))
    return present if size in _UNKNOWN_SIZES else 8 + size


def _aiff(file: BinaryIO, present: int) -> int:
    (size,) = struct.unpack(">4xI", file.read(8))
    return present if size in _UNKNOWN_SIZES else 8 + size


def _mp4(file: BinaryIO, present: int) -> int:
    """The end of the last top-level box; 64-bit sizes and "to the end of the file" are known."""
    offset, moov = 0, False
    for _ in range(MAX_BOXES):
        if offset >= present:
            break
        file.seek(offset)
        size, box = struct.unpack(">I4s", file.read(8))
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(8))
        if size == 0:
            return present
        if size < 8:
            raise IndexError("a box shorter than its header")
        moov = moov or box in (b"moov", b"moof")
        offset += size
    if not moov and offset >= present:
        raise IndexError("no index")  # the part that says what the bytes mean is missing
    return offset


def _matroska(file: BinaryIO, present: int) -> int:
    """The end of the first Segment; a live stream's unknown size passes."""
    file.seek(4)
    header = _ebml_size(file)
    file.seek(header or 0, os.SEEK_CUR)
    if struct.unpack(">I", file.read(4))[0] != 0x18538067:
        raise IndexError("no segment")
    segment = _ebml_size(file)
    return present if segment is None else file.tell() + segment


def _ebml_size(file: BinaryIO) -> int | None:
    """A variable-length integer; all ones means unknown."""
    first = file.read(1)[0]
    length = 9 - first.bit_length()
    rest = file.read(length - 1)
    if length > 8 or len(rest) < length - 1:
        raise IndexError("a broken length")
    bits = 7 * length
    value = int.from_bytes(bytes([first]) + rest, "big") & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value


def _ogg(file: BinaryIO, present: int) -> int:
    """The last page must be marked as the end of its stream."""
    file.seek(max(0, present - 2 * 65536))  # a page is at most 65,307 bytes long
    tail = file.read()
    page = tail.rfind(b"OggS")
    if page < 0 or not tail[page + 5] & 0x04:
        return present + 1
    segments = tail[page + 26]
    body = sum(tail[page + 27 : page + 27 + segments])
    return present - len(tail) + page + 27 + segments + body


def _gif(file: BinaryIO, present: int) -> int:
    """Walk the blocks up to the trailer."""
    flags = struct.unpack("<10xBxx", file.read(13))[0]
    _skip_palette(file, flags)
    for _ in range(MAX_BOXES):
        block = file.read(1)[0]
        if block == 0x3B:
            return file.tell()
        if block == 0x21:
            file.seek(1, os.SEEK_CUR)
        elif block == 0x2C:
            _skip_palette(file, struct.unpack("<8xB", file.read(9))[0])
            file.seek(1, os.SEEK_CUR)
        else:
            raise IndexError("an unknown block")
        while length := file.read(1)[0]:
            file.seek(length, os.SEEK_CUR)
    return present


def _skip_palette(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        file.seek(3 * 2 ** ((flags & 7) + 1), os.SEEK_CUR)


_WALKS: dict[str, Callable[[BinaryIO, int], int]] = {
    "png": _png,
    "wav": _riff,
    "avi": _riff,
    "webp": _riff,
    "aiff": _aiff,
    "mp4": _mp4,
    "matroska": _matroska,
    "ogg": _ogg,
    "gif": _gif,
}
