"""Discriminators of waveforms and their losses (DAC, arXiv 2306.06546 §3.4; HiFi-GAN, arXiv 2010.05646).

- `PeriodDiscriminator` folds the waveform to [L / p, p] and convolves along the columns: every p-th sample.
- `BandDiscriminator` sees a complex spectrogram, cut into bands of frequency, each with its own stack.

Each returns the features of all its layers, the last of which are the logits. Least-squares GAN: real is 1, fake is 0.
Inputs lose their mean and get a peak of 0.8, so loudness tells nothing.

Letters: B batch, L samples, C channels, H frames, W frequencies.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .spectral import stft

PERIODS = (2, 3, 5, 7, 11)
WINDOWS = (2048, 1024, 512)
BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
Features = list[Tensor]


class Discriminators(nn.Module):
    """All periods and all windows.

    Args:
        width: channels of a band's layers; the period discriminators begin with as many and grow 32-fold.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.periods = nn.ModuleList(PeriodDiscriminator(p, width) for p in PERIODS)
        self.windows = nn.ModuleList(BandDiscriminator(w, width) for w in WINDOWS)

    def forward(self, x: Tensor) -> list[Features]:
        """Waveforms [B, 1, L] to the features of each discriminator."""
        x = x - x.mean(-1, keepdim=True)
        x = 0.8 * x / (x.abs().amax(-1, keepdim=True) + 1e-9)
        return [d(x) for d in (*self.periods, *self.windows)]


class PeriodDiscriminator(nn.Module):
    """2-D convolutions k5 x 1, stride 3 x 1, on the waveform folded to width `period`."""

    def __init__(self, period: int, width: int = 32):
        super().__init__()
        self.period = period
        channels = (1, width, 4 * width, 16 * width, 32 * width)
        layers = [_conv(a, b, (5, 1), stride=(3, 1)) for a, b in pairwise(channels)]
        self.layers = nn.ModuleList([*layers, _conv(channels[-1], channels[-1], (5, 1))])
        self.last = _conv(channels[-1], 1, (3, 1))

    def forward(self, x: Tensor) -> Features:
        """[B, 1, L] to the features of each layer [B, C, H, period]."""
        x = F.pad(x, (0, -x.shape[-1] % self.period), mode="reflect")
        x = rearrange(x, "b c (h p) -> b c h p", p=self.period)
        return _through(self.layers, self.last, x)


class BandDiscriminator(nn.Module):
    """2-D convolutions on the bands of a complex spectrogram, hop a quarter of the window."""

    def __init__(self, window: int, width: int = 32):
        super().__init__()
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        bins = window // 2 + 1
        edges = [int(share * bins) for share in BANDS]
        self.bands = list(pairwise(edges))
        self.stacks = nn.ModuleList(
            nn.ModuleList(
                [
                    _conv(2, width, (3, 9)),
                    *[_conv(width, width, (3, 9), stride=(1, 2)) for _ in range(3)],
                    _conv(width, width, (3, 3)),
                ]
            )
            for _ in self.bands
        )
        self.last = _conv(width, 1, (3, 3))

    def forward(self, x: Tensor) -> Features:
        """[B, 1, L] to the features [B, C, H, W] of each layer and band, and the logits of all bands."""
        spectrum = rearrange(stft(x, self.hann), "b w h c -> b c h w")
        features, ends = [], []
        for (low, high), stack in zip(self.bands, self.stacks):
            y = spectrum[..., low:high]
            for layer in stack:
                y = F.leaky_relu(layer(y), 0.1)
                features.append(y)
            ends.append(y)
        return [*features, self.last(torch.cat(ends, -1))]


def discriminator_loss(real: list[Features], fake: list[Features]) -> Tensor:
    """What the discriminators minimise: a scalar, summed over them."""
    pairs = zip(real, fake, strict=True)
    return sum((1 - r[-1]).square().mean() + f[-1].square().mean() for r, f in pairs)  # type: ignore[return-value]


def adversarial_loss(fake: list[Features]) -> Tensor:
    """What the codec minimises to be taken for real: a scalar, summed over discriminators."""
    return sum((1 - f[-1]).square().mean() for f in fake)  # type: ignore[return-value]


def feature_loss(real: list[Features], fake: list[Features]) -> Tensor:
    """The mean difference of all features but the logits: a scalar, summed over layers."""
    return sum(
        (a.detach() - b).abs().mean()
        for r, f in zip(real, fake, strict=True)
        for a, b in zip(r[:-1], f[:-1], strict=True)
    )  # type: ignore[return-value]


def _conv(
    inside: int, outside: int, size: tuple[int, int], stride: tuple[int, int] = (1, 1)
) -> nn.Module:
    padding = (size[0] // 2, size[1] // 2)
    return weight_norm(nn.Conv2d(inside, outside, size, stride, padding))


def _through(layers: nn.ModuleList, last: nn.Module, x: Tensor) -> Features:
    features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), 0.1)
        features.append(x)
    return [*features, last(x)]
