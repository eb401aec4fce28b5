"""v1's and v2's velocity network: a one-dimensional UNet with transformer blocks (Matcha-TTS, arXiv 2309.03199).

| version | levels | convolutions | norm | attention |
|---|---|---|---|---|
| v1 | 2: half the frames in the middle | both ways | 8 groups | all frames |
| v2 | 1: no resampling | look back | layer norm | all frames, or chunks of 50 |

What lies beyond a row's own frames is kept out of convolutions, keys and (v1) group statistics: a batch of unequal
lengths equals the single calls.

Letters: B batch, T frames, C channels, M mel bands, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .conformer import visible

GROUPS = 8


class UNet(nn.Module):
    """Noisy mels and what is known to velocities."""

    def __init__(
        self,
        *,
        mels: int,
        channels: tuple[int, ...],
        heads: int,
        head_width: int,
        blocks: int,
        middle: int,
        causal: bool,
    ):
        super().__init__()
        if len(channels) not in (1, 2) or (causal and len(channels) != 1):
            raise ValueError(f"channels are {channels}, expected two levels, or one where causal")
        self.inputs, time = 4 * mels, 4 * channels[0]
        self.time_mlp = nn.Module()
        self.time_mlp.linear_1 = nn.Linear(self.inputs, time)
        self.time_mlp.linear_2 = nn.Linear(time, time)
        self.down_blocks, self.mid_blocks, self.up_blocks = (nn.ModuleList() for _ in range(3))

        def level(before: int, after: int, resampling: nn.Module | None) -> nn.ModuleList:
            stack = (Transformer(after, heads, head_width) for _ in range(blocks))
            parts = [Resnet(before, after, time, causal), nn.ModuleList(stack)]
            return nn.ModuleList(parts if resampling is None else [*parts, resampling])

        width = self.inputs
        for i, after in enumerate(channels):
            last = i == len(channels) - 1
            self.down_blocks.append(
                level(width, after, conv(after, causal) if last else Down(after))
            )
            width = after
        for _ in range(middle):
            self.mid_blocks.append(level(width, width, None))
        back = (*channels[::-1], channels[0])
        for i, after in enumerate(back[1:]):
            last = i == len(channels) - 1
            self.up_blocks.append(
                level(2 * back[i], after, conv(after, causal) if last else Up(after))
            )
        self.final_block = ConvBlock(channels[0], channels[0], causal)
        self.final_proj = nn.Conv1d(channels[0], mels, 1)

    def forward(
        self,
        x: Tensor,
        mu: Tensor,
        speaker: Tensor,
        prompt: Tensor,
        time: Tensor,
        n: Tensor | None = None,
        chunk: int = 0,
    ) -> Tensor:
        """x, mu, prompt [B, T, M], speaker [B, M], time [] or [B] to [B, T, M]; n and chunk as in `conformer`."""
        speaker = speaker[:, None].expand(-1, x.shape[1], -1)
        x = torch.cat([x, mu, speaker, prompt], -1)
        time = self._time(time.reshape(-1), x)
        kept: list[tuple[Tensor, Tensor | None]] = []
        for resnet, blocks, down in self.down_blocks:
            x = attended(blocks, resnet(x, time, n), n, chunk)
            kept.append((x, n))
            x = down(cut(x, n))
            n = n if n is None or not isinstance(down, Down) else (n + 1) // 2
        n = kept[-1][1]
        for resnet, blocks in self.mid_blocks:
            x = attended(blocks, resnet(x, time, n), n, chunk)
        for resnet, blocks, up in self.up_blocks:
            skip, n = kept.pop()
            x = torch.cat([x[:, : skip.shape[1]], skip], -1)
            x = attended(blocks, resnet(x, time, n), n, chunk)
            x = up(cut(x, n))
        return F.linear(cut(self.final_block(x, n), n), *pointwise(self.final_proj))

    def _time(self, time: Tensor, like: Tensor) -> Tensor:
        """[1 or B] to what the blocks add, before their own projections: [1 or B, 4 C]."""
        waves = sinusoids(time, self.inputs).to(like.dtype)
        return F.mish(self.time_mlp.linear_2(F.silu(self.time_mlp.linear_1(waves))))


class Resnet(nn.Module):
    """Two convolutions with the time between them: [B, T, C] -> [B, T, C']."""

    def __init__(self, channels: int, out: int, time: int, causal: bool):
        super().__init__()
        self.mlp = nn.Sequential(nn.Identity(), nn.Linear(time, out))
        self.block1 = ConvBlock(channels, out, causal)
        self.block2 = ConvBlock(out, out, causal)
        self.res_conv = nn.Conv1d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor, n: Tensor | None) -> Tensor:
        """`time` [1 or B, 4 C], its nonlinearity done."""
        x = cut(x, n)
        y = self.block1(x, n) + self.mlp[1](time)[:, None]
        return self.block2(y, n) + F.linear(x, *pointwise(self.res_conv))


