"""Where everything lies in the home folders of a coordinator and of a contributor."""

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from molora_fed.errors import ConfigError, FederationError
from molora_fed.federation.envelopes import keep_letter, read_letter
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.kept import HelloRecord
from molora_fed.federation.letters import MAX_TASKS, Acknowledgement, Refusal, Task
from molora_fed.federation.mailbox import Board, PartStore, read_json
from molora_fed.federation.messages import MAX_BATCH_BYTES
from molora_fed.federation.status import read_worker_state
from molora_fed.storage.files import write_json
from molora_fed.storage.untrusted import clean, parse_json

__all__ = [
    "COORDINATOR_HOME",
    "HOLD_SECONDS",
    "MESSAGE_BYTES",
    "ContributorHome",
    "CoordinatorHome",
    "hold_seconds",
    "home_from_environment",
    "message_bytes",
]

COORDINATOR_HOME = "MOLORA_COORDINATOR_HOME"
"""Environment variable that tells a simulation's ServerApp its home folder."""
MESSAGE_BYTES = "MOLORA_MESSAGE_BYTES"
"""Environment variable of the server: largest part and message in bytes; smaller for slow lines."""
HOLD_SECONDS = "MOLORA_HOLD_SECONDS"
"""Environment variable of the server: how long contributors hold an answer back without news."""

_LONGEST_HOLD_SECONDS = 25
_MOST_WARNINGS = 8
_MOST_CHARACTERS = 500  # of each
_MOST_BYTES = 2**16  # of a log's end
_LEFTOVER = ".*.tmp"  # the temporary names of `molora_fed.storage.files`


def home_from_environment(variable: str) -> Path:
    """The home folder of a Flower app.

    Raises:
        ConfigError: If the variable is not set or not a folder.
    """
    value = os.environ.get(variable, "")
    if not value or not Path(value).is_dir():
        raise ConfigError(
            f"Cannot start the app: expected a folder in {variable}, got {value!r}. "
            "Start it through `molora serve` or `molora join`."
        )
    return Path(value)


def message_bytes() -> int:
    """Largest part and largest sum of parts in a message, bytes.

    Raises:
        ConfigError: If MOLORA_MESSAGE_BYTES is not a number from 1024 to 64 MB.
    """
    text = os.environ.get(MESSAGE_BYTES, str(MAX_BATCH_BYTES))
    if not text.isdigit() or not 1_024 <= int(text) <= MAX_BATCH_BYTES:
        raise ConfigError(
            f"Cannot use {MESSAGE_BYTES}: expected 1024 to {MAX_BATCH_BYTES}, got {text!r}. "
            "Unset it."
        )
    return int(text)


def hold_seconds() -> float:
    """How long a contributor may hold an answer back when it has no news.

    Raises:
        ConfigError: If MOLORA_HOLD_SECONDS is not a number from 0 to 25.
    """
    text = os.environ.get(HOLD_SECONDS, str(_LONGEST_HOLD_SECONDS))
    if not text.isdigit() or int(text) > _LONGEST_HOLD_SECONDS:
        raise ConfigError(
            f"Cannot use {HOLD_SECONDS}: expected 0 to {_LONGEST_HOLD_SECONDS}, got {text!r}. "
            "Unset it."
        )
    return float(text)


class _Home:
    """What both kinds of home have."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.mail = self.root / "mail"
        self.base = self.root / "base"
        self.logs = self.root / "logs"
        self.state_file = self.root / "state.json"
        self.error_file = self.root / "error.json"
        self.usage_file = self.root / "usage.json"
        self.board = Board(self.mail / "board")
        self.traffic_file = self.mail / "traffic.json"

    def read_state(self) -> dict[str, Any]:
        """The worker's last reported state; empty before the first, and what is wrong left out."""
        try:
            return read_worker_state(read_json(self.state_file)).known
        except FederationError:
            return {}

    def _remove(self, leftovers: Iterable[Path]) -> None:
        for path in list(leftovers):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)  # gone with the folder it was in


