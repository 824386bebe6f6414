"""What stands between the network and the fleet's interface: who may ask what, how much, how long.

Everything is decided from a request's head, before a byte of its body is read: the host it names,
its path, the key it shows. Bodies are counted while they come, because Flower holds each one in
memory.
"""

import asyncio
import json
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molora_fed.serving.refusals import OnRefusal, ignore_refusal
from molora_fed.storage.untrusted import clean, parse_json

__all__ = ["INVITATION_BYTES", "INVITATION_PATH", "Gateway", "Limits", "Refusal"]

INVITATION_PATH = "/v1/invitation"
INVITATION_BYTES = 4_096
_DETAIL_BYTES = 4_096
_PUSH_MESSAGE, _PUSH_OBJECT = "/v1/fleet/push-messages", "/v1/fleet/push-object"


class Refusal(Exception):
    """A request that is not answered as it hoped.

    Args:
        status: HTTP status.
        reason: One line for who asked.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    """What one member, and one address that is no member, may ask for.

    Attributes:
        member_rate: Requests a second of a member, in the long run.
        member_burst: Requests of a member in a row; a message of many small files takes thousands.
        member_at_once: Requests of a member at the same time.
        stranger_rate: Requests a second of an address without a known key, in the long run.
        stranger_burst: Such requests in a row.
        reply_bytes: Bytes of one reply of a member.
        request_seconds: Longest time from a request's head to the end of its answer.
        stranger_seconds: The same for an invitation.
    """

    member_rate: float = 100.0
    member_burst: float = 4_000.0
    member_at_once: int = 8
    stranger_rate: float = 1.0
    stranger_burst: float = 20.0
    reply_bytes: int = 80 * 2**20
    request_seconds: float = 180.0
    stranger_seconds: float = 10.0


class _Buckets:
    """How many requests each key has left; the least recent keys are forgotten."""

    _MOST = 10_000

    def __init__(self, rate: float, burst: float, now: Callable[[], float]) -> None:
        self._rate, self._burst, self._now = rate, burst, now
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str) -> None:
        """Use one.

        Raises:
            Refusal: If none is left.
        """
        now = self._now()
        left, since = self._left.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        self._left[key] = (max(left - 1.0, 0.0), now)
        if len(self._left) > self._MOST:
            self._left.popitem(last=False)
        if left < 1.0:
            raise Refusal(429, "Too many requests")


class Gateway:
    """An ASGI application that passes on what members may ask, and answers invitations itself.

    Args:
        fleet: The fleet's interface.
        bodies: Its paths, and the largest body of each, bytes.
        hosts: Names a request's Host may have, without port; a page of another site cannot then
            reach this server under a name of its own.
        identify: The id of the member whose key a request shows; empty for strangers. Whether it
            holds the key is checked behind.
        redeem: Answers an invitation's JSON with JSON; None takes no invitations. May raise a
            `Refusal`.
        on_member: Told the address of each request that shows a member's key.
        on_refusal: Told of each request that is refused, here or behind.
        limits: How much, how often, how long.
        now: Monotonic seconds.
    """

    def __init__(
        self,
        fleet: ASGIApp,
        *,
        bodies: Mapping[str, int],
        hosts: frozenset[str],
        identify: Callable[[Headers], str],
        redeem: Callable[[bytes], Awaitable[object]] | None = None,
        on_member: Callable[[tuple[str, int]], None] = lambda address: None,
        on_refusal: OnRefusal = ignore_refusal,
        limits: Limits | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._bodies = bodies
        self._hosts = hosts
        self._identify = identify
        self._redeem = redeem
        self._on_member = on_member
        self._on_refusal = on_refusal
        self._limits = limits = limits or Limits()
        self._members = _Buckets(limits.member_rate, limits.member_burst, now)
        self._strangers = _Buckets(limits.stranger_rate, limits.stranger_burst, now)
        self._uploaded: dict[str, int] = {}
        self._at_once: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        answer = _Answer(send)
        try:
            await self._answer(scope, receive, answer)
        except Refusal as refusal:
            await answer.refuse(scope, receive, refusal)
        except TimeoutError:
            await answer.refuse(scope, receive, Refusal(408, "Too slow"))
        finally:
            if answer.status >= 400:
                self._on_refusal(_address(scope)[0], scope["path"], answer.status, answer.reason)

    async def _answer(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        headers, path = Headers(scope=scope), scope["path"]
        if _strip_port(headers.get("host", "")) not in self._hosts:
            raise Refusal(421, "Not served under this name")
        if scope["method"] == "GET" and path == "/health":
            await Response(b"ok", media_type="text/plain")(scope, receive, answer.send)
        elif scope["method"] == "POST" and path == INVITATION_PATH and self._redeem is not None:
            await self._invite(scope, receive, answer)
        elif scope["method"] == "POST" and path in self._bodies:
            await self._pass_on(scope, receive, answer, headers)
        else:
            self._strangers.take(_address(scope)[0])
            raise Refusal(404, "Not served")

    async def _invite(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        assert self._redeem is not None
        self._strangers.take(_address(scope)[0])
        async with asyncio.timeout(self._limits.stranger_seconds):
            value = await self._redeem(await _read_body(scope, receive, INVITATION_BYTES))
        body = json.dumps(value).encode()
        await Response(body, media_type="application/json")(scope, receive, answer.send)

    async def _pass_on(
        self, scope: Scope, receive: Receive, answer: "_Answer", headers: Headers
    ) -> None:
        member, path = self._identify(headers), scope["path"]
        if not member:
            self._strangers.take(_address(scope)[0])
            raise Refusal(401, "Not a member")
        self._members.take(member)
        self._on_member(_address(scope))
        largest = self._bodies[path]
        if path == _PUSH_OBJECT:
            left = self._limits.reply_bytes - self._uploaded.get(member, 0)
            largest = max(0, min(largest, left))
        if self._at_once[member] >= self._limits.member_at_once:
            raise Refusal(429, "Too many requests at once")
        self._at_once[member] += 1
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                body = await _read_body(scope, receive, largest)
                if path == _PUSH_MESSAGE:
                    self._uploaded[member] = 0
                elif path == _PUSH_OBJECT:
                    self._uploaded[member] = self._uploaded.get(member, 0) + len(body)
                await self._fleet(scope, _replay(body, receive), answer.send)
        finally:
            self._at_once[member] -= 1
            if not self._at_once[member]:
                del self._at_once[member]


async def _read_body(scope: Scope, receive: Receive, largest: int) -> bytes:
    """A request's body, counted while it comes.

    Raises:
        Refusal: If it is larger than allowed, or breaks off.
    """
    announced = Headers(scope=scope).get("content-length", "0")
    if not (announced.isascii() and announced.isdigit() and len(announced) < 16):
        raise Refusal(400, "Expected a length")
    num_bytes, pieces, more = int(announced), [], True
    if num_bytes > largest:
        raise Refusal(413, f"Expected at most {largest} bytes")
    num_bytes = 0
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise Refusal(400, "Broken off")
        pieces.append(message.get("body", b""))
        num_bytes += len(pieces[-1])
        if num_bytes > largest:
            raise Refusal(413, f"Expected at most {largest} bytes")
        more = message.get("more_body", False)
    return b"".join(pieces)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand a body on that has been read."""
    given = False

    async def hand_on() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return hand_on


