"""The server's side of the dialogue: what to send next, and where answers are kept.

Works on folders only, so it can be stopped at any moment and is tested without Flower. Imports
neither torch nor flwr.
"""

import secrets
from dataclasses import dataclass, field

from molora_fed.errors import FederationError, SignatureError
from molora_fed.federation.envelopes import Envelope, keep_letter, open_letter
from molora_fed.federation.homes import ContributorMailbox, CoordinatorHome
from molora_fed.federation.kept import HelloRecord, Offer
from molora_fed.federation.letters import (
    HELLO_PURPOSE,
    Acknowledgement,
    AnswerLetter,
    CharterLetter,
    Fetch,
    Greeting,
    Hello,
    Letter,
    Manifest,
    QuestionLetter,
    Refusal,
    ResultLetter,
    State,
    Wait,
)
from molora_fed.federation.mailbox import read_parts, take_batch
from molora_fed.federation.messages import PartName, Shipment, list_describing, plan_parts
from molora_fed.federation.signing import build_hello_bytes
from molora_fed.federation.strangers import UploadRoom, find_refusal, note_presence, read_limits
from molora_fed.storage.keys import key_fingerprint, verify
from molora_fed.storage.untrusted import clean

__all__ = ["RemoteContributor", "ServerDialogue"]

MAX_REASON = 1_000


