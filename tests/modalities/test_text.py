import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytok.modalities import MediaError, Text


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: t[0] != "\ufeff")
)
def test_any_text_survives(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "round.txt"
    Text(text).save(path)
    assert Text.load(path) == Text(text)


def test_a_byte_order_mark_is_dropped():
    assert Text.load(b"\xef\xbb\xbfhello").text == "hello"


def test_other_encodings_are_refused_by_byte():
    with pytest.raises(MediaError, match="not UTF-8: byte 0xfc at offset 2"):
        Text.load("grün".encode("latin-1"))


def test_limits_and_half_characters(tmp_path):
    with pytest.raises(MediaError, match="has 20 bytes, more than the limit of 10"):
        Text.load(b"x" * 20, max_bytes=10)
    with pytest.raises(MediaError, match="surrogate"):
        Text("\ud800").save(tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="expected str"):
        Text(b"bytes")
