"""Mailboxes on disk: parts of files, locks, and a board for bad news.

Everything is written whole or not at all, so a process may be killed at any moment and the next
one goes on from the folders. Imports neither torch nor flwr.
"""

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molora_fed.errors import FederationError, StorageError
from molora_fed.federation.messages import (
    MAX_BATCH_BYTES,
    MAX_PART_BYTES,
    Part,
    PartName,
    Shipment,
    parse_part_name,
    plan_parts,
)
from molora_fed.storage import locks
from molora_fed.storage.files import (
    hash_file,
    make_home,
    replace_folder,
    storage_errors,
    write_bytes,
)
from molora_fed.storage.untrusted import clean, parse_json

__all__ = [
    "Board",
    "PartStore",
    "hold_lock",
    "read_json",
    "read_parts",
    "take_batch",
]

MAX_JSON_BYTES = 64 * 2**20
"""Largest JSON file that is read."""
_COPY_BYTES = 2**20


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Content of a JSON file, or None if it is not there.

    Args:
        path: The file.
        max_bytes: Largest file that is read.

    Raises:
        FederationError: If it is there and not JSON within bounds; files here are written whole,
            so somebody changed it.
    """
    try:
        with path.open("rb") as file:
            return parse_json(file.read(max_bytes + 1), max_bytes=max_bytes)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise FederationError(
            f"Cannot read '{path}': expected JSON, got {error}. Delete the file and try again."
        ) from error


@contextmanager
def hold_lock(path: Path, *, what: str) -> Iterator[None]:
    """Hold an exclusive lock for the block; the system frees it however the process ends.

    Raises:
        FederationError: If another process holds it.
    """
    busy = FederationError(
        f"Cannot start {what} in '{path.parent}': expected nobody else there, got a running one. "
        "Stop it first, or use another folder."
    )
    make_home(path.parent)
    with locks.hold_lock(path, busy):
        yield


def take_batch(names: Sequence[PartName], *, max_bytes: int = MAX_BATCH_BYTES) -> list[PartName]:
    """The first of these parts that fit into one envelope; at least one if there is one."""
    batch: list[PartName] = []
    total = 0
    for name in names:
        total += name.length
        if batch and total > max_bytes:
            break
        batch.append(name)
    return batch


def read_parts(folder: Path, shipment: Shipment, names: Sequence[PartName]) -> list[Part]:
    """Read parts of a shipment from the folder it describes.

    Raises:
        FederationError: If a part is not of this shipment, or the folder changed meanwhile.
    """
    paths = {entry.sha256: folder / entry.name for entry in shipment.files}
    parts = []
    for name in names:
        path = paths.get(name.sha256)
        if path is None:
            raise FederationError(
                f"Cannot send part {name}: expected a file of shipment {shipment.id[:12]}, got an "
                "unknown hash. The server will ask again."
            )
        with path.open("rb") as file:
            file.seek(name.offset)
            data = file.read(name.length)
        if len(data) != name.length:
            raise FederationError(
                f"Cannot send part {name} of '{path}': expected {name.length} bytes, got "
                f"{len(data)}. The file changed; start the contribution again."
            )
        parts.append(Part(name, data))
    return parts


class PartStore:
    """Parts that have arrived, by hash and offset; each a file that is whole or not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, part: Part) -> None:
        """Keep a part; keeping it again changes nothing.

        Raises:
            StorageError: On I/O errors; nothing is left behind.
        """
        path = self._folder / str(part.name)
        if not path.exists() or path.stat().st_size != part.name.length:
            write_bytes(path, part.data)

    def held(self) -> set[PartName]:
        """The parts that are here."""
        found = set()
        for name in self._list():
            with contextlib.suppress(FederationError):  # no part: `keep_only` deletes it
                found.add(parse_part_name(name))
        return found

    def _list(self) -> list[str]:
        try:
            return [name for name in os.listdir(self._folder) if not name.startswith(".")]
        except FileNotFoundError:
            return []

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts that are here."""
        return sum(name.length for name in self.held())

    @property
    def changed(self) -> float:
        """When a part last came or went, seconds since 1970; 0.0 if none ever did."""
        try:
            return self._folder.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def keep_only(self, wanted: Collection[PartName]) -> None:
        """Delete all parts but these.

        Raises:
            StorageError: On I/O errors.
        """
        needed = {str(name) for name in wanted}
        with storage_errors(self._folder):
            for name in self._list():
                if name not in needed:
                    (self._folder / name).unlink(missing_ok=True)

    def missing(self, shipment: Shipment, *, part_bytes: int = MAX_PART_BYTES) -> list[PartName]:
        """The parts of a shipment that are not here, in order."""
        held = self.held()
        return [name for name in plan_parts(shipment, part_bytes=part_bytes) if name not in held]

    def assemble(
        self, shipment: Shipment, target: Path, *, part_bytes: int = MAX_PART_BYTES
    ) -> None:
        """Put a shipment together as a folder; the parts stay until `discard`.

        Raises:
            FederationError: If parts are missing, or a file's bytes do not hash to its name; the
                parts of that file are dropped so that they are fetched again.
            StorageError: On I/O errors; what was at `target` before stays.
        """
        missing = self.missing(shipment, part_bytes=part_bytes)
        if missing:
            raise FederationError(
                f"Cannot assemble '{target}': expected all parts, got {len(missing)} missing. "
                "Wait for them."
            )
        with replace_folder(target) as temporary:
            for entry in shipment.files:
                path = temporary / entry.name
                path.parent.mkdir(parents=True, exist_ok=True)
                own = Shipment((entry,))
                with path.open("wb") as file:
                    for name in plan_parts(own, part_bytes=part_bytes):
                        with (self._folder / str(name)).open("rb") as part:
                            while piece := part.read(_COPY_BYTES):
                                file.write(piece)
                if hash_file(path) != entry.sha256:
                    self.discard(own, part_bytes=part_bytes)
                    raise FederationError(
                        f"Cannot assemble '{target}': expected SHA-256 {entry.sha256} of file "
                        f"'{entry.name}', got {hash_file(path)}. It will be fetched again."
                    )

    def discard(self, shipment: Shipment, *, part_bytes: int = MAX_PART_BYTES) -> None:
        """Forget the parts of a shipment."""
        for name in plan_parts(shipment, part_bytes=part_bytes):
            with contextlib.suppress(FileNotFoundError):
                (self._folder / str(name)).unlink()


class Board:
    """One short message in a file of fixed size, so that it can be changed on a full disk."""

    _SIZE = 4_096

    def __init__(self, path: Path) -> None:
        self._path = path

    def prepare(self) -> None:
        """Reserve the space while there is some; what was posted before is cleared.

        Raises:
            StorageError: On I/O errors.
        """
        if not self._path.exists() or self._path.stat().st_size != self._SIZE:
            write_bytes(self._path, b" " * self._SIZE)
        self.post("")

    def post(self, message: str) -> None:
        """Replace the message in place; an empty one clears the board.

        Raises:
            StorageError: On I/O errors even that.
        """
        # Cut and cleaned: it may quote what came from outside, and is shown as it is.
        message = clean(message, self._SIZE // 4)
        if message == self.read():
            return
        data = message.encode()
        if not self._path.exists():
            if message:
                write_bytes(self._path, data.ljust(self._SIZE))
            return
        try:
            descriptor = os.open(self._path, os.O_WRONLY)
            try:
                os.pwrite(descriptor, data.ljust(self._SIZE), 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(
                f"Cannot write '{self._path}': expected a writable disk, got {error.strerror}. "
                "Free some space."
            ) from error

    def read(self) -> str:
        """The message, empty if there is none."""
        try:
            return self._path.read_bytes().decode(errors="replace").strip()
        except FileNotFoundError:
            return ""
