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
from molora_fed.errors import FederationError
from molora_fed.federation.homes import ContributorMailbox, CoordinatorHome
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.messages import Shipment, describe_folder, parse_shipment
from molora_fed.federation.worker_mail import build_charter_bytes
from molora_fed.storage.files import (
    canonical_json,
    hash_bytes,
    replace_folder,
    storage_errors,
    write_json,
)
from molora_fed.storage.keys import build_public_pem, sign

__all__ = [
    "Delivery",
    "acknowledge",
    "announce_decision",
    "announce_withdrawal",
    "build_acknowledgement_bytes",
    "complete_deliveries",
    "publish_charter",
    "publish_result",
    "retract_result",
]

_OTHER_FILES_BYTES = 4 * 2**20
_BYTES_PER_TOKEN = 12


def publish_charter(
    home: CoordinatorHome, charter: Charter, key: EllipticCurvePrivateKey, *, part_bytes: int
) -> None:
    """Put the signed charter, the base's files, the tasks and the limits into the outbox.

    Args:
        home: The coordinator's home.
        charter: What to publish, as parsed from `home.charter`.
        key: The coordinator's private key.
        part_bytes: Largest part of a file.

    Raises:
        StorageError: On I/O errors.
    """
    text = home.charter.read_text(encoding="utf-8")
    # Only the checkpoint's own files: what lies in folders below is of its training.
    files = describe_folder(home.base).files
    base = Shipment(tuple(entry for entry in files if "/" not in entry.name))
    task = {"id": f"train-{charter.amendment.number}", "kind": "train"}
    head = {"text": text, "base": base.to_json(), "tasks": [task], "part_bytes": part_bytes}
    letter_id = hash_bytes(canonical_json(head))
    letter = home.outbox / "charter.json"
    if (read_json(letter) or {}).get("id") == letter_id:
        return
    samples = charter.amendment.samples
    blocks = samples.calibration + samples.admission + samples.held_out
    sample_bytes = blocks * charter.identity.corpus.block_size * _BYTES_PER_TOKEN
    limit = charter.identity.adapters.max_bytes + sample_bytes + _OTHER_FILES_BYTES
    write_json(home.outbox / "limits.json", {"contribution_bytes": limit})
    signature = sign(key, build_charter_bytes(text))
    signed = {**head, "id": letter_id, "public_key": build_public_pem(key), "signature": signature}
    write_json(letter, signed)


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
        hello, offer = read_json(mailbox.hello_file), read_json(mailbox.offer_file)
        if hello is None or offer is None:
            continue
        shipment = parse_shipment(offer["files"])
        if mailbox.acknowledgement_file(shipment.id).exists():
            continue
        if not mailbox.parts.missing(shipment, part_bytes=part_bytes):
            yield Delivery(mailbox, shipment, hello["public_key"], hello["name"], hello["domain"])


def build_acknowledgement_bytes(body: Mapping[str, Any]) -> bytes:
    """What the coordinator signs of an acknowledgement."""
    unsigned = {name: value for name, value in body.items() if name != "signature"}
    return canonical_json({"purpose": "molora-acknowledgement-1", **unsigned})


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
        findings: One line for each admission check that found something.
        part_bytes: Largest part of a file.

    Raises:
        StorageError: On I/O errors.
    """
    body = {
        "shipment": delivery.shipment.id,
        "contribution_id": contribution_id,
        "state": state,
        "findings": list(findings),
    }
    body["signature"] = sign(key, build_acknowledgement_bytes(body))
    write_json(delivery.mailbox.acknowledgement_file(delivery.shipment.id), body)
    delivery.mailbox.parts.discard(delivery.shipment, part_bytes=part_bytes)


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
    for path in sorted((mailbox.folder / "acknowledgements").glob("*.json")):
        body = read_json(path) or {}
        if body.get("contribution_id") == contribution_id and body.get("state") != state:
            body = {**body, "state": state, "findings": list(findings)}
            write_json(path, {**body, "signature": sign(key, build_acknowledgement_bytes(body))})


def retract_result(home: CoordinatorHome, contribution_id: str) -> bool:
    """Take a result that was made from a contribution out of the outbox.

    Returns:
        Whether there was one.

    Raises:
        StorageError: On I/O errors.
    """
    letter = home.outbox / "result.json"
    if contribution_id not in (read_json(letter) or {}).get("summary", {}).get("contributions", ()):
        return False
    with storage_errors(letter):
        letter.unlink()
        shutil.rmtree(home.outbox / "result", ignore_errors=True)
    return True


def publish_result(
    home: CoordinatorHome,
    folders: Mapping[str, Path],
    summary: Mapping[str, Any],
    *,
    part_bytes: int,
) -> str:
    """Put the fused model and the report into the outbox for every admitted contributor.

    Args:
        home: The coordinator's home.
        folders: Folders to send, by the name they get in the contributor's result.
        summary: JSON object sent with the list of files; only whose contribution id is among its
            `contributions` gets them.
        part_bytes: Largest part of a file.

    Returns:
        Id of the shipment.

    Raises:
        FederationError: If a folder is missing.
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
    letter = {
        "id": shipment.id,
        "files": shipment.to_json(),
        "summary": dict(summary),
        "part_bytes": part_bytes,
    }
    write_json(home.outbox / "result.json", letter)
    for other in results.iterdir():
        if other != target:
            shutil.rmtree(other)
    return shipment.id
