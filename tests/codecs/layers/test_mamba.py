"""The scan and the blocks: against the published block, the plain loop, gradients, batches, streams."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from anytok.codecs.layers import mamba
from anytok.codecs.layers.mamba import (
    BidirectionalMamba,
    Mamba,
    MambaConfig,
    TwoMambas,
    selective_scan,
)
from tests.golden.load import load_golden

KINDS = {"one": Mamba, "shared": BidirectionalMamba, "two": TwoMambas}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def plain(u, delta, A, B, C, D, state=None):
    """The recurrence, step by step; all [B, L, ...]."""
    h = u.new_zeros(len(u), *A.shape) if state is None else state
    ys = []
    for t in range(u.shape[1]):
        a = torch.exp(delta[:, t, :, None] * A)
        h = a * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(ys, 1), h


def problem(rows=2, length=37, channels=6, states=4, dtype=torch.float32, seed=0):
    g = rng(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    return (
        draw(rows, length, channels),
        draw(rows, length, channels).abs() * 0.5,
        -draw(channels, states).abs() * 3,
        draw(rows, length, states),
        draw(rows, length, states),
        draw(channels),
    )


@pytest.mark.parametrize("block", [1, 100, 2**17])
def test_the_scan_is_the_plain_loop(block, monkeypatch):
    monkeypatch.setattr(mamba, "BLOCK", block)
    given = problem()
    y, last = selective_scan(*given)
    want, end = plain(*given)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, end, atol=1e-5, rtol=1e-5)
    state = torch.randn(2, 6, 4, generator=rng(5))
    before = state.clone()
    y, last = selective_scan(*given, state=state)
    want, end = plain(*given, state=state)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, end, atol=1e-5, rtol=1e-5)
    assert torch.equal(state, before)


def test_the_scan_is_the_published_one():
    golden = load_golden("video_storm_mamba")["scan"]
    first = {k: golden[k].transpose(1, 2) for k in ("u", "delta", "B", "C", "z")}
    delta = F.softplus(first["delta"] + golden["delta_bias"])
    y, last = selective_scan(first["u"], delta, golden["A"], first["B"], first["C"], golden["D"])
    y = y * F.silu(first["z"])
    torch.testing.assert_close(y.transpose(1, 2), golden["y"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, golden["last_state"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_long_scan_does_not_drift():
    given = problem(1, 4096, 16, 8, seed=3)
    y, _ = selective_scan(*given)
    want, _ = plain(*(t.double() for t in given))
    assert (y - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("block", [1, 50, 2**21])
def test_gradients_are_those_of_the_plain_loop(block, monkeypatch):
    monkeypatch.setattr(mamba, "TRAINED_BLOCK", block)
    given = [t.requires_grad_() for t in problem(2, 11, 3, 2, torch.float64)]
    state = torch.randn(2, 3, 2, dtype=torch.float64, generator=rng(1)).requires_grad_()
    weight = [torch.randn(2, 11, 3, generator=rng(2)).double(), torch.randn(2, 3, 2).double()]
    grads = []
    for scan in (selective_scan, plain):
        y, last = scan(*given, state=state)
        loss = (y * weight[0]).sum() + (last * weight[1]).sum()
        grads.append(torch.autograd.grad(loss, [*given, state]))
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def golden_block():
    golden = load_golden("video_storm_mamba")
    block = Mamba(MambaConfig(width=32))
    block.load_state_dict(golden["mamba_sd"])
    return golden, block.eval()


@torch.no_grad()
def test_the_block_is_the_published_one():
    golden, block = golden_block()
    torch.testing.assert_close(block(golden["x"]), golden["mamba_fwd"], atol=1e-6, rtol=1e-5)
    back = block(golden["x"], reverse=True)
    torch.testing.assert_close(back, golden["mamba_bwd"], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_both_directions_from_published_weights():
    """With the same weights for both directions, the joined blocks are sums of the published outputs."""
    golden = load_golden("video_storm_mamba")
    state = golden["mamba_sd"]
    two = TwoMambas(MambaConfig(width=32))
    for part in (two.forward_mixer, two.backward_mixer):
        part.load_state_dict(state)
    want = golden["mamba_fwd"] + golden["mamba_bwd"]
    torch.testing.assert_close(two(golden["x"]), want, atol=2e-6, rtol=1e-5)
    shared = BidirectionalMamba(MambaConfig(width=32))
    names = {"conv1d": "conv1d_b", "x_proj": "x_proj_b", "dt_proj": "dt_proj_b"}
    back = {"A_b_log": state["A_log"], "D_b": state["D"]}
    for key, value in state.items():
        head, _, tail = key.partition(".")
        if head in names:
            back[f"{names[head]}.{tail}"] = value
    shared.load_state_dict({**state, **back})
    # The gate and the output map are shared and linear: the sum is the same, up to rounding.
    torch.testing.assert_close(shared(golden["x"]), want, atol=2e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_equal_single_rows(kind):
    torch.manual_seed(0)
    block = KINDS[kind](MambaConfig(width=16)).eval()
    x = torch.randn(3, 20, 16, generator=rng())
    counts = [20, 7, 1]
    valid = torch.arange(20) < torch.tensor(counts)[:, None]
    x[~valid] = 1e3
    got = block(x, valid)
    for row, n in enumerate(counts):
        want = block(x[row : row + 1, :n])[0]
        torch.testing.assert_close(got[row, :n], want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_stream_is_the_whole():
    _, block = golden_block()
    x = torch.randn(2, 23, 32, generator=rng())
    state, parts = None, []
    for part in x.split([1, 2, 9, 1, 10], 1):
        y, state = block.advance(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), block(x), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="merge='forward'"):
        BidirectionalMamba(MambaConfig(width=8)).advance(x[..., :8], None)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind):
    torch.manual_seed(0)
    block = KINDS[kind](MambaConfig(width=8, state=4))
    block(torch.randn(2, 9, 8, generator=rng())).square().sum().backward()
    for name, p in block.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_sizes_and_start_are_the_published_ones():
    block = Mamba(MambaConfig(width=768))
    shapes = {k: tuple(v.shape) for k, v in block.state_dict().items()}
    assert shapes == {
        "A_log": (1536, 16),
        "D": (1536,),
        "in_proj.weight": (3072, 768),
        "conv1d.weight": (1536, 1, 4),
        "conv1d.bias": (1536,),
        "x_proj.weight": (80, 1536),
        "dt_proj.weight": (1536, 48),
        "dt_proj.bias": (1536,),
        "out_proj.weight": (768, 1536),
    }
    steps = F.softplus(block.dt_proj.bias.detach())
    assert 0.9e-3 < float(steps.min()) < 2e-3
    assert 0.08 < float(steps.max()) < 0.11
    with pytest.raises(ValueError, match="state is 0"):
        MambaConfig(width=8, state=0)


def test_the_fused_kernel_is_called_as_it_wants_to_be(monkeypatch):
    """A stand-in with the signature of mamba-ssm's function; the real one needs a GPU."""
    calls = []

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
        return_last_state=False,
    ):  # fmt: skip
        calls.append((u.shape, B.shape, delta_softplus, return_last_state))
        assert u.is_contiguous()
        assert z is None
        turned = [t.transpose(1, 2) for t in (u, delta, B, C)]
        y, last = plain(turned[0], turned[1], A, turned[2], turned[3], D)
        return y.transpose(1, 2), last

    module = types.ModuleType(mamba.FUSED)
    module.selective_scan_fn = selective_scan_fn
    monkeypatch.setitem(sys.modules, mamba.FUSED, module)
    monkeypatch.setattr(mamba.importlib.util, "find_spec", lambda name: name == "mamba_ssm")
    assert mamba.fused_kernel(torch.device("cpu")) is None
    assert mamba.fused_kernel(torch.device("cuda")) is selective_scan_fn
    given = problem()
    want, end = selective_scan(*given)
    assert not calls
    monkeypatch.setattr(mamba, "fused_kernel", lambda device: selective_scan_fn)
    got, last = selective_scan(*given)
    assert calls == [((2, 6, 37), (2, 4, 37), False, True)]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, end, atol=1e-5, rtol=1e-5)
