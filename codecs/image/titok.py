"""TiTok (arXiv 2406.07550, bytedance/1d-tokenizer): a picture as a short one-dimensional row of tokens.

- Encoder: a ViT over [class, patches, latent tokens]; only the latents leave it, and each becomes one code.
- Decoder: a ViT over [class, mask tokens, code vectors]; the mask tokens become patches.
- Legacy weights (L-32, B-64, S-128; One-D-Piece too) predict a softmax over 1,024 MaskGIT-VQGAN codes per patch, and
  its CNN paints them. They were trained with a reshape in place of a transpose before the encoder's last projection,
  which mixes positions and channels; weights depend on it, so it stays (`legacy`).
- Later weights project straight to pixels, transpose, and are VQ (8,192 codes) or a VAE (`TiTokVAE`).

Shapes: B batch, N latent tokens, D width, d code width, P patches, V codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ..codec import Codec, CodecSpec, Rng, item_rngs
from ..layers.attention import Block
from ..layout import Fixed, Layout
from ..published import Weights, WeightsError, load_into
from ..quantizers.vq import VectorQuantizer
from .fitting import PictureCodec
from .vqgan import PixelDecoder, VQGANConfig, infer_vqgan

if TYPE_CHECKING:
    from ..registry import Entry

HEAD_WIDTH = 64  # in every published size: 512/8, 768/12, 1024/16
NEEDED = (
    "latent_tokens",
    "encoder.patch_embed.weight",
    "encoder.positional_embedding",
    "encoder.conv_out.weight",
    "decoder.positional_embedding",
    "decoder.decoder_embed.weight",
)
PIXEL_NEEDED = ("pixel_quantize.embedding.weight", "pixel_decoder.norm_out.weight")


@dataclass(frozen=True, kw_only=True)
class TiTokConfig:
    """Sizes of a TiTok or One-D-Piece; the defaults are One-D-Piece-S-256.

    Args:
        image_size: side of the square picture.
        patch: side of a patch; picture sides are multiples.
        tokens: latent tokens.
        token_size: numbers a code.
        codes: rows of the codebook (unused by the VAE).
        normalize: compare and decode unit vectors.
        legacy: One-D-Piece and the first three TiToks: reshape, proxy codes, MaskGIT-VQGAN decoder.
        encoder, decoder: (width, layers) of the two ViTs; heads are 64 wide.
        pixels: sizes of the pixel decoder, as `VQGANConfig` has them (legacy).
    """

    image_size: int = 256
    patch: int = 16
    tokens: int = 256
    token_size: int = 12
    codes: int = 4096
    normalize: bool = True
    legacy: bool = True
    encoder: tuple[int, int] = (512, 8)
    decoder: tuple[int, int] = (512, 8)
    pixels: Mapping[str, Any] | None = None

    def __post_init__(self):
        object.__setattr__(self, "encoder", tuple(self.encoder))
        object.__setattr__(self, "decoder", tuple(self.decoder))
        if self.image_size % self.patch:
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of {self.patch}"
            )
        for width, _ in (self.encoder, self.decoder):
            if width % HEAD_WIDTH:
                raise ValueError(f"a ViT's width is {width}, expected a multiple of {HEAD_WIDTH}")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch


class _ViT(nn.Module):
    """What encoder and decoder share: embeddings, norms, blocks."""

    def __init__(self, size: tuple[int, int], patches: int, tokens: int):
        super().__init__()
        width, layers = size
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(1, width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(patches + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Block(width, width // HEAD_WIDTH) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def run(self, patches: Tensor, latents: Tensor) -> Tensor:
        """[B, P, D] and [B, N, D] to the joint sequence [class, patches, latents], [B, 1 + P + N, D]."""
        cls = repeat(self.class_embedding, "1 d -> b 1 d", b=len(patches))
        patches = torch.cat([cls, patches], dim=1) + self.positional_embedding
        latents = latents + self.latent_token_positional_embedding[: latents.shape[1]]
        x = self.ln_pre(torch.cat([patches, latents], dim=1))
        for block in self.transformer:
            x = block(x)
        return x


class TiTokEncoder(_ViT):
    """Pixels [B, 3, S, S] in [0, 1] and latent tokens [N, D] to unquantised codes [B, N, out]."""

    def __init__(self, config: TiTokConfig, out: int):
        super().__init__(config.encoder, config.grid**2, config.tokens)
        width = config.encoder[0]
        self.legacy = config.legacy
        self.patch_embed = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.conv_out = nn.Conv2d(width, out, 1)

    def forward(self, pixels: Tensor, latent_tokens: Tensor) -> Tensor:
        """Row-major patches; the latents see everything and everything sees them."""
        patches = rearrange(self.patch_embed(pixels), "b d h w -> b (h w) d")
        latents = repeat(latent_tokens, "n d -> b n d", b=len(pixels))
        x = self.ln_post(self.run(patches, latents)[:, 1 + patches.shape[1] :])
        # legacy: [B, N, D] reinterpreted, not transposed, as [B, D, N]; see the file's head
        x = x.reshape(len(x), x.shape[2], x.shape[1]) if self.legacy else x.transpose(1, 2)
        return rearrange(self.conv_out(x[..., None]), "b c n 1 -> b n c")


class TiTokDecoder(_ViT):
    """Code vectors [B, n, d], n <= N, to proxy logits [B, 1024, h, w] (legacy) or pixels [B, 3, S, S]."""

    def __init__(self, config: TiTokConfig):
        super().__init__(config.decoder, config.grid**2, config.tokens)
        width = config.decoder[0]
        self.grid, self.patch, self.legacy = config.grid, config.patch, config.legacy
        self.mask_token = nn.Parameter(width**-0.5 * torch.randn(1, 1, width))
        self.decoder_embed = nn.Linear(config.token_size, width)
        if config.legacy:
            codes = VQGANConfig(**(config.pixels or {})).codes
            self.ffn = nn.Sequential(
                nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, codes, 1)
            )
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * config.patch**2, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, vectors: Tensor) -> Tensor:
        """Missing suffix tokens are absent, not padded."""
        masks = self.mask_token.expand(len(vectors), self.grid**2, -1)
        x = self.run(masks, self.decoder_embed(vectors))[:, 1 : 1 + self.grid**2]
        x = self.ffn(rearrange(self.ln_post(x), "b (h w) d -> b d h w", h=self.grid))
        if self.legacy:
            return x
        x = rearrange(x, "b (p q c) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)
        return self.conv_out(x)


class TiTok(PictureCodec):
    """Pictures to `tokens` ids and back, with the published state-dict keys."""

    system = "titok"

    def __init__(self, config: TiTokConfig | None = None, *, name: str = "titok/custom"):
        super().__init__()
        self.config = config or TiTokConfig()
        config = self.config
        self.latent_tokens = nn.Parameter(
            config.encoder[0] ** -0.5 * torch.randn(config.tokens, config.encoder[0])
        )
        self.encoder = TiTokEncoder(config, config.token_size)
        self.decoder = TiTokDecoder(config)
        self.quantize = VectorQuantizer(config.codes, config.token_size, normalize=config.normalize)
        if config.legacy:
            pixels = VQGANConfig(**(config.pixels or {}))
            self.pixel_quantize = VectorQuantizer(pixels.codes, pixels.code_width)
            self.pixel_decoder = PixelDecoder(pixels)
        self.spec = self._spec(name)

    def _layout(self) -> Layout:
        return Fixed(self.config.tokens)

    def _spec(self, name: str) -> CodecSpec:
        return CodecSpec(
            name=name,
            modality="image",
            vocab=((self.config.codes,),),
            layout=self._layout(),
            fit="crop",
            size=(self.config.image_size, self.config.image_size),
        )

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        source: str = "state dict",
    ) -> TiTok:
        """The codec of a published state dict, sizes inferred from its shapes.

        Args:
            config: what shapes do not say; fields of `TiTokConfig`.
        """
        sizes = replace(infer_config(state_dict), **(config or {}))
        codec = cls(sizes, name=name or f"{cls.system}/custom")
        load_into(codec, state_dict, source=source)
        return codec.eval()

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] to unquantised codes [B, N, d]."""
        return self.encoder(pixels, self.latent_tokens)

    def tokenize(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] to ids [B, N]."""
        return self.quantize.ids(self.latents(pixels))

    def detokenize(self, codes: Tensor) -> Tensor:
        """Ids [B, N] to pixels [B, 3, S, S], not clamped."""
        return self.paint(self.decoder(self.quantize.vectors(codes)))

    def paint(self, prediction: Tensor) -> Tensor:
        """What the decoder gives to pixels: legacy logits through the expected proxy code and the CNN."""
        if not self.config.legacy:
            return prediction
        table = self.pixel_quantize.table
        expected = torch.einsum("bvhw,vd->bdhw", prediction.softmax(1), table)
        return self.pixel_decoder(expected)

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """The rows that the decoder receives: [V, d], normalised where the codec does."""
        return self.quantize.table


class TiTokVAE(Codec):
    """TiTok with Gaussian latents [B, N, d] in place of codes: a `LatentCodec`, without token streams."""

    system = "titok"

    def __init__(self, config: TiTokConfig, *, name: str = "titok/vae"):
        super().__init__()
        self.config = config
        self.latent_tokens = nn.Parameter(
            config.encoder[0] ** -0.5 * torch.randn(config.tokens, config.encoder[0])
        )
        self.encoder = TiTokEncoder(config, 2 * config.token_size)
        self.decoder = TiTokDecoder(config)
        self.spec = CodecSpec(
            name=name,
            modality="image",
            vocab=(),
            layout=Fixed(config.tokens),
            encodes=False,
            decodes=False,
            fit="crop",
            size=(config.image_size, config.image_size),
        )

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        name: str = "titok/vae",
        source: str = "state dict",
    ) -> TiTokVAE:
        """The model of a published state dict; a codebook in it is not used."""
        codec = cls(replace(infer_config(state_dict), **(config or {})), name=name)
        load_into(codec, state_dict, source=source, ignore=("quantize.",))
        return codec.eval()

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, S, S] in [0, 1] to mean and log variance, each [B, N, d]."""
        mean, logvar = self.encoder(pixels, self.latent_tokens).chunk(2, dim=2)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode_latents(self, x: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] to latents [B, N, d]; the mean where rng is None, else a sample."""
        mean, logvar = self.moments(x / 2 + 0.5)
        if rng is None:
            return mean
        rngs = item_rngs(rng, len(x))
        noise = torch.stack(
            [torch.randn(mean.shape[1:], generator=g, device=g.device).to(mean) for g in rngs]
        )
        return mean + (0.5 * logvar).exp() * noise

    def decode_latents(self, z: Tensor) -> Tensor:
        """Latents [B, N, d] to pixels [B, 3, S, S] in [-1, 1], not clamped."""
        return 2 * self.decoder(z) - 1


def infer_config(state: Mapping[str, Tensor]) -> TiTokConfig:
    """Sizes from the shapes of a TiTok or One-D-Piece state dict."""
    _require(state, NEEDED, "not a TiTok or One-D-Piece")
    legacy = "decoder.ffn.2.weight" in state
    if legacy:
        _require(state, PIXEL_NEEDED, "a stage-1 checkpoint; join it with `with_pixels` first")
    patch = state["encoder.patch_embed.weight"].shape[-1]
    side = round((len(state["encoder.positional_embedding"]) - 1) ** 0.5)
    codebook = state.get("quantize.embedding.weight")
    pixels = infer_vqgan(state, "pixel_decoder.", "pixel_quantize.") if legacy else None
    return TiTokConfig(
        image_size=side * patch,
        patch=patch,
        tokens=len(state["latent_tokens"]),
        token_size=state["decoder.decoder_embed.weight"].shape[1],
        codes=1 if codebook is None else len(codebook),
        normalize=legacy,
        legacy=legacy,
        encoder=_vit_size(state, "encoder."),
        decoder=_vit_size(state, "decoder."),
        pixels=asdict(pixels) if pixels else None,
    )


def with_pixels(state: Mapping[str, Tensor], vqgan: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stage-1 state dict joined with a MaskGIT-VQGAN's decoder and codebook, as the published scripts do."""
    pixels = {f"pixel_{k}": v for k, v in vqgan.items() if not k.startswith("encoder.")}
    return {**state, **pixels}


