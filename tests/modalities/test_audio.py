import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anytok.modalities import Audio, MediaError, audio
from tests.modalities.conftest import film, tone


@given(
    hnp.arrays(np.int16, st.tuples(st.integers(1, 3), st.integers(1, 50))),
    st.sampled_from([(".wav", 16), (".wav", 24), (".wav", 32), (".flac", 16), (".flac", 24)]),
)
@settings(max_examples=40, deadline=None)
def test_sixteen_bits_survive(tmp_path_factory, array, kind):
    suffix, bits = kind
    audio = Audio.from_numpy(array, 8000)
    assert np.array_equal(audio.to_numpy(np.int16), array)
    path = tmp_path_factory.getbasetemp() / f"round{suffix}"
    audio.save(path, bits=bits)
    back = Audio.load(path)
    assert back.rate == 8000
    assert torch.equal(back.samples, audio.samples)


def test_float_wav_survives(tmp_path):
    samples = torch.randn(2, 999, generator=torch.Generator().manual_seed(0))
    Audio(samples, 44_100).save(tmp_path / "a.wav", bits=32)
    assert torch.equal(Audio.load(tmp_path / "a.wav").samples, samples)


def test_integer_formats_clip(tmp_path):
    Audio(torch.tensor([[-2.0, 2.0]]), 8000).save(tmp_path / "a.wav")
    assert Audio.load(tmp_path / "a.wav").samples.tolist() == [[-1.0, 32767 / 32768]]


@pytest.mark.parametrize("suffix", [".ogg", ".mp3", ".opus"])
@pytest.mark.parametrize("channels", [1, 2])
def test_lossy_formats_keep_length_and_sound(tmp_path, suffix, channels):
    audio = tone(0.7, 24_000, channels)
    audio.save(tmp_path / f"a{suffix}", quality=90)
    back = Audio.load(tmp_path / f"a{suffix}")
    assert (back.rate, back.samples.shape) == (audio.rate, audio.samples.shape)
    assert (back.samples - audio.samples).square().mean() < 0.01 * audio.samples.square().mean()


def test_quality_costs_bytes(tmp_path):
    noise = Audio(torch.randn(1, 24_000, generator=torch.Generator().manual_seed(0)) / 4, 24_000)
    for suffix in (".ogg", ".mp3", ".opus"):
        sizes = []
        for quality in (10, 95):
            noise.save(tmp_path / f"a{suffix}", quality=quality)
            sizes.append((tmp_path / f"a{suffix}").stat().st_size)
        assert sizes[0] < sizes[1], suffix


def test_m4a_and_films_are_heard(files):
    audio = Audio.load(files["a.m4a"])
    assert audio.rate == 16_000
    assert audio.seconds == pytest.approx(0.5, abs=0.1)
    from_film = Audio.load(files["a.mkv"])
    assert torch.equal(from_film.samples, film().audio.samples)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a"])
def test_chunks_are_the_whole(folder, name):
    whole = Audio.load(folder / name)
    with Audio.open(folder / name, chunk_seconds=0.11) as reader:
        assert (reader.rate, reader.channels) == (whole.rate, whole.channels)
        chunks = [chunk.samples for chunk in reader]
    assert {chunk.shape[1] for chunk in chunks[:-1]} == {round(0.11 * whole.rate)}
    assert torch.equal(torch.cat(chunks, dim=1), whole.samples)


def test_an_error_of_the_reader_stays_the_readers(folder):
    def read() -> None:
        with Audio.open(folder / "a.wav") as reader:
            for _ in reader:
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        read()


def test_long_files_need_open(files):
    with pytest.raises(MediaError, match=r"max_samples=100 .*Audio\.open"):
        Audio.load(files["a.wav"], max_samples=100)


