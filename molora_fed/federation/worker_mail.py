"""The contributor's worker at its mailbox: takes charter, base and result, offers a contribution.

Where texts are private it also takes the coordinator's questions and leaves the answers.

Imports neither torch nor flwr. Every function may be interrupted and called again.
"""

from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from molora_fed.charter import Charter, load_charter
from molora_fed.errors import (
    AdapterError,
    CharterError,
    FederationError,
)
from molora_fed.federation.envelopes import keep_letter, open_letter, set_aside
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.kept import Accepted, Offer
from molora_fed.federation.letters import (
    CharterLetter,
    Greeting,
    ResultLetter,
)
from molora_fed.federation.messages import Shipment, describe_folder
from molora_fed.federation.signing import (
    build_result_bytes,
    open_charter,
)
from molora_fed.storage.files import (
    replace_folder,
    write_bytes,
)
from molora_fed.storage.keys import key_fingerprint, verify

__all__ = [
    "find_base_config",
    "find_stranger",
    "is_described",
    "list_received",
    "offer_contribution",
    "receive_base",
    "receive_charter",
    "receive_result",
    "until",
]

LOOK_SECONDS = 0.2
CONFIG_FILE = "config.json"
Found = TypeVar("Found")


def until(look: Callable[[], Found | None]) -> Generator[None, None, Found]:
    """Yield to whoever advances a worker until something is found."""
    while (found := look()) is None:
        yield
    return found


def find_stranger(
    home: ContributorHome, *, identity: str, coordinator: str
) -> FederationError | None:
    """What is wrong if this is another coordinator, or cooperative, than that of the first join.

    Args:
        home: The contributor's home.
        identity: Identity of the charter.
        coordinator: Fingerprint of the coordinator's key.
    """
    pinned = home.charter / "coordinator.pem"
    kept = home.charter / "cooperative.toml"
    if pinned.exists():
        known = key_fingerprint(pinned.read_text(encoding="utf-8"))
        if known != coordinator:
            return _stranger(home, "coordinator's key", known[:16], coordinator[:16])
    if kept.exists():
        known = load_charter(kept).identity_hash
        if known != identity:
            return _stranger(home, "charter identity", known[:16], identity[:16])
    return None


def _stranger(home: ContributorHome, what: str, expected: str, got: str) -> FederationError:
    return FederationError(
        f"Cannot join in '{home.root}': expected the {what} {expected} of the first join, "
        f"got {got}. Check the server's address, or use another --home for another "
        "cooperative."
    )


def receive_charter(home: ContributorHome) -> Charter | None:
    """Check a charter that has arrived, and keep it; None if none has.

    The coordinator's key and the charter's identity are those of the hello and of the first join
    ever after, and amendments are never older than one that was accepted. A letter that is refused
    is set aside, so that the next join begins with another.

    Raises:
        SignatureError: If it is not signed by the coordinator.
        CharterError: If it is malformed.
        FederationError: If it is another coordinator's or another cooperative's, or too old.
    """
    letter = open_letter(home.charter_letter, CharterLetter)
    if letter is None:
        return None
    try:
        return _accept_charter(home, letter)
    except Exception as error:  # whatever it does to its parser, the next start is without it
        set_aside(home.charter_letter, error)
        raise


def _accept_charter(home: ContributorHome, letter: CharterLetter) -> Charter:
    charter, coordinator = open_charter(letter), key_fingerprint(letter.public_key)
    identity, number = charter.identity_hash, charter.amendment.number
    stranger = find_stranger(home, identity=identity, coordinator=coordinator)
    if stranger is not None:
        raise stranger
    greeting = open_letter(home.greeting_letter, Greeting)
    if greeting and (greeting.identity, greeting.coordinator) != (identity, coordinator):
        raise FederationError(
            f"Cannot join in '{home.root}': expected the charter {greeting.identity[:16]} of the "
            f"coordinator {greeting.coordinator[:16]} that was greeted, got {identity[:16]} of "
            f"{coordinator[:16]}. Check the server's address."
        )
    kept = home.charter / "cooperative.toml"
    if kept.exists():
        _check_not_older(home, "charter", load_charter(kept).amendment.number, number)
    with replace_folder(home.charter) as folder:
        write_bytes(folder / "coordinator.pem", letter.public_key.encode())
        write_bytes(folder / "cooperative.toml", letter.text.encode())
    return charter


def _check_not_older(home: ContributorHome, what: str, known: int, number: int) -> None:
    """Refuse an amendment that is older than one that was accepted.

    Raises:
        FederationError: If it is.
    """
    if number < known:
        raise FederationError(
            f"Cannot use {what} in '{home.root}': expected one of amendment {known} or later, "
            f"which is known here, got amendment {number}. Ask the coordinator."
        )


def receive_base(home: ContributorHome) -> bool:
    """Put the base together once all of its parts are here, or take one's own; whether it is.

    Raises:
        BaseCheckpointError: If the contributor's own copy is another base.
        StorageError: On I/O errors.
    """
    letter = open_letter(home.charter_letter, CharterLetter)
    if letter is None:
        return False
    if source := home.read_settings().base:
        from molora_fed.federation.own_base import take_own_base

        return take_own_base(home, letter, source)
    return receive_shipment(home, letter.base, home.base, part_bytes=letter.part_bytes)


