"""Sources: where documents come from before they are tokens. A source is a list of documents in a fixed order.

`open_source` finds out what a path is:

- a folder: files of one stem are one document (`cat.png` + `cat.txt`); a lone text is a document of text;
- a folder with `data.jsonl`, or a `.jsonl`/`.json` file: a row is a document, paths are relative to the file;
- `.tar`: a WebDataset, files of one key are one document (a `.json` holds further fields);
- `.parquet`, or a folder of them; a folder that `datasets.save_to_disk` wrote, each of its splits.

A row's fields become items. In this order the first that fits is taken:

    items        [{"text": ...}, {"image": PATH, "role": "user"}, ...]              interleaved, roles where given
    messages     [{"role": ..., "content": STRING or [{"type": "text" | "image", ...}]}], media from `images` in order
    texts        with `images` at equal length: at each place the one that is not null (as OBELICS is written)
    otherwise    a field for each medium, the text first; `columns` names them where they have unusual names

What a row refers to is only read when the document is tokenised, so a bad file is that document's matter alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..codecs.training.data import SUFFIXES, split_of
from ..modalities.errors import MediaError
from ..modalities.media import MODALITIES

Content = str | bytes | Path
FIELDS: dict[str, tuple[str, ...]] = {
    "text": ("text", "caption", "transcript", "transcription", "sentence", "description"),
    "image": ("image", "img", "picture", *(s[1:] for s in SUFFIXES["image"])),
    "audio": ("audio", "speech", "sound", *(s[1:] for s in SUFFIXES["audio"])),
    "video": ("video", "clip", *(s[1:] for s in SUFFIXES["video"])),
    "shape": ("shape", "mesh", *(s[1:] for s in SUFFIXES["shape"])),
}
WEBDATASET_TEXT = ("txt", "text", "caption", "transcript")
KINDS: dict[str, tuple[str, ...]] = {  # suffix -> what such files may hold
    suffix: tuple(m for m, known in SUFFIXES.items() if suffix in known)
    for suffixes in SUFFIXES.values()
    for suffix in suffixes
}
SPLITS = {"train": "train", "training": "train"}  # every other split of a data set is held back


@dataclass(frozen=True)
class RawItem:
    """A medium that is not read yet: a text, the bytes of a file, or its path."""

    modality: str
    content: Content
    role: str | None = None
    name: str = ""

    def load(self) -> Any:
        """The medium. MediaError, with the item's name, where it cannot be read."""
        if self.modality == "text" and isinstance(self.content, str):
            return MODALITIES["text"](self.content)
        try:
            return MODALITIES[self.modality].load(self.content)  # type: ignore[attr-defined]
        except MediaError as error:
            raise MediaError(self.name or error.source, error.cause) from error


@dataclass(frozen=True)
class RawDocument:
    """One document of a source. `row` is what else is known of it, as JSON values."""

    name: str
    split: str
    items: tuple[RawItem, ...]
    row: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Documents in a fixed order. Can be pickled; holds no media."""

    path: Path
    problems: list[MediaError]  # files that could not even be listed

    def __len__(self) -> int: ...

    def listing(self) -> Iterable[str]:
        """What is there, in order: two sources of one listing have the same documents."""
        ...

    def read(self, start: int, stop: int) -> Iterator[RawDocument | MediaError]:
        """Some of the documents; an error in place of one that cannot be read."""
        ...


def open_source(
    path: str | Path, modalities: Sequence[str], columns: Mapping[str, str] | None = None
) -> list[Source]:
    """The source at a path; several where it has several files or splits.

    Args:
        modalities: the media that are wanted, beside text.
        columns: medium -> field, where a table's fields have other names than those of `FIELDS`.

    Raises:
        MediaError: there is nothing, or nothing of a known kind.
    """
    path = Path(path)
    pick = Picker(tuple(m for m in MODALITIES if m == "text" or m in modalities), columns or {})
    if path.is_file():
        return [_file(path, pick)]
    if not path.is_dir():
        raise MediaError(str(path), "there is no such file or folder")
    if (path / "data.jsonl").is_file():
        return [JsonRows(path / "data.jsonl", pick)]
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return [Saved(path / name, pick, SPLITS.get(name, "held")) for name in splits]
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        return [Saved(path, pick, "train")]
    tables = sorted(p for p in path.rglob("*") if p.suffix in (".tar", ".parquet"))
    return [_file(p, pick) for p in tables] or [Folder(path, pick)]


def digest(source: Source) -> str:
    """A hash of a source's listing."""
    made = hashlib.blake2b(digest_size=12)
    for line in source.listing():
        made.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return made.hexdigest()


