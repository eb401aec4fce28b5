"""FSQ against the published numbers and against its formulas, written out once more."""

import math

import pytest
import torch

from anytok.codecs.quantizers.fsq import FSQ
from tests.golden.load import load_golden

FLEXTOK = (8, 8, 8, 5, 5, 5)


@pytest.fixture(scope="module")
def golden():
    return load_golden("image_flextok")["fsq"]


def float_ids(values, levels):
    """The published index: summed in float32, then truncated."""
    half = torch.tensor([n // 2 for n in levels])
    bases = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], dtype=torch.int32)
    return ((values * half + half) * bases).sum(-1).to(torch.int32).long()


def test_values_and_ids_as_published(golden):
    fsq = FSQ(golden["levels"])
    assert fsq.size == golden["codebook_size"]
    assert torch.equal(fsq.ids(golden["z"]), golden["tokens"])
    assert torch.equal(fsq.vectors(golden["tokens"]), golden["quant"])
    assert torch.equal(fsq(golden["z"]).ids, golden["tokens"])
    torch.testing.assert_close(fsq(golden["z"]).vectors, golden["quant"])
    assert torch.equal(fsq.vectors(golden["ids"]), golden["embeddings"])


@pytest.mark.parametrize("levels", [FLEXTOK, (7, 11, 14), (2, 3, 16), (3,) * 8])
def test_every_code_comes_back_and_has_the_published_id(levels):
    fsq = FSQ(levels)
    ids = torch.arange(fsq.size)
    vectors = fsq.vectors(ids)
    assert torch.equal(float_ids(vectors, levels), ids)
    assert len(vectors.unique(dim=0)) == fsq.size
    assert vectors.min() == -1
    assert vectors.max() <= 1
    # the number that tanh squashes onto a code is rounded to it
    half = torch.tensor([(n - 1) * 1.001 / 2 for n in levels])
    offset = torch.tensor([0.5 if n % 2 == 0 else 0.0 for n in levels])
    steps = vectors * torch.tensor([n // 2 for n in levels])
    z = torch.atanh((steps + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(fsq.ids(z), ids)


def test_tables_of_digits_make_the_vectors():
    fsq = FSQ(FLEXTOK)
    ids = torch.tensor([0, 7, 8, 63_999, 12_345])
    columns = [table[digit] for table, digit in zip(fsq.tables(), fsq.digits(ids).T)]
    assert torch.equal(torch.cat(columns, dim=1), fsq.vectors(ids))


def test_gradients_pass_the_rounding():
    z = torch.randn(4, 6, requires_grad=True)
    FSQ(FLEXTOK)(z).vectors.sum().backward()
    assert (z.grad > 0).all()


def test_half_precision_is_rounded_in_float32():
    z = torch.randn(64, 6)
    half = z.to(torch.bfloat16)
    assert torch.equal(FSQ(FLEXTOK).ids(half), FSQ(FLEXTOK).ids(half.float()))


def test_what_is_no_code_is_named():
    with pytest.raises(ValueError, match="from -1 to 64000, expected 0 to 63999"):
        FSQ(FLEXTOK).vectors(torch.tensor([-1, 64_000]))
    with pytest.raises(ValueError, match=r"levels are \[8, 1\]"):
        FSQ([8, 1])
    with pytest.raises(ValueError, match=r"levels are \[\]"):
        FSQ([])
