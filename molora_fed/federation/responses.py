"""The contributor's worker answers the coordinator's questions on texts that stay here."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora_fed.charter import Charter
from molora_fed.errors import FederationError
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.messages import (
    build_answer_bytes,
    build_question_bytes,
    describe_folder,
    parse_shipment,
)
from molora_fed.federation.worker_mail import receive_shipment
from molora_fed.plugins import Plugins
from molora_fed.storage.files import write_json
from molora_fed.storage.keys import load_key, sign, verify
from molora_fed.types import Progress

if TYPE_CHECKING:
    from molora_fed.population.private_member import PrivateMember

__all__ = ["answer_question", "find_question"]


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
