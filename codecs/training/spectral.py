"""Spectral losses and measures of waveforms [B, 1, L]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
MELS = (5, 10, 20, 40, 80, 160, 320)


class MultiScaleMel(nn.Module):
    """Sum over seven windows of the mean |log10 mel(a) - log10 mel(b)| (DAC's training loss, arXiv 2306.06546).

    Magnitudes, hop a quarter of the window, Slaney mels over the whole band, floor 1e-5.
    """

    def __init__(self, rate: int):
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        for window, mels in zip(WINDOWS, MELS):
            bank = melscale_fbanks(window // 2 + 1, 0.0, rate / 2, mels, rate, "slaney", "slaney")
            self.register_buffer(f"bank{window}", bank.T.contiguous(), persistent=False)
            self.register_buffer(f"hann{window}", torch.hann_window(window), persistent=False)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The distance of y from x: a scalar, the mean over the batch."""
        total = y.new_zeros(())
        for window in WINDOWS:
            with torch.no_grad():
                target = self.log_mel(x, window)
            total = total + (self.log_mel(y, window) - target).abs().mean()
        return total

    def log_mel(self, x: Tensor, window: int) -> Tensor:
        """[B, 1, L] to [B, mels, frames]."""
        spectrum = stft(x, getattr(self, f"hann{window}"))
        # The square root's slope is infinite at silence.
        magnitude = (spectrum.square().sum(-1) + 1e-12).sqrt()
        return (getattr(self, f"bank{window}") @ magnitude).clamp(min=1e-5).log10()


class ComplexSTFT(nn.Module):
    """Mean over windows of the L1 distance of complex spectra, over the target's own size: phase counts."""

    def __init__(self, windows: tuple[int, ...] = (1024, 256)):
        super().__init__()
        self.windows = windows
        for window in windows:
            self.register_buffer(f"hann{window}", torch.hann_window(window), persistent=False)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The distance of y from x: a scalar; about 1 where y is silent."""
        total = y.new_zeros(())
        for window in self.windows:
            hann = getattr(self, f"hann{window}")
            with torch.no_grad():
                target = stft(x, hann)
                size = target.abs().mean((1, 2, 3)) + 1e-3
            distance = (stft(y, hann) - target).abs().mean((1, 2, 3))
            total = total + (distance / size).mean() / len(self.windows)
        return total


def stft(x: Tensor, window: Tensor) -> Tensor:
    """[B, 1, L] to [B, bins, frames, 2], hop a quarter of the window."""
    size = len(window)
    x = F.pad(x, (size // 2, size // 2), mode="reflect") if x.shape[-1] > size // 2 else x
    spectrum = torch.stft(
        rearrange(x, "b 1 l -> b l"),
        size,
        hop_length=size // 4,
        window=window,
        center=False,
        return_complex=True,
    )
    return torch.view_as_real(spectrum)


def si_sdr(y: Tensor, x: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio of y against x, both [B, 1, L], in dB: [B]."""
    y, x = y.flatten(1) - y.flatten(1).mean(1, True), x.flatten(1) - x.flatten(1).mean(1, True)
    scale = (y * x).sum(1, True) / (x.square().sum(1, True) + 1e-9)
    signal, noise = (scale * x).square().sum(1), (y - scale * x).square().sum(1)
    return 10 * torch.log10((signal + 1e-9) / (noise + 1e-9))
