"""Patches as latents: a linear `LatentCodec` that is fitted to pictures in a minute, where no VAE is at hand.

Squares of p x p pixels are projected on their first C principal components, all under one scale, so that noise on the
latents is noise on the picture and the channels' variance is 1 on average. xAR's recipes for small pictures train on
it; its decoder is the transpose, so what is lost is what the components do not span.

Shapes: B batch, C latent channels, p side of a patch, H W pixels, h w = H / p, W / p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..codec import Codec, CodecSpec, CodecUnavailable, Rng
from ..layout import Grid
from ..published import Weights, load_into

if TYPE_CHECKING:
    from ..registry import Entry


@dataclass(frozen=True, kw_only=True)
class PatchLatentsConfig:
    """Sizes.

    Args:
        patch: p.
        channels: C, of the 3 p p that there are.
        size: side of the pictures that it was fitted to.
    """

    patch: int = 4
    channels: int = 16
    size: int = 64

    def __post_init__(self):
        most = 3 * self.patch**2
        if not 1 <= self.channels <= most:
            raise ValueError(
                f"channels is {self.channels}, expected 1 to 3 * patch * patch = {most}"
            )


class PatchLatents(Codec):
    """Pixels to principal components of patches, and back."""

    system = "patches"

    def __init__(self, config: PatchLatentsConfig | None = None, *, name: str = "patches/custom"):
        super().__init__()
        self.config = config = config or PatchLatentsConfig()
        values = 3 * config.patch**2
        self.mean = nn.Parameter(torch.zeros(values), requires_grad=False)
        self.basis = nn.Parameter(torch.eye(config.channels, values), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.spec = CodecSpec(
            name=name,
            modality="image",
            vocab=(),
            layout=Grid(),
            encodes=False,
            decodes=False,
            fit="resize",
            size=(config.size, config.size),
            weights_licence="Apache-2.0",
        )

    @classmethod
    def fit(
        cls, pixels: Tensor, config: PatchLatentsConfig, *, name: str = "patches/custom"
    ) -> PatchLatents:
        """Fitted to pixels [N, 3, H, W] in [-1, 1]; without chance."""
        codec = cls(config, name=name)
        patches = codec._patches(pixels).flatten(0, -2).double()
        mean = patches.mean(0)
        covariance = (patches - mean).T @ (patches - mean) / len(patches)
        variances, vectors = torch.linalg.eigh(covariance)  # ascending
        basis = vectors.flip(1)[:, : config.channels].T
        # the sign of an eigenvector is the solver's whim
        signs = basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        with torch.no_grad():
            codec.mean.copy_(mean)
            codec.basis.copy_(basis * signs)
            codec.scale.copy_(variances.flip(0)[: config.channels].mean().clamp(min=1e-12).rsqrt())
        return codec.eval()

    def encode_latents(self, x: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to scaled latents [B, C, h, w]; there is nothing to draw."""
        latents = (self._patches(x) - self.mean) @ self.basis.T * self.scale
        return rearrange(latents, "b h w c -> b c h w")

    def decode_latents(self, z: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] to pixels [B, 3, H, W] in [-1, 1], not clamped."""
        channels = self.config.channels
        if z.ndim != 4 or z.shape[1] != channels:
            raise ValueError(f"latents are {tuple(z.shape)}, expected [B, {channels}, h, w]")
        patches = rearrange(z, "b c h w -> b h w c") / self.scale @ self.basis + self.mean
        return rearrange(
            patches, "b h w (c p q) -> b c (h p) (w q)", p=self.config.patch, q=self.config.patch
        )

    def encode(self, media: Sequence[Any], *, options: Any = None, rng: Rng | None = None):
        """There are no tokens here."""
        raise CodecUnavailable(f"'{self.spec.name}' has continuous latents: use encode_latents")

    def decode(self, streams: Sequence[Any], *, options: Any = None, rng: Rng | None = None):
        """There are no tokens here."""
        raise CodecUnavailable(f"'{self.spec.name}' has continuous latents: use decode_latents")

    def _patches(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, h, w, 3 p p]."""
        p = self.config.patch
        if x.ndim != 4 or x.shape[1] != 3 or any(n % p or not n for n in x.shape[2:]):
            raise ValueError(
                f"pixels are {tuple(x.shape)}, expected [B, 3, H, W] with H, W multiples of {p}"
            )
        return rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=p, q=p)


def build(files: Mapping[str, Weights], entry: Entry) -> PatchLatents:
    """The codec of a file that `save_codec` wrote."""
    weights = files["weights"]
    codec = PatchLatents(PatchLatentsConfig(**entry.config), name=entry.name)
    load_into(codec, weights.tensors, source=weights.source)
    return codec.eval()
