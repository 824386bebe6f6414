"""A model behind an OpenAI-compatible HTTP endpoint, of which nothing is believed.

Whatever goes wrong - time, status, size, form - ends as a failed sample that says so. Answers are
read piece by piece up to a limit, so that an endless or huge one is never held.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any

import httpx

from molora_fed.cascade.config import EndpointSource
from molora_fed.cascade.contract import Request, Sample
from molora_fed.errors import CascadeError
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = ["EndpointModel"]

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
MAX_TOKENS = 10**9
_SHORTEST_SECRET = 8  # characters of a key; local servers take words like "none"


@dataclass(frozen=True)
class _Answer:
    """What one try brought.

    Attributes:
        text: The text.
        prompt_tokens: Tokens read, as the endpoint counts them.
        new_tokens: Tokens written, as the endpoint counts them.
        failure: What went wrong, one line; None if nothing did.
        is_final: Whether trying again is useless.
        wait_seconds: What the endpoint asks to wait; None if it does not say.
    """

    text: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    failure: str | None = None
    is_final: bool = False
    wait_seconds: float | None = None


class _FailedError(Exception):
    """One try went wrong; says how."""

    def __init__(self, failure: str, **more: Any) -> None:
        super().__init__(failure)
        self.answer = _Answer(failure=failure, **more)


class EndpointModel:
    """A model behind an endpoint.

    Attributes:
        name: Unique in a cascade.
        fingerprint: SHA-256 over address, model name and form; not of its weights, which nobody
            can see from here.
        is_local: False: asked again, an endpoint may answer differently.
    """

    is_local = False

    def __init__(self, name: str, source: EndpointSource) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            name: Unique in a cascade.
            source: Address, limits, prices.

        Raises:
            CascadeError: If the environment variable of the key is not set.
        """
        self.name = name
        self.fingerprint = hash_bytes(
            canonical_json(["endpoint", source.url, source.model, source.api, source.send_seed])
        )
        self._source = source
        self._key = ""
        # A compressed answer could be far larger than what is counted while it is read.
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if source.api_key_env is not None:
            key = os.environ.get(source.api_key_env, "").strip()
            if not key or not key.isprintable() or not key.isascii():
                raise CascadeError(
                    f"Cannot use endpoint '{name}': expected a key in the environment variable "
                    f"{source.api_key_env}, got none that can be sent. Set it."
                )
            if not _is_protected(source.url):
                raise CascadeError(
                    f"Cannot use endpoint '{name}': expected https where a key is sent to another "
                    "host, got http, which everybody on the way can read. Correct its url."
                )
            self._headers["Authorization"] = f"Bearer {key}"
            self._key = key

    def sample(self, requests: Sequence[Request]) -> Sequence[Sample]:
        """Ask for each request, several at once; every failure is a sample that says why.

        Args:
            requests: What is asked.
        """
        return asyncio.run(self._ask_all(requests))

    async def _ask_all(self, requests: Sequence[Request]) -> list[Sample]:
        source = self._source
        turns = asyncio.Semaphore(source.parallel)
        # trust_env: what the environment says of proxies and .netrc must not change who is asked.
        async with httpx.AsyncClient(
            timeout=httpx.Timeout(source.timeout_seconds),
            follow_redirects=False,
            trust_env=False,
            headers=self._headers,
        ) as client:

            async def ask(request: Request) -> Sample:
                async with turns:
                    return await self._ask(client, request)

            return list(await asyncio.gather(*(ask(request) for request in requests)))

    async def _ask(self, client: httpx.AsyncClient, request: Request) -> Sample:
        """One sample, tried as often as the limits allow; tokens of failed tries cost too."""
        source, started = self._source, time.monotonic()
        prompt_tokens = new_tokens = 0
        for attempt in range(1, source.retries + 2):
            answer = await self._try(client, request)
            prompt_tokens += answer.prompt_tokens
            new_tokens += answer.new_tokens
            if answer.failure is None or answer.is_final or attempt > source.retries:
                break
            await asyncio.sleep(self._choose_wait(attempt, answer, request.seed))
        price = prompt_tokens * source.price_per_million_prompt
        price += new_tokens * source.price_per_million_new
        return Sample(
            text=self._hide_key(answer.text),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            price=price / 1e6,
            seconds=time.monotonic() - started,
            failure=answer.failure,
            attempts=attempt,
        )

    def _hide_key(self, text: str) -> str:
        """The text without the key: an endpoint may echo it, and traces are handed on."""
        return text.replace(self._key, "[key]") if len(self._key) >= _SHORTEST_SECRET else text

    def _choose_wait(self, attempt: int, answer: _Answer, seed: int) -> float:
        """Seconds before the next try: what the endpoint asks, else doubling with jitter."""
        source, wait = self._source, answer.wait_seconds
        if wait is None:
            jitter = random.Random(f"{seed}/{attempt}").uniform(0.5, 1.0)
            wait = source.backoff_seconds * 2 ** (attempt - 1) * jitter
        return min(max(wait, 0.0), source.max_wait_seconds)

    async def _try(self, client: httpx.AsyncClient, request: Request) -> _Answer:
        """Ask once, within the deadline whatever the endpoint does."""
        source = self._source
        try:
            with _http_failures(source):
                async with asyncio.timeout(source.deadline_seconds):
                    data = await self._post(client, request)
            return _parse_answer(data, source)
        except _FailedError as error:
            return error.answer

    async def _post(self, client: httpx.AsyncClient, request: Request) -> bytes:
        """The body of the answer, if it stays within its limit."""
        source = self._source
        path = "/chat/completions" if source.api == "chat" else "/completions"
        body = _build_body(source, request)
        async with client.stream("POST", source.url + path, json=body) as response:
            if response.status_code != 200:
                raise _FailedError(
                    f"status {response.status_code}",
                    is_final=response.status_code not in RETRIED_STATUS,
                    wait_seconds=_read_wait(response.headers.get("Retry-After")),
                )
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _FailedError("compressed answer, which was not asked for", is_final=True)
            parts: list[bytes] = []
            total = 0
            async for part in response.aiter_raw():
                total += len(part)
                if total > source.max_answer_bytes:
                    limit = source.max_answer_bytes
                    raise _FailedError(f"answer of more than {limit} bytes", is_final=True)
                parts.append(part)
            return b"".join(parts)


