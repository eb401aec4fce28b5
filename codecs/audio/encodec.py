"""EnCodec: a SEANet autoencoder with an LSTM and plain residual VQ (Défossez et al., arXiv 2210.13438).

    samples [B, C, L] ─ SEANet encoder ─▶ [B, D, T] ─ N codebooks, Euclidean ─▶ codes [B, N, T]
    codes [B, n, T] ─ Σ ─▶ [B, D, T] ─ SEANet decoder ─▶ [B, C, T · hop]

- 24 kHz: mono, causal, reflected padding; 32 kHz (MusicGen, audiocraft): mono, centred, zeros. Both weight-normed.
- 48 kHz: stereo, centred, group norm over time; so it codes pieces of 1 s, 1 % overlapping, each scaled in loudness.
- The 48 kHz model's loudnesses are side tensor `scale` [pieces]; decoding adds the pieces with triangular weights.
  A sound that is not stereo is mixed to one channel and coded as two equal ones; decoding gives one channel back.
- A bandwidth in kbit/s is a depth: `depth_of(6.0)`. The weights that Meta published with audiocraft are CC BY-NC.
- Mono models code what is longer than a window piecewise: convolutions in overlapping windows, the LSTM's state
  carried on.

Letters: B batch, C channels, L samples, D latent width, T frames, N codebooks.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ...modalities.audio import Audio
from ..codec import Codec, CodecSpec, Rng
from ..layers.conv import fuse_weight_norm
from ..layout import Frames
from ..published import Weights, WeightsError, load_into
from ..quantizers.rvq import EuclideanRVQ
from ..stream import StreamError, TokenStream
from .waveform import (
    AudioOptions,
    DecoderStream,
    EncoderStream,
    channels_of,
    checked,
    deinterleave,
    interleave,
    rows_of,
    source_meta,
    source_sound,
)
from .windows import Chained, Windowed

if TYPE_CHECKING:
    from ..registry import Entry


@dataclass(frozen=True, kw_only=True)
class EncodecConfig:
    """Sizes and paddings of an EnCodec; `infer_config` reads the sizes off the weights.

    Args:
        ratios: strides of the decoder, in its order; the encoder's are these reversed.
        width: channels after the first convolution.
        causal: pad on the left only.
        padding: what is padded with.
        group_norm: group norm after every convolution (else the weights are normalised, which we fuse).
        shortcut: residual blocks have a convolution in their skip connection.
        segment: seconds of a piece; None codes a sound whole.
        overlap: share of a piece that the next one covers again.
        normalize: scale each piece to its loudness.
    """

    sample_rate: int = 24_000
    channels: int = 1
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    width: int = 32
    latent_dim: int = 128
    codebooks: int = 32
    codebook_size: int = 1024
    causal: bool = True
    padding: Literal["reflect", "constant"] = "reflect"
    group_norm: bool = False
    shortcut: bool = True
    segment: float | None = None
    overlap: float = 0.01
    normalize: bool = False

    def __post_init__(self):
        object.__setattr__(self, "ratios", tuple(self.ratios))
        if self.padding not in ("reflect", "constant"):
            raise ValueError(f"padding is {self.padding!r}, expected 'reflect' or 'constant'")

    @property
    def hop(self) -> int:
        """Samples in a frame."""
        return prod(self.ratios)

    @property
    def piece(self) -> int | None:
        """Samples of a piece."""
        return None if self.segment is None else int(self.segment * self.sample_rate)

    @property
    def piece_step(self) -> int:
        """Samples from the start of a piece to the start of the next."""
        assert self.piece is not None
        return max(1, int((1 - self.overlap) * self.piece))


class Encodec(Codec):
    """Sound to N codes a frame and back."""

    system = "encodec"

    def __init__(
        self,
        config: EncodecConfig,
        *,
        name: str = "encodec/custom",
        licences: tuple[str, str] = ("MIT", "unknown"),
    ):
        super().__init__()
        self.config = c = config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quantizer = EuclideanRVQ(c.latent_dim, stages=c.codebooks, size=c.codebook_size)
        self.spec = CodecSpec(
            name=name,
            modality="audio",
            vocab=((c.codebook_size,) * c.codebooks,),
            layout=Frames(),
            compose="sum",
            depth_prefix=True,
            streaming=c.segment is None,
            rate=c.sample_rate / c.hop,
            size=(c.sample_rate,),
            code_licence=licences[0],
            weights_licence=licences[1],
        )

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, object] | None = None,
        *,
        name: str = "encodec/custom",
        licences: tuple[str, str] = ("MIT", "unknown"),
        source: str = "<memory>",
    ) -> Encodec:
        """From the tensors of the encodec package, of audiocraft, or of the Hugging Face port.

        Args:
            config: what the tensors do not say: sample_rate, causal, padding, segment, overlap, normalize.
        """
        tensors = fuse_weight_norm(state_dict)
        if any(key.startswith("encoder.layers.") for key in tensors):
            tensors = _official_names(tensors)
        # Statistics of the codebooks' training.
        tensors = {
            k: v
            for k, v in tensors.items()
            if not k.endswith(("inited", "cluster_size", "embed_avg"))
        }
        codec = cls(infer_config(tensors, config or {}), name=name, licences=licences)
        codec.to(tensors["encoder.model.0.conv.conv.weight"].dtype)
        load_into(codec, tensors, source=source)
        return codec.eval()

    def depth_of(self, bandwidth: float) -> int:
        """How many codes a frame gets at `bandwidth` kbit/s, as published: at least one, at most N."""
        bits = math.log2(self.config.codebook_size) * ceil(
            self.config.sample_rate / self.config.hop
        )
        return min(self.config.codebooks, max(1, int(bandwidth * 1000 // bits)))

    @torch.no_grad()
    def encode(
        self,
        media: Sequence[Audio],
        *,
        options: AudioOptions | None = None,
        rng: Rng | None = None,
    ) -> list[TokenStream]:
        """Sounds to streams. Sounds (or pieces) of one length share a batch.

        Raises:
            ValueError: an empty sound, NaN or infinite samples, a depth that the codec does not have, or channels
                "each" for a stereo model.
        """
        options = options or AudioOptions()
        depth = self._depth(options.depth)
        if self.config.piece is not None:
            return self._encode_pieces(media, options, depth)
        groups = [rows_of(item, self.config.sample_rate, options) for item in media]
        rows = [row[None] for group in groups for row in group]
        codes = iter(_by_length(rows, self._encode_equal, self._encode_long, self._window))
        streams = []
        for item, group in zip(media, groups):
            table = interleave(torch.stack([next(codes)[:depth] for _ in group]))
            meta = source_meta(item, len(group))
            streams.append(self.stream(table, grid=(len(table),), meta=meta))
        return streams

    @torch.no_grad()
    def decode(
        self,
        streams: Sequence[TokenStream],
        *,
        options: None = None,
        rng: Rng | None = None,
    ) -> list[Audio]:
        """Streams of any depth to sounds of the source's rate and length."""
        for stream in streams:
            self.check(stream)
        c = self.config
        if c.piece is not None:
            return [self._decode_pieces(stream) for stream in streams]
        groups = [deinterleave(stream.codes, channels_of(stream)) for stream in streams]
        rows = [row for group in groups for row in group]
        window = self._window // c.hop
        waves = iter(_by_length(rows, self._decode_equal, self._decode_long, window))
        sounds = []
        for stream, group in zip(streams, groups):
            samples = torch.cat([next(waves) for _ in group])
            whole = group.shape[-1] * c.hop
            sounds.append(source_sound(samples, stream.meta, c.sample_rate, whole))
        return sounds

    def tokenize(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Samples [B, C, L] to codes [B, n, T], T = ⌈L / hop⌉. One piece; not scaled."""
        return self.quantizer.encode(self.encoder(x), self._depth(depth))

    def detokenize(self, codes: Tensor) -> Tensor:
        """Codes [B, n, T] of any depth n to samples [B, C, T · hop]."""
        return self.decoder(self.quantizer.decode(codes))

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """The codebook [V, D] of a depth; a frame's latent is the sum over depths."""
        return self.quantizer.vectors(depth)

    def encoder_stream(self, options: AudioOptions | None = None) -> EncoderStream:
        """`push(Audio)` pieces of one sound, then `finish()`: streams that joined equal `encode` of the whole."""
        options = options or AudioOptions()
        self._depth(options.depth)
        self._needs_whole("encoder_stream")
        return EncoderStream(self, self._encoder_windows(), options)

    def decoder_stream(self) -> DecoderStream:
        """`push(stream)` pieces of one sound, then `finish()`: sounds that joined equal `decode` of the whole."""
        self._needs_whole("decoder_stream")
        return DecoderStream(self, self._decoder_windows())

    # --- whole sounds

    @property
    def _window(self) -> int:
        """Longest row, in samples, that goes through the network at once: 20 s."""
        return 20 * self.config.sample_rate

    def _encode_equal(self, x: Tensor) -> Tensor:
        return self.tokenize(x.to(self.device, self.dtype)).cpu()

    def _decode_equal(self, codes: Tensor) -> Tensor:
        return self.detokenize(codes.to(self.device)).float().cpu()

    def _encode_long(self, x: Tensor) -> Tensor:
        return _through(self._encoder_windows(), x.split(self._window, 1))[0]

    def _decode_long(self, codes: Tensor) -> Tensor:
        blocks = codes[None].split(self._window // self.config.hop, -1)
        return _through(self._decoder_windows(), blocks)

    def _encoder_windows(self) -> Chained:
        """Samples [C, L] to codes [C, N, T]."""
        before, lstm, after = self.encoder.parts()
        hop = self.config.hop
        quantised = _on(self, lambda z: self.quantizer.encode(after(z)))
        return Chained(
            self._windowed(_on(self, lambda x: before(x[:, None])), hop, 1, _reach(before, 1)),
            _Carried(lstm),
            self._windowed(quantised, 1, 1, _reach(after, hop)),
        )

    def _decoder_windows(self) -> Chained:
        """Codes [C, n, T] to samples [C, L]."""
        before, lstm, after = self.decoder.parts()
        hop = self.config.hop
        latents = _on(self, lambda codes: before(self.quantizer.decode(codes)))
        return Chained(
            self._windowed(latents, 1, 1, _reach(before, hop)),
            _Carried(lstm),
            self._windowed(_on(self, lambda z: after(z)[:, 0]), 1, hop, _reach(after, hop)),
        )

    def _windowed(self, fn: Callable, unit_in: int, unit_out: int, reach: int) -> Windowed:
        hop = self.config.hop
        return Windowed(
            fn,
            unit_in=unit_in,
            unit_out=unit_out,
            margin=ceil(reach / hop) + 1,
            step=self._window // hop // 2,
        )

    # --- pieces

    def _encode_pieces(
        self, media: Sequence[Audio], options: AudioOptions, depth: int
    ) -> list[TokenStream]:
        if options.channels == "each":
            raise ValueError(f"'{self.spec.name}' codes stereo as it is; leave channels at 'mix'")
        sounds = [self._stereo(item) for item in media]
        pieces = [piece for sound in sounds for piece in self._cut(sound)]
        scales = [self._loudness(piece) for piece in pieces]
        rows = [piece / scale for piece, scale in zip(pieces, scales)]
        codes = _by_length(rows, self._encode_equal, self._encode_long, self._window)
        streams, at = [], 0
        for item, sound in zip(media, sounds):
            mine = slice(at, at := at + len(self._lengths(sound.shape[-1])))
            table = rearrange(torch.cat(codes[mine], -1)[:depth], "n t -> t n")
            meta = {**source_meta(item, 1), "channels": item.channels}
            side = {"scale": torch.stack(scales[mine])} if self.config.normalize else {}
            streams.append(self.stream(table, grid=(len(table),), meta=meta, side=side))
        return streams

    def _decode_pieces(self, stream: TokenStream) -> Audio:
        c, frames = self.config, len(stream.codes)
        lengths = self._lengths(self._length(stream))
        counts = [ceil(n / c.hop) for n in lengths]
        if sum(counts) != frames:
            raise StreamError(f"stream has {frames} frames, its length asks for {sum(counts)}")
        scales = stream.side.get("scale", torch.ones(len(counts)))
        if c.normalize and ("scale" not in stream.side or scales.shape != (len(counts),)):
            raise StreamError(f"side tensor 'scale' is missing or not [{len(counts)}]")
        codes = list(stream.codes.T.split(counts, -1))
        waves = _by_length(codes, self._decode_equal, self._decode_long, self._window)
        whole = _overlap_add([w * s for w, s in zip(waves, scales)], c.piece_step)
        sound = source_sound(whole, stream.meta, c.sample_rate, frames * c.hop)
        return sound if channels_of(stream) == c.channels else sound.mono()

    def _stereo(self, audio: Audio) -> Tensor:
        checked(audio)
        audio = audio if audio.channels == self.config.channels else audio.mono()
        samples = audio.resample(self.config.sample_rate).samples
        return samples.expand(self.config.channels, -1)

    def _lengths(self, length: int) -> list[int]:
        """Samples in each piece of a sound."""
        assert self.config.piece is not None
        starts = range(0, length, self.config.piece_step)
        return [min(self.config.piece, length - start) for start in starts]

    def _cut(self, sound: Tensor) -> list[Tensor]:
        step = self.config.piece_step
        lengths = self._lengths(sound.shape[-1])
        return [sound[:, i * step : i * step + n] for i, n in enumerate(lengths)]

    def _loudness(self, piece: Tensor) -> Tensor:
        if not self.config.normalize:
            return piece.new_ones(())
        return reduce(piece, "c l -> l", "mean").square().mean().sqrt() + 1e-8

    def _length(self, stream: TokenStream) -> int:
        """Samples at our rate that a stream stands for."""
        c = self.config
        if "length" not in stream.meta:
            per_piece = ceil(c.piece / c.hop)  # type: ignore[operator]
            whole, rest = divmod(len(stream.codes), per_piece)
            return (whole - (not rest)) * c.piece_step + (rest or per_piece) * c.hop
        length, rate = int(stream.meta["length"]), int(stream.meta["rate"])  # type: ignore[call-overload]
        return ceil(length * c.sample_rate / rate)

    def _depth(self, depth: int | None) -> int:
        most = self.config.codebooks
        if depth is not None and not 1 <= depth <= most:
            raise ValueError(f"depth is {depth}, '{self.spec.name}' has 1 to {most}")
        return depth or most

    def _needs_whole(self, what: str) -> None:
        if self.config.piece is not None:
            raise ValueError(f"'{self.spec.name}' codes pieces by itself and has no {what}")


class PaddedConv(nn.Module):
    """A convolution that pads by itself, so that T = ⌈L / stride⌉; keys `conv.conv`, `conv.norm`."""

    def __init__(
        self, config: EncodecConfig, inside: int, outside: int, size: int, stride: int = 1
    ):
        super().__init__()
        self.causal, self.mode = config.causal, config.padding
        conv = nn.Conv1d(inside, outside, size, stride)
        self.conv = _normed("conv", conv, outside, config.group_norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] to [B, C', ⌈L / stride⌉]."""
        conv = self.conv["conv"]
        size, stride = conv.kernel_size[0], conv.stride[0]
        total, rest = size - stride, -x.shape[-1] % stride
        right = 0 if self.causal else total // 2
        y = conv(pad(x, total - right, right + rest, self.mode))
        return self.conv["norm"](y) if "norm" in self.conv else y


class PaddedConvTranspose(nn.Module):
    """A transposed convolution, trimmed to L · stride; keys `convtr.convtr`, `convtr.norm`."""

    def __init__(self, config: EncodecConfig, inside: int, outside: int, stride: int):
        super().__init__()
        self.causal = config.causal
        conv = nn.ConvTranspose1d(inside, outside, 2 * stride, stride)
        self.convtr = _normed("convtr", conv, outside, config.group_norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] to [B, C', L · stride]."""
        conv = self.convtr["convtr"]
        y = conv(x)
        y = self.convtr["norm"](y) if "norm" in self.convtr else y
        total = conv.kernel_size[0] - conv.stride[0]
        right = total if self.causal else total // 2
        return y[..., total - right : y.shape[-1] - right]


class ResidualBlock(nn.Module):
    """ELU, convolution k3 to half the channels, ELU, k1 back; the skip connection is a k1 convolution or nothing."""

    def __init__(self, config: EncodecConfig, channels: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.ELU(),
            PaddedConv(config, channels, channels // 2, 3),
            nn.ELU(),
            PaddedConv(config, channels // 2, channels, 1),
        )
        self.shortcut = (
            PaddedConv(config, channels, channels, 1) if config.shortcut else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L], same length."""
        return self.shortcut(x) + self.block(x)


class SkipLSTM(nn.Module):
    """x + two-layer LSTM of x."""

    def __init__(self, channels: int):
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T], same length."""
        return self.step(x, None)[0]

    def step(self, x: Tensor, state: tuple[Tensor, Tensor] | None):
        """The next frames [B, C, T] after `state`; returns them and the state after them."""
        y, state = self.lstm(rearrange(x, "b c t -> t b c"), state)
        return rearrange(y, "t b c -> b c t") + x, state


class _SEANet(nn.Module):
    """A chain of layers around one LSTM; key `model`."""

    model: nn.Sequential

    def forward(self, x: Tensor) -> Tensor:
        """Through all layers."""
        return self.model(x)

    def parts(self) -> tuple[nn.Sequential, SkipLSTM, nn.Sequential]:
        """What comes before the LSTM, the LSTM, and what comes after."""
        at = next(i for i, layer in enumerate(self.model) if isinstance(layer, SkipLSTM))
        return self.model[:at], self.model[at], self.model[at + 1 :]  # type: ignore[return-value]


class Encoder(_SEANet):
    """[B, C, L] to [B, D, ⌈L / hop⌉]; channels double at each stride."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        channels = config.width
        layers: list[nn.Module] = [PaddedConv(config, config.channels, channels, 7)]
        for ratio in reversed(config.ratios):
            layers += [ResidualBlock(config, channels), nn.ELU()]
            layers.append(PaddedConv(config, channels, 2 * channels, 2 * ratio, ratio))
            channels *= 2
        layers += [SkipLSTM(channels), nn.ELU(), PaddedConv(config, channels, config.latent_dim, 7)]
        self.model = nn.Sequential(*layers)


class Decoder(_SEANet):
    """[B, D, T] to [B, C, T · hop]; the encoder's mirror."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        channels = config.width * 2 ** len(config.ratios)
        first = PaddedConv(config, config.latent_dim, channels, 7)
        layers: list[nn.Module] = [first, SkipLSTM(channels)]
        for ratio in config.ratios:
            up = PaddedConvTranspose(config, channels, channels // 2, ratio)
            channels //= 2
            layers += [nn.ELU(), up, ResidualBlock(config, channels)]
        self.model = nn.Sequential(
            *layers, nn.ELU(), PaddedConv(config, channels, config.channels, 7)
        )


def pad(x: Tensor, left: int, right: int, mode: str) -> Tensor:
    """Pad the time of [B, C, L]; where L is too short to reflect, zeros are put behind it first, as published."""
    if mode == "constant":
        return F.pad(x, (left, right))
    missing = max(0, max(left, right) - x.shape[-1] + 1)
    y = F.pad(F.pad(x, (0, missing)), (left, right), mode="reflect")
    return y[..., : y.shape[-1] - missing]


def infer_config(tensors: Mapping[str, Tensor], given: Mapping[str, object]) -> EncodecConfig:
    """The config of a state dict with the official names and plain weights; `given` says the rest."""
    ups = _numbered(tensors, r"decoder\.model\.(\d+)\.convtr\.convtr\.weight")
    books = _numbered(tensors, r"quantizer\.vq\.layers\.(\d+)\._codebook\.embed")
    first = tensors.get("encoder.model.0.conv.conv.weight")
    if first is None or not ups or not books:
        raise WeightsError(
            f"not an EnCodec state dict: found {len(ups)} upsampling layers and {len(books)} codebooks"
        )
    return EncodecConfig(
        channels=first.shape[1],
        width=first.shape[0],
        ratios=tuple(w.shape[2] // 2 for w in ups),
        latent_dim=books[0].shape[1],
        codebooks=len(books),
        codebook_size=books[0].shape[0],
        group_norm="encoder.model.0.conv.norm.weight" in tensors,
        shortcut="encoder.model.1.shortcut.conv.conv.weight" in tensors,
        **given,  # type: ignore[arg-type]
    )


def build(files: Mapping[str, Weights], entry: Entry) -> Encodec:
    """The codec of a registry row, or of a file that `save_codec` wrote."""
    weights = files["weights"]
    licences = (entry.code_licence, entry.weights_licence)
    if not weights.config:
        return Encodec.from_published(
            weights.tensors,
            entry.config,
            name=entry.name,
            licences=licences,
            source=weights.source,
        )
    codec = Encodec(EncodecConfig(**entry.config), name=entry.name, licences=licences)  # type: ignore[arg-type]
    load_into(codec, weights.tensors, source=weights.source)
    return codec


def _official_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of the Hugging Face port."""
    layers = [int(k.split(".")[2]) for k in tensors if k.startswith("decoder.layers.")]
    ups = range(3, max(layers), 3)

    def rename(key: str) -> str:
        if key.startswith("quantizer."):
            return re.sub(
                r"^quantizer\.layers\.(\d+)\.codebook\.", r"quantizer.vq.layers.\1._codebook.", key
            )
        side, _, index, *rest = key.split(".")
        kind = "convtr" if side == "decoder" and int(index) in ups and len(rest) == 2 else "conv"
        if rest[0] != "lstm":
            *path, module, leaf = rest
            rest = [*path, kind, "norm" if module == "norm" else kind, leaf]
        return ".".join([side, "model", index, *rest])

    return {rename(key): value for key, value in tensors.items()}


def _numbered(tensors: Mapping[str, Tensor], pattern: str) -> list[Tensor]:
    """Tensors whose key matches, in the order of the number in it."""
    found = [(int(m[1]), v) for k, v in tensors.items() if (m := re.fullmatch(pattern, k))]
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]


def _normed(name: str, conv: nn.Module, channels: int, group_norm: bool) -> nn.ModuleDict:
    modules = {name: conv}
    if group_norm:
        modules["norm"] = nn.GroupNorm(1, channels)
    return nn.ModuleDict(modules)


def _by_length(
    rows: Sequence[Tensor],
    run: Callable[[Tensor], Tensor],
    run_long: Callable[[Tensor], Tensor],
    window: int,
) -> list[Tensor]:
    """Rows [..., L] through a network: those of one shape in batches of up to 8, those longer than `window` alone.

    Reflected padding and the LSTM make padded batches of unequal rows differ from single calls, so there are none.
    """
    results: list[Tensor | None] = [None] * len(rows)
    shapes = defaultdict(list)
    for i, row in enumerate(rows):
        if row.shape[-1] > window:
            results[i] = run_long(row)
        else:
            shapes[row.shape].append(i)
    for same in shapes.values():
        for start in range(0, len(same), 8):
            batch = same[start : start + 8]
            for i, result in zip(batch, run(torch.stack([rows[i] for i in batch])), strict=True):
                results[i] = result
    return results  # type: ignore[return-value]


def _overlap_add(pieces: Sequence[Tensor], step: int) -> Tensor:
    """Pieces [C, L_i] that begin `step` apart, weighted by a triangle over the first one's length."""
    length = pieces[0].shape[-1]
    t = torch.linspace(0, 1, length + 2)[1:-1]
    weight = 0.5 - (t - 0.5).abs()
    total = step * (len(pieces) - 1) + pieces[-1].shape[-1]
    out, weights = pieces[0].new_zeros(pieces[0].shape[0], total), torch.zeros(total)
    for i, piece in enumerate(pieces):
        place = slice(i * step, i * step + piece.shape[-1])
        out[:, place] += weight[: piece.shape[-1]] * piece
        weights[place] += weight[: piece.shape[-1]]
    return out / weights


def _reach(layers: nn.Module, stride: int) -> int:
    """How far, in samples, an output of a chain depends on its input at the most."""
    total = 0
    for layer in layers.modules():
        if isinstance(layer, nn.Conv1d):
            total += stride * (layer.kernel_size[0] - 1)
            stride *= layer.stride[0]
        elif isinstance(layer, nn.ConvTranspose1d):
            stride //= layer.stride[0]
            total += stride * (layer.kernel_size[0] - 1)
    return total


def _on(codec: Codec, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` on the codec's device and type, its result on the CPU."""

    def run(x: Tensor) -> Tensor:
        x = x.to(codec.device, codec.dtype) if x.is_floating_point() else x.to(codec.device)
        y = fn(x).cpu()
        return y.float() if y.is_floating_point() else y

    return run


def _through(windows: Chained, blocks: Iterable[Tensor]) -> Tensor:
    pieces = [piece for block in blocks for piece in windows.push(block)]
    return torch.cat([*pieces, windows.finish()], -1)


class _Carried:
    """An LSTM over frames that arrive in pieces, with the interface of `Windowed`."""

    def __init__(self, lstm: SkipLSTM):
        self._lstm, self._state = lstm, None

    def push(self, x: Tensor) -> list[Tensor]:
        weight = self._lstm.lstm.weight_ih_l0
        y, self._state = self._lstm.step(x.to(weight), self._state)
        return [y.float().cpu()]

    def finish(self) -> None:
        self._state = None