class CoordinatorHome(_Home):
    """A coordinator's home: `cooperative.toml`, ledger, blobs, mail, bank, fused model, report."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.key = self.root / "keys" / "coordinator.pem"
        self.charter = self.root / "cooperative.toml"
        self.outbox = self.mail / "outbox"
        self.stop_file = self.mail / "stop"
        self.pulse = Board(self.mail / "pulse")
        self.received = self.root / "received"
        self.report = self.root / "report"
        self.worker_board = Board(self.mail / "worker-board")
        self.evolution = self.root / "evolution"
        self.private = self.root / "private"
        self.members = self.root / "members"
        self.address_file = self.root / "address.json"

    def remove_leftovers(self) -> None:
        """Delete what a killed server left half-written; call it only while none runs here."""
        # Not in the home itself: `molora fuse` may be at work there.
        self._remove([*self.mail.rglob(_LEFTOVER), *self.received.glob(_LEFTOVER)])

    def claim_evolution(self, recipe: Mapping[str, Any]) -> None:
        """Delete the evolution of another recipe: other contributions, or another amendment.

        What was published is not sent to anyone any more, so that whoever joins again takes part.

        Args:
            recipe: What decides an evolution, JSON values.

        Raises:
            StorageError: On I/O errors.
        """
        path = self.evolution / "recipe.json"
        if read_json(path) != recipe:
            (self.outbox / "result.json").unlink(missing_ok=True)
            shutil.rmtree(self.evolution, ignore_errors=True)
            write_json(path, recipe)

    def contributor(self, fingerprint: str) -> "ContributorMailbox":
        """The mailbox of one contributor, named by the fingerprint of its public key."""
        return ContributorMailbox(self.mail / "contributors" / fingerprint)

    def contributors(self) -> list["ContributorMailbox"]:
        """The mailboxes of all contributors that ever said hello, by fingerprint."""
        folder = self.mail / "contributors"
        if not folder.is_dir():
            return []
        return [
            ContributorMailbox(path)
            for path in sorted(folder.iterdir())
            if path.is_dir() and not path.name.startswith(".")
        ]


class ContributorMailbox:
    """What the server holds of one contributor: who it is, where it stands, what it sent."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ContributorMailbox) and self.folder == other.folder

    def __hash__(self) -> int:
        return hash(self.folder)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fingerprint = folder.name
        self.hello_file = folder / "hello.json"
        self.state_file = folder / "state.json"
        self.offer_file = folder / "offer.json"
        self.refusal_file = folder / "refusal.json"
        self.delivered_file = folder / "delivered.json"
        self.question_file = folder / "question.json"
        self.answer_file = folder / "answer.json"
        self.fault_file = folder / "fault.json"
        self.names_file = folder / "names.json"
        self.parts = PartStore(folder / "parts")

    def acknowledgement_file(self, shipment_id: str) -> Path:
        """Where the coordinator writes what became of a contribution."""
        return self.folder / "acknowledgements" / f"{shipment_id}.json"

    def list_acknowledgements(self) -> list[Path]:
        """The acknowledgements that are kept, by shipment."""
        return sorted((self.folder / "acknowledgements").glob("*.json"))

    def _read_hello(self) -> HelloRecord | None:
        try:
            return read_letter(self.hello_file, HelloRecord)
        except (FederationError, OSError):
            return None

    @property
    def name(self) -> str:
        """The contributor's name, or the start of its fingerprint before it said one."""
        hello = self._read_hello()
        return self.fingerprint[:12] if hello is None else hello.name

    @property
    def domain(self) -> str:
        """The contributor's domain, empty before it said one."""
        hello = self._read_hello()
        return "" if hello is None else hello.domain


