"""CAM++ against the published implementation's numbers; ONNX files with and without folded norms, bad input."""

import math

import pytest
import torch
from torch import nn

from anytok.codecs import WeightsError
from anytok.codecs.audio.cosyvoice import campplus
from anytok.codecs.audio.cosyvoice.campplus import (
    CAMPPlus,
    CAMPPlusConfig,
    ContextAwareMask,
    infer_config,
    load_campplus,
)
from anytok.modalities import Audio
from tests.golden.load import load_golden

TINY = CAMPPlusConfig(
    bands=16, embedding=6, channels=8, growth=4, bottleneck=2, layers=(2, 1), dilations=(1, 2)
)


@pytest.fixture(scope="module")
def golden():
    return load_golden("audio_campplus")


@pytest.fixture(scope="module")
def samples():
    wave = load_golden("audio_features")["wav16k"].reshape(1, -1)
    return wave if wave.is_floating_point() else wave / 2**15


def make(seed=0):
    """Random weights, and norms that do something."""
    torch.manual_seed(seed)
    model = CAMPPlus(TINY)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.1)
                nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


@torch.no_grad()
def test_published_numbers(golden, samples):
    model = CAMPPlus.from_published(golden["state_dict"])
    assert model.config == CAMPPlusConfig(embedding=24, channels=16, growth=4, bottleneck=2)
    torch.testing.assert_close(model(golden["feat2"]), golden["emb2"], atol=1e-6, rtol=1e-5)
    speech = Audio(samples, 16_000)
    torch.testing.assert_close(model.embed([speech]), golden["emb"], atol=1e-5, rtol=1e-5)


def test_published_size():
    with torch.device("meta"):
        model = CAMPPlus()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(6.85, abs=0.005)
    state = model.state_dict()
    assert len(state) == 937
    assert infer_config(state) == CAMPPlusConfig()


@torch.no_grad()
def test_the_gate_sees_the_whole_and_its_segment():
    gate = ContextAwareMask(2, 1, 1)
    x = torch.randn(1, 2, 130)
    near = torch.cat(
        [
            x[..., :100].mean(-1, keepdim=True).expand(1, 2, 100),
            x[..., 100:].mean(-1, keepdim=True).expand(1, 2, 30),
        ],
        -1,
    )
    mean = x.mean(-1, keepdim=True) + near
    weight = torch.sigmoid(gate.linear2(torch.relu(gate.linear1(mean))))
    torch.testing.assert_close(gate(x), gate.linear_local(x) * weight)


def test_rates_channels_and_batches(samples):
    model = make()
    speech = Audio(samples[:, :20_000], 16_000)
    one = model.embed([speech])
    assert one.shape == (1, 6)
    stereo = Audio(speech.samples.repeat(2, 1), 16_000)
    short = Audio(samples[:, :720], 16_000)
    together = model.embed([stereo, short, speech])
    torch.testing.assert_close(together[0], one[0])
    assert torch.equal(together[2], one[0])
    assert torch.equal(together[1], model.embed([short])[0])
    for rate in (8_000, 48_000):
        other = model.embed([speech.resample(rate)])
        assert torch.isfinite(other).all()
    assert model.embed([]).shape == (0, 6)


def test_odd_sounds_have_a_vector():
    model = make()
    for samples in (torch.zeros(1, 8000), torch.ones(1, 8000), torch.ones(6, 8000)):
        assert torch.isfinite(model.embed([Audio(samples, 16_000)])).all()


def test_bad_input():
    model = make()
    nan = torch.zeros(1, 1000)
    nan[0, 9] = math.nan
    with pytest.raises(ValueError, match="not finite at sample 9"):
        model.embed([Audio(nan, 16_000)])
    with pytest.raises(ValueError, match=r"lasts 0\.1 ms, a speaker's vector needs 45 ms"):
        model.embed([Audio(torch.zeros(1, 1), 16_000)])
    with pytest.raises(ValueError, match="empty"):
        model.embed([Audio(torch.zeros(1, 0), 16_000)])
    with pytest.raises(ValueError, match="multiple of 8"):
        CAMPPlusConfig(bands=79)
    with pytest.raises(ValueError, match="differ in length"):
        CAMPPlusConfig(layers=(1, 2))
    with pytest.raises(WeightsError, match="not a CAM\\+\\+ state dict"):
        infer_config({"a": torch.zeros(1)})


def test_torch_files_load(tmp_path):
    model = make()
    torch.save(model.state_dict(), tmp_path / "campplus.pt")
    back = load_campplus(tmp_path)
    assert back.config == TINY
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)
    with pytest.raises(WeightsError, match="holds none of"):
        load_campplus(tmp_path / "..")


def onnx_file(model, path, folded):
    """The model's layers in order; where `folded`, a norm that follows a convolution alone is merged into it."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    nodes, initializers = [], []

    def constant(tensor):
        name = f"onnx::{len(initializers)}"
        initializers.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), name))
        return name

    def node(op, *tensors):
        name = f"{op}_{len(nodes)}"
        nodes.append(helper.make_node(op, ["x", *map(constant, tensors)], [name], name=name))

    layers = [
        m
        for m in model.modules()
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.modules.batchnorm._BatchNorm))
    ]
    skip = False
    for layer, following in zip(layers, [*layers[1:], None]):
        if skip:
            skip = False
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            ones, zeros = torch.ones(layer.num_features), torch.zeros(layer.num_features)
            affine = (layer.weight, layer.bias) if layer.affine else (ones, zeros)
            node("BatchNormalization", *affine, layer.running_mean, layer.running_var)
        elif folded and _feeds(model, layer, following):
            scale = (following.running_var + following.eps).rsqrt()
            scale = scale * following.weight if following.affine else scale
            shift = following.bias if following.affine else 0
            weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
            node("Conv", weight, shift - following.running_mean * scale)
            skip = True
        else:
            node("Conv", layer.weight, *([] if layer.bias is None else [layer.bias]))
    onnx.save(helper.make_model(helper.make_graph(nodes, "campplus", [], [], initializers)), path)
    return path


def _feeds(model, layer, following):
    """Whether the norm is all that reads the convolution: not across a dense block's concatenations."""
    names = {module: name for name, module in model.named_modules()}
    first, second = names[layer], names.get(following, "")
    inner = second.endswith("nonlinear2.batchnorm") or "bn" in second or "shortcut" in second
    ends = first in ("xvector.tdnn.linear", "xvector.dense.linear", "xvector.transit2.linear")
    return isinstance(following, nn.modules.batchnorm._BatchNorm) and (inner or ends)


@pytest.mark.parametrize("folded", [False, True])
@torch.no_grad()
def test_graphs_are_read_in_order(folded, tmp_path, monkeypatch):
    model = make()
    path = onnx_file(model, tmp_path / "campplus.onnx", folded)
    reading = campplus.graph_state_dict
    monkeypatch.setattr(campplus, "graph_state_dict", lambda weights: reading(weights, TINY))
    back = load_campplus(path)
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(back(x), model(x), atol=1e-5, rtol=1e-4)


def test_graphs_of_other_models_are_refused(tmp_path):
    path = onnx_file(make(), tmp_path / "campplus.onnx", False)
    with pytest.raises(
        WeightsError, match=r"operation \d+ is .* not the Conv1d 'xvector.tdnn.linear'"
    ):
        load_campplus(path)  # the published size is expected