class _Answer:
    """Notes whether an answer has begun; after that nothing else can be said.

    Attributes:
        status: HTTP status of the answer, or of what it should have been; 0 before there is any.
        reason: Why the request was refused.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._began = False
        self.status = 0
        self.reason = ""

    async def send(self, message: Message) -> None:
        """Pass a piece of the answer on."""
        if message["type"] == "http.response.start":
            self._began, self.status = True, message["status"]
        elif self.status >= 400 and not self.reason:
            self.reason = _read_detail(message.get("body", b""))
        await self._send(message)

    async def refuse(self, scope: Scope, receive: Receive, refusal: Refusal) -> None:
        """Answer with a refusal, and close: what is left of the body is not read."""
        self.status, self.reason = refusal.status, refusal.reason
        if self._began:
            return
        body = json.dumps({"detail": refusal.reason}).encode()
        headers = {"connection": "close"}
        response = Response(body, refusal.status, headers, media_type="application/json")
        await response(scope, receive, self.send)


def _read_detail(body: bytes) -> str:
    """The reason in an answer of the fleet's interface."""
    try:
        detail = parse_json(body, max_bytes=_DETAIL_BYTES)["detail"]
    except (ValueError, KeyError, TypeError):
        return "Refused by the fleet's interface"
    return clean(detail)


def _strip_port(host: str) -> str:
    name, separator, port = host.rpartition(":")
    return (name if separator and port.isdigit() else host).strip("[]").lower()


def _address(scope: Scope) -> tuple[str, int]:
    host, port = scope.get("client") or ("", 0)
    return str(host), int(port)
