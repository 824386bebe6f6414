"""One HTTP request and its answer: a bounded body, JSON or server-sent events, refusals."""

import asyncio
import json
import math
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from molora_fed.serving.requests import ApiError

__all__ = ["Exchange", "GoneError", "dump"]

Result = TypeVar("Result")

_DRAIN_BYTES = 65_536  # of a body that is refused, so much is read before the answer
_DRAIN_SECONDS = 1.0  # for so long


class GoneError(Exception):
    """The client went."""


def dump(value: Any) -> bytes:
    """JSON of one line; what is no Unicode becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class Exchange:
    """One request and its answer.

    Attributes:
        status: Of the answer; 0 before there is one.
        usage: Tokens, for the log.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = Headers(scope=scope)
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        host, port = scope.get("client") or ("", 0)
        self.address = (str(host), int(port))
        self.status = 0
        self.usage = ""
        self._receive = receive
        self._send = send
        self._scope = scope
        self._is_stream = False
        self._has_body = False

    @property
    def host(self) -> str:
        """The name it was asked under, without a port."""
        host = self.headers.get("host", "")
        name, separator, port = host.rpartition(":")
        return (name if separator and port.isdigit() else host).strip("[]").lower()

    def check_method(self, method: str) -> None:
        """Refuse other methods.

        Raises:
            ApiError: If it is another one.
        """
        if self.method != method:
            raise ApiError(405, f"Expected {method}.", code="method_not_allowed")

    async def read_body(self, largest: int) -> bytes:
        """The body, counted while it comes.

        Raises:
            ApiError: If it is larger.
        """
        too_large = ApiError(
            413, f"Expected a body of at most {largest} bytes.", code="request_too_large"
        )
        announced = self.headers.get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced[:18]) > largest:
            raise too_large
        parts, total, more = [], 0, True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                raise GoneError
            parts.append(message.get("body", b""))
            total += len(parts[-1])
            if total > largest:
                raise too_large
            more = message.get("more_body", False)
        self._has_body = True
        return b"".join(parts)

    async def while_connected(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do something for a client; when it goes, that ends.

        Raises:
            GoneError: If it went.
        """
        working = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._wait_until_gone())
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise GoneError
            return await working
        finally:
            for task in (working, gone):
                task.cancel()
            await asyncio.gather(working, gone, return_exceptions=True)

    async def _wait_until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        """A whole answer in JSON."""
        await self.send_whole(dump(value), "application/json", status, **headers)

    async def send_whole(self, body: bytes, sort: str, status: int = 200, **headers: str) -> None:
        """A whole answer."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = Response(body, status, named, media_type=sort)
        self.status = status
        await response(self._scope, self._receive, self._send)

    async def send_events(self, *events: bytes) -> None:
        """Server-sent events, in one piece."""
        if not self.status:
            self.status, self._is_stream = 200, True
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
            start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
            await self._send(start)
        body = b"".join(b"data: " + data + b"\n\n" for data in events)
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end_events(self) -> None:
        """No event follows."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error: as the answer, or as the last event of a stream."""
        if self._is_stream:
            self.status = error.status
            await self.send_events(dump(error.as_body()))
            await self.end_events()
            return
        if self.status:
            return
        headers: dict[str, str] = {}
        if error.retry_seconds is not None:
            headers["retry_after"] = str(math.ceil(error.retry_seconds))
        if error.status == 401:
            headers["www_authenticate"] = "Bearer"
        if not self._has_body and self.method not in ("GET", "HEAD"):
            # A client that is still sending when the connection closes does not see the answer.
            with suppress(ApiError, GoneError, TimeoutError):
                async with asyncio.timeout(_DRAIN_SECONDS):
                    await self.read_body(_DRAIN_BYTES)
            if not self._has_body:
                headers["connection"] = "close"  # what is left of the body is not read
        await self.send_json(error.as_body(), error.status, **headers)