class ConvBlock(nn.Module):
    """A convolution, a norm, Mish: [B, T, C] -> [B, T, C']."""

    def __init__(self, channels: int, out: int, causal: bool):
        super().__init__()
        norm = (
            [nn.Identity(), nn.LayerNorm(out), nn.Identity()] if causal else [Grouped(GROUPS, out)]
        )
        first = CausalConv(channels, out) if causal else SameConv(channels, out)
        self.block = nn.Sequential(first, *norm, nn.Mish())

    def forward(self, x: Tensor, n: Tensor | None) -> Tensor:
        """0 beyond n."""
        y = self.block[0](cut(x, n))
        for layer in self.block[1:]:
            y = layer(y, n) if isinstance(layer, Grouped) else layer(y)
        return cut(y, n)


class SameConv(nn.Conv1d):
    """A convolution of kernel 3 on [B, T, C]."""

    def __init__(self, channels: int, out: int):
        super().__init__(channels, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C']."""
        return super().forward(x.mT).mT


class CausalConv(nn.Conv1d):
    """The same, looking back."""

    def __init__(self, channels: int, out: int):
        super().__init__(channels, out, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C']."""
        return super().forward(F.pad(x.mT, (2, 0))).mT


class Down(nn.Module):
    """Half the frames: [B, T, C] -> [B, ⌈T / 2⌉, C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Every other frame."""
        return self.conv(x.mT).mT


class Up(nn.Module):
    """Twice the frames: [B, T, C] -> [B, 2 T, C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Each frame becomes two."""
        return self.conv(x.mT).mT


class Grouped(nn.GroupNorm):
    """Group norm on [B, T, C] over a row's own frames."""

    def forward(self, x: Tensor, n: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """[B, T, C]."""
        if n is None:
            return super().forward(x.mT).mT
        groups = rearrange(cut(x, n), "b t (g c) -> b t g c", g=self.num_groups)
        count = n[:, None, None, None] * groups.shape[-1]
        mean = groups.sum((1, 3), keepdim=True) / count
        inside = (torch.arange(x.shape[1], device=x.device) < n[:, None])[..., None, None]
        centred = (groups - mean) * inside
        variance = centred.square().sum((1, 3), keepdim=True) / count
        y = rearrange(centred * (variance + self.eps).rsqrt(), "b t g c -> b t (g c)")
        return y * self.weight + self.bias


class Transformer(nn.Module):
    """One block [B, T, C] -> [B, T, C]."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, head_width)
        self.ff = nn.Module()
        self.ff.net = nn.ModuleList([nn.Module(), nn.Identity(), nn.Linear(4 * width, width)])
        self.ff.net[0].proj = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """`seen` masks keys."""
        x = x + self.attn1(self.norm1(x), seen)
        return x + self.ff.net[2](F.gelu(self.ff.net[0].proj(self.norm3(x))))


class Attention(nn.Module):
    """Self-attention [B, T, C] -> [B, T, C]."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """All heads alike."""
        q, k, v = (
            rearrange(layer(x), "b t (h d) -> b h t d", h=self.heads)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.to_out[0](rearrange(y, "b h t d -> b t (h d)"))


def attended(blocks: nn.ModuleList, x: Tensor, n: Tensor | None, chunk: int) -> Tensor:
    """[B, T, C] through transformer blocks."""
    seen = visible(0, x.shape[1], x.shape[1], n, chunk, x.device)
    for block in blocks:
        x = block(x, seen)
    return x


def conv(channels: int, causal: bool) -> nn.Conv1d:
    """What stands in for resampling at the last level."""
    return CausalConv(channels, channels) if causal else SameConv(channels, channels)


def pointwise(layer: nn.Conv1d) -> tuple[Tensor, Tensor | None]:
    """A convolution of kernel 1 as weight and bias of a linear map."""
    return layer.weight[..., 0], layer.bias


def cut(x: Tensor, n: Tensor | None) -> Tensor:
    """Zero [B, T, C] beyond n."""
    if n is None:
        return x
    return x.masked_fill((torch.arange(x.shape[1], device=x.device) >= n[:, None])[..., None], 0)


def sinusoids(time: Tensor, width: int) -> Tensor:
    """Sines, then cosines of 1000 · time [B]: [B, width]."""
    half = width // 2
    step = math.log(10_000) / (half - 1)
    rates = torch.exp(-step * torch.arange(half, device=time.device))
    angles = 1000 * time.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)
