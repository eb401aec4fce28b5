"""rvq/mini beside Opus at the same bits per second, on recordings that it was not trained on.

    python benchmarks/audio_mini.py --data /work/data [--codec rvq/mini] [--items 40] [--figure pair.png]

The folder holds what the recipes `speech` and `speech_real` wrote. "held" are new sentences of voices that were
trained on, "unseen" are whole synthetic voices, "real" is a recorded one (share-alike: it is only ever measured on).
Mel distance is the multi-scale one of DAC's training (lower is better); SI-SDR in dB, STOI and wide-band PESQ (higher
is better; the last two with `pip install pystoi pesq`). Bits are the packed codes, or Opus's packets; what the `.tok`
and the Ogg container add is stated beside them. Opus (libopus, voip, 60 ms frames, VBR) goes as low as it can.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from statistics import mean

import av
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from anytok.codecs import TokenStream, load_codec, tokfile
from anytok.codecs.codec import Codec
from anytok.modalities import Audio
from anytok.modalities.features import HifiMel, hifi_mel
from anytok.modalities.measure import mel_distance, si_sdr

# what came back, bits of the codes, bytes of the container around them
Coded = tuple[Audio, int, int]
OPUS_RATES = (4000, 5000, 6000, 8000, 10_000, 12_000)
SETS = {"held": ("speech", "held"), "unseen": ("speech", "unseen"), "real": ("speech_real", "eval")}
MEASURES = ("mel", "mel to 4 kHz", "SI-SDR", "STOI", "PESQ")


def rows(folder: Path, split: str, items: int) -> list[Audio]:
    """`items` recordings of a split that last at least a second, spread over it."""
    table = [json.loads(line) for line in (folder / "data.jsonl").open(encoding="utf-8")]
    table = [row for row in table if row["split"] == split and row["seconds"] >= 1]
    return [
        Audio.load(folder / row["audio"]) for row in table[:: max(1, len(table) // items)][:items]
    ]


def through_codec(
    codec: Codec, depth: int, known: dict[int, TokenStream] | None = None
) -> Callable[[Audio], Coded]:
    """Encode, keep the first codes, decode; `known` remembers streams by the sound's id."""
    known = {} if known is None else known

    def code(audio: Audio) -> Coded:
        if id(audio) not in known:
            known[id(audio)] = codec.encode([audio])[0]
        stream = known[id(audio)].depths(depth)
        bits = stream.bits
        return codec.decode([stream])[0], bits, len(tokfile.to_bytes(stream)) - bits // 8

    return code


def through_opus(rate: int) -> Callable[[Audio], Coded]:
    """Encode as Ogg Opus and decode."""

    def code(audio: Audio) -> Coded:
        file, bits = BytesIO(), 0
        with av.open(file, "w", format="ogg") as container:
            options = {"application": "voip", "frame_duration": "60", "vbr": "on"}
            stream = container.add_stream("libopus", rate=audio.rate, options=options)
            stream.bit_rate, stream.layout = rate, "mono"
            frame = av.AudioFrame.from_ndarray(audio.to_numpy(), format="fltp", layout="mono")
            frame.rate = audio.rate
            to_16_bit = av.AudioResampler(format="s16", layout="mono", rate=audio.rate)
            frames = [*to_16_bit.resample(frame), None]
            for packet in (p for f in frames for p in stream.encode(f)):
                bits += 8 * packet.size
                container.mux(packet)
        back = Audio.load(file.getvalue()).mono().resample(audio.rate)
        return aligned(back, audio), bits, len(file.getvalue()) - bits // 8

    return code


def aligned(back: Audio, audio: Audio, reach: int = 400) -> Audio:
    """`back` shifted to where it fits best, with the length of `audio`: Opus delays by what its file does not say."""
    n = audio.samples.shape[1]
    padded = torch.nn.functional.pad(back.samples[0], (reach, reach + n))
    shifts = padded.unfold(0, n, 1)[: 2 * reach]
    best = int((shifts @ audio.samples[0]).argmax())
    return Audio(shifts[best][None].clone(), audio.rate)


