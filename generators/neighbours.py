"""Neighbour tables: for each code of a codec, the k codes that the decoder would hear or see as nearly the same.

Latent-proximity relaxation (LANTERN, arXiv 2410.03355) treats them as interchangeable. Distance is Euclidean between
what the decoder receives (`code_vectors`, `position_vectors`): normalised rows where the codec normalises, a table of
its own for each depth of an RVQ or each position, the product lattice of an FSQ.

- Only the nearest k columns are made and kept: 16,384 codes, k = 100, are 10 MB instead of 537.
- A table carries its codec's `name@fingerprint`, and serves no other.
- `Relatives` places the tables in a model's vocabulary: no neighbour ever lies outside its code's own block of ids.

V codes of a block, d numbers of a vector, k neighbours, in order of distance; the code itself is not among them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..backbone.interleave import Interleaver
from ..codecs.codec import Codec
from ..codecs.published import write_safetensors

FORMAT = 1
CHUNK = 1 << 24  # distances that are held at once
Place = tuple[int, int, int]  # part, depth, position


class NeighbourError(ValueError):
    """A table is damaged, or of another codebook; the message names both."""


class Near(NamedTuple):
    """Neighbours: ids [..., k] (-1 for none) and distances [..., k] (infinite for none), nearest first."""

    ids: Tensor
    distances: Tensor


@dataclass(frozen=True)
class NeighbourTable:
    """The nearest codes of every code of one codec.

    Args:
        codec: `name@fingerprint`.
        k: columns.
        blocks: (part, depth, position) -> codes int32 [V, k] and distances float32 [V, k].
    """

    codec: str
    k: int
    blocks: Mapping[Place, Near]

    @classmethod
    def build(cls, codec: Codec, k: int) -> NeighbourTable:
        """From the vectors that the codec's decoder receives.

        Raises:
            CodecUnavailable: the codec knows no vectors of its codes.
            ValueError: k is not between 1 and V - 1.
        """
        spec = codec.spec
        places = (
            [(0, 0, t) for t in range(spec.position_tables)]
            if spec.position_tables
            else [(p, d, 0) for p, sizes in enumerate(spec.vocab) for d in range(len(sizes))]
        )
        with torch.no_grad():
            blocks = {place: nearest(_vectors(codec, place), k) for place in places}
        return cls(codec.identity, k, blocks)

    @classmethod
    def of(cls, codec: Codec, k: int, *, folder: str | Path | None = None) -> NeighbourTable:
        """The table from the cache, or built and put there.

        Args:
            folder: the cache; `$XDG_CACHE_HOME/anytok/neighbours` where None.
        """
        path = Path(folder or _cache()) / f"{codec.identity.replace('/', '-')}-k{k}.safetensors"
        if path.is_file():
            return cls.load(path, codec)
        table = cls.build(codec, k)
        path.parent.mkdir(parents=True, exist_ok=True)
        table.save(path)
        return table

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {}
        for place, near in self.blocks.items():
            name = ".".join(map(str, place))
            tensors |= {f"{name}.codes": near.ids, f"{name}.distances": near.distances}
        about = {"format": FORMAT, "codec": self.codec, "k": self.k}
        write_safetensors(tensors, Path(path), {"neighbours": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, codec: Codec | None = None) -> NeighbourTable:
        """Read a file that `save` wrote.

        Args:
            codec: the codec that it must belong to.

        Raises:
            NeighbourError: the file is damaged, or belongs to another codec.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("neighbours", "{}"))
                if about.get("format") != FORMAT:
                    raise NeighbourError(
                        f"{path}: format {about.get('format')!r}, this anytok reads {FORMAT}; "
                        "delete the file, it is built again"
                    )
                blocks = {
                    tuple(map(int, key.split(".")[:3])): Near(
                        file.get_tensor(key),
                        file.get_tensor(key.removesuffix("codes") + "distances"),
                    )
                    for key in file.keys()  # noqa: SIM118
                    if key.endswith(".codes")
                }
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, NeighbourError):
                raise
            raise NeighbourError(f"{path}: not a whole table of neighbours ({error})") from error
        if codec is not None and about["codec"] != codec.identity:
            raise NeighbourError(
                f"{path} is a table of '{about['codec']}', it cannot serve '{codec.identity}'"
            )
        return cls(about["codec"], about["k"], blocks)  # type: ignore[arg-type]

    def cut(self, k: int) -> NeighbourTable:
        """The same with the first k columns."""
        if not 1 <= k <= self.k:
            raise ValueError(f"k is {k}, the table of '{self.codec}' has 1 to {self.k}")
        blocks = {p: Near(n.ids[:, :k], n.distances[:, :k]) for p, n in self.blocks.items()}
        return NeighbourTable(self.codec, k, blocks)


