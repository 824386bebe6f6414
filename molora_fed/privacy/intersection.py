"""Private set intersection on word 8-grams, between two contributors who show each other no text.

The receiver has held-out blocks, the sender text that it trained on. The receiver learns which of
its own 8-grams occur in the sender's text; the sender learns how many batches it was asked, and
whoever carries the messages how long they are, in batches too. A query is made once and is the same
for all senders; a sender's tags are made once a fusion and are the same for all receivers. All that
is sent follows from a contributor's secret, its texts and the fusion, so that a process that was
killed sends the same bytes when it is started again.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from molora_fed.corpus.clusters import find_shingles
from molora_fed.errors import CorpusError, FederationError, QuestionRefusedError
from molora_fed.privacy.messages import (
    BATCH,
    KEY_ID_BYTES,
    MAX_QUERY_BATCHES,
    MAX_SET_BATCHES,
    SET_BATCH,
    Query,
    Reply,
    TagSet,
)
from molora_fed.privacy.oprf import Key, compute_tags, derive_bytes
from molora_fed.storage.untrusted import clean
from molora_fed.types import Progress

__all__ = ["Found", "Receiver", "Sealing", "Sender", "limit_queries"]

_PAD_BYTES = 32  # an 8-gram has 8, so that none is a pad


def _to_items(hashes: NDArray[np.uint64]) -> list[bytes]:
    data = hashes.astype("<u8").tobytes()
    return [data[n : n + 8] for n in range(0, len(data), 8)]


def _hash_set(hashes: NDArray[np.uint64]) -> bytes:
    return hashlib.sha256(hashes.astype("<u8").tobytes()).digest()


def _check_set(hashes: NDArray[np.uint64], limit: int, what: str, fix: str) -> None:
    if hashes.dtype != np.uint64 or hashes.ndim != 1 or not (hashes[1:] > hashes[:-1]).all():
        raise CorpusError(
            f"Cannot compare {what}: expected sorted distinct 64-bit hashes, got {hashes.dtype} of "
            f"shape {hashes.shape}. Use `index_blocks` or `list_shingles`."
        )
    if hashes.size > limit:
        raise CorpusError(
            f"Cannot compare {what}: expected at most {limit:,} distinct word 8-grams, got "
            f"{hashes.size:,}. {fix}"
        )


def _count_batches(size: int, batch: int) -> int:
    return max(1, -(-size // batch))


@dataclass(frozen=True, eq=False)
class Found:
    """What a receiver knows so far; kept at home, so that no reply is opened twice.

    Attributes:
        query_id: Hash of the query.
        hits: Which of its 8-grams occur in any sender's text, (D,).
        senders: Whose replies were opened, in order.
    """

    query_id: str
    hits: NDArray[np.bool_]
    senders: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """The state as a safetensors file."""
        return _save_state("\n".join((self.query_id, *self.senders)), self.hits)


class Receiver:
    """Asks which of its held-out 8-grams occur in others' text.

    Args:
        items: Distinct 8-grams of its held-out blocks, sorted, (D,).
        secret: 32 random bytes, which stay at home.
        purpose: What the query is for, such as the contribution that states its hash; the same
            8-grams look unrelated for another.
        progress: Called with elements made of all.

    Raises:
        CorpusError: If there are more 8-grams than a query takes.
    """

    def __init__(
        self,
        items: NDArray[np.uint64],
        *,
        secret: bytes,
        purpose: str,
        progress: Progress | None = None,
    ) -> None:
        fix = "Send fewer held-out blocks."
        _check_set(items, MAX_QUERY_BATCHES * BATCH, "held-out blocks", fix)
        self._items = _to_items(items)
        # A key for this very set: one that was used for two would show what they have in common.
        context = (purpose.encode(), _hash_set(items))
        key = Key.derive(secret, b"receiver", *context)
        missing = _count_batches(items.size, BATCH) * BATCH - items.size
        pads = derive_bytes(_PAD_BYTES * missing, secret, b"pads", *context)
        inputs = [
            *self._items,
            *(pads[n : n + _PAD_BYTES] for n in range(0, len(pads), _PAD_BYTES)),
        ]
        elements: list[bytes] = []
        for start in range(0, len(inputs), BATCH):
            elements += key.multiply_hashed(inputs[start : start + BATCH])
            if progress is not None:
                progress(len(elements), len(inputs))
        # In the order of the 8-grams' hashes a place would tell the hash's first bits.
        order = sorted(range(len(elements)), key=elements.__getitem__)
        self._places = np.argsort(np.array(order))[: items.size]
        self._open = key.invert()
        self.items = items
        self.query = Query(tuple(elements[number] for number in order))

    def begin(self) -> Found:
        """Nothing found, nobody asked."""
        return Found(self.query.commitment, np.zeros(self.items.shape, dtype=np.bool_), ())

    def open(self, found: Found, sender: str, tags: TagSet, reply: Reply) -> Found:
        """Look for what a sender's reply makes of the 8-grams among the sender's tags.

        Args:
            found: What is known so far.
            sender: Its name.
            tags: The set of the same fusion.
            reply: To this query.

        Returns:
            What is known now; as it was if the sender's reply was opened before.

        Raises:
            FederationError: If reply and set were made with two keys, or the reply is no points.
        """
        if sender in found.senders:
            return found
        if tags.key_id != reply.key_id:
            raise FederationError(
                f"Cannot open the reply of '{clean(sender, 60)}' on held-out text: expected the "
                f"key of its set {tags.key_id.hex()[:8]}, got {reply.key_id.hex()[:8]}. Ask it for "
                "both again."
            )
        try:
            opened = self._open.multiply(reply.elements[place] for place in self._places)
        except ValueError as error:
            raise FederationError(
                f"Cannot open the reply of '{clean(sender, 60)}' on held-out text: expected points "
                f"of P-256, got {error}. Run the same molora-fed version on both sides."
            ) from error
        hits = find_shingles(tags.tags, compute_tags(self._items, opened))
        return Found(found.query_id, found.hits | hits, (*found.senders, sender))

    def resume(self, data: bytes) -> Found | None:
        """A state that was kept; None if it belongs to another query.

        Raises:
            CorpusError: If it is malformed.
        """
        owner, hits = _load_state(data, np.bool_)
        query_id, *senders = owner.split("\n")
        if query_id != self.query.commitment or hits.shape != self.items.shape:
            return None
        return Found(query_id, hits, tuple(senders))

    def list_known(self, found: Found) -> NDArray[np.uint64]:
        """8-grams of the held-out blocks that occur in any sender's text, sorted."""
        return self.items[found.hits]


