"""C-ViViT: a film clip as frames of tokens, causal in time (Phenaki, arXiv 2210.02399).

The first frame is cut into patches, the others into tubes of `temporal_patch` frames; each latent frame goes through a
spatial transformer, each place through a temporal one, and every vector becomes one code. The decoder mirrors it. So a
picture is a clip of one frame, and a causal layout codes a film of any length as its frames arrive.

One config, three published layouts:

- the paper's (Table 6): plain linear embeddings, causal, cosine VQ with 32 numbers a code. Its positions are not
  written out as far as we know; we take ALiBi in time and the continuous bias in space (`paper()`).
- lucidrains/phenaki-pytorch: LayerNorms around the embedding, LFQ or cosine VQ, PEG (a depthwise 3x3x3 convolution) in
  the temporal transformers. Its PEG reads [(B h w), T, D] memory as [B, T, h, w, D], which mixes time with space, so
  it is not causal: `temporal_peg="published"` does the same, "repaired" does what was meant.
- obvious-research/phenaki-cvivit, the only public trained weights: PEG everywhere, attention in time both ways.

Sizes. Frames are fitted to `size` (`fit`) and thinned to `fps`; `meta` keeps the source's size, rate and length, and
decoding goes back to them (thinned frames are held, cropped margins stay lost). A length that is not one more than a
multiple of `temporal_patch` is filled up with its last frame; decoding cuts the filling off.

Sound is not in this stream: an audio codec makes a second stream of `video.audio`, which an interleaved document
carries beside this one. `meta["sound"]` says that the source had a track, so nothing is lost unnoticed.

Letters: B batch, F frames, T latent frames, h w patches, D width, N heads, S positions, C H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from ...modalities.image import Image
from ...modalities.video import Video
from ..codec import Codec, CodecSpec, CodecUnavailable, Rng
from ..layout import Frames
from ..published import Weights, WeightsError, load_into
from ..quantizers.binary import LFQ, BinaryConfig
from ..registry import Entry
from ..stream import TokenStream
from .frames import Timing, fit_frames, to_bytes
from .streaming import DecoderStream, EncoderStream, restore

LOGIT_SCALE = 8.0  # queries and keys are unit vectors; a fixed 8 takes the place of 1/sqrt(width)
# Losses and teachers that training checkpoints carry.
LOSSES = ("loss_fn_lpips.", "i3d.", "discr.", "vgg.")


@dataclass(frozen=True, kw_only=True)
class CViViTConfig:
    """One C-ViViT.

    Args:
        size: height and width of a frame, in pixels.
        patch: height and width of a patch.
        temporal_patch: frames in a tube.
        dim, heads, head_dim: of all transformers; the gated feed-forward is 8/3 `dim` wide.
        encoder_depth, decoder_depth: spatial and temporal layers.
        quantizer: "lfq" (codes are signs), or "vq" (cosine similarity).
        codebook_size: V; a power of two for "lfq".
        codebook_dim: numbers a code for "vq"; `dim` means no projection. "lfq" has log2(V).
        embed_norm: LayerNorms around the patch embeddings (published code); they take a patch's brightness away.
        causal: attention in time looks back only, with ALiBi.
        spatial_peg: PEG in the spatial transformers too (obvious-research).
        temporal_peg: PEG in the temporal transformers, as published (not causal), or repaired.
        temporal_window: latent frames that attention looks back on, itself included (ours); None for all.
        fps: frames a second that the codec works at.
        fit: how a source of another size is fitted: "resize", "crop" (as published) or "pad".
    """

    size: tuple[int, int]
    patch: tuple[int, int]
    temporal_patch: int
    dim: int
    heads: int
    head_dim: int
    encoder_depth: tuple[int, int]
    decoder_depth: tuple[int, int]
    quantizer: Literal["lfq", "vq"]
    codebook_size: int
    codebook_dim: int = 0
    embed_norm: bool = True
    causal: bool = True
    spatial_peg: bool = False
    temporal_peg: Literal["none", "published", "repaired"] = "repaired"
    temporal_window: int | None = None
    fps: float = 8.0
    fit: Literal["resize", "crop", "pad"] = "crop"

    def __post_init__(self):
        for name in ("size", "patch", "encoder_depth", "decoder_depth"):  # lists, where from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if any(n % p for n, p in zip(self.size, self.patch)):
            raise ValueError(f"size is {self.size}, expected multiples of the patch {self.patch}")
        if self.quantizer == "lfq":
            if self.codebook_size & (self.codebook_size - 1):
                raise ValueError(f"codebook_size is {self.codebook_size}, LFQ needs a power of two")
            object.__setattr__(self, "codebook_dim", self.codebook_size.bit_length() - 1)
        elif not self.codebook_dim:
            object.__setattr__(self, "codebook_dim", self.dim)
        if self.temporal_window is not None and not self.streams:
            raise ValueError(
                "temporal_window needs a causal layout: causal, and PEG not as published"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (h, w) of a frame."""
        return self.size[0] // self.patch[0], self.size[1] // self.patch[1]

    @property
    def streams(self) -> bool:
        """Whether a latent frame depends on earlier ones alone."""
        return self.causal and self.temporal_peg != "published" and not self.spatial_peg


