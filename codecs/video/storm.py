"""STORM (arXiv 2503.04130): fewer visual tokens of a video, after a Mamba has spread each over time.

Features of an image encoder [B, T, N, D] (frames, tokens of a frame in raster order) are scanned as one sequence, frame
behind frame, in both directions: L layers of x + Mixer(LayerNorm(x)). What neighbours know is then in each token, and
little is lost by reducing:

- temporal pooling: the mean of k consecutive frames at each place; the paper's k is 4;
- spatial pooling: the mean over windows of k x k tokens of a frame;
- sampling at test time: every s-th of the frames that are left (0, s, 2s, ...), without training.

Temporal 4 and sampling 2 together leave 12.5 %. A length that k does not divide: the last group is the mean of the
frames, or tokens, that remain; none is left out, none counts twice. The paper does not say; neither the depth of the
stack nor how directions are joined is published. No public weights exist.

One picture is a video of one frame. Rows of different length share a batch (`counts`). With merge="forward" the same
module works on a stream, in memory that does not grow (`stream`).

B rows, T frames, N tokens of a frame, h w its grid, D width, k and s as above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..layers.mamba import BidirectionalMamba, Mamba, MambaConfig, MambaState, TwoMambas

Grid = tuple[int, int]
MIXERS = {"shared": BidirectionalMamba, "two": TwoMambas, "forward": Mamba}


@dataclass(frozen=True, kw_only=True)
class StormConfig:
    """Sizes and reductions.

    Args:
        width: D.
        layers: L; with 0, reductions work on the encoder's features as they are.
        state, conv, expand: of each Mamba.
        merge: "shared" projections for both directions (VideoMamba), "two" whole blocks, or "forward" only.
        temporal, spatial: k of each pooling; 1 for none.
    """

    width: int
    layers: int = 2
    state: int = 16
    conv: int = 4
    expand: int = 2
    merge: Literal["shared", "two", "forward"] = "shared"
    temporal: int = 4
    spatial: int = 1

    def __post_init__(self):
        if self.merge not in MIXERS:
            raise ValueError(f"merge is {self.merge!r}, expected one of {', '.join(MIXERS)}")
        for name, least in (("layers", 0), ("temporal", 1), ("spatial", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {least} or more")

    @property
    def mixer(self) -> MambaConfig:
        """Of one Mamba."""
        return MambaConfig(width=self.width, state=self.state, conv=self.conv, expand=self.expand)


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """What is left of videos.

    Args:
        x: [B, T', N', D], zeros behind a row's last group.
        counts: groups of frames of each row.
        grid: (h', w'), h' w' = N'.
    """

    x: Tensor
    counts: tuple[int, ...]
    grid: Grid

    @property
    def tokens(self) -> Tensor:
        """[B, T' N', D], as a language model reads them."""
        return self.x.flatten(1, 2)

    @property
    def valid(self) -> Tensor:
        """[B, T' N'], False behind a row's last token."""
        number = torch.tensor(self.counts, device=self.x.device)[:, None]
        groups = torch.arange(self.x.shape[1], device=self.x.device) < number
        return groups.repeat_interleave(self.x.shape[2], 1)


