"""PSNR of `cvivit/mini` beside what else fits in the same bytes, as a Markdown table.

    python benchmarks/video_mini.py --data data [--codec FILE_OR_NAME] [--strip strip.png]

Clips are held out, 17 frames of 64 x 64 at 8 frames a second, whole frames; PSNR is the mean over frames of each
frame's own, then over clips. Bytes are packed codes alone, and for H.264 slices alone. Rivals:
- PCA tubes: the codec's own patches and tubes, principal components of the same training clips, as many bits a tube,
  given greedily where the error is largest, Lloyd's scalar quantisers.
- H.264 (libx264, slow, tuned for PSNR, 4:2:0): for each clip the rate factor whose bytes are nearest. Parameter
  sets, about 40 bytes a clip, and x264's own message are left out of its count.
- mean colour: one colour for the whole clip, three bytes.
"""

from __future__ import annotations

import argparse
import io
from functools import partial

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image as Picture
from torch import Tensor

from anytok.codecs import load_codec
from anytok.codecs.training.cvivit import psnr
from anytok.codecs.training.data import Clips, find_rows
from anytok.codecs.video.cvivit import CViViT
from anytok.modalities import Video

FPS, FRAMES, SIZE = 8, 17, 64
FITTED = 600  # training clips
MAX_BITS = 6  # of one coefficient
SEI = 6  # the kind of H.264 unit that holds messages


