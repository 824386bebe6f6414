"""Finding byte strings, a million at once, in what was recorded, whatever it is packed into.

A stream is searched as it is and after everything found in it is unpacked: bodies of HTTP messages,
hexadecimal, base64, gzip, zlib, deflate, bzip2, xz. Strings are looked up by a hash of their first
8, 16, 32 or 64 bytes at every offset, then compared whole.
"""

import binascii
import bz2
import contextlib
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Group", "Index", "Needles", "list_bodies", "search", "unpack"]

KEYS = (64, 32, 16, 8)
"""Bytes that a string is looked up by: the largest of these that it has."""
_CHUNK = 2**22
_TABLE_BITS = 26
_ODD = np.random.default_rng(1).integers(2**62, size=9, dtype=np.uint64) * 2 + 1

MAX_INFLATED = 64 * 2**20
"""Bytes that one compressed stream is unpacked to at most."""
DEEP_BYTES = 2**18
"""Streams up to this size are tried as bare deflate, which has no mark, at every offset."""
_DEPTH = 3
HEX_LEAST, BASE64_LEAST = 16, 12
"""Digits that a run must have to be read as hexadecimal, and as base64."""
_HEX = re.compile(rb"[0-9A-Fa-f]{%d,}" % HEX_LEAST)
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{%d,}(?:\r?\n[A-Za-z0-9+/_-]+)*" % BASE64_LEAST)
_FROM_URLSAFE = bytes.maketrans(b"-_", b"+/")
_GAP = bytes(8)
_MARKS = {
    "gzip": b"\x1f\x8b\x08",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "zip": b"PK\x03\x04",
    "zstd": b"\x28\xb5\x2f\xfd",
}
# Of zlib, method 8, windows of 256 to 32768 bytes, no dictionary; both bytes are divisible by 31.
_IS_ZLIB = np.array(
    [n % 31 == 0 and n >> 8 & 0x8F == 8 and not n & 0x20 for n in range(2**16)], dtype=np.bool_
)


@dataclass(frozen=True)
class Group:
    """What some strings are.

    Attributes:
        owner: Whose they are.
        kind: E.g. "text, held-out" or "token ids, train".
        form: How they are written, e.g. "int32".
    """

    owner: str
    kind: str
    form: str


@dataclass
class Needles:
    """Strings to look for, by what they are; those shorter than 8 bytes are refused."""

    groups: dict[Group, set[bytes]] = field(default_factory=dict)
    dropped: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, group: Group, strings: Iterable[bytes]) -> None:
        """Add strings.

        Raises:
            ValueError: If one has fewer than 8 bytes.
        """
        kept = self.groups.setdefault(group, set())
        for string in strings:
            if len(string) < KEYS[-1]:
                raise ValueError(f"expected strings of 8 bytes at least, got {len(string)}")
            kept.add(string)

    def note_dropped(self, kind: str, why: str, count: int) -> None:
        """Count strings that are not looked for."""
        self.dropped[kind, why] = self.dropped.get((kind, why), 0) + count

    def drop(self, strings: Iterable[bytes], why: str) -> None:
        """Look for these no more, and count them."""
        gone = set(strings)
        for group, kept in self.groups.items():
            self.note_dropped(group.kind, why, len(kept & gone))
            kept -= gone

    def drop_shared(self, why: str) -> None:
        """Drop what several owners have: nobody could say whose it is."""
        owners: dict[bytes, str] = {}
        shared = set()
        for group, kept in self.groups.items():
            for string in kept:
                if owners.setdefault(string, group.owner) != group.owner:
                    shared.add(string)
        self.drop(shared, why)

    def __len__(self) -> int:
        return sum(map(len, self.groups.values()))


