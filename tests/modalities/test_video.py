import io
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import pytest
import torch

from anytok.modalities import MediaError, Video
from tests.modalities.conftest import film, tone

CONTAINERS = [".mp4", ".webm", ".mkv"]


def test_mkv_is_lossless(tmp_path):
    video = film()
    video.save(tmp_path / "a.mkv")
    back = Video.load(tmp_path / "a.mkv")
    assert torch.equal(back.frames, video.frames)
    assert back.fps == video.fps
    assert torch.equal(back.audio.samples, video.audio.samples)


@pytest.mark.parametrize("suffix", [*CONTAINERS, ".gif"])
@pytest.mark.parametrize("size", [(32, 48), (31, 47)])
def test_colours_size_and_length_come_back(tmp_path, suffix, size):
    colours = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200], [128, 128, 128]])
    video = Video(colours[:, :, None, None].expand(4, 3, *size).to(torch.uint8).contiguous(), 10.0)
    video.save(tmp_path / f"a{suffix}")
    back = Video.load(tmp_path / f"a{suffix}")
    assert back.frames.shape == video.frames.shape
    assert back.fps == pytest.approx(10)
    assert back.audio is None
    assert (back.frames.int() - video.frames.int()).abs().max() <= 6


@pytest.mark.parametrize("suffix", CONTAINERS)
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_sound_stays_in_step(tmp_path, suffix, rate):
    video = Video(film(25).frames, 25.0, tone(1.0, rate, channels=2))
    video.save(tmp_path / f"a{suffix}")
    back = Video.load(tmp_path / f"a{suffix}")
    assert len(back.frames) == 25
    heard = back.audio.resample(rate).samples
    assert heard.shape[0] == 2
    assert heard.shape[1] == pytest.approx(rate, abs=rate // 20)
    count = min(heard.shape[1], rate)
    assert (heard[:, :count] - video.audio.samples[:, :count]).square().mean() < 2e-3


def test_common_rates_survive(tmp_path):
    for fps in (23.976023976, 29.97002997, 30.0, 12.5):
        Video(film(6, sound=False).frames, fps).save(tmp_path / "a.mkv")
        back = Video.load(tmp_path / "a.mkv")
        assert back.fps == pytest.approx(fps, rel=1e-6)
        assert len(back.frames) == 6


def variable_rate(times: list[int], milliseconds_last: int = 100) -> bytes:
    """A Matroska film whose frame k is grey 10 k and begins at times[k] milliseconds."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=1000)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "bgr0"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 10 * index, np.uint8))
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        container.mux(stream.encode(None))
    return buffer.getvalue()


def greys(video: Video) -> list[int]:
    return [int(frame[0, 0, 0]) // 10 for frame in video.frames]


def test_variable_rate_becomes_constant_by_time_stamps():
    content = variable_rate([0, 100, 400, 420, 700])
    video = Video.load(content, fps=10.0)
    # Frame 2 (at 400 ms) is replaced on its tick by frame 3 (at 420 ms); the last stays for one tick.
    assert greys(video) == [0, 1, 1, 1, 3, 3, 3, 4]


def test_time_stamps_that_jump_are_refused():
    with pytest.raises(MediaError, match="gap of"):
        Video.load(variable_rate([0, 100, 50_000_000]), fps=10.0)


def test_gif_delays_are_kept():
    frames = [PIL.Image.new("RGB", (16, 16), (0, 0, 60 * k)) for k in range(3)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=[100, 300, 200], loop=0
    )
    video = Video.load(buffer.getvalue(), fps=10.0)
    assert [int(f[2].float().mean()) // 55 for f in video.frames] == [0, 1, 1, 1, 2, 2]


def test_rotation_mark_is_applied(tmp_path):
    frames = torch.zeros(3, 3, 32, 64, dtype=torch.uint8)
    frames[:, 0, :16, :16] = 255  # red at the top left of what the sensor saw
    Video(frames, 10.0).save(tmp_path / "a.mp4")
    content = (tmp_path / "a.mp4").read_bytes()
    one, minus = (1 << 16).to_bytes(4, "big"), (0xFFFF0000).to_bytes(4, "big")
    nil, unit = bytes(4), (1 << 30).to_bytes(4, "big")
    identity = one + nil * 3 + one + nil * 3 + unit
    clockwise = nil + one + nil + minus + nil * 4 + unit  # what a phone held upright writes
    track = content.index(b"tkhd")
    place = content.index(identity, track)
    turned = Video.load(content[:place] + clockwise + content[place + 36 :])
    assert turned.frames.shape == (3, 3, 64, 32)
    assert turned.frames[0, 0, :16, -16:].float().mean() > 200  # the corner went to the top right
    assert turned.frames[0, 0, -16:, :16].float().mean() < 40


@pytest.mark.parametrize("suffix", [*CONTAINERS, ".gif"])
def test_chunks_are_the_whole(folder, suffix):
    name = "film.gif" if suffix == ".gif" else f"a{suffix}"
    whole = Video.load(folder / name)
    with Video.open(folder / name, chunk_frames=5) as reader:
        assert reader.fps == whole.fps
        chunks = list(reader)
    assert [len(chunk.frames) for chunk in chunks] == [5, 5, 2]
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks]), whole.frames)
    if whole.audio is not None:
        sound = torch.cat([chunk.audio.samples for chunk in chunks], dim=1)
        assert torch.equal(sound, whole.audio.samples)
        assert chunks[1].audio.seconds == pytest.approx(5 / 12.5, abs=1e-3)


def test_later_sound_is_padded_and_earlier_cut(tmp_path):
    def delayed(seconds: float) -> bytes:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="matroska") as container:
            pictures = container.add_stream("ffv1", rate=10)
            pictures.height, pictures.width, pictures.pix_fmt = 16, 16, "bgr0"
            pictures.codec_context.time_base = Fraction(1, 1000)
            track = container.add_stream("flac", rate=8000)
            track.layout, track.format = "mono", "s16"
            begin = max(0.0, -seconds)
            for index in range(10):
                frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
                frame.pts, frame.time_base = round((begin + index / 10) * 1000), Fraction(1, 1000)
                container.mux(pictures.encode(frame))
            container.mux(pictures.encode(None))
            block = av.AudioFrame.from_ndarray(
                np.full((1, 8000), 9000, np.int16), format="s16", layout="mono"
            )
            block.sample_rate, block.time_base = 8000, Fraction(1, 8000)
            block.pts = round(max(0.0, seconds) * 8000)
            container.mux(track.encode(block))
            container.mux(track.encode(None))
        return buffer.getvalue()

    late = Video.load(delayed(0.25)).audio.samples[0]
    assert (late != 0).int().argmax() == pytest.approx(2000, abs=40)
    early = Video.load(delayed(-0.25)).audio.samples[0]
    assert len(early) == pytest.approx(6000, abs=40)


def test_at_fps_shows_what_was_on_screen():
    frames = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 2, 2)
    video = Video(frames.contiguous(), 10.0)
    assert video.at_fps(5).frames[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8]
    assert video.at_fps(20).frames[:, 0, 0, 0].tolist() == [k // 2 for k in range(20)]
    assert video.at_fps(20).seconds == video.seconds


def test_resize_and_numpy():
    video = film(20, sound=True)
    small = video.resize(8, 12)
    assert small.frames.shape == (20, 3, 8, 12)
    assert small.audio is video.audio
    back = Video.from_numpy(video.to_numpy(), video.fps, video.audio)
    assert torch.equal(back.frames, video.frames)


def test_long_films_need_open(files):
    with pytest.raises(MediaError, match=r"max_bytes=9999; .*Video\.open"):
        Video.load(files["a.mp4"], max_bytes=9999)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Video(torch.zeros(3, 4, 4, dtype=torch.uint8), 1.0), r"\[T, 3, H, W\]"),
        (lambda: Video(torch.zeros(1, 3, 4, 4), 1.0), "float32"),
        (lambda: Video(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 0.0), "fps is 0"),
        (lambda: film(2).at_fps(1000), "at most 240"),
        (lambda: film(2).resize(0, 4), "at least 1"),
        (lambda: film(2).save("a.mkv", crf=3), "no crf for this format"),
        (lambda: film(2).save("a.mp4", crf=60), "0 … 51"),
        (lambda: film(2).save("a.mpg"), "'.mpg', expected .gif"),
        (lambda: Video.from_numpy(np.zeros((1, 4, 4, 3)), 1.0), "float64"),
    ],
)
def test_wrong_use_is_named(make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        make()
    assert list(tmp_path.iterdir()) == []


def test_a_sound_file_has_no_picture(files):
    with pytest.raises(MediaError, match="holds no moving picture"):
        Video.load(files["a.m4a"])
    with pytest.raises(MediaError, match="no MP4, WebM, MKV, AVI or GIF"):
        Video.load(files["a.wav"])