class Relatives:
    """Neighbours by the ids of a model's vocabulary. Ids that no table covers (text, tags, octree bits) have none.

    Args:
        tables: one for each codec whose ids are related.

    Raises:
        NeighbourError: a table of a codec that the model was not made with.
    """

    def __init__(self, interleaver: Interleaver, *tables: NeighbourTable):
        if not tables:
            raise ValueError("no table of neighbours was given")
        rules = {rule.codec: rule for rule in interleaver.rules.values()}
        spans: list[tuple[int, int]] = []
        codes: list[Tensor] = []
        distances: list[Tensor] = []
        self.k = max(table.k for table in tables)
        for table in tables:
            rule = rules.get(table.codec)
            if rule is None:
                known = ", ".join(f"'{name}'" for name in rules)
                raise NeighbourError(
                    f"the table belongs to '{table.codec}', the model's codecs are {known}"
                )
            for block in interleaver.vocabulary.of(rule.name):
                near = table.blocks.get((block.part, block.depth, block.position))
                if block.pack > 1 or near is None:
                    continue
                if len(near.ids) != block.size:
                    raise NeighbourError(
                        f"the table of '{table.codec}' has {len(near.ids)} codes at {block}, expected {block.size}"
                    )
                spans.append((block.start, block.stop))
                pad = (0, self.k - table.k)
                codes.append(torch.nn.functional.pad(near.ids + block.start, pad, value=-1))
                distances.append(
                    torch.nn.functional.pad(near.distances.float(), pad, value=math.inf)
                )
        if not spans:
            raise NeighbourError("no table covers a block of the model's vocabulary")
        rows = torch.full((interleaver.vocabulary.size,), -1, dtype=torch.int32)
        first = 0
        for start, stop in spans:
            rows[start:stop] = torch.arange(first, first + stop - start, dtype=torch.int32)
            first += stop - start
        self.rows, self.codes, self.distances = rows, torch.cat(codes), torch.cat(distances)

    @classmethod
    def plain(cls, near: Near, *, start: int = 0, size: int | None = None) -> Relatives:
        """One block of ids that begins at `start`, in a vocabulary of `size` (LlamaGen: the codes alone)."""
        self = cls.__new__(cls)
        count, self.k = near.ids.shape
        self.rows = torch.full((size or start + count,), -1, dtype=torch.int32)
        self.rows[start : start + count] = torch.arange(count, dtype=torch.int32)
        self.codes = torch.where(near.ids >= 0, near.ids + start, -1).to(torch.int32)
        self.distances = near.distances.float()
        return self

    def to(self, device: torch.device | str) -> Relatives:
        """Move the tables to where the model is."""
        self.rows, self.codes = self.rows.to(device), self.codes.to(device)
        self.distances = self.distances.to(device)
        return self

    def of(self, ids: Tensor, k: int | None = None) -> Near:
        """The k nearest ids of `ids` [...] (-1: no id): [..., k] each."""
        rows = self.rows[ids.clamp(min=0)].long()
        rows = torch.where(ids >= 0, rows, -1)
        known = (rows >= 0)[..., None]
        at = rows.clamp(min=0)
        codes = torch.where(known, self.codes[at, :k].long(), -1)
        return Near(codes, torch.where(known, self.distances[at, :k], math.inf))


