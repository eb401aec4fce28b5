"""Media: pictures, sounds, films, shapes and texts, read from files and written to them.

Everything here is loaded on first use, so that `import anytok.modalities` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audio import Audio
    from .errors import MediaError
    from .image import Image
    from .media import MODALITIES, Media, load, medium_of, save
    from .shape import Shape
    from .text import Text
    from .video import Video

__all__ = [
    "MODALITIES",
    "Audio",
    "Image",
    "Media",
    "MediaError",
    "Shape",
    "Text",
    "Video",
    "load",
    "medium_of",
    "save",
]

_HOME = {
    "Audio": "audio",
    "Image": "image",
    "MODALITIES": "media",
    "Media": "media",
    "MediaError": "errors",
    "Shape": "shape",
    "Text": "text",
    "Video": "video",
    "load": "media",
    "medium_of": "media",
    "save": "media",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
