"""Shards: documents of text and token streams, as Parquet files that are written once and streamed often.

    OUT/corpus.json           {"format": 2, "rules": medium -> rule, "sources": [...], "settings": {...}, "shards": n}
    OUT/shard-00000.parquet   one row for each document
    OUT/errors.jsonl          {"document", "error"} for each that could not be tokenised, once the corpus is whole

Columns (an item is a text or a stream; the lists of one row have one entry for each item, in order):

    name    string                  which document of the source it is
    split   string                  "train", or another one, which is held back
    kinds   list<string>            "text", "image", "audio", "video", "shape"
    roles   list<string>            who says it ("user", "assistant"), or null
    texts   list<string>            the text as it is (tokenizers change; media need not be tokenised again), or null
    codes   list<list<list<int32>>> each part of the stream, positions x depths in one list; empty for a text
    grids   list<list<int32>>       what the positions mean
    metas   list<string>            JSON: what the codec's decoder needs beside the codes
    row     string                  JSON: the other fields of the source's row

A shard's metadata hold "anytok": {"errors": [...]}: documents that were skipped, so they become known with the shard or
not at all. Which documents a shard holds follows from the sources' listings alone, each shard is written whole or not
at all, and a worker computes with one thread: whoever is killed and started again, the files are the same.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codecs.codec import Codec, CodecUnavailable
from ..codecs.registry import load_codec
from ..codecs.stream import Part, TokenStream
from ..modalities.errors import MediaError
from ..modalities.files import replacing
from .corpus import CorpusError
from .rules import Rule
from .sources import RawDocument, RawItem, Source, digest, open_source

FORMAT = 2
SHARD, BATCH = 512, 16  # documents
FAILURES = (ValueError, RuntimeError, OSError)  # what a medium may make a codec raise
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Chunk:
    """The documents of one shard: `start` to `stop` of a source."""

    number: int
    source: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a corpus holds: documents that were tokenised, and what was skipped and why."""

    path: Path
    documents: int
    errors: tuple[Mapping[str, str], ...]
    shards: int


def tokenize(
    sources: Iterable[str | Path],
    out: str | Path,
    codecs: Mapping[str, str | Codec],
    *,
    workers: int = 1,
    columns: Mapping[str, str] | None = None,
    shard: int = SHARD,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Report:
    """Tokenise sources (see `sources`) into the corpus `out`; goes on where a run was stopped.

    Args:
        codecs: medium -> codec, or its name. With workers a codec itself must be picklable.
        workers: processes, each with its own codecs and one thread; 1 works in this process.
        columns: medium -> field of a table, where it has another name than those that `sources` knows.
        shard: documents a file.
        batch: documents that are encoded together.
        progress: called with (documents done, documents).

    Raises:
        MediaError: a source is not there, or nothing of it could be tokenised.
        CorpusError: `out` holds a corpus of other sources, codecs or settings, or a worker died.
    """
    job = plan(sources, out, codecs, columns=columns, shard=shard, batch=batch)
    total = sum(len(source) for source in job.sources)
    pending = job.pending()
    done = total - sum(c.stop - c.start for c in pending)
    if progress is not None:
        progress(done, total)
    for chunk in (
        _in_this_process(job, pending) if workers == 1 else _spawned(job, pending, workers)
    ):
        done += chunk.stop - chunk.start
        if progress is not None:
            progress(done, total)
    return job.finish()


@dataclass
class Job:
    """What is to be tokenised, how, and where to. Can be pickled."""

    out: Path
    sources: list[Source]
    codecs: Mapping[str, str | Codec]
    rules: Mapping[str, Rule]
    chunks: list[Chunk]
    batch: int
    _loaded: dict[str, Codec] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": {}}

    def path(self, chunk: Chunk) -> Path:
        """The file of a chunk."""
        return self.out / f"shard-{chunk.number:05d}.parquet"

    def pending(self) -> list[Chunk]:
        """What is not written yet."""
        return [chunk for chunk in self.chunks if not self.path(chunk).is_file()]

    def run(self, chunk: Chunk) -> Chunk:
        """Tokenise one chunk into its shard."""
        with _one_thread():
            records, errors = self._encode(self.sources[chunk.source].read(chunk.start, chunk.stop))
        _write(records, errors, self.path(chunk))
        return chunk

    def finish(self) -> Report:
        """Write `errors.jsonl`, and say what the corpus holds.

        Raises:
            MediaError: nothing could be tokenised.
        """
        import pyarrow.parquet

        documents = 0
        errors = [_error(p.source, p) for source in self.sources for p in source.problems]
        for chunk in self.chunks:
            about = pyarrow.parquet.read_metadata(self.path(chunk))
            documents += about.num_rows
            errors += json.loads(about.metadata[b"anytok"])["errors"]
        with replacing(self.out / "errors.jsonl") as path:
            path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in errors))
        for partial in self.out.glob(".shard-*"):  # of runs that were killed
            partial.unlink()
        if documents == 0:
            cause = f"all {len(errors)} documents are bad; the first: {errors[0]['error']}"
            raise MediaError(str(self.out), cause)
        return Report(
            path=self.out, documents=documents, errors=tuple(errors), shards=len(self.chunks)
        )

    def codec(self, modality: str) -> Codec:
        """A codec, loaded once."""
        if modality not in self._loaded:
            given = self.codecs[modality]
            codec = load_codec(given) if isinstance(given, str) else given
            if codec.identity != self.rules[modality].codec:
                raise CorpusError(
                    f"the corpus is of '{self.rules[modality].codec}', this process loaded '{codec.identity}'"
                )
            self._loaded[modality] = codec
        return self._loaded[modality]

    def _encode(
        self, raws: Iterable[RawDocument | MediaError]
    ) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        records: list[dict[str, Any]] = []
        errors: list[dict[str, str]] = []
        for group in _batched(raws, self.batch):
            whole = []
            for raw in group:
                try:
                    if isinstance(raw, MediaError):
                        raise raw
                    whole.append((raw, [_loaded(item) for item in raw.items]))
                except (*FAILURES, MemoryError) as error:
                    errors.append(_error(getattr(raw, "name", getattr(raw, "source", "")), error))
            for (raw, media), made in zip(whole, self._streams(whole)):
                bad = next((s for s in made if isinstance(s, BaseException)), None)
                if bad is None:
                    records.append(_record(raw, media, made))
                else:
                    errors.append(_error(raw.name, bad))
        return records, errors

    def _streams(self, documents: list[tuple[RawDocument, list[Any]]]) -> list[list[Any]]:
        """For each document and item its stream, None for a text, or the error that it caused."""
        made: list[list[Any]] = [[None] * len(media) for _, media in documents]
        for modality in self.codecs:
            places = [
                (d, i)
                for d, (raw, _) in enumerate(documents)
                for i, item in enumerate(raw.items)
                if item.modality == modality
            ]
            media = [documents[d][1][i] for d, i in places]
            for (d, i), stream in zip(places, _encoded(self.codec(modality), media)):
                made[d][i] = stream
        return made


