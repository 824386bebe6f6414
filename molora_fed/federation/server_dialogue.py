"""The server's side of the dialogue: what to send next, and where answers are kept.

Works on folders only, so it can be stopped at any moment and is tested without Flower. Imports
neither torch nor flwr.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from molora_fed.errors import FederationError, SignatureError
from molora_fed.federation.client_dialogue import build_hello_bytes
from molora_fed.federation.homes import (
    ContributorMailbox,
    CoordinatorHome,
    public_state,
)
from molora_fed.federation.mailbox import read_json, read_parts, take_batch
from molora_fed.federation.messages import (
    Envelope,
    Letter,
    PartName,
    Shipment,
    parse_part_names,
    parse_shipment,
    plan_parts,
)
from molora_fed.storage.files import write_json
from molora_fed.storage.keys import key_fingerprint, verify

__all__ = ["RemoteContributor", "ServerDialogue"]

_MAX_LIST = 20_000


@dataclass
class RemoteContributor:
    """What the server knows of one connected node; forgotten when the node goes.

    Attributes:
        nonce: What the node must sign; fresh for every node.
        fingerprint: Fingerprint of the public key it showed; empty before it did.
        state: The state of its last reply.
    """

    nonce: str = field(default_factory=lambda: secrets.token_hex(32))
    fingerprint: str = ""
    state: Mapping[str, Any] = field(default_factory=dict)


class ServerDialogue:
    """Decides the next envelope for a contributor and files its answers.

    Args:
        home: The coordinator's home.
        message_bytes: Largest part and largest sum of parts in an envelope.
        wait_seconds: How long a contributor may hold back an answer when there is no news.
    """

    def __init__(self, home: CoordinatorHome, *, message_bytes: int, wait_seconds: float) -> None:
        self._home = home
        self._message_bytes = message_bytes
        self._wait_seconds = wait_seconds

    def next_envelope(self, remote: RemoteContributor) -> Envelope | None:
        """What to send to a node now, or None if nothing is to be said."""
        if not remote.fingerprint:
            return Envelope((Letter("hello", {"nonce": remote.nonce}),))
        mailbox = self._home.contributor(remote.fingerprint)
        state = remote.state
        refusal = read_json(mailbox.refusal_file)
        if refusal is not None:
            return None if state.get("refused") else Envelope((Letter("refusal", refusal),))
        charter = read_json(self._home.outbox / "charter.json")
        if charter is None:
            return None  # the coordinator's worker is still starting
        opening = self._opening(state, charter)
        if opening is not None:
            return opening
        offer = read_json(mailbox.offer_file)
        if offer is None or not state.get("offer"):
            return Envelope((self._wait_letter(),))
        return self._about_contribution(mailbox, state, parse_shipment(offer["files"]))

    def _opening(self, state: Mapping[str, Any], charter: Mapping[str, Any]) -> Envelope | None:
        """Charter, tasks and the base, in as few envelopes as possible."""
        letters = []
        if state.get("charter") != charter["id"]:
            letters.append(Letter("charter", charter))
        known = set(state.get("tasks", ()))
        letters += [Letter("task", task) for task in charter["tasks"] if task["id"] not in known]
        base = parse_shipment(charter["base"])
        names = self._undelivered(base, state)
        if not letters and not names:
            return None
        batch = take_batch(names, max_bytes=self._message_bytes)
        if len(batch) == len(names):
            letters.append(self._wait_letter())  # this is all: answer when there is news
        return Envelope(tuple(letters), tuple(read_parts(self._home.base, base, batch)))

    def _undelivered(self, shipment: Shipment, state: Mapping[str, Any]) -> list[PartName]:
        """The parts of a shipment that the contributor lacks, in order."""
        if shipment.id in state.get("received", ()):
            return []
        held = set(parse_part_names(state.get("held", ())))
        parts = plan_parts(shipment, part_bytes=self._message_bytes)
        return [name for name in parts if name not in held]

    def _wait_letter(self, question: str = "") -> Letter:
        """Asks for news: a contribution, or the answer to a question."""
        body = {"seconds": self._wait_seconds, "parts_bytes": self._message_bytes}
        return Letter("wait", {**body, "question": question} if question else body)

    def _about_contribution(
        self, mailbox: ContributorMailbox, state: Mapping[str, Any], shipment: Shipment
    ) -> Envelope | None:
        """Fetch what is missing; acknowledge what is committed; bring the result."""
        acknowledgement = read_json(mailbox.acknowledgement_file(shipment.id))
        if acknowledgement is None:
            missing = mailbox.parts.missing(shipment, part_bytes=self._message_bytes)
            if not missing:
                return None  # complete; the coordinator's worker is at it
            batch = take_batch(missing, max_bytes=self._message_bytes)
            return Envelope((Letter("fetch", {"names": [str(name) for name in batch]}),))
        letters = []
        if state.get("acknowledged") != shipment.id:
            letters.append(Letter("acknowledgement", acknowledgement))
        question = read_json(mailbox.question_file)
        if question is not None and acknowledgement["state"] == "ADMITTED":
            return self._about_question(mailbox, state, question, letters)
        result = read_json(self._home.outbox / "result.json")
        if result is None or not _is_part_of(result, acknowledgement):
            return Envelope(tuple(letters)) if letters else None
        files = parse_shipment(result["files"])
        names = self._undelivered(files, state)
        if not letters and not names and state.get("result") == result["id"]:
            if (read_json(mailbox.delivered_file) or {}).get("id") != result["id"]:
                write_json(mailbox.delivered_file, {"id": result["id"]})
            return None
        letters.append(Letter("result", result))
        batch = take_batch(names, max_bytes=self._message_bytes)
        parts = read_parts(self._home.outbox / "result" / result["id"], files, batch)
        return Envelope(tuple(letters), tuple(parts))

    def _about_question(
        self,
        mailbox: ContributorMailbox,
        state: Mapping[str, Any],
        question: Mapping[str, Any],
        letters: list[Letter],
    ) -> Envelope | None:
        """Bring the question; wait for the answer; fetch what is missing of it."""
        answered = self._find_answer(mailbox, question)
        if answered is not None:
            missing = mailbox.parts.missing(answered, part_bytes=self._message_bytes)
            batch = take_batch(missing, max_bytes=self._message_bytes)
            if batch:
                letters.append(Letter("fetch", {"names": [str(name) for name in batch]}))
            # Complete: the coordinator's worker is at it.
            return Envelope(tuple(letters)) if letters else None
        if state.get("question") != question["id"]:
            letters.append(Letter("question", question))
        files = parse_shipment(question["files"])
        names = self._undelivered(files, state)
        batch = take_batch(names, max_bytes=self._message_bytes)
        if len(batch) == len(names):
            letters.append(self._wait_letter(question["id"]))
        folder = self._home.outbox / "questions" / files.id
        return Envelope(tuple(letters), tuple(read_parts(folder, files, batch)))

    def _find_answer(
        self, mailbox: ContributorMailbox, question: Mapping[str, Any]
    ) -> Shipment | None:
        """The files of a contributor's answer to a question; None before it has one."""
        answered = read_json(mailbox.answer_file) or {}
        if answered.get("question") != question["id"]:
            return None
        return parse_shipment(answered["files"])

    def accept(self, remote: RemoteContributor, reply: Envelope) -> None:
        """File an answer in the contributor's mailbox.

        Raises:
            SignatureError: If a hello is not signed by the key it shows.
            FederationError: If the answer is malformed, or the contribution is too large.
            StorageError: On I/O errors; the answer is then asked for again.
        """
        if not remote.fingerprint and not reply.letters:
            return  # a simulated node whose contributor has not joined yet
        hello = reply.find("hello")
        if not remote.fingerprint:
            if hello is None:
                raise FederationError(
                    "Cannot talk to a node: expected its public key and signature, got neither. "
                    "Run the same molora-fed version on both sides."
                )
            self._accept_hello(remote, hello)
        mailbox = self._home.contributor(remote.fingerprint)
        manifest = reply.find("manifest")
        if manifest is not None:
            self._accept_manifest(mailbox, manifest)
        answered = reply.find("answer")
        if answered is not None:
            self._accept_answer(mailbox, answered)
        self._accept_parts(mailbox, reply)
        state = reply.find("state")
        if state is not None:
            remote.state = {
                **_check_state(state),
                "offer": manifest is not None,
                "answered": str((answered or {}).get("question", "")),
            }
            shown = {**public_state(state), "problem": remote.state["problem"]}
            if read_json(mailbox.state_file) != shown:
                write_json(mailbox.state_file, shown)

    def _accept_hello(self, remote: RemoteContributor, hello: Mapping[str, Any]) -> None:
        public_key = str(hello.get("public_key", ""))
        try:
            verify(
                public_key,
                build_hello_bytes(remote.nonce),
                str(hello.get("signature", "")),
                what="hello",
            )
        except SignatureError:
            remote.nonce = secrets.token_hex(32)
            raise
        name, domain = str(hello.get("name", ""))[:63], str(hello.get("domain", ""))[:63]
        mailbox = self._home.contributor(key_fingerprint(public_key))
        taken = any(
            other.name == name and other.fingerprint != mailbox.fingerprint
            for other in self._home.contributors()
        )
        if taken:
            reason = (
                f"Cannot join as '{name}': expected a name nobody else has, got one that belongs "
                "to another key. Choose another with --name."
            )
            write_json(mailbox.refusal_file, {"reason": reason})
        else:
            mailbox.refusal_file.unlink(missing_ok=True)
            record = {"public_key": public_key, "name": name, "domain": domain}
            if read_json(mailbox.hello_file) != record:
                write_json(mailbox.hello_file, record)
        remote.fingerprint = mailbox.fingerprint

    def _accept_manifest(self, mailbox: ContributorMailbox, manifest: Mapping[str, Any]) -> None:
        """Note which files a contributor offers, within the charter's limits."""
        limits = read_json(self._home.outbox / "limits.json")
        if limits is None:
            return  # asked again once the coordinator's worker has said what is allowed
        try:
            shipment = parse_shipment(manifest.get("files"), max_bytes=limits["contribution_bytes"])
        except FederationError as error:
            write_json(mailbox.refusal_file, {"reason": str(error)})
            raise
        offer = {"id": shipment.id, "files": shipment.to_json()}
        if read_json(mailbox.offer_file) != offer:
            write_json(mailbox.offer_file, offer)

    def _accept_answer(self, mailbox: ContributorMailbox, answered: Mapping[str, Any]) -> None:
        """Note which files answer the question that is open, within its limits."""
        question = read_json(mailbox.question_file)
        if question is None or answered.get("question") != question["id"]:
            return  # of a question that is settled
        shipment = parse_shipment(answered.get("files"), max_bytes=question["answer_bytes"])
        record = {
            "question": question["id"],
            "files": shipment.to_json(),
            "signature": str(answered.get("signature", ""))[:1_000],
        }
        if read_json(mailbox.answer_file) != record:
            write_json(mailbox.answer_file, record)

    def _accept_parts(self, mailbox: ContributorMailbox, reply: Envelope) -> None:
        """Keep the parts that belong to what is offered and are still needed."""
        if not reply.parts:
            return
        wanted: set[PartName] = set()
        offer, question = read_json(mailbox.offer_file), read_json(mailbox.question_file)
        if offer is not None:
            shipment = parse_shipment(offer["files"])
            if read_json(mailbox.acknowledgement_file(shipment.id)) is None:
                wanted |= set(plan_parts(shipment, part_bytes=self._message_bytes))
        answered = None if question is None else self._find_answer(mailbox, question)
        if answered is not None:
            wanted |= set(plan_parts(answered, part_bytes=self._message_bytes))
        for part in reply.parts:
            if part.name in wanted:
                mailbox.parts.put(part)


def _is_part_of(result: Mapping[str, Any], acknowledgement: Mapping[str, Any]) -> bool:
    """Whether a result was made with a contribution; a newcomer waits for the one that is."""
    is_admitted = acknowledgement["state"] == "ADMITTED"
    contributions = result["summary"].get("contributions", ())
    return is_admitted and acknowledgement["contribution_id"] in contributions


def _check_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a contributor's state that the dialogue reads, with their types checked."""
    checked: dict[str, Any] = {**public_state(dict(state)), "refused": bool(state.get("refused"))}
    for name in ("charter", "acknowledged", "question", "result", "problem"):
        value = state.get(name, "")
        checked[name] = value[:4_096] if isinstance(value, str) else ""
    for name in ("tasks", "received", "held"):
        values = state.get(name, [])
        if not isinstance(values, list) or len(values) > _MAX_LIST:
            raise FederationError(
                f"Cannot read a contributor's state: expected a list of at most {_MAX_LIST} in "
                f"'{name}', got {type(values).__name__}. Run the same molora-fed version on both "
                "sides."
            )
        checked[name] = [value for value in values if isinstance(value, str)]
    parse_part_names(checked["held"])
    return checked