@dataclass(frozen=True)
class Picker:
    """Chooses a row's items."""

    wanted: tuple[str, ...]  # modalities in order, text first
    columns: Mapping[str, str]

    def items(self, row: Mapping[str, Any], folder: Path | None, name: str) -> tuple[RawItem, ...]:
        """The items of a row.

        Raises:
            MediaError: there are none.
        """
        found = tuple(self._items(row, folder, name))
        if not found:
            fields = ", ".join(key for key, value in row.items() if value is not None) or "none"
            raise MediaError(
                name,
                f"has no {' or '.join(self.wanted)}; its fields are {fields}; "
                "`columns` says which of them hold media",
            )
        return found

    def _items(self, row: Mapping[str, Any], folder: Path | None, name: str) -> Iterator[RawItem]:
        if isinstance(row.get("items"), list):
            for entry in row["items"]:
                yield self._one(entry, folder, name)
        elif isinstance(row.get("messages"), list):
            yield from self._messages(row, folder, name)
        elif isinstance(row.get("texts"), list) and isinstance(row.get("images"), list):
            for text, image in zip(row["texts"], row["images"], strict=True):
                yield self._one({"text": text} if image is None else {"image": image}, folder, name)
        else:
            yield from self._fields(row, folder, name, row.get("role"))

    def _one(self, entry: Mapping[str, Any], folder: Path | None, name: str) -> RawItem:
        """One item of an interleaved document, from which nothing may be missing."""
        found = list(self._fields(entry, folder, name, entry.get("role")))
        if len(found) != 1:
            held = ", ".join(entry) or "nothing"
            known = ", ".join(self.wanted)
            raise MediaError(name, f"an item holds {held}, expected one of {known} (with a codec)")
        return found[0]

    def _fields(
        self, row: Mapping[str, Any], folder: Path | None, name: str, role: str | None
    ) -> Iterator[RawItem]:
        for modality in self.wanted:
            own = self.columns.get(modality)
            keys = (own,) if own else FIELDS[modality]
            value = next((row[k] for k in keys if row.get(k) not in (None, "")), None)
            if value is not None:
                yield _item(modality, value, folder, name, role)

    def _messages(
        self, row: Mapping[str, Any], folder: Path | None, name: str
    ) -> Iterator[RawItem]:
        media = {m: list(row.get(f"{m}s") or ()) for m in self.wanted if m != "text"}
        for message in row["messages"]:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                kind = part["type"]
                if kind not in MODALITIES:
                    raise MediaError(name, f"a message holds {kind!r}, expected text or a medium")
                if kind not in self.wanted:
                    raise MediaError(name, f"a message holds {kind}, for which no codec was given")
                value = part.get(kind)
                if value is None:
                    if not media.get(kind):
                        raise MediaError(name, f"its messages name more {kind}s than it has")
                    value = media[kind].pop(0)
                yield _item(kind, value, folder, name, message.get("role"))


