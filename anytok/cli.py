"""The command line: `anytok codecs | encode | decode | info | view | generate | tokenize | train | ...`.

Exit codes: 0 done, 2 wrong usage, 3 a medium cannot be read or written, 4 a stream is wrong, 5 a codec or its
weights cannot be had, 6 a model cannot do what was asked. Errors go to stderr, one line each; with `--json` results go
to stdout as JSON, and nothing else does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from .bench import app as bench_app
from .tokenize_command import tokenize
from .view import view

if TYPE_CHECKING:
    import torch

    from .codecs import Codec

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Any medium in, one discrete token stream in the middle, any medium out.",
)
train_app = typer.Typer(
    no_args_is_help=True, help="Train a codec or a backbone on a folder of media."
)
app.add_typer(train_app, name="train")
app.add_typer(bench_app, name="bench")
app.command()(tokenize)
app.command()(view)
out, err = Console(), Console(stderr=True)

EXIT_MEDIA, EXIT_STREAM, EXIT_CODEC, EXIT_MODEL = 3, 4, 5, 6


class Dtype(str, Enum):
    """Floating types to run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Floating type to run in.")]
CodecName = Annotated[
    Optional[str],  # noqa: UP045 (typer reads annotations at run time on 3.10)
    typer.Option(
        "--codec", "-c", help="Codec name (see `anytok codecs`); default: the medium's mini."
    ),
]
SoundCodec = Annotated[
    str, typer.Option("--sound", help="Codec of a video's sound; 'none' leaves the sound out.")
]
WeightsPath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--path",
        help="Folder or file of published weights, where they are not to come from the hub.",
    ),
]


@contextmanager
def _errors(*also: type[Exception]) -> Iterator[None]:
    """Turn the library's errors, and `also` these, into one line on stderr and an exit code."""
    from .codecs import CodecUnavailable, StreamError, WeightsError
    from .modalities import MediaError

    try:
        yield
    except MediaError as error:
        _fail(error, EXIT_MEDIA)
    except StreamError as error:
        _fail(error, EXIT_STREAM)
    except (CodecUnavailable, WeightsError) as error:
        _fail(error, EXIT_CODEC)
    except (ValueError, *also) as error:
        _fail(error, EXIT_MODEL)


def _fail(error: BaseException, code: int) -> None:
    err.print(f"[red]anytok:[/] {escape(str(error))}", highlight=False, markup=True, soft_wrap=True)
    raise typer.Exit(code) from error


def _load(name: str, path: Path | None, device: str, dtype: Dtype) -> Codec:
    import torch

    from .codecs import load_codec

    return load_codec(name, path, device=_device(device), dtype=getattr(torch, dtype.value))


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(
            f"device '{name}' is not here: {str(error).splitlines()[0]}"
        ) from error
    return device


@app.callback()
def _main() -> None:
    pass