def plan(
    sources: Iterable[str | Path],
    out: str | Path,
    codecs: Mapping[str, str | Codec],
    *,
    columns: Mapping[str, str] | None = None,
    shard: int = SHARD,
    batch: int = BATCH,
) -> Job:
    """Open the sources, divide them into shards, and lay claim to `out`. See `tokenize`."""
    out = Path(out)
    if not codecs or "text" in codecs:
        raise CorpusError("give codecs of media, such as image=onedpiece/mini; text stays text")
    loaded = {m: load_codec(c) if isinstance(c, str) else c for m, c in codecs.items()}
    rules = {m: _rule(m, codec) for m, codec in loaded.items()}
    opened = [s for path in sources for s in open_source(path, list(codecs), columns)]
    if sum(len(source) for source in opened) == 0:
        problems = "; ".join(str(p) for s in opened for p in s.problems)
        names = ", ".join(str(s.path) for s in opened)
        raise MediaError(names, problems or f"holds no text and no {' or '.join(codecs)}")
    chunks: list[Chunk] = []
    for number, source in enumerate(opened):
        for start in range(0, len(source), shard):
            stop = min(start + shard, len(source))
            chunks.append(Chunk(len(chunks), number, start, stop))
    job = Job(out, opened, codecs, rules, chunks, batch, loaded)
    _claim(job, {"shard": shard, "batch": batch, "columns": dict(columns or {})})
    return job


def tokenize_ray(
    sources: Iterable[str | Path],
    out: str | Path,
    codecs: Mapping[str, str | Codec],
    *,
    workers: int = 2,
    cpus: float = 1,
    gpus: float = 0,
    columns: Mapping[str, str] | None = None,
    shard: int = SHARD,
    batch: int = BATCH,
) -> Report:
    """`tokenize` on a Ray cluster (the extra `anytok[ray]`), whose machines share the sources and `out`.

    Args:
        workers: actors, each with its own codecs.
        cpus, gpus: what Ray reserves for each.
    """
    import ray

    job = plan(sources, out, codecs, columns=columns, shard=shard, batch=batch)
    pending = [{"chunk": chunk.number} for chunk in job.pending()]
    if pending:
        rows = ray.data.from_items(pending, override_num_blocks=len(pending))
        rows.map(
            _RayWorker,  # type: ignore[arg-type]  # Ray makes the actor itself
            fn_constructor_args=(job,),
            concurrency=min(workers, len(pending)),
            num_cpus=cpus,
            num_gpus=gpus or None,
        ).materialize()
    return job.finish()