@dataclass
class RemoteContributor:
    """What the server knows of one connected node; forgotten when the node goes.

    Attributes:
        nonce: What the node must sign; fresh for every node.
        node_key: Public key of the node where the transport knows it; the hello must sign it then.
        fingerprint: Fingerprint of the public key it showed; empty before it did.
        refusal: Why it was not let in; empty if it was not refused.
        state: The state of its last reply.
        has_offer: Whether that reply offered a contribution.
        answered: Id of the question that that reply answered; empty if none.
        telling: Signature of the acknowledgement that was sent last.
        told: The same, once there was a reply; decisions change, so each node is told anew.
    """

    nonce: str = field(default_factory=lambda: secrets.token_hex(32))
    node_key: str | None = None
    fingerprint: str = ""
    refusal: str = ""
    state: State = field(default_factory=State)
    has_offer: bool = False
    answered: str = ""
    telling: str = ""
    told: str = ""


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
        self._room = UploadRoom(home)

    def next_envelope(self, remote: RemoteContributor) -> Envelope | None:
        """What to send to a node now, or None if nothing is to be said."""
        if remote.refusal:
            refused = Envelope((Refusal(reason=remote.refusal),))
            return None if remote.state.refused else refused
        charter = open_letter(self._home.outbox / "charter.json", CharterLetter)
        if charter is None:
            return None  # the coordinator's worker is still starting
        if not remote.fingerprint:
            return Envelope((self._greet(remote, charter),))
        mailbox = self._home.contributor(remote.fingerprint)
        state = remote.state
        refusal = open_letter(mailbox.refusal_file, Refusal)
        if refusal is not None:
            return None if state.refused else Envelope((refusal,))
        opening = self._opening(state, charter)
        if opening is not None:
            return opening
        offer = open_letter(mailbox.offer_file, Offer)
        if offer is None or not remote.has_offer:
            return Envelope((self._wait_letter(),))
        return self._about_contribution(mailbox, remote, offer)

    def _greet(self, remote: RemoteContributor, charter: CharterLetter) -> Greeting:
        return Greeting(
            nonce=remote.nonce,
            identity=charter.identity,
            coordinator=key_fingerprint(charter.public_key),
        )

    def _opening(self, state: State, charter: CharterLetter) -> Envelope | None:
        """Charter, tasks and the base, in as few envelopes as possible."""
        letters: list[Letter] = []
        if state.charter != charter.id:
            letters.append(charter)
        letters += [task for task in charter.tasks if task.id not in state.tasks]
        base = charter.base
        if state.own_base and base.id not in state.received:
            base = list_describing(base)
        names = _list_undelivered(base, state, charter.part_bytes)
        if not letters and not names:
            return None
        batch = take_batch(names, max_bytes=self._message_bytes)
        if len(batch) == len(names):
            letters.append(self._wait_letter())  # this is all: answer when there is news
        return Envelope(tuple(letters), tuple(read_parts(self._home.base, charter.base, batch)))

    def _wait_letter(self, question: str | None = None) -> Wait:
        """Asks for news: a contribution, or the answer to a question."""
        return Wait(seconds=self._wait_seconds, parts_bytes=self._message_bytes, question=question)

    def _about_contribution(
        self, mailbox: ContributorMailbox, remote: RemoteContributor, offer: Offer
    ) -> Envelope | None:
        """Fetch what is missing; acknowledge what is committed; bring the result."""
        shipment, state = offer.files, remote.state
        acknowledgement = open_letter(mailbox.acknowledgement_file(shipment.id), Acknowledgement)
        if acknowledgement is None:
            missing = mailbox.parts.missing(shipment, part_bytes=self._message_bytes)
            if not missing:
                return None  # complete; the coordinator's worker is at it
            if not self._room.grant(mailbox, offer):
                return None  # other strangers' uploads first
            return Envelope((self._fetch(missing),))
        letters: list[Letter] = []
        if state.acknowledged != shipment.id or remote.told != acknowledgement.signature:
            letters.append(acknowledgement)
            remote.telling = acknowledgement.signature
        question = open_letter(mailbox.question_file, QuestionLetter)
        if question is not None and acknowledgement.state == "ADMITTED":
            return self._about_question(mailbox, state, question, letters)
        result = open_letter(self._home.outbox / "result.json", ResultLetter)
        if result is None or not _is_part_of(result, acknowledgement):
            return Envelope(tuple(letters)) if letters else None
        names = _list_undelivered(result.files, state, result.part_bytes)
        if not letters and not names and state.result == result.id:
            keep_letter(mailbox.delivered_file, {"id": result.id})
            return None
        letters.append(result)
        batch = take_batch(names, max_bytes=self._message_bytes)
        parts = read_parts(self._home.outbox / "result" / result.id, result.files, batch)
        return Envelope(tuple(letters), tuple(parts))

    def _fetch(self, missing: list[PartName]) -> Fetch:
        return Fetch(names=take_batch(missing, max_bytes=self._message_bytes))

    def _about_question(
        self,
        mailbox: ContributorMailbox,
        state: State,
        question: QuestionLetter,
        letters: list[Letter],
    ) -> Envelope | None:
        """Bring the question; wait for the answer; fetch what is missing of it."""
        answered = self._find_answer(mailbox, question)
        if answered is not None:
            missing = mailbox.parts.missing(answered, part_bytes=self._message_bytes)
            if missing:
                letters.append(self._fetch(missing))
            # Complete: the coordinator's worker is at it.
            return Envelope(tuple(letters)) if letters else None
        if state.question != question.id:
            letters.append(question)
        names = _list_undelivered(question.files, state, question.part_bytes)
        batch = take_batch(names, max_bytes=self._message_bytes)
        if len(batch) == len(names):
            letters.append(self._wait_letter(question.id))
        folder = self._home.outbox / "questions" / question.files.id
        return Envelope(tuple(letters), tuple(read_parts(folder, question.files, batch)))

    def _find_answer(
        self, mailbox: ContributorMailbox, question: QuestionLetter
    ) -> Shipment | None:
        """The files of a contributor's answer to a question; None before it has one."""
        answered = open_letter(mailbox.answer_file, AnswerLetter)
        return answered.files if answered and answered.question == question.id else None

    def accept(self, remote: RemoteContributor, reply: Envelope) -> None:
        """File an answer in the contributor's mailbox.

        Raises:
            SignatureError: If a hello is not signed by the key it shows, for this server.
            FederationError: If the answer is malformed, or the contribution is too large.
            StorageError: On I/O errors; the answer is then asked for again.
        """
        state = reply.find(State)
        if not remote.fingerprint and not remote.refusal:
            if not reply.letters:
                return  # a simulated node whose contributor has not joined yet
            self._accept_hello(remote, reply.find(Hello))
        if remote.refusal:
            remote.state = state or remote.state
            return
        mailbox = self._home.contributor(remote.fingerprint)
        note_presence(mailbox)
        manifest, answered = reply.find(Manifest), reply.find(AnswerLetter)
        if manifest is not None:
            self._accept_manifest(mailbox, manifest)
        if answered is not None:
            self._accept_answer(mailbox, answered)
        self._accept_parts(mailbox, reply)
        if state is not None:
            remote.state, remote.told = state, remote.telling
            remote.has_offer = manifest is not None
            remote.answered = "" if answered is None else answered.question
            declined = {} if state.declined is None else {"declined": state.declined}
            shown = {**state.known, "problem": state.problem, **declined}
            keep_letter(mailbox.state_file, shown)
        mailbox.fault_file.unlink(missing_ok=True)

    def note_fault(self, remote: RemoteContributor, error: Exception) -> str:
        """Note what was wrong with a contributor's message, which was skipped.

        Returns:
            Name of the contributor, for the log.

        Raises:
            StorageError: On I/O errors.
        """
        if not remote.fingerprint:
            return "an unknown node"
        mailbox = self._home.contributor(remote.fingerprint)
        reason = f"a message was skipped: {clean(error, MAX_REASON)}"
        keep_letter(mailbox.fault_file, Refusal(reason=reason))
        return mailbox.name

    def _accept_hello(self, remote: RemoteContributor, hello: Hello | None) -> None:
        """Let a node in as the owner of the key it shows, or note why not."""
        charter = open_letter(self._home.outbox / "charter.json", CharterLetter)
        if hello is None or charter is None:
            raise FederationError(
                "Cannot talk to a node: expected its public key and signature, got neither. "
                "Run the same molora-fed version on both sides."
            )
        if hello.purpose != HELLO_PURPOSE:
            remote.refusal = (
                f"Cannot join: expected a hello of form {HELLO_PURPOSE}, got {clean(hello.purpose)}"
                ". Install the same molora-fed version as the server, and join again."
            )
            return
        if remote.node_key is not None and hello.node_key != remote.node_key:
            raise SignatureError(
                "Cannot trust hello: expected one that names the node it came from, got another. "
                "Run `molora join` again."
            )
        greeting = self._greet(remote, charter)
        try:
            verify(
                hello.public_key,
                build_hello_bytes(
                    hello.purpose, **greeting.to_json(), name=hello.name, domain=hello.domain,
                    node_key=hello.node_key,
                ),
                hello.signature,
                what="hello",
            )  # fmt: skip
        except SignatureError:
            remote.nonce = secrets.token_hex(32)
            raise
        mailbox = self._home.contributor(key_fingerprint(hello.public_key))
        remote.refusal = find_refusal(self._home, mailbox.fingerprint, hello.name)
        if remote.refusal:
            return
        mailbox.refusal_file.unlink(missing_ok=True)
        record = HelloRecord(public_key=hello.public_key, name=hello.name, domain=hello.domain)
        keep_letter(mailbox.hello_file, record)
        remote.fingerprint = mailbox.fingerprint

    def _accept_manifest(self, mailbox: ContributorMailbox, manifest: Manifest) -> None:
        """Note which files a contributor offers, within the charter's limits."""
        limits = read_limits(self._home)
        if limits is None:
            return  # asked again once the coordinator's worker has said what is allowed
        files = manifest.files
        if files.num_bytes > limits.contribution_bytes:
            error = FederationError(
                f"Cannot take this contribution: expected at most {limits.contribution_bytes} "
                f"bytes, got {files.num_bytes}. Build it under the charter's rules."
            )
            mailbox.parts.keep_only(())
            keep_letter(mailbox.refusal_file, Refusal(reason=str(error)))
            raise error
        known = open_letter(mailbox.offer_file, Offer)
        if known is None or known.id != files.id:
            keep_letter(mailbox.offer_file, Offer(id=files.id, files=files))
            mailbox.parts.keep_only(self._list_wanted(mailbox))

    def _accept_answer(self, mailbox: ContributorMailbox, answered: AnswerLetter) -> None:
        """Note which files answer the question that is open, within its limits."""
        question = open_letter(mailbox.question_file, QuestionLetter)
        if question is None or answered.question != question.id:
            return  # of a question that is settled
        if answered.files.num_bytes > question.answer_bytes:
            raise FederationError(
                f"Cannot take this answer: expected at most {question.answer_bytes} bytes, got "
                f"{answered.files.num_bytes}. Run the same molora-fed version on both sides."
            )
        known = open_letter(mailbox.answer_file, AnswerLetter)
        if known != answered:
            keep_letter(mailbox.answer_file, answered)
            mailbox.parts.keep_only(self._list_wanted(mailbox))

    def _list_wanted(self, mailbox: ContributorMailbox) -> set[PartName]:
        """The parts of what is offered and not acknowledged yet, and of the open answer."""
        wanted: set[PartName] = set()
        offer = open_letter(mailbox.offer_file, Offer)
        if offer is not None and not mailbox.acknowledgement_file(offer.files.id).exists():
            wanted |= set(plan_parts(offer.files, part_bytes=self._message_bytes))
        question = open_letter(mailbox.question_file, QuestionLetter)
        answered = None if question is None else self._find_answer(mailbox, question)
        if answered is not None:
            wanted |= set(plan_parts(answered, part_bytes=self._message_bytes))
        return wanted

    def _accept_parts(self, mailbox: ContributorMailbox, reply: Envelope) -> None:
        """Keep the parts that belong to what is offered and are still needed."""
        if not reply.parts:
            return
        wanted = self._list_wanted(mailbox)
        for part in reply.parts:
            if part.name in wanted:
                mailbox.parts.put(part)


def _list_undelivered(shipment: Shipment, state: State, part_bytes: int) -> list[PartName]:
    """The parts of a shipment that the contributor lacks, in order."""
    if shipment.id in state.received:
        return []
    held = set(state.held)
    return [name for name in plan_parts(shipment, part_bytes=part_bytes) if name not in held]


def _is_part_of(result: ResultLetter, acknowledgement: Acknowledgement) -> bool:
    """Whether a result was made with a contribution; a newcomer waits for the one that is."""
    is_in = acknowledgement.contribution_id in result.summary.contributions
    return acknowledgement.state == "ADMITTED" and is_in