def _is_protected(url: str) -> bool:
    """Whether nobody on the way can read what is sent: over TLS, or to this machine."""
    address = httpx.URL(url)
    if address.scheme == "https" or address.host == "localhost":
        return True
    try:
        return ip_address(address.host).is_loopback
    except ValueError:
        return False


def _build_body(source: EndpointSource, request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": source.model,
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "stream": False,
    }
    if source.send_seed:
        body["seed"] = request.seed
    if request.stop:
        body["stop"] = list(request.stop)
    if source.api == "chat":
        body["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        body["prompt"] = request.prompt
    return body


@contextmanager
def _http_failures(source: EndpointSource) -> Iterator[None]:
    """Say what went wrong without the address, which traces and pages need not hold."""
    try:
        yield
    except httpx.TimeoutException as error:
        waited = f"nothing within {source.timeout_seconds:g} s ({type(error).__name__})"
        raise _FailedError(waited) from error
    except TimeoutError as error:
        raise _FailedError(f"no whole answer within {source.deadline_seconds:g} s") from error
    except httpx.InvalidURL as error:
        raise _FailedError("an address that cannot be used", is_final=True) from error
    except (httpx.HTTPError, httpx.StreamError, OSError, UnicodeError) as error:
        raise _FailedError(f"connection failed ({type(error).__name__})") from error


def _read_wait(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date."""
    if value is None or len(value) > 100:
        return None
    if value.strip().isdecimal():
        return float(int(value.strip()[:9]))
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return None


def _parse_answer(data: bytes, source: EndpointSource) -> _Answer:
    if not data.strip():
        raise _FailedError("empty answer")
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _FailedError("malformed JSON") from error
    text = _find_text(answer, source.api)
    usage = answer.get("usage") if isinstance(answer, dict) else None
    counts = usage if isinstance(usage, dict) else {}
    tokens = {
        "prompt_tokens": _count(counts, "prompt_tokens"),
        "new_tokens": _count(counts, "completion_tokens"),
    }
    if text is None:
        raise _FailedError("JSON without a text in choices[0]", **tokens)
    if not text.strip():
        raise _FailedError("empty text", **tokens)
    if len(text) > source.max_text_characters:
        limit = source.max_text_characters
        raise _FailedError(f"text of more than {limit} characters", is_final=True, **tokens)
    # Lone surrogates, which JSON can carry, are no text.
    clean = text.encode("utf-8", "replace").decode()
    return _Answer(clean, tokens["prompt_tokens"], tokens["new_tokens"])


def _find_text(answer: Any, api: str) -> str | None:
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if api == "chat" else choice["text"]
    except (KeyError, IndexError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _count(usage: Mapping[str, Any], key: str) -> int:
    value = usage.get(key)
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else 0
