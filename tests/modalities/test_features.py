from pathlib import Path

import pytest
import torch

from anytok.modalities.audio import Audio
from anytok.modalities.features import (
    COSYVOICE_V1_MEL,
    COSYVOICE_V2_MEL,
    COSYVOICE_V3_MEL,
    HifiMel,
    KaldiFbank,
    MultiscaleMel,
    WhisperMel,
    hifi_mel,
    kaldi_fbank,
    mel_filters,
    multiscale_mels,
    whisper_mel,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "audio_features.pt"
STRIDE, RESAMPLED = 4, slice(None, None, 50)  # as cut by golden/cut_audio_features.py


@pytest.fixture(scope="module")
def golden():
    """What CosyVoice's, Matcha-TTS's and torchaudio's own code computed."""
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture(scope="module")
def speech(golden) -> Audio:
    return Audio(golden["wav16k"][None] / 2**15, 16_000)


@pytest.mark.parametrize(("rate", "name"), [(22_050, "wav22"), (24_000, "wav24")])
def test_resampling_agrees(golden, speech, rate, name):
    assert (speech.resample(rate).samples[:, RESAMPLED] - golden[name]).abs().max() < 1e-6


def test_whisper_mel_agrees(golden, speech):
    mel = whisper_mel(speech.samples[0])
    assert mel.shape == (128, 420)
    assert (mel[:, ::STRIDE] - golden["s3_logmel128"]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("config", "name", "frames"),
    [
        (COSYVOICE_V1_MEL, "mel_v1", 362),
        (COSYVOICE_V2_MEL, "mel_v2", 210),
        (COSYVOICE_V3_MEL, "mel_v3", 210),
    ],
)
def test_hifi_mel_agrees(golden, speech, config, name, frames):
    mel = hifi_mel(speech.resample(config.rate).samples, config)
    assert mel.shape == (1, 80, frames)
    ours, theirs = mel[..., ::STRIDE], golden[name]
    # The logarithm magnifies the rounding (here also that of resampling) in the softest bands; as magnitudes they
    # agree to six digits of the loudest.
    assert (ours - theirs).abs().max() < 5e-3
    assert (ours.exp() - theirs.exp()).abs().max() < 1e-6 * theirs.exp().max()


def test_kaldi_fbank_agrees(golden, speech):
    bands = kaldi_fbank(speech.samples[0])
    assert bands.shape == (418, 80)
    assert (bands[::STRIDE] - golden["kaldi80"]).abs().max() < 5e-4
    centred = kaldi_fbank(speech.samples[0], KaldiFbank(subtract_mean=True))
    assert torch.allclose(centred, bands - bands.mean(dim=0), atol=1e-5)


def test_filters_have_unit_area_and_cover_the_range():
    filters = mel_filters(24_000, 4096, 40, 100.0, 9000.0).double()
    hertz = torch.linspace(0, 12_000, 2049, dtype=torch.float64)
    assert torch.allclose(
        filters.sum(dim=1) * (hertz[1] - hertz[0]), torch.ones(40).double(), atol=0.02
    )
    covered = filters.sum(dim=0) > 0
    assert not covered[(hertz < 100) | (hertz > 9000)].any()
    assert covered[(hertz > 101) & (hertz < 8999)].all()
    centres = hertz[filters.argmax(dim=1)]
    assert (centres.diff() > 0).all()


@pytest.mark.parametrize(
    "features",
    [
        lambda x: hifi_mel(x, COSYVOICE_V2_MEL),
        lambda x: whisper_mel(x, WhisperMel(n_mels=80)),
        lambda x: multiscale_mels(x, 24_000)[-1],
    ],
)
def test_batches_are_what_the_items_are_alone(features):
    batch = torch.randn(3, 9600, generator=torch.Generator().manual_seed(0))
    batch = batch * torch.tensor([[1.0], [0.01], [0.0]])  # loud, soft, silent
    together = features(batch)
    for index, item in enumerate(batch):
        assert torch.allclose(together[index], features(item), atol=1e-5)
    assert torch.isfinite(together).all()


def test_two_configurations_in_one_process_do_not_meet():
    x = torch.randn(1, 24_000, generator=torch.Generator().manual_seed(0))
    before = hifi_mel(x, COSYVOICE_V2_MEL)
    other = hifi_mel(x, HifiMel(rate=24_000, n_fft=1024, hop=256, fmax=8000.0))
    assert other.shape == (1, 80, 93)
    assert torch.equal(hifi_mel(x, COSYVOICE_V2_MEL), before)


def test_gradients_reach_the_samples_even_in_silence():
    x = torch.zeros(1, 4800, requires_grad=True)
    y = torch.randn(1, 4800, generator=torch.Generator().manual_seed(0))
    (
        hifi_mel(x + 0.1 * y, COSYVOICE_V3_MEL).mean() + multiscale_mels(x + y, 24_000)[3].mean()
    ).backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0
    silent = torch.zeros(1, 4800, requires_grad=True)
    (
        hifi_mel(silent, COSYVOICE_V3_MEL).mean() + multiscale_mels(silent, 24_000)[3].mean()
    ).backward()
    assert torch.isfinite(silent.grad).all()


def test_multiscale_shapes_and_short_input():
    mels = multiscale_mels(torch.randn(2, 100), 16_000)
    assert [mel.shape[1] for mel in mels] == [5, 10, 20, 40, 80, 160, 320]
    assert mels[0].shape[2] == 1 + 1025 // 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: hifi_mel(torch.zeros(10), COSYVOICE_V1_MEL),
            "got 10 samples, expected at least 385",
        ),
        (lambda: whisper_mel(torch.zeros(200)), "expected at least 201"),
        (lambda: whisper_mel(torch.zeros(900, dtype=torch.int16)), "int16"),
        (lambda: kaldi_fbank(torch.zeros(399)), "expected at least 400"),
        (lambda: kaldi_fbank(torch.zeros(1, 900)), r"one item \[N\]"),
        (lambda: HifiMel(rate=16_000, n_fft=512, hop=600), "hop ≤ n_fft"),
        (lambda: HifiMel(rate=16_000, n_fft=512, hop=128, fmax=9000.0), "fmax"),
        (lambda: MultiscaleMel(windows=(32,)), "as many of both"),
    ],
)
def test_wrong_use_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