@app.command()
def codecs(
    pattern: Annotated[str, typer.Argument(help="Such as 'onedpiece/*'.")] = "*",
    as_json: Json = False,
) -> None:
    """List the codecs, what they code, and the licences of code and weights."""
    from rich.table import Table

    from .codecs.registry import describe, list_codecs

    rows = [json.loads(describe(name)) for name in list_codecs(pattern)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    made = Table()
    titles = ("name", "modality", "code_licence", "weights_licence", "about")
    for title in titles:
        made.add_column(title.replace("_", " "))
    for row in rows:
        made.add_row(*(str(row.get(title, "")) for title in titles))
    out.print(made)


@app.command()
def encode(
    file: Annotated[Path, typer.Argument(help="Picture, sound, video, shape or text.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .tok file to write.")],
    codec: CodecName = None,
    sound: SoundCodec = "rvq/mini",
    path: WeightsPath = None,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.float32,
    as_json: Json = False,
) -> None:
    """Turn a file into tokens. A video's sound goes into a second file beside it (NAME.sound.tok)."""
    from . import modalities
    from .roundtrip import DEFAULT_CODECS
    from .roundtrip import encode as encode_medium

    with _errors():
        medium = modalities.load(file)
        used = _load(codec or DEFAULT_CODECS[medium.modality], path, device, dtype)
        has_sound = getattr(medium, "audio", None) is not None and sound != "none"
        sound_codec = _load(sound, None, device, dtype) if has_sound else None
        coded = encode_medium(medium, used, sound_codec)
        coded.stream.save(output)
        if coded.sound is not None:
            coded.sound.save(sound_path(output))
        _report(output, coded.stream, as_json)


def sound_path(path: Path) -> Path:
    """Where the sound of a video's stream stands: clip.tok -> clip.sound.tok."""
    return path.with_name(f"{path.stem}.sound.tok")


@app.command()
def decode(
    file: Annotated[Path, typer.Argument(help="A .tok file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write; its suffix says the format.")
    ],
    tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--tokens", "-k", help="Decode from the first k tokens (ordered codecs)."),
    ] = None,
    depths: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--depths", "-d", help="Decode from the first d depths (residual codecs)."),
    ] = None,
    path: WeightsPath = None,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Turn tokens back into a file, with the codec that wrote them."""
    from . import modalities
    from .codecs import TokenStream
    from .roundtrip import Coded
    from .roundtrip import decode as decode_medium

    with _errors():
        stream = TokenStream.load(file)
        stream = stream[:tokens] if tokens is not None else stream
        stream = stream.depths(depths) if depths is not None else stream
        used = _load(codec_name(stream), path, device, dtype)
        sound = TokenStream.load(sound_path(file)) if sound_path(file).exists() else None
        sound_codec = _load(codec_name(sound), None, device, dtype) if sound else None
        modalities.save(decode_medium(Coded(stream, sound), used, sound_codec), output)
        out.print(f"{output}: {output.stat().st_size:,} bytes", highlight=False)


def codec_name(stream) -> str:
    """The name under which the stream's codec loads."""
    return stream.codec.split("@")[0]


@app.command()
def info(file: Annotated[Path, typer.Argument(help="A .tok file.")], as_json: Json = False) -> None:
    """Say what is in a .tok file."""
    from .codecs import TokenStream

    with _errors():
        _report(file, TokenStream.load(file), as_json)