class _RayWorker:
    """An actor that tokenises chunks."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        self.job.run(self.job.chunks[row["chunk"]])
        return row


# --- workers on this machine


def _in_this_process(job: Job, chunks: Sequence[Chunk]) -> Iterator[Chunk]:
    return map(job.run, chunks)


def _spawned(job: Job, chunks: Sequence[Chunk], workers: int) -> Iterator[Chunk]:
    """Chunks as they are done. A worker waits at its own pipe, which ends when this process does."""
    import multiprocessing as mp
    from multiprocessing.connection import wait

    context, todo = mp.get_context("spawn"), iter(chunks)
    busy: dict[Any, tuple[Any, Chunk]] = {}

    def hand_out(pipe: Any, process: Any) -> None:
        chunk = next(todo, None)
        if chunk is None:
            pipe.close()
            process.join()
        else:
            with contextlib.suppress(BrokenPipeError):  # its death is seen when its answer is read
                pipe.send(chunk)
            busy[pipe] = (process, chunk)

    try:
        for _ in range(min(workers, len(chunks))):
            mine, its = context.Pipe()
            process = context.Process(target=_work, args=(its, job), daemon=True)
            process.start()
            its.close()
            hand_out(mine, process)
        while busy:
            for pipe in wait(list(busy)):
                process, chunk = busy.pop(pipe)
                yield _answer(pipe, process, chunk)
                hand_out(pipe, process)
    finally:
        for process, _ in busy.values():
            process.terminate()


def _answer(pipe: Any, process: Any, chunk: Chunk) -> Chunk:
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join()
        raise CorpusError(
            f"a worker died (exit code {process.exitcode}) over documents {chunk.start} to {chunk.stop - 1} "
            f"of source {chunk.source}; what was written stays: run again and it goes on"
        ) from error
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _work(pipe: Any, job: Job) -> None:
    """A worker: chunks in, chunks out, until the pipe ends."""
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        while True:
            chunk = pipe.recv()
            try:
                answer: Any = job.run(chunk)
            except (*FAILURES, ImportError, MemoryError) as error:
                answer = error
            pipe.send(answer)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- encoding and writing


def _encoded(codec: Codec, media: list[Any]) -> list[TokenStream | BaseException]:
    """Streams of a batch; where it fails, one by one, with the errors of those that fail alone."""
    if not media:
        return []
    with torch.inference_mode():
        try:
            return list(codec.encode(media))
        except (torch.OutOfMemoryError, CodecUnavailable):
            raise
        except FAILURES as error:
            if len(media) == 1:
                return [error]
    return [made for one in media for made in _encoded(codec, [one])]


def _loaded(item: RawItem) -> Any:
    medium = item.load()
    if item.modality == "text" and not medium.text.strip():
        raise MediaError(item.name, "its text is blank")
    return medium


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _error(document: str, error: BaseException) -> dict[str, str]:
    return {"document": document, "error": str(error) or type(error).__name__}


def _record(raw: RawDocument, media: list[Any], streams: list[TokenStream | None]) -> dict:
    return {
        "name": raw.name,
        "split": raw.split,
        "kinds": [item.modality for item in raw.items],
        "roles": [item.role for item in raw.items],
        "texts": [m.text if s is None else None for m, s in zip(media, streams)],
        "codes": [
            [] if s is None else [p.codes.flatten().tolist() for p in s.parts] for s in streams
        ],
        "grids": [[] if s is None else list(s.grid) for s in streams],
        "metas": [None if s is None else json.dumps(dict(s.meta)) for s in streams],
        "row": json.dumps(dict(raw.row), ensure_ascii=False),
    }


def _write(records: list[dict], errors: list[dict[str, str]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    words, numbers = pa.list_(pa.string()), pa.list_(pa.int32())
    kinds = {
        "name": pa.string(),
        "split": pa.string(),
        "kinds": words,
        "roles": words,
        "texts": words,
        "codes": pa.list_(pa.list_(numbers)),
        "grids": pa.list_(numbers),
        "metas": words,
        "row": pa.string(),
    }
    about = {"anytok": json.dumps({"format": FORMAT, "errors": errors})}
    table = pa.Table.from_pylist(records, schema=pa.schema(kinds, metadata=about))
    with replacing(path) as partial:
        pyarrow.parquet.write_table(table, partial, compression="zstd")


def _rule(modality: str, codec: Codec) -> Rule:
    if codec.spec.modality != modality:
        raise CorpusError(
            f"'{codec.spec.name}' codes {codec.spec.modality}, it was given for {modality}"
        )
    if not codec.spec.encodes:
        raise CorpusError(f"'{codec.spec.name}' does not encode, so it cannot tokenise")
    return Rule.of(codec)


def _claim(job: Job, settings: dict[str, object]) -> None:
    mine = {
        "format": FORMAT,
        "rules": {m: rule.to_json() for m, rule in job.rules.items()},
        "sources": [
            {"path": str(s.path), "documents": len(s), "listing": digest(s)} for s in job.sources
        ],
        "settings": settings,
        "shards": len(job.chunks),
    }
    mine, path = json.loads(json.dumps(mine)), job.out / "corpus.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key in mine if before.get(key) != mine[key]]
        if other:
            raise CorpusError(
                f"{job.out} holds a corpus with other {', '.join(other)}; "
                "give another folder, or delete this one"
            )
        return
    job.out.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")


# --- reading


@dataclass(frozen=True)
class Document:
    """One document of a corpus: its items are texts or streams, in order."""

    name: str
    split: str
    items: tuple[str | TokenStream, ...]
    roles: tuple[str | None, ...]
    row: Mapping[str, Any]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of each item."""
        return tuple("text" if isinstance(i, str) else i.modality for i in self.items)


