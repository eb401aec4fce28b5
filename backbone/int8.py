"""Linear layers in eight bits on CPUs: weights are rounded once, for each output; inputs are rounded as they come.

A step of decoding reads every weight once and does little with it, so a quarter of the bytes is most of the speed.
What it costs is drift: `benchmarks/decode_int8.py` measures it against float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Int8Linear:
    """x W^T + b with W as signed bytes.

    Args:
        weight: [out, in], float.
        bias: [out], or None.

    Raises:
        ValueError: the weight is not on a CPU.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        if weight.device.type != "cpu":
            raise ValueError(
                f"int8 is for CPUs, the weights are on {weight.device}; use bfloat16 there"
            )
        weight = weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp(min=1e-8)
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        rounded = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        own = None if bias is None else bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack(rounded, own)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in x's type."""
        # Seven bits of the input: without it sums overflow on processors that lack VNNI.
        return torch.ops.quantized.linear_dynamic(x.float(), self.packed, True).to(x.dtype)
