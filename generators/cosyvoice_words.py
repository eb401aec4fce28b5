"""The text tokenizer of CosyVoice 2 and 3: Qwen2's byte pairs, and marks whose order fixes their ids.

A model directory has it in `CosyVoice-BlankEN` (`vocab.json`, `merges.txt`, or one `tokenizer.json`); the marks stand
in no file. v3 adds phonemes: ARPAbet (vowels with their stress) and pinyin's initials and finals with their tones.
"""

from __future__ import annotations

from pathlib import Path

from ..codecs.published import WeightsError
from ..codecs.text import TextCodec, TextConfig

END_OF_PROMPT = "<|endofprompt|>"
MARKS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|endofprompt|> [breath] <strong> </strong> [noise] [laughter] [cough] "
    "[clucking] [accent] [quick_breath] <laughter> </laughter> [hissing] [sigh] [vocalized-noise] [lipsmack] [mn]"
)
PHONES = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
VOWELS = "AEIOU"
PINYIN = (
    "a ai an ang ao b c ch d e ei en eng f g h i ian in ing iu ià iàn iàng iào iá ián iáng iáo iè ié iòng "
    "ióng iù iú iā iān iāng iāo iē iě iōng iū iǎ iǎn iǎng iǎo iǒng iǔ j k l m n o ong ou p q r s sh t u "
    "uang ue un uo uà uài uàn uàng uá uái uán uáng uè ué uì uí uò uó uā uāi uān uāng uē uě uī uō uǎ uǎi "
    "uǎn uǎng uǐ uǒ vè w x y z zh à ài àn àng ào á ái án áng áo è èi èn èng èr é éi én éng ér ì ìn ìng í "
    "ín íng ò òng òu ó óng óu ù ùn ú ún ā āi ān āng āo ē ēi ēn ēng ě ěi ěn ěng ěr ī īn īng ō ōng ōu ū ūn "
    "ǎ ǎi ǎn ǎng ǎo ǐ ǐn ǐng ǒ ǒng ǒu ǔ ǔn ǘ ǚ ǜ "
)
# How Qwen2 cuts text before byte pairs are joined.
CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def marks(version: str) -> list[str]:
    """The marks of v2 or v3, in the order of their ids."""
    if version == "v2":
        return [*MARKS.split()]
    phones = [
        f"[{p}{n}]" for p in PHONES.split() for n in (("", 0, 1, 2) if p[0] in VOWELS else ("",))
    ]
    return [*MARKS.split(), "<|endofsystem|>", *phones, *(f"[{p}]" for p in PINYIN.split())]


def read_words(folder: str | Path, version: str) -> TextCodec:
    """The tokenizer of `folder` (`CosyVoice-BlankEN`), with the marks of v2 or v3.

    Raises:
        WeightsError: the folder holds neither `tokenizer.json` nor `vocab.json` and `merges.txt`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    folder = Path(folder)
    whole, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.is_file():
        tokenizer = Tokenizer.from_file(str(whole))
    elif vocab.is_file() and merges.is_file():
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = Sequence(
            [Split(Regex(CUTS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
    else:
        raise WeightsError(f"{folder}: holds neither tokenizer.json nor vocab.json and merges.txt")
    tokenizer.add_special_tokens([AddedToken(m, special=True) for m in marks(version)])
    return TextCodec(TextConfig(tokenizer=tokenizer.to_str()), name=f"text/cosyvoice-{version}")
