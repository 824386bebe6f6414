"""The contributor's worker at its mailbox: takes charter, base and result, offers a contribution.

Where texts are private it also takes the coordinator's questions and leaves the answers.

Imports neither torch nor flwr. Every function may be interrupted and called again.
"""

import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from molora_fed.charter import Charter, load_charter, parse_charter
from molora_fed.errors import FederationError
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.messages import (
    Shipment,
    build_answer_bytes,
    build_question_bytes,
    describe_folder,
    parse_shipment,
)
from molora_fed.plugins import Plugins
from molora_fed.storage.files import (
    canonical_json,
    hash_bytes,
    replace_folder,
    storage_errors,
    write_bytes,
    write_json,
)
from molora_fed.storage.keys import key_fingerprint, load_key, sign, verify
from molora_fed.types import Progress

if TYPE_CHECKING:
    from molora_fed.population.private_member import PrivateMember

__all__ = [
    "answer_question",
    "build_charter_bytes",
    "find_question",
    "give_consent",
    "has_consent",
    "offer_contribution",
    "receive_charter",
    "receive_shipment",
    "refuse_question",
    "until",
]

LOOK_SECONDS = 0.2
Found = TypeVar("Found")


def until(look: Callable[[], Found | None]) -> Generator[None, None, Found]:
    """Yield to whoever advances a worker until something is found."""
    while (found := look()) is None:
        yield
    return found


def build_charter_bytes(text: str) -> bytes:
    """What the coordinator signs of a charter's text."""
    return canonical_json({"purpose": "molora-charter-1", "text": hash_bytes(text.encode())})


def receive_charter(home: ContributorHome) -> Charter | None:
    """Check a charter that has arrived, and keep it; None if none has.

    The coordinator's key and the charter's identity are those of the first join ever after.

    Raises:
        SignatureError: If it is not signed by the coordinator.
        CharterError: If it is malformed.
        FederationError: If it is another coordinator's or another cooperative's.
    """
    letter = read_json(home.charter_letter)
    if letter is None:
        return None
    text, public_key = str(letter.get("text", "")), str(letter.get("public_key", ""))
    verify(public_key, build_charter_bytes(text), str(letter.get("signature", "")), what="charter")
    charter = parse_charter(text, where="charter of the server")
    pinned = home.charter / "coordinator.pem"
    kept = home.charter / "cooperative.toml"
    if pinned.exists():
        known = key_fingerprint(pinned.read_text(encoding="utf-8"))
        if known != key_fingerprint(public_key):
            raise _stranger(home, "coordinator's key", known, key_fingerprint(public_key))
    if kept.exists():
        identity = load_charter(kept).identity_hash
        if identity != charter.identity_hash:
            raise _stranger(home, "charter identity", identity, charter.identity_hash)
    with replace_folder(home.charter) as folder:
        write_bytes(folder / "coordinator.pem", public_key.encode())
        write_bytes(folder / "cooperative.toml", text.encode())
    return charter


def _stranger(home: ContributorHome, what: str, expected: str, got: str) -> FederationError:
    return FederationError(
        f"Cannot join in '{home.root}': expected the {what} {expected[:16]} of the first join, "
        f"got {got[:16]}. Check the server's address, or use another --home for another "
        "cooperative."
    )


def receive_shipment(home: ContributorHome, letter: Path, field: str, target: Path) -> bool:
    """Put a shipment together once all of its parts are here.

    Args:
        home: The contributor's home.
        letter: Letter that lists the files.
        field: Key of the list in the letter.
        target: Folder to make of them.

    Returns:
        Whether the target holds the shipment now.

    Raises:
        FederationError: If the letter is malformed.
        StorageError: On I/O errors.
    """
    value = read_json(letter)
    if value is None:
        return False
    shipment = parse_shipment(value.get(field))
    marker = home.shipments / shipment.id
    if marker.exists() and target.is_dir():
        return True
    part_bytes = int(value["part_bytes"])
    if home.parts.missing(shipment, part_bytes=part_bytes):
        return False
    try:
        home.parts.assemble(shipment, target, part_bytes=part_bytes)
    except FederationError:
        return False  # damaged parts were dropped and are sent again
    write_bytes(marker, b"")
    home.parts.discard(shipment, part_bytes=part_bytes)
    return True


def _build_consent(charter: Charter) -> dict[str, Any]:
    """What a contributor agrees to: these samples for this cooperative."""
    amendment = charter.amendment
    if amendment.is_private:  # figures and adapted slots instead of samples
        return {"identity": charter.identity_hash, "samples": "private"}
    samples = amendment.samples.model_dump(mode="json")
    return {"identity": charter.identity_hash, "samples": samples}