def test_resample_keeps_a_tone():
    audio = tone(0.5, 16_000)
    up = audio.resample(44_100)
    assert up.samples.shape[1] == 22_050
    time = torch.arange(22_050) / 44_100
    expected = torch.sin(2 * torch.pi * 220 * time) * time / 2
    assert (up.samples[0] - expected)[500:-500].abs().max() < 2e-3
    assert audio.resample(16_000) is audio
    with pytest.raises(ValueError, match="44100 → 44101 Hz is the ratio 44101/44100"):
        Audio(torch.zeros(1, 10), 44_100).resample(44_101)


def test_mono_is_the_mean():
    audio = Audio(torch.tensor([[1.0, 0.0], [0.0, 0.5]]), 8000).mono()
    assert audio.samples.tolist() == [[0.5, 0.25]]


def test_numpy_types():
    assert Audio.from_numpy(np.array([2**30], np.int32), 8000).samples.item() == 0.5
    assert Audio.from_numpy(np.array([0.25], ">f8"), 8000).samples.item() == 0.25
    assert Audio(torch.zeros(2, 3), 8000).to_numpy().shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Audio(torch.zeros(4), 8000), r"expected \[C, N\]"),
        (lambda: Audio(torch.zeros(99, 4), 8000), "C = 1 … 32"),
        (lambda: Audio(torch.zeros(1, 4).double(), 8000), "float64"),
        (lambda: Audio(torch.zeros(1, 4), 0), "rate is 0"),
        (lambda: Audio(torch.zeros(1, 4), 8000.0), "rate is 8000.0"),
        (lambda: Audio.from_numpy(np.zeros(3, np.uint8), 8000), "uint8"),
        (lambda: Audio(torch.zeros(1, 4), 8000).resample(0), "rate is 0"),
        (lambda: Audio(torch.zeros(1, 4), 8000).save("a.mp3", bits=24), "bits is 24"),
        (lambda: Audio(torch.zeros(1, 4), 8000).save("a.wav", quality=5), "lossless"),
        (lambda: Audio(torch.zeros(1, 4), 8000).save("a.ogg", quality=0), "1 … 100"),
        (lambda: Audio(torch.zeros(1, 4), 9000).save("a.mp3"), "mp3 cannot hold 9000 Hz"),
        (lambda: Audio(torch.zeros(3, 4), 8000).save("a.mp3"), "use mono"),
        (lambda: Audio(torch.full((1, 4), torch.nan), 8000).save("a.wav"), "NaN"),
        (lambda: Audio(torch.zeros(1, 4), 8000).save("a.aac"), "'.aac', expected .flac"),
    ],
)
def test_wrong_use_is_named(make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        make()
    assert list(tmp_path.iterdir()) == []


def test_nan_in_a_file_is_refused(tmp_path):
    import soundfile

    soundfile.write(tmp_path / "a.wav", np.array([0.0, np.nan], np.float32), 8000, subtype="FLOAT")
    with pytest.raises(MediaError, match="NaN"):
        Audio.load(tmp_path / "a.wav")


class Undecodable:
    """A packet as FFmpeg hands it out when an MP3 was cut from a longer stream."""

    duration, time_base = 100, Fraction(1, 1000)

    def decode(self):
        raise av.error.InvalidDataError(1, "invalid data")


@pytest.mark.parametrize(("bad", "silence"), [(0, 3), (5, None)])
def test_undecodable_packets_are_silence_at_the_beginning_only(files, bad, silence):
    with av.open(io.BytesIO(files["a.flac"]), "r", format="flac") as container:
        stream = container.streams.audio[0]
        packets = list(container.demux(stream))
        packets[bad:bad] = [Undecodable()] * 3

        class Container:
            def demux(self, stream):
                yield from packets

        blocks = audio._ffmpeg_blocks(Container(), stream, "a.flac")
        if silence is None:
            with pytest.raises(MediaError, match=r"a\.flac: its sound is damaged"):
                list(blocks)
        else:
            samples = torch.cat(list(blocks), dim=1)
            assert not samples[:, : silence * 1600].any()
            assert torch.equal(samples[:, silence * 1600 :], tone(channels=2).samples)