@dataclass(frozen=True, eq=False)
class Sealing:
    """How far a sender is with its tags; kept at home, so that none is made twice.

    Attributes:
        key_id: Of the key.
        tags: Of its first n 8-grams, in their order, (n,).
    """

    key_id: bytes
    tags: NDArray[np.uint64]

    def to_bytes(self) -> bytes:
        """The state as a safetensors file."""
        return _save_state(self.key_id.hex(), self.tags)


class Sender:
    """Answers for its own text.

    Args:
        known: Distinct 8-grams of all that its specialist and its routers have read, sorted, (G,).
        secret: 32 random bytes, which stay at home.
        fusion: Identity of the fusion. Each has a key of its own, and so has each set of 8-grams:
            tags of two fusions, or of a text that changed, have nothing in common.

    Raises:
        CorpusError: If there are more 8-grams than a set takes.
    """

    def __init__(self, known: NDArray[np.uint64], *, secret: bytes, fusion: str) -> None:
        fix = "Prepare fewer documents."
        _check_set(known, MAX_SET_BATCHES * SET_BATCH, "train text", fix)
        context = (fusion.encode(), _hash_set(known))
        self._known = known
        self._key = Key.derive(secret, b"sender", *context)
        self._pads = derive_bytes(32, secret, b"tags", *context)
        self.key_id = derive_bytes(KEY_ID_BYTES, secret, b"key id", *context)

    @property
    def total(self) -> int:
        """8-grams that tags are made of, G."""
        return self._known.size

    def begin(self) -> Sealing:
        """No tag made."""
        return Sealing(self.key_id, np.empty(0, dtype=np.uint64))

    def advance(self, sealing: Sealing, count: int = BATCH) -> Sealing:
        """Make the tags of the next 8-grams; of none if all have theirs."""
        done = sealing.tags.size
        items = _to_items(self._known[done : done + count])
        tags = compute_tags(items, self._key.multiply_hashed(items))
        return Sealing(sealing.key_id, np.concatenate([sealing.tags, tags]))

    def finish(self, sealing: Sealing) -> TagSet:
        """The set that all receivers get, filled up to whole batches.

        Raises:
            ValueError: If 8-grams without a tag are left.
        """
        if sealing.tags.size != self.total:
            raise ValueError(f"{sealing.tags.size} of {self.total} tags")
        size = _count_batches(self.total, SET_BATCH) * SET_BATCH
        tags = np.unique(sealing.tags)
        while tags.size < size:  # once, unless a random number is a tag already
            drawn = derive_bytes(8 * (size - tags.size), self._pads, tags.size.to_bytes(8, "big"))
            tags = np.unique(np.concatenate([tags, np.frombuffer(drawn, dtype="<u8")]))
        return TagSet(self.key_id, tags)

    def resume(self, data: bytes) -> Sealing | None:
        """A state that was kept; None if it belongs to another text or fusion.

        Raises:
            CorpusError: If it is malformed.
        """
        owner, tags = _load_state(data, np.uint64)
        if owner != self.key_id.hex() or tags.size > self.total:
            return None
        return Sealing(self.key_id, tags)

    def answer(
        self, query: Query, asker: str, *, committed: str, admit: Callable[[str, str], None]
    ) -> Reply:
        """Answer a query once it is counted; the same one again has the same reply.

        Args:
            query: From outside.
            asker: The contributor whose held-out blocks it is about.
            committed: The hash of its query that the asker's signed manifest states.
            admit: Counts it at home, such as `AskedQuestions.admit` with `limit_queries`.

        Raises:
            QuestionRefusedError: If it is not the query that the manifest states, or not counted.
            FederationError: If its elements are no points.
        """
        name = clean(asker, 60)
        if query.commitment != committed:
            raise QuestionRefusedError(
                f"Cannot answer the query of '{name}' on held-out text: expected the query "
                f"{clean(committed, 12)} that its manifest states, got {query.commitment[:12]}. "
                "Contribute again with the blocks that shall be compared."
            )
        admit(_name_place(asker), query.commitment)
        try:
            elements = self._key.multiply(query.elements)
        except ValueError as error:
            raise FederationError(
                f"Cannot answer the query of '{name}' on held-out text: expected points of P-256, "
                f"got {error}. Run the same molora-fed version on both sides."
            ) from error
        return Reply(self.key_id, bytes.fromhex(query.commitment), tuple(elements))


def limit_queries(askers: Iterable[str]) -> Mapping[str, int]:
    """How often each place of a fusion may be asked: one query of each other member.

    Args:
        askers: The fusion's other members.
    """
    return {_name_place(asker): 1 for asker in askers}


def _name_place(asker: str) -> str:
    return f"overlap of {asker}"


def _save_state(owner: str, values: NDArray[Any]) -> bytes:
    return save({"owner": np.frombuffer(owner.encode(), dtype=np.uint8), "values": values})


def _load_state(data: bytes, dtype: type[np.generic]) -> tuple[str, NDArray[Any]]:
    """What a state belongs to, and its values."""
    try:
        tensors = load(data)
        owner, values = tensors.pop("owner"), tensors.pop("values")
        if tensors or owner.dtype != np.uint8 or values.dtype != dtype or values.ndim != 1:
            raise ValueError(f"{values.dtype} of shape {values.shape}")
        return owner.tobytes().decode(), values
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            "Cannot go on with a comparison of held-out text: expected the state that was kept, "
            f"got {clean(error, 100)}. Delete the file; what it holds is made again."
        ) from error
