"""Envelopes and kept letters: the one way in which letters are read, from a message or a folder.

Imports neither torch nor flwr.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from molora_fed.errors import FederationError
from molora_fed.federation.letters import FROM_CONTRIBUTOR, FROM_SERVER, Letter
from molora_fed.federation.logs import log
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.messages import MAX_LETTERS_BYTES, Part
from molora_fed.storage.files import canonical_json, write_json
from molora_fed.storage.settings import UntrustedModel, describe_offenders
from molora_fed.storage.untrusted import clean

__all__ = [
    "Envelope",
    "Sender",
    "keep_letter",
    "open_letter",
    "parse_letter",
    "parse_letters",
    "read_letter",
    "set_aside",
]

MAX_LETTERS = 32
"""Letters in one envelope."""
MAX_LETTER_BYTES = MAX_LETTERS_BYTES - 50_000
"""Largest JSON of one letter, so that the short ones fit beside it."""
MAX_KEPT_BYTES = 4 * MAX_LETTERS_BYTES
"""Largest file of one; indented, it is longer than what travels."""

Sender = Literal["server", "contributor"]
Found = TypeVar("Found", bound=Letter)
Model = TypeVar("Model", bound=UntrustedModel)


@dataclass(frozen=True)
class Envelope:
    """What one Flower message carries: letters, and parts of files beside them."""

    letters: tuple[Letter, ...] = ()
    parts: tuple[Part, ...] = ()

    def find(self, model: type[Found]) -> Found | None:
        """The first letter of a kind, or None."""
        return next((letter for letter in self.letters if isinstance(letter, model)), None)

    @property
    def num_bytes(self) -> int:
        """Bytes of the parts."""
        return sum(len(part.data) for part in self.parts)


def parse_letter(model: type[Model], value: Any, *, what: str) -> Model:
    """Read one letter's content.

    Args:
        model: What it has to be.
        value: JSON value within the bounds of `parse_json`.
        what: Name of it in the error.

    Raises:
        FederationError: If it is malformed; one short line says where.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        wrong = clean(describe_offenders(error, whole=what), 300)
        raise FederationError(
            f"Cannot read {what}: expected known keys with values in range, got {wrong}. "
            "Run the same molora-fed version on both sides."
        ) from error


def parse_letters(value: Any, *, sender: Sender) -> tuple[Letter, ...]:
    """Read the letters of an envelope.

    Args:
        value: JSON value within the bounds of `parse_json`.
        sender: Who sent it; the other side's letters are refused.

    Raises:
        FederationError: If it is not a list of letters of known kinds; all or none are read.
    """
    known = FROM_SERVER if sender == "server" else FROM_CONTRIBUTOR
    if not isinstance(value, list) or len(value) > MAX_LETTERS:
        raise _malformed(f"a list of at most {MAX_LETTERS}", value)
    letters = []
    for item in value:
        if not isinstance(item, dict) or set(item) != {"kind", "body"}:
            raise _malformed("kind and body", item)
        model = known.get(item["kind"]) if isinstance(item["kind"], str) else None
        if model is None:
            raise _malformed(f"one of the kinds {', '.join(known)}", item["kind"])
        letters.append(parse_letter(model, item["body"], what=f"letter '{model.kind}'"))
    return tuple(letters)


def _malformed(expected: str, got: object) -> FederationError:
    return FederationError(
        f"Cannot read letters: expected {expected}, got '{clean(got, 80)}'. "
        "Run the same molora-fed version on both sides."
    )


def read_letter(path: Path, model: type[Model]) -> Model | None:
    """A letter that is kept in a folder, or None if it is not there.

    Raises:
        FederationError: If it is malformed: an earlier version wrote it, or somebody put it there.
    """
    value = read_json(path, max_bytes=MAX_KEPT_BYTES)
    return None if value is None else parse_letter(model, value, what=f"'{path}'")


def open_letter(path: Path, model: type[Model]) -> Model | None:
    """The same, for whoever goes on with it: a malformed one is set aside, and counts as missing.

    Every letter can be had again, so what is set aside (`.malformed` beside it, the last one only)
    is asked for, or sent, once more. The reason goes to the log.
    """
    try:
        return read_letter(path, model)
    except FederationError as error:
        set_aside(path, error)
        return None


def set_aside(path: Path, reason: Exception) -> None:
    """Move a letter that cannot be used out of the way, and say why in the log."""
    log("letter set aside", "warning", reason=reason)
    try:
        path.replace(path.with_name(f"{path.name}.malformed"))
    except OSError as error:  # replaced or gone meanwhile; or a full disk, on which it stays
        log("letter not set aside", "error", reason=error)


def keep_letter(path: Path, letter: Letter | Mapping[str, Any]) -> None:
    """Write a letter into a folder, whole or not at all, unless it lies there already.

    Raises:
        FederationError: If it is too large to be sent in one message.
        StorageError: On I/O errors.
    """
    value = letter.to_json() if isinstance(letter, Letter) else dict(letter)
    size = len(canonical_json(value))
    if size > MAX_LETTER_BYTES:
        raise FederationError(
            f"Cannot send letter '{path.name}': expected at most {MAX_LETTER_BYTES:,} bytes, got "
            f"{size:,}. Use fewer files and a shorter charter."
        )
    if _read_quietly(path) != value:
        write_json(path, value)


def _read_quietly(path: Path) -> Any:
    try:
        return read_json(path, max_bytes=MAX_KEPT_BYTES)
    except FederationError:
        return None  # it is replaced