@dataclass
class Folder:
    """A folder of files; those of one stem are one document."""

    path: Path
    pick: Picker
    problems: list[MediaError] = field(default_factory=list)

    def __post_init__(self) -> None:
        stems: dict[str, list[tuple[str, str]]] = {}  # stem -> (name, suffix)
        for folder, folders, files in os.walk(
            self.path
        ):  # of strings: listing is felt in large corpora
            folders.sort()
            relative = os.path.relpath(folder, self.path).replace(os.sep, "/")
            before = "" if relative == "." else f"{relative}/"
            for file in sorted(files):
                stem, suffix = os.path.splitext(file)
                if suffix.lower() in KINDS and not file.startswith("."):
                    own = stems.setdefault(before + stem, [])
                    own.append((before + file, suffix.lower()))
        chosen = ((stem, self._chosen(files)) for stem, files in stems.items())
        self.stems = [(stem, items) for stem, items in chosen if items]

    def __len__(self) -> int:
        return len(self.stems)

    def listing(self) -> Iterable[str]:
        """Names of files."""
        return (name for _, items in self.stems for _, name in items)

    def read(self, start: int, stop: int) -> Iterator[RawDocument | MediaError]:
        """Documents of some stems."""
        for stem, chosen in self.stems[start:stop]:
            items = [RawItem(m, self.path / name, name=name) for m, name in chosen]
            yield RawDocument(stem, split_of(stem), tuple(items))

    def _chosen(self, files: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The wanted files, in the order of media. A text that describes an unwanted medium is none."""
        chosen: dict[str, str] = {}  # name -> modality
        for modality in self.pick.wanted:
            for name, suffix in files:
                if modality in KINDS[suffix]:
                    chosen.setdefault(name, modality)
        only_text = all(modality == "text" for modality in chosen.values())
        media = any("text" not in KINDS[suffix] for _, suffix in files)
        return [] if only_text and media else [(m, name) for name, m in chosen.items()]


@dataclass
class JsonRows:
    """A file of JSON objects, one a line, or one list of them."""

    path: Path
    pick: Picker
    problems: list[MediaError] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            text = self.path.read_text(encoding="utf-8")
            rows = [json.dumps(row) for row in json.loads(text)] if text[:1] == "[" else None
        except ValueError as error:
            raise MediaError(str(self.path), f"is no JSON: {error}") from error
        self.lines = [line for line in rows or text.splitlines() if line.strip()]

    def __len__(self) -> int:
        return len(self.lines)

    def listing(self) -> Iterable[str]:
        """The lines."""
        return self.lines

    def read(self, start: int, stop: int) -> Iterator[RawDocument | MediaError]:
        """Documents of some lines."""
        for i, line in enumerate(self.lines[start:stop], start):
            name = f"{self.path.name}:{i + 1}"
            try:
                row = json.loads(line)
            except ValueError as error:
                yield MediaError(name, f"is no JSON: {error}")
                continue
            split = row.get("split") if isinstance(row, dict) else None
            yield _document(row, self.pick, self.path.parent, name, split or split_of(name))


@dataclass
class Tar:
    """A WebDataset: members of one key (the path up to the first dot of the name) are one document."""

    path: Path
    pick: Picker
    problems: list[MediaError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.samples: dict[str, list[tuple[str, int, int]]] = {}
        try:
            with tarfile.open(self.path, "r:") as tar:  # not compressed: members are read by place
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    if member.isfile() and stem:
                        key = f"{folder}/{stem}" if folder else stem
                        place = (extension.lower(), member.offset_data, member.size)
                        self.samples.setdefault(key, []).append(place)
        except (tarfile.TarError, OSError) as error:
            cause = f"is damaged, or compressed, after {len(self.samples)} samples: {error}"
            self.problems.append(MediaError(str(self.path), cause))
        self.keys = list(self.samples)

    def __len__(self) -> int:
        return len(self.keys)

    def listing(self) -> Iterable[str]:
        """Keys with the places of their members."""
        return (f"{key} {places}" for key, places in self.samples.items())

    def read(self, start: int, stop: int) -> Iterator[RawDocument | MediaError]:
        """Documents of some keys."""
        with self.path.open("rb") as file:
            for key in self.keys[start:stop]:
                row: dict[str, Any] = {}
                for extension, offset, size in self.samples[key]:
                    file.seek(offset)
                    row[extension] = file.read(size)
                yield self._document(row, f"{self.path.name}/{key}", key)

    def _document(self, row: dict[str, Any], name: str, key: str) -> RawDocument | MediaError:
        try:
            fields = json.loads(row.pop("json", "{}"))
            for extension in WEBDATASET_TEXT:
                if extension in row:
                    fields["text"] = row.pop(extension).decode("utf-8")
        except ValueError as error:
            return MediaError(name, f"its text or JSON cannot be read: {error}")
        # dots in an extension mark views ("left.png"): the last part is the kind
        files = {extension.rpartition(".")[2]: content for extension, content in row.items()}
        return _document({**fields, **files}, self.pick, None, name, split_of(key))


@dataclass
class Parquet:
    """A Parquet file; media are bytes, {"bytes", "path"} as `datasets` writes them, or paths beside the file."""

    path: Path
    pick: Picker
    problems: list[MediaError] = field(default_factory=list)

    def __post_init__(self) -> None:
        import pyarrow
        import pyarrow.parquet

        self.groups: list[int] = []
        try:
            about = pyarrow.parquet.ParquetFile(self.path).metadata
        except (pyarrow.ArrowInvalid, OSError) as error:
            self.problems.append(MediaError(str(self.path), f"is no whole Parquet file: {error}"))
        else:
            self.groups = [about.row_group(i).num_rows for i in range(about.num_row_groups)]

    def __len__(self) -> int:
        return sum(self.groups)

    def listing(self) -> Iterable[str]:
        """Name, size, and rows of each group."""
        return [f"{self.path.name} {self.path.stat().st_size} {self.groups}"]

    def read(self, start: int, stop: int) -> Iterator[RawDocument | MediaError]:
        """Documents of some rows."""
        import pyarrow.parquet

        file, first = pyarrow.parquet.ParquetFile(self.path), 0
        for group, count in enumerate(self.groups):
            low, high = max(start, first) - first, min(stop, first + count) - first
            if low < high:
                table = file.read_row_group(group).slice(low, high - low)
                for i, row in enumerate(table.to_pylist(), first + low):
                    name = f"{self.path.name}:{i}"
                    split = SPLITS.get(self.path.name.partition("-")[0]) or row.get("split")
                    split = split if isinstance(split, str) else split_of(name)
                    yield _document(row, self.pick, self.path.parent, name, split)
            first += count


@dataclass
class Saved:
    """One split that `datasets` wrote with `save_to_disk`."""

    path: Path
    pick: Picker
    split: str
    problems: list[MediaError] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = self._open()
        self.count, self.fingerprint = len(rows), rows._fingerprint

    def _open(self) -> Any:
        import datasets

        return datasets.load_from_disk(str(self.path))

    def __len__(self) -> int:
        return self.count

    def listing(self) -> Iterable[str]:
        """The data set's own fingerprint."""
        return [f"{self.fingerprint} {self.count}"]

    def read(self, start: int, stop: int) -> Iterator[RawDocument | MediaError]:
        """Documents of some rows; media as they are stored, not decoded."""
        rows = self._open().with_format("arrow")
        for i in range(start, stop):
            (row,) = rows[i : i + 1].to_pylist()
            yield _document(row, self.pick, self.path, f"{self.path.name}:{i}", self.split)


def _file(path: Path, pick: Picker) -> Source:
    kinds = {".tar": Tar, ".parquet": Parquet, ".jsonl": JsonRows, ".ndjson": JsonRows}
    kind = {**kinds, ".json": JsonRows}.get(path.suffix.lower())
    if kind is None:
        raise MediaError(
            str(path), "is no source; give a folder, .tar, .parquet, .jsonl, or .json file"
        )
    return kind(path, pick)


def _document(
    row: Any, pick: Picker, folder: Path | None, name: str, split: str
) -> RawDocument | MediaError:
    if not isinstance(row, dict):
        return MediaError(name, f"is a {type(row).__name__}, expected an object with fields")
    try:
        items = pick.items(row, folder, name)
    except MediaError as error:
        return error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return MediaError(name, f"its fields are not as described: {error!r}")
    return RawDocument(name, split, items, {k: v for k, v in row.items() if _plain(v)})


def _item(modality: str, value: Any, folder: Path | None, name: str, role: str | None) -> RawItem:
    label = name
    if isinstance(value, dict):  # as `datasets` stores images and sounds
        label = f"{name} ({value['path']})" if value.get("path") else name
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if modality == "text":
        if not isinstance(value, str):
            raise MediaError(name, f"its text is a {type(value).__name__}, expected a string")
        return RawItem("text", value, role, name)
    if isinstance(value, bytes):
        return RawItem(modality, value, role, label)
    if not isinstance(value, str) or folder is None:
        raise MediaError(name, f"its {modality} is a {type(value).__name__}, expected a file")
    if "://" in value:
        raise MediaError(name, f"its {modality} is the address {value}, expected a local file")
    return RawItem(modality, folder / value, role, value)


def _plain(value: Any) -> bool:
    """Whether a field is worth keeping as JSON: words and numbers, no media."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(v, (str, int, float, bool)) for v in value)
    return value is None or isinstance(value, (str, int, float, bool))