class ContributorHome(_Home):
    """A contributor's home: key, charter, base, corpus, training, contribution, mail, result."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.key = self.root / "key.pem"
        self.settings_file = self.root / "join.json"
        self.consent_file = self.root / "consent.json"
        self.warnings_file = self.root / "warnings.json"
        self.charter = self.root / "charter"
        self.corpus = self.root / "corpus"
        self.training = self.root / "training"
        self.contribution = self.root / "contribution"
        self.result = self.root / "result"
        self.greeting_letter = self.mail / "inbox" / "hello.json"
        self.accepted_file = self.mail / "accepted.json"
        self.charter_letter = self.mail / "inbox" / "charter.json"
        self.acknowledgement_letter = self.mail / "inbox" / "acknowledgement.json"
        self.refusal_letter = self.mail / "inbox" / "refusal.json"
        self.result_letter = self.mail / "inbox" / "result.json"
        self.question_letter = self.mail / "inbox" / "question.json"
        self.answer_file = self.mail / "outbox" / "answer.json"
        self.private = self.root / "private"
        self.refused_file = self.private / "refused.json"
        self.refusals_log = self.private / "refusals.jsonl"
        self.offer_file = self.mail / "outbox" / "offer.json"
        self.shipments = self.mail / "received"
        self.parts = PartStore(self.mail / "parts")
        self.busy = Board(self.mail / "busy")
        self.node_key = self.root / "node.pem"
        self.connection_file = self.root / "connection.json"
        self.authority_file = self.root / "authority.pem"
        self.tasks = self.mail / "inbox" / "tasks"
        self._earlier_tasks = self.mail / "tasks"  # where versions with a queue kept them

    def read_acknowledgement(self) -> Acknowledgement | None:
        """What the coordinator said of the contribution; None before it did, or if malformed."""
        try:
            return read_letter(self.acknowledgement_letter, Acknowledgement)
        except FederationError:
            return None

    def read_warnings(self) -> tuple[str, ...]:
        """What to know of chat templates; what cannot be read is left out."""
        try:
            value = read_json(self.warnings_file)
        except FederationError:
            return ()
        lines = value if isinstance(value, list) else []
        return tuple(clean(each, _MOST_CHARACTERS) for each in lines[:_MOST_WARNINGS])

    def read_refusals(self) -> tuple[str, ...]:
        """Questions that were not answered, and why, the last ones; what cannot be read is not."""
        try:
            with self.refusals_log.open("rb") as file:
                file.seek(max(0, self.refusals_log.stat().st_size - _MOST_BYTES))
                lines = file.read(_MOST_BYTES).splitlines()
        except OSError:
            return ()
        found = []
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                note = parse_json(line, max_bytes=_MOST_BYTES)
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(note["time"])))
                found.append(f"{when} {clean(note['reason'], _MOST_CHARACTERS)}")
        return tuple(found[-_MOST_WARNINGS:])

    def read_refused(self, question: str) -> str:
        """The reason the coordinator gets for a refused question; empty if it was not refused."""
        try:
            note = read_json(self.refused_file)
        except FederationError:
            return ""
        if not isinstance(note, dict) or note.get("question") != question:
            return ""
        return clean(note.get("said", note.get("reason", "")), _MOST_CHARACTERS)

    def check_refusal(self) -> None:
        """Raise the server's refusal if there is one.

        Raises:
            FederationError: With the reason that the server gave.
        """
        try:
            refusal = read_letter(self.refusal_letter, Refusal)
        except FederationError:
            refusal = Refusal(reason="The server refused.")
        if refusal is not None:
            raise FederationError(refusal.reason or "The server refused.")

    def remove_leftovers(self) -> None:
        """Delete what a killed contributor left half-written; call it only while none runs."""
        self._remove([*self.root.glob(_LEFTOVER), *self.mail.rglob(_LEFTOVER)])

    def keep_task(self, task: Task) -> None:
        """Keep a task that has arrived, unless it is known; done is what its outcome is of.

        Raises:
            FederationError: If there are too many already.
            StorageError: On I/O errors.
        """
        known = self.list_tasks()
        if task.id in known:
            return
        if len(known) >= MAX_TASKS:
            raise FederationError(
                f"Cannot take task '{task.id}': expected at most {MAX_TASKS} tasks, got more. "
                "Use another --home for another cooperative."
            )
        keep_letter(self.tasks / f"{task.id}.json", task)

    def list_tasks(self) -> set[str]:
        """Ids of all tasks that ever arrived."""
        earlier = (self._earlier_tasks / name for name in ("pending", "claimed", "done"))
        return {
            path.name.removesuffix(".json").split("~")[0]
            for folder in (self.tasks, *earlier)
            if folder.is_dir()
            for path in folder.iterdir()
            if not path.name.startswith(".")
        }

    def question_folder(self, question: str) -> Path:
        """Folder of a question that has arrived, by its id."""
        return self.private / "questions" / question[:16]

    def answer_folder(self, question: str) -> Path:
        """Folder of the answer to a question, by the question's id."""
        return self.private / "answers" / question[:16]

    def training_folder(self, recipe: str) -> Path:
        """Folder of the training that a contribution of this recipe comes from."""
        return self.training / recipe[:16]

    def read_settings(self) -> JoinSettings:
        """The settings of `molora join`.

        Raises:
            FederationError: If they are missing or malformed.
        """
        return JoinSettings.from_json(read_json(self.settings_file))
