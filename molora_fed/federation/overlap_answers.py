"""A member's part in comparing held-out text with train text that nobody shows.

Whatever is wrong with what comes from another member ends the comparison with that member alone.
Everything follows from the texts, the signing key and the fusion's secret: a process that was
killed gives the same bytes again.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from molora_fed.contributions.manifest import Manifest
from molora_fed.errors import CorpusError, FederationError, QuestionRefusedError, SignatureError
from molora_fed.federation.logs import log
from molora_fed.federation.overlap_letters import (
    COUNTS,
    QUERIES,
    QUERY,
    REPLIES,
    SET,
    SETS,
    SIGNATURE,
    SIGNATURES,
    read_part,
    read_set,
    sign_set,
)
from molora_fed.fusion.held_out import Elsewhere
from molora_fed.fusion.private_answers import FusionMember
from molora_fed.privacy.intersection import Found, Receiver, Sender
from molora_fed.privacy.messages import (
    MAX_QUERY_BYTES,
    MAX_REPLY_BYTES,
    MAX_SET_BYTES,
    SET_BATCH,
    Query,
    Reply,
    TagSet,
)
from molora_fed.privacy.overlap import open_receiver
from molora_fed.storage.files import canonical_json, write_bytes
from molora_fed.types import Progress

__all__ = ["OverlapAnswers"]


class OverlapAnswers:
    """Compares one member's held-out blocks with all others' text, and the other way round.

    Who states no query in its manifest takes no part, and neither does anybody with it.

    Args:
        member: With this contributor's text.
        name: This contributor's name.
        manifests: Signed ones of all members, by name.
        key: This contributor's signing key.
        secret: 32 random bytes of this fusion, which stay here.
        fusion: Id of the fusion.
        folder: Gets what has to be found again after a kill.
        admit: Counts a query before it is answered, see `Sender.answer`.
    """

    def __init__(
        self,
        member: FusionMember,
        *,
        name: str,
        manifests: Mapping[str, Manifest],
        key: EllipticCurvePrivateKey,
        secret: bytes,
        fusion: str,
        folder: Path,
        admit: Callable[[str, str], None],
    ) -> None:
        self._member = member
        self._name = name
        self._key = key
        self._secret = secret
        self._fusion = fusion
        self._folder = folder
        self._admit = admit
        self._identity = manifests[name].charter_identity
        self._entries = {n: q for n, one in manifests.items() if (q := one.held_out_query)}
        others = self._entries.keys() - {name} if name in self._entries else ()
        self._others = {n: manifests[n] for n in sorted(others)}
        if (folder / "found.safetensors").is_file() and self._receiver is not None:
            self._compare(self._receiver, self._load_found(self._receiver))

    @cached_property
    def _receiver(self) -> Receiver | None:
        """Of the query that the manifest states; None if it is not about this fusion's blocks."""
        entry = self._entries[self._name]
        receiver = open_receiver(
            self._member.prepared.take(entry.blocks),
            self._member.tokenizer,
            key=self._key,
            identity=self._identity,
            name=self._name,
        )
        is_stated = receiver is not None and receiver.query.commitment == entry.sha256
        if not is_stated or entry.blocks < len(self._member.held_out):
            log(
                "overlap",
                "warning",
                reason="held-out blocks are other than those of the query in the manifest; "
                "contribute again to have them compared with others' train text",
            )
            return None
        return receiver

    @cached_property
    def _sender(self) -> Sender:
        known = self._member.index_known()
        return Sender(known, secret=self._secret, fusion=self._fusion)

    def offer(self, progress: Progress | None = None) -> dict[str, bytes]:
        """What goes beside the first counts: the query, and the set with its signature.

        Args:
            progress: Receives 8-grams done of all of the train text.

        Raises:
            StorageError: On I/O errors.
        """
        riders: dict[str, bytes] = {}
        if not self._others:
            return riders
        if self._receiver is not None:
            riders[QUERY] = self._receiver.query.to_bytes()
        with _watching("of this contributor"):
            data = self._seal(progress).to_bytes()
            riders[SET] = data
            riders[SIGNATURE] = sign_set(
                data, self._key, identity=self._identity, fusion=self._fusion
            )
        return riders

    def _seal(self, progress: Progress | None) -> TagSet:
        """The set of this fusion; what is made of it is kept."""
        path, sender = self._folder / "sealing.safetensors", self._sender
        kept = sender.resume(path.read_bytes()) if path.is_file() else None
        sealing = sender.begin() if kept is None else kept
        while sealing.tags.size < sender.total:
            sealing = sender.advance(sealing, SET_BATCH)
            write_bytes(path, sealing.to_bytes(), mode=0o600)
            if progress is not None:
                progress(sealing.tags.size, sender.total)
        return sender.finish(sealing)

    def answer(self, question: Path) -> dict[str, bytes]:
        """What goes beside the answer to a question on a sum, by what lies beside the question.

        Args:
            question: Its folder.

        Raises:
            CorpusError: If a prepared corpus is malformed.
            StorageError: On I/O errors.
        """
        riders: dict[str, bytes] = {}
        if self._others and (question / QUERIES).is_dir():
            if not self._said.is_file():
                self._keep_sets(question)
            riders |= self._reply(question)
        if self._others and (question / REPLIES).is_dir():
            riders |= self._open(question)
        return riders

    def _keep_sets(self, question: Path) -> None:
        """Keep others' sets until their replies are here."""
        for name, manifest in self._others.items():
            with _watching(f"of '{name}'"):
                paths = question / SETS / name, question / SIGNATURES / name
                _, data = read_set(*paths, manifest, fusion=self._fusion)
                write_bytes(self._folder / "sets" / name, data)

    def _reply(self, question: Path) -> dict[str, bytes]:
        riders = {}
        for name in self._others:
            with _watching(f"of '{name}'"):
                query = Query.read(read_part(question / QUERIES / name, MAX_QUERY_BYTES), name)
                committed = self._entries[name].sha256
                reply = self._sender.answer(query, name, committed=committed, admit=self._admit)
                riders[f"{REPLIES}/{name}"] = reply.to_bytes()
        return riders

    @property
    def _said(self) -> Path:
        """The counts of all that was compared, said once: a few more replies tell whose hit."""
        return self._folder / "counts.json"

    def _open(self, question: Path) -> dict[str, bytes]:
        """Open replies one by one; the counts of all that was compared."""
        receiver = self._receiver
        if receiver is None:
            return {}
        if self._said.is_file():
            return {COUNTS: self._said.read_bytes()}
        found = self._load_found(receiver)
        for name in self._others:
            if name in found.senders:
                continue
            with _watching(f"of '{name}'"):
                tags = TagSet.read(read_part(self._folder / "sets" / name, MAX_SET_BYTES), name)
                data = read_part(question / REPLIES / name, MAX_REPLY_BYTES)
                reply = Reply.read(data, name, receiver.query)
                found = receiver.open(found, name, tags, reply)
                path = self._folder / "found.safetensors"
                write_bytes(path, found.to_bytes(), mode=0o600)
        counts = self._compare(receiver, found)
        write_bytes(self._said, counts)
        shutil.rmtree(self._folder / "sets", ignore_errors=True)
        return {COUNTS: counts}

    def _load_found(self, receiver: Receiver) -> Found:
        path = self._folder / "found.safetensors"
        kept = receiver.resume(path.read_bytes()) if path.is_file() else None
        return receiver.begin() if kept is None else kept

    def _compare(self, receiver: Receiver, found: Found) -> bytes:
        elsewhere = Elsewhere(receiver.list_known(found), found.senders)
        return canonical_json(self._member.compare(elsewhere).model_dump(mode="json"))


@contextmanager
def _watching(whose: str) -> Iterator[None]:
    """Let what is wrong with one member's part of the comparison end that part alone."""
    try:
        yield
    except (CorpusError, FederationError, QuestionRefusedError, SignatureError) as error:
        log("overlap", "warning", reason=f"held-out text, part {whose}: {error}")