def clips(root: str, name: str, split: str, limit: int, where: dict | None = None) -> Tensor:
    """Clips of one data set, uint8 [N, F, 3, H, W], spread over its rows."""
    rows = find_rows(root, (name,), modality="video", splits=(split,), where=where)
    found = Clips(
        rows[:: max(1, len(rows) // limit)][:limit], frames=FRAMES, size=(SIZE, SIZE), fps=FPS
    )
    return torch.stack([found[i] for i in range(len(found))])


class Scalar:
    """Principal components of vectors [N, P], `bits` a vector, greedily; Lloyd's quantisers."""

    def __init__(self, x: Tensor, bits: int):
        self.mean = x.mean(0)
        _, _, basis = torch.linalg.svd(x[:40_000] - self.mean, full_matrices=False)
        self.basis = basis[:bits]
        z = (x - self.mean) @ self.basis.T
        given = [0] * bits
        self.tables = [z[:, i].mean()[None] for i in range(bits)]
        errors = [z[:, i].var() for i in range(bits)]
        for _ in range(bits):
            best = max(
                (i for i in range(bits) if given[i] < MAX_BITS), key=lambda i: float(errors[i])
            )
            given[best] += 1
            self.tables[best], errors[best] = lloyd(z[:, best], 2 ** given[best])

    def __call__(self, x: Tensor) -> Tensor:
        z = (x - self.mean) @ self.basis.T
        parts = [t[(z[:, i, None] - t).abs().argmin(1)] for i, t in enumerate(self.tables)]
        return torch.stack(parts, 1) @ self.basis + self.mean


def lloyd(z: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Levels and mean squared error of one number's quantiser, from at most 20,000 samples."""
    z = z[:: max(1, len(z) // 20_000)]
    table = z.quantile((torch.arange(levels) + 0.5) / levels)
    for _ in range(20):
        ids = (z[:, None] - table).abs().argmin(1)
        count = torch.bincount(ids, minlength=levels)
        sums = torch.zeros(levels).index_add_(0, ids, z)
        table = torch.where(count > 0, sums / count.clamp_min(1), table)
    return table, (z - table[(z[:, None] - table).abs().argmin(1)]).square().mean()


class PCATubes:
    """The floor: the codec's cutting, linear, `bits` a patch or tube."""

    def __init__(self, codec: CViViT, train: Tensor, bits: int):
        self.codec = codec
        self.coders = [
            Scalar(rearrange(p, "b t h w p -> (b t h w) p"), bits) for p in self.cut(train)
        ]

    def cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float() / 255
        return self.codec.to_patch_emb_first_frame[0](x[:, :1]), self.codec.to_patch_emb[0](
            x[:, 1:]
        )

    def __call__(self, x: Tensor) -> Tensor:
        joins = (self.codec.to_pixels_first_frame[1], self.codec.to_pixels[1])
        parts = [
            join(coder(p.flatten(0, 3)).reshape(p.shape))
            for coder, p, join in zip(self.coders, self.cut(x), joins)
        ]
        return torch.cat(parts, 1).clamp(0, 1)


def h264(clip: Tensor, crf: int) -> tuple[Tensor, int]:
    """A clip uint8 [F, 3, H, W] through H.264: floats, and the bytes of its slices."""
    with av.open(io.BytesIO(), "w", format="h264") as sink:
        stream = sink.add_stream("libx264", rate=FPS)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "slow", "tune": "psnr", "crf": str(crf)}
        frames = [
            av.VideoFrame.from_ndarray(f, "rgb24")
            for f in rearrange(clip, "f c h w -> f h w c").numpy()
        ]
        packets = [bytes(p) for f in [*frames, None] for p in stream.encode(f)]
    size = sum(len(u) + 3 for p in packets for u in units(p) if u[0] & 31 < SEI)
    decoder = av.CodecContext.create("h264", "r")
    pictures = [f for p in packets for f in decoder.decode(av.Packet(p))] + decoder.decode(None)
    out = np.stack([f.to_ndarray(format="rgb24") for f in pictures])
    return rearrange(torch.from_numpy(out), "f h w c -> f c h w").float() / 255, size


def units(packet: bytes) -> list[bytes]:
    """The units of an Annex B packet."""
    return [u for u in packet.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1") if u]


def nearest_h264(clip: Tensor, wanted: float) -> tuple[Tensor, int]:
    """The rate factor whose size is nearest, by bisection."""
    low, high, tries = 10, 51, []
    while low <= high:
        crf = (low + high) // 2
        tries.append(h264(clip, crf))
        low, high = (crf + 1, high) if tries[-1][1] > wanted else (low, crf - 1)
    return min(tries, key=lambda found: abs(found[1] - wanted))


@torch.no_grad()
def through_codec(codec: CViViT, x: Tensor) -> Tensor:
    """What the public verbs give."""
    out = []
    for clip in x:
        stream = codec.encode([Video(frames=clip, fps=FPS)])[0]
        out.append(codec.decode([stream])[0].frames.float() / 255)
    return torch.stack(out)


def measure(name: str, coder, x: Tensor, bytes_a_clip: float) -> str:
    y = coder(x)
    scores = psnr(x.float() / 255, y)
    static = psnr(x[:, :1].float() / 255, y[:, :1])
    rate = 8 * bytes_a_clip * FPS / FRAMES
    return (
        f"| {name} | {bytes_a_clip:.0f} | {rate:.0f} | {scores.mean():.2f} | {static.mean():.2f} |"
    )


def clip_bytes(codec: CViViT) -> float:
    c = codec.config
    latents = 1 + (FRAMES - 1) // c.temporal_patch
    return latents * c.grid[0] * c.grid[1] * (c.codebook_size - 1).bit_length() / 8


def table(codec: CViViT, floor: PCATubes, x: Tensor) -> list[str]:
    size = clip_bytes(codec)
    found = [nearest_h264(clip, size) for clip in x]
    h264_frames, h264_bytes = (
        torch.stack([f for f, _ in found]),
        sum(b for _, b in found) / len(found),
    )
    colour = x.float().mean((1, 3, 4), keepdim=True) / 255
    return [
        measure("cvivit/mini", partial(through_codec, codec), x, size),
        measure("PCA tubes", floor, x, size),
        measure("H.264, nearest", lambda _: h264_frames, x, h264_bytes),
        measure("mean colour", lambda _: colour.expand(x.shape), x, 3),
    ]


def strip(path: str, codec: CViViT, floor: PCATubes, sets: dict[str, Tensor]) -> None:
    """For a few clips of each set: original, codec, PCA, H.264; every fourth frame, at twice the size."""
    rows = []
    for x in sets.values():
        for clip in x[:: max(1, len(x) // 4)][:4]:
            one = clip[None]
            versions = [
                one.float() / 255,
                through_codec(codec, one),
                floor(one),
                nearest_h264(clip, clip_bytes(codec))[0][None],
            ]
            rows.append(torch.cat([v[0, ::4] for v in versions], 0))
    sheet = rearrange(torch.stack(rows), "r n c h w -> (r h) (n w) c")
    picture = Picture.fromarray((sheet * 255).round().byte().numpy())
    picture.resize((picture.width * 3 // 2, picture.height * 3 // 2), Picture.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data", help="the folder of the data sets")
    parser.add_argument("--codec", default="cvivit/mini", help="a name or a saved codec")
    parser.add_argument("--count", type=int, default=40, help="clips of each kind")
    parser.add_argument("--strip", help="where to write a sheet of frames")
    args = parser.parse_args()
    codec = load_codec(args.codec)
    train = torch.cat([clips(args.data, s, "train", FITTED // 2) for s in ("motion", "clips")])
    floor = PCATubes(codec, train, (codec.config.codebook_size - 1).bit_length())
    sets = {
        "drawn, held out": clips(args.data, "motion", "held", args.count),
        "filmed, held out": clips(args.data, "clips", "held", args.count),
        "filmed, unseen film (carphone)": clips(args.data, "clips", "eval", args.count),
    }
    for name, x in sets.items():
        print(f"\n{name}: {len(x)} clips\n")
        print("| codec | bytes a clip | bits a second | PSNR, dB | first frame |")
        print("|---|---|---|---|---|")
        print("\n".join(table(codec, floor, x)), flush=True)
    if args.strip:
        strip(args.strip, codec, floor, sets)


if __name__ == "__main__":
    main()
