"""PSNR of `onedpiece/mini` beside what else fits in the same bytes, as a Markdown table.

    python benchmarks/image_mini.py --data data [--codec FILE_OR_NAME] [--sheet sheet.png]

Pictures are 64 x 64, over white, whole (squeezed to a square); PSNR is the mean over pictures of each picture's own.
Rivals at the codec's bytes:
- PCA: principal components of the same training pictures, bits given greedily where the error is largest, Lloyd's
  scalar quantisers; not embedded: fitted anew for each size.
- thumbnail: RGB at 5 or 8 bits a value, as large as the bytes allow, bicubic.
- JPEG, WebP: whole files without metadata, the picture also reduced first; the best setting whose mean size is at most
  a tenth over the codec's, or the smallest files where none is.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from anytok.codecs import load_codec
from anytok.codecs.training.data import find_rows
from anytok.codecs.training.onedpiece import OneDPieceMiniTask, psnr
from anytok.modalities import Image

SIZE = 64
BITS_A_TOKEN = 12
COEFFICIENTS = 3072  # of the DCT, largest variance first: where PCA is done
FITTED = 8192  # training pictures
SIDES = (8, 12, 16, 24, 32, 48, 64)
QUALITIES = (0, 1, 5, 10, 20, 30)


def pictures(root: str, limit: int) -> dict[str, Tensor]:
    """Kind -> [N, 3, SIZE, SIZE]."""
    rows = {
        "emoji, held out": find_rows(root, ("emoji",), splits=("held",), modality="image"),
        "photographs, held out": find_rows(root, ("photos",), splits=("held",), modality="image"),
        "OpenMoji, unseen style": find_rows(root, ("emoji",), splits=("unseen",), modality="image"),
    }
    return {k: torch.stack([load(r["image"]) for r in spread(v, limit)]) for k, v in rows.items()}


def spread(rows: list, limit: int) -> list:
    return rows[:: max(1, len(rows) // limit)][:limit]


def load(path) -> Tensor:
    return Image.load(path).over().resize(SIZE, SIZE).pixels


class PCA:
    """Greedy bits and Lloyd's quantisers on principal components."""

    def __init__(self, codec, root: str, rng: torch.Generator):
        task = OneDPieceMiniTask({"data": {"root": root}})
        data = task.dataset()
        rows = torch.randint(len(data), (FITTED,), generator=rng).tolist()
        batches = [rows[i : i + 256] for i in range(0, FITTED, 256)]
        parts = [task.augment(torch.stack([data[i] for i in part]), rng) for part in batches]
        spectrum = torch.cat([codec.spectrum(part) for part in parts])
        self.codec, self.index = codec, spectrum.var(0).argsort(descending=True)[:COEFFICIENTS]
        x = spectrum[:, self.index]
        self.mean = x.mean(0)
        _, vectors = torch.linalg.eigh((x - self.mean).T @ (x - self.mean))
        self.vectors = vectors.flip(1)
        self.y = (x - self.mean) @ self.vectors

    def bits(self, total: int) -> Tensor:
        """Bits of each component: the next one where variance / 4^bits is largest."""
        bits, error = torch.zeros(COEFFICIENTS, dtype=torch.long), self.y.var(0)
        for _ in range(total):
            i = int(error.argmax())
            bits[i] += 1
            error[i] /= 4
        return bits

    def code(self, x: Tensor, total: int) -> Tensor:
        """Pictures through `total` bits and back."""
        y = (self.codec.spectrum(x)[:, self.index] - self.mean) @ self.vectors
        out = torch.zeros_like(y)
        for i in (bits := self.bits(total)).nonzero()[:, 0].tolist():
            levels = lloyd(self.y[:, i].contiguous(), 2 ** int(bits[i]))
            out[:, i] = levels[(y[:, i, None] - levels).abs().argmin(1)]
        spectrum = torch.zeros(len(x), 3 * SIZE**2)
        spectrum[:, self.index] = out @ self.vectors.T + self.mean
        return self.codec.pixels(spectrum)


def lloyd(x: Tensor, levels: int, iterations: int = 8) -> Tensor:
    """Scalar levels for samples x [N], from quantiles."""
    table = torch.quantile(x, (torch.arange(levels) + 0.5) / levels)
    for _ in range(iterations):
        ids = torch.bucketize(x, (table[1:] + table[:-1]) / 2)
        count = torch.bincount(ids, minlength=levels)
        total = torch.zeros(levels).index_add_(0, ids, x)
        table = torch.where(count > 0, total / count.clamp_min(1), table).sort().values
    return table


