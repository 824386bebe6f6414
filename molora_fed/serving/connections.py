"""The server's connections: how many are kept, and for how long one may say nothing.

uvicorn waits for ever for a request's first byte. Here a connection that has not sent a whole head
in time is closed, and if there are too many, the oldest that never showed a member's key goes.
"""

import asyncio
import resource
import socket
import ssl
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from molora_fed.serving.refusals import OnRefusal, ignore_refusal

__all__ = ["Doorkeeper", "build_server", "run_server"]

MAX_CONNECTIONS = 512
MAX_HANDSHAKES = 512
HEAD_SECONDS = 10.0
HANDSHAKE_SECONDS = 10.0
_OPEN_FILES = 8_192


class Doorkeeper:
    """Knows the open connections, oldest first, and which of them belong to members.

    Args:
        most: Connections kept at once.
        head_seconds: How long a connection may take until a request's head is complete.
        on_refusal: Told of each connection that is closed unasked.
    """

    def __init__(
        self,
        *,
        most: int = MAX_CONNECTIONS,
        head_seconds: float = HEAD_SECONDS,
        on_refusal: OnRefusal = ignore_refusal,
    ) -> None:
        self.most = most
        self.head_seconds = head_seconds
        self._on_refusal = on_refusal
        self._open: dict[tuple[str, int], Connection] = {}

    def welcome(self, address: tuple[str, int]) -> None:
        """Note that a connection has shown a member's key."""
        connection = self._open.get(address)
        if connection is not None:
            connection.is_member = True

    def drop(self, address: tuple[str, int]) -> None:
        """End the connection of an address that does not read what it asked for."""
        connection = self._open.get(address)
        if connection is not None:
            self.close(connection, "Closed: it does not read its answer")

    def add(self, connection: "Connection") -> None:
        """Take in a new connection; if there are too many, an old one goes."""
        address = connection.client or ("", id(connection))
        self._open[address] = connection
        if len(self._open) > self.most:
            strangers = (a for a, one in self._open.items() if not one.is_member)
            oldest = next(strangers, address)
            self.close(self._open.pop(oldest), f"Closed: more than {self.most} connections")

    def close(self, connection: "Connection", reason: str) -> None:
        """End a connection that did nothing for it."""
        host, _ = connection.client or ("", 0)
        self._on_refusal(host, "", 0, reason)
        connection.transport.abort()

    def remove(self, connection: "Connection") -> None:
        """Forget a connection that is closed."""
        address = connection.client or ("", id(connection))
        if self._open.get(address) is connection:
            del self._open[address]

    def __len__(self) -> int:
        return len(self._open)


class Connection(H11Protocol):
    """One connection; `doorkeeper` is set on a subclass, because uvicorn makes the instances."""

    doorkeeper: Doorkeeper

    def connection_made(self, transport: Any) -> None:
        """Start the time within which a request has to come."""
        super().connection_made(transport)
        self.is_member = False
        self._waiting: asyncio.TimerHandle | None = None
        self._wait()
        self.doorkeeper.add(self)

    def data_received(self, data: bytes) -> None:
        """Take bytes in; the time runs on until they make up a head."""
        cycle = self.cycle
        super().data_received(data)
        if self.cycle is not cycle:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None
        elif self._waiting is None and (cycle is None or cycle.response_complete):
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        if self._waiting is not None:
            self._waiting.cancel()
        self.doorkeeper.remove(self)
        super().connection_lost(exc)

    def _wait(self) -> None:
        seconds = self.doorkeeper.head_seconds
        reason = f"Closed: no whole request within {seconds:g} s"
        self._waiting = self.loop.call_later(seconds, self.doorkeeper.close, self, reason)


class _Loop(asyncio.SelectorEventLoop):
    """Gives up on TLS handshakes sooner than after a minute, and on the oldest if there are many.

    One that is under way takes a quarter of a megabyte, and nothing is known of it yet.
    """

    def __init__(self, on_refusal: OnRefusal) -> None:
        super().__init__()
        self._on_refusal = on_refusal
        self._handshakes: deque[weakref.ref[Any]] = deque()

    def _make_ssl_transport(self, *args: Any, **options: Any) -> Any:
        make: Callable[..., Any] = super()._make_ssl_transport  # type: ignore[misc]
        transport = weakref.ref(made := make(*args, **options))
        late = f"Closed: no TLS handshake within {HANDSHAKE_SECONDS:g} s"
        self.call_later(HANDSHAKE_SECONDS, self._give_up, transport, late)
        self._handshakes.append(transport)
        if len(self._handshakes) > MAX_HANDSHAKES:
            many = f"Closed: more than {MAX_HANDSHAKES} TLS handshakes at once"
            self._give_up(self._handshakes.popleft(), many)
        return made

    def _give_up(self, reference: "weakref.ref[Any]", reason: str) -> None:
        """End a connection that has no TLS yet."""
        transport = reference()
        if transport is None or transport.is_closing() or transport.get_extra_info("ssl_object"):
            return
        host, *_ = transport.get_extra_info("peername") or ("",)
        self._on_refusal(str(host), "", 0, reason)
        transport.abort()


def build_server(
    app: Any,
    *,
    host: str,
    port: int,
    doorkeeper: Doorkeeper,
    certificate: tuple[str, str] | None = None,
    finish_seconds: int = 3,
) -> uvicorn.Server:
    """A server of an ASGI application; `run_server` serves.

    Args:
        app: The application.
        host: Address to listen on.
        port: Port to listen on.
        doorkeeper: Limits on connections.
        certificate: PEM files of certificate chain and key, for TLS 1.3; None serves plain HTTP.
        finish_seconds: How long requests under way may go on when the server ends.

    Returns:
        The server; its `config.ssl` is the TLS context, into which a renewed certificate can be
        loaded.
    """
    chain, key = certificate or (None, None)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=type("_Connection", (Connection,), {"doorkeeper": doorkeeper}),
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=75,  # above the longest pause of a node, 3 s, by far
        timeout_graceful_shutdown=finish_seconds,
        ssl_certfile=chain,
        ssl_keyfile=key,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return uvicorn.Server(config)


def run_server(
    server: uvicorn.Server,
    on_refusal: OnRefusal = ignore_refusal,
    *,
    sockets: list[socket.socket] | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or `server.should_exit`.

    Args:
        server: As `build_server` makes it.
        on_refusal: Told of each connection that is closed before it has TLS.
        sockets: Bound ones to listen on, in place of the server's host and port.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _OPEN_FILES)), hard))
    with asyncio.Runner(loop_factory=lambda: _Loop(on_refusal)) as runner:
        runner.run(server.serve(sockets))
