"""Bytes in and out: the only place where this package touches the file system.

- A path is looked at before it is opened, so that a pipe, a device or a folder is refused and nothing hangs.
- A file above a stated size is refused before it is read.
- What a file is decides its content: `sniff` knows the first bytes of every format that we read. A name decides
  only where the content cannot (OBJ and plain text have no magic number).
- Writing goes to a neighbour that replaces the target at the end, so that no half-written file is ever seen.
"""

from __future__ import annotations

import io
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

from .errors import MediaError

Source: TypeAlias = str | os.PathLike[str] | bytes

HEAD_BYTES = 512  # enough for every magic number, and for the codec name in the first Ogg page

SUFFIXES: dict[str, str] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".gif": "gif",
    ".wav": "wav",
    ".flac": "flac",
    ".ogg": "ogg",
    ".oga": "ogg",
    ".opus": "ogg",
    ".aif": "aiff",
    ".aiff": "aiff",
    ".mp3": "mp3",
    ".aac": "aac",
    ".m4a": "mp4",
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mp4",
    ".webm": "matroska",
    ".mkv": "matroska",
    ".mka": "matroska",
    ".avi": "avi",
    ".obj": "obj",
    ".ply": "ply",
    ".stl": "stl",
    ".off": "off",
    ".glb": "glb",
    ".txt": "text",
    ".md": "text",
}


def name_of(source: Source) -> str:
    """The name to use in messages: the path, or `<memory>` for bytes."""
    return "<memory>" if isinstance(source, bytes) else os.fspath(source)


def suffix_of(source: Source) -> str:
    """The lower-case extension with its dot; empty for bytes."""
    return "" if isinstance(source, bytes) else Path(source).suffix.lower()


@contextmanager
def opened(source: Source) -> Iterator[BinaryIO]:
    """A seekable binary file for a path or for bytes, closed at the end.

    Raises:
        MediaError: the path is missing, empty, unreadable, or no regular file.
    """
    if isinstance(source, bytes):
        if not source:
            raise MediaError("<memory>", "is empty")
        yield io.BytesIO(source)
        return
    _regular_size(source)
    try:
        file = open(source, "rb")  # noqa: SIM115 (closed below; only opening is translated)
    except OSError as error:
        raise MediaError(name_of(source), f"cannot be opened: {error.strerror}") from error
    with file:
        yield file


def read_bytes(source: Source, max_bytes: int) -> bytes:
    """The whole content, unless it is longer than `max_bytes`."""
    size = len(source) if isinstance(source, bytes) else _regular_size(source)
    if size > max_bytes:
        raise MediaError(
            name_of(source), f"has {size} bytes, more than the limit of {max_bytes} for its kind"
        )
    with opened(source) as file:
        return file.read(max_bytes)


def read_head(source: Source) -> bytes:
    """The first `HEAD_BYTES` bytes."""
    with opened(source) as file:
        return file.read(HEAD_BYTES)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`; when the block ends well it takes the place of `path`."""
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise MediaError(str(target), f"cannot be written: {error.strerror}") from error
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise MediaError(str(target), f"cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file at once, or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def format_of(path: str | os.PathLike[str], known: dict[str, str]) -> str:
    """The format that a file name asks for when saving, out of `known` (suffix → format)."""
    suffix = Path(path).suffix.lower()
    if suffix not in known:
        choices = ", ".join(sorted(known))
        raise MediaError(str(path), f"has extension {suffix or '(none)'!r}, expected {choices}")
    return known[suffix]


def sniff(head: bytes) -> str | None:
    """The format that the first bytes prove, as one of the values of `SUFFIXES`, or None.

    Text-like formats without a magic number (OBJ, plain text) and binary STL give None.
    """
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:4] in (b"RIFF", b"RF64"):
        return {b"WAVE": "wav", b"WEBP": "webp", b"AVI ": "avi"}.get(head[8:12])
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"pnot"):
        return "mp4"
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        # The layer bits: 00 is AAC's ADTS header, everything else MPEG audio.
        return "mp3" if head[1] & 0x06 else "aac"
    return None


def kind_of(source: Source) -> str | None:
    """What a file is: by its first bytes, else by its name, else `text` where it reads as UTF-8."""
    head = read_head(source)
    kind = sniff(head) or SUFFIXES.get(suffix_of(source))
    if kind is not None:
        return kind
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # Only the cut at the end of the head may fall into a character.
        if error.start < HEAD_BYTES - 4:
            return None
    return None if b"\0" in head else "text"


def describe(head: bytes) -> str:
    """A few first bytes, for messages."""
    return repr(head[:12])


_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (b"ID3", "mp3"),
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"glTF", "glb"),
    (b"ply\n", "ply"),
    (b"ply\r", "ply"),
    (b"OFF", "off"),
    (b"COFF", "off"),
    (b"solid ", "stl"),
)


def _regular_size(path: str | os.PathLike[str]) -> int:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        detail = error.strerror if isinstance(error, OSError) else str(error)
        raise MediaError(name_of(path), f"cannot be opened: {detail}") from error
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(name_of(path), "is a folder, expected a file")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(name_of(path), "is a pipe or a device, expected a regular file")
    if status.st_size == 0:
        raise MediaError(name_of(path), "is empty")
    return status.st_size
