"""The coordinator's worker at its mailbox: publishes the charter, takes contributions, answers.

Imports neither torch nor flwr. Every function may be interrupted and called again.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from molora_fed.charter import Charter
from molora_fed.errors import FederationError, SignatureError
from molora_fed.federation.envelopes import keep_letter, open_letter, parse_letter, set_aside
from molora_fed.federation.homes import ContributorMailbox, CoordinatorHome
from molora_fed.federation.kept import EarlierResult, HelloRecord, Offer
from molora_fed.federation.letters import (
    Acknowledgement,
    CharterLetter,
    QuestionLetter,
    ResultLetter,
    ShownState,
    Summary,
    cut_findings,
)
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.messages import Shipment, describe_folder
from molora_fed.federation.signing import (
    build_acknowledgement_bytes,
    build_charter_bytes,
    build_result_bytes,
    hash_charter_letter,
)
from molora_fed.federation.strangers import bind_name
from molora_fed.storage.files import replace_folder, storage_errors
from molora_fed.storage.keys import build_public_pem, key_fingerprint, sign

__all__ = [
    "Delivery",
    "acknowledge",
    "announce_decision",
    "announce_withdrawal",
    "complete_deliveries",
    "declines",
    "publish_charter",
    "publish_result",
    "retract_result",
    "sign_kept_result",
]

_OTHER_FILES_BYTES = 4 * 2**20
_BYTES_PER_TOKEN = 12
_STRANGERS = 256
_KEPT_FAILURES = 32


def publish_charter(
    home: CoordinatorHome,
    charter: Charter,
    key: EllipticCurvePrivateKey,
    *,
    part_bytes: int,
    statistics_bytes: int = 0,
) -> None:
    """Put the signed charter, the base's files, the tasks and the limits into the outbox.

    Args:
        home: The coordinator's home.
        charter: What to publish, as parsed from `home.charter`.
        key: The coordinator's private key.
        part_bytes: Largest part of a file.
        statistics_bytes: Largest file of statistics of hidden states; 0 where none are published.

    Raises:
        FederationError: If the charter or the base's list of files does not fit into a message.
        StorageError: On I/O errors.
    """
    text = home.charter.read_text(encoding="utf-8")
    # Only the checkpoint's own files: what lies in folders below is of its training.
    files = describe_folder(home.base).files
    base = Shipment(tuple(entry for entry in files if "/" not in entry.name))
    identity, number = charter.identity_hash, charter.amendment.number
    head: dict[str, Any] = {
        "text": text,
        "identity": identity,
        "amendment": number,
        "base": base.to_json(),
        "tasks": [{"id": f"train-{number}", "kind": "train"}],
        "part_bytes": part_bytes,
    }
    letter_id = hash_charter_letter(head)
    signature = sign(key, build_charter_bytes(identity, number, letter_id))
    outside = {"id": letter_id, "public_key": build_public_pem(key), "signature": signature}
    samples = charter.amendment.samples
    blocks = samples.calibration + samples.admission + samples.held_out
    sample_bytes = blocks * charter.identity.corpus.block_size * _BYTES_PER_TOKEN
    limit = charter.identity.adapters.max_bytes + sample_bytes + _OTHER_FILES_BYTES
    fusion = charter.amendment.fusion
    limit += statistics_bytes + len(fusion.carried) * fusion.max_carried_bytes
    strangers = max(_STRANGERS, 4 * charter.amendment.expected)
    limits = {"contribution_bytes": limit, "strangers": strangers}
    keep_letter(home.outbox / "limits.json", limits)
    letter = parse_letter(CharterLetter, {**head, **outside}, what="the charter's letter")
    keep_letter(home.outbox / "charter.json", letter)


@dataclass(frozen=True)
class Delivery:
    """A contribution whose parts have all arrived.

    Attributes:
        mailbox: The contributor's mailbox.
        shipment: The contribution's files.
        public_key: Public key the contributor showed in its hello, PEM.
        name: Name it goes by.
        domain: Domain it joined with.
    """

    mailbox: ContributorMailbox
    shipment: Shipment
    public_key: str
    name: str
    domain: str

    def unpack(self, target: Path, *, part_bytes: int) -> None:
        """Put the contribution's folder together.

        Raises:
            FederationError: If a file is damaged; its parts are dropped and fetched again.
            StorageError: On I/O errors.
        """
        self.mailbox.parts.assemble(self.shipment, target, part_bytes=part_bytes)


def complete_deliveries(home: CoordinatorHome, *, part_bytes: int) -> Iterator[Delivery]:
    """The contributions that are complete and not acknowledged yet."""
    for mailbox in home.contributors():
        hello = open_letter(mailbox.hello_file, HelloRecord)
        offer = open_letter(mailbox.offer_file, Offer)
        if hello is None or offer is None or not _owns(mailbox, hello):
            continue
        shipment = offer.files
        if open_letter(mailbox.acknowledgement_file(shipment.id), Acknowledgement) is not None:
            continue
        if not mailbox.parts.missing(shipment, part_bytes=part_bytes):
            yield Delivery(mailbox, shipment, hello.public_key, hello.name, hello.domain)


def _owns(mailbox: ContributorMailbox, hello: HelloRecord) -> bool:
    """Whether a mailbox is that of the key in its hello; the server makes no others."""
    try:
        return key_fingerprint(hello.public_key) == mailbox.fingerprint
    except SignatureError as error:
        set_aside(mailbox.hello_file, error)
        return False


def acknowledge(
    delivery: Delivery,
    key: EllipticCurvePrivateKey,
    *,
    contribution_id: str,
    state: str,
    findings: Sequence[str],
    part_bytes: int,
) -> None:
    """Tell a contributor what became of its contribution; call it after the ledger's commit only.

    Args:
        delivery: The contribution.
        key: The coordinator's private key.
        contribution_id: Hash of the manifest; empty if there was no readable one.
        state: State in the ledger.
        findings: One line for each admission check that found something; cut, for they may quote
            what the contributor sent.
        part_bytes: Largest part of a file.

    Raises:
        StorageError: On I/O errors.
    """
    mailbox = delivery.mailbox
    body = {
        "shipment": delivery.shipment.id,
        "contribution_id": contribution_id,
        "state": state,
        "findings": cut_findings(findings),
    }
    body["signature"] = sign(key, build_acknowledgement_bytes(body))
    keep_letter(mailbox.acknowledgement_file(delivery.shipment.id), body)
    if state == "ADMITTED":
        bind_name(mailbox, delivery.name)
    else:
        _drop_oldest_acknowledgements(mailbox)
    mailbox.parts.discard(delivery.shipment, part_bytes=part_bytes)


def _drop_oldest_acknowledgements(mailbox: ContributorMailbox) -> None:
    """Keep so many answers to attempts that failed: each costs a file, and attempts are free."""
    failed = []
    for path in mailbox.list_acknowledgements():
        letter = open_letter(path, Acknowledgement)
        if letter is not None and letter.state in ("REJECTED", "QUARANTINED"):
            failed.append(path)
    failed.sort(key=lambda path: path.stat().st_mtime)
    for path in failed[:-_KEPT_FAILURES]:
        path.unlink(missing_ok=True)


def announce_withdrawal(
    mailbox: ContributorMailbox, key: EllipticCurvePrivateKey, contribution_id: str
) -> None:
    """Tell a contributor that it is out; no result is sent to it any more.

    Raises:
        StorageError: On I/O errors.
    """
    announce_decision(mailbox, key, contribution_id, state="WITHDRAWN", findings=())


def announce_decision(
    mailbox: ContributorMailbox,
    key: EllipticCurvePrivateKey,
    contribution_id: str,
    *,
    state: str,
    findings: Sequence[str],
) -> None:
    """Tell a contributor what was decided later of a contribution that was acknowledged.

    Args:
        mailbox: The contributor's.
        key: The coordinator's private key.
        contribution_id: Which.
        state: Its state in the ledger now.
        findings: One line for each reason.

    Raises:
        StorageError: On I/O errors.
    """
    for path in mailbox.list_acknowledgements():
        letter = open_letter(path, Acknowledgement)
        if letter is None or letter.contribution_id != contribution_id or letter.state == state:
            continue
        body = {**letter.to_json(), "state": state, "findings": cut_findings(findings)}
        keep_letter(path, {**body, "signature": sign(key, build_acknowledgement_bytes(body))})


def retract_result(home: CoordinatorHome, contribution_id: str) -> bool:
    """Take a result that was made from a contribution out of the outbox.

    Returns:
        Whether there was one.

    Raises:
        StorageError: On I/O errors.
    """
    path = home.outbox / "result.json"
    letter = open_letter(path, ResultLetter)
    if letter is None or contribution_id not in letter.summary.contributions:
        return False
    with storage_errors(path):
        path.unlink()
        shutil.rmtree(home.outbox / "result", ignore_errors=True)
    return True


def publish_result(
    home: CoordinatorHome,
    folders: Mapping[str, Path],
    summary: Summary,
    *,
    key: EllipticCurvePrivateKey,
    identity: str,
    part_bytes: int,
) -> str:
    """Put the fused model and the report into the outbox for every admitted contributor.

    Args:
        home: The coordinator's home.
        folders: Folders to send, by the name they get in the contributor's result.
        summary: Of what it was made; only whose contribution is in it gets the files.
        key: The coordinator's private key.
        identity: The charter's identity.
        part_bytes: Largest part of a file.

    Returns:
        Id of the shipment.

    Raises:
        FederationError: If a folder is missing, or the list of files does not fit into a message.
        StorageError: On I/O errors.
    """
    for folder in folders.values():
        if not folder.is_dir():
            raise FederationError(
                f"Cannot publish '{folder}': expected a folder, got nothing there. Fuse again."
            )
    results = home.outbox / "result"
    with replace_folder(results / "next") as temporary:
        for name, folder in folders.items():
            shutil.copytree(folder, temporary / name)
    shipment = describe_folder(results / "next")
    target = results / shipment.id
    if target.exists():
        shutil.rmtree(target)
    (results / "next").rename(target)
    _keep_result(home, shipment, summary, key=key, identity=identity, part_bytes=part_bytes)
    for other in results.iterdir():
        if other != target:
            shutil.rmtree(other)
    return shipment.id


def _keep_result(
    home: CoordinatorHome,
    files: Shipment,
    summary: Summary,
    *,
    key: EllipticCurvePrivateKey,
    identity: str,
    part_bytes: int,
) -> None:
    letter = ResultLetter(
        id=files.id,
        files=files,
        summary=summary,
        part_bytes=part_bytes,
        identity=identity,
        signature=sign(key, build_result_bytes(identity, files.id, summary)),
    )
    keep_letter(home.outbox / "result.json", letter)


def sign_kept_result(home: CoordinatorHome, charter: Charter, key: EllipticCurvePrivateKey) -> None:
    """Sign the result that an earlier version left in the outbox unsigned.

    Raises:
        StorageError: On I/O errors.
    """
    path = home.outbox / "result.json"
    try:
        kept = read_json(path)
        if not isinstance(kept, dict) or "signature" in kept:
            return
        earlier = parse_letter(EarlierResult, kept, what="the result in the outbox")
    except FederationError as error:
        set_aside(path, error)  # fused again
        return
    _keep_result(
        home,
        earlier.files,
        earlier.summary,
        key=key,
        identity=charter.identity_hash,
        part_bytes=earlier.part_bytes,
    )


def declines(mailbox: ContributorMailbox) -> bool:
    """Whether a contributor has said that it does not answer what it is asked now."""
    asked = open_letter(mailbox.question_file, QuestionLetter)
    state = open_letter(mailbox.state_file, ShownState)
    return asked is not None and state is not None and state.declined == asked.id
