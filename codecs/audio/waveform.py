"""What every waveform codec needs around its network: rates, channels, batches, and pieces of one long sound.

Letters: C channels, L samples, T frames, N codebooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, gcd
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...modalities.audio import Audio
from ..codec import Codec
from ..stream import TokenStream
from .windows import Windowed

BATCH_WINDOWS = 4  # windows' worth of padded sound in one pass, which bounds the memory


@dataclass(frozen=True, kw_only=True)
class AudioOptions:
    """How a waveform codec encodes.

    Args:
        channels: "mix" averages all channels into one, and decoding gives one back; "each" codes every channel by
            itself (C times the tokens), positions interleaved: frame 0 of every channel, then frame 1.
        depth: how many codes a frame gets; None for all.
    """

    channels: Literal["mix", "each"] = "mix"
    depth: int | None = None

    def __post_init__(self):
        if self.channels not in ("mix", "each"):
            raise ValueError(f"channels is {self.channels!r}, expected 'mix' or 'each'")


def checked(audio: Audio) -> Tensor:
    """The samples [C, L] of a sound that can be encoded; ValueError where it is empty or not finite."""
    samples = audio.samples
    if not samples.shape[1]:
        raise ValueError("the sound is empty, there is nothing to encode")
    finite = torch.isfinite(samples)
    if not finite.all():
        where = int((~finite).nonzero()[:, 1].min())
        raise ValueError(f"the sound is not finite at sample {where}; replace NaN and infinity")
    return samples


def rows_of(audio: Audio, rate: int, options: AudioOptions) -> list[Tensor]:
    """The rows [L] to code: the mean of the channels or each channel, at `rate`."""
    checked(audio)
    audio = audio.mono() if options.channels == "mix" else audio
    return list(audio.resample(rate).samples)


def source_meta(audio: Audio, channels: int) -> dict[str, object]:
    """What decoding needs to know of the source."""
    meta: dict[str, object] = {"rate": audio.rate, "length": audio.samples.shape[1]}
    return meta if channels == 1 else {**meta, "channels": channels}


def channels_of(stream: TokenStream) -> int:
    """How many interleaved channels a stream has."""
    return int(stream.meta.get("channels", 1))  # type: ignore[call-overload]


def interleave(codes: Tensor) -> Tensor:
    """Codes [C, N, T] to the table of a stream [T·C, N]."""
    return rearrange(codes, "c n t -> (t c) n")


def deinterleave(table: Tensor, channels: int) -> Tensor:
    """The table of a stream [T·C, N] to codes [C, N, T]."""
    return rearrange(table, "(t c) n -> c n t", c=channels)


def source_sound(samples: Tensor, meta: Mapping[str, object], rate: int, whole: int) -> Audio:
    """The sound that was coded: the source's rate, and its length exactly.

    Args:
        samples: [C, L] at `rate`, as the network gave them.
        meta: `rate` and `length` of the source; without them the sound keeps `rate`, and `whole` samples.
    """
    source = int(meta.get("rate", rate))  # type: ignore[call-overload]
    if "length" not in meta:
        return Audio(fit_length(samples, whole), rate).resample(source)
    length = int(meta["length"])  # type: ignore[call-overload]
    samples = fit_length(samples, ceil(length * rate / source))
    return Audio(fit_length(Audio(samples, rate).resample(source).samples, length), source)


def fit_length(x: Tensor, length: int) -> Tensor:
    """[..., L] trimmed, or filled with zeros, to [..., length]."""
    return F.pad(x, (0, max(0, length - x.shape[-1])))[..., :length]


def in_batches(
    rows: Sequence[Tensor],
    run: Callable[[list[Tensor]], list[Tensor]],
    run_long: Callable[[Tensor], Tensor],
    window: int,
) -> list[Tensor]:
    """Rows of any length through a network: those up to `window` in padded batches, longer ones alone.

    Args:
        run: a batch of rows [L_i, ...] to their results.
        run_long: one row to its result, in constant memory.
    """
    results: list[Tensor | None] = [None] * len(rows)
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda j: len(rows[j])):
        if len(rows[i]) > window:
            results[i] = run_long(rows[i])
            continue
        if len(rows[i]) * (len(batch) + 1) > BATCH_WINDOWS * window:
            _fill(results, batch, run([rows[j] for j in batch]))
            batch = []
        batch.append(i)
    if batch:
        _fill(results, batch, run([rows[j] for j in batch]))
    return results  # type: ignore[return-value]


def _fill(results: list[Tensor | None], where: list[int], values: list[Tensor]) -> None:
    for i, value in zip(where, values, strict=True):
        results[i] = value


def windowed_resample(source: int, target: int) -> Windowed:
    """`Audio.resample` for samples [C, L] in pieces."""
    common = gcd(source, target)
    unit_in, unit_out = source // common, target // common
    # The sinc has 6 zero crossings on either side, at 0.99 of the lower of the two rates.
    width = ceil(6 * unit_in / (0.99 * min(unit_in, unit_out)))
    return Windowed(
        lambda x: Audio(x, source).resample(target).samples,
        unit_in=unit_in,
        unit_out=unit_out,
        margin=ceil(width / unit_in) + 1,
        step=max(1, source // unit_in),  # a second
    )


class EncoderStream:
    """Encodes a sound that arrives in pieces, in constant memory. `codec.encoder_stream()` makes one.

    Args:
        codec: whose streams these are.
        windows: samples [C, L] to codes [C, N, T].
        options: as in `encode`.
    """

    def __init__(self, codec: Codec, windows: Windowed, options: AudioOptions):
        self._codec, self._windows, self._options = codec, windows, options
        self._rate, self._channels = 0, 0
        self._resampler: Windowed | None = None
        self._pushed = self._frames = self._told = 0

    @torch.no_grad()
    def push(self, audio: Audio) -> TokenStream | None:
        """Take a piece; return the frames that have become final, None where there are none yet."""
        if not self._rate:
            self._start(audio)
        if (audio.rate, audio.channels) != (self._rate, self._channels):
            raise ValueError(
                f"the piece has {audio.channels} channels at {audio.rate} Hz, "
                f"the first one had {self._channels} at {self._rate} Hz"
            )
        samples = checked(audio)
        self._pushed += samples.shape[1]
        if self._options.channels == "mix":
            samples = audio.mono().samples
        pieces = [samples] if self._resampler is None else self._resampler.push(samples)
        return self._stream([c for piece in pieces for c in self._windows.push(piece)])

    @torch.no_grad()
    def finish(self) -> TokenStream:
        """The rest. ValueError where nothing was pushed."""
        codes = []
        if self._resampler is not None:
            codes = self._windows.push(self._resampler.finish())
        rest = self._stream([*codes, self._windows.finish()], last=True)
        assert rest is not None
        return rest

    def _start(self, audio: Audio) -> None:
        self._rate, self._channels = audio.rate, audio.channels
        (rate,) = self._codec.spec.size
        if rate != audio.rate:
            self._resampler = windowed_resample(audio.rate, rate)

    def _stream(self, codes: list[Tensor], last: bool = False) -> TokenStream | None:
        if not codes:
            return None
        joined = torch.cat(codes, -1)[:, : self._options.depth]
        self._frames += joined.shape[-1]
        seconds = self._frames / self._codec.spec.rate  # type: ignore[operator]
        covered = self._pushed if last else int(seconds * self._rate)
        meta: dict[str, object] = {"rate": self._rate, "length": covered - self._told}
        if len(joined) > 1:
            meta["channels"] = len(joined)
        self._told = covered
        table = interleave(joined)
        return self._codec.stream(table, grid=(len(table),), meta=meta)


class DecoderStream:
    """Decodes a stream that arrives in pieces, in constant memory. `codec.decoder_stream()` makes one.

    Args:
        codec: whose streams these are.
        windows: codes [C, N, T] to samples [C, L].
    """

    def __init__(self, codec: Codec, windows: Windowed):
        self._codec, self._windows = codec, windows
        self._meta: dict[str, object] | None = None
        self._resampler: Windowed | None = None
        self._length = self._frames = self._given = self._decoded = 0

    @torch.no_grad()
    def push(self, stream: TokenStream) -> Audio | None:
        """Take a piece; return the sound that has become final, None where there is none yet."""
        self._codec.check(stream)
        if self._meta is None:
            self._start(stream)
        self._length += int(stream.meta.get("length", 0))  # type: ignore[call-overload]
        codes = deinterleave(stream.codes, channels_of(stream))
        self._frames += codes.shape[-1]
        return self._sound(self._windows.push(codes))

    @torch.no_grad()
    def finish(self) -> Audio:
        """The rest. ValueError where nothing was pushed."""
        samples = self._windows.finish()
        (rate,) = self._codec.spec.size
        length = self._length or self._whole()
        samples = fit_length(samples, max(0, self._at_codec_rate(length) - self._decoded))
        if self._resampler is not None:
            rest = [*self._resampler.push(samples), self._resampler.finish()]
            samples = torch.cat(rest, -1)
            rate = int(self._meta["rate"])  # type: ignore[index, call-overload]
        wanted = length if self._length else samples.shape[-1] + self._given
        return Audio(fit_length(samples, max(0, wanted - self._given)), rate)

    def _start(self, stream: TokenStream) -> None:
        self._meta = dict(stream.meta)
        (rate,) = self._codec.spec.size
        source = int(stream.meta.get("rate", rate))  # type: ignore[call-overload]
        if source != rate:
            self._resampler = windowed_resample(rate, source)

    def _whole(self) -> int:
        """Samples of all frames at the codec's rate."""
        (rate,) = self._codec.spec.size
        return round(self._frames * rate / self._codec.spec.rate)  # type: ignore[operator]

    def _at_codec_rate(self, length: int) -> int:
        (rate,) = self._codec.spec.size
        source = int((self._meta or {}).get("rate", rate))  # type: ignore[call-overload]
        return ceil(length * rate / source) if self._length else length

    def _sound(self, samples: list[Tensor]) -> Audio | None:
        self._decoded += sum(s.shape[-1] for s in samples)
        (rate,) = self._codec.spec.size
        if self._resampler is not None:
            samples = [r for s in samples for r in self._resampler.push(s)]
            rate = int(self._meta["rate"])  # type: ignore[index, call-overload]
        if not samples:
            return None
        joined = torch.cat(samples, -1)
        self._given += joined.shape[-1]
        return Audio(joined, rate)