def build(files: Mapping[str, Weights], entry: Entry) -> TiTok | TiTokVAE:
    """The codec of a registry row, or of a file that `save_codec` wrote."""
    weights = files["weights"]
    state = weights.tensors
    _require(state, NEEDED, f"{weights.source}: not a TiTok")
    rows = state["encoder.conv_out.weight"].shape[0]
    gaussian = rows == 2 * state["decoder.decoder_embed.weight"].shape[1]
    kind = TiTokVAE if gaussian else TiTok
    codec = kind.from_published(state, entry.config, name=entry.name, source=weights.source)
    codec.spec = replace(
        codec.spec, code_licence=entry.code_licence, weights_licence=entry.weights_licence
    )
    return codec


def _require(state: Mapping[str, Tensor], keys: Sequence[str], what: str) -> None:
    missing = [key for key in keys if key not in state]
    if missing:
        raise WeightsError(f"{what}: {', '.join(missing)} missing")


def _vit_size(state: Mapping[str, Tensor], prefix: str) -> tuple[int, int]:
    """(width, layers) of the ViT below `prefix`."""
    start = f"{prefix}transformer."
    layers = {k.removeprefix(start).split(".")[0] for k in state if k.startswith(start)}
    return state[f"{prefix}positional_embedding"].shape[1], len(layers)
