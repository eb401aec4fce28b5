"""rvq/mini beside Opus at the same bits per second, on recordings that it was not trained on.

    python benchmarks/audio_mini.py --data /work/data/speech [--codec rvq/mini] [--items 40] [--figure pair.png]

"held" are new sentences of known voices, "unseen" are whole voices. Mel distance is the multi-scale one of DAC's
training (lower is better), SI-SDR in dB (higher is better). Bits are the packed codes, or Opus's packets; what the
`.tok` and the Ogg container add is stated beside them. Opus (libopus, voip, 60 ms frames, VBR) goes as low as it can.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from statistics import mean

import av
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from anytok.codecs import load_codec, tokfile
from anytok.codecs.codec import Codec
from anytok.modalities import Audio
from anytok.modalities.features import HifiMel, hifi_mel
from anytok.modalities.measure import mel_distance, si_sdr

Coded = tuple[
    Audio, int, int
]  # what came back, bits of the codes, bytes of the container around them
OPUS_RATES = (4000, 5000, 6000, 8000, 12000)


def rows(folder: Path, split: str, items: int) -> list[Audio]:
    """`items` recordings of a split, spread over it."""
    table = [json.loads(line) for line in (folder / "data.jsonl").open(encoding="utf-8")]
    table = [row for row in table if row["split"] == split]
    return [
        Audio.load(folder / row["audio"]) for row in table[:: max(1, len(table) // items)][:items]
    ]


def through_codec(codec: Codec, depth: int) -> Callable[[Audio], Coded]:
    """Encode, keep the first codes, decode."""

    def code(audio: Audio) -> Coded:
        stream = codec.encode([audio])[0].depths(depth)
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


def measured(sounds: list[Audio], code: Callable[[Audio], Coded]) -> dict[str, float]:
    """Means over sounds."""
    coded = [code(sound) for sound in sounds]
    pairs = [
        (back.samples, sound.samples, sound.rate) for (back, _, _), sound in zip(coded, sounds)
    ]
    seconds = sum(sound.seconds for sound in sounds)
    return {
        "rate": sum(bits for _, bits, _ in coded) / seconds,
        "container": mean(extra for _, _, extra in coded),
        "mel": mean(mel_distance(*pair) for pair in pairs),
        "si_sdr": mean(si_sdr(*pair[:2]) for pair in pairs),
    }


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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--codec", default="rvq/mini")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--figure")
    args = parser.parse_args()
    codec = load_codec(args.codec)
    depths = len(codec.spec.vocab[0])
    sets = {split: rows(args.data, split, args.items) for split in ("held", "unseen")}
    systems = {
        f"{codec.spec.name}, {n} of {depths}": through_codec(codec, n) for n in range(1, depths + 1)
    }
    systems |= {f"Opus, asked for {rate} b/s": through_opus(rate) for rate in OPUS_RATES}
    print(f"{args.items} recordings of each split\n")
    print(
        "| codec | kbit/s | container, bytes | mel, held | SI-SDR, held | mel, unseen | SI-SDR, unseen |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, code in systems.items():
        held, unseen = measured(sets["held"], code), measured(sets["unseen"], code)
        figures = [f"{x['mel']:.2f} | {x['si_sdr']:.1f}" for x in (held, unseen)]
        print(
            f"| {name} | {held['rate'] / 1000:.2f} | {held['container']:.0f} | {' | '.join(figures)} |",
            flush=True,
        )
    if args.figure:
        compared = [through_codec(codec, 1), through_codec(codec, depths), through_opus(4000)]
        figure(sets["unseen"][0], compared, args.figure)


if __name__ == "__main__":
    main()
