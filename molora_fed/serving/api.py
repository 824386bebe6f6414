"""The API as an ASGI application: who may ask, how much, how long, and in which form.

Everything that fails is an error in the form of OpenAI's. Prompts and answers are written nowhere.
"""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from starlette.types import Receive, Scope, Send

from molora_fed.errors import ConfigError
from molora_fed.inference.generate import Sampling
from molora_fed.serving.answers import Answer, build_answer
from molora_fed.serving.http_exchange import Exchange, GoneError, dump
from molora_fed.serving.metrics import CONTENT_TYPE, Metrics
from molora_fed.serving.models import ServedModel
from molora_fed.serving.requests import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    TextRequest,
    parse_request,
)
from molora_fed.serving.scheduler import (
    BusyError,
    Event,
    Failure,
    Generation,
    Piece,
    Scheduler,
    Ticket,
)
from molora_fed.storage.untrusted import clean, parse_json

__all__ = ["Api", "Limits", "is_loopback", "load_keys"]

MAX_KEYS = 10_000
SHORTEST_KEY = 16
USUAL_NEW_TOKENS = 16
"""Tokens of a completion that does not say how many, as with OpenAI."""
REFUSAL_SECONDS = 5.0
"""How long a client may take to read that its request failed."""
GONE = 499
"""Status that is counted where a client went before its answer."""


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for, and how long it may take.

    Attributes:
        body_bytes: Largest body.
        body_seconds: From a request's head to the end of its body.
        request_seconds: From a request's head to the end of its answer.
        prompt_tokens: Tokens of the longest prompt.
        new_tokens: Tokens added to one at most.
    """

    body_bytes: int = 2**20
    body_seconds: float = 15.0
    request_seconds: float = 300.0
    prompt_tokens: int = 4_096
    new_tokens: int = 1_024


def load_keys(file: Path) -> frozenset[bytes]:
    """SHA-256 of each key of a file, one a line; empty lines and those after # are left out.

    Raises:
        ConfigError: If the file cannot be read, has no key, or one that is short or not ASCII.
    """
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "text that is not ASCII"
        raise ConfigError(
            f"Cannot read API keys of '{file}': expected one a line, got {reason}. Correct it."
        ) from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    short = [number for number, key in enumerate(keys, 1) if len(key) < SHORTEST_KEY]
    if short or not 0 < len(keys) <= MAX_KEYS:
        got = f"key {short[0]} with fewer" if short else f"{len(keys)} keys"
        raise ConfigError(
            f"Cannot use API keys of '{file}': expected 1 to {MAX_KEYS} keys of at least "
            f"{SHORTEST_KEY} characters, got {got}. Make one with `openssl rand -hex 24`."
        )
    return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class Api:
    """An ASGI application that serves a model."""

    def __init__(
        self,
        model: ServedModel,
        scheduler: Scheduler,
        metrics: Metrics,
        *,
        fingerprint: str,
        limits: Limits,
        keys: frozenset[bytes] = frozenset(),
        any_host: bool = False,
        on_request: Callable[[tuple[str, int]], None] = lambda address: None,
        on_stuck: Callable[[tuple[str, int]], None] = lambda address: None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Serve a model.

        Args:
            model: What is served.
            scheduler: Writes the texts.
            metrics: Counts.
            fingerprint: Of the model.
            limits: Of one request.
            keys: SHA-256 of the keys that may ask; empty lets everybody.
            any_host: Whether requests without keys may name any host; else this machine's own,
                so that a page of another site cannot ask under a name of its own.
            on_request: Told the address of each request that may ask.
            on_stuck: Told the address of a client that does not even take its error.
            log: Told of each answer, one line.
        """
        self._model = model
        self._scheduler = scheduler
        self._metrics = metrics
        self._fingerprint = fingerprint
        self._limits = limits
        self._keys = keys
        self._any_host = any_host or bool(keys)
        self._on_request = on_request
        self._on_stuck = on_stuck
        self._log = log
        self._created = int(time.time())
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self.is_closing = False

    def close(self) -> None:
        """Let go of the thread that encodes prompts."""
        self._encoder.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        started = time.monotonic()
        try:
            await self._try(exchange)
        finally:
            seconds = time.monotonic() - started
            self._metrics.on_answer(exchange.path, exchange.status, seconds)
            said = f"{exchange.method} {clean(exchange.path, 80)} {exchange.status} {seconds:.3f} s"
            self._log(f"{exchange.address[0]} {said}{exchange.usage}")

    async def _try(self, exchange: Exchange) -> None:
        """Answer, if only with an error."""
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                await self._route(exchange)
            return
        except GoneError:
            exchange.status = GONE
            return
        except ApiError as error:
            refusal = error
        except TimeoutError:
            seconds = self._limits.request_seconds
            message = f"The request took more than {seconds:g} s. Ask for fewer tokens."
            refusal = ApiError(504, message, code="timeout")
        except Exception as error:
            self._log(f"{type(error).__name__} while answering")
            refusal = ApiError(500, "The server failed.", code="internal_error")
        try:
            async with asyncio.timeout(REFUSAL_SECONDS):
                await exchange.refuse(refusal)
        except TimeoutError:
            self._on_stuck(exchange.address)

    async def _route(self, exchange: Exchange) -> None:
        path = exchange.path
        if path == "/healthz":
            exchange.check_method("GET")
            is_well = self._scheduler.is_alive and not self.is_closing
            await exchange.send_json(
                {"status": "ok" if is_well else "closing"}, 200 if is_well else 503
            )
            return
        self._check_host(exchange)
        may_look = path == "/metrics" and is_loopback(exchange.address[0])
        if not may_look:
            self._check_key(exchange)
        self._on_request(exchange.address)
        if path == "/metrics":
            exchange.check_method("GET")
            await exchange.send_whole(self._metrics.as_text(), CONTENT_TYPE)
        elif path == "/v1/models":
            exchange.check_method("GET")
            data = [self._describe(name) for name in self._model.gates]
            await exchange.send_json({"object": "list", "data": data})
        elif path.startswith("/v1/models/"):
            exchange.check_method("GET")
            name = path.removeprefix("/v1/models/")
            self._model.find_gates(name)
            await exchange.send_json(self._describe(name))
        elif path == "/v1/completions":
            await self._answer(exchange, CompletionRequest)
        elif path == "/v1/chat/completions":
            await self._answer(exchange, ChatRequest)
        else:
            raise ApiError(404, "No such path. See docs/serving.md.", code="not_found")

    def _check_host(self, exchange: Exchange) -> None:
        if not self._any_host and not is_loopback(exchange.host):
            raise ApiError(421, "Not served under this name.", code="wrong_host")

    def _check_key(self, exchange: Exchange) -> None:
        """Refuse who shows none of the keys; how long that takes tells nothing of them."""
        if not self._keys:
            return
        scheme, _, key = exchange.headers.get("authorization", "").partition(" ")
        shown = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        found = [hmac.compare_digest(shown, one) for one in self._keys]
        if scheme.lower() != "bearer" or not any(found):
            raise ApiError(
                401,
                "Expected 'Authorization: Bearer KEY' with a key of this server.",
                code="invalid_api_key",
            )

    def _describe(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "molora"}

    async def _answer(self, exchange: Exchange, kind: type[TextRequest]) -> None:
        exchange.check_method("POST")
        if self.is_closing:
            raise ApiError(503, "The server stops.", code="closing", retry_seconds=5)
        sort = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sort != "application/json":  # what pages of other sites may send unasked is another
            raise ApiError(415, "Expected Content-Type: application/json.", code="invalid_json")
        body = await self._read_body(exchange)
        try:
            value = parse_json(body, max_bytes=self._limits.body_bytes)
        except ValueError as error:
            message = f"Expected JSON, got {clean(error)}."
            raise ApiError(400, message, code="invalid_json") from None
        request = parse_request(value, kind)
        gates = self._model.find_gates(request.model)
        prompts = await exchange.while_connected(self._encode(request))
        generations = [
            Generation(
                prompt,
                sampling,
                stop=request.stops,
                gates=gates,
                copies=request.n or 1,
                top=request.top,
            )
            for prompt, sampling in zip(
                prompts, self._choose_sampling(request, prompts), strict=True
            )
        ]
        answer = build_answer(self._model, request, self._fingerprint, [len(p) for p in prompts])
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        tickets = self._submit(generations, events)
        try:
            work = _send_chunks if request.stream else _send_answer
            await exchange.while_connected(work(exchange, answer, _merge(answer, events)))
        finally:
            for ticket in tickets:
                ticket.cancel()
            usage = answer.usage
            exchange.usage = f", {usage.prompt} + {usage.completion} tokens"

    async def _read_body(self, exchange: Exchange) -> bytes:
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                return await exchange.read_body(self._limits.body_bytes)
        except TimeoutError:
            seconds = self._limits.body_seconds
            message = f"The body took more than {seconds:g} s."
            raise ApiError(408, message, code="timeout") from None

    async def _encode(self, request: TextRequest) -> list[tuple[int, ...]]:
        """Ids of each prompt.

        Raises:
            ApiError: If one is too long, or not one of this model's.
        """

        def encode() -> list[tuple[int, ...]]:
            if isinstance(request, ChatRequest):
                return [self._model.encode_chat([m.as_template() for m in request.messages])]
            assert isinstance(request, CompletionRequest)
            return [self._model.encode(prompt) for prompt in request.prompts]

        prompts = await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
        longest = max(map(len, prompts))
        if longest > self._limits.prompt_tokens:
            raise _too_long(
                f"Expected a prompt of at most {self._limits.prompt_tokens} tokens, got {longest}."
            )
        return prompts

    def _choose_sampling(
        self, request: TextRequest, prompts: Sequence[Sequence[int]]
    ) -> list[Sampling]:
        """How each prompt is continued.

        Raises:
            ApiError: If there is no room for that many tokens.
        """
        seed = secrets.randbits(31) if request.seed is None else request.seed
        most = self._limits.new_tokens
        if request.limit is not None and request.limit > most:
            raise ApiError(
                400,
                f"Expected at most {most} new tokens, got {request.limit}.",
                param="max_tokens",
                code="invalid_value",
            )
        usual = most if isinstance(request, ChatRequest) else USUAL_NEW_TOKENS
        found = []
        for prompt in prompts:
            positions = self._model.max_positions
            room = most if positions is None else positions - len(prompt)
            wanted = min(usual, room) if request.limit is None else request.limit
            if wanted > room or room < 1:
                raise _too_long(
                    f"This model reads texts of at most {positions} tokens; the prompt has "
                    f"{len(prompt)}, and {max(wanted, 1)} more were asked for."
                )
            temperature = 1.0 if request.temperature is None else request.temperature
            top_p = 1.0 if request.top_p is None else request.top_p
            found.append(Sampling(wanted, temperature, top_p=top_p, seed=seed))
        return found

    def _submit(
        self, generations: Sequence[Generation], events: "asyncio.Queue[tuple[int, Event]]"
    ) -> list[Ticket]:
        loop = asyncio.get_running_loop()
        copies = generations[0].copies
        if copies > self._scheduler.max_texts:
            most = self._scheduler.max_texts
            raise ApiError(400, f"Expected n of at most {most}.", param="n", code="invalid_value")

        def emit_to(first: int) -> Callable[[Event], None]:
            return lambda event: events.put_nowait((first, event))

        def tell(told: Sequence[tuple[Ticket, Event]]) -> None:
            for ticket, event in told:
                ticket.emit(event)

        def deliver(told: Sequence[tuple[Ticket, Event]]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(tell, told)

        self._scheduler.deliver = deliver
        emits = [emit_to(at * copies) for at in range(len(generations))]
        try:
            return self._scheduler.submit(generations, emits)
        except BusyError:
            raise ApiError(
                429,
                "The server is busy: too many requests wait. Try again later.",
                code="rate_limit_exceeded",
                retry_seconds=self._scheduler.guess_wait_seconds(),
            ) from None


def _too_long(message: str) -> ApiError:
    return ApiError(400, message, param="prompt", code="context_length_exceeded")


async def _merge(
    answer: Answer, events: "asyncio.Queue[tuple[int, Event]]"
) -> AsyncIterator[list[tuple[int, Piece]]]:
    """Pieces of all texts, taken into the answer: as many at once as have come.

    Raises:
        ApiError: If a text failed.
    """
    while not answer.is_whole:
        come = [await events.get()]
        while not events.empty():
            come.append(events.get_nowait())
        pieces = []
        for first, event in come:
            if isinstance(event, Failure):
                status, code = (503, "closing") if event.is_closing else (500, "internal_error")
                message = f"The text was not finished: {event.reason}."
                raise ApiError(status, message, code=code)
            answer.add(first + event.index, event)
            pieces.append((first + event.index, event))
        yield pieces


async def _send_answer(
    exchange: Exchange, answer: Answer, come: AsyncIterator[list[tuple[int, Piece]]]
) -> None:
    async for _ in come:
        pass
    await exchange.send_json(answer.as_body())


async def _send_chunks(
    exchange: Exchange, answer: Answer, come: AsyncIterator[list[tuple[int, Piece]]]
) -> None:
    """Server-sent events; the head goes out with the first, so that failures before have theirs."""
    async for pieces in come:
        chunks = [chunk for piece in pieces for chunk in answer.as_chunks(*piece)]
        if chunks:
            await exchange.send_events(*map(dump, chunks))
    last = answer.as_last_chunk()
    await exchange.send_events(*([] if last is None else [dump(last)]), b"[DONE]")
    await exchange.end_events()
