"""`.tok` files: a TokenStream as one small safetensors file.

- Codes are packed to their true bit width (12 bits for 4,096 codes), all parts in one U8 tensor named "c".
- Side tensors stand beside it under their own names.
- One metadata string holds the header; `|` separates its fields, so that no quotes need escaping:
  version | crc32 | codec | modality | grid | parts | prefix_step,depth_prefix | meta as JSON.
  A part is written `positions x vocab * depth`, e.g. `86x1024*9`.
- The file costs the packed codes, the side tensors, and under 250 bytes.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import zlib
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .stream import Part, StreamError, TokenStream, code_bits

VERSION = 1
MAX_BYTES = 1 << 30
CODES = "c"
HEADER = "tok"
FIELDS = 8


def write(stream: TokenStream, path: str | Path) -> None:
    """Write `stream` to `path`; a reader sees the old file or the whole new one, never half of it."""
    path = Path(path)
    blob = to_bytes(stream)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise StreamError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise StreamError(f"{path}: cannot be written ({error.strerror})") from error


def read(path: str | Path) -> TokenStream:
    """Read a `.tok` file.

    Raises:
        StreamError: no such file, not a `.tok` file, another version, a wrong checksum, or codes out of range.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise StreamError(f"{path}: {size} bytes, a .tok file has at most {MAX_BYTES}")
        blob = path.read_bytes()
    except OSError as error:
        raise StreamError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return from_bytes(blob)
    except StreamError as error:
        raise StreamError(f"{path}: {error}") from error


def to_bytes(stream: TokenStream) -> bytes:
    """The `.tok` file of `stream`."""
    if CODES in stream.side:
        raise StreamError(f"a side tensor cannot be named {CODES!r}")
    tensors = {CODES: _pack(stream.parts), **stream.side}
    fields = [
        stream.codec,
        stream.modality,
        ",".join(map(str, stream.grid)),
        " ".join(_part_text(part) for part in stream.parts),
        f"{stream.prefix_step or 0},{int(stream.depth_prefix)}",
        json.dumps(dict(stream.meta), separators=(",", ":"), allow_nan=False, ensure_ascii=True),
    ]
    for value in fields[:-1]:
        if "|" in value:
            raise StreamError(f"'|' cannot stand in {value!r}")
    body = "|".join(fields)
    header = f"{VERSION}|{_checksum(body, tensors):08x}|{body}"
    return save_tensors(tensors, metadata={HEADER: header})


def from_bytes(blob: bytes) -> TokenStream:
    """The stream in a `.tok` file; StreamError where it is not one."""
    header = _header(blob)
    version, _, rest = header.partition("|")
    if version != str(VERSION):
        raise StreamError(f"format version {version!r}, this anytok reads {VERSION}")
    crc, _, body = rest.partition("|")
    fields = body.split("|", FIELDS - 3)
    if len(fields) != FIELDS - 2:
        raise StreamError("the header is incomplete")
    try:
        tensors = load_tensors(blob)
    except SafetensorError as error:
        raise StreamError(f"not a readable safetensors file ({error})") from error
    if f"{_checksum(body, tensors):08x}" != crc:
        raise StreamError("the checksum does not match: the file is corrupted")
    codec, modality, grid, parts, rules, meta = fields
    packed = tensors.pop(CODES, None)
    if packed is None or packed.dtype != torch.uint8 or packed.ndim != 1:
        raise StreamError("the packed codes are missing")
    try:
        step, depth_prefix = (int(v) for v in rules.split(","))
        return TokenStream(
            parts=_unpack(packed, [_part_shape(text) for text in parts.split(" ")]),
            codec=codec,
            modality=modality,
            grid=tuple(int(n) for n in grid.split(",") if n),
            prefix_step=step or None,
            depth_prefix=bool(depth_prefix),
            meta=json.loads(meta),
            side=tensors,
        )
    except StreamError:
        raise
    except (ValueError, TypeError) as error:
        raise StreamError(f"the header cannot be read ({error})") from error


def _header(blob: bytes) -> str:
    """The metadata string, read before any tensor is touched."""
    if len(blob) < 8:
        raise StreamError("not a .tok file (too short)" if blob else "the file is empty")
    length = int.from_bytes(blob[:8], "little")
    if length > len(blob) - 8:
        raise StreamError("not a .tok file, or cut short")
    try:
        header = json.loads(blob[8 : 8 + length])
        return str(header["__metadata__"][HEADER])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StreamError("not a .tok file (no anytok header)") from error


def _checksum(body: str, tensors: dict[str, Tensor]) -> int:
    crc = zlib.crc32(body.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        crc = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), crc)
    return crc


def _part_text(part: Part) -> str:
    runs = ((size, len(list(group))) for size, group in groupby(part.vocab))
    vocab = "+".join(f"{size}*{n}" if n > 1 else str(size) for size, n in runs)
    return f"{len(part.codes)}x{vocab}"


def _part_shape(text: str) -> tuple[int, tuple[int, ...]]:
    if not re.fullmatch(r"\d{1,12}x\d{1,10}(\*\d{1,4})?(\+\d{1,10}(\*\d{1,4})?)*", text):
        raise StreamError(f"the part {text!r} cannot be read")
    positions, vocab = text.split("x")
    sizes: list[int] = []
    for run in vocab.split("+"):
        size, _, n = run.partition("*")
        sizes += [int(size)] * int(n or 1)
    return int(positions), tuple(sizes)


def _pack(parts: tuple[Part, ...]) -> Tensor:
    """All codes, most significant bit first, as one run of bits [bytes] (uint8)."""
    bits = [_to_bits(part).reshape(-1) for part in parts]
    return torch.from_numpy(np.packbits(np.concatenate(bits)))


def _to_bits(part: Part) -> np.ndarray:
    columns = []
    for code, size in zip(part.codes.numpy().T, part.vocab):
        shifts = np.arange(code_bits(size) - 1, -1, -1)
        columns.append(((code[:, None] >> shifts) & 1).astype(np.uint8))
    return np.concatenate(columns, axis=1)


def _unpack(packed: Tensor, shapes: list[tuple[int, tuple[int, ...]]]) -> tuple[Part, ...]:
    total = sum(n * sum(code_bits(size) for size in vocab) for n, vocab in shapes)
    if len(packed) != (total + 7) // 8:
        raise StreamError(f"{len(packed)} bytes of codes, the header asks for {(total + 7) // 8}")
    bits = np.unpackbits(packed.numpy())
    parts, start = [], 0
    for n, vocab in shapes:
        widths = [code_bits(size) for size in vocab]
        stop = start + n * sum(widths)
        table = bits[start:stop].reshape(n, sum(widths)).astype(np.int64)
        columns, left = [], 0
        for width in widths:
            weights = 1 << np.arange(width - 1, -1, -1, dtype=np.int64)
            columns.append((table[:, left : left + width] * weights).sum(1))
            left += width
        parts.append(Part(torch.from_numpy(np.stack(columns, axis=1)), vocab))
        start = stop
    return tuple(parts)
