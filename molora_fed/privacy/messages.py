"""Messages of a private comparison, and what is read of them when they come from outside.

Each is a line that says what it is, and elements of one length. There is one spelling of each
content, so that the hash of a message stands for it, in a commitment and in a count.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from molora_fed.errors import FederationError
from molora_fed.privacy.oprf import ELEMENT_BYTES
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.untrusted import clean

__all__ = [
    "BATCH",
    "KEY_ID_BYTES",
    "MAX_QUERY_BATCHES",
    "MAX_QUERY_BYTES",
    "MAX_REPLY_BYTES",
    "MAX_SET_BATCHES",
    "MAX_SET_BYTES",
    "SET_BATCH",
    "Query",
    "Reply",
    "TagSet",
]

BATCH = 4_096
"""8-grams that a query is filled up to, or to a multiple."""
MAX_QUERY_BATCHES = 8
"""Batches of one query: 32,768 8-grams, several times the held-out sample of a charter."""
SET_BATCH = 65_536
"""8-grams that a set of tags is filled up to, or to a multiple."""
MAX_SET_BATCHES = 256
"""Batches of one set of tags: 16.8 million 8-grams, 134 MB."""
KEY_ID_BYTES = 16
_QUERY_ID_BYTES = 32
_TAG_BYTES = 8

_QUERY_LINE = b"molora-fed overlap query 1\n"
_SET_LINE = b"molora-fed overlap set 1\n"
_REPLY_LINE = b"molora-fed overlap reply 1\n"
MAX_QUERY_BYTES = len(_QUERY_LINE) + MAX_QUERY_BATCHES * BATCH * ELEMENT_BYTES
MAX_REPLY_BYTES = (
    len(_REPLY_LINE) + KEY_ID_BYTES + _QUERY_ID_BYTES + MAX_QUERY_BATCHES * BATCH * ELEMENT_BYTES
)
MAX_SET_BYTES = len(_SET_LINE) + KEY_ID_BYTES + MAX_SET_BATCHES * SET_BATCH * _TAG_BYTES


@dataclass(frozen=True)
class Query:
    """Blinded 8-grams of held-out blocks, in an order that says nothing about them.

    Attributes:
        elements: Distinct, in rising order, a multiple of `BATCH`.
    """

    elements: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """The message."""
        return _QUERY_LINE + b"".join(self.elements)

    @property
    def commitment(self) -> str:
        """Hash of the message: what a manifest states before anybody is asked."""
        return hash_bytes(self.to_bytes())

    @classmethod
    def read(cls, data: bytes, sender: str) -> "Query":
        """Read a query from outside; whether its elements are points shows when it is answered.

        Args:
            data: The message.
            sender: Who it is said to come from, for the error.

        Raises:
            FederationError: If it is malformed or too long.
        """
        body = _read_body(data, _QUERY_LINE, "query", sender)
        elements = _split(body, "query", sender)
        if len(elements) > MAX_QUERY_BATCHES * BATCH:
            got = f"{len(elements):,} elements, more than {MAX_QUERY_BATCHES * BATCH:,}"
            raise _malformed("query", sender, got)
        if any(a >= b for a, b in pairwise(elements)):
            raise _malformed("query", sender, "elements that do not rise")
        return cls(elements)


@dataclass(frozen=True)
class Reply:
    """The elements of a query, multiplied by the answering contributor's key.

    Attributes:
        key_id: Of the key, so that no set of another key is looked into.
        query_id: Hash of the query.
        elements: In the query's order.
    """

    key_id: bytes
    query_id: bytes
    elements: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """The message."""
        return _REPLY_LINE + self.key_id + self.query_id + b"".join(self.elements)

    @classmethod
    def read(cls, data: bytes, sender: str, query: Query) -> "Reply":
        """Read the reply to a query.

        Args:
            data: The message.
            sender: Who it is said to come from, for the error.
            query: What was asked.

        Raises:
            FederationError: If it is malformed, or answers something else.
        """
        body = _read_body(data, _REPLY_LINE, "reply", sender)
        key_id, body = body[:KEY_ID_BYTES], body[KEY_ID_BYTES:]
        query_id, body = body[:_QUERY_ID_BYTES], body[_QUERY_ID_BYTES:]
        if query_id.hex() != query.commitment:
            raise _malformed("reply", sender, "the reply to another query")
        elements = _split(body, "reply", sender)
        if len(elements) != len(query.elements):
            got = f"{len(elements):,} elements for {len(query.elements):,}"
            raise _malformed("reply", sender, got)
        return cls(key_id, query_id, elements)


@dataclass(frozen=True, eq=False)
class TagSet:
    """Tags of the 8-grams of a contributor's text, filled up with random ones.

    Attributes:
        key_id: Of the key that they were made with.
        tags: Distinct, in rising order, a multiple of `SET_BATCH`, (T,).
    """

    key_id: bytes
    tags: NDArray[np.uint64]

    def to_bytes(self) -> bytes:
        """The message."""
        return _SET_LINE + self.key_id + self.tags.astype("<u8").tobytes()

    @classmethod
    def read(cls, data: bytes, sender: str) -> "TagSet":
        """Read a set of tags from outside.

        Args:
            data: The message.
            sender: Who it is said to come from, for the error.

        Raises:
            FederationError: If it is malformed or too long.
        """
        body = _read_body(data, _SET_LINE, "set", sender)
        key_id, body = body[:KEY_ID_BYTES], body[KEY_ID_BYTES:]
        count, rest = divmod(len(body), _TAG_BYTES)
        if rest or not count or count % SET_BATCH or count > MAX_SET_BATCHES * SET_BATCH:
            got = f"{len(body):,} bytes of tags"
            raise _malformed("set", sender, got)
        tags = np.frombuffer(body, dtype="<u8").astype(np.uint64)
        if not (tags[1:] > tags[:-1]).all():
            raise _malformed("set", sender, "tags that do not rise")
        return cls(key_id, tags)


def _read_body(data: bytes, line: bytes, what: str, sender: str) -> bytes:
    if not data.startswith(line):
        raise _malformed(what, sender, f"'{clean(data[:40].decode('ascii', 'replace'), 40)}'")
    return data[len(line) :]


def _split(body: bytes, what: str, sender: str) -> tuple[bytes, ...]:
    count, rest = divmod(len(body), ELEMENT_BYTES)
    if rest or not count or count % BATCH:
        raise _malformed(what, sender, f"{len(body):,} bytes of elements")
    return tuple(body[n : n + ELEMENT_BYTES] for n in range(0, len(body), ELEMENT_BYTES))


def _malformed(what: str, sender: str, got: str) -> FederationError:
    form = {
        "query": f"a multiple of {BATCH:,} elements in rising order",
        "reply": "an element for each of the query",
        "set": f"a multiple of {SET_BATCH:,} tags in rising order",
    }[what]
    return FederationError(
        f"Cannot read the {what} of '{clean(sender, 60)}' on held-out text: expected {form}, got "
        f"{got}. Run the same molora-fed version on both sides."
    )
