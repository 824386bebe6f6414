"""The text of one file: read within bounds, unpacked, decoded."""

import codecs
import gzip
import re
import zlib
from pathlib import Path

from charset_normalizer import from_bytes

__all__ = ["UnreadableError", "decode", "read_text"]

MAX_FILE_BYTES = 2**34
UNPACKED_RATIO = 200
"""Bytes of text for each byte of a packed file; packed text has 3 to 20."""
SPARE = 2**22
"""Beside, so that small files may hold a text many times."""
_CHUNK = 2**20
_MARKS = (
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
# The commonest first: many texts are the same, or as plausible, in several of them.
_GUESSED = (
    "cp1252", "cp1251", "cp932", "gb18030", "big5", "cp949", "euc_jp", "koi8_r", "cp1250",
    "iso8859_2", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257",
)  # fmt: skip
_DECLARED = re.compile(r"cp\d+|iso8859-\d+|koi8-\w|shift_jis\w*|euc_\w+|gb\w+|big5\w*")
_SAMPLE_BYTES = 2**16
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f]")  # no encoding has these in text


class UnreadableError(Exception):
    """Why one file cannot be read; collected over all files before anything is raised."""


def read_text(
    path: Path, *, packed: bool = False, declared: re.Pattern[bytes] | None = None
) -> tuple[str, str]:
    """The text of a file and its encoding.

    Args:
        path: The file.
        packed: Whether it is packed with gzip.
        declared: Finds, in its first group, the encoding that the file itself names.

    Returns:
        The text, and the encoding: empty for UTF-8, with "?" where it was guessed.

    Raises:
        UnreadableError: If it is too large, binary, in no known encoding, or no gzip.
        OSError: If it cannot be opened.
    """
    data = _read_bytes(path, packed)
    named = declared.search(data[:1_024]) if declared else None
    return decode(data, named.group(1).decode("ascii", "ignore") if named else "")


def _read_bytes(path: Path, packed: bool) -> bytes:
    size = path.stat().st_size
    most = min(SPARE + UNPACKED_RATIO * size, MAX_FILE_BYTES) if packed else MAX_FILE_BYTES
    parts: list[bytes] = []
    total = 0
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                total += len(chunk)
                if total > most:
                    unpacked = f", {UNPACKED_RATIO} times its size and more" if packed else ""
                    raise UnreadableError(f"more than {most:,} bytes of text{unpacked}")
                if not parts and b"\0" in chunk and not _find_mark(chunk):
                    raise UnreadableError("binary data")  # before the rest of it is read
                parts.append(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UnreadableError("no gzip that can be unpacked") from error
    return b"".join(parts)


def _find_mark(data: bytes) -> str:
    return next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "")


def decode(data: bytes, declared: str = "") -> tuple[str, str]:
    """Text of bytes and its encoding.

    UTF-8 first, and UTF-16 or UTF-32 with a byte-order mark, which is removed; then the encoding
    that is declared; then what charset-normalizer takes for the most plausible.

    Args:
        data: Content of a file.
        declared: Encoding that the file itself names; empty if it names none.

    Returns:
        The text, and the encoding: empty for UTF-8, with "?" where it was guessed.

    Raises:
        UnreadableError: If it is binary, or in no encoding that is known.
    """
    marked = _find_mark(data)
    if marked:
        try:
            return data.decode(marked), marked.upper()
        except UnicodeDecodeError as error:
            raise UnreadableError(f"no {marked.upper()} at byte {error.start}") from error
    if b"\0" in data:
        raise UnreadableError("binary data")
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        place = error.start
    known = _find_declared(declared)
    text = _try(data, known)
    if text is not None:
        return text, known
    guessed = _guess(data)
    text = _try(data, guessed)
    if text is None:
        raise UnreadableError(f"no UTF-8 at byte {place}, and no other encoding that is known")
    return text, f"{guessed}?"


def _find_declared(name: str) -> str:
    """The encoding of text that a name stands for; empty if there is none."""
    try:
        known = codecs.lookup(name).name
    except LookupError:
        return ""
    # As browsers do: who says Latin-1 means Windows-1252.
    known = "cp1252" if known == "iso8859-1" else known
    return known if _DECLARED.fullmatch(known) else ""


def _try(data: bytes, encoding: str) -> str | None:
    """The text; None if it is in another encoding, or binary."""
    try:
        text = data.decode(encoding) if encoding else None
    except UnicodeDecodeError:
        return None
    return None if text is None or _NO_TEXT.search(text) else text


def _guess(data: bytes) -> str:
    """The most plausible encoding; empty if none is.

    Lines of plain ASCII say nothing: the first others, up to 64 KiB, are looked at.
    """
    lines = (line for line in data.splitlines() if not line.isascii())
    sample, size = [], 0
    for line in lines:
        sample.append(line[: _SAMPLE_BYTES - size])
        size += len(sample[-1]) + 1
        if size >= _SAMPLE_BYTES:
            break
    found = from_bytes(b"\n".join(sample), cp_isolation=list(_GUESSED), enable_fallback=False)
    best = found.best()
    if best is None:
        return ""
    # As plausible as the best: of these the commonest.
    close = {
        encoding
        for match in found
        if match.chaos <= best.chaos + 0.005 and match.coherence >= best.coherence - 0.05
        for encoding in match.could_be_from_charset
    }
    return next(encoding for encoding in _GUESSED if encoding in close)
