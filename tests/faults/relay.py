"""A line between contributors and a server that can be cut, fall silent, be slow, or repeat itself.

A TCP proxy in a thread of its own. Without TLS it also reads requests, and sends some of them
again: at once, or later and after others, as a network may do it.
"""

import asyncio
import contextlib
import random
import threading
from collections import deque

__all__ = ["Relay"]

KEPT_REQUESTS = 40
LATEST_SECONDS = 3.0
REPEATED_SHARE = 0.3
PIECE_BYTES = 65_536


class _Line:
    """One connection; a dead one passes nothing on for ever, and nobody is told."""

    def __init__(self, writer):
        self.writers = [writer]
        self.is_dead = False

    def abort(self):
        for writer in self.writers:
            writer.transport.abort()


class Relay:
    """Passes connections on to a port of this machine; a context manager.

    Args:
        target_port: The port.
        seed: Of what is drawn.
        reads_requests: Whether what is said is HTTP without TLS, so that it can be said again.

    Attributes:
        port: Where it listens.
        num_repeated: Requests sent again so far.
    """

    def __init__(self, target_port, seed=0, *, reads_requests=False):
        self.port = 0
        self.num_repeated = 0
        self._target_port = target_port
        self._reads_requests = reads_requests
        self._chance = random.Random(seed)
        self._mode = "open"
        self._delay_seconds = 0.0
        self._repeats = False
        self._lines = set()
        self._tasks = set()
        self._requests = deque(maxlen=KEPT_REQUESTS)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(timeout=20), "the relay did not start"
        return self

    def __exit__(self, *exception):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=20)

    def cut(self):
        """Reset every connection, and each that is tried."""
        self._do(self._end_lines, "cut")

    def silence(self):
        """Let every connection die without a word, and each that is opened."""
        self._do(self._end_lines, "silent")

    def slow_down(self, seconds):
        """Let each piece of data take so long."""
        self._do(setattr, self, "_delay_seconds", seconds)

    def repeat(self):
        """Send requests again: at once, or later and out of order."""
        self._do(setattr, self, "_repeats", True)

    def restore(self):
        """Pass everything on again; what died stays dead."""
        for name, value in (("_mode", "open"), ("_delay_seconds", 0.0), ("_repeats", False)):
            self._do(setattr, self, name, value)

    def _do(self, action, *values):
        self._loop.call_soon_threadsafe(action, *values)

    def _end_lines(self, mode):
        self._mode = mode
        for line in list(self._lines):
            line.is_dead = True
            if mode == "cut":
                line.abort()

    def _run(self):
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(
                lambda *streams: self._start(self._accept(*streams)), "127.0.0.1", 0, limit=2**20
            )
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        try:
            self._loop.run_forever()
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
            self._loop.close()

    def _start(self, work):
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, reader, writer):
        line = _Line(writer)
        if self._mode == "cut":
            line.abort()
            return
        line.is_dead = self._mode == "silent"
        self._lines.add(line)
        try:
            there, onward = await asyncio.open_connection("127.0.0.1", self._target_port)
            line.writers.append(onward)
            send = self._pass_requests if self._reads_requests else self._pass_on
            async with asyncio.TaskGroup() as group:
                group.create_task(send(reader, onward, line))
                group.create_task(self._pass_on(there, writer, line))
        except* (OSError, EOFError):
            pass
        finally:
            self._lines.discard(line)
            line.abort()

    async def _pass_on(self, reader, writer, line):
        while data := await reader.read(PIECE_BYTES):
            if self._delay_seconds:
                await asyncio.sleep(self._delay_seconds)
            if line.is_dead:
                continue
            writer.write(data)
            await writer.drain()
        if line.is_dead:
            await asyncio.Event().wait()  # until somebody gives up
        raise EOFError

    async def _pass_requests(self, reader, writer, line):
        """Pass whole requests on, and some of them again on connections of their own."""
        while True:
            request = await _read_request(reader)
            await asyncio.sleep(self._delay_seconds)
            if line.is_dead:
                await asyncio.Event().wait()
            writer.write(request)
            await writer.drain()
            if not self._repeats:
                continue
            self._requests.append(request)
            for kept, latest in ((request, 0.0), (self._chance.choice(self._requests), 1.0)):
                if self._chance.random() < REPEATED_SHARE:
                    pause = latest * self._chance.uniform(0.0, LATEST_SECONDS)
                    self._start(self._send_again(kept, pause))

    async def _send_again(self, request, pause):
        await asyncio.sleep(pause)
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._target_port)
            try:
                writer.write(request)
                await asyncio.wait_for(reader.read(PIECE_BYTES), timeout=30)
                self.num_repeated += 1
            finally:
                writer.transport.abort()


async def _read_request(reader):
    """The bytes of one request.

    Raises:
        EOFError: If there is none any more.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        lengths = [
            int(value)
            for name, _, value in (line.partition(b":") for line in head.split(b"\r\n"))
            if name.lower() == b"content-length"
        ]
        return head + (await reader.readexactly(lengths[0]) if lengths else b"")
    except asyncio.IncompleteReadError as error:
        raise EOFError from error
