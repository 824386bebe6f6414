"""Manual pages in other languages, where the machine has them: domains that differ by language."""

import gzip
import os
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from molora_fed.corpus.builtin import MIN_CHARACTERS, choose_documents
from molora_fed.types import Document

__all__ = ["pages", "read_manual_pages", "reduce_roff"]

_LANGUAGE = re.compile(r"[a-z]{2}(_[A-Z]{2})?")
MAX_PAGE_BYTES = 4_000_000

_ACCENTS = {
    "'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", "~": "\u0303", ",": "\u0327",
    "v": "\u030c", "o": "\u030a", "a": "\u0304",
}  # fmt: skip
_GLYPHS = {
    "ss": "ß", "AE": "Æ", "ae": "æ", "OE": "Œ", "oe": "œ", "/O": "Ø", "/o": "ø", "oA": "Å",
    "oa": "å", "Fo": "«", "Fc": "»", "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "aq": "'",
    "dq": '"', "bu": "•", "co": "©", "rg": "®", "en": "–", "em": "—", "hy": "-", "->": "→",
    "<-": "←", "<=": "≤", ">=": "≥", "de": "°", "sc": "§", "r!": "¡", "r?": "¿", "rs": "\\",
    "ti": "~", "ha": "^", "at": "@", "sh": "#", "Eu": "€", "lA": "⇐", "rA": "⇒", "ga": "`",
}  # fmt: skip
_ESCAPE = re.compile(
    r"\\(?:"
    r"\"[^\n]*"  # comment
    r"|\((?P<two>..)|\[(?P<long>[^\]\n]*)\]"  # glyph
    r"|[fFmMnkg*](?:\(..|\[[^\]\n]*\]|[^(\[\n])"  # font, register, string
    r"|s[-+]?\d+"
    r"|[hvwNoXDlLbRxSAC]'[^'\n]*'"
    r"|(?P<space>[ ~0])|(?P<char>[-e'`\\.])|(?P<none>[^\n])|(?P<join>\n)"
    r")"
)
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)')
_ALTERNATING = frozenset({"BR", "RB", "BI", "IB", "IR", "RI"})
_SPACED = frozenset({"B", "I", "SM", "SB", "IP", "OP", "SY", "TQ", "Nm", "Nd", "It"})
_HEADINGS = frozenset({"SH", "SS", "Sh", "Ss"})
_BREAKS = frozenset({"PP", "P", "LP", "TP", "HP", "Pp", "sp", "br"})


def _replace_escape(match: re.Match[str]) -> str:
    """Plain text of one roff escape; nothing for those that only set how it looks."""
    name = match["two"] or match["long"]
    if name is not None:
        if name in _GLYPHS:
            return _GLYPHS[name]
        if re.fullmatch(r"u[0-9A-F]{4,5}(_[0-9A-F]{4,5})*", name):
            points = [int(part, 16) for part in name[1:].split("_")]
            return unicodedata.normalize("NFC", "".join(map(chr, points)))
        if len(name) == 2 and name[0] in _ACCENTS and name[1].isalpha():
            return unicodedata.normalize("NFC", name[1] + _ACCENTS[name[0]])
        return ""
    if match["space"]:
        return " "
    return {"e": "\\"}.get(match["char"], match["char"]) if match["char"] else ""


def reduce_roff(source: str) -> str:
    """Reduce the roff source of a manual page to its text, without rendering it.

    What precedes the first heading (definitions, the title line) is dropped; text, headings and
    the arguments of font macros are kept; every other request goes. Each source line stays a
    line.

    Args:
        source: Decoded roff source (man or mdoc macros).

    Returns:
        Text; empty if the page has no heading.
    """
    lines: list[str] = []
    started = False
    for line in source.splitlines():
        if line[:1] not in (".", "'"):
            if started:
                lines.append(line)
            continue
        name, _, rest = line[1:].strip().partition(" ")
        started = started or name in _HEADINGS
        if not started:
            continue
        parts = [(m[1] or m[2] or "").replace('""', '"') for m in _ARGUMENT.finditer(rest)]
        if name in _HEADINGS:
            lines += ["", " ".join(parts)]
        elif name in _ALTERNATING:
            lines.append("".join(parts))
        elif name in _SPACED:
            lines.append(" ".join(parts[:1] if name == "IP" else parts))
        elif name in _BREAKS:
            lines.append("")
    text = _ESCAPE.sub(_replace_escape, "\n".join(lines))
    text = re.sub(r"[ \t]+(?=\n)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n" if started else ""


def _find_manual_folders() -> list[Path]:
    """The man path: MANPATH, then share/man beside every folder of PATH, as man-db has it."""
    given = [Path(part) for part in os.environ.get("MANPATH", "").split(os.pathsep) if part]
    beside = [
        Path(part).parent / tail
        for part in os.environ.get("PATH", os.defpath).split(os.pathsep)
        if part
        for tail in ("share/man", "man")
    ]
    found = dict.fromkeys(path.resolve() for path in (*given, *beside) if path.is_dir())
    return sorted(found)


def _read_page(path: Path) -> str:
    """Decoded source of one page; empty if it is too large or cannot be read or decoded."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                data = file.read(MAX_PAGE_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(MAX_PAGE_BYTES + 1)
        return data.decode("utf-8") if len(data) <= MAX_PAGE_BYTES else ""
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return ""


def read_manual_pages(language: str) -> Iterator[Document]:
    """All manual pages of one language on this machine.

    Args:
        language: Folder of the language in the man path, e.g. "de" or "pt_BR".

    Raises:
        CorpusError: If the machine has none in this language.
    """
    folders = _find_manual_folders()
    found: dict[str, str] = {}
    for folder in folders:
        for path in sorted((folder / language).glob("man*/*")):
            text = reduce_roff(_read_page(path)) if path.is_file() else ""
            if len(text) >= MIN_CHARACTERS:
                found.setdefault(f"{path.parent.name}/{path.name.removesuffix('.gz')}", text)
    documents = [Document(name, text) for name, text in sorted(found.items())]
    where = (
        f"manual pages of language '{language}' in {', '.join(map(str, folders)) or 'no folder'}"
    )
    return choose_documents(documents, f"man-{language.lower().replace('_', '-')}", where)


class _Pages:
    """Readers by language, as attributes, e.g. `pages.pt_BR`: what domains are registered with."""

    def __getattr__(self, language: str) -> Callable[[], Iterator[Document]]:
        if not _LANGUAGE.fullmatch(language):
            raise AttributeError(language)
        return partial(read_manual_pages, language)


pages = _Pages()
