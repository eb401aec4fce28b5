"""Recorded English speech with transcripts: Asterisk's voice prompts, one professional speaker.

568 prompts at 16 kHz (G.722), 563 of them speech. CC BY-SA 3.0, hence only `eval`: for measuring a
codec or recogniser on a real voice. Beeps and tones, whose transcript stands in brackets, are left
out.
"""

import gzip
import io
import re
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import soundfile
import typer

from anytok.assets.recipes.dataset import OUT, Row, begin, finish, progress, save
from anytok.assets.recipes.fetch import apt_deb, unpack

RATE = 16_000
SOUNDS = (
    "asterisk-core-sounds-en-g722",
    "1.6.1-1",
    "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
)
TRANSCRIPTS = (
    "asterisk-core-sounds-en",
    "1.6.1-1",
    "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
)
LICENCE = "CC-BY-SA-3.0"


def build(out: Path) -> Path:
    """Decode the prompts to FLAC in `out/speech_real`; returns that folder."""
    folder = out / "speech_real"
    if begin(folder, {"pins": ["@".join(SOUNDS[:2]), "@".join(TRANSCRIPTS[:2])]}):
        return folder
    cache = out / ".packages"
    texts = unpack(apt_deb(*TRANSCRIPTS, cache=cache), ("*/core-sounds-en.txt.gz",))
    lines = gzip.decompress(next(texts.rglob("*.txt.gz")).read_bytes()).decode("utf-8")
    spoken = transcripts(lines)
    root = next(unpack(apt_deb(*SOUNDS, cache=cache), ("*.g722",)).rglob("en_US_f_Allison"))
    files = sorted(root.rglob("*.g722"))
    rows = []
    for path in progress(files, "recorded speech", len(files)):
        name = path.relative_to(root).with_suffix("").as_posix()
        if name in spoken:
            rows.append(_row(path, folder, name, spoken[name]))
    return finish(folder, rows, f"{__doc__}\nSpoken by Allison Smith, 2003-2010.")


def transcripts(text: str) -> dict[str, str]:
    """`name: words` a line → name → words; comments and what is no speech (`[beep]`) left out."""
    found = {}
    for line in text.splitlines():
        name, colon, words = line.partition(":")
        words = re.sub(r"\s+", " ", re.sub(r"\[.*?\]|\(.*?\)", " ", words)).strip()
        if colon and not line.startswith(";") and re.search(r"\w", words):
            found[name.strip()] = words
    return found


def decode_g722(data: bytes) -> np.ndarray:
    """G.722 bytes (headerless) → samples [L], float in -1…1 at 16 kHz."""
    with av.open(io.BytesIO(data), format="g722") as container:
        frames = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 32768


def _row(path: Path, folder: Path, name: str, words: str) -> Row:
    samples = decode_g722(path.read_bytes())
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format="FLAC", subtype="PCM_16")
    audio = f"{name.replace('/', '-')}.flac"
    save(folder / audio, stream.getvalue())
    return {
        "audio": audio,
        "text": words,
        "split": "eval",
        "source": f"{SOUNDS[0]}@{SOUNDS[1]}",
        "licence": LICENCE,
        "voice": "allison",
        "seconds": round(len(samples) / RATE, 3),
    }


def main(
    out: Annotated[Path, typer.Option(help="folder of all data sets")] = OUT,
) -> None:
    """Decode recorded, transcribed English prompts (16 kHz FLAC; evaluation only)."""
    build(out)


if __name__ == "__main__":
    typer.run(main)
