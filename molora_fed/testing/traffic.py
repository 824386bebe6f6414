"""What crosses a line between a contributor and its server, and whether it holds text."""

import contextlib
import socket
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["RecordingLine", "find_text", "find_tokens"]

_KINDS = ("<u2", ">u2", "<i4", ">i4", "<i8", ">i8")
_SEPARATORS = (",", ", ", " ")


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
        texts: Documents; each is cut into pieces one after the other.
        length: Characters of a piece. Any stretch of twice as many holds a whole one.
    """
    pieces = {
        text[start : start + length].encode()
        for text in texts
        for start in range(0, len(text) - length + 1, length)
    }
    return [piece for stream in streams for piece in pieces if piece in stream]


def find_tokens(streams: Sequence[bytes], tokens: NDArray[Any], *, length: int = 6) -> list[bytes]:
    """Stretches of token ids that occur in recorded bytes.

    As integers of 2, 4 or 8 bytes in either byte order at any place, or written as decimal
    numbers behind each other with commas or blanks.

    Args:
        streams: What was recorded.
        tokens: Token ids of any shape; cut into stretches one after the other.
        length: Ids of a stretch. Any run of twice as many holds a whole one.
    """
    flat = np.asarray(tokens).reshape(-1)
    rows = flat[: len(flat) // length * length].reshape(-1, length)
    # A run of one id, such as padding zeros, is no text and is everywhere.
    rows = np.unique(rows[(rows != rows[:, :1]).any(axis=1)], axis=0)
    found: list[bytes] = []
    for kind in _KINDS:
        found += _find_arrays(streams, rows.astype(kind))
    for separator in _SEPARATORS:
        written = [separator.join(map(str, row)).encode() for row in rows.tolist()]
        found += [text for stream in streams for text in written if text in stream]
    return found


def _find_arrays(streams: Sequence[bytes], rows: NDArray[Any]) -> list[bytes]:
    size = rows.itemsize * rows.shape[1]
    wanted = {row.tobytes() for row in rows}
    found = []
    for stream in streams:
        for offset in range(rows.itemsize):
            numbers = np.frombuffer(stream, np.uint8)[offset:]
            numbers = numbers[: len(numbers) // rows.itemsize * rows.itemsize].view(rows.dtype)
            for place in np.flatnonzero(np.isin(numbers, rows[:, 0])):
                start = offset + int(place) * rows.itemsize
                if stream[start : start + size] in wanted:
                    found.append(stream[start : start + size])
    return found
