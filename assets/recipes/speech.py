"""Synthesised speech with its exact words: emoji names and short sentences of our own.

Speakers are flite's voices (CMU Arctic descendants) and formant variants of espeak-ng, at 16 kHz
mono FLAC, each clip with its own speed and pitch. One speaker of either kind is never trained on
(`unseen`); the trained speakers' readings of 5 % of the sentences are `held`. What a synthesiser
says belongs to nobody, hence the licence `synthetic`.

- The order of clips is fixed by the seed: all names once, a thousand sentences, all names again by
  other speakers, and so on; `--hours` only says where the list ends.
- Pitch is changed by resampling (flite's own pitch option has no effect on its statistical
  voices), and the synthesiser is asked for the opposite change of speed.
"""

import hashlib
import io
import random
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import typer
from scipy.signal import resample_poly

from anytok.assets.recipes import emoji
from anytok.assets.recipes.dataset import OUT, Row, begin, finish, progress, save, say
from anytok.assets.recipes.fetch import tool
from anytok.assets.recipes.sentences import sentences

RATE = 16_000
SEED = 1234
FLITE = ("kal16", "awb", "slt")
ESPEAK = ("en-us", "en-us+f2", "en-us+m3", "en-gb+f5", "en-gb+m7", "en-us+klatt2")
UNSEEN = (("flite", "rms"), ("espeak-ng", "en-us+f4"))
UNSEEN_ITEMS = 150  # names, and as many sentences
NUM_SENTENCES = 4000
BLOCK = 1000  # sentences between two passes over the names
HELD_ONE_IN = 20
SPEEDS = (0.85, 1.2)
PITCHES = (0.92, 0.96, 1.0, 1.0, 1.04, 1.08)
ESPEAK_WORDS_PER_MINUTE = 165
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One thing to be said: by whom, how fast (1 is the speaker's own speed), how high."""

    engine: str  # "flite" | "espeak-ng"
    voice: str
    text: str
    kind: str  # "name" | "sentence"
    split: str
    speed: float
    pitch: float

    @property
    def path(self) -> str:
        """Where its audio lies: the same for the same clip, whatever the length of the list."""
        parts = (self.engine, self.voice, self.text, self.kind, self.speed, self.pitch)
        mark = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return f"{self.engine}-{self.voice.replace('+', '-')}/{mark}.flac"


def build(out: Path, *, hours: float = 3.0, workers: int = 2) -> Path:
    """Speak until `hours` are full (unseen speakers come on top), into `out/speech`."""
    folder = out / "speech"
    if begin(folder, {"hours": float(hours), "seed": SEED}):
        return folder
    for command in ("flite", "espeak-ng"):
        tool(command, f"install the package '{command}' (Debian: apt-get install {command})")
    names = emoji.names(out / ".packages")
    lines = sentences(NUM_SENTENCES, SEED)
    with ProcessPoolExecutor(workers) as pool:
        rows = _speak_until(pool, folder, clips(names, lines), hours * 3600)
        unseen = list(unseen_clips(names, lines))
        done = pool.map(partial(_speak, folder=folder), unseen, chunksize=8)
        rows += [_row(clip, time) for clip, time in zip(unseen, done)]
    say(f"{sum(row['seconds'] for row in rows) / 3600:.2f} hours in all")
    return finish(folder, rows, __doc__ or "")


def clips(names: list[str], lines: list[str]) -> Iterator[Clip]:
    """The endless list for the trained speakers, in its fixed order."""
    speakers = [("flite", v) for v in FLITE for _ in range(2)] + [("espeak-ng", v) for v in ESPEAK]
    rng = random.Random(SEED)
    turn = 0
    while True:
        start = turn * BLOCK % len(lines)
        block = [(text, "name") for text in names]
        block += [(text, "sentence") for text in lines[start : start + BLOCK]]
        for i, (text, kind) in enumerate(block):
            # 7 is prime to the number of turns of speakers: every pass changes who says a name.
            engine, voice = speakers[(i + 7 * turn) % len(speakers)]
            split = "held" if kind == "sentence" and is_held(text) else "train"
            yield _clip(engine, voice, text, kind, split, rng)
        turn += 1


def unseen_clips(names: list[str], lines: list[str]) -> Iterator[Clip]:
    """Names and held sentences by the speakers that training never hears."""
    rng = random.Random(SEED + 1)
    some = sorted(rng.sample(names, min(UNSEEN_ITEMS, len(names))))
    held = [line for line in lines if is_held(line)][:UNSEEN_ITEMS]
    for engine, voice in UNSEEN:
        for text in some:
            yield _clip(engine, voice, text, "name", "unseen", rng)
        for text in held:
            yield _clip(engine, voice, text, "sentence", "unseen", rng)


def is_held(sentence: str) -> bool:
    """One sentence in twenty, by its hash: no speaker says it in training."""
    return int(hashlib.sha256(sentence.encode()).hexdigest()[:8], 16) % HELD_ONE_IN == 0


def synthesise(clip: Clip) -> np.ndarray:
    """The clip as float samples [L] in -1…1 at 16 kHz."""
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "clip.wav"
        done = subprocess.run(_command(clip, path), capture_output=True, text=True)
        if done.returncode or not path.is_file():
            raise RuntimeError(f"{clip.engine} could not say {clip.text!r}: {done.stderr.strip()}")
        samples, rate = soundfile.read(path, dtype="float32")
    # Played at another rate, a voice sounds higher; then bring it to 16 kHz.
    source = round(rate * clip.pitch / 20) * 20
    common = int(np.gcd(RATE, source))
    return np.clip(resample_poly(samples, RATE // common, source // common), -1, 1)


def _command(clip: Clip, path: Path) -> list[str]:
    speed = clip.speed / clip.pitch  # resampling by `pitch` changes the speed as well
    if clip.engine == "flite":
        stretch = f"duration_stretch={1 / speed:.3f}"
        return ["flite", "-voice", clip.voice, "--setf", stretch, "-t", clip.text, "-o", str(path)]
    words = str(round(ESPEAK_WORDS_PER_MINUTE * speed))
    return ["espeak-ng", "-v", clip.voice, "-s", words, "-w", str(path), clip.text]


def _clip(engine: str, voice: str, text: str, kind: str, split: str, rng: random.Random) -> Clip:
    speed, pitch = round(rng.uniform(*SPEEDS), 2), rng.choice(PITCHES)
    return Clip(
        engine=engine, voice=voice, text=text, kind=kind, split=split, speed=speed, pitch=pitch
    )


def _speak_until(
    pool: ProcessPoolExecutor, folder: Path, todo: Iterator[Clip], seconds: float
) -> list[Row]:
    rows: list[Row] = []
    full = 0.0
    batches = iter(lambda: list(islice(todo, BATCH)), [])
    for percent in progress(range(1, 101), "speech"):
        while full < seconds * percent / 100:
            batch = next(batches)
            times = list(pool.map(partial(_speak, folder=folder), batch, chunksize=4))
            rows += [_row(clip, time) for clip, time in zip(batch, times)]
            full += sum(times)
    return rows


def _speak(clip: Clip, *, folder: Path) -> float:
    """Write the clip unless it lies there; returns its seconds."""
    path = folder / clip.path
    if path.is_file():
        return soundfile.info(path).duration
    samples = synthesise(clip)
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format="FLAC", subtype="PCM_16")
    path.parent.mkdir(exist_ok=True)
    save(path, stream.getvalue())
    return len(samples) / RATE


def _row(clip: Clip, seconds: float) -> Row:
    return {
        "audio": clip.path,
        "text": clip.text,
        "split": clip.split,
        "source": clip.engine,
        "licence": "synthetic",
        "voice": clip.voice,
        "kind": clip.kind,
        "speed": clip.speed,
        "pitch": clip.pitch,
        "seconds": round(seconds, 3),
    }


def main(
    out: Annotated[Path, typer.Option(help="folder of all data sets")] = OUT,
    hours: Annotated[float, typer.Option(min=0.01, help="of train and held together")] = 3.0,
    workers: Annotated[int, typer.Option(min=1, help="processes that speak")] = 2,
) -> None:
    """Synthesise transcribed English speech with flite and espeak-ng (16 kHz FLAC)."""
    build(out, hours=hours, workers=workers)


if __name__ == "__main__":
    typer.run(main)