def _report(file: Path, stream, as_json: bool) -> None:
    facts = {
        "file": str(file),
        "bytes": file.stat().st_size,
        "codec": stream.codec,
        "modality": stream.modality,
        "tokens": sum(part.codes.numel() for part in stream.parts),
        "parts": [{"positions": len(p.codes), "vocab": list(p.vocab)} for p in stream.parts],
        "grid": list(stream.grid),
        "bits": stream.bits,
        "meta": dict(stream.meta),
        "side": {name: list(tensor.shape) for name, tensor in stream.side.items()},
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        if key == "parts":
            value = " + ".join(_part(p["positions"], p["vocab"]) for p in value)
        out.print(f"[bold]{key:9}[/] {escape(str(value))}", highlight=False)


def _part(positions: int, vocab: list[int]) -> str:
    sizes = str(vocab[0]) if len(set(vocab)) == 1 else "/".join(map(str, vocab))
    return f"{positions} x {sizes}" + (f" x {len(vocab)} deep" if len(vocab) > 1 else "")


@app.command()
def roundtrip(
    files: Annotated[list[Path], typer.Argument(help="Files of any medium.")],
    codec: CodecName = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Where reconstructions and the contact sheet go.")
    ] = Path("out"),
    sound: SoundCodec = "rvq/mini",
    path: WeightsPath = None,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.float32,
    as_json: Json = False,
) -> None:
    """Send files through tokens and back: reconstructions, a contact sheet to look at, and a table of figures."""
    from . import modalities, report
    from .roundtrip import DEFAULT_CODECS, SUFFIXES, merged
    from .roundtrip import roundtrip as run

    rows, loaded = [], {}

    def get(name: str, where: Path | None = None) -> Codec:
        if name not in loaded:
            loaded[name] = _load(name, where, device, dtype)
        return loaded[name]

    with _errors():
        folder.mkdir(parents=True, exist_ok=True)
        for file in track(files, "coding", console=err, disable=as_json):
            modality = modalities.medium_of(file).modality
            used = get(codec or DEFAULT_CODECS[modality], path)
            made = list(run(file, used, None if sound == "none" else lambda: get(sound)))
            rows += [row for row, _ in made]
            modalities.save(
                made[-1][1],
                folder / f"{file.stem}.{used.spec.name.replace('/', '-')}{SUFFIXES[modality]}",
            )
        report.contact_sheet(merged(rows)).save(folder / "contact_sheet.png")
        (folder / "report.html").write_text(
            report.to_html(merged(rows), "Round trip"), encoding="utf-8"
        )
        (folder / "figures.json").write_text(report.to_json(rows), encoding="utf-8")
    if as_json:
        typer.echo(report.to_json(rows))
    else:
        out.print(report.table(rows))
        out.print(f"{folder / 'contact_sheet.png'}, {folder / 'report.html'}", highlight=False)


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="A folder of pictures.")],
    names: Annotated[
        str, typer.Option("--codecs", "-c", help="Names, parted by commas.")
    ] = "onedpiece/mini",
    page: Annotated[Path, typer.Option("--out", "-o", help="The HTML page to write.")] = Path(
        "compare.html"
    ),
    size: Annotated[
        int, typer.Option(min=16, help="Pixels a side at which all are measured.")
    ] = 256,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Take the first so many pictures."),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Pictures that the page shows.")] = 6,
    files: Annotated[bool, typer.Option(help="JPEG, WebP and AVIF at equal bytes.")] = True,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.float32,
    as_json: Json = False,
) -> None:
    """Compare picture codecs on one page: figures, rate-distortion curves, the pictures themselves."""
    from . import report
    from .compare import beside, find_pictures, judged, judges, through_codec

    with _errors():
        labels, pictures, broken = find_pictures(folder, size, limit)
        points = []
        for name in track(names.split(","), "coding", console=err, disable=as_json):
            codec = _load(name.strip(), None, device, dtype)
            if codec.spec.modality != "image":
                raise ValueError(f"'{name}' codes {codec.spec.modality}, expected picture codecs")
            points += through_codec(codec, pictures)
        if files:
            points += beside(
                points, pictures, lambda x: track(x, "files", console=err, disable=as_json)
            )
        judge = judges()
        known = None if judge.features is None else judge.features(pictures)
        rows = [
            judged(point, pictures, known, judge)
            for point in track(points, "judging", console=err, disable=as_json)
        ]
        shown = [
            report.Row(label, {"source": pictures[i], **{p.name: p.pictures[i] for p in points}})
            for i, label in enumerate(labels[:show])
        ]
        notes = [f"{len(pictures)} pictures of {folder}, {size} x {size}.", *broken, *judge.missing]
        charts = "".join(report.curves(_series(rows, y), "bytes", y) for y in _measures(rows))
        page.write_text(
            report.to_html(rows + shown, "Picture codecs", above=charts, notes=notes),
            encoding="utf-8",
        )
    if as_json:
        typer.echo(report.to_json(rows))
        return
    out.print(report.table(rows))
    for note in (*broken, *judge.missing):
        err.print(f"[yellow]{escape(note)}", highlight=False, soft_wrap=True)
    out.print(f"{page}", highlight=False)


def _measures(rows) -> list[str]:
    plotted = ("PSNR, dB", "SSIM", "perceptual", "features, 1 - cosine")
    return [y for y in plotted if y in rows[0].values]


def _series(rows, y: str) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        series.setdefault(row.values["codec"], []).append((row.values["bytes"], row.values[y]))
    return series


