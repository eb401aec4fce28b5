"""GlobalCom2 (arXiv 2501.05179): the thumbnail of a large picture says how much of each crop to keep, and what.

For LLaVA-NeXT's "anyres": a picture is seen once whole (the thumbnail, side x side tokens) and once as a grid of crops,
each side x side, of which the padding around the fitted picture does not count. Scores are CLS's attention logits in
the last vision layer, mean over heads.

- The thumbnail keeps its int(share n) highest.
- Crop c keeps int(ratio_c n_c) of its n_c tokens, ratio_c = share (1 + s_c - mean s), at most 1; s is the softmax over
  crops, at temperature 10, of the thumbnail's scores summed over each crop's region.
- Within a crop a token's score is its own plus the thumbnail's, resized bilinearly to the picture's token grid; each
  is first divided by its norm over the crop.

Everything is written in raster order, one "newline" behind each row of the grid. Padding is cut before anything is
counted, and indices always mean tokens of the padded crop; the published code mixes the two up where padding exists,
and writes newlines for rows that are all padding.

B pictures, C crops (padded to the most of the batch), n = side^2 tokens of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .select import Selection, Visual, top

TEMPERATURE = 10.0


@dataclass(frozen=True, kw_only=True)
class AnyRes:
    """How one picture became crops.

    Args:
        grid: (rows, columns) of crops.
        side: tokens along one side of a view.
        size: the picture's (height, width) in pixels, of which only the ratio counts.
    """

    grid: tuple[int, int]
    side: int
    size: tuple[int, int]

    def __post_init__(self):
        if min(*self.grid, self.side, *self.size) < 1:
            raise ValueError(f"{self} has a number below 1")

    @property
    def crops(self) -> int:
        """Crops of the picture."""
        return self.grid[0] * self.grid[1]

    def inside(self) -> Tensor:
        """[H, W] over the whole token grid, False at the padding around the fitted picture."""
        height, width = (n * self.side for n in self.grid)
        (source_height, source_width), mask = self.size, torch.zeros(height, width).bool()
        if source_width * height > width * source_height:
            above = (height - source_height * width // source_width) // 2
            mask[above : height - above] = True
        else:
            left = (width - source_width * height // source_height) // 2
            mask[:, left : width - left] = True
        return mask

    def by_crop(self, grid: Tensor) -> Tensor:
        """[H, W] over the token grid to [C, n]."""
        rows, columns = self.grid
        return rearrange(grid, "(r h) (c w) -> (r c) (h w)", r=rows, c=columns)

    def raster(self) -> Tensor:
        """[H, W], the index in C * n of the token at each place of the grid."""
        rows, columns = self.grid
        index = torch.arange(self.crops * self.side**2)
        return rearrange(
            index, "(r c h w) -> (r h) (c w)", r=rows, c=columns, h=self.side, w=self.side
        )


def select(
    thumbnail: Visual, crops: Visual, layouts: Sequence[AnyRes], *, share: float = 0.25
) -> tuple[Selection, Selection]:
    """What stays of thumbnails and of crops.

    Args:
        thumbnail: B rows of n tokens, with cls_logits.
        crops: B * C rows, the crops of picture b at b C ... b C + C - 1, with cls_logits; rows behind a picture's own
            crops are ignored.
        layouts: one a picture.

    Returns:
        Selections of the B thumbnails, and of the B * C crops; indices of a crop are those of its n tokens.

    Raises:
        ValueError: no logits, a share out of (0, 1], or shapes that do not fit the layouts.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected more than 0 and at most 1")
    if thumbnail.cls_logits is None or crops.cls_logits is None:
        raise ValueError("GlobalCom2 needs cls_logits of thumbnail and crops (backbone.vision)")
    _fit(thumbnail, crops, layouts)
    most = len(crops.features) // len(layouts)
    n = thumbnail.features.shape[1]
    whole = top(thumbnail, thumbnail.cls_logits, [int(count * share) for count in thumbnail.counts])
    inside = torch.zeros(len(crops.features), n, dtype=torch.bool)
    scores, numbers = torch.zeros(len(crops.features), n), [0] * len(crops.features)
    logits = crops.cls_logits.float().cpu()
    for i, (layout, base) in enumerate(zip(layouts, thumbnail.cls_logits.float().cpu())):
        rows = slice(i * most, i * most + layout.crops)
        valid = layout.by_crop(layout.inside())
        inside[rows] = valid
        scores[rows] = crop_scores(base, logits[rows], layout, valid)
        ratios = crop_ratios(base, layout, share)
        numbers[rows] = [int(m * r) for m, r in zip(valid.sum(1).tolist(), ratios.tolist())]
    device = crops.features.device
    usable = Visual(features=crops.features, valid=inside.to(device) & crops.real)
    return whole, top(usable, scores.to(device), numbers)


