"""What crosses a line between a contributor and its server, and whether it holds text."""

import contextlib
import re
import socket
import sys
import threading
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["RecordingLine", "find_text", "find_tokens"]

_KINDS = ("<u2", ">u2", "<i4", ">i4", "<i8", ">i8")
_NUMBERS = re.compile(rb"\d{1,9}(?:[,\s]{1,3}\d{1,9}){3,}")
_NUMBER = re.compile(rb"\d+")
_FEWEST_CHARACTERS = 5
_FEWEST_IDS = 3


class RecordingLine:
    """Listens on a port of its own and passes everything on to another, keeping a copy.

    A context manager; connections of the server that is not up yet are closed at once.

    Args:
        target: Port of the server, on this machine.

    Attributes:
        port: Where the contributor connects.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sent: list[bytearray] = []
        self._received: list[bytearray] = []
        self._sockets = [self._listener]

    def __enter__(self) -> Self:
        """Begin to pass on."""
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Close every connection."""
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    @property
    def sent(self) -> list[bytes]:
        """What the contributor sent so far, by connection."""
        return [bytes(stream) for stream in self._sent]

    @property
    def received(self) -> list[bytes]:
        """What it received so far, by connection."""
        return [bytes(stream) for stream in self._received]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                self._sockets += [near, far]
                self._start(near, far, self._sent)
                self._start(far, near, self._received)

    def _start(self, source: socket.socket, sink: socket.socket, kept: list[bytearray]) -> None:
        stream = bytearray()
        kept.append(stream)
        threading.Thread(target=_pump, args=(source, sink, stream), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, stream: bytearray) -> None:
    """Pass on until one side closes."""
    with contextlib.suppress(OSError):
        while piece := source.recv(2**16):
            stream += piece
            sink.sendall(piece)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def find_text(streams: Sequence[bytes], texts: Iterable[str], *, length: int = 24) -> list[bytes]:
    """Pieces of texts that occur in recorded bytes.

    Args:
        streams: What was recorded.
        texts: Documents; each is cut into pieces one after the other. Pieces of fewer than five
            different characters, such as rules of dashes, tell nothing and are left out.
        length: Characters of a piece, 8 at least. Any stretch of twice as many holds a whole one.
    """
    pieces = {
        text[start : start + length].encode()
        for text in texts
        for start in range(0, len(text) - length + 1, length)
        if len(set(text[start : start + length])) >= _FEWEST_CHARACTERS
    }
    return _find_pieces(streams, pieces)


def find_tokens(streams: Sequence[bytes], tokens: NDArray[Any], *, length: int = 6) -> list[bytes]:
    """Stretches of token ids that occur in recorded bytes.

    As integers of 2, 4 or 8 bytes in either byte order at any place, or written as decimal
    numbers behind each other with commas or blanks.

    Args:
        streams: What was recorded.
        tokens: Token ids of any shape; cut into stretches one after the other. Stretches of fewer
            than three different ids, such as padding, tell nothing and are left out, and so are
            those that begin with id 0, as every run of zeros does.
        length: Ids of a stretch, 4 at least. Any run of twice as many holds a whole one.
    """
    flat = np.asarray(tokens).reshape(-1)
    rows = np.unique(flat[: len(flat) // length * length].reshape(-1, length), axis=0)
    ordered = np.sort(rows, axis=1)
    several = (np.diff(ordered, axis=1) > 0).sum(axis=1) + 1 >= _FEWEST_IDS
    rows = rows[several & (rows[:, 0] != 0)]
    pieces = {row.tobytes() for kind in _KINDS for row in rows.astype(kind)}
    wanted = set(map(tuple, rows.tolist()))
    found = _find_pieces(streams, pieces)
    for stream in streams:
        for run in _NUMBERS.findall(stream):
            numbers = [int(number) for number in _NUMBER.findall(run)]
            windows = zip(*(numbers[start:] for start in range(length)), strict=False)
            found += [str(window).encode() for window in windows if window in wanted]
    return found


def _find_pieces(streams: Sequence[bytes], pieces: AbstractSet[bytes]) -> list[bytes]:
    """Which of some byte strings of 8 bytes at least occur; by their first 8 bytes, then whole."""
    known = {int.from_bytes(piece[:8], sys.byteorder) for piece in pieces}
    starts = np.array(sorted(known), dtype=np.uint64)
    lengths = sorted({len(piece) for piece in pieces})
    found: list[bytes] = []
    for stream in streams if pieces else ():  # of which there may be thousands
        for offset in range(min(8, max(0, len(stream) - 7))):
            words = np.frombuffer(stream, np.uint64, (len(stream) - offset) // 8, offset)
            places = np.searchsorted(starts, words)
            places[places == len(starts)] = 0
            for place in np.flatnonzero(starts[places] == words).tolist():
                begin = offset + 8 * place
                cuts = (stream[begin : begin + length] for length in lengths)
                found += [cut for cut in cuts if cut in pieces]
    return found