@app.command()
def generate(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write; several get -1, -2, ...")
    ],
    to: Annotated[str, typer.Option("--to", help="text, image, audio, video or shape.")],
    text: Annotated[Optional[str], typer.Option(help="Text of the prompt.")] = None,  # noqa: UP045
    image: Annotated[Optional[Path], typer.Option(help="Picture of the prompt.")] = None,  # noqa: UP045
    audio: Annotated[Optional[Path], typer.Option(help="Sound of the prompt.")] = None,  # noqa: UP045
    video: Annotated[Optional[Path], typer.Option(help="Video of the prompt.")] = None,  # noqa: UP045
    shape: Annotated[Optional[Path], typer.Option(help="Shape of the prompt.")] = None,  # noqa: UP045
    model: Annotated[str, typer.Option(help="Model name or directory.")] = "anytok/mini",
    samples: Annotated[int, typer.Option(min=1, help="How many answers.")] = 1,
    seed: Annotated[int, typer.Option(help="Sample i uses seed + i.")] = 0,
    temperature: Annotated[Optional[float], typer.Option(min=0.0)] = None,  # noqa: UP045
    cfg: Annotated[Optional[float], typer.Option(help="Classifier-free guidance scale.")] = None,  # noqa: UP045
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Turn a prompt of any media into a medium."""
    from . import modalities
    from .generators.pipeline import AnyToAny, GenerationError
    from .generators.sampling import Sampling

    with _errors(GenerationError):
        prompt = [modalities.Text(text)] if text is not None else []
        prompt += [
            modalities.load(file) for file in (image, audio, video, shape) if file is not None
        ]
        if not prompt:
            raise typer.BadParameter("give a prompt: --text, --image, --audio, --video or --shape")
        pipeline = AnyToAny.load(model, device=_device(device))
        chosen = {"temperature": temperature, "cfg": cfg}
        own = {k: v for k, v in pipeline.model.generation.get(to, {}).items() if k != "units"}
        options = Sampling(**{**own, **{k: v for k, v in chosen.items() if v is not None}})
        seeds = [seed + i for i in range(samples)]
        answers = pipeline([prompt], to=to, samples=samples, seeds=seeds, options={to: options})
        written = []
        for i, answer in enumerate(answers):
            name = (
                output
                if samples == 1
                else output.with_name(f"{output.stem}-{i + 1}{output.suffix}")
            )
            modalities.save(answer.items[-1], name)
            seconds = sum(answer.seconds.values())
            written.append({"file": str(name), "seed": answer.seed, "seconds": seconds})
        if as_json:
            typer.echo(json.dumps(written))
        else:
            for item in written:
                out.print(
                    f"{item['file']}  seed {item['seed']}  {item['seconds']:.2f} s", highlight=False
                )


Data = Annotated[
    Path,
    typer.Option("--data", help="Folder of media files, or of data sets that the recipes wrote."),
]
RunFolder = Annotated[
    Path, typer.Option("--out", "-o", help="The run's folder; a run that lies there goes on.")
]
Minutes = Annotated[float | None, typer.Option(help="Training time; replaces the config's budget.")]
Steps = Annotated[Optional[int], typer.Option(help="Updates; replaces the config's budget.")]  # noqa: UP045


@train_app.command("codec")
def train_codec(
    data: Data,
    system: Annotated[str, typer.Option(help="onedpiece, rvq, cvivit, octgpt, s3, flow or hift.")],
    folder: RunFolder = Path("runs/codec"),
    config: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A JSON config; default: that of the system's mini."),
    ] = None,
    minutes: Minutes = None,
    steps: Steps = None,
) -> None:
    """Train a codec on a folder, here in one process; for several GPUs: accelerate launch -m anytok.codecs.train."""
    from .codecs.train import train

    with _training_errors():
        made = train(
            config or f"{system}_mini",
            out=str(folder),
            data=str(data),
            minutes=minutes,
            steps=steps,
        )
        out.print(f"{made}: load it with load_codec({str(made)!r})", highlight=False)


@train_app.command("backbone")
def train_backbone(
    data: Data,
    folder: RunFolder = Path("runs/backbone"),
    config: Annotated[
        str, typer.Option(help="A JSON config, or the name of one that ships.")
    ] = "mini",
    minutes: Minutes = None,
    steps: Steps = None,
) -> None:
    """Train a backbone on tokenised corpora; for several GPUs: accelerate launch -m anytok.backbone.train."""
    from .backbone.train import train

    with _training_errors():
        made = train(config, out=str(folder), data=str(data), minutes=minutes, steps=steps)
        out.print(f"{made}: load it with AnyToAny.load({str(made)!r})", highlight=False)


@contextmanager
def _training_errors() -> Iterator[None]:
    from .codecs.training.checkpoint import CheckpointError
    from .codecs.training.engine import StopRun, TrainingError

    try:
        with _errors():
            yield
    except (CheckpointError, TrainingError, StopRun, OSError) as error:
        _fail(error, EXIT_MODEL)


if __name__ == "__main__":
    app()
