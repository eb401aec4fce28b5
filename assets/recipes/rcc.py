"""Read Qt resource bundles (`.rcc`, format versions 1 to 3), which is how GCompris packs its pictures.

Layout: a header with three offsets; a table of nodes (a folder names its first child and their count, a file its
data); the names (UTF-16); the data, each with its length, plain or deflated.
"""

import struct
import zlib
from collections.abc import Iterator

FOLDER, DEFLATED, ZSTD = 2, 1, 4
MAX_NODES = 100_000
MAX_FILE = 64 * 1024**2


class RccError(ValueError):
    """The bytes are no Qt resource bundle that can be read here."""


def rcc_files(bundle: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and contents of every file of a bundle."""
    try:
        magic, version, tree, data, names = struct.unpack_from(">4s4I", bundle)
        if magic != b"qres" or not 1 <= version <= 3:
            raise RccError(f"expected a Qt resource bundle of version 1 to 3, got {bundle[:8]!r}")
        node_size = 14 if version == 1 else 22
        todo, seen = [("", 0)], 0
        while todo:
            prefix, index = todo.pop()
            at = tree + index * node_size
            name_at, flags = struct.unpack_from(">IH", bundle, at)
            path = f"{prefix}/{_name(bundle, names + name_at)}" if index else ""
            seen += 1
            if seen > MAX_NODES:
                raise RccError(f"more than {MAX_NODES} entries: the node table runs in a circle")
            if flags & FOLDER:
                count, first = struct.unpack_from(">II", bundle, at + 6)
                if count > MAX_NODES:
                    raise RccError(f"{path} claims {count} children, expected at most {MAX_NODES}")
                todo += [(path, first + i) for i in range(count)]
            else:
                (data_at,) = struct.unpack_from(">I", bundle, at + 10)
                yield path.lstrip("/"), _contents(bundle, data + data_at, flags)
    except (struct.error, zlib.error) as error:
        raise RccError(f"damaged Qt resource bundle: {error}") from error


def _name(bundle: bytes, at: int) -> str:
    (length,) = struct.unpack_from(">H", bundle, at)
    return bundle[at + 6 : at + 6 + 2 * length].decode("utf-16-be", "replace")


def _contents(bundle: bytes, at: int, flags: int) -> bytes:
    (length,) = struct.unpack_from(">I", bundle, at)
    stored = bundle[at + 4 : at + 4 + length]
    if len(stored) != length:
        raise RccError(f"damaged Qt resource bundle: {len(stored)} bytes of {length} are there")
    if flags & ZSTD:
        raise RccError("the bundle is packed with zstd, expected deflate or none")
    if not flags & DEFLATED:
        return stored
    unpacker = zlib.decompressobj()  # the first four bytes repeat the unpacked length
    contents = unpacker.decompress(stored[4:], MAX_FILE)
    if not unpacker.eof:
        raise RccError(f"a file is truncated or unpacks to more than {MAX_FILE} bytes")
    return contents