def nearest(vectors: Tensor, k: int) -> Near:
    """The k nearest rows of each row of [V, d]: codes int32 and distances float32, [V, k] each.

    An evenly spaced product lattice (FSQ) is recognised and done without comparing all with all. Equal distances are
    told apart by the smaller code, so that a table is the same everywhere.
    """
    size = len(vectors)
    if not 1 <= k < size:
        raise ValueError(f"k is {k}, expected 1 to {size - 1}: a codebook of {size} codes")
    if not bool(torch.isfinite(vectors).all()):
        raise NeighbourError("a code's vector is not finite")
    vectors = vectors.detach().cpu().double()
    lattice = _lattice(vectors)
    if lattice is not None:
        return _lattice_nearest(*lattice, k)
    # Columns that are the same everywhere say nothing; without the mean the squares are small, and float32 is enough.
    vectors = vectors[:, (vectors != vectors[0]).any(0)]
    vectors = (vectors - vectors.mean(0)).float()
    squares = vectors.square().sum(-1)
    codes, distances = [], []
    for start in range(0, size, step := max(1, CHUNK // size)):
        part = vectors[start : start + step]
        table = (
            torch.addmm(squares, part, vectors.T, alpha=-2) + squares[start : start + step, None]
        )
        own = torch.arange(len(part))
        table[own, start + own] = math.inf
        found = table.clamp_(min=0).topk(k, largest=False)
        order = _by((found.values / squares.max().clamp(min=1e-30) * 1e6).round(), found.indices)
        codes.append(found.indices.gather(1, order).int())
        distances.append(found.values.gather(1, order).sqrt())
    return Near(torch.cat(codes), torch.cat(distances))


def _by(first: Tensor, second: Tensor) -> Tensor:
    """The order [n, k] of rows by `first`, then by `second`."""
    order = second.argsort(-1)
    return order.gather(1, first.gather(1, order).argsort(dim=-1, stable=True))


def _vectors(codec: Codec, place: Place) -> Tensor:
    part, depth, position = place
    if codec.spec.position_tables:
        return codec.position_vectors(position)
    return codec.code_vectors(part, depth)


def _lattice(vectors: Tensor) -> tuple[list[int], list[float], Tensor] | None:
    """Levels, spacing and digits [V, d], where the rows are all points of an evenly spaced lattice; else None."""
    if vectors.shape[1] < 2 or vectors.shape[1] > 16:
        return None
    levels, spacing, digits = [], [], []
    for column in vectors.T:
        values, index = column.unique(return_inverse=True)
        gaps = values.diff()
        if len(values) < 2 or math.prod(levels) * len(values) > len(vectors):
            return None
        if float(gaps.max() - gaps.min()) > 1e-5 * float(gaps.max()):
            return None
        levels.append(len(values))
        spacing.append(float(gaps.mean()))
        digits.append(index)
    table = torch.stack(digits, 1)
    bases = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
    whole = math.prod(levels) == len(vectors) and len((table * bases).sum(1).unique()) == len(table)
    return (levels, spacing, table) if whole else None


def _lattice_nearest(levels: list[int], spacing: list[float], digits: Tensor, k: int) -> Near:
    """Steps from a code to its neighbours are the same everywhere: they are sorted once, and cut at the walls."""
    steps = torch.tensor(spacing, dtype=torch.float64)
    bases = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
    code = torch.empty(len(digits), dtype=torch.int64)
    code[(digits * bases).sum(1)] = torch.arange(len(digits))
    radius = 1
    while True:
        moves, lengths = _moves(levels, steps, radius)
        corners = torch.cartesian_prod(*[torch.tensor([0, n - 1]) for n in levels])
        inside = _inside(corners, moves, levels)
        counts = inside.cumsum(1)
        complete = radius >= max(levels) - 1
        enough = bool((counts[:, -1] >= k).all())
        if enough:
            needed = int((counts < k).sum(1).max()) + 1
            if complete or float(lengths[needed - 1]) < (radius + 1) * float(steps.min()):
                break
        radius += 1
    moves, lengths = moves[:needed], lengths[:needed]
    shift, turn = (moves * bases).sum(1), torch.arange(needed, 0, -1, dtype=torch.float32)
    codes, distances = [], []
    for start in range(0, len(digits), step := max(1, CHUNK // needed)):
        part = digits[start : start + step]
        ok = _inside(part, moves, levels)
        first = (ok * turn).topk(k).indices  # the shortest moves that stay inside
        codes.append(code[(part * bases).sum(1)[:, None] + shift[first]].int())
        distances.append(lengths[first].float())
    return Near(torch.cat(codes), torch.cat(distances))


def _moves(levels: list[int], steps: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Steps [M, d] of up to `radius` levels a dimension, and their lengths [M], shortest first; not the zero step."""
    axes = [torch.arange(-min(radius, n - 1), min(radius, n - 1) + 1) for n in levels]
    moves = torch.cartesian_prod(*axes)
    lengths = (moves * steps).square().sum(1).sqrt()
    order = (lengths * 1e9).round().argsort(dim=0, stable=True)[1:]
    return moves[order], lengths[order]


def _inside(digits: Tensor, moves: Tensor, levels: list[int]) -> Tensor:
    """Whether each move [M, d] from each place [n, d] stays in the lattice: [n, M]."""
    ok = torch.ones(len(digits), len(moves), dtype=torch.bool)
    for axis, size in enumerate(levels):
        after = digits[:, axis, None] + moves[:, axis]
        ok &= (after >= 0) & (after < size)
    return ok


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "anytok" / "neighbours"
