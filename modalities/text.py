"""Text: a string, and UTF-8 files of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from .errors import MediaError
from .files import Source, name_of, read_bytes, write_bytes

MAX_BYTES = 2**24  # 16 MiB: three times the Bible; a corpus belongs into Parquet


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        text: any string; line ends are kept as they are.
    """

    text: str
    modality: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"text is a {type(self.text).__name__}, expected str")

    @classmethod
    def load(cls, source: Source, *, max_bytes: int = MAX_BYTES) -> Text:
        """Read UTF-8, with or without a byte-order mark (which is dropped).

        Raises:
            MediaError: empty, longer than `max_bytes`, or not UTF-8 (the message names the byte).
        """
        content = read_bytes(source, max_bytes)
        try:
            return cls(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            cause = f"is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}"
            raise MediaError(name_of(source), cause) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write UTF-8 without a byte-order mark, line ends as they are."""
        try:
            content = self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            cause = f"character {error.start} is half of a surrogate pair and has no UTF-8 form"
            raise MediaError(os.fspath(path), cause) from error
        write_bytes(path, content)
