"""A coordinator's question on the contributor's side: found, refused or answered."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from molora_fed.charter import Charter
from molora_fed.errors import (
    AdapterError,
    FederationError,
    MoloraError,
    QuestionRefusedError,
    SignatureError,
    SumRefusedError,
)
from molora_fed.federation.envelopes import keep_letter, open_letter, set_aside
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.letters import (
    AnswerLetter,
    QuestionLetter,
)
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.messages import describe_folder
from molora_fed.federation.sent import note_sent
from molora_fed.federation.signing import (
    build_answer_bytes,
    build_question_bytes,
)
from molora_fed.federation.worker_mail import receive_shipment
from molora_fed.storage.files import (
    canonical_json,
    storage_errors,
    write_bytes,
    write_json,
)
from molora_fed.storage.keys import load_key, sign, verify

__all__ = ["answer_question", "find_question", "refuse_question"]

MAX_LOG_BYTES = 2**20
"""Of the log of refused questions; the later half is kept where it grows beyond."""
_UNSAID = (
    "Cannot answer a question: expected one that can be measured on this side's text, got a "
    "failure; the reason stays with this contributor."
)


def find_question(home: ContributorHome, charter: Charter) -> QuestionLetter | None:
    """The coordinator's question, if all of it is here and it is not answered yet.

    One that cannot be the coordinator's is set aside.

    Raises:
        SignatureError: If it is not the coordinator's.
        QuestionRefusedError: If its id is not that of its files.
        FederationError: If it is of another amendment than this side knows.
    """
    letter = open_letter(home.question_letter, QuestionLetter)
    if letter is None:
        return None
    answered = open_letter(home.answer_file, AnswerLetter)
    if answered is not None and answered.question == letter.id:
        return None
    if (read_json(home.refused_file) or {}).get("question") == letter.id:
        return None
    try:
        _check_question(home, charter, letter)
    except (AdapterError, FederationError, QuestionRefusedError) as error:
        set_aside(home.question_letter, error)
        raise
    target = home.question_folder(letter.id)
    _forget(home, target)
    is_here = receive_shipment(home, letter.files, target, part_bytes=letter.part_bytes)
    return letter if is_here else None


def _check_question(home: ContributorHome, charter: Charter, letter: QuestionLetter) -> None:
    verify(
        (home.charter / "coordinator.pem").read_text(encoding="utf-8"),
        build_question_bytes(charter.identity_hash, letter.amendment, letter.files.id),
        letter.signature,
        what="question",
    )
    if letter.id != letter.files.id:
        raise QuestionRefusedError(
            f"Cannot answer a question: expected the id of its files, {letter.files.id[:16]}, got "
            f"{letter.id[:16]}. Run the same molora-fed version on both sides."
        )
    if letter.amendment != charter.amendment.number:
        raise FederationError(
            f"Cannot answer a question: expected one of amendment {charter.amendment.number}, got "
            f"{letter.amendment}. Run `molora join` again to see what the cooperative asks for now."
        )


def refuse_question(home: ContributorHome, question: str, error: MoloraError) -> str:
    """Note that a question is not answered, and why: the last one, and all of them in a log.

    Args:
        home: The contributor's home.
        question: Its id; empty for one that is not the coordinator's, and so hides no other.
        error: Why; of what went wrong on this side's text nothing is said elsewhere, for it may
            hold a figure of one document.

    Returns:
        What the coordinator may be told, one line.

    Raises:
        StorageError: On I/O errors.
    """
    own = (QuestionRefusedError, FederationError, SignatureError, SumRefusedError)
    said = str(error) if isinstance(error, own) else _UNSAID
    note = {"question": question, "reason": str(error), "said": said, "time": time.time()}
    log = home.refusals_log
    with storage_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(canonical_json(note) + b"\n")
        if log.stat().st_size > MAX_LOG_BYTES:  # whoever asks for ever fills no disk
            _, _, late = log.read_bytes()[-MAX_LOG_BYTES // 2 :].partition(b"\n")
            write_bytes(log, late)
    if question:
        write_json(home.refused_file, note)
    return said


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
    letter: QuestionLetter,
    answer: Callable[[Path, Path], str],
) -> None:
    """Do what a question asks, and offer the answer, signed.

    Args:
        home: The contributor's home.
        charter: The cooperative's charter.
        letter: From `find_question`.
        answer: Given the question's folder, makes the answer's; what kind of thing it sends.

    Raises:
        MoloraError: Whatever answering raises; a StorageError on I/O errors.
    """
    folder = home.answer_folder(letter.id)
    kind = answer(home.question_folder(letter.id), folder)
    files = describe_folder(folder)
    note_sent(home, letter.id, kind, files)
    content = build_answer_bytes(charter.identity_hash, letter.id, files.id)
    signature = sign(load_key(home.key), content)
    keep_letter(
        home.answer_file, AnswerLetter(question=letter.id, files=files, signature=signature)
    )
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)
