"""CAM++: who speaks, as one vector (Wang et al., arXiv 2303.00332; 3D-Speaker). CosyVoice's voices are made with it.

    samples [N] at 16 kHz ─ log mel bands, less their mean ─▶ [T, 80] ─ head (2-D, an eighth of the bands) ─▶ [320, T]
    ─ time delay layer, three densely connected blocks ─▶ [C, T / 2] ─ mean and deviation over time ─▶ [192]

- A dense layer's output is weighted by a gate that sees the mean of the whole and of its own 100 frames: the context
  aware mask that the name tells of.
- The vector is not normalised; who compares or conditions on it divides by its length.
- `campplus.onnx` holds no names that last, and has batch norms folded into convolutions: it is read layer by layer, in
  the order of execution, which is the order of the modules here.

Letters: B batch, N samples, F mel bands, T frames, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ....modalities.audio import Audio
from ....modalities.features import KaldiFbank, kaldi_fbank
from ...published import File, Weights, WeightsError, find, load_into, read_weights
from ..waveform import AudioOptions, rows_of
from .graph import Constant, constants, is_graph

RATE = 16_000
SHORTEST = 720  # samples: three frames, of which the deviation over time needs two after the stride
SEGMENT = 100  # frames over which a gate takes its nearer mean
HEAD = 32  # channels of the 2-D head
PUBLISHED = File(
    name="campplus.onnx", repo="FunAudioLLM/CosyVoice2-0.5B", alternatives=("campplus.pt",)
)


@dataclass(frozen=True, kw_only=True)
class CAMPPlusConfig:
    """Sizes of a CAM++, the published ones if nothing is said; all can be read off the weights.

    Args:
        bands: F, a multiple of 8.
        embedding: length of the vector.
        channels: after the time delay layer.
        growth: channels that a dense layer adds.
        bottleneck: channels inside a dense layer, as a multiple of `growth`.
        layers: dense layers of each block.
        dilations: of each block's convolutions.
    """

    bands: int = 80
    embedding: int = 192
    channels: int = 128
    growth: int = 32
    bottleneck: int = 4
    layers: tuple[int, ...] = (12, 24, 16)
    dilations: tuple[int, ...] = (1, 2, 2)

    def __post_init__(self):
        if self.bands % 8:
            raise ValueError(f"bands is {self.bands}, expected a multiple of 8")
        if len(self.layers) != len(self.dilations):
            raise ValueError(
                f"layers {self.layers} and dilations {self.dilations} differ in length"
            )


class CAMPPlus(nn.Module):
    """Speech to a vector."""

    def __init__(self, config: CAMPPlusConfig = CAMPPlusConfig()):
        super().__init__()
        self.config = config
        self.head = Head(config.bands)
        self.xvector = XVector(config)

    @classmethod
    def from_published(
        cls, state_dict: Mapping[str, Tensor], *, source: str = "<memory>"
    ) -> CAMPPlus:
        """From 3D-Speaker's state dict.

        Raises:
            WeightsError: another model's tensors.
        """
        model = cls(infer_config(state_dict, source))
        # How many batches training saw; inference does not ask, and converted files leave it out.
        counts = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
        load_into(model, {**counts, **state_dict}, source=source)
        return model.eval()

    @torch.no_grad()
    def embed(self, speech: Sequence[Audio]) -> Tensor:
        """One vector [embedding] for each recording: [B, embedding], float32, on the CPU.

        Channels are averaged, any rate is resampled to 16 kHz. A voice told from several recordings is the mean of
        their vectors. Recordings go through one by one: a batch norm's padding would change their neighbours.

        Raises:
            ValueError: an empty sound, one shorter than 45 ms, NaN or infinite samples.
        """
        weight = next(self.parameters())
        vectors = [self(self._features(item)[None].to(weight)).float().cpu() for item in speech]
        return torch.cat(vectors) if vectors else torch.empty(0, self.config.embedding)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, T, F] to vectors [B, embedding]."""
        return self.xvector(self.head(x.mT))

    def _features(self, audio: Audio) -> Tensor:
        (row,) = rows_of(audio, RATE, AudioOptions())
        if len(row) < SHORTEST:
            raise ValueError(
                f"the speech lasts {1000 * len(row) / RATE:.1f} ms, a speaker's vector needs "
                f"{1000 * SHORTEST // RATE} ms or more"
            )
        return kaldi_fbank(row, KaldiFbank(n_mels=self.config.bands, subtract_mean=True))


