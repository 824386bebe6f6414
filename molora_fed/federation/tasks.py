"""Tasks on disk, claimed by atomic rename under a lease with a fencing number.

A worker that was killed, or asleep for longer than its lease, has lost its task to whoever claimed
it next; the fence tells the two apart. Imports neither torch nor flwr.
"""

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.errors import FederationError
from molora_fed.federation.mailbox import read_json
from molora_fed.storage.files import write_json

__all__ = ["Claim", "TaskQueue"]


@dataclass(frozen=True)
class Claim:
    """A task taken by one worker.

    Attributes:
        task_id: Which task.
        task: What the server asked for.
        fence: Grows with every claim of the task; the holder of an older one has lost it.
        path: The claimed file; its modification time is when the lease ends.
    """

    task_id: str
    task: Mapping[str, Any]
    fence: int
    path: Path


class TaskQueue:
    """Tasks in folders `pending`, `claimed` and `done`, moved by atomic rename.

    A claimed file is named `<id>~<fence>~<owner>.json`. A lease that ran out, or one held by the
    same owner before it was killed, may be taken over under the next fence; from then on the
    older holder's `renew` and `complete` fail.
    """

    def __init__(self, folder: Path) -> None:
        self._pending, self._claimed, self._done = (
            folder / name for name in ("pending", "claimed", "done")
        )

    def offer(self, task_id: str, task: Mapping[str, Any]) -> None:
        """Add a task unless it is known in any state.

        Raises:
            FederationError: If the id is not of letters, digits, dots and dashes.
            StorageError: If the disk refuses.
        """
        if not task_id or not all(c.isascii() and (c.isalnum() or c in ".-") for c in task_id):
            raise FederationError(
                f"Cannot take task '{task_id}': expected an id of letters, digits, dots and "
                "dashes, got others. Run the same molora-fed version on both sides."
            )
        if task_id not in self.known():
            write_json(self._pending / f"{task_id}.json", dict(task))

    def known(self) -> set[str]:
        """Ids of all tasks in any state."""
        return {
            path.name.removesuffix(".json").split("~")[0]
            for folder in (self._pending, self._claimed, self._done)
            if folder.is_dir()
            for path in folder.iterdir()
            if not path.name.startswith(".")
        }

    def claim(self, owner: str, *, lease_seconds: float) -> Claim | None:
        """Take a task nobody works on, or None.

        Args:
            owner: Who claims; letters, digits and dashes. Its own earlier claims count as free,
                so an owner must make sure that it exists once (`hold_lock`).
            lease_seconds: How long until others may take it over, unless renewed.
        """
        for folder in (self._pending, self._claimed):
            folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        candidates = [(path, 0) for path in sorted(self._pending.glob("*.json"))]
        for path in sorted(self._claimed.glob("*.json")):
            _, number, holder = path.name.removesuffix(".json").split("~")
            with contextlib.suppress(FileNotFoundError):
                if holder == owner or path.stat().st_mtime < now:
                    candidates.append((path, int(number)))
        for path, fence in candidates:
            task_id = path.name.removesuffix(".json").split("~")[0]
            target = self._claimed / f"{task_id}~{fence + 1}~{owner}.json"
            try:
                # The lease is set before the rename: a fresh claim must not look run out.
                os.utime(path, (now, now + lease_seconds))
                path.rename(target)
            except FileNotFoundError:
                continue  # somebody else was faster
            return Claim(task_id, read_json(target) or {}, fence + 1, target)
        return None

    def renew(self, claim: Claim, *, lease_seconds: float) -> None:
        """Extend a lease.

        Raises:
            FederationError: If another worker has taken the task over.
        """
        now = time.time()
        try:
            os.utime(claim.path, (now, now + lease_seconds))
        except FileNotFoundError as error:
            raise _lost(claim) from error

    def complete(self, claim: Claim) -> None:
        """Mark a task as done.

        Raises:
            FederationError: If another worker has taken the task over.
        """
        self._done.mkdir(parents=True, exist_ok=True)
        try:
            claim.path.rename(self._done / f"{claim.task_id}~{claim.fence}.json")
        except FileNotFoundError as error:
            raise _lost(claim) from error


def _lost(claim: Claim) -> FederationError:
    return FederationError(
        f"Cannot go on with task '{claim.task_id}': expected to hold it under fence "
        f"{claim.fence}, got taken over by another worker. Leave it to that one."
    )
