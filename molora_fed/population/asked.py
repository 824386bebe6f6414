"""How often a contributor lets itself be asked on private texts, counted on its own disk.

A coordinator that may ask as often as it likes learns what a single sum hides. Each place of the
evolution that the charter describes (`rounds.count_limits`) is answered as often as the charter
says; what is used up stays so until the next amendment, or until the contributor itself joins again
after an evolution that ended.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molora_fed.errors import (
    MoloraError,
    PopulationError,
    QuestionRefusedError,
    StorageError,
)
from molora_fed.storage.files import write_json

__all__ = ["AskedQuestions", "begin_anew", "refusing"]

ASKED_FILE = "asked.json"


class AskedQuestions:
    """The questions that were answered, on disk.

    Args:
        folder: The contributor's; gets `asked.json`.
        amendment: Number of the charter's amendment.
        limits: From `rounds.count_limits`.
    """

    def __init__(self, folder: Path, amendment: int, limits: Mapping[str, int]) -> None:
        self._path = folder / ASKED_FILE
        self._amendment = amendment
        self._limits = limits

    def admit(self, place: str, question: str) -> None:
        """Count a question before it is answered; the same one again counts once.

        Args:
            place: What is asked, with its place in the evolution.
            question: Hash of all of it.

        Raises:
            QuestionRefusedError: If the charter has no such place, it is used up, or the charter
                is an earlier one.
            PopulationError: If the count cannot be read.
            StorageError: On I/O errors.
        """
        kept = _read(self._path)
        if kept["amendment"] < self._amendment:
            kept = _end(kept, self._amendment)
        limit = self._limits.get(place, 0)
        known = kept["asked"].setdefault(place, [])
        if kept["amendment"] > self._amendment:
            got = f"amendment {self._amendment} after amendment {kept['amendment']}"
        elif question not in known and len(known) >= limit:
            earlier = kept["earlier"].get(place, 0)
            got = f"one more of '{place}'" + (f" ({earlier} in earlier evolutions)" * bool(earlier))
        else:
            if question not in known:
                known.append(question)
                write_json(self._path, kept)
            return
        raise QuestionRefusedError(
            f"Cannot answer the coordinator: expected '{place}' {limit} times, as "
            f"amendment {self._amendment} says, got {got}. Ask the coordinator why; a new "
            "amendment begins a new count."
        )


@contextmanager
def refusing() -> Iterator[None]:
    """Read a question, before anything is measured: whatever is wrong is the question's fault.

    Raises:
        QuestionRefusedError: With the reason, which holds nothing of this side's text.
        StorageError: On I/O errors.
    """
    try:
        yield
    except (StorageError, QuestionRefusedError):
        raise
    except MoloraError as error:
        raise QuestionRefusedError(str(error)) from error


def begin_anew(folder: Path) -> None:
    """Begin a new count, because the contributor joins again after an evolution that ended.

    Args:
        folder: The contributor's, with `asked.json`.

    Raises:
        PopulationError: If the count cannot be read.
        StorageError: On I/O errors.
    """
    if (folder / ASKED_FILE).exists():
        kept = _read(folder / ASKED_FILE)
        write_json(folder / ASKED_FILE, _end(kept, kept["amendment"]))


def _end(kept: dict[str, Any], amendment: int) -> dict[str, Any]:
    earlier = dict(kept["earlier"])
    for place, questions in kept["asked"].items():
        earlier[place] = earlier.get(place, 0) + len(questions)
    return {"amendment": amendment, "asked": {}, "earlier": earlier}


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"amendment": -1, "asked": {}, "earlier": {}}
    try:
        kept = json.loads(path.read_bytes())
        if not (isinstance(kept["amendment"], int) and isinstance(kept["earlier"], dict)):
            raise ValueError("other keys")
        if not all(isinstance(found, list) for found in kept["asked"].values()):
            raise ValueError("other values")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PopulationError(
            f"Cannot read '{path}': expected what was asked so far, got {type(error).__name__}. "
            "Restore it from a backup; without it nobody knows what the coordinator was told."
        ) from error
    return {name: kept[name] for name in ("amendment", "asked", "earlier")}