def thumbnail(x: Tensor, size: int) -> tuple[Tensor, str]:
    """The better of 5 and 8 bits a value."""
    best = None
    for bits in (5, 8):
        side = int((size * 8 / (3 * bits)) ** 0.5)
        small = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        small = (small * (2**bits - 1)).round() / (2**bits - 1)
        big = F.interpolate(small, size=(SIZE, SIZE), mode="bicubic")
        if best is None or psnr(big, x).mean() > psnr(best[0], x).mean():
            best = big, f"{side}x{side}, {bits} bits"
    return best


def files(x: Tensor, kind: str) -> list[tuple[float, float, str]]:
    """(mean bytes, mean PSNR, setting) of every side and quality."""
    found = []
    for side in SIDES:
        small = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        for quality in QUALITIES:
            size, back = zip(*(through(p, kind, quality) for p in small))
            big = F.interpolate(torch.stack(back), size=(SIZE, SIZE), mode="bicubic")
            found.append(
                (float(np.mean(size)), psnr(big, x).mean().item(), f"{side} px, q{quality}")
            )
    return found


def nearest_file(found: list[tuple[float, float, str]], size: float) -> tuple[float, float, str]:
    """The best PSNR within the bytes and a tenth; the smallest files where nothing is that small."""
    within = [f for f in found if f[0] <= 1.1 * size]
    return max(within, key=lambda f: f[1]) if within else min(found)


def through(x: Tensor, kind: str, quality: int) -> tuple[int, Tensor]:
    """One picture as a file and back: its bytes and pixels."""
    array = (rearrange(x, "c h w -> h w c") * 255).round().byte().numpy()
    options = {"optimize": True} if kind == "JPEG" else {"method": 6}
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, kind, quality=quality, **options)
    back = np.asarray(PIL.Image.open(buffer).convert("RGB"), dtype=np.float32) / 255
    return buffer.getbuffer().nbytes, rearrange(torch.from_numpy(back), "h w c -> c h w")


def sheet(codec, sets: dict[str, Tensor], budgets: list[int], path: Path) -> None:
    """Rows: original, then each budget; columns: some of every set."""
    x = torch.cat([v[:: max(1, len(v) // 7)][:7] for v in sets.values()])
    codes = codec.tokenize(x)
    rows = [x, *(codec.detokenize(codes[:, :k]).clamp(0, 1) for k in budgets)]
    grid = rearrange(torch.stack(rows), "r n c h w -> (r h) (n w) c")
    picture = PIL.Image.fromarray((grid * 255).round().byte().numpy())
    picture.resize((picture.width, picture.height)).save(path)


def entropies(codes: Tensor, positions: int) -> Tensor:
    """Bits of each position's empirical distribution."""
    found = []
    for column in codes[:, :positions].T:
        p = torch.bincount(column).float() / len(column)
        found.append(-(p[p > 0] * p[p > 0].log2()).sum())
    return torch.stack(found)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--codec", default="onedpiece/mini")
    parser.add_argument("--data", default="data")
    parser.add_argument("--limit", type=int, default=300, help="pictures of a set")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    codec, sets = load_codec(args.codec), pictures(args.data, args.limit)
    budgets = [4, 16, 32, 64, codec.config.tokens]
    if args.sheet:
        sheet(codec, sets, budgets, args.sheet)
    pca = PCA(codec, args.data, torch.Generator().manual_seed(0))
    report = {}
    print(
        "| pictures | tokens | bytes | onedpiece/mini | unrepaired | PCA | thumbnail | JPEG | WebP |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for kind, x in sets.items():
        codes = codec.tokenize(x)
        whole = {name: files(x, name) for name in ("JPEG", "WEBP")}
        for k in budgets:
            size = k * BITS_A_TOKEN / 8
            row = {
                "onedpiece/mini": psnr(codec.detokenize(codes[:, :k]), x).mean().item(),
                "unrepaired": psnr(codec.linear(codes[:, :k])[0], x).mean().item(),
                "pca": psnr(pca.code(x, k * BITS_A_TOKEN), x).mean().item(),
            }
            cells = [f"{value:.2f}" for value in row.values()]
            small, setting = thumbnail(x, int(size))
            cells.append(f"{psnr(small, x).mean():.2f} ({setting})")
            for found in whole.values():
                near = nearest_file(found, size)
                cells.append(f"{near[1]:.2f} ({near[0]:.0f} B, {near[2]})")
            report[f"{kind} {k}"] = row
            print(
                f"| {kind} ({len(x)}) | {k} | {size:.0f} | " + " | ".join(cells) + " |", flush=True
            )
    for name in ("JPEG", "WEBP"):
        print(
            f"\n{name}: a grey 1 x 1 picture takes {through(torch.full((3, 1, 1), 0.5), name, 0)[0]} bytes."
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
