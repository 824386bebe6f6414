"""Who was heard of, when, and how many bytes of files went each way; for whoever looks.

Kept beside the mail, where the processes on the network may write. Imports neither torch nor flwr.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from molora_fed.errors import FederationError, StorageError
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.status import Count
from molora_fed.storage.files import write_json
from molora_fed.storage.settings import UntrustedModel

__all__ = ["SERVER", "Seen", "Traffic", "read_traffic"]

SERVER = "server"
"""Whom a contributor hears of."""
WRITE_SECONDS = 15.0
MAX_KEYS = 8_192
_FILE_BYTES = 4 * 2**20

_Time = Annotated[float, Field(ge=0.0, le=2.0**53)]


class Seen(UntrustedModel):
    """One side as the other knows it.

    Attributes:
        last: When it was last heard of, seconds since 1970.
        received: Bytes of files that came from it.
        sent: Bytes of files that went to it.
    """

    last: _Time
    received: Count = 0
    sent: Count = 0


class _Kept(UntrustedModel):
    keys: Annotated[dict[str, Seen], Field(max_length=MAX_KEYS)]


def read_traffic(path: Path) -> dict[str, Seen]:
    """What is known, by fingerprint of a contributor's key; empty if there is nothing usable."""
    try:
        value = read_json(path, max_bytes=_FILE_BYTES)
        return {} if value is None else _Kept.model_validate(value).keys
    except (FederationError, ValueError, OSError):
        return {}


class Traffic:
    """Counts over restarts; what a killed process had not written yet is lost.

    Args:
        path: The file.
        now: Seconds since 1970.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._path, self._now = path, now
        self._seen = read_traffic(path)
        self._written = 0.0

    def note(self, key: str, *, received: int = 0, sent: int = 0) -> None:
        """Count what came from somebody and went there; it is written every few seconds.

        Args:
            key: Fingerprint of a contributor's key, or `SERVER`.
            received: Bytes of files that came.
            sent: Bytes of files that went.
        """
        before = self._seen.pop(key, Seen(last=0.0))
        # At the end of the order: the least recent are forgotten first.
        self._seen[key] = Seen(
            last=self._now() if received or not sent else before.last,
            received=before.received + received,
            sent=before.sent + sent,
        )
        while len(self._seen) > MAX_KEYS:
            del self._seen[next(iter(self._seen))]
        if abs(self._now() - self._written) >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what is known; on a full disk later."""
        self._written = self._now()
        with suppress(StorageError):
            write_json(
                self._path, {"keys": {key: one.model_dump() for key, one in self._seen.items()}}
            )