def narrow_mel_distance(a: Tensor, b: Tensor, rate: int) -> float:
    """Mel distance of what lies below 4 kHz, which is all that Opus codes at its lowest rates."""
    narrow = [Audio(x, rate).resample(8000).samples for x in (a, b)]
    return mel_distance(*narrow, 8000)


def measured(sounds: list[Audio], code: Callable[[Audio], Coded]) -> dict[str, float]:
    """Means over sounds; bits per second over all of them."""
    coded = [code(sound) for sound in sounds]
    pairs = [(back.samples, sound.samples) for (back, _, _), sound in zip(coded, sounds)]
    values = {
        "rate": sum(bits for _, bits, _ in coded) / sum(sound.seconds for sound in sounds),
        "container": mean(extra for _, _, extra in coded),
        "mel": mean(mel_distance(*pair, sounds[0].rate) for pair in pairs),
        "mel to 4 kHz": mean(narrow_mel_distance(*pair, sounds[0].rate) for pair in pairs),
        "SI-SDR": mean(si_sdr(*pair) for pair in pairs),
    }
    waves = [(a[0].numpy(), b[0].numpy()) for a, b in pairs]
    if find_spec("pystoi"):
        from pystoi import stoi

        values["STOI"] = mean(float(stoi(b, a, sounds[0].rate)) for a, b in waves)
    if find_spec("pesq"):
        from pesq import pesq

        values["PESQ"] = mean(pesq(sounds[0].rate, b, a, "wb") for a, b in waves)
    return values


def spectrogram(audio: Audio) -> Tensor:
    """Log-mel as a grey picture [H, W], low frequencies at the bottom."""
    config = HifiMel(rate=audio.rate, n_fft=1024, hop=128, n_mels=120)
    mel = hifi_mel(audio.samples, config)[0]
    return ((mel + 9) / 10).clamp(0, 1).flip(0)


def figure(sound: Audio, codes: list[Callable[[Audio], Coded]], path: str) -> None:
    """The original's spectrogram, and below it what came back from each codec."""
    pictures = [spectrogram(s) for s in (sound, *(code(sound)[0] for code in codes))]
    stacked = torch.stack([torch.nn.functional.pad(p, (0, 0, 0, 4), value=1.0) for p in pictures])
    grey = (rearrange(stacked, "n h w -> (n h) w") * 255).to(torch.uint8)
    Image.fromarray(grey.numpy()).save(path)


def line(name: str, values: dict[str, float]) -> str:
    """A row of the table."""
    digits = {"SI-SDR": 1, "STOI": 3}
    cells = [f"{values[m]:.{digits.get(m, 2)}f}" if m in values else "not run" for m in MEASURES]
    bits, extra = f"{values['rate'] / 1000:.2f}", f"{values['container']:.0f}"
    return f"| {' | '.join([name, bits, extra, *cells])} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--codec", default="rvq/mini")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--depths", type=int, nargs="*")
    parser.add_argument("--figure")
    args = parser.parse_args()
    codec, known = load_codec(args.codec), {}
    most = len(codec.spec.vocab[0])
    systems = {
        f"{codec.spec.name}, {n} of {most}": through_codec(codec, n, known)
        for n in args.depths or range(1, most + 1)
    } | {f"Opus, asked for {rate} b/s": through_opus(rate) for rate in OPUS_RATES}
    sounds = {}
    for name, (folder, split) in SETS.items():
        sounds[name] = rows(args.data / folder, split, args.items)
        print(f"\n{name}: {len(sounds[name])} recordings\n")
        print(f"| codec | kbit/s | container, bytes | {' | '.join(MEASURES)} |")
        print("|---|--:|--:" + len(MEASURES) * "|--:" + "|")
        for system, code in systems.items():
            print(line(system, measured(sounds[name], code)), flush=True)
    if args.figure:
        compared = [through_codec(codec, 2), through_codec(codec, most), through_opus(6000)]
        figure(sounds["real"][0], compared, args.figure)


if __name__ == "__main__":
    main()
