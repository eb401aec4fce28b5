"""Codec: a medium in, a TokenStream out, and back.

- `encode` and `decode` take and give lists: batched means batched, and row i equals what a single call gives.
- `tokenize` and `detokenize` are the tensor verbs below them, on prepared tensors, for training and for benchmarks.
- Randomness comes in as one `torch.Generator` an item; None draws each item from seed 0, on the CPU, so that a GPU
  and a CPU agree and no item depends on its neighbours in the batch.
- `LatentCodec` is the second, smaller protocol, for continuous latents, which are not a TokenStream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from .layout import Layout
from .stream import Part, StreamError, TokenStream

Fit = Literal["crop", "resize", "pad", "native"]
Rng = Sequence[torch.Generator]


class CodecUnavailable(RuntimeError):
    """The codec is known by name, but cannot run here; the message says what would change that."""


class UnknownCodec(CodecUnavailable, ValueError):
    """No codec has this name; the message offers the nearest ones."""


@dataclass(frozen=True, kw_only=True)
class CodecSpec:
    """What the rest of the library may know of a codec.

    Args:
        name: `system/variant`.
        modality: "image", "audio", "video", "shape" or "text".
        vocab: vocabulary sizes of each part, one per depth: ((4096,),) for One-D-Piece.
        layout: how positions are counted.
        compose: how the decoder joins the codes of one position: "single", "sum" (RVQ) or "concat" (FSQ, BSQ).
        prefix_step: `stream[:k]` decodes for multiples of it; None for none.
        depth_prefix: whether the first n depths decode.
        position_tables: the first so many positions each have a table of their own: the same code means another thing
            at each; 0 where all positions share one.
        streaming: whether `encoder_stream` and `decoder_stream` exist.
        fit: how a source that is not of the codec's size is fitted.
        rate: positions per second (audio, video), else None.
        size: what the codec works at: (height, width) of pictures and video, (sample rate,) of audio, () else.
        code_licence, weights_licence: SPDX names, or words where there is none.
    """

    name: str
    modality: str
    vocab: tuple[tuple[int, ...], ...]
    layout: Layout
    compose: Literal["single", "sum", "concat"] = "single"
    encodes: bool = True
    decodes: bool = True
    prefix_step: int | None = None
    depth_prefix: bool = False
    position_tables: int = 0
    streaming: bool = False
    fit: Fit = "native"
    rate: float | None = None
    size: tuple[int, ...] = ()
    code_licence: str = "Apache-2.0"
    weights_licence: str = "unknown"


class Codec(nn.Module):
    """Base of every codec. A subclass sets `spec`, `config`, `system`, and writes `encode` and `decode`.

    `config` is the frozen dataclass (JSON values only) from which, with the state dict, `system` rebuilds the codec.
    """

    system: ClassVar[str] = ""
    spec: CodecSpec
    config: Any
    _fingerprint: str | None = None

    def encode(
        self, media: Sequence[Any], *, options: Any = None, rng: Rng | None = None
    ) -> list[TokenStream]:
        """Turn media into streams, one each."""
        raise CodecUnavailable(f"'{self.spec.name}' does not encode")

    def decode(
        self, streams: Sequence[TokenStream], *, options: Any = None, rng: Rng | None = None
    ) -> list[Any]:
        """Turn streams into media, one each. StreamError where a stream is another codec's or impossible."""
        raise CodecUnavailable(f"'{self.spec.name}' does not decode")

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """What the decoder receives for each code: [V, d]."""
        raise CodecUnavailable(f"'{self.spec.name}' has no table of code vectors")

    def position_vectors(self, position: int) -> Tensor:
        """As `code_vectors`, for a position with a table of its own (`spec.position_tables`): [V, d]."""
        raise CodecUnavailable(f"'{self.spec.name}' has no tables of single positions")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((t.device for t in _tensors(self)), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The weights' floating type."""
        return next((t.dtype for t in _tensors(self) if t.is_floating_point()), torch.float32)

    @property
    def fingerprint(self) -> str:
        """Eight hex digits of the weights' SHA-256, as they were stored."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.state_dict())
        return self._fingerprint

    @property
    def identity(self) -> str:
        """`name@fingerprint`, as streams carry it."""
        return f"{self.spec.name}@{self.fingerprint}"

    def stream(
        self,
        codes: Tensor | Sequence[Tensor],
        *,
        grid: tuple[int, ...] = (),
        meta: dict[str, object] | None = None,
        side: dict[str, Tensor] | None = None,
    ) -> TokenStream:
        """A stream of this codec from codes [positions] or [positions, depth], or one such tensor a part."""
        tables = [codes] if isinstance(codes, Tensor) else list(codes)
        tables = [t[:, None] if t.ndim == 1 else t for t in tables]
        vocab = self.spec.vocab
        if len(tables) != len(vocab):
            raise StreamError(f"{len(tables)} parts given, '{self.spec.name}' has {len(vocab)}")
        parts = tuple(Part(t, v[: t.shape[1]]) for t, v in zip(tables, vocab))
        stream = TokenStream(
            parts=parts,
            codec=self.identity,
            modality=self.spec.modality,
            grid=grid,
            prefix_step=self.spec.prefix_step,
            depth_prefix=self.spec.depth_prefix,
            meta=meta or {},
            side=side or {},
        )
        self.check(stream)
        return stream

    def check(self, stream: TokenStream) -> None:
        """Raise StreamError unless this codec can decode `stream`."""
        if stream.codec != self.identity:
            raise StreamError(
                f"stream was written by codec '{stream.codec}', decode needs '{self.identity}'"
            )
        for i, (part, vocab) in enumerate(zip(stream.parts, self.spec.vocab)):
            whole = part.vocab == vocab
            first = self.spec.depth_prefix and part.vocab == vocab[: len(part.vocab)]
            if not (whole or first):
                raise StreamError(
                    f"part {i} has the vocabulary {part.vocab}, '{self.spec.name}' has {vocab}"
                )
        problem = self.spec.layout.problem([part.codes for part in stream.parts], stream.grid)
        if problem:
            raise StreamError(f"stream of '{stream.codec}' {problem}")


class LatentCodec(Protocol):
    """Continuous latents (SDXL-type f8 and KL-16 VAEs): no TokenStream and no `.tok`; xAR works on them."""

    def encode_latents(self, x: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to scaled latents [B, C, h, w]; the mean where rng is None."""
        ...

    def decode_latents(self, z: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] to pixels [B, 3, H, W] in [-1, 1]."""
        ...


def fingerprint(state: dict[str, Tensor]) -> str:
    """Eight hex digits of the SHA-256 over names, types, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def item_rngs(rng: Rng | None, n: int) -> list[torch.Generator]:
    """One generator an item: those given, else fresh ones with seed 0 on the CPU."""
    if rng is None:
        return [torch.Generator().manual_seed(0) for _ in range(n)]
    if len(rng) != n:
        raise ValueError(f"rng has {len(rng)} generators for {n} items; give one each, or None")
    return list(rng)


def _tensors(module: nn.Module):
    yield from module.parameters()
    yield from module.buffers()
