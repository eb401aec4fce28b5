"""Start values that make an untrained DAC a transform codec.

From random weights, hours of training go into finding a transform that keeps phase. The architecture holds one exactly:

- strided convolutions of all strides but the last only regroup samples: block b of `prod(strides)` samples becomes its
  channels;
- the last one, whose kernel spans two hops, is a modified discrete cosine transform with a sine window (Princen and
  Bradley 1986), of which the lowest frequencies that fit the latent are kept; the decoder is its transpose, and what
  overlaps adds up to the signal again;
- residual units begin small, and the activations on the main path begin nearly linear.

Channels that this does not need keep their random start values, so there is no symmetry to break.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from ..audio.dac import DAC, ResidualUnit
from ..audio.rvq_mini import mdct
from ..layers.conv import Snake

NEARLY_LINEAR = 0.01  # alpha: x + 0.01 x²
QUIET = 0.01  # factor on the output of residual units
NOISE = 0.01  # factor on the random start values that stay under a structured kernel


@torch.no_grad()
def start_as_transform(codec: DAC) -> None:
    """Set the weights of a codec without weight norm.

    Raises:
        ValueError: the decoder does not mirror the encoder, or a layer is too narrow for a block of samples.
    """
    rates, config = codec.config.encoder_rates, codec.config
    if config.decoder_rates != rates[::-1]:
        raise ValueError(f"decoder_rates are {config.decoder_rates}, expected {rates[::-1]}")
    if rates[-1] % 2:
        raise ValueError(f"the last encoder stride is {rates[-1]}, expected an even one")
    widths = [w.weight.shape[0] for w in _strided(codec.encoder.block)]
    for i, width in enumerate(widths[:-1], 1):
        if width < prod(rates[:i]):
            raise ValueError(
                f"encoder block {i} has {width} channels for {prod(rates[:i])} samples"
            )
    for layer in (*codec.encoder.block, *codec.decoder.model):
        _quieten(layer)
    _encoder(codec.encoder.block, rates, config.latent_dim)
    _decoder(codec.decoder.model, rates[::-1], config.latent_dim)


def _encoder(layers: nn.Sequential, rates: tuple[int, ...], latent: int) -> None:
    hop, strided = prod(rates), _strided(layers)
    _structured(layers[0].weight, _delta(1, 1, 7))
    for done, conv, rate in zip(_blocks(rates), strided[:-1], rates):
        _structured(conv.weight, _regroup(done, rate, conv.padding[0]))
    kept = min(strided[-1].weight.shape[0], hop)
    basis = mdct(hop, kept).unflatten(1, (2 * rates[-1], hop // rates[-1]))
    _structured(strided[-1].weight, basis.transpose(1, 2))
    _structured(layers[-1].weight, _delta(min(latent, kept), min(latent, kept), 3))


def _decoder(layers: nn.Sequential, rates: tuple[int, ...], latent: int) -> None:
    hop, strided = prod(rates), _strided(layers)
    kept = min(latent, hop, layers[0].weight.shape[0])
    _structured(layers[0].weight, _delta(kept, kept, 7))
    basis = mdct(hop, kept).unflatten(1, (2 * rates[0], hop // rates[0]))
    _structured(strided[0].weight, basis.transpose(1, 2), transposed=True)
    blocks = list(_blocks(rates[::-1]))[::-1]
    for done, conv, rate in zip(blocks[1:], strided[1:], rates[1:]):
        # Regrouping is orthogonal: its transpose undoes it.
        _structured(conv.weight, _regroup(done, rate, conv.padding[0]), transposed=True)
    _structured(layers[-1].weight, _delta(1, 1, 7))


def _blocks(rates: tuple[int, ...]) -> list[int]:
    """Samples in a channel block before each stride: (5, 4, 4) gives 1, 5, 20."""
    return [prod(rates[:i]) for i in range(len(rates))]


def _regroup(block: int, rate: int, padding: int) -> Tensor:
    """A kernel [rate · block, block, 2 · rate] that lays `rate` blocks of channels side by side."""
    kernel = torch.zeros(rate, block, block, 2 * rate)
    for j in range(rate):
        kernel[j, :, :, padding + j] = torch.eye(block)
    return kernel.flatten(0, 1)


def _delta(rows: int, columns: int, taps: int) -> Tensor:
    """The kernel [rows, columns, taps] that changes nothing."""
    kernel = torch.zeros(rows, columns, taps)
    kernel[:, :, taps // 2] = torch.eye(rows, columns)
    return kernel


def _structured(weight: nn.Parameter, kernel: Tensor, *, transposed: bool = False) -> None:
    """Write a kernel [out, in, taps] into the first channels of a weight.

    Rows that the kernel fills hear other channels only as noise. In a transposed convolution, whose weight is [in,
    out, taps] and whose kernel is given as that of the encoder, the same holds for what its outputs hear.
    """
    rows, columns, _ = kernel.shape
    if transposed:
        weight[:, :columns] *= NOISE
    else:
        weight[:rows] *= NOISE
    weight[:rows, :columns] += kernel.to(weight)


def _quieten(layer: nn.Module) -> None:
    if isinstance(layer, Snake):
        layer.alpha.fill_(NEARLY_LINEAR)
        return
    for inner in getattr(layer, "block", ()):
        if isinstance(inner, ResidualUnit):
            inner.block[-1].weight.mul_(QUIET)
            inner.block[-1].bias.zero_()
        else:
            _quieten(inner)
    if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
        layer.bias.zero_()


def _strided(layers: nn.Sequential) -> list[nn.Module]:
    """The strided convolutions of a chain, in order."""
    return [m for m in layers.modules() if getattr(m, "stride", (1,)) != (1,)]
