"""What codecs of mono sound with N residual codes a frame share: rates, channels, batches, pieces, depths.

Letters: B batch, C channels, L samples, T frames, N codebooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...modalities.audio import Audio
from ..codec import Codec, CodecSpec, Rng
from ..layout import Frames
from ..stream import TokenStream
from .waveform import (
    AudioOptions,
    DecoderStream,
    EncoderStream,
    channels_of,
    deinterleave,
    in_batches,
    interleave,
    rows_of,
    source_meta,
    source_sound,
)
from .windows import Windowed

SECONDS = 20  # the longest sound that goes through the network at once


class ResidualCodec(Codec):
    """Sound to N codes a frame and back; the first n of each frame decode too.

    A subclass has a `config` with `sample_rate`, `hop`, `codebooks` and `codebook_size`, and writes `tokenize`,
    `detokenize`, `encode_rows`, `decode_rows` and `margins`.
    """

    config: Any

    def tokenize(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Samples [B, 1, L] to codes [B, n, T], T = ⌈L / hop⌉; n = `depth`, or all N."""
        raise NotImplementedError

    def detokenize(self, codes: Tensor) -> Tensor:
        """Codes [B, n, T] of any depth n to samples [B, 1, L'] in [-1, 1]."""
        raise NotImplementedError

    def encode_rows(self, rows: list[Tensor]) -> list[Tensor]:
        """Samples [L_i] to codes [T_i, N], in one batch; each as if it were alone."""
        raise NotImplementedError

    def decode_rows(self, rows: list[Tensor]) -> list[Tensor]:
        """Codes [T_i, n_i] to samples [L_i], in one batch; each as if it were alone."""
        raise NotImplementedError

    def margins(self) -> tuple[int, int]:
        """How many frames to either side a code, and a sample, depends on."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(
        self,
        media: Sequence[Audio],
        *,
        options: AudioOptions | None = None,
        rng: Rng | None = None,
    ) -> list[TokenStream]:
        """Sounds to streams of T = ⌈samples / hop⌉ frames (times the channels, where each is coded).

        Raises:
            ValueError: an empty sound, NaN or infinite samples, or a depth that the codec does not have.
        """
        options = options or AudioOptions()
        depth = self.depth(options.depth)
        groups = [rows_of(item, self.config.sample_rate, options) for item in media]
        rows = [row for group in groups for row in group]
        codes = iter(in_batches(rows, self.encode_rows, self._encode_long, self._window(1)))
        streams = []
        for item, group in zip(media, groups):
            table = interleave(torch.stack([next(codes)[:, :depth].T for _ in group]))
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
        """Streams of any depth to sounds of the source's rate and length.

        Without a source (a generated stream) the sound has the codec's rate and T · hop samples. Mixed channels
        stay mixed.
        """
        for stream in streams:
            self.check(stream)
        groups = [deinterleave(stream.codes, channels_of(stream)) for stream in streams]
        rows = [rearrange(row, "n t -> t n") for group in groups for row in group]
        c = self.config
        waves = iter(in_batches(rows, self.decode_rows, self._decode_long, self._window(c.hop)))
        sounds = []
        for stream, group in zip(streams, groups):
            samples = torch.stack([next(waves) for _ in group])
            whole = group.shape[-1] * c.hop
            sounds.append(source_sound(samples, stream.meta, c.sample_rate, whole))
        return sounds

    def pad(self, x: Tensor) -> Tensor:
        """Zeros on the right of [..., L] up to whole frames."""
        return F.pad(x, (0, -x.shape[-1] % self.config.hop))

    def encoder_stream(self, options: AudioOptions | None = None) -> EncoderStream:
        """`push(Audio)` pieces of one sound, then `finish()`: streams that joined equal `encode` of the whole."""
        options = options or AudioOptions()
        self.depth(options.depth)
        return EncoderStream(self, self._encoder_windows(), options)

    def decoder_stream(self) -> DecoderStream:
        """`push(stream)` pieces of one sound, then `finish()`: sounds that joined equal `decode` of the whole."""
        return DecoderStream(self, self._decoder_windows())

    def depth(self, depth: int | None) -> int:
        """`depth`, or all N. ValueError where there are not so many."""
        most = self.config.codebooks
        if depth is not None and not 1 <= depth <= most:
            raise ValueError(f"depth is {depth}, '{self.spec.name}' has 1 to {most}")
        return depth or most

    def _window(self, unit: int) -> int:
        """Longest row, in `unit` samples, that goes through the network at once."""
        return SECONDS * self.config.sample_rate // unit

    def _encode_long(self, row: Tensor) -> Tensor:
        windows = self._encoder_windows()
        pieces = [p for block in row[None].split(self._window(1), 1) for p in windows.push(block)]
        return rearrange(torch.cat([*pieces, windows.finish()], -1), "1 n t -> t n")

    def _decode_long(self, row: Tensor) -> Tensor:
        windows = self._decoder_windows()
        codes = rearrange(row, "t n -> 1 n t")
        blocks = codes.split(self._window(self.config.hop), -1)
        pieces = [p for block in blocks for p in windows.push(block)]
        return torch.cat([*pieces, windows.finish()], -1)[0]

    def _encoder_windows(self) -> Windowed:
        """Samples [C, L] to codes [C, N, T]."""
        hop = self.config.hop

        def fn(x: Tensor) -> Tensor:
            return self.tokenize(x[:, None].to(self.device, self.dtype)).cpu()

        margin, _ = self.margins()
        return Windowed(fn, unit_in=hop, unit_out=1, margin=margin, step=self._window(hop) // 2)

    def _decoder_windows(self) -> Windowed:
        """Codes [C, n, T] to samples [C, L]."""
        hop = self.config.hop

        def fn(codes: Tensor) -> Tensor:
            return self.detokenize(codes.to(self.device))[:, 0].float().cpu()

        _, margin = self.margins()
        return Windowed(fn, unit_in=1, unit_out=hop, margin=margin, step=self._window(hop) // 2)


def residual_spec(
    config: Any, name: str, licences: tuple[str, str] = ("Apache-2.0", "unknown")
) -> CodecSpec:
    """What a `ResidualCodec` of such a config says of itself; licences of code and weights."""
    return CodecSpec(
        name=name,
        modality="audio",
        vocab=((config.codebook_size,) * config.codebooks,),
        layout=Frames(),
        compose="sum",
        depth_prefix=True,
        streaming=True,
        rate=config.sample_rate / config.hop,
        size=(config.sample_rate,),
        code_licence=licences[0],
        weights_licence=licences[1],
    )