def crop_ratios(base: Tensor, layout: AnyRes, share: float) -> Tensor:
    """[C], the share that each crop keeps, from the thumbnail's scores [n]."""
    rows, columns = layout.grid
    # Sides that do not divide leave the rest to the last row and column of crops, as published.
    place = torch.arange(layout.side)
    row = (place // max(layout.side // rows, 1)).clamp(max=rows - 1)
    column = (place // max(layout.side // columns, 1)).clamp(max=columns - 1)
    region = (row[:, None] * columns + column).flatten()
    sums = torch.zeros(layout.crops, dtype=torch.float64).index_add(0, region, base.double())
    weight = (sums / TEMPERATURE).softmax(0)
    return (share * (1 + weight - weight.mean())).clamp(max=1)


def crop_scores(base: Tensor, logits: Tensor, layout: AnyRes, valid: Tensor) -> Tensor:
    """[C, n] of the thumbnail's scores [n] and the crops' own [C, n]; 0 at padding.

    Args:
        valid: [C, n], False at padding.
    """
    inside = layout.inside()
    height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
    square = rearrange(base, "(h w) -> 1 1 h w", h=layout.side)
    resized = F.interpolate(square, (height, width), mode="bilinear", align_corners=False)
    spread = torch.zeros(inside.shape).masked_scatter(inside, resized[0, 0])
    own = logits.where(valid, 0)
    return F.normalize(own, dim=1) + F.normalize(layout.by_crop(spread), dim=1)


def stitch(
    features: Tensor, newline: Tensor, layouts: Sequence[AnyRes], kept: Selection
) -> list[Tensor]:
    """The crops' tokens of each picture in raster order, a newline behind each row of the picture.

    Args:
        features: [B * C, n, d]; kept: what `select` gave for them.
        newline: [d].

    Returns:
        One [L, d] a picture.
    """
    most = len(features) // len(layouts)
    mask = kept.mask(features.shape[1])
    lines = []
    for i, layout in enumerate(layouts):
        rows = slice(i * most, i * most + layout.crops)
        raster = layout.raster().to(features.device)
        content = features[rows].flatten(0, 1)
        stays = mask[rows].flatten()[raster]
        real = layout.inside().any(1)
        picture = [
            torch.cat([content[line[keep]], newline[None]])
            for line, keep, some in zip(raster, stays, real.tolist())
            if some
        ]
        lines.append(torch.cat(picture))
    return lines


def _fit(thumbnail: Visual, crops: Visual, layouts: Sequence[AnyRes]) -> None:
    pictures, n = thumbnail.features.shape[:2]
    if len(layouts) != pictures or len(crops.features) % pictures:
        raise ValueError(
            f"{pictures} thumbnails, {len(layouts)} layouts and {len(crops.features)} crops; "
            "expected one layout a thumbnail, and as many crops for each (padded)"
        )
    most = len(crops.features) // pictures
    for i, layout in enumerate(layouts):
        if layout.crops > most or layout.side**2 != n or crops.features.shape[1] != n:
            raise ValueError(
                f"picture {i} has {layout.crops} crops of {layout.side**2} tokens, "
                f"given were {most} of {crops.features.shape[1]}, and thumbnails of {n}"
            )
