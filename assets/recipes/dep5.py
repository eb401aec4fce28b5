"""Find one file's licence in a Debian copyright file (the machine-readable format, "DEP-5").

The last `Files:` paragraph with a matching pattern decides, as the format demands.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

# Debian's words → SPDX's; what is missing here passes unchanged and counts as not permissive.
NAMES = {
    "public-domain": "public-domain",
    "cc0": "CC0-1.0",
    "cc0-1.0": "CC0-1.0",
    "cc-0": "CC0-1.0",
    "expat": "MIT",
    "mit": "MIT",
    "apache-2.0": "Apache-2.0",
    "bsd-3-clause": "BSD-3-Clause",
    "bsd-2-clause": "BSD-2-Clause",
    "zlib": "Zlib",
}
CC_BY = re.compile(r"cc-by-(\d\.\d)(-us)?a?")


@dataclass(frozen=True, kw_only=True)
class Grant:
    """One `Files:` paragraph."""

    patterns: tuple[str, ...]
    licence: str
    holder: str


def grants(text: str) -> list[Grant]:
    """The `Files:` paragraphs, in order."""
    found = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields = _fields(paragraph)
        if "files" in fields and "license" in fields:
            found.append(
                Grant(
                    patterns=tuple(fields["files"].split()),
                    licence=spdx(fields["license"].split("\n")[0]),
                    holder=" ".join(fields.get("copyright", "").split()),
                )
            )
    return found


def grant_of(path: str, found: list[Grant]) -> Grant | None:
    """What covers this path: the last paragraph that matches it."""
    for grant in reversed(found):
        if any(fnmatchcase(path, pattern) for pattern in grant.patterns):
            return grant
    return None


def spdx(licence: str) -> str:
    """`Expat or CC-0` → `MIT OR CC0-1.0`: SPDX's words for Debian's, unknown ones unchanged."""
    words = re.split(r"\s+(and|or)\s+", licence.strip().rstrip(","), flags=re.IGNORECASE)
    return " ".join(word.upper() if i % 2 else _name(word) for i, word in enumerate(words))


def _name(word: str) -> str:
    by = CC_BY.fullmatch(word.lower())
    return f"CC-BY-{by[1]}{(by[2] or '').upper()}" if by else NAMES.get(word.lower(), word)


def _fields(paragraph: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    key = ""
    for line in paragraph.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace():
            fields[key] = f"{fields.get(key, '')}\n{line.strip()}"
        elif ":" in line:
            key, value = line.split(":", 1)
            key = key.lower()
            fields[key] = value.strip()
    return {key: value.strip() for key, value in fields.items()}
