"""v3's velocity network: a diffusion transformer over mel frames (arXiv 2212.09748; F5-TTS, arXiv 2410.06885).

- Rotary positions turn only the first head's channels, in interleaved pairs: the published code applies them to q and k
  before they are split into heads. Turning every head gives wrong mels.
- Two grouped convolutions that look back give all heads a sense of place.
- The final norm's modulation is (scale, shift), the blocks' (shift, scale, gate).

Letters: B batch, T frames, M mel bands, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .conformer import visible
from .unet import sinusoids

TIME = 256  # channels of the time's sinusoids
KERNEL, GROUPS = 31, 16  # of the position convolutions


class DiT(nn.Module):
    """Noisy mels and what is known to velocities."""

    def __init__(self, mels: int, width: int, heads: int, layers: int, hidden: int):
        super().__init__()
        self.time_embed = nn.Module()
        self.time_embed.time_mlp = nn.Sequential(
            nn.Linear(TIME, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.input_embed = InputEmbedding(4 * mels, width)
        self.rotary_embed = Rotary(width // heads)
        self.transformer_blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm_out = nn.Module()
        self.norm_out.linear = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, mels)

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
        known = torch.cat([x, prompt, mu, speaker], -1)
        x = self.input_embed(known)
        time = F.silu(self.time_embed.time_mlp(sinusoids(time.reshape(-1), TIME).to(x.dtype)))
        turns = self.rotary_embed(x)
        seen = visible(0, x.shape[1], x.shape[1], n, chunk, x.device)
        for block in self.transformer_blocks:
            x = block(x, time, turns, seen)
        scale, shift = self.norm_out.linear(time)[:, None].chunk(2, -1)
        return self.proj_out(norm(x) * (1 + scale) + shift)


class InputEmbedding(nn.Module):
    """[B, T, C] -> [B, T, D]."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.proj = nn.Linear(channels, width)
        self.conv_pos_embed = nn.Module()
        for name in ("conv1", "conv2"):
            layer = nn.Sequential(nn.Conv1d(width, width, KERNEL, groups=GROUPS), nn.Mish())
            setattr(self.conv_pos_embed, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Projected, plus what the convolutions make of it."""
        x = self.proj(x)
        y = self.conv_pos_embed.conv1(F.pad(x.mT, (KERNEL - 1, 0)))
        return x + self.conv_pos_embed.conv2(F.pad(y, (KERNEL - 1, 0))).mT


class Block(nn.Module):
    """One block [B, T, D] -> [B, T, D], modulated by the time [B, D]."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.attn_norm = nn.Module()
        self.attn_norm.linear = nn.Linear(width, 6 * width)
        self.attn = Attention(width, heads)
        self.ff = nn.Module()
        self.ff.ff = nn.Sequential(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh")),
            nn.Identity(),
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor, time: Tensor, turns: Tensor, seen: Tensor | None) -> Tensor:
        """`turns` rotates, `seen` masks."""
        modulation = self.attn_norm.linear(time)[:, None].chunk(6, -1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation
        x = x + gate * self.attn(norm(x) * (1 + scale) + shift, turns, seen)
        return x + gate_ff * self.ff.ff(norm(x) * (1 + scale_ff) + shift_ff)


class Attention(nn.Module):
    """Self-attention [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, turns: Tensor, seen: Tensor | None) -> Tensor:
        """The first head alone is rotated."""
        q, k = (rotate_first(layer(x), turns) for layer in (self.to_q, self.to_k))
        q, k, v = (rearrange(y, "b t (h d) -> b h t d", h=self.heads) for y in (q, k, self.to_v(x)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.to_out[0](rearrange(y, "b h t d -> b t (h d)"))


class Rotary(nn.Module):
    """The angles of each frame; their rates stay float32, since a rounded rate is far off after a thousand frames."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("inv_freq", 10_000 ** -(torch.arange(0, width, 2) / width))

    def forward(self, x: Tensor) -> Tensor:
        """For x [B, T, D], cosines and sines [2, T, d / 2]."""
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.inv_freq
        return torch.stack([angles.cos(), angles.sin()]).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        return super()._apply(lambda t: t.to(fn(t).device), recurse)


def norm(x: Tensor) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rotate_first(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of the first d channels of [B, T, D]."""
    cos, sin = turns
    width = 2 * cos.shape[-1]
    even, odd = x[..., :width:2], x[..., 1:width:2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([turned, x[..., width:]], -1)