def receive_result(home: ContributorHome) -> bool:
    """Put the result together once all of its parts are here; whether it is.

    Its files are the coordinator's word, signed by it; the report in it is a page from outside.

    Raises:
        SignatureError: If the coordinator of this cooperative did not sign it.
        FederationError: If it was made under an older amendment than one accepted before.
        StorageError: On I/O errors.
    """
    letter = open_letter(home.result_letter, ResultLetter)
    if letter is None:
        return False
    try:
        _accept_result(home, letter)
    except (AdapterError, FederationError) as error:
        set_aside(home.result_letter, error)
        raise
    return receive_shipment(home, letter.files, home.result, part_bytes=letter.part_bytes)


def _accept_result(home: ContributorHome, letter: ResultLetter) -> None:
    identity = load_charter(home.charter).identity_hash
    verify(
        (home.charter / "coordinator.pem").read_text(encoding="utf-8"),
        build_result_bytes(identity, letter.files.id, letter.summary),
        letter.signature,
        what="result",
    )
    number = letter.summary.amendment
    accepted = open_letter(home.accepted_file, Accepted)
    if accepted is not None:
        _check_not_older(home, "result", accepted.amendment, number)
    if accepted is None or accepted.amendment != number:
        keep_letter(home.accepted_file, {"amendment": number})


def receive_shipment(
    home: ContributorHome, shipment: Shipment, target: Path, *, part_bytes: int
) -> bool:
    """Put a shipment together once all of its parts are here.

    Args:
        home: The contributor's home.
        shipment: The files.
        target: Folder to make of them.
        part_bytes: Largest part of a file.

    Returns:
        Whether the target holds the shipment now.

    Raises:
        StorageError: On I/O errors.
    """
    marker = home.shipments / shipment.id
    if marker.exists() and target.is_dir():
        return True
    marker.unlink(missing_ok=True)  # whoever deleted the folder gets it again
    if home.parts.missing(shipment, part_bytes=part_bytes):
        return False
    try:
        home.parts.assemble(shipment, target, part_bytes=part_bytes)
    except FederationError:
        return False  # damaged parts were dropped and are sent again
    for earlier in list_received(home, target):
        (home.shipments / earlier).unlink(missing_ok=True)  # the folder holds another now
    write_bytes(marker, target.name.encode())
    home.parts.discard(shipment, part_bytes=part_bytes)
    return True


def list_received(home: ContributorHome, target: Path) -> list[str]:
    """Ids of the shipments that a folder was made of: one, or none.

    Args:
        home: The contributor's home.
        target: The folder.
    """
    if not target.is_dir() or not home.shipments.is_dir():
        return []
    found = []
    for marker in home.shipments.glob("[0-9a-f]*"):
        with suppress(FileNotFoundError):
            if marker.read_bytes() == target.name.encode():
                found.append(marker.name)
    return found


def find_base_config(home: ContributorHome) -> Path | None:
    """Folder with the base's `config.json`, which comes before its weights; None if not here yet.

    Raises:
        StorageError: On I/O errors.
    """
    folder = home.mail / "base-config"
    for found in (home.base, folder):
        if (found / CONFIG_FILE).is_file():
            return found
    letter = open_letter(home.charter_letter, CharterLetter)
    if letter is None:
        return None
    wanted = Shipment(tuple(one for one in letter.base.files if one.name == CONFIG_FILE))
    if not wanted.files or home.parts.missing(wanted, part_bytes=letter.part_bytes):
        return None
    try:
        home.parts.assemble(wanted, folder, part_bytes=letter.part_bytes)
    except (FederationError, FileNotFoundError):
        return None  # damaged, or the worker just put the whole base together
    return folder


def is_described(home: ContributorHome) -> bool:
    """Whether everything is here that says what the charter asks for.

    For sums that is more than the charter: their number depends on the base.
    """
    try:
        charter = load_charter(home.charter)
    except CharterError:
        return False  # not here yet, or just being replaced
    if not charter.is_summed or home.consent_file.exists() or find_base_config(home) is not None:
        return True
    letter = open_letter(home.charter_letter, CharterLetter)
    files = () if letter is None else letter.base.files
    # A base without a config of its own is waited for by nobody.
    return letter is not None and all(one.name != CONFIG_FILE for one in files)


def offer_contribution(home: ContributorHome, *, recipe: str = "") -> Shipment:
    """Offer the contribution's folder to the server.

    Args:
        home: The contributor's home.
        recipe: Hash of what it was made from, kept beside the offer.

    Raises:
        FederationError: If it holds more files than one message can list.
        StorageError: On I/O errors.
    """
    shipment = describe_folder(home.contribution)
    keep_letter(home.offer_file, Offer(id=shipment.id, files=shipment, recipe=recipe))
    return shipment