class Index:
    """Needles ordered for the search; made once, asked many times.

    One table leads from the first 8 bytes at a place to the sizes of keys that begin so, a second
    one from the first 16 to the same; what both let pass is looked up by its whole key.
    """

    def __init__(self, needles: Needles) -> None:
        strings = {string for kept in needles.groups.values() for string in kept}
        self._keys = [key for key in KEYS if any(len(string) >= key for string in strings)]
        self._tables = np.zeros((2, 2**_TABLE_BITS), dtype=np.uint8)
        self._own: dict[int, tuple[NDArray[Any], list[bytes]]] = {}
        for bit, key in enumerate(self._keys):
            above = 2 * key if key < KEYS[0] else 2**62
            own = [one for one in strings if key <= len(one) < above]
            words = np.frombuffer(b"".join(one[:key] for one in own), np.uint64)
            words = words.reshape(len(own), key // 8)
            hashes = _hash(words)
            order = np.argsort(hashes, kind="stable")
            self._own[key] = (hashes[order], [own[n] for n in order.tolist()])
            for table, places in zip(self._tables, _list_places(words), strict=False):
                table[places] |= np.uint8(1 << bit)

    def find(self, data: bytes) -> set[bytes]:
        """The needles that occur in some bytes."""
        found: set[bytes] = set()
        padded = data + bytes(KEYS[0])
        # By key: whether strings that begin with it are still to be found.
        missing = {key: np.ones(len(own), np.bool_) for key, (_, own) in self._own.items()}
        for begin in range(0, len(data) - KEYS[-1] + 1, _CHUNK):
            chunk = np.frombuffer(padded, np.uint8)[begin : begin + _CHUNK + KEYS[0]]
            for offset in range(8):
                words = chunk[offset : offset + (len(chunk) - offset) // 8 * 8].view(np.uint64)
                inside = len(words) - KEYS[0] // 8 + 1
                begun = self._tables[0][_place(words[:inside])]
                likely = np.flatnonzero(begun)
                begun = begun[likely]
                for bit, key in enumerate(self._keys):
                    chosen = likely[(begun & np.uint8(1 << bit)) != 0]
                    if key > 8 and len(chosen):
                        second = self._tables[1][_place(_mix(words[chosen], words[chosen + 1]))]
                        chosen = chosen[(second & np.uint8(1 << bit)) != 0]
                    if len(chosen):
                        windows = words[chosen[:, None] + np.arange(key // 8)]
                        places = begin + offset + 8 * chosen
                        self._compare(key, data, places, windows, missing[key], found)
        return found

    def _compare(
        self,
        key: int,
        data: bytes,
        places: NDArray[Any],
        windows: NDArray[Any],
        missing: NDArray[np.bool_],
        found: set[bytes],
    ) -> None:
        """Compare whole strings at some of the places."""
        hashes, own = self._own[key]
        wanted = _hash(windows)
        first = np.searchsorted(hashes, wanted, side="left")
        first[first == len(hashes)] = 0
        for hit in np.flatnonzero((hashes[first] == wanted) & missing[first]).tolist():
            start, at = int(first[hit]), int(places[hit])
            if not missing[start]:
                continue
            are_missing = False
            for number in range(start, len(own)):
                if hashes[number] != wanted[hit]:
                    break
                if own[number] not in found:
                    if data.startswith(own[number], at):
                        found.add(own[number])
                    else:
                        are_missing = True
            missing[start] = are_missing


def _hash(words: NDArray[Any]) -> NDArray[np.uint64]:
    """One number for some words each, (N, W) -> (N,)."""
    total = words[:, 0] * _ODD[0]
    for number in range(1, words.shape[1]):
        total += words[:, number] * _ODD[number]
    return total


def _list_places(words: NDArray[Any]) -> list[NDArray[Any]]:
    """Where the first word, and the first two if there are, of each row lead."""
    places = [_place(words[:, 0])]
    if words.shape[1] > 1:
        places.append(_place(_mix(words[:, 0], words[:, 1])))
    return places


def _mix(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.uint64]:
    return np.asarray(first * _ODD[0] + second * _ODD[1], np.uint64)


def _place(words: NDArray[Any]) -> NDArray[Any]:
    """Where in a table words lead, (N,) -> (N,)."""
    mixed = words * _ODD[8]
    mixed ^= mixed >> np.uint64(29)
    mixed *= _ODD[8]
    mixed >>= np.uint64(64 - _TABLE_BITS)
    return mixed.view(np.int64)


def search(index: Index, data: bytes, *, deep: bool = True) -> dict[str, set[bytes]]:
    """What is found in a stream, by the way it was packed; "raw" is the stream itself.

    Args:
        index: What is looked for.
        data: The stream.
        deep: Whether to try bare deflate where the stream is short enough.
    """
    found: dict[str, set[bytes]] = {}
    for how, unpacked in unpack(data, deep=deep):
        found.setdefault(how, set()).update(index.find(unpacked))
    return {how: strings for how, strings in found.items() if strings}


def unpack(data: bytes, *, deep: bool = True, _depth: int = 0) -> Iterator[tuple[str, bytes]]:
    """A stream, and everything that it can be unpacked to, with how: "gzip > base64" and so on."""
    yield "raw", data
    if _depth == _DEPTH:
        return
    parts = [("hex", _read_hex(data)), ("base64", _read_base64(data)), *_join(_inflate(data))]
    if deep and len(data) <= DEEP_BYTES:
        parts += _join(("deflate", inflated) for inflated in _find_deflate(data))
    seen: set[bytes] = {data}
    for how, part in parts:
        if len(part) < KEYS[-1] or part in seen:
            continue
        seen.add(part)
        for inner, unpacked in unpack(part, deep=deep and how != "deflate", _depth=_depth + 1):
            yield how if inner == "raw" else f"{how} > {inner}", unpacked


def _join(parts: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Small parts put together up to `DEEP_BYTES`: marks are frequent, and mostly by chance."""
    waiting: dict[str, bytearray] = {}
    for how, part in parts:
        several = waiting.setdefault(how, bytearray())
        if several and len(several) + len(_GAP) + len(part) > DEEP_BYTES:
            yield how, bytes(several)
            several.clear()
        several += (_GAP if several else b"") + part
    yield from ((how, bytes(several)) for how, several in waiting.items() if several)


def _list_runs(data: bytes, pattern: "re.Pattern[bytes]", least: int) -> list[bytes]:
    """What `findall` gives, looked for only where a run of so many digits begins."""
    digits = np.array([pattern.match(bytes([n]) * least) is not None for n in range(256)])
    inside = np.zeros(len(data) + 2, np.bool_)
    inside[1:-1] = digits[np.frombuffer(data, np.uint8)]
    borders = np.flatnonzero(inside[1:] != inside[:-1])
    starts = borders[::2][borders[1::2] - borders[::2] >= least]
    runs = []
    end = 0
    for start in starts.tolist():
        if start >= end and (match := pattern.match(data, start)):
            runs.append(match.group())
            end = match.end()
    return runs


def _read_hex(data: bytes) -> bytes:
    """All runs of hexadecimal digits, at both ways to pair them."""
    parts = []
    for run in _list_runs(data, _HEX, HEX_LEAST):
        for start in (0, 1):
            parts.append(bytes.fromhex(run[start : len(run) - (len(run) - start) % 2].decode()))
    return _GAP.join(parts)


def _read_base64(data: bytes) -> bytes:
    """All runs of base64 digits, from each of the four places where a group may begin."""
    parts = []
    for run in _list_runs(data, _BASE64, BASE64_LEAST):
        digits = run.translate(_FROM_URLSAFE, b"\r\n")
        for start in range(4):
            end = len(digits) - ((len(digits) - start) % 4 == 1)  # a single digit holds no byte
            parts.append(binascii.a2b_base64(digits[start:end] + b"=" * (-(end - start) % 4)))
    return _GAP.join(parts)


def _inflate(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Everything in a stream that a mark says to be compressed, and that can be unpacked."""
    for how, mark in _MARKS.items():
        at = data.find(mark)
        while at >= 0:
            if inflated := _run_at(how, data, at):
                yield how, inflated
            at = data.find(mark, at + 1)
    array = np.frombuffer(data, np.uint8)
    places = np.flatnonzero(array[:-1] & 0x8F == 8)
    marks = array[places].astype(np.uint16) << 8 | array[places + 1]
    for at in places[_IS_ZLIB[marks]].tolist():
        if inflated := _run(zlib.decompressobj(15), data, at):
            yield "zlib", inflated


def _run_at(how: str, data: bytes, at: int) -> bytes:
    """What a mark at a place leads to."""
    if how == "gzip":
        return _run(zlib.decompressobj(31), data, at)
    if how == "bzip2":
        return _run(bz2.BZ2Decompressor(), data, at)
    if how == "xz":
        return _run(lzma.LZMADecompressor(), data, at)
    if how == "zstd":
        return _run_zstd(data, at)
    name, extra = (int.from_bytes(data[at + n : at + n + 2], "little") for n in (26, 28))
    return _run(zlib.decompressobj(-15), data, at + 30 + name + extra)


def _run(decompressor: Any, data: bytes, at: int) -> bytes:
    """What comes out before the end or the first error."""
    out = b""
    try:
        while not decompressor.eof and at < len(data) and len(out) < MAX_INFLATED:
            piece, at = data[at : at + 4_096], at + 4_096
            out += decompressor.decompress(piece, MAX_INFLATED)
    except (zlib.error, OSError, EOFError, lzma.LZMAError):
        pass
    return out


def _run_zstd(data: bytes, at: int) -> bytes:
    """The same for zstd, if there is a reader of it; nothing otherwise."""
    try:
        import zstandard
    except ImportError:
        return b""
    try:
        reader = zstandard.ZstdDecompressor().decompressobj()
        return bytes(reader.decompress(data[at : at + MAX_INFLATED]))
    except zstandard.ZstdError:
        return b""


def _find_deflate(data: bytes) -> Iterator[bytes]:
    """Bare deflate streams that come to their end, from every offset."""
    view = memoryview(data)
    for at in range(max(0, len(data) - 8)):
        if data[at] & 6 == 6:  # no such type of block
            continue
        try:
            begun = zlib.decompressobj(-15)
            begun.decompress(view[at : at + 32])
        except zlib.error:
            continue
        whole = zlib.decompressobj(-15)
        with contextlib.suppress(zlib.error):
            inflated = whole.decompress(view[at:], MAX_INFLATED)
            if whole.eof and len(inflated) > 16:
                yield inflated


def list_bodies(stream: bytes) -> list[bytes]:
    """Bodies of the HTTP/1.1 messages that one direction of a connection carried.

    Chunks are put together and content encodings undone. Bytes that are no such message come back
    as one more body; of one that was cut off there is what has come.
    """
    bodies = []
    at = 0
    while at < len(stream):
        end = stream.find(b"\r\n\r\n", at)
        first, *lines = stream[at : max(at, end)].split(b"\r\n")
        if b"HTTP/1." not in first:
            return [*bodies, stream[at:]]
        fields = {
            name.strip().lower(): value.strip().lower()
            for name, _, value in (line.partition(b":") for line in lines)
        }
        at = end + 4
        if b"chunked" in fields.get(b"transfer-encoding", b""):
            body, at = _join_chunks(stream, at)
        elif b"content-length" in fields:
            length = int(fields[b"content-length"])
            body, at = stream[at : at + length], at + length
        else:
            body = b""
        if body:
            bodies.append(_undo(fields.get(b"content-encoding", b""), body))
    return bodies


def _join_chunks(stream: bytes, at: int) -> tuple[bytes, int]:
    """A body of chunks from a place on, and the place behind it."""
    parts = []
    while at < len(stream):
        end = stream.find(b"\r\n", at)
        length = int(stream[at : max(at, end)].partition(b";")[0] or b"0", 16)
        if length == 0:
            end = stream.find(b"\r\n\r\n", at)  # behind trailers, if there are any
            return b"".join(parts), len(stream) if end < 0 else end + 4
        parts.append(stream[end + 2 : end + 2 + length])
        at = end + 2 + length + 2
    return b"".join(parts), len(stream)


def _undo(encoding: bytes, body: bytes) -> bytes:
    if encoding in (b"gzip", b"x-gzip"):
        return _run(zlib.decompressobj(31), body, 0) or body
    if encoding == b"deflate":
        return _run(zlib.decompressobj(15), body, 0) or _run(zlib.decompressobj(-15), body, 0)
    return body
