"""The analytic basis: it inverts, orders, survives saving, and its network starts as nothing."""

import pytest
import torch

from anytok.codecs import load_codec, save_codec
from anytok.codecs.image.onedpiece_mini import OneDPieceMini, OneDPieceMiniConfig, dct_matrix
from anytok.codecs.training import onedpiece_basis
from anytok.codecs.training.onedpiece import psnr
from anytok.modalities import Image

TINY = OneDPieceMiniConfig(
    image_size=16, coefficients=192, components=24, head_tokens=4,
    block=4, block_width=16, stages=2, codes=32, widths=(16, 16, 32),
)  # fmt: skip


def scenes(n: int, seed: int) -> torch.Tensor:
    """Pictures [n, 3, 16, 16]: a coloured disc on a ramp."""
    rng = torch.Generator().manual_seed(seed)
    x, y, r, *colour = torch.rand(6, n, 1, 1, generator=rng)
    axis = torch.linspace(0, 1, 16)
    inside = ((axis - x) ** 2 + (axis[:, None] - y) ** 2 < (0.2 + r / 4) ** 2).float()
    return torch.stack([inside * c + (1 - inside) * axis * r for c in colour], dim=1)


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    codec = OneDPieceMini(TINY)
    pictures = (scenes(2000, 0) * 255).round().byte()
    onedpiece_basis.fit(codec, pictures, torch.Generator().manual_seed(0))
    return codec.eval()


def test_the_spectrum_is_orthonormal(codec):
    x = torch.rand(2, 3, 16, 16)
    spectrum = codec.spectrum(x)
    torch.testing.assert_close(codec.pixels(spectrum), x)
    torch.testing.assert_close(spectrum.square().sum(), (x - 0.5).square().sum())
    dct = dct_matrix(8)
    torch.testing.assert_close(dct @ dct.T, torch.eye(8), atol=1e-6, rtol=0)


def test_blocks_and_their_order_invert(codec):
    x = torch.rand(2, 3, 16, 16)
    assert codec.order.sort().values.tolist() == list(range(16))
    torch.testing.assert_close(codec.from_blocks(codec.to_blocks(x)), x)


@torch.no_grad()
def test_quality_rises_with_the_prefix(codec):
    x = scenes(64, 1)
    codes = codec.tokenize(x)
    assert codes.shape == (64, TINY.tokens)
    levels = [
        psnr(codec.detokenize(codes[:, :k]), x).mean().item() for k in (1, 2, 4, 12, 20, 28, 36)
    ]
    assert levels == sorted(levels)
    assert levels[-1] > levels[0] + 5


@torch.no_grad()
def test_a_short_encode_is_the_prefix_of_a_whole_one(codec):
    x = scenes(8, 2)
    codes = codec.tokenize(x)
    for k in (1, 4, 5, 30):
        assert torch.equal(codec.tokenize(x, k), codes[:, :k])
    assert torch.equal(codec.tokenize(x[3:4]), codes[3:4])


@torch.no_grad()
def test_an_untrained_network_changes_nothing(codec):
    codes = codec.tokenize(scenes(4, 3))
    for k in (2, 9, TINY.tokens):
        linear, counts = codec.linear(codes[:, :k])
        torch.testing.assert_close(codec.detokenize(codes[:, :k]), linear)
        assert counts[:, 0].unique().item() == pytest.approx(min(k, 4) / 4)
        assert counts[:, 1].mean().item() == pytest.approx(max(0, k - 4) / 32)


@torch.no_grad()
def test_a_token_says_the_same_whatever_stands_before_it(codec):
    codes = codec.tokenize(scenes(2, 5), 4)
    mixed = torch.stack([codes[0], torch.cat([codes[1, :2], codes[0, 2:]])])
    both = codec.decode_head(mixed)
    start = codec.groups()[2].start
    assert torch.equal(both[0, start:], both[1, start:])
    assert not torch.equal(both[0, :start], both[1, :start])
    added = sum(codec.position_vectors(t)[c] for t, c in enumerate(codes[0].tolist()))
    torch.testing.assert_close(added, codec.decode_head(codes[:1])[0])


def test_groups_are_cut_so_that_each_costs_a_token():
    variances = 2.0 ** -torch.arange(40.0)
    even = onedpiece_basis.cut(variances, 4, 12.0, early=1.0)
    level = onedpiece_basis.water_level(variances, 48.0)
    bits = (variances.log2() - level).clamp_min(0) / 2
    spent = [float(bits[a:b].sum()) for a, b in zip([0, *even], even)]
    assert sum(spent) == pytest.approx(48, abs=1e-3)
    assert max(spent) < 12 + float(bits[0])
    early = onedpiece_basis.cut(variances, 4, 12.0, early=0.5)
    assert early[0] >= even[0]
    assert early[-1] == even[-1] == 40


def test_saving_moves_no_code(codec, tmp_path):
    save_codec(codec, tmp_path / "mini.safetensors", dtype=torch.float16)
    again = load_codec(tmp_path / "mini.safetensors")
    assert again.config == codec.config
    pictures = [Image(p) for p in scenes(16, 4)]
    codes = [s.codes for s in codec.encode(pictures)]
    assert all(torch.equal(a.codes, b) for a, b in zip(again.encode(pictures), codes))


def test_a_whole_picture_comes_back_in_its_size(codec):
    picture = Image(torch.linspace(0, 1, 60).expand(3, 30, 60))
    (stream,) = codec.encode([picture])
    assert stream.prefix_step == 1
    for k in (1, 7, TINY.tokens):
        (back,) = codec.decode([stream[:k]])
        assert back.pixels.shape == (3, 30, 60)
        assert back.pixels.isfinite().all()


def test_gradients_reach_the_whole_network(codec):
    network = OneDPieceMini(TINY).repair
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    network(torch.rand(2, 3, 16, 16), torch.rand(2, 2, 16, 16)).square().mean().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="image_size is 60"):
        OneDPieceMiniConfig(image_size=60)
    with pytest.raises(ValueError, match="head_tokens <= components"):
        OneDPieceMiniConfig(components=8)
