"""Pitch of speech, for the vocoder's pitch predictor to learn from.

The published recipe asks WORLD (harvest); here it is the normalised autocorrelation of de Cheveigné and Kawahara's YIN
(JASA 2002) in its simplest form: of all lags between 60 and 500 Hz the first that comes near the best one.

Letters: B batch, L samples, T frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST, HIGHEST = 60.0, 500.0  # Hz
VOICED = 0.6  # normalised autocorrelation from which on speech is voiced
NEAR = 0.9  # of the best lag's value: a shorter lag this good is the period, the best one a multiple of it
QUIET = 1e-3  # root mean square below which there is no voice


@torch.no_grad()
def pitch(samples: Tensor, rate: int, hop: int) -> Tensor:
    """Samples [B, L], L a multiple of `hop`, to Hz [B, L / hop]; 0 where unvoiced."""
    longest, shortest = round(rate / LOWEST), round(rate / HIGHEST)
    window = 2 * longest
    padded = F.pad(samples.float(), (longest, 2 * longest))
    frames = padded.unfold(1, window + longest, hop)[:, : samples.shape[1] // hop]
    frames = frames - frames.mean(-1, keepdim=True)
    head = frames[..., :window]
    size = 2 ** (window + longest - 1).bit_length()
    spectrum = torch.fft.rfft(head, size).conj() * torch.fft.rfft(frames, size)
    products = torch.fft.irfft(spectrum, size)[..., : longest + 1]
    energy = F.pad(frames.square().cumsum(-1), (1, 0))
    lagged = energy[..., window:] - energy[..., : longest + 1]
    alike = products / (lagged[..., :1] * lagged).clamp(min=1e-12).sqrt()
    best = alike[..., shortest:].amax(-1)
    # A peak: not lower than its neighbours, and nearly the best.
    middle = alike[..., shortest:longest]
    peak = (middle >= alike[..., shortest - 1 : longest - 1]) & (
        middle >= alike[..., shortest + 1 :]
    )
    lag = shortest + (peak & (middle >= NEAR * best[..., None])).float().argmax(-1)
    heard = (best > VOICED) & ((lagged[..., 0] / window).sqrt() > QUIET)
    return torch.where(heard, rate / refined(alike, lag), 0.0)


def refined(alike: Tensor, lag: Tensor) -> Tensor:
    """The top of the parabola through a peak and its neighbours: lags [B, T] as floats."""
    before, at, after = (alike.gather(-1, (lag + i)[..., None])[..., 0] for i in (-1, 0, 1))
    bend = before - 2 * at + after
    shift = 0.5 * (before - after) / torch.where(bend.abs() < 1e-9, -1e-9, bend)
    return lag + shift.clamp(-0.5, 0.5)