class MambaLayer(nn.Module):
    """x + Mixer(LayerNorm(x)) over [B, L, D]."""

    def __init__(self, config: StormConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.mixer = MIXERS[config.merge](config.mixer)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`valid` [B, L], False at padding."""
        return x + self.mixer(self.norm(x), valid)

    def advance(self, x: Tensor, state: MambaState | None) -> tuple[Tensor, MambaState]:
        """The next positions of a stream."""
        y, state = self.mixer.advance(self.norm(x), state)
        return x + y, state


class Storm(nn.Module):
    """The reducer, [B, T, N, D] -> [B, T', N', D]."""

    def __init__(self, config: StormConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(MambaLayer(config) for _ in range(config.layers))

    def forward(
        self,
        x: Tensor,
        *,
        counts: Sequence[int] | None = None,
        grid: Grid | None = None,
        sample: int = 1,
    ) -> Reduced:
        """Scan, pool over time, pool over space, sample.

        Args:
            x: [B, T, N, D].
            counts: real frames of each row, where rows are right-padded; None for all.
            grid: (h, w) of a frame; a square where None.
            sample: s, keep every s-th frame of what pooling left.

        Raises:
            ValueError: no frames, another width, a grid that is not N tokens.
        """
        grid, counts = self._check(x, counts, grid)
        y = rearrange(x, "b t n d -> b (t n) d")
        valid = None
        if min(counts) < x.shape[1]:
            frames = torch.arange(x.shape[1], device=x.device)
            real = frames < torch.tensor(counts, device=x.device)[:, None]
            valid = real.repeat_interleave(x.shape[2], 1)
        for layer in self.layers:
            y = layer(y, valid)
        y = rearrange(y, "b (t n) d -> b t n d", t=x.shape[1])
        return reduce(
            y,
            counts=counts,
            grid=grid,
            temporal=self.config.temporal,
            spatial=self.config.spatial,
            sample=sample,
        )

    def stream(self, *, grid: Grid | None = None, sample: int = 1) -> StormStream:
        """Reduce videos frame by frame.

        Raises:
            ValueError: a stack that reads backwards too.
        """
        if self.config.merge != "forward":
            raise ValueError(
                f"merge is {self.config.merge!r}, which needs the whole video; a stream needs 'forward'"
            )
        return StormStream(self, grid, sample)

    def _check(
        self, x: Tensor, counts: Sequence[int] | None, grid: Grid | None
    ) -> tuple[Grid, tuple[int, ...]]:
        if x.ndim != 4 or x.shape[3] != self.config.width:
            raise ValueError(
                f"x is {tuple(x.shape)}, expected [B, T, N, D] with D = {self.config.width}"
            )
        numbers = tuple([x.shape[1]] * len(x) if counts is None else counts)
        if len(numbers) != len(x) or not all(1 <= n <= x.shape[1] for n in numbers):
            raise ValueError(
                f"{list(numbers)} frames, expected {len(x)} numbers of 1 to {x.shape[1]}"
            )
        return frame_grid(x.shape[2], grid), numbers


class StormStream:
    """Frames in, groups of frames out, as soon as each is whole; the last, shorter one at the end."""

    def __init__(self, storm: Storm, grid: Grid | None, sample: int):
        self.storm, self.grid, self.sample = storm, grid, sample
        self.states: list[MambaState | None] = [None] * len(storm.layers)
        self.waiting: Tensor | None = None
        self.groups = 0

    @torch.no_grad()
    def push(self, x: Tensor) -> Tensor:
        """[B, t, N, D], the next frames, to [B, T', N', D], the groups that they completed."""
        grid, _ = self.storm._check(x, None, self.grid)
        y = rearrange(x, "b t n d -> b (t n) d")
        for i, layer in enumerate(self.storm.layers):
            y, self.states[i] = layer.advance(y, self.states[i])
        y = rearrange(y, "b (t n) d -> b t n d", t=x.shape[1])
        y = y if self.waiting is None else torch.cat([self.waiting, y], 1)
        whole = y.shape[1] - y.shape[1] % self.storm.config.temporal
        self.waiting = y[:, whole:].clone()
        return self._out(y[:, :whole], grid)

    def finish(self) -> Tensor:
        """[B, T', N', D], the group of what remains: T' is 0 or 1."""
        if self.waiting is None:
            raise ValueError("the stream ends before any frame came")
        grid = frame_grid(self.waiting.shape[2], self.grid)
        rest, self.waiting = self.waiting, self.waiting[:, :0]
        return self._out(rest, grid)

    def _out(self, y: Tensor, grid: Grid) -> Tensor:
        config = self.storm.config
        pooled = spatial_pool(temporal_pool(y, config.temporal), config.spatial, grid=grid)
        first = -self.groups % self.sample
        self.groups += pooled.shape[1]
        return pooled[:, first :: self.sample]


def reduce(
    x: Tensor,
    *,
    counts: Sequence[int],
    grid: Grid,
    temporal: int = 1,
    spatial: int = 1,
    sample: int = 1,
) -> Reduced:
    """The three reductions of [B, T, N, D] in their order; see `Storm.forward`."""
    if sample < 1:
        raise ValueError(f"sample is {sample}, expected 1 (all frames) or more")
    left = [-(-n // temporal) for n in counts]
    y = temporal_pool(x, temporal, counts=counts)
    y = spatial_pool(y, spatial, grid=grid)[:, ::sample]
    return Reduced(
        x=y,
        counts=tuple(-(-n // sample) for n in left),
        grid=(-(-grid[0] // spatial), -(-grid[1] // spatial)),
    )


def temporal_pool(x: Tensor, k: int, *, counts: Sequence[int] | None = None) -> Tensor:
    """Means of k consecutive frames: [B, T, N, D] -> [B, ceil(T / k), N, D]; a last group may be of fewer.

    Args:
        counts: real frames of each row; groups that have none are zeros.
    """
    rows, length = x.shape[:2]
    if length % k == 0 and (counts is None or min(counts) == length):
        return rearrange(x, "b (t k) n d -> b t k n d", k=k).mean(2)
    number = torch.tensor([length] * rows if counts is None else list(counts), device=x.device)
    padded = -(-length // k) * k
    real = torch.arange(padded, device=x.device) < number[:, None]
    x = F.pad(x, (0, 0, 0, 0, 0, padded - length)).where(real[..., None, None], 0)
    total = rearrange(x, "b (t k) n d -> b t k n d", k=k).sum(2)
    many = rearrange(real, "b (t k) -> b t k", k=k).sum(2).clamp(min=1)
    return total / many[..., None, None]


def spatial_pool(x: Tensor, k: int, *, grid: Grid | None = None) -> Tensor:
    """Means of k x k windows of each frame: [B, T, N, D] -> [B, T, N', D]; windows at the edge may be smaller."""
    h, w = frame_grid(x.shape[2], grid)
    if k == 1:
        return x
    flat = rearrange(x, "b t (h w) d -> (b t) d h w", h=h)
    if len(flat) == 0:  # a stream may have no whole group yet
        return x.new_zeros(*x.shape[:2], -(-h // k) * -(-w // k), x.shape[3])
    pooled = F.avg_pool2d(flat, k, ceil_mode=True, count_include_pad=False)
    return rearrange(pooled, "(b t) d h w -> b t (h w) d", b=x.shape[0])


def fold(x: Tensor, *, grid: Grid | None = None) -> Tensor:
    """Four neighbours side by side: [..., N, D] -> [..., ceil(h/2) ceil(w/2), 4 D], odd sides padded with zeros.

    VILA's down-sampling, which STORM's projection begins with; the channels of (row, column) come in raster order.
    """
    h, w = frame_grid(x.shape[-2], grid)
    square = rearrange(x, "... (h w) d -> ... h w d", h=h)
    square = F.pad(square, (0, 0, 0, w % 2, 0, h % 2))
    return rearrange(square, "... (h p) (w q) d -> ... (h w) (p q d)", p=2, q=2)


class Projector(nn.Module):
    """What stands between an image encoder and the scan: `fold`, then one linear map, [..., N, d] -> [..., N/4, D]."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.linear = nn.Linear(4 * features, width)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """See the class."""
        return self.linear(fold(x, grid=grid))


def frame_grid(tokens: int, grid: Grid | None) -> Grid:
    """The grid of a frame's tokens; a square where none is given.

    Raises:
        ValueError: it does not hold so many tokens.
    """
    side = round(tokens**0.5)
    height, width = grid or (side, side)
    if height * width != tokens:
        hint = "" if grid else "; give grid=(h, w) for frames that are not square"
        raise ValueError(f"a frame has {tokens} tokens, the grid is {height} x {width}{hint}")
    return height, width