class Shards:
    """A whole corpus on disk; a shard is read when it is asked for.

    Raises:
        CorpusError: there is none, it is of another format, or not all of it is there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            about = json.loads((self.path / "corpus.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"{self.path}: holds no corpus.json ({error}); run `anytok tokenize` first"
            ) from error
        if about.get("format") != FORMAT:
            raise CorpusError(
                f"{self.path}: format {about.get('format')!r}, this reads {FORMAT}; tokenise again"
            )
        self.rules = {m: Rule.from_json(rule) for m, rule in about["rules"].items()}
        self.files = [self.path / f"shard-{i:05d}.parquet" for i in range(about["shards"])]
        missing = [file.name for file in self.files if not file.is_file()]
        if missing:
            raise CorpusError(
                f"{self.path} lacks {len(missing)} of {len(self.files)} shards, {missing[0]} first; "
                "run the same `anytok tokenize` again and it goes on"
            )

    def __len__(self) -> int:
        return len(self.files)

    def check(self, rules: Iterable[Rule]) -> None:
        """Raise CorpusError where the corpus was tokenised with another codec than one of `rules`."""
        for rule in rules:
            own = self.rules.get(rule.modality)
            if own is not None and own.codec != rule.codec:
                raise CorpusError(
                    f"{self.path} was tokenised with '{own.codec}', the model reads '{rule.codec}'; "
                    "tokenise with the model's codec, or train a model of this one"
                )

    def read(self, number: int) -> list[Document]:
        """The documents of one shard.

        Raises:
            CorpusError: the file is damaged.
        """
        import pyarrow
        import pyarrow.parquet

        file = self.files[number]
        try:
            table = pyarrow.parquet.read_table(file)
            return [self._document(record) for record in table.to_pylist()]
        except (pyarrow.ArrowInvalid, OSError, KeyError) as error:
            raise CorpusError(
                f"{file}: not a whole shard ({error}); delete it and run `anytok tokenize` again"
            ) from error

    def _document(self, record: dict[str, Any]) -> Document:
        items = [
            text if kind == "text" else self._stream(kind, codes, grid, meta)
            for kind, text, codes, grid, meta in zip(
                *(record[c] for c in ("kinds", "texts", "codes", "grids", "metas"))
            )
        ]
        row = json.loads(record["row"])
        return Document(record["name"], record["split"], tuple(items), tuple(record["roles"]), row)

    def _stream(self, kind: str, codes: list[list[int]], grid: list[int], meta: str) -> TokenStream:
        rule = self.rules[kind]
        parts = [Part(_table(c, len(v)), v) for c, v in zip(codes, rule.vocab)]
        return TokenStream(
            parts=tuple(parts),
            codec=rule.codec,
            modality=kind,
            grid=tuple(grid),
            prefix_step=rule.prefix_step,
            depth_prefix=rule.depth_prefix,
            meta=json.loads(meta),
        )


def _table(codes: list[int], depth: int) -> Tensor:
    return torch.tensor(codes, dtype=torch.int64).view(-1, depth)
