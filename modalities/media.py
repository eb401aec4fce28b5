"""One door for all media: `load` finds out what a file is, `save` asks the medium."""

from __future__ import annotations

import os
from typing import TypeAlias

from .audio import Audio
from .errors import MediaError
from .files import Source, describe, kind_of, name_of, read_head, suffix_of
from .image import Image, is_animated
from .shape import Shape
from .text import Text
from .video import Video

Media: TypeAlias = Image | Audio | Video | Shape | Text

MODALITIES: dict[str, type] = {
    medium.modality: medium for medium in (Text, Image, Audio, Video, Shape)
}

_MEDIUM: dict[str, type] = {
    "png": Image,
    "jpeg": Image,
    "webp": Image,
    "wav": Audio,
    "flac": Audio,
    "ogg": Audio,
    "aiff": Audio,
    "mp3": Audio,
    "aac": Audio,
    "avi": Video,
    "obj": Shape,
    "ply": Shape,
    "stl": Shape,
    "off": Shape,
    "glb": Shape,
    "text": Text,
}


def load(source: Source) -> Media:
    """Read a file as whatever it is.

    The first bytes decide; the extension only where they cannot. A GIF with more than one frame is a Video, with one
    an Image; an MP4 or Matroska file whose name or brand says that it holds sound alone is an Audio.

    Raises:
        MediaError: not a file of a known kind, or broken; the message names the file and the cause.
    """
    return medium_of(source).load(source)  # type: ignore[attr-defined]


def medium_of(source: Source) -> type:
    """The class that `load` would use."""
    kind = kind_of(source)
    if kind is None:
        start = describe(read_head(source))
        known = ", ".join(sorted(_MEDIUM | {"gif": Image, "mp4": Video, "matroska": Video}))
        raise MediaError(
            name_of(source), f"is of no known kind (it begins {start}), expected one of {known}"
        )
    if kind == "gif":
        return Video if is_animated(source) else Image
    if kind == "mp4":
        sound = suffix_of(source) == ".m4a" or read_head(source)[8:12] in (b"M4A ", b"M4B ")
        return Audio if sound else Video
    if kind == "matroska":
        return Audio if suffix_of(source) == ".mka" else Video
    return _MEDIUM[kind]


def save(media: Media, path: str | os.PathLike[str]) -> None:
    """Write a medium to a file; the extension decides the format."""
    if not isinstance(media, tuple(MODALITIES.values())):
        names = ", ".join(cls.__name__ for cls in MODALITIES.values())
        raise TypeError(f"cannot save a {type(media).__name__}, expected one of {names}")
    media.save(path)
