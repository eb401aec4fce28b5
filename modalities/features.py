"""Mel spectra of sounds, as the published systems compute them, each from a frozen set of parameters.

There is no cache: a filter bank is built from all of its parameters whenever it is needed (a millisecond). Matcha-TTS
caches its banks by `fmax` alone, and two configurations in one process then share one bank.

| function | used by | frames of N samples |
|---|---|---|
| `hifi_mel` | HiFi-GAN, Matcha-TTS, CosyVoice's flow and vocoder | N / hop |
| `whisper_mel` | Whisper, the S3 tokenizer | ⌊N / hop⌋ |
| `kaldi_fbank` | the CAM++ speaker encoder | 1 + ⌊(N − 400) / 160⌋ |
| `multiscale_mels` | DAC's loss and our mel distance | 1 + ⌊N / hop⌋ per scale |

All are differentiable and run on the device and in the batch of their input: every item's result is what it would be
alone. Letters: N samples, M mel bands, K frequency bins, T frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def _check_transform(
    rate: int, n_fft: int, hop: int, n_mels: int, fmin: float, fmax: float | None
) -> None:
    if min(rate, n_fft, hop, n_mels) < 1 or hop > n_fft:
        raise ValueError(f"{rate=}, {n_fft=}, {hop=}, {n_mels=}: expected all ≥ 1 and hop ≤ n_fft")
    top = rate / 2 if fmax is None else fmax
    if not 0 <= fmin < top <= rate / 2:
        raise ValueError(f"{fmin=}, {fmax=}: expected 0 ≤ fmin < fmax ≤ {rate / 2}")


@dataclass(frozen=True, kw_only=True)
class HifiMel:
    """Natural-log mel magnitudes (https://github.com/jik876/hifi-gan, https://github.com/shivammehta25/Matcha-TTS).

    Attributes:
        rate: samples per second.
        n_fft: length of the transform and of its Hann window.
        hop: samples from frame to frame.
        n_mels: M.
        fmin: lower edge of the lowest band in Hz.
        fmax: upper edge of the highest band in Hz; None is half the rate.
        floor: magnitudes below it are raised to it before the logarithm.
    """

    rate: int
    n_fft: int
    hop: int
    n_mels: int = 80
    fmin: float = 0.0
    fmax: float | None = None
    floor: float = 1e-5

    def __post_init__(self) -> None:
        _check_transform(self.rate, self.n_fft, self.hop, self.n_mels, self.fmin, self.fmax)


COSYVOICE_V1_MEL = HifiMel(rate=22_050, n_fft=1024, hop=256, fmax=8000.0)
COSYVOICE_V2_MEL = HifiMel(rate=24_000, n_fft=1920, hop=480, fmax=8000.0)
COSYVOICE_V3_MEL = HifiMel(rate=24_000, n_fft=1920, hop=480)


@dataclass(frozen=True, kw_only=True)
class WhisperMel:
    """Scaled log₁₀ mel power (https://github.com/openai/whisper).

    Attributes:
        n_mels: 80, or 128 for Whisper large-v3 and the S3 tokenizer.
        rate: samples per second.
        n_fft: length of the transform and of its Hann window.
        hop: samples from frame to frame.
        dynamic_range: in powers of ten below the loudest bin of the item; what is softer is raised to it.
    """

    n_mels: int = 128
    rate: int = 16_000
    n_fft: int = 400
    hop: int = 160
    dynamic_range: float = 8.0

    def __post_init__(self) -> None:
        _check_transform(self.rate, self.n_fft, self.hop, self.n_mels, 0.0, None)


@dataclass(frozen=True, kw_only=True)
class KaldiFbank:
    """Kaldi's log mel filter bank without dither (torchaudio.compliance.kaldi).

    Attributes:
        n_mels: M.
        rate: samples per second.
        frame_ms: length of a frame.
        shift_ms: from frame to frame.
        subtract_mean: take each band's mean over time away, as CAM++ wants it.
    """

    n_mels: int = 80
    rate: int = 16_000
    frame_ms: float = 25.0
    shift_ms: float = 10.0
    subtract_mean: bool = False


@dataclass(frozen=True, kw_only=True)
class MultiscaleMel:
    """Log₁₀ mel magnitudes at several resolutions (https://github.com/descriptinc/descript-audio-codec).

    Attributes:
        windows: lengths of the transforms, hop a quarter of each.
        n_mels: M of each.
        floor: magnitudes below it are raised to it before the logarithm.
    """

    windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    n_mels: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320)
    floor: float = 1e-5

    def __post_init__(self) -> None:
        if len(self.windows) != len(self.n_mels) or not self.windows:
            raise ValueError(
                f"{len(self.windows)} windows and {len(self.n_mels)} n_mels, expected as many of both"
            )


DAC_SCALES = MultiscaleMel()


def mel_filters(
    rate: int, n_fft: int, n_mels: int, fmin: float = 0.0, fmax: float | None = None
) -> Tensor:
    """Triangles on Slaney's mel scale, each of unit area, [M, K] float32 with K = n_fft / 2 + 1.

    The scale is linear below 1 kHz (200/3 Hz per mel) and logarithmic above (27 mels per factor 6.4); the same bank as
    `librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels, fmin=fmin, fmax=fmax)`.
    """
    top = rate / 2 if fmax is None else fmax
    edges = _mel_to_hz(np.linspace(_hz_to_mel(fmin), _hz_to_mel(top), n_mels + 2))  # [M + 2]
    bins = np.linspace(0, rate / 2, n_fft // 2 + 1)  # [K]
    slopes = edges[:, None] - bins[None, :]  # [M + 2, K]
    rising = -slopes[:-2] / np.diff(edges)[:-1, None]
    falling = slopes[2:] / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    return torch.from_numpy(triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None]).float()


def hifi_mel(samples: Tensor, config: HifiMel) -> Tensor:
    """Natural-log mel magnitudes.

    Args:
        samples: [..., N] float, full scale ±1, at `config.rate`.
        config: parameters.

    Returns:
        [..., M, T] with T = N // hop where n_fft − hop is even.
    """
    margin = (config.n_fft - config.hop) // 2
    _require_length(samples, margin + 1, "hifi_mel")
    padded = _reflect(samples, margin)
    spectrum = _stft(padded, config.n_fft, config.hop, center=False)
    magnitude = (spectrum.real**2 + spectrum.imag**2 + 1e-9).sqrt()
    filters = mel_filters(config.rate, config.n_fft, config.n_mels, config.fmin, config.fmax)
    return (filters.to(magnitude) @ magnitude).clamp(min=config.floor).log()


def whisper_mel(samples: Tensor, config: WhisperMel = WhisperMel()) -> Tensor:
    """Whisper's input: log₁₀ power, at most `dynamic_range` below the item's peak, mapped by (x + 4) / 4.

    The peak is taken over each item alone; compute items before padding them to a common length, since the padding
    would lower nothing but the frames beside it.

    Args:
        samples: [..., N] float, full scale ±1, at `config.rate`.
        config: parameters.

    Returns:
        [..., M, N // hop].
    """
    _require_length(samples, config.n_fft // 2 + 1, "whisper_mel")
    spectrum = _stft(samples, config.n_fft, config.hop, center=True)[..., :-1]
    power = spectrum.abs() ** 2
    filters = mel_filters(config.rate, config.n_fft, config.n_mels)
    level = (filters.to(power) @ power).clamp(min=1e-10).log10()
    peak = level.amax(dim=(-2, -1), keepdim=True)
    return (torch.maximum(level, peak - config.dynamic_range) + 4) / 4


def kaldi_fbank(samples: Tensor, config: KaldiFbank = KaldiFbank()) -> Tensor:
    """Kaldi's log mel energies (Povey window, pre-emphasis 0.97, whole frames only, no dither).

    Args:
        samples: [N] float, full scale ±1, at `config.rate`.
        config: parameters.

    Returns:
        [T, M].
    """
    if samples.ndim != 1:
        raise ValueError(f"samples are {tuple(samples.shape)}, expected one item [N]")
    _require_length(samples, round(config.rate * config.frame_ms / 1000), "kaldi_fbank")
    from torchaudio.compliance.kaldi import fbank

    bands = fbank(
        samples[None],
        num_mel_bins=config.n_mels,
        sample_frequency=config.rate,
        frame_length=config.frame_ms,
        frame_shift=config.shift_ms,
        dither=0.0,
    )
    return bands - bands.mean(dim=0, keepdim=True) if config.subtract_mean else bands


def multiscale_mels(
    samples: Tensor,
    rate: int,
    config: MultiscaleMel = DAC_SCALES,
) -> list[Tensor]:
    """Log₁₀ mel magnitudes at each scale.

    Args:
        samples: [..., N] float; shorter than half of the longest window is filled up with silence.
        rate: samples per second.
        config: parameters.

    Returns:
        One [..., M, T] per scale.
    """
    shortage = max(config.windows) // 2 + 1 - samples.shape[-1]
    samples = F.pad(samples, (0, shortage)) if shortage > 0 else samples
    mels = []
    for window, n_mels in zip(config.windows, config.n_mels):
        magnitude = _stft(samples, window, window // 4, center=True).abs()
        filters = mel_filters(rate, window, n_mels).to(magnitude)
        mels.append((filters @ magnitude).clamp(min=config.floor).log10())
    return mels


def _stft(samples: Tensor, n_fft: int, hop: int, *, center: bool) -> Tensor:
    """[..., K, T] complex, periodic Hann window, reflected at the ends where `center`."""
    window = torch.hann_window(n_fft, dtype=samples.dtype, device=samples.device)
    flat = samples.reshape(-1, samples.shape[-1])
    spectrum = torch.stft(
        flat, n_fft, hop, window=window, center=center, pad_mode="reflect", return_complex=True
    )
    return spectrum.reshape(*samples.shape[:-1], *spectrum.shape[-2:])


def _reflect(samples: Tensor, margin: int) -> Tensor:
    flat = samples.reshape(-1, 1, samples.shape[-1])  # reflection wants [B, C, N]
    return F.pad(flat, (margin, margin), mode="reflect").reshape(*samples.shape[:-1], -1)


_HZ_PER_MEL = 200.0 / 3  # below 1 kHz
_LOG_START_HZ, _LOG_START_MEL = 1000.0, 15.0
_LOG_STEP = np.log(6.4) / 27.0


def _hz_to_mel(hz: float) -> float:
    if hz < _LOG_START_HZ:
        return hz / _HZ_PER_MEL
    return _LOG_START_MEL + float(np.log(hz / _LOG_START_HZ)) / _LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    above = _LOG_START_HZ * np.exp(_LOG_STEP * (mel - _LOG_START_MEL))
    return np.where(mel < _LOG_START_MEL, mel * _HZ_PER_MEL, above)


def _require_length(samples: Tensor, least: int, function: str) -> None:
    if not samples.is_floating_point():
        raise ValueError(f"samples are {samples.dtype}, expected floats with full scale ±1")
    if samples.shape[-1] < least:
        raise ValueError(f"{function} got {samples.shape[-1]} samples, expected at least {least}")