def paper() -> CViViTConfig:
    """The sizes of Phenaki's Table 6: 11x128x128 to 6x16x16 tokens."""
    return CViViTConfig(
        size=(128, 128),
        patch=(8, 8),
        temporal_patch=2,
        dim=512,
        heads=8,
        head_dim=64,
        encoder_depth=(4, 4),
        decoder_depth=(4, 4),
        quantizer="vq",
        codebook_size=8192,
        codebook_dim=32,
        embed_norm=False,
        temporal_peg="none",
    )


@dataclass(frozen=True, kw_only=True)
class CViViTOptions:
    """What a caller may choose.

    Args:
        fit: encode: instead of the config's.
        resample: encode: thin (or repeat) frames to the codec's rate; False codes every frame.
        restore: decode: back to the source's size and rate; False gives the codec's own.
    """

    fit: Literal["resize", "crop", "pad"] | None = None
    resample: bool = True
    restore: bool = True


@dataclass
class State:
    """What is remembered between chunks of one clip.

    Attributes:
        frames: latent frames that went through.
        layers: of the temporal transformer.
    """

    layers: list[LayerState]
    frames: int = 0


class CViViT(Codec):
    """The codec. Pixels are in 0...1 on the way in; `detokenize` is unbounded, `decode` clamps.

    Encode in float32: in bfloat16 the mini's nearest code is another one for 14 % of drawn and 52 % of filmed tubes,
    which costs up to 4 dB. Decoding bears half precision.
    """

    system = "cvivit"
    config: CViViTConfig

    def __init__(
        self,
        config: CViViTConfig,
        *,
        name: str = "cvivit/custom",
        code_licence: str = "Apache-2.0",
        weights_licence: str = "Apache-2.0",
    ):
        super().__init__()
        self.config = c = config
        self.to_patch_emb_first_frame = _embedding(c, 1)
        self.to_patch_emb = _embedding(c, c.temporal_patch)
        self.spatial_rel_pos_bias = PositionBias(c.dim, c.heads)
        self.enc_spatial_transformer = SpatialTransformer(c, c.encoder_depth[0])
        self.enc_temporal_transformer = TemporalTransformer(c, c.encoder_depth[1])
        self.vq = _quantizer(c)
        self.dec_temporal_transformer = TemporalTransformer(c, c.decoder_depth[1])
        self.dec_spatial_transformer = SpatialTransformer(c, c.decoder_depth[0])
        self.to_pixels_first_frame = _pixels(c, 1)
        self.to_pixels = _pixels(c, c.temporal_patch)
        h, w = c.grid
        self.spec = CodecSpec(
            name=name,
            modality="video",
            vocab=((c.codebook_size,),),
            layout=Frames(shape=(h, w)),
            prefix_step=h * w if c.streams else None,
            streaming=c.streams,
            fit=c.fit,
            rate=c.fps / c.temporal_patch * h * w,
            size=c.size,
            code_licence=code_licence,
            weights_licence=weights_licence,
        )

    # Media and streams.

    @torch.no_grad()
    def encode(
        self,
        media: Sequence[Video | Image],
        *,
        options: CViViTOptions | None = None,
        rng: Rng | None = None,
    ) -> list[TokenStream]:
        """Films (or pictures, as films of one frame) to streams with the grid [T, h, w]. Nothing is drawn at random."""
        options = options or CViViTOptions()
        return [self._encode_one(medium, options) for medium in media]

    @torch.no_grad()
    def decode(
        self,
        streams: Sequence[TokenStream],
        *,
        options: CViViTOptions | None = None,
        rng: Rng | None = None,
    ) -> list[Video | Image]:
        """Streams to silent films (pictures where a picture was encoded); see the module on size, rate and sound."""
        options = options or CViViTOptions()
        return [self._decode_one(stream, options) for stream in streams]

    def _encode_one(self, medium: Video | Image, options: CViViTOptions) -> TokenStream:
        still = isinstance(medium, Image)
        frames = to_bytes(medium.pixels)[None] if still else medium.frames
        fps = self.config.fps if still else float(medium.fps)
        if not len(frames):
            raise ValueError("the video has no frames, expected at least one")
        timing, fit = self.timing(fps, options), self.fit(options)
        picks = [timing.source(j) for j in range(timing.count(len(frames)))]
        x = fit_frames(frames[picks], self.config.size, fit)
        missing = self.frames_missing(len(x), first=True)
        x = torch.cat([x, x[-1:].expand(missing, -1, -1, -1)])
        codes = self.tokenize(x[None].to(self.device, self.dtype))[0]
        size = (frames.shape[-2], frames.shape[-1])
        meta = self.meta(len(frames), size, fps, timing, fit)
        if still:
            meta["still"] = True
        elif medium.audio is not None:
            meta["sound"] = True
        return self.stream(codes.flatten(), grid=tuple(codes.shape), meta=meta)

    def _decode_one(self, stream: TokenStream, options: CViViTOptions) -> Video | Image:
        self.check(stream)
        t, h, _ = stream.grid
        codes = rearrange(stream.codes, "(t h w) 1 -> 1 t h w", t=t, h=h).to(self.device)
        frames = self.detokenize(codes)[0].float().cpu()
        video = restore(self, frames, stream.meta, options)
        if stream.meta.get("still"):
            return Image(pixels=video.frames[0].float() / 255)
        return video

    def encoder_stream(self, *, options: CViViTOptions | None = None) -> EncoderStream:
        """Encode a film as its frames arrive; the chunks add up to what `encode` gives."""
        self._needs_streaming()
        return EncoderStream(self, options or CViViTOptions())

    def decoder_stream(self, *, options: CViViTOptions | None = None) -> DecoderStream:
        """Decode chunks as they arrive."""
        self._needs_streaming()
        return DecoderStream(self, options or CViViTOptions())

    def _needs_streaming(self) -> None:
        if not self.spec.streaming:
            raise CodecUnavailable(
                f"'{self.spec.name}' looks ahead in time (its attention or its published PEG), so it cannot stream; "
                "encode the whole clip"
            )

    def fit(self, options: CViViTOptions) -> str:
        """How a source is fitted."""
        return options.fit or self.config.fit

    def timing(self, fps: float, options: CViViTOptions) -> Timing:
        """Which frames of a source are coded."""
        return Timing.between(fps, self.config.fps if options.resample else max(fps, 1e-9))

    def meta(
        self, length: int, size: tuple[int, int], fps: float, timing: Timing, fit: str
    ) -> dict[str, object]:
        """What decoding needs to go back to a source of `length` frames."""
        meta: dict[str, object] = {"length": length, "size": list(size), "fps": fps, "fit": fit}
        if timing.every != 1:
            meta["every"] = timing.every
        return meta

    def frames_missing(self, n: int, *, first: bool) -> int:
        """Frames to add to n, so that they fill latent frames; `first`: the clip begins with them."""
        return -(n - 1 if first else n) % self.config.temporal_patch

    @property
    def bytes_per_latent_frame(self) -> int:
        """What a temporal cache of float32 grows by, encoder and decoder together, without a window."""
        c = self.config
        layers = c.encoder_depth[1] + c.decoder_depth[1]
        return layers * math.prod(c.grid) * c.heads * c.head_dim * 2 * 4

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """What the decoder receives for each code: [V, D]."""
        return self.vq.lookup(torch.arange(self.config.codebook_size, device=self.device))

    # Tensors.

    @torch.no_grad()
    def tokenize(self, x: Tensor) -> Tensor:
        """Pixels [B, F, C, H, W] in 0...1, (F - 1) % temporal_patch == 0, to codes [B, T, h, w]."""
        state = self.encoder_state() if self.config.temporal_window else None
        return self.encode_chunk(x, state)

    @torch.no_grad()
    def detokenize(self, codes: Tensor) -> Tensor:
        """Codes [B, T, h, w] to pixels [B, F, C, H, W], unbounded."""
        state = self.decoder_state() if self.config.temporal_window else None
        return self.decode_chunk(codes, state)

    def encoder_state(self) -> State:
        """The state before the first frame."""
        return State([LayerState() for _ in range(self.config.encoder_depth[1])])

    def decoder_state(self) -> State:
        """The state before the first code."""
        return State([LayerState() for _ in range(self.config.decoder_depth[1])])

    @torch.no_grad()
    def encode_chunk(self, x: Tensor, state: State | None) -> Tensor:
        """The next pixels [B, F, C, H, W] of a clip to codes [B, T, h, w]; updates `state`.

        With a window latent frames go through one by one: whole clips and arriving pieces are then the same sums.
        """
        x = x.to(self.device, self.dtype)
        if self.config.temporal_window is None or state is None:
            return self.vq(self.encode_latents(x, state))[1]
        tube = self.config.temporal_patch
        sizes = [tube] * (x.shape[1] // tube)
        if state.frames == 0:
            sizes = [1, *sizes] if x.shape[1] % tube == 1 or tube == 1 else sizes
            sizes = sizes[: 1 + (x.shape[1] - 1) // tube]
        self._check_frames(x, state)
        return torch.cat([self.vq(self.encode_latents(p, state))[1] for p in x.split(sizes, 1)], 1)

    @torch.no_grad()
    def decode_chunk(self, codes: Tensor, state: State | None) -> Tensor:
        """The next codes [B, T, h, w] of a clip to pixels [B, F, C, H, W]; updates `state`."""
        step = codes.shape[1] if self.config.temporal_window is None or state is None else 1
        pieces = [self.decode_latents(self.vq.lookup(c), state) for c in codes.split(step, 1)]
        return torch.cat(pieces, 1)

    def encode_latents(self, x: Tensor, state: State | None = None) -> Tensor:
        """Pixels [B, F, C, H, W] to vectors [B, T, h, w, D] before the quantiser."""
        self._check_frames(x, state)
        z = self.embed(x, first=state is None or state.frames == 0)
        z = self.enc_spatial_transformer(z, self._bias(z))
        if state is not None:
            state.frames += z.shape[1]
        return self.enc_temporal_transformer(z, state and state.layers)

    def decode_latents(self, z: Tensor, state: State | None = None) -> Tensor:
        """Quantised vectors [B, T, h, w, D] to pixels [B, F, C, H, W]."""
        first = state is None or state.frames == 0
        if state is not None:
            state.frames += z.shape[1]
        z = self.dec_temporal_transformer(z, state and state.layers)
        z = self.dec_spatial_transformer(z, self._bias(z))
        if not first:
            return self.to_pixels(z)
        head = self.to_pixels_first_frame(z[:, :1])
        return torch.cat([head, self.to_pixels(z[:, 1:])], 1) if z.shape[1] > 1 else head

    def embed(self, x: Tensor, *, first: bool) -> Tensor:
        """Pixels [B, F, C, H, W] to embedded patches [B, T, h, w, D]; `first`: frame 0 stands alone."""
        if not first:
            return self.to_patch_emb(x)
        head = self.to_patch_emb_first_frame(x[:, :1])
        return torch.cat([head, self.to_patch_emb(x[:, 1:])], 1) if x.shape[1] > 1 else head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For training: pixels [B, F, C, H, W] to their reconstruction, codes [B, T, h, w], and what the quantiser's
        loss reads (see `vq`); attention sees whole clips under a mask, where inference goes step by step."""
        quantised, codes, inner = self.vq(self.encode_latents(x))
        return self.decode_latents(quantised), codes, inner

    def _bias(self, z: Tensor) -> Tensor:
        return self.spatial_rel_pos_bias(z.shape[2], z.shape[3])

    def _check_frames(self, x: Tensor, state: State | None) -> None:
        c = self.config
        first = state is None or state.frames == 0
        if x.ndim != 5 or x.shape[1] == 0 or any(n % p for n, p in zip(x.shape[3:], c.patch)):
            raise ValueError(
                f"pixels are {tuple(x.shape)}, expected [B, F, C, H, W], H and W multiples of {c.patch}"
            )
        if self.frames_missing(x.shape[1], first=first):
            rule = (
                f"1 + a multiple of {c.temporal_patch}"
                if first
                else f"a multiple of {c.temporal_patch}"
            )
            raise ValueError(
                f"{x.shape[1]} frames, expected {rule}; repeat the last one to fill up"
            )


@dataclass
class LayerState:
    """One temporal layer's memory: PEG's last two inputs [B, 2, h, w, D]; keys and values [B h w, N, S, d]."""

    tail: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Append, and return all that the new positions see."""
        if self.keys is not None:
            keys = torch.cat([self.keys, keys], 2)
            values = torch.cat([self.values, values], 2)
        keep = 0 if window is None else max(0, keys.shape[2] - window)
        self.keys, self.values = keys[:, :, keep:].clone(), values[:, :, keep:].clone()
        return keys, values


class SpatialTransformer(nn.Module):
    """Attention among the patches of each frame, with an additive bias. Keys: `layers.L.{0 PEG, 1, 3}`, `norm_out`."""

    def __init__(self, c: CViViTConfig, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(_layer(c, c.spatial_peg, "repaired") for _ in range(depth))
        self.norm_out = Norm(c.dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[B, T, h, w, D] to the same, `bias` [N, h w, h w]."""
        b, h = x.shape[0], x.shape[2]
        for layer in self.layers:
            if "0" in layer:
                x = x + layer["0"](x)
            flat = rearrange(x, "b t h w d -> (b t) (h w) d")
            flat = flat + layer["1"](flat, bias)
            flat = flat + layer["3"](flat)
            x = rearrange(flat, "(b t) (h w) d -> b t h w d", b=b, h=h)
        return self.norm_out(x)


class TemporalTransformer(nn.Module):
    """Attention along time at each place: causal with ALiBi, or both ways without a bias."""

    def __init__(self, c: CViViTConfig, depth: int):
        super().__init__()
        peg = c.temporal_peg != "none"
        self.layers = nn.ModuleList(_layer(c, peg, c.temporal_peg) for _ in range(depth))
        self.norm_out = Norm(c.dim)
        self.causal, self.window = c.causal, c.temporal_window
        self.register_buffer("slopes", alibi_slopes(c.heads), persistent=False)

    def forward(self, x: Tensor, states: list[LayerState] | None = None) -> Tensor:
        """[B, T, h, w, D] to the same; `states` hold what came before, and are updated."""
        b, t, h = x.shape[:3]
        past = 0
        if states and states[0].keys is not None:
            past = states[0].keys.shape[2]
        bias = self._bias(t, past).to(x.dtype) if self.causal else None
        for i, layer in enumerate(self.layers):
            state = states[i] if states else None
            if "0" in layer:
                x = x + layer["0"](x, state)
            flat = rearrange(x, "b t h w d -> (b h w) t d")
            flat = flat + layer["1"](flat, bias, state, self.window)
            flat = flat + layer["3"](flat)
            x = rearrange(flat, "(b h w) t d -> b t h w d", b=b, h=h)
        return self.norm_out(x)

    def _bias(self, t: int, past: int) -> Tensor:
        """ALiBi and the causal mask for t positions after `past` others: [N, t, past + t]."""
        device = self.slopes.device
        ago = torch.arange(past, past + t, device=device)[:, None] - torch.arange(
            past + t, device=device
        )
        hidden = ago < 0
        if self.window is not None:
            hidden |= ago >= self.window
        return (-ago * self.slopes[:, None, None]).masked_fill(hidden, -math.inf)


class Attention(nn.Module):
    """Unit queries and keys, each width scaled by a learned number; only the query's input is normalised."""

    def __init__(self, c: CViViTConfig):
        super().__init__()
        inner = c.heads * c.head_dim
        self.heads = c.heads
        self.norm = Norm(c.dim)
        self.to_q = nn.Linear(c.dim, inner, bias=False)
        self.to_kv = nn.Linear(c.dim, 2 * inner, bias=False)
        self.q_scale = nn.Parameter(torch.ones(c.head_dim))
        self.k_scale = nn.Parameter(torch.ones(c.head_dim))
        self.to_out = nn.Linear(inner, c.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        state: LayerState | None = None,
        window: int | None = None,
    ) -> Tensor:
        """[R, S, D] to the same, R rows that do not see each other; `bias` [N, S, keys]."""
        q = rearrange(self.to_q(self.norm(x)), "r s (n d) -> r n s d", n=self.heads)
        k, v = rearrange(self.to_kv(x), "r s (kv n d) -> kv r n s d", kv=2, n=self.heads)
        q = F.normalize(q, dim=-1) * self.q_scale
        k = F.normalize(k, dim=-1) * self.k_scale
        if state is not None:
            k, v = state.extend(k, v, window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=LOGIT_SCALE)
        return self.to_out(rearrange(y, "r n s d -> r s (n d)"))


class PEG(nn.Module):
    """Position from a depthwise 3x3x3 convolution that looks back in time (two zero frames in front).

    As published the temporal one reads rows that are ordered (B h w) T as if they were B T h w.
    """

    def __init__(self, dim: int, order: str):
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)
        self.scrambled = order == "published"

    def forward(self, x: Tensor, state: LayerState | None = None) -> Tensor:
        """[B, T, h, w, D] to the same."""
        if not self.scrambled:
            return self._convolve(x, state)
        b, h = x.shape[0], x.shape[2]
        rows = rearrange(x, "b t h w d -> (b h w) t d").contiguous()
        mixed = self._convolve(rows.reshape(x.shape), None)
        return rearrange(mixed.reshape(rows.shape), "(b h w) t d -> b t h w d", b=b, h=h)

    def _convolve(self, x: Tensor, state: LayerState | None) -> Tensor:
        """Three depthwise 3x3 convolutions, one a time step: on a CPU their gradient is 2 to 6 times as fast."""
        b, t, h, w, d = x.shape
        tail = x.new_zeros(b, 2, h, w, d) if state is None or state.tail is None else state.tail
        x = torch.cat([tail, x], 1)
        if state is not None:
            state.tail = x[:, -2:].clone()
        y = 0
        for step in range(3):
            frames = rearrange(x[:, step : step + t], "b t h w d -> (b t) d h w")
            y = y + F.conv2d(frames, self.dsconv.weight[:, :, step], padding=1, groups=d)
        return rearrange(y, "(b t) d h w -> b t h w d", b=b) + self.dsconv.bias


class PositionBias(nn.Module):
    """A bias for each pair of patches, from the log of their distance, by a small network; any grid goes."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.net = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(2, dim), nn.LeakyReLU(0.1)),
                nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(0.1)),
                nn.Linear(dim, heads),
            ]
        )

    def forward(self, h: int, w: int) -> Tensor:
        """[N, h w, h w]."""
        weight = self.net[2].weight
        dy, dx = torch.meshgrid(
            *(torch.arange(1 - n, n, device=weight.device, dtype=weight.dtype) for n in (h, w)),
            indexing="ij",
        )
        x = torch.stack([dy, dx], -1)
        x = x.sign() * x.abs().log1p()
        for part in self.net:
            x = part(x)
        # One row an offset; gathering beats running the network on all (h w)^2 pairs.
        y, z = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
        rows = rearrange(y[:, None] - y + h - 1, "a b -> a 1 b 1")
        columns = rearrange(z[:, None] - z + w - 1, "a b -> 1 a 1 b")
        return rearrange(x[rows, columns], "a b c d n -> n (a b) (c d)")


class CosineVQ(nn.Module):
    """The code whose direction is nearest, of unit length; factorised where `code_dim` is below `dim` (ViT-VQGAN)."""

    def __init__(self, dim: int, size: int, code_dim: int):
        super().__init__()
        same = dim == code_dim
        self.project_in = nn.Identity() if same else nn.Linear(dim, code_dim)
        self.project_out = nn.Identity() if same else nn.Linear(code_dim, dim)
        table = nn.init.normal_(torch.empty(1, size, code_dim))
        self._codebook = nn.ParameterDict({"embed": F.normalize(table, dim=-1)})

    @property
    def table(self) -> Tensor:
        """Unit codes [V, d]."""
        return F.normalize(self._codebook["embed"][0].float(), dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., D] to quantised [..., D] (gradient straight through), ids [...], and unit vectors [..., d]."""
        z = F.normalize(self.project_in(x).float(), dim=-1)
        ids = self._nearest(z.detach())
        code = self.table[ids]
        if z.requires_grad:
            code = z + (code - z).detach()
        return self.project_out(code.to(x.dtype)), ids, z

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids [...] to what the decoder receives, [..., D]."""
        return self.project_out(self.table[ids].to(self._codebook["embed"].dtype))

    def loss(self, z: Tensor, ids: Tensor, commitment: float) -> Tensor:
        """Codes move to vectors, and vectors, `commitment` times as hard, to codes (beta, 0.25 in the paper)."""
        code = self.table[ids]
        return F.mse_loss(code, z.detach()) + commitment * F.mse_loss(z, code.detach())

    def _nearest(self, z: Tensor) -> Tensor:
        table = self.table.detach().T
        rows = z.reshape(-1, z.shape[-1]).split(max(1, 2**24 // table.shape[1]))
        return torch.cat([(piece @ table).argmax(-1) for piece in rows]).reshape(z.shape[:-1])


class Norm(nn.Module):
    """LayerNorm with a scale alone; the published files keep a `beta` of zeros."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class GEGLU(nn.Module):
    """Half of the numbers, gated by the GELU of the other half."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 F] to [..., F]."""
        x, gate = x.chunk(2, -1)
        return F.gelu(gate) * x


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes (arXiv 2108.12409): 2^(-8 k / N), interleaved with those of 2 N where N is no power of two."""
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    between = [2 ** (-8 * k / (2 * power)) for k in range(1, 2 * power + 1, 2)]
    return torch.tensor(slopes + between[: heads - power])


def from_published(
    state_dict: Mapping[str, Tensor], config: Mapping[str, object] | None = None
) -> CViViT:
    """A C-ViViT from the state dict of lucidrains/phenaki-pytorch or obvious-research/phenaki-cvivit.

    Args:
        state_dict: `CViViT.state_dict()`, or the `pytorch_model.bin` of `accelerate.save_state` (the keys of losses
            and teachers are ignored).
        config: fields of `CViViTConfig` that shapes do not tell: `size`, and where they are not the defaults `fps`,
            `fit`, `temporal_peg` ("published" is the default; "repaired" mends it).
    """
    tensors = _inference_tensors(state_dict)
    built = CViViT(infer_config(tensors, config or {}))
    load_into(built, tensors, source="C-ViViT state dict", ignore=LOSSES)
    return built.eval()


def infer_config(
    tensors: Mapping[str, Tensor], given: Mapping[str, object] | None = None
) -> CViViTConfig:
    """The config that the shapes of published tensors tell, `given` where they do not (or instead)."""
    try:
        return CViViTConfig(**{**_told(tensors), **(given or {})})
    except KeyError as error:
        raise WeightsError(f"C-ViViT state dict: no key {error}") from error
    except TypeError as error:
        raise WeightsError(
            f"C-ViViT state dict: {error}; give `size`, which shapes do not tell, as {{'size': (128, 128)}}"
        ) from error


def _told(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    dim, still = tensors["to_patch_emb_first_frame.2.weight"].shape
    tube = tensors["to_patch_emb.2.weight"].shape[1]
    head_dim = len(tensors["enc_spatial_transformer.layers.0.1.q_scale"])
    patch = math.isqrt(still // 3)
    spatial_peg = "enc_spatial_transformer.layers.0.0.dsconv.weight" in tensors
    peg = "enc_temporal_transformer.layers.0.0.dsconv.weight" in tensors
    told = {
        "patch": (patch, patch),
        "temporal_patch": tube // still,
        "dim": dim,
        "heads": len(tensors["enc_spatial_transformer.layers.0.1.to_q.weight"]) // head_dim,
        "head_dim": head_dim,
        "encoder_depth": _depths(tensors, "enc"),
        "decoder_depth": _depths(tensors, "dec"),
        "embed_norm": "to_patch_emb.1.weight" in tensors,
        "causal": not spatial_peg,  # obvious-research's layout, known by its PEG in space
        "spatial_peg": spatial_peg,
        "temporal_peg": "published" if peg else "none",
    }
    if "vq._codebook.embed" in tensors:
        _, size, code_dim = tensors["vq._codebook.embed"].shape
        return {**told, "quantizer": "vq", "codebook_size": size, "codebook_dim": code_dim}
    bits = len(tensors["vq.project_in.weight"]) if "vq.project_in.weight" in tensors else dim
    return {**told, "quantizer": "lfq", "codebook_size": 2**bits}


def _depths(tensors: Mapping[str, Tensor], side: str) -> tuple[int, int]:
    def depth(kind: str) -> int:
        prefix = f"{side}_{kind}_transformer.layers."
        return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in tensors if k.startswith(prefix))

    return depth("spatial"), depth("temporal")


def _inference_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what only training, or a kind of layer that C-ViViT does not use, reads."""
    averages = ("vq._codebook.initted", "vq._codebook.cluster_size", "vq._codebook.embed_avg")
    return {
        key: value
        for key, value in state_dict.items()
        if key not in (*averages, "vq.mask")
        and ".context_norm." not in key
        and not (key.endswith(".null_kv") and value.numel() == 0)
    }


def build(files: Mapping[str, Weights], entry: Entry) -> CViViT:
    """For the registry: our own files carry the whole config, published ones need what their row says."""
    weights = files["weights"]
    tensors = weights.tensors
    if weights.config:
        config = CViViTConfig(**entry.config)
    else:
        tensors = _inference_tensors(tensors)
        config = infer_config(tensors, entry.config)
    codec = CViViT(
        config,
        name=entry.name,
        code_licence=entry.code_licence,
        weights_licence=entry.weights_licence,
    )
    load_into(codec, tensors, source=weights.source, ignore=LOSSES)
    return codec


def _layer(c: CViViTConfig, peg: bool, order: str) -> nn.ModuleDict:
    """PEG, attention and feed-forward under the published numbers (2 would be cross-attention)."""
    inner = int(c.dim * 8 / 3)
    parts = {
        "1": Attention(c),
        "3": nn.Sequential(
            nn.LayerNorm(c.dim),
            nn.Linear(c.dim, 2 * inner, bias=False),
            GEGLU(),
            nn.Identity(),  # dropout, in the published numbering
            nn.Linear(inner, c.dim, bias=False),
        ),
    }
    return nn.ModuleDict({"0": PEG(c.dim, order), **parts} if peg else parts)


def _embedding(c: CViViTConfig, frames: int) -> nn.Sequential:
    """[B, F, C, H, W] to [B, T, h, w, D]; inside a patch channels run slowest, then frames, rows, columns."""
    p1, p2 = c.patch
    width = 3 * frames * p1 * p2
    norms = (nn.LayerNorm(width), nn.LayerNorm(c.dim)) if c.embed_norm else (nn.Identity(),) * 2
    cut = "b (t pt) c (h p1) (w p2) -> b t h w (c pt p1 p2)"
    return nn.Sequential(
        Rearrange(cut, pt=frames, p1=p1, p2=p2), norms[0], nn.Linear(width, c.dim), norms[1]
    )


def _pixels(c: CViViTConfig, frames: int) -> nn.Sequential:
    """[B, T, h, w, D] to [B, F, C, H, W]."""
    p1, p2 = c.patch
    join = "b t h w (c pt p1 p2) -> b (t pt) c (h p1) (w p2)"
    return nn.Sequential(
        nn.Linear(c.dim, 3 * frames * p1 * p2), Rearrange(join, pt=frames, p1=p1, p2=p2)
    )


def _quantizer(c: CViViTConfig) -> LFQ | CosineVQ:
    if c.quantizer == "lfq":
        return LFQ(c.dim, BinaryConfig(bits=c.codebook_dim))
    return CosineVQ(c.dim, c.codebook_size, c.codebook_dim)
