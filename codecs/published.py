"""Weights: finding files, reading tensors from them (and nothing else), and loading them strictly by key.

- safetensors is read as it is; `.bin`, `.pt`, `.pth`, `.ckpt` and `.th` only with `weights_only=True`, so nothing in a
  checkpoint is ever executed.
- Files come from this package (minis), from a path of the user's, or from the hub; where they are on no hub, the error
  says where they are published.
- A codec that we train is one safetensors file with its config as JSON in the metadata (`save_codec`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .codec import Codec, CodecUnavailable

FORMAT = 1
KEY = "anytok"
# The order in which training checkpoints are unwrapped: averaged weights first.
WRAPPERS = ("ema", "model_ema", "model", "state_dict", "module", "generator")
# What torch's tensor-only unpickler raises on damaged or foreign bytes.
BROKEN_PICKLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    struct.error,
)


class WeightsError(ValueError):
    """A weights file is missing, unreadable, or of another model; the message names file and keys."""


@dataclass(frozen=True, kw_only=True)
class File:
    """One published file.

    Args:
        name: file name, as looked for in a folder.
        repo: the hub repository, where it is on the hub.
        asset: the file's name below `anytok/assets/weights`, where it ships with us.
        url: where a person finds it, where it is on no hub.
        sha256: the file's hash, where known (a prefix will do).
        wrapper: the key of a training checkpoint that holds the tensors, where it is not in `WRAPPERS`.
        alternatives: other names under which people keep it.
    """

    name: str
    repo: str | None = None
    asset: str | None = None
    url: str | None = None
    sha256: str | None = None
    wrapper: str | None = None
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weights:
    """Tensors by key, the file's string metadata, and where they came from."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    source: str = "<memory>"

    @property
    def config(self) -> dict:
        """Our JSON header ({} where the file has none)."""
        text = self.metadata.get(KEY)
        if text is None:
            return {}
        try:
            return json.loads(text)
        except ValueError as error:
            raise WeightsError(f"{self.source}: the anytok header is not JSON ({error})") from error


def find(file: File, path: str | Path | None = None) -> Path:
    """The local path of `file`: in or at `path`, in this package, or from the hub.

    Raises:
        WeightsError: `path` was given and does not hold the file.
        CodecUnavailable: the file is on no hub, or the hub cannot be reached; says where it is published.
    """
    if path is not None:
        return _local(file, Path(path))
    if file.asset is not None:
        asset = resources.files("anytok.assets") / "weights" / file.asset
        if not asset.is_file():
            raise CodecUnavailable(f"{file.asset} does not ship with this build of anytok")
        return Path(str(asset))
    if file.repo is not None:
        return _from_hub(file.repo, file.name)
    hint = f", sha256 {file.sha256}" if file.sha256 else ""
    raise CodecUnavailable(
        f"'{file.name}' is on no hub: download it from {file.url}{hint} and pass path='.../{file.name}'"
    )


def _local(file: File, path: Path) -> Path:
    if path.is_file():
        return path
    names = (file.name, *file.alternatives)
    for name in names:
        for candidate in (path / name, path / Path(name).name):
            if candidate.is_file():
                return candidate
    what = "no such file or folder" if not path.exists() else f"holds none of {', '.join(names)}"
    raise WeightsError(f"{path}: {what}")


def _from_hub(repo: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name))
    except LocalEntryNotFoundError as error:
        raise CodecUnavailable(
            f"'{name}' of hub repository '{repo}' is not in the cache and the hub cannot be reached; "
            "download it elsewhere and pass path="
        ) from error
    except EntryNotFoundError as error:
        raise CodecUnavailable(f"hub repository '{repo}' has no file '{name}'") from error
    except (HfHubHTTPError, OSError) as error:
        raise CodecUnavailable(f"'{repo}/{name}' cannot be fetched: {error}") from error


def read_weights(path: str | Path, *, wrapper: str | None = None) -> Weights:
    """Read the tensors of a safetensors, torch or ONNX file; `wrapper` names the sub-dictionary of a checkpoint.

    Raises:
        WeightsError: the file is cut short, of another kind, or holds objects that are not tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix == ".onnx":
        from .audio.cosyvoice.graph import read_onnx

        return read_onnx(path)
    if head[8:9] == b"{":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN_PICKLE as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: not a file of tensors ({why})") from error
    return Weights(_unwrap(content, path, wrapper), source=str(path))


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Weights(tensors, file.metadata() or {}, str(path))
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error})") from error


def _unwrap(content: object, path: Path, wrapper: str | None) -> dict[str, Tensor]:
    for key in (wrapper,) if wrapper else WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"{path}: no tensors found; keys are {_some(content)}")
    return tensors


def load_into(
    module: nn.Module, tensors: Mapping[str, Tensor], *, source: str, ignore: Sequence[str] = ()
) -> None:
    """Load by key, strictly.

    Args:
        ignore: prefixes of keys that published files carry and inference does not need (losses, teachers).

    Raises:
        WeightsError: lists the missing keys, the unexpected ones, and those of another shape.
    """
    wanted = module.state_dict()
    given = {k: v for k, v in tensors.items() if k in wanted or not k.startswith(tuple(ignore))}
    missing = [k for k in wanted if k not in given]
    extra = [k for k in given if k not in wanted]
    shapes = [
        f"{k} is {tuple(v.shape)}, expected {tuple(wanted[k].shape)}"
        for k, v in given.items()
        if k in wanted and v.shape != wanted[k].shape
    ]
    if missing or extra or shapes:
        lines = [f"{source}: these are not the weights of this {type(module).__name__}"]
        for title, keys in (("missing", missing), ("unexpected", extra), ("other shapes", shapes)):
            if keys:
                lines.append(f"  {title} ({len(keys)}): {_some(keys)}")
        raise WeightsError("\n".join(lines))
    module.load_state_dict(given, strict=True)


def _some(keys, limit: int = 12) -> str:
    keys = list(map(str, keys))
    more = f", ... and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def save_codec(
    codec: Codec,
    path: str | Path,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    about: Mapping[str, object] | None = None,
) -> None:
    """Write a codec as one safetensors file, atomically.

    The metadata's JSON names system, name, config, licence and format; `about` adds what else should travel with the
    weights (training data, steps, measures). Floating tensors are stored as `dtype` where given.
    """
    tensors = {k: v.detach().to("cpu").contiguous().clone() for k, v in codec.state_dict().items()}
    if dtype is not None:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    header = {
        "format": FORMAT,
        "system": codec.system,
        "name": name or codec.spec.name,
        "config": dataclasses.asdict(codec.config),
        "weights_licence": codec.spec.weights_licence,
        **(about or {}),
    }
    write_safetensors(tensors, path, {KEY: json.dumps(header)})


def write_safetensors(
    tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]
) -> None:
    """Write a safetensors file so that a reader never sees half of it."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def check_hash(path: Path, expected: str) -> None:
    """Raise WeightsError unless the file's SHA-256 begins with `expected`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if not digest.hexdigest().startswith(expected):
        raise WeightsError(
            f"{path}: sha256 is {digest.hexdigest()}, the published file has {expected}"
        )
