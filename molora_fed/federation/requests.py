"""The coordinator's worker asks contributors, and takes their answers, through their mailboxes.

A question's id is that of its files: asked again after a kill it is the same question, and answers
that are here or lie ready at contributors are used. Imports no flwr.
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
from molora_fed.plugins import Plugins
from molora_fed.population.questions import Answer, Question, load_answer, save_question
from molora_fed.storage.keys import sign, verify
from molora_fed.storage.untrusted import clean

__all__ = ["RemoteData"]

LOOK_SECONDS = 0.2
_FIGURES_BYTES = 4 * 2**20

Read = TypeVar("Read")


class RemoteData:
    """Asks the contributors of an evolution; see `Ask`.

    Args:
        home: The coordinator's home.
        mailboxes: Mailbox of each contributor by name, in the order of answers.
        key: The coordinator's private key.
        charter: The cooperative's charter.
        part_bytes: Largest part of a file.
        plugins: Where routers are registered.
        on_wait: Told whose answers are waited for.
        on_problem: Told what is wrong with an answer, "" once nothing is.
    """

    def __init__(
        self,
        home: CoordinatorHome,
        mailboxes: Mapping[str, ContributorMailbox],
        *,
        key: EllipticCurvePrivateKey,
        charter: Charter,
        part_bytes: int,
        plugins: Plugins,
        on_wait: Callable[[Sequence[str]], None] = lambda names: None,
        on_problem: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._home = home
        self._mailboxes = mailboxes
        self._key = key
        self._identity = charter.identity_hash
        self._amendment = charter.amendment.number
        self._rules = charter.identity.adapters
        self._router_name = charter.amendment.population.router
        self._part_bytes = part_bytes
        self._plugins = plugins
        self._on_wait = on_wait
        self._on_problem = on_problem
        self._questions = home.outbox / "questions"
        self._answers = home.evolution / "answers"

    def __call__(self, question: Question, read: Callable[[Answer], Read]) -> list[Read]:
        """Ask everybody, and wait until all have given an answer that can be used.

        Raises:
            StorageError: On I/O errors.
        """
        letter = self._publish(question)
        asked = letter.files
        self._forget_branches(asked)
        found: dict[str, Read] = {}
        problem = ""
        shown: tuple[str, ...] | None = None
        while len(found) < len(self._mailboxes):
            for name, mailbox in self._mailboxes.items():
                if name in found:
                    continue
                try:
                    if self._collect(name, mailbox, letter):
                        found[name] = read(self._load(name, asked))
                        mailbox.question_file.unlink(missing_ok=True)
                except StorageError:
                    raise
                except Exception as error:
                    # One bad answer must not end the server, whatever it does to its reader: it
                    # is asked for again.
                    problem = f"answer of '{name}': {clean(error, 500) or type(error).__name__}"
                    self._on_problem(problem)
                    shutil.rmtree(self._place(name, asked), ignore_errors=True)
                    mailbox.answer_file.unlink(missing_ok=True)
            missing = tuple(name for name in self._mailboxes if name not in found)
            if missing and missing != shown:
                self._on_wait(missing)
                shown = missing
            if missing:
                time.sleep(LOOK_SECONDS)
        if problem:
            self._on_problem("")
        return [found[name] for name in self._mailboxes]

    def close(self) -> None:
        """Withdraw whatever is still asked, and delete what was sent.

        Raises:
            StorageError: On I/O errors.
        """
        for mailbox in self._mailboxes.values():
            mailbox.question_file.unlink(missing_ok=True)
            mailbox.answer_file.unlink(missing_ok=True)
        shutil.rmtree(self._questions, ignore_errors=True)

    def _publish(self, question: Question) -> QuestionLetter:
        """Put a question's files into the outbox, and build its letter."""
        draft = self._questions / "next"
        save_question(question, self._router_name, draft)
        files = describe_folder(draft)
        target = self._questions / files.id
        for other in self._questions.iterdir():
            if other not in (draft, target):
                shutil.rmtree(other)
        if target.exists():
            shutil.rmtree(draft)
        else:
            draft.rename(target)
        content = build_question_bytes(self._identity, self._amendment, files.id)
        return QuestionLetter(
            id=files.id,
            files=files,
            part_bytes=self._part_bytes,
            answer_bytes=files.num_bytes + _FIGURES_BYTES,
            amendment=self._amendment,
            signature=sign(self._key, content),
        )

    def _place(self, name: str, asked: Shipment) -> Path:
        return self._answers / asked.id[:16] / name

    def _forget_branches(self, asked: Shipment) -> None:
        """Delete what earlier answers brought, all but figures: it has been used."""
        for branch in self._answers.glob("*/*/branch-*"):
            if branch.parents[1].name != asked.id[:16]:
                shutil.rmtree(branch)

    def _collect(self, name: str, mailbox: ContributorMailbox, letter: QuestionLetter) -> bool:
        """Ask one contributor, or take its answer; whether it is here now."""
        asked = letter.files
        place = self._place(name, asked)
        if (place / "answer.json").is_file():
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

    def _load(self, name: str, asked: Shipment) -> Answer:
        return load_answer(
            self._place(name, asked), contributor=name, rules=self._rules, plugins=self._plugins
        )
