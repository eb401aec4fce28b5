"""LFQ and BSQ: packing, the sign rule, gradients, and the entropies against the whole table of codes."""

import pytest
import torch

from anytok.codecs.quantizers.binary import (
    LFQ,
    BinaryConfig,
    binarize,
    codes_of,
    entropies,
    pack,
    unpack,
)


def test_first_bit_is_the_most_significant():
    bits = torch.tensor([[True, False, False], [False, False, True]])
    assert pack(bits).tolist() == [4, 1]
    assert torch.equal(unpack(pack(bits), 3), bits)


def test_all_ids_survive_unpacking():
    ids = torch.arange(1024).reshape(2, 512)
    assert torch.equal(pack(unpack(ids, 10)), ids)


def test_zero_gives_bit_zero():
    codes, bits = binarize(torch.tensor([[0.0, -1.0, 2.0]]), BinaryConfig(bits=3))
    assert bits.tolist() == [[False, False, True]]
    assert codes.tolist() == [[-1.0, -1.0, 1.0]]


def test_spherical_codes_have_unit_length():
    config = BinaryConfig(bits=16, spherical=True)
    codes, bits = binarize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), config)
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(5))
    assert torch.equal(codes_of(bits, config), codes)


def test_gradient_passes_straight_through():
    z = torch.tensor([[0.3, -2.0]], requires_grad=True)
    binarize(z, BinaryConfig(bits=2))[0].sum().backward()
    assert z.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("spherical", [False, True])
def test_sample_entropy_is_that_of_the_softmax_over_all_codes(spherical):
    config = BinaryConfig(bits=6, spherical=spherical, inverse_temperature=0.7)
    z = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    table = codes_of(unpack(torch.arange(64), 6), config)
    unit = torch.nn.functional.normalize(z, dim=-1) if spherical else z
    p = (2 * 0.7 * unit @ table.T).softmax(-1)
    sample, batch = entropies(z, config)
    torch.testing.assert_close(sample, torch.special.entr(p).sum(-1).mean())
    assert batch >= torch.special.entr(p.mean(0)).sum()  # a bound; the bits need not be independent


def test_entropies_of_sure_bits_are_zero_and_finite():
    z = torch.full((4, 3), 50.0, requires_grad=True)
    sample, batch = entropies(z, BinaryConfig(bits=3))
    (sample + batch).backward()
    assert sample == 0
    assert 0 <= batch < 1e-4
    assert z.grad.isfinite().all()


def test_lfq_looks_up_what_it_quantised():
    torch.manual_seed(0)
    lfq = LFQ(12, BinaryConfig(bits=5))
    x = torch.randn(2, 7, 12)
    quantised, ids, z = lfq(x)
    torch.testing.assert_close(lfq.lookup(ids), quantised)
    assert z.shape == (2, 7, 5)
    assert ids.max() < 32


def test_too_many_bits_for_one_id():
    with pytest.raises(ValueError, match="63 bits do not fit"):
        pack(torch.ones(1, 63, dtype=torch.bool))


def test_wrong_width():
    with pytest.raises(ValueError, match=r"expected \[..., 4\]"):
        binarize(torch.zeros(2, 5), BinaryConfig(bits=4))