class Head(nn.Module):
    """Bands as a picture: [B, F, T] -> [B, 32 · F / 8, T]."""

    def __init__(self, bands: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, HEAD, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(HEAD)
        self.layer1 = nn.Sequential(ResidualBlock(2), ResidualBlock(1))
        self.layer2 = nn.Sequential(ResidualBlock(2), ResidualBlock(1))
        self.conv2 = nn.Conv2d(HEAD, HEAD, 3, stride=(2, 1), padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(HEAD)
        self.channels = HEAD * (bands // 8)

    def forward(self, x: Tensor) -> Tensor:
        """Time keeps its length, bands are halved three times."""
        x = F.relu(self.bn1(self.conv1(x[:, None])))
        x = self.layer2(self.layer1(x))
        x = F.relu(self.bn2(self.conv2(x)))
        return rearrange(x, "b c f t -> b (c f) t")


class ResidualBlock(nn.Module):
    """Two convolutions plus the input: [B, C, F, T] -> [B, C, F / stride, T]."""

    def __init__(self, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(HEAD, HEAD, 3, stride=(stride, 1), padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(HEAD)
        self.conv2 = nn.Conv2d(HEAD, HEAD, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(HEAD)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(HEAD, HEAD, 1, stride=(stride, 1), bias=False))
            self.shortcut.append(nn.BatchNorm2d(HEAD))

    def forward(self, x: Tensor) -> Tensor:
        """The sum, rectified."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class XVector(nn.Module):
    """[B, C, T] -> [B, embedding]."""

    def __init__(self, config: CAMPPlusConfig):
        super().__init__()
        c = config
        self.tdnn = nn.Module()
        channels = HEAD * (c.bands // 8)
        self.tdnn.linear = nn.Conv1d(channels, c.channels, 5, stride=2, padding=2, bias=False)
        self.tdnn.nonlinear = normed(c.channels)
        channels = c.channels
        for i, (layers, dilation) in enumerate(zip(c.layers, c.dilations), 1):
            self.add_module(f"block{i}", DenseBlock(channels, layers, dilation, c))
            channels += layers * c.growth
            self.add_module(f"transit{i}", Transit(channels))
            channels //= 2
        self.out_nonlinear = normed(channels)
        self.dense = nn.Module()
        self.dense.linear = nn.Conv1d(2 * channels, c.embedding, 1, bias=False)
        self.dense.nonlinear = normed(c.embedding, affine=False)
        self.blocks = len(c.layers)

    def forward(self, x: Tensor) -> Tensor:
        """The statistics of the last block's frames, projected."""
        x = F.relu(self.tdnn.nonlinear(self.tdnn.linear(x)))
        for i in range(1, self.blocks + 1):
            x = getattr(self, f"transit{i}")(getattr(self, f"block{i}")(x))
        x = F.relu(self.out_nonlinear(x))
        x = torch.cat([x.mean(-1), x.std(-1)], 1)
        return self.dense.nonlinear(self.dense.linear(x[..., None]))[..., 0]


class DenseBlock(nn.Module):
    """Each layer adds its channels to all before: [B, C, T] -> [B, C + layers · growth, T]."""

    def __init__(self, channels: int, layers: int, dilation: int, config: CAMPPlusConfig):
        super().__init__()
        for j in range(layers):
            layer = DenseLayer(channels + j * config.growth, dilation, config)
            self.add_module(f"tdnnd{j + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """Layers in order."""
        for layer in self.children():
            x = torch.cat([x, layer(x)], 1)
        return x


class DenseLayer(nn.Module):
    """[B, C, T] -> [B, growth, T]."""

    def __init__(self, channels: int, dilation: int, config: CAMPPlusConfig):
        super().__init__()
        narrow = config.bottleneck * config.growth
        self.nonlinear1 = normed(channels)
        self.linear1 = nn.Conv1d(channels, narrow, 1, bias=False)
        self.nonlinear2 = normed(narrow)
        self.cam_layer = ContextAwareMask(narrow, config.growth, dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Norm, narrow, norm, masked convolution."""
        x = self.linear1(F.relu(self.nonlinear1(x)))
        return self.cam_layer(F.relu(self.nonlinear2(x)))


class ContextAwareMask(nn.Module):
    """A convolution times a gate from the mean of everything and of 100 frames: [B, C, T] -> [B, growth, T]."""

    def __init__(self, channels: int, growth: int, dilation: int):
        super().__init__()
        self.linear_local = nn.Conv1d(
            channels, growth, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.linear1 = nn.Conv1d(channels, channels // 2, 1)
        self.linear2 = nn.Conv1d(channels // 2, growth, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The last segment may be shorter; its mean is over what there is."""
        means = F.avg_pool1d(x, SEGMENT, SEGMENT, ceil_mode=True)
        near = means.repeat_interleave(SEGMENT, -1)[..., : x.shape[-1]]
        gate = self.linear2(F.relu(self.linear1(x.mean(-1, keepdim=True) + near)))
        return self.linear_local(x) * gate.sigmoid()


class Transit(nn.Module):
    """Norm and half of the channels: [B, C, T] -> [B, C / 2, T]."""

    def __init__(self, channels: int):
        super().__init__()
        self.nonlinear = normed(channels)
        self.linear = nn.Conv1d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Between blocks."""
        return self.linear(F.relu(self.nonlinear(x)))


def normed(channels: int, *, affine: bool = True) -> nn.Sequential:
    """A batch norm under the published name; who calls it rectifies."""
    norm = nn.Sequential()
    norm.add_module("batchnorm", nn.BatchNorm1d(channels, affine=affine))
    return norm


def load_campplus(path: str | Path | None = None) -> CAMPPlus:
    """The published speaker encoder, from a `campplus.onnx`, a state dict, or a folder with one; else from the hub.

    Raises:
        CodecUnavailable: the hub cannot be reached, or the onnx package is missing; says what to do.
        WeightsError: the file is damaged or another model's.
    """
    weights = read_weights(find(PUBLISHED, path))
    tensors = graph_state_dict(weights) if is_graph(weights) else weights.tensors
    return CAMPPlus.from_published(tensors, source=weights.source)


def infer_config(tensors: Mapping[str, Tensor], source: str = "<memory>") -> CAMPPlusConfig:
    """The config of a state dict."""
    names = ("tdnn", "dense", "block1.tdnnd1")
    keys = [f"xvector.{names[0]}.linear.weight", f"xvector.{names[1]}.linear.weight"]
    keys += [f"xvector.{names[2]}.cam_layer.linear_local.weight"]
    if missing := [k for k in keys if k not in tensors]:
        raise WeightsError(f"{source}: not a CAM++ state dict, {', '.join(missing)} missing")
    delay, dense, local = (tensors[k] for k in keys)
    layers = {re.findall(r"block(\d+)\.tdnnd(\d+)\.", k)[0] for k in tensors if ".tdnnd" in k}
    blocks = sorted({int(block) for block, _ in layers})
    return CAMPPlusConfig(
        bands=8 * delay.shape[1] // HEAD,
        embedding=dense.shape[0],
        channels=delay.shape[0],
        growth=local.shape[0],
        bottleneck=local.shape[1] // local.shape[0],
        layers=tuple(sum(int(b) == block for b, _ in layers) for block in blocks),
        dilations=(1, *[2] * (len(blocks) - 1)),
    )


def graph_state_dict(
    weights: Weights, config: CAMPPlusConfig = CAMPPlusConfig()
) -> dict[str, Tensor]:
    """The state dict out of a graph, layer by layer in the order of execution.

    A batch norm that the exporter folded into the convolution before it becomes one that only adds its bias.

    Raises:
        WeightsError: the graph's layers are not those of a CAM++ of this config.
    """
    with torch.device("meta"):
        model = CAMPPlus(config)
    layers = _grouped(constants(weights.tensors))
    state, place, bias = {}, 0, None
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.modules.batchnorm._BatchNorm)):
            continue
        op, values = layers[place] if place < len(layers) else ("nothing", [])
        found: dict[str, Tensor] | None
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            found, place = _convolution(module, op, values), place + 1
            bias = values[1] if module.bias is None and len(values) > 1 else None
        elif op == "BatchNormalization" and bias is None:
            found, place = _norm(module, values), place + 1
        else:
            found, bias = _folded(module, bias), None
        if found is None:
            raise WeightsError(
                f"{weights.source}: operation {place} is {op} {[tuple(v.shape) for v in values]}, "
                f"not the {type(module).__name__} '{name}' of a CAM++"
            )
        state.update({f"{name}.{key}": value for key, value in found.items()})
    return state


def _grouped(graph: Sequence[Constant]) -> list[tuple[str, list[Tensor]]]:
    """Convolutions and batch norms with their constants."""
    layers: list[tuple[str, list[Tensor]]] = []
    for c in graph:
        if c.op in ("Conv", "BatchNormalization"):
            if c.slot == 1:
                layers.append((c.op, []))
            layers[-1][1].append(c.tensor)
    return layers


def _convolution(module: nn.Module, op: str, values: list[Tensor]) -> dict[str, Tensor] | None:
    weight = module.weight
    if (
        op != "Conv"
        or values[0].shape != weight.shape
        or len(values) < 1 + (module.bias is not None)
    ):
        return None
    return dict(zip(("weight", "bias") if module.bias is not None else ("weight",), values))


def _norm(module: nn.Module, values: list[Tensor]) -> dict[str, Tensor] | None:
    scale, shift, mean, variance = values
    if len(mean) != module.num_features:
        return None
    if module.affine:
        names = ("weight", "bias", "running_mean", "running_var")
        return dict(zip(names, (scale, shift, mean, variance)))
    plain = torch.equal(scale, torch.ones_like(scale)) and not shift.any()
    return {"running_mean": mean, "running_var": variance} if plain else None


def _folded(module: nn.Module, bias: Tensor | None) -> dict[str, Tensor] | None:
    """A norm that adds `bias`: its variance and epsilon make one."""
    if bias is None or len(bias) != module.num_features:
        return None
    variance = torch.full_like(bias, 1 - module.eps)
    if not module.affine:
        return {"running_mean": -bias, "running_var": variance}
    return {
        "weight": torch.ones_like(bias),
        "bias": bias,
        "running_mean": torch.zeros_like(bias),
        "running_var": variance,
    }
