"""A line between a contributor and its server that keeps every byte that crosses it."""

import contextlib
import socket
import threading

import numpy as np


class Line:
    """Listens on a port of its own and passes everything on to another; a context manager.

    Attributes:
        port: Where to connect.
    """

    def __init__(self, target):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._streams = []
        self._open = [self._listener]

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception):
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    @property
    def streams(self):
        """Bytes of each connection and direction so far."""
        return [bytes(stream) for stream in self._streams]

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()  # the server is not up
                    continue
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    kept = bytearray()
                    self._streams.append(kept)
                    pair = (source, sink, kept)
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source, sink, kept):
        with contextlib.suppress(OSError):
            while piece := source.recv(2**16):
                kept += piece
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def find_text(streams, texts, *, length=24):
    """Stretches of so many characters of the texts that occur in the bytes."""
    pieces = {
        text[start : start + length].encode()
        for text in texts
        for start in range(0, len(text) - length + 1, length)
    }
    return [piece for stream in streams for piece in pieces if piece in stream]


def find_tokens(streams, blocks, *, length=6):
    """Stretches of so many token ids of blocks that occur in the bytes.

    As numbers of 2, 4 or 8 bytes in either order at any place, or as JSON.
    """
    rows = blocks.reshape(-1)
    rows = rows[: len(rows) // length * length].reshape(-1, length)
    found = []
    for kind in ("<u2", ">u2", "<i4", ">i4", "<i8", ">i8"):
        found += _find_arrays(streams, rows.astype(kind))
    for separator in (",", ", ", " "):
        texts = [separator.join(map(str, row)).encode() for row in rows.tolist()]
        found += [text for stream in streams for text in texts if text in stream]
    return found


def _find_arrays(streams, rows):
    size = rows.itemsize * rows.shape[1]
    wanted = {row.tobytes() for row in rows}
    found = []
    for stream in streams:
        for offset in range(rows.itemsize):
            whole = (len(stream) - offset) // rows.itemsize * rows.itemsize
            numbers = np.frombuffer(stream, rows.dtype, whole // rows.itemsize, offset)
            for place in np.flatnonzero(np.isin(numbers, rows[:, 0])):
                start = offset + int(place) * rows.itemsize
                if stream[start : start + size] in wanted:
                    found.append(stream[start : start + size])
    return found
