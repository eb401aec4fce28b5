"""Text as a codec: UTF-8 bytes, or a `tokenizers` file, one token a position."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..modalities.text import Text
from .codec import Codec, CodecSpec, Rng
from .layout import Frames
from .published import Weights
from .stream import StreamError, TokenStream

if TYPE_CHECKING:
    from .registry import Entry


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """`tokenizer` is the JSON of a `tokenizers` file; None means UTF-8 bytes."""

    tokenizer: str | None = None


class TextCodec(Codec):
    """Text to ids and back. Bytes: ids 0...255, lossless. Otherwise what the tokenizer file says."""

    system = "text"

    def __init__(self, config: TextConfig | None = None, *, name: str = "text/bytes"):
        super().__init__()
        self.config = config or TextConfig()
        self._tokenizer = None
        size = 256
        if self.config.tokenizer is not None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_str(self.config.tokenizer)
            size = self._tokenizer.get_vocab_size()
        digest = hashlib.sha256((self.config.tokenizer or "utf-8 bytes").encode())
        self._fingerprint = digest.hexdigest()[:8]
        self.spec = CodecSpec(
            name=name,
            modality="text",
            vocab=((size,),),
            layout=Frames(),
            prefix_step=1,
            weights_licence="none",
        )

    @classmethod
    def from_file(cls, path: str | Path, *, name: str = "text/file") -> TextCodec:
        """A codec from a `tokenizer.json`."""
        return cls(TextConfig(tokenizer=Path(path).read_text(encoding="utf-8")), name=name)

    def ids(self, text: str) -> list[int]:
        """The ids of a string."""
        if self._tokenizer is None:
            return list(text.encode("utf-8"))
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, ids: Sequence[int]) -> str:
        """The string of ids; bytes that are no UTF-8 become U+FFFD."""
        if self._tokenizer is None:
            return bytes(ids).decode("utf-8", errors="replace")
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def encode(
        self, media: Sequence[Text], *, options: Any = None, rng: Rng | None = None
    ) -> list[TokenStream]:
        """Texts to streams of ids."""
        streams = []
        for item in media:
            ids = self.ids(item.text)
            if not ids:
                raise StreamError("the text is empty, there is nothing to encode")
            streams.append(self.stream(torch.tensor(ids), grid=(len(ids),)))
        return streams

    def decode(
        self, streams: Sequence[TokenStream], *, options: Any = None, rng: Rng | None = None
    ) -> list[Text]:
        """Streams of ids to texts."""
        for stream in streams:
            self.check(stream)
        return [Text(self.text(stream.codes[:, 0].tolist())) for stream in streams]


def build(files: Mapping[str, Weights], entry: Entry) -> TextCodec:
    """The codec of a registry row."""
    return TextCodec(TextConfig(**entry.config), name=entry.name)
