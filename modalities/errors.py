"""The one error that reading and writing media raises.

A file from outside may be empty, cut short, mislabelled or made to hurt. Whatever a library says about it (Pillow
alone knows ten kinds of exception), the caller sees a `MediaError` that names the file and the cause.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_CAUSE = 300  # characters; some libraries quote half the file in their message


class MediaError(ValueError):
    """A file that cannot be read as, or a medium that cannot be written as, what was asked.

    Attributes:
        source: the file's path, or `<memory>` for bytes.
        cause: what was wrong, and where it can be said, what would be right.
    """

    def __init__(self, source: str, cause: str) -> None:
        self.source = source
        self.cause = cause
        super().__init__(f"{source}: {cause}")

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        # Exceptions are rebuilt from `args`; a DataLoader's worker must be able to send this one home.
        return type(self), (self.source, self.cause)


@contextmanager
def translating(
    source: str, failures: tuple[type[BaseException], ...], doing: str
) -> Iterator[None]:
    """Turn a library's own exceptions into a `MediaError`.

    Args:
        source: the name of the file.
        failures: the exceptions that this library is known to raise on bad files.
        doing: what was being done, as in "cannot be read as PNG".
    """
    try:
        yield
    except MediaError:
        raise
    except failures as error:
        detail = " ".join(str(error).split())[:LONGEST_CAUSE] or type(error).__name__
        raise MediaError(source, f"{doing}: {detail}") from error
