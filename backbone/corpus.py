"""Corpora: rows of a recipe's `data.jsonl`, tokenised once, as Parquet shards of token documents.

    OUT/corpus.json           format, and for each medium the codec's rule (`name@fingerprint`, layout)
    OUT/shard-00000.parquet   one row for each row of the recipe and each copy of it

Columns: `item` (the row's number), `copy` (0 as it is, others augmented), `split`, `row` (the recipe's row as JSON),
and for each medium M: `M` (each part's codes, positions x depths in one list) and `M.grid`. datasets, pyarrow,
Spark and DuckDB read them. A shard is written whole or not at all, and a run that was killed goes on with the next one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ..codecs.codec import Codec
from ..codecs.stream import Part, TokenStream
from ..codecs.training.data import DataError
from ..codecs.training.loader import derived
from ..modalities.media import MODALITIES
from .rules import Rule

FORMAT = 1
Augment = Callable[[object, torch.Generator], object]


class CorpusError(DataError):
    """A corpus is missing, damaged, or was tokenised with another codec; names the file and what was expected."""


@dataclass(frozen=True)
class Document:
    """One row of a recipe, as streams by modality. `copy` 0 is the medium as it is."""

    item: int
    copy: int
    split: str
    row: Mapping[str, object]
    records: Mapping[str, tuple[Rule, list[list[int]], list[int]]]

    @property
    def modalities(self) -> set[str]:
        """What the document holds."""
        return set(self.records)

    def stream(self, modality: str) -> TokenStream:
        """The stream of a modality."""
        return _stream(*self.records[modality])


def tokenize(
    source: str | Path,
    out: str | Path,
    codecs: Mapping[str, Codec],
    *,
    copies: int = 1,
    augment: Mapping[str, Augment] | None = None,
    splits: Sequence[str] = ("train",),
    seed: int = 0,
    batch: int = 64,
    shard: int = 256,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Tokenise the recipe folder `source` into `out`; returns `out`.

    Args:
        codecs: modality -> codec.
        copies: how often an item of `splits` is tokenised: once as it is, else through `augment`. Others: once.
        augment: modality -> what makes another copy of a medium.
        shard: items a file.
        share: (i, n): this process does every n-th shard, from the i-th.
        progress: called with (items done, items).

    Raises:
        CorpusError: `out` holds a corpus of other settings.
    """
    source, out = Path(source), Path(out)
    lines = (source / "data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    _claim(out, codecs, {"copies": copies, "splits": list(splits), "seed": seed, "shard": shard})
    read = _Reader(source, rows, augment or {}, seed)
    for start in range(share[0] * shard, len(rows), share[1] * shard):
        path = out / f"shard-{start // shard:05d}.parquet"
        if not path.is_file():
            jobs = [
                (item, copy)
                for item in range(start, min(start + shard, len(rows)))
                for copy in range(copies if rows[item]["split"] in splits else 1)
            ]
            _write(list(_encode(read, jobs, codecs, batch)), path)
        if progress is not None:
            progress(min(start + shard, len(rows)), len(rows))
    return out


class Corpus:
    """A tokenised corpus, read into memory.

    Raises:
        CorpusError: no corpus, or a damaged shard.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        rules = _about(self.path)["rules"]
        self.rules = {m: Rule.from_json(rule) for m, rule in rules.items()}
        self.documents = list(self._read())

    def check(self, rules: Iterable[Rule]) -> None:
        """Raise CorpusError where the corpus was tokenised with another codec than one of `rules`."""
        for rule in rules:
            own = self.rules.get(rule.modality)
            if own is not None and own.codec != rule.codec:
                raise CorpusError(
                    f"{self.path} was tokenised with '{own.codec}', the model reads '{rule.codec}'"
                )

    def items(self, split: str) -> list[list[Document]]:
        """The copies of each item of a split."""
        grouped: dict[int, list[Document]] = {}
        for document in self.documents:
            if document.split == split:
                grouped.setdefault(document.item, []).append(document)
        return list(grouped.values())

    def _read(self) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        text, row = "", {}
        for path in sorted(self.path.glob("shard-*.parquet")):
            try:
                table = pyarrow.parquet.read_table(path)
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise CorpusError(f"{path}: not a whole Parquet file ({error})") from error
            for record in table.to_pylist():
                held = {
                    m: (rule, record[m], record[f"{m}.grid"])
                    for m, rule in self.rules.items()
                    if record[m]
                }
                if record["row"] != text:  # copies of an item stand together and share its row
                    text, row = record["row"], json.loads(record["row"])
                yield Document(record["item"], record["copy"], record["split"], row, held)


def _stream(rule: Rule, parts: list[list[int]], grid: list[int]) -> TokenStream:
    tables = []
    for codes, vocab in zip(parts, rule.vocab):
        table = rearrange(torch.tensor(codes, dtype=torch.int64), "(n d) -> n d", d=len(vocab))
        tables.append(Part(table, vocab))
    return TokenStream(
        parts=tuple(tables),
        codec=rule.codec,
        modality=rule.modality,
        grid=tuple(grid),
        prefix_step=rule.prefix_step,
        depth_prefix=rule.depth_prefix,
        meta=rule.meta,
    )


def _claim(out: Path, codecs: Mapping[str, Codec], settings: dict[str, object]) -> None:
    rules = {m: Rule.of(codec).to_json() for m, codec in codecs.items()}
    mine = json.loads(json.dumps({"format": FORMAT, "rules": rules, "settings": settings}))
    path = out / "corpus.json"
    if path.is_file():
        if json.loads(path.read_text()) != mine:
            raise CorpusError(
                f"{out} holds a corpus of other codecs or settings; give another folder"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=1) + "\n")


def _about(path: Path) -> dict:
    try:
        about = json.loads((path / "corpus.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"{path}: holds no corpus.json ({error}); run `tokenize` first"
        ) from error
    if about.get("format") != FORMAT:
        raise CorpusError(f"{path}: format {about.get('format')!r}, this anytok reads {FORMAT}")
    return about


def _encode(
    read: _Reader, jobs: list[tuple[int, int]], codecs: Mapping[str, Codec], batch: int
) -> Iterator[dict]:
    for start in range(0, len(jobs), batch):
        chunk = jobs[start : start + batch]
        records = [_record(read.rows[item], item, copy) for item, copy in chunk]
        for modality, codec in codecs.items():
            have = [i for i, (item, _) in enumerate(chunk) if read.rows[item].get(modality)]
            media = [read(*chunk[i], modality) for i in have]
            with torch.inference_mode():
                streams = codec.encode(media) if media else []
            for record in records:
                record[modality], record[f"{modality}.grid"] = None, None
            for i, one in zip(have, streams):
                records[i][modality] = [part.codes.flatten().tolist() for part in one.parts]
                records[i][f"{modality}.grid"] = list(one.grid)
        yield from records


def _record(row: dict, item: int, copy: int) -> dict:
    return {
        "item": item,
        "copy": copy,
        "split": row["split"],
        "row": json.dumps(row, ensure_ascii=False),
    }


class _Reader:
    """Media of a recipe's rows; the copies of one item are made from one reading."""

    def __init__(self, source: Path, rows: list[dict], augment: Mapping[str, Augment], seed: int):
        self.source, self.rows, self.augment, self.seed = source, rows, augment, seed
        self._last: dict[str, tuple[int, object]] = {}

    def __call__(self, item: int, copy: int, modality: str) -> object:
        place, medium = self._last.get(modality, (-1, None))
        if place != item:
            value = self.rows[item][modality]
            cls = MODALITIES[modality]
            medium = cls(value) if modality == "text" else cls.load(self.source / value)
            self._last[modality] = (item, medium)
        if copy == 0 or modality not in self.augment:
            return medium
        rng = torch.Generator().manual_seed(derived(self.seed, item, copy))
        return self.augment[modality](medium, rng)


def _write(records: list[dict], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    partial = path.with_name(f".{path.name}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), partial, compression="zstd")
    partial.replace(path)


def changed_picture(image, rng: torch.Generator, *, size: int = 64):
    """Another copy of a drawing; see `changed`."""
    from ..modalities.image import Image

    alpha = image.alpha if image.alpha is not None else torch.ones_like(image.pixels[:1])
    return Image(changed(torch.cat([image.pixels, alpha])[None], size, rng)[0])


def changed(pictures: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Drawings scaled, turned, shifted and sheared a little, recoloured, on white or on a flat colour.

    Small models otherwise learn a drawing's exact codes by heart instead of what it shows.

    Args:
        pictures: [B, 4, H, W] in [0, 1], with alpha, not premultiplied.

    Returns:
        [B, 3, size, size].
    """
    n = len(pictures)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        values = torch.rand(n, *shape, generator=rng, device=rng.device)
        return (low + (high - low) * values).to(pictures.device)

    angle, scale = draw(-0.2, 0.2), 1 / draw(0.75, 1.15)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    x, y = draw(-0.1, 0.1), draw(-0.1, 0.1)
    rows = [cos * draw(0.9, 1.1), -sin, x], [sin, cos * draw(0.9, 1.1), y]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = torch.nn.functional.affine_grid(theta, [n, 4, size, size], align_corners=False)
    planes = torch.cat([pictures[:, :3] * pictures[:, 3:], pictures[:, 3:]], 1)
    half = torch.nn.functional.interpolate(planes, size=(size, size), mode="area")
    planes = torch.nn.functional.grid_sample(half, grid, mode="bicubic", align_corners=False)
    colour, alpha = planes[:, :3], planes[:, 3:].clamp(0, 1)
    grey = colour.mean(1, keepdim=True)
    colour = grey + (colour - grey) * draw(0.7, 1.3, 1, 1, 1)
    colour = colour * draw(0.85, 1.15, 3, 1, 1) * draw(0.85, 1.15, 1, 1, 1)
    white = draw(0, 1, 1, 1, 1) < 0.6
    ground = torch.where(white, torch.ones_like(colour[:, :, :1, :1]), draw(0, 1, 3, 1, 1))
    return (colour + ground * (1 - alpha)).clamp(0, 1)