def has_consent(home: ContributorHome, charter: Charter) -> bool:
    """Whether the contributor agreed to send what this charter asks for."""
    return bool(read_json(home.consent_file) == _build_consent(charter))


def give_consent(home: ContributorHome, charter: Charter) -> None:
    """Note that the contributor agrees to send what this charter asks for.

    Raises:
        StorageError: On I/O errors.
    """
    write_json(home.consent_file, _build_consent(charter))


def offer_contribution(home: ContributorHome, *, recipe: str = "") -> Shipment:
    """Offer the contribution's folder to the server.

    Args:
        home: The contributor's home.
        recipe: Hash of what it was made from, kept beside the offer.

    Raises:
        StorageError: On I/O errors.
    """
    shipment = describe_folder(home.contribution)
    offer: dict[str, Any] = {
        "id": shipment.id,
        "files": shipment.to_json(),
        "recipe": recipe,
    }
    if read_json(home.offer_file) != offer:
        write_json(home.offer_file, offer)
    return shipment


def find_question(home: ContributorHome, charter: Charter) -> dict[str, Any] | None:
    """The coordinator's question, if all of it is here and it is not answered yet.

    Raises:
        SignatureError: If it is not the coordinator's.
        FederationError: If it is malformed, or of another amendment.
    """
    letter = read_json(home.question_letter)
    if letter is None:
        return None
    identity = parse_shipment(letter.get("files")).id
    if (read_json(home.answer_file) or {}).get("question") == identity:
        return None
    if (read_json(home.refused_file) or {}).get("question") == identity:
        return None
    amendment = int(letter.get("amendment", -1))
    verify(
        (home.charter / "coordinator.pem").read_text(encoding="utf-8"),
        build_question_bytes(charter.identity_hash, amendment, identity),
        str(letter.get("signature", "")),
        what="question",
    )
    if amendment != charter.amendment.number:
        raise FederationError(
            f"Cannot answer a question: expected one of amendment {charter.amendment.number}, got "
            f"{amendment}. Run `molora join` again to see what the cooperative asks for now."
        )
    target = home.question_folder(identity)
    _forget(home, target)
    if not receive_shipment(home, home.question_letter, "files", target):
        return None
    return {**letter, "id": identity}


def refuse_question(home: ContributorHome, letter: dict[str, Any], reason: str) -> None:
    """Note that a question is not answered, and why: the last one, and all of them in a log.

    Args:
        home: The contributor's home.
        letter: From `find_question`.
        reason: One line.

    Raises:
        StorageError: On I/O errors.
    """
    note = {"question": letter["id"], "reason": reason, "time": time.time()}
    log = home.refusals_log
    with storage_errors(log), log.open("ab") as file:
        file.write(canonical_json(note) + b"\n")
    write_json(home.refused_file, note)


def _forget(home: ContributorHome, current: Path) -> None:
    """Delete earlier questions, and the notes that they had arrived."""
    for folder in current.parent.glob("[0-9a-f]*"):
        if folder != current:
            for note in home.shipments.glob(f"{folder.name}*"):
                note.unlink()
            shutil.rmtree(folder)


def answer_question(
    home: ContributorHome,
    charter: Charter,
    letter: dict[str, Any],
    open_member: Callable[[], "PrivateMember"],
    plugins: Plugins,
    progress: Progress,
) -> None:
    """Do what a question asks, and offer the answer, signed.

    Args:
        home: The contributor's home.
        charter: The cooperative's charter.
        letter: From `find_question`.
        open_member: Opens this contributor's blocks, once.
        plugins: Where routers are registered.
        progress: Told what is done.

    Raises:
        PopulationError: If the question does not fit the charter or the base.
        MoloraError: Whatever measuring and adaptation raise; a StorageError on I/O errors.
    """
    from molora_fed.population.questions import load_question, save_answer

    question = load_question(
        home.question_folder(letter["id"]), rules=charter.identity.adapters, plugins=plugins
    )
    answer = open_member().answer(question, progress=progress)
    folder = home.answer_folder(letter["id"])
    save_answer(answer, charter.amendment.population.router, folder)
    files = describe_folder(folder)
    content = build_answer_bytes(charter.identity_hash, letter["id"], files.id)
    record = {
        "question": letter["id"],
        "files": files.to_json(),
        "signature": sign(load_key(home.key), content),
    }
    write_json(home.answer_file, record)
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)
