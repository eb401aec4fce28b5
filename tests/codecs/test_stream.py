"""Token streams and `.tok` files: round trips, prefixes, joins, and every way a file can be wrong."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anytok.codecs import Part, StreamError, TokenStream, tokfile


def make(codes, vocab, **kwargs):
    kwargs = {"codec": "toy/one@00000000", "modality": "image", **kwargs}
    return TokenStream(parts=(Part(codes, vocab),), **kwargs)


@st.composite
def streams(draw):
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        vocab = tuple(draw(st.lists(st.integers(1, 70_000), min_size=1, max_size=5)))
        n = draw(st.integers(0, 40))
        seed = draw(st.integers(0, 2**31))
        g = torch.Generator().manual_seed(seed)
        columns = [torch.randint(0, size, (n,), generator=g) for size in vocab]
        parts.append(Part(torch.stack(columns, 1), vocab))
    side = {}
    if draw(st.booleans()):
        side["frame"] = torch.randn(draw(st.integers(0, 5)))
    meta = draw(
        st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=8), max_size=3)
    )
    return TokenStream(
        parts=tuple(parts),
        codec="toy/x@0badcafe",
        modality="audio",
        grid=(3, 2),
        meta=meta,
        side=side,
    )


@settings(max_examples=60, deadline=None)
@given(streams())
def test_bytes_round_trip(stream):
    back = tokfile.from_bytes(tokfile.to_bytes(stream))
    assert [p.vocab for p in back.parts] == [p.vocab for p in stream.parts]
    assert all(a.codes.equal(b.codes) for a, b in zip(back.parts, stream.parts))
    assert (back.codec, back.modality, back.grid) == (stream.codec, stream.modality, stream.grid)
    assert dict(back.meta) == dict(stream.meta)
    assert all(back.side[k].equal(v) for k, v in stream.side.items())
    assert back.bits == stream.bits


def test_a_file_costs_its_codes_and_under_250_bytes():
    meta = {"size": [1080, 1920], "fit": "resize"}
    image = make(torch.randint(0, 4096, (256, 1)), (4096,), prefix_step=1, meta=meta)
    parts = [Part(torch.randint(0, 2, (n, 1)), (2,)) for n in (64, 176, 680)]
    parts.append(Part(torch.randint(0, 2, (2720, 32)), (2,) * 32))
    shape = TokenStream(
        parts=tuple(parts),
        codec="octgpt/mini@1f3a22bc",
        modality="shape",
        side={"frame": torch.randn(4)},
    )
    audio = make(
        torch.randint(0, 1024, (860, 9)),
        (1024,) * 9,
        grid=(860,),
        depth_prefix=True,
        meta={"length": 275_201},
    )
    for stream in (image, shape, audio):
        assert len(tokfile.to_bytes(stream)) - (stream.bits + 7) // 8 < 250


def test_save_is_atomic_and_load_reads_it(tmp_path):
    stream = make(torch.arange(10)[:, None], (16,), prefix_step=1)
    path = tmp_path / "x.tok"
    stream.save(path)
    stream[:4].save(path)
    assert TokenStream.load(path).codes[:, 0].tolist() == [0, 1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["x.tok"]
    with pytest.raises(StreamError, match="cannot be written"):
        stream.save(tmp_path / "no" / "x.tok")


@pytest.fixture
def blob():
    return tokfile.to_bytes(make(torch.arange(64)[:, None], (4096,), side={"s": torch.randn(3)}))


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 40, 200, -1])
def test_cut_short(blob, keep, tmp_path):
    (tmp_path / "x.tok").write_bytes(blob[:keep])
    with pytest.raises(StreamError, match=r"x\.tok"):
        TokenStream.load(tmp_path / "x.tok")


def test_any_flipped_byte_is_noticed(blob):
    g = torch.Generator().manual_seed(3)
    for at in range(len(blob)):
        flip = int(torch.randint(1, 256, (1,), generator=g))
        bad = blob[:at] + bytes([blob[at] ^ flip]) + blob[at + 1 :]
        try:
            read = tokfile.from_bytes(bad)
        except StreamError:
            continue
        # What may pass is a change of padding only: the content is the same.
        assert read.codes.equal(tokfile.from_bytes(blob).codes)


def test_foreign_files(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.tok"
    with pytest.raises(StreamError, match="cannot be read"):
        TokenStream.load(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(StreamError, match=r"not a \.tok file"):
        TokenStream.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(StreamError, match="no anytok header"):
        TokenStream.load(path)


def test_a_later_version_is_refused(blob):
    length = struct.unpack("<Q", blob[:8])[0]
    header = json.loads(blob[8 : 8 + length])
    header["__metadata__"]["tok"] = "9" + header["__metadata__"]["tok"][1:]
    text = json.dumps(header).encode()
    bad = struct.pack("<Q", len(text)) + text + blob[8 + length :]
    with pytest.raises(StreamError, match="format version '9', this anytok reads 1"):
        tokfile.from_bytes(bad)


@pytest.mark.parametrize(
    ("codes", "vocab", "message"),
    [
        ([[4]], (4,), "code 4 at depth 0 is outside 0...3"),
        ([[0, -1]], (4, 4), "code -1 at depth 1"),
        ([[0]], (4, 4), "depth 1, but vocab gives 2"),
    ],
)
def test_codes_out_of_range(codes, vocab, message):
    with pytest.raises(StreamError, match=message):
        Part(torch.tensor(codes), vocab)


def test_codes_must_be_integers():
    with pytest.raises(StreamError, match="expected integers"):
        Part(torch.zeros(3, 1), (4,))


def test_prefixes():
    one = make(torch.arange(8)[:, None], (8,), prefix_step=1)
    assert one[:3].codes[:, 0].tolist() == [0, 1, 2]
    assert one[:8] is one
    for k, message in ((0, "k = 0"), (9, "k = 9")):
        with pytest.raises(StreamError, match=message):
            one[:k]
    with pytest.raises(StreamError, match="only prefixes"):
        one[2:4]
    video = make(torch.arange(12)[:, None], (12,), prefix_step=4, grid=(3, 2, 2), modality="video")
    assert video[:8].grid == (2, 2, 2)
    with pytest.raises(StreamError, match="multiple of 4"):
        video[:6]
    with pytest.raises(StreamError, match="no prefixes"):
        make(torch.arange(8)[:, None], (8,))[:3]


def test_depths_and_joins():
    a = make(
        torch.randint(0, 9, (5, 3)),
        (9, 9, 9),
        grid=(5,),
        depth_prefix=True,
        modality="audio",
        meta={"length": 100},
    )
    assert a.depths(2).codes.equal(a.codes[:, :2])
    with pytest.raises(StreamError, match="n = 4"):
        a.depths(4)
    joined = a + a
    assert joined.grid == (10,)
    assert joined.meta["length"] == 200
    with pytest.raises(StreamError, match="full depth"):
        make(torch.zeros(2, 2, dtype=torch.long), (2, 2)).depths(1)
    with pytest.raises(StreamError, match="no time axis"):
        make(torch.zeros(2, 1, dtype=torch.long), (2,)) + make(
            torch.zeros(2, 1, dtype=torch.long), (2,)
        )
