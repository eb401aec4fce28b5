"""The weights that ship: speech that was never trained on comes back better with every few codes."""

from importlib import resources

import pytest

from anytok.codecs import load_codec
from anytok.codecs.registry import entry
from anytok.modalities import Audio
from anytok.modalities.measure import mel_distance, si_sdr
from anytok.roundtrip import roundtrip

ASSETS = resources.files("anytok.assets")


@pytest.fixture(scope="module")
def codec():
    return load_codec("rvq/mini")


def test_it_is_small_and_free(codec):
    row = entry("rvq/mini")
    assert len((ASSETS / "weights" / row.files["weights"].asset).read_bytes()) < 4e6
    assert codec.spec.weights_licence == "Apache-2.0"
    assert codec.spec.rate == 50
    assert codec.spec.vocab == ((1024,) * 12,)


@pytest.mark.parametrize("name", ["speech-held-sentence.flac", "speech-unseen-voice.flac"])
def test_more_codes_come_nearer(codec, name):
    audio = Audio.load(ASSETS / "samples" / name)
    (stream,) = codec.encode([audio])
    assert stream.bits / audio.seconds == pytest.approx(6000, rel=0.02)
    backs = [codec.decode([stream.depths(n)])[0].samples for n in (1, 4, 8, 12)]
    mels = [mel_distance(back, audio.samples, audio.rate) for back in backs]
    assert mels == sorted(mels, reverse=True)
    ratios = [si_sdr(back, audio.samples) for back in backs]
    assert ratios == sorted(ratios)
    # Opus needs 9.5 kbit/s for a mel distance below 2, and has 4 to 5 dB at 5.6 kbit/s
    assert mels[1] < 2.2
    assert mels[3] < 1.7
    assert ratios[3] > 4


def test_a_file_makes_the_round_trip(codec):
    rows = [row for row, _ in roundtrip(ASSETS / "samples" / "speech-held-sentence.flac", codec)]
    assert [list(row.cells)[1] for row in rows] == ["1 deep", "6 deep", "12 deep"]
    assert rows[-1].values["kbit/s"] == pytest.approx(6.0, rel=0.02)
