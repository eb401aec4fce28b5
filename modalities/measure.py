"""How far a reconstruction is from the original.

Each function takes (reconstruction, original), refuses other shapes and NaN with a ValueError, and returns one float.

| function | unit | range | perfect |
|---|---|---|---|
| `psnr` | dB | −∞ … ∞ | ∞ |
| `ssim` | – | −1 … 1 | 1 |
| `mel_distance` | powers of ten | 0 … ∞ | 0 |
| `si_sdr` | dB | −∞ … ∞ | ∞ |
| `chamfer` | as the coordinates | 0 … ∞ | 0 |
| `f_score` | – | 0 … 1 | 1 |
| `volume_iou` | – | 0 … 1 | 1 |
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import DAC_SCALES, MultiscaleMel, multiscale_mels
from .shape import Shape

_SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5
_POINTS = 50_000  # drawn from a mesh for Chamfer and F-score


def psnr(reconstruction: Tensor, original: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio, 10 log₁₀(peak² / mean squared error), over all values together.

    Args:
        reconstruction: any shape: [3, H, W] of a picture, [T, 3, H, W] of a film.
        original: the same shape.
        peak: the largest possible value: 1 for floats in [0, 1], 255 for uint8.

    Returns:
        dB; ∞ where both are equal.
    """
    x, y = _pair(reconstruction, original)
    error = (x - y).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def ssim(reconstruction: Tensor, original: Tensor, peak: float = 1.0) -> float:
    """Structural similarity (Wang et al. 2004): mean over channels and all positions of the window.

    (2μxμy + C₁)(2σxy + C₂) / ((μx² + μy² + C₁)(σx² + σy² + C₂)) with a Gaussian window of 11 × 11 and σ = 1.5,
    C₁ = (0.01 peak)², C₂ = (0.03 peak)²; windows that leave the picture are not counted.

    Args:
        reconstruction: [..., H, W], both sides at least 11.
        original: the same shape.
        peak: the largest possible value.
    """
    x, y = _pair(reconstruction, original)
    if x.ndim < 2 or min(x.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(f"pictures are {tuple(x.shape)}, expected [..., H, W] of at least 11 × 11")
    x, y = (image.reshape(-1, 1, *image.shape[-2:]) for image in (x, y))
    offset = torch.arange(_SSIM_WINDOW, dtype=x.dtype, device=x.device) - _SSIM_WINDOW // 2
    bell = torch.exp(-(offset**2) / (2 * _SSIM_SIGMA**2))
    bell = bell / bell.sum()

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def mel_distance(
    reconstruction: Tensor,
    original: Tensor,
    rate: int,
    config: MultiscaleMel = DAC_SCALES,
) -> float:
    """Multi-scale mel distance: the sum over seven scales of the mean |log₁₀ mel − log₁₀ mel'|, as DAC's loss.

    Args:
        reconstruction: [..., N].
        original: the same shape.
        rate: samples per second.
        config: the scales.
    """
    x, y = _pair(reconstruction, original)
    pairs = zip(multiscale_mels(x, rate, config), multiscale_mels(y, rate, config))
    return sum((a - b).abs().mean().item() for a, b in pairs)


def si_sdr(reconstruction: Tensor, original: Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio (Le Roux et al. 2019), mean over channels.

    10 log₁₀(‖αs‖² / ‖ŝ − αs‖²) with α = ⟨ŝ, s⟩ / ‖s‖²; the mean is not taken away.

    Args:
        reconstruction: [..., N].
        original: the same shape, not silent.

    Returns:
        dB; ∞ where the reconstruction is a multiple of the original, −∞ where it is orthogonal to it.
    """
    x, y = _pair(reconstruction, original)
    energy = y.square().sum(-1)
    if (energy == 0).any():
        raise ValueError("the original is silent, so that no ratio to it exists")
    target = ((x * y).sum(-1) / energy)[..., None] * y
    ratio = target.square().sum(-1) / (x - target).square().sum(-1)
    if ratio.isnan().any():
        raise ValueError("the reconstruction is silent, so that there is nothing to compare")
    return (10 * ratio.log10()).mean().item()


def chamfer(reconstruction: Shape, original: Shape, rng: torch.Generator | None = None) -> float:
    """Chamfer distance: ½ (mean distance to the other's nearest point, there and back), Euclidean, not squared.

    Args:
        reconstruction: a point cloud, or a mesh, of which 50,000 points are drawn.
        original: likewise.
        rng: draws the points of meshes; None draws from seed 0.
    """
    there, back = _nearest(reconstruction, original, rng)
    return ((there.mean() + back.mean()) / 2).item()


def f_score(
    reconstruction: Shape,
    original: Shape,
    threshold: float = 0.01,
    rng: torch.Generator | None = None,
) -> float:
    """F-score (Knapitsch et al. 2017): harmonic mean of precision and recall within a distance.

    Precision is the share of the reconstruction's points that have an original point within the distance, recall the
    share of the original's points that have a reconstructed one.

    Args:
        reconstruction: a point cloud, or a mesh, of which 50,000 points are drawn.
        original: likewise.
        threshold: the distance, as a share of the diagonal of the original's bounding box.
        rng: draws the points of meshes; None draws from seed 0.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, expected more than 0")
    there, back = _nearest(reconstruction, original, rng)
    limit = threshold * original.diagonal
    precision, recall = (there <= limit).double().mean(), (back <= limit).double().mean()
    if precision + recall == 0:
        return 0.0
    return (2 * precision * recall / (precision + recall)).item()


def volume_iou(reconstruction: Shape, original: Shape, resolution: int = 96) -> float:
    """Volume that both enclose over volume that either encloses, counted on a grid.

    Args:
        reconstruction: a watertight mesh.
        original: a watertight mesh.
        resolution: grid points along the longest side of the common bounding box.
    """
    from .inside import Grid, inside

    for name, shape in (("reconstruction", reconstruction), ("original", original)):
        if not shape.is_watertight:
            raise ValueError(f"the {name} is not watertight; see watertight.make_watertight")
    grid = Grid.around([reconstruction, original], resolution)
    a, b = inside(reconstruction, grid), inside(original, grid)
    either = (a | b).sum()
    if either == 0:
        raise ValueError("neither shape encloses a point of the grid; raise the resolution")
    return ((a & b).sum() / either).item()


def _pair(reconstruction: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64, checked."""
    if reconstruction.shape != original.shape:
        raise ValueError(
            f"reconstruction is {tuple(reconstruction.shape)}, original {tuple(original.shape)}, "
            f"expected equal shapes"
        )
    if reconstruction.numel() == 0:
        raise ValueError("both are empty")
    x, y = reconstruction.detach().double(), original.detach().double()
    for name, tensor in (("reconstruction", x), ("original", y)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the {name} holds NaN or infinite values")
    return x, y


def _nearest(a: Shape, b: Shape, rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """For each point of `a` the distance to `b`'s nearest point, and the reverse, float64."""
    from scipy.spatial import KDTree

    # One generator for both in turn: equal meshes must not give equal points, or their distance would be 0 only by
    # that accident while that of a slightly moved copy is not.
    rng = torch.Generator().manual_seed(0) if rng is None else rng
    clouds = [_points(shape, rng) for shape in (a, b)]
    trees = [KDTree(cloud.numpy()) for cloud in clouds]
    there, _ = trees[1].query(clouds[0].numpy())
    back, _ = trees[0].query(clouds[1].numpy())
    return torch.from_numpy(there), torch.from_numpy(back)


def _points(shape: Shape, rng: torch.Generator) -> Tensor:
    sampled = shape if shape.faces is None else shape.sample(_POINTS, rng)
    return sampled.vertices.detach().double().cpu()
