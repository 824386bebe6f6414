"""Word 8-grams as 64-bit hashes, the unit of near-duplicate search and of contamination."""

import hashlib
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["SHINGLE_WORDS", "compute_shingles", "strip_boilerplate"]

SHINGLE_WORDS = 8

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# Japanese and Chinese put no space between words: there each character counts as one.
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")
_LICENCE = re.compile(
    r"licen[cs]e|copyright|\(c\) \d|all rights reserved|spdx|redistribution|"
    r"permission is hereby granted|coding[:=]|\A#!",
    re.IGNORECASE,
)
_COMMENT_BLOCK = re.compile(
    r"(?:[ \t]*//[^\n]*\n)+|(?:[ \t]*#[^\n]*\n)+|(?:\.\\\"[^\n]*\n)+|/\*.*?\*/", re.DOTALL
)
_SPACE = re.compile(r"\s*")
_MAX_HEADER_BLOCKS = 4


def strip_boilerplate(text: str) -> str:
    """Drop licence headers: leading comment blocks that speak of licence or copyright.

    Decides only which documents are near-duplicates; the text that models see keeps them.
    """
    start = 0
    for _ in range(_MAX_HEADER_BLOCKS):
        gap = _SPACE.match(text, start)
        block = _COMMENT_BLOCK.match(text, gap.end() if gap else start)
        if block is None or not _LICENCE.search(block.group()):
            break
        start = block.end()
    return text[start:]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hash_word(word: str) -> int:
    """64 bits of a word, the same in every process (Python's own string hash is not)."""
    digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def compute_shingles(texts: Iterable[str]) -> list[NDArray[np.uint64]]:
    """Hash every run of 8 words (letters, digits, underscore; lower case) of each text.

    Args:
        texts: Any texts.

    Returns:
        For each text its hashes in order of position, shape (max(words - 7, 0),). Equal runs have
        equal hashes, in every process; different runs collide with probability 2^-64.
    """
    table: dict[str, int] = {}
    shingles = []
    for text in texts:
        words = _WORD.findall(text.lower())
        for word in set(words).difference(table):
            table[word] = _hash_word(word)
        hashed = np.array([table[word] for word in words], dtype=np.uint64)  # (W,)
        count = max(len(words) - SHINGLE_WORDS + 1, 0)
        hashes = np.zeros(count, dtype=np.uint64)
        for offset in range(SHINGLE_WORDS):
            # Mixing between the additions makes the hash depend on the order of the words.
            hashes = _mix(hashes + hashed[offset : offset + count])
        shingles.append(hashes)
    return shingles
