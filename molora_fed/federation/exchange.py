"""The coordinator's worker asks contributors, and takes their answers, through their mailboxes.

Questions and answers are folders. A question's id is that of its files: asked again after a kill it
is the same question, and answers that are here or lie ready at contributors are used. Imports no
flwr.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from molora_fed.charter import Charter
from molora_fed.errors import StorageError
from molora_fed.federation.envelopes import keep_letter, open_letter
from molora_fed.federation.homes import ContributorMailbox, CoordinatorHome
from molora_fed.federation.kept import HelloRecord
from molora_fed.federation.letters import AnswerLetter, QuestionLetter
from molora_fed.federation.messages import Shipment, describe_folder
from molora_fed.federation.signing import build_answer_bytes, build_question_bytes
from molora_fed.storage.keys import sign, verify
from molora_fed.storage.untrusted import clean

__all__ = ["ANSWER_FILE", "QUESTION_FILE", "Exchange"]

QUESTION_FILE, ANSWER_FILE = "question.json", "answer.json"
"""What every question's and every answer's folder holds at least."""
LOOK_SECONDS = 0.2

Read = TypeVar("Read")


class Exchange:
    """Asks contributors; what they answered stays on disk until it is forgotten.

    Args:
        home: The coordinator's home.
        mailboxes: Mailbox of each contributor by name, in the order of answers.
        answers: Folder of answers.
        key: The coordinator's private key.
        charter: The cooperative's charter.
        part_bytes: Largest part of a file.
        on_wait: Told whose answers are waited for.
        on_problem: Told what is wrong with an answer, "" once nothing is.
    """

    def __init__(
        self,
        home: CoordinatorHome,
        mailboxes: Mapping[str, ContributorMailbox],
        answers: Path,
        *,
        key: EllipticCurvePrivateKey,
        charter: Charter,
        part_bytes: int,
        on_wait: Callable[[Sequence[str]], None] = lambda names: None,
        on_problem: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._mailboxes = mailboxes
        self._key = key
        self._identity = charter.identity_hash
        self._amendment = charter.amendment.number
        self._part_bytes = part_bytes
        self._on_wait = on_wait
        self._on_problem = on_problem
        self._questions = home.outbox / "questions"
        self.answers = answers

    def publish(self, write: Callable[[Path], None]) -> Shipment:
        """Put a question's files into the outbox.

        Args:
            write: Makes the folder it is given, whole.

        Raises:
            StorageError: On I/O errors.
        """
        draft = self._questions / "next"
        write(draft)
        files = describe_folder(draft)
        target = self._questions / files.id
        if target.exists():
            shutil.rmtree(draft)
        else:
            draft.rename(target)
        return files

    def ask(
        self,
        questions: Mapping[str, Shipment],
        read: Callable[[str, Path], Read],
        *,
        answer_bytes: int,
        is_enough: Callable[[Sequence[str]], bool] = lambda missing: False,
    ) -> dict[str, Read]:
        """Ask, and wait until all have given an answer that can be used.

        Args:
            questions: From `publish`, by contributor; other questions leave the outbox.
            read: Makes of an answer's folder what is wanted; whatever it raises, but for a
                StorageError, refuses that answer, which is asked for again.
            answer_bytes: Largest answer.
            is_enough: Whether to go on without those who have not answered.

        Returns:
            What was read, by contributor, in their fixed order.

        Raises:
            StorageError: On I/O errors.
        """
        self._withdraw_others({files.id for files in questions.values()})
        letters = {name: self._write(files, answer_bytes) for name, files in questions.items()}
        found: dict[str, Read] = {}
        problem, shown = "", None
        while True:
            for name, letter in letters.items():
                if name in found:
                    continue
                mailbox = self._mailboxes[name]
                try:
                    if self._collect(name, mailbox, letter):
                        found[name] = read(name, self._place(name, letter.files))
                        mailbox.question_file.unlink(missing_ok=True)
                except StorageError:
                    raise
                except Exception as error:
                    # One bad answer must not end the server, whatever it does to its reader.
                    problem = f"answer of '{name}': {clean(error, 500) or type(error).__name__}"
                    self._on_problem(problem)
                    shutil.rmtree(self._place(name, letter.files), ignore_errors=True)
                    mailbox.answer_file.unlink(missing_ok=True)
            missing = tuple(name for name in letters if name not in found)
            if not missing or is_enough(missing):
                break
            if missing != shown:
                self._on_wait(missing)
                shown = missing
            time.sleep(LOOK_SECONDS)
        for name in missing:
            self._mailboxes[name].question_file.unlink(missing_ok=True)
        if problem:
            self._on_problem("")
        return {name: found[name] for name in self._mailboxes if name in found}

    def forget(self, files: Shipment) -> None:
        """Delete the answers to a question."""
        shutil.rmtree(self.answers / files.id[:16], ignore_errors=True)

    def close(self) -> None:
        """Withdraw whatever is still asked, and delete what was sent.

        Raises:
            StorageError: On I/O errors.
        """
        for mailbox in self._mailboxes.values():
            mailbox.question_file.unlink(missing_ok=True)
            mailbox.answer_file.unlink(missing_ok=True)
        shutil.rmtree(self._questions, ignore_errors=True)

    def _withdraw_others(self, asked: set[str]) -> None:
        for other in self._questions.iterdir():
            if other.name not in asked:
                shutil.rmtree(other)

    def _write(self, files: Shipment, answer_bytes: int) -> QuestionLetter:
        content = build_question_bytes(self._identity, self._amendment, files.id)
        return QuestionLetter(
            id=files.id,
            files=files,
            part_bytes=self._part_bytes,
            answer_bytes=answer_bytes,
            amendment=self._amendment,
            signature=sign(self._key, content),
        )

    def _place(self, name: str, asked: Shipment) -> Path:
        return self.answers / asked.id[:16] / name

    def _collect(self, name: str, mailbox: ContributorMailbox, letter: QuestionLetter) -> bool:
        """Ask one contributor, or take its answer; whether it is here now."""
        asked = letter.files
        place = self._place(name, asked)
        if (place / ANSWER_FILE).is_file():
            return True
        keep_letter(mailbox.question_file, letter)
        answered = open_letter(mailbox.answer_file, AnswerLetter)
        if answered is None or answered.question != asked.id:
            return False
        files = answered.files
        if mailbox.parts.missing(files, part_bytes=self._part_bytes):
            return False
        hello = open_letter(mailbox.hello_file, HelloRecord)
        verify(
            "" if hello is None else hello.public_key,
            build_answer_bytes(self._identity, asked.id, files.id),
            answered.signature,
            what=f"answer of '{name}'",
        )
        mailbox.parts.assemble(files, place, part_bytes=self._part_bytes)
        mailbox.parts.discard(files, part_bytes=self._part_bytes)
        return True
