"""A tokenizer of whole words for small closed vocabularies, with bytes for every word that it does not know.

Names of emoji use some 1,800 words: as bytes, a small model learns to spell instead of to see. The file is an ordinary
`tokenizers` one (Unigram with byte fallback), so `TextCodec` and transformers read it.
"""

from __future__ import annotations

from collections.abc import Iterable

SPACE = "\u2581"  # what stands for the space before a word


def word_tokenizer(texts: Iterable[str]) -> str:
    """The JSON of a tokenizer whose ids are: unknown, 256 bytes, then the texts' words in order of the alphabet.

    Case is folded and runs of white space become one; apart from that, decoding gives back what was encoded.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = sorted({word for text in texts for word in text.lower().split()})
    pieces = [("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [(SPACE, -20.0)] + [(SPACE + word, -10.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(_regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer.to_str()


def _regex(pattern: str):
    from tokenizers import Regex

    return Regex(pattern)
