"""TokenBridge (arXiv 2503.16430, YuqingWang1029/TokenBridge): KL-16 latents as tokens, without training a tokenizer.

- A frozen KL-16 VAE (`kl16.py`) and a fixed quantiser of 2**bits levels for each of its 16 channels
  (`quantizers/gaussian.py`): 256 positions of 16 codes. Channels keep the VAE's order; the generator has its own.
- The published scripts quantise a sample of the posterior; here the mean is the default and a sample an option, drawn
  from each picture's own generator.
- The published weights are the VAE's alone. The masked autoregressive generator with its dimension-wise head is
  `anytok.generators.masked_ar`.

Shapes: B batch, C latent channels, N = h * w positions, V levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from ...modalities.image import Image
from ..codec import CodecSpec, Rng, item_rngs
from ..layout import Grid
from ..published import Weights, load_into
from ..quantizers.gaussian import GaussianConfig, GaussianQuantizer
from ..stream import TokenStream
from .fitting import PictureCodec, PictureOptions, fit_pictures
from .kl16 import IGNORED, KL16, KL16Config, infer_config

if TYPE_CHECKING:
    from ..registry import Entry


@dataclass(frozen=True, kw_only=True)
class TokenBridgeConfig:
    """A TokenBridge; the defaults are the published 6 bits.

    Args:
        image_size: side of the square picture.
        vae: sizes of the VAE, as `KL16Config` has them.
        bits: a code has 2**bits values.
        low, high: latents outside are clamped.
    """

    image_size: int = 256
    vae: Mapping[str, Any] | None = None
    bits: int = 6
    low: float = -5.0
    high: float = 5.0

    def __post_init__(self):
        object.__setattr__(self, "vae", asdict(self.vae_config))  # whole, and tuples again
        stride = self.vae_config.stride
        if self.image_size < stride or self.image_size % stride:
            raise ValueError(f"image_size is {self.image_size}, expected a multiple of {stride}")

    @property
    def vae_config(self) -> KL16Config:
        """Sizes of the VAE."""
        return KL16Config(**(self.vae or {}))

    @property
    def grid(self) -> int:
        """Positions along one side."""
        return self.image_size // self.vae_config.stride


@dataclass(frozen=True, kw_only=True)
class TokenBridgeOptions(PictureOptions):
    """Options of `encode` and `decode`, as `PictureOptions`.

    Args:
        sample: quantise a sample of the posterior, as published, instead of its mean. (encode)
    """

    sample: bool = False


class TokenBridge(PictureCodec):
    """Pictures to [N, 16] codes and back."""

    system = "tokenbridge"

    def __init__(
        self, config: TokenBridgeConfig | None = None, *, name: str = "tokenbridge/custom"
    ):
        super().__init__()
        self.config = config = config or TokenBridgeConfig()
        self.vae = KL16(config.vae_config, name=f"{name}#vae")
        self.quantizer = GaussianQuantizer(
            GaussianConfig(bits=config.bits, low=config.low, high=config.high)
        )
        self.spec = CodecSpec(
            name=name,
            modality="image",
            vocab=((2**config.bits,) * config.vae_config.latent_channels,),
            layout=Grid((config.grid, config.grid)),
            compose="concat",
            fit="crop",
            size=(config.image_size, config.image_size),
        )

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        name: str = "tokenbridge/custom",
        source: str = "state dict",
    ) -> TokenBridge:
        """The codec around a published KL-16 state dict, sizes inferred from its shapes.

        Args:
            config: what shapes do not say; fields of `TokenBridgeConfig`.
        """
        vae = asdict(infer_config(state_dict, source))
        codec = cls(TokenBridgeConfig(**{"vae": vae, **(config or {})}), name=name)
        load_into(codec.vae, state_dict, source=source, ignore=IGNORED)
        return codec.eval()

    def tokenize(self, pixels: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] to codes [B, N, C]; of posterior samples where `rng` is given."""
        latents = self.vae.encode_latents(2 * pixels - 1, rng=rng)
        return self.quantizer.ids(rearrange(latents, "b c h w -> b (h w) c"))

    def detokenize(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes [B, N, C] to pixels [B, 3, S, S], not clamped; `grid` is (h, w), the config's where not given."""
        h = grid[0] if grid else self.config.grid
        latents = rearrange(self.quantizer.dequantize(codes), "b (h w) c -> b c h w", h=h)
        return self.vae.decode_latents(latents.to(self.dtype)) / 2 + 0.5

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """The scaled latent value of each code of a channel, [V, 1]: the same for every channel."""
        if not 0 <= depth < self.config.vae_config.latent_channels:
            raise ValueError(f"depth is {depth}, expected one of the latent channels")
        return self.quantizer.values[:, None]

    @torch.no_grad()
    def encode(
        self,
        media: Sequence[Image],
        *,
        options: PictureOptions | None = None,
        rng: Rng | None = None,
    ) -> list[TokenStream]:
        """Pictures to streams; `rng` is used only where `TokenBridgeOptions(sample=True)` asks for samples."""
        if not media:
            return []
        fit = (options and options.fit) or self.spec.fit
        pixels, metas = fit_pictures(media, self.config.image_size, fit)
        sample = isinstance(options, TokenBridgeOptions) and options.sample
        rngs = item_rngs(rng, len(media)) if sample else None
        codes = self.tokenize(pixels.to(self.device, self.dtype), rng=rngs)
        grid = (self.config.grid, self.config.grid)
        return [self.stream(row, grid=grid, meta=meta) for row, meta in zip(codes, metas)]


def build(files: Mapping[str, Weights], entry: Entry) -> TokenBridge:
    """The codec of a registry row, or of a file that `save_codec` wrote."""
    weights = files["weights"]
    if any(key.startswith("vae.") for key in weights.tensors):
        codec = TokenBridge(TokenBridgeConfig(**entry.config), name=entry.name)
        load_into(codec, weights.tensors, source=weights.source)
    else:
        codec = TokenBridge.from_published(
            weights.tensors, entry.config, name=entry.name, source=weights.source
        )
    licences = {"code_licence": entry.code_licence, "weights_licence": entry.weights_licence}
    codec.spec = replace(codec.spec, **licences)
    return codec.eval()
