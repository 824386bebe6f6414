"""Writing a trace: records into a segment of one's own, signed checkpoints, and when they are safe.

A record is acknowledged once it is on disk; until then a killed process may lose it.
"""

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.errors import ConfigError, TraceError, describe_mismatch
from molora_fed.storage.files import make_folder, storage_errors, write_bytes
from molora_fed.storage.keys import build_public_pem, key_fingerprint
from molora_fed.tracing.locks import lock_run, lock_writer
from molora_fed.tracing.merkle import MerkleTree
from molora_fed.tracing.records import (
    CHECKPOINT,
    GENESIS,
    HEADER,
    MAX_LINE_BYTES,
    RESERVED_KINDS,
    BadLineError,
    encode_json,
    encode_line,
    is_kind,
    parse_line,
)
from molora_fed.tracing.recovery import recover_segment
from molora_fed.tracing.run_scan import SegmentScan
from molora_fed.tracing.segments import (
    SEAL_FILE,
    Header,
    SegmentName,
    build_checkpoint,
    is_run_id,
    is_writer_name,
    list_segments,
)

__all__ = ["SyncPolicy", "TraceWriter"]


@dataclass(frozen=True)
class SyncPolicy:
    """When records reach the disk, and when they are signed.

    Attributes:
        mode: "always": each `append` returns after its record is on disk. "bounded": records are
            written together; at most `records` of them, none older than `seconds` at the next
            append, wait in memory.
        records: See `mode`.
        seconds: See `mode`.
        checkpoint_records: Records from one signed checkpoint to the next.
        checkpoint_seconds: Seconds after which the next append makes a checkpoint too; None for
            never. The bytes of a run then depend on the clock.
    """

    mode: Literal["always", "bounded"] = "bounded"
    records: int = 1_000
    seconds: float = 0.2
    checkpoint_records: int = 1_000
    checkpoint_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("always", "bounded"):
            raise ConfigError(f"Cannot use sync mode '{self.mode}': expected always or bounded.")
        limits = (self.records, self.checkpoint_records, self.seconds, self.checkpoint_seconds or 1)
        if min(limits) <= 0:
            raise ConfigError(
                f"Cannot use sync policy: expected limits above 0, got {min(limits)}. Raise it."
            )


class TraceWriter:
    """One writer of a run; use it as a context manager, or close it.

    Attributes:
        header: Header of the segment it writes.
        recovered: What an earlier, killed writer of this name left torn; None if nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        key: ec.EllipticCurvePrivateKey,
        run_id: str,
        writer: str = "main",
        sync: SyncPolicy | None = None,
    ) -> None:
        """Open a run, or begin it.

        Args:
            folder: The run's folder; made if missing. Several writers may share it.
            key: The coordinator's key, one for the whole run.
            run_id: Name of the run, the same for all its writers.
            writer: Name of this writer; one process at a time has it.
            sync: When records are on disk; bounded by default.

        Raises:
            ConfigError: If a name cannot be used.
            TraceError: If the run is sealed or of another id or key, the writer's name is in use,
                or its last segment was edited.
            StorageError: On I/O errors.
        """
        if not is_writer_name(writer) or not is_run_id(run_id):
            raise ConfigError(
                f"Cannot write trace '{folder}': expected a writer named in lower case and a run "
                f"id of 1 to 200 printable ASCII characters, got {writer!r} and {run_id!r}. "
                "Choose other names."
            )
        self._folder, self._key = folder, key
        self._sync = sync or SyncPolicy()
        self._mutex = threading.RLock()
        with storage_errors(folder):
            make_folder(folder)
        self._locks = [lock_run(folder, shared=True), lock_writer(folder, writer)]
        try:
            self._begin(run_id, writer)
        except BaseException:
            self._unlock()
            raise

    def _begin(self, run_id: str, writer: str) -> None:
        if (self._folder / SEAL_FILE).exists():
            raise TraceError(
                f"Cannot write trace '{self._folder}': expected an open run, got a sealed one. "
                "Begin another run in another folder."
            )
        public = build_public_pem(self._key)
        own_key = key_fingerprint(public)
        segments = list_segments(self._folder)
        own = [name for name in segments if name.writer == writer]
        head, self.recovered = GENESIS, None
        if own:
            # Of earlier segments only the head of the last one counts; `verify` reads them all.
            scan, self.recovered = recover_segment(
                self._folder, own[-1], public_pem=public, fingerprint=own_key
            )
            _check_same_run(self._folder, scan, run_id)
            head = scan.head
        self.header = Header(run_id, SegmentName(writer, own[-1].number + 1 if own else 0), own_key)
        self._open_segment(head)

    def _open_segment(self, head: str) -> None:
        self._head, self._count, self._tree = head, 0, MerkleTree()
        self._waiting: list[bytes] = []
        self._since = self._last_sync = self._last_checkpoint = time.monotonic()
        self._failed = False
        self._descriptor = -1
        recovered = self.recovered.to_json() if self.recovered else None
        self._add(HEADER, encode_json(self.header.build_body(recovered)))
        self._add_checkpoint()
        # Whole or not there, so that every segment has a header that is signed for.
        path = self._folder / self.header.segment.file
        write_bytes(path, b"".join(self._waiting))
        self._waiting.clear()
        with storage_errors(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._acknowledged = self._count - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def acknowledged(self) -> int:
        """Highest seq that is on disk for sure."""
        return self._acknowledged

    def append(self, kind: str, body: Mapping[str, Any]) -> int:
        """Add a record.

        Args:
            kind: A lower-case word, e.g. "decision".
            body: JSON values; floats must be finite.

        Returns:
            Its seq in the segment. It is acknowledged at once in mode "always"; in mode "bounded"
            when `sync` or `acknowledged` gives this number or a higher one.

        Raises:
            TraceError: If it is no record of these limits, or the writer is closed; nothing is
                written then.
            StorageError: On I/O errors; the writer takes no more records then.
        """
        if kind in RESERVED_KINDS or not is_kind(kind):
            raise TraceError(
                f"Cannot record '{kind}': expected a lower-case word that is not "
                f"{', '.join(sorted(RESERVED_KINDS))}. Choose another kind."
            )
        with self._mutex:
            self._check_open()
            seq = self._count
            self._add(kind, self._encode(kind, body))
            now = time.monotonic()
            policy = self._sync
            if self._count - self._checkpoint_count >= policy.checkpoint_records or (
                policy.checkpoint_seconds is not None
                and now - self._last_checkpoint >= policy.checkpoint_seconds
            ):
                self._add_checkpoint()
            if (
                policy.mode == "always"
                or len(self._waiting) >= policy.records
                or now - self._last_sync >= policy.seconds
            ):
                self._flush()
            return seq

    def sync(self) -> int:
        """Bring all records to disk.

        Returns:
            Highest acknowledged seq.

        Raises:
            TraceError: If the writer is closed.
            StorageError: On I/O errors.
        """
        with self._mutex:
            self._check_open()
            self._flush()
            return self._acknowledged

    def checkpoint(self) -> int:
        """Sign what is there, and bring it to disk; gives the highest acknowledged seq."""
        with self._mutex:
            self._check_open()
            if self._count > self._checkpoint_count:
                self._add_checkpoint()
            return self.sync()

    def close(self) -> None:
        """Sign what is there, bring it to disk, and let go of the writer's name."""
        with self._mutex:
            if self._descriptor < 0:
                return
            try:
                if not self._failed:
                    self.checkpoint()
            finally:
                os.close(self._descriptor)
                self._descriptor = -1
                self._unlock()

    def seal(self) -> str:
        """Close this writer and seal the whole run; see `molora_fed.tracing.verifying.seal_run`.

        Returns:
            The run's Merkle root, hex. Keep it elsewhere too.
        """
        from molora_fed.tracing.verifying import seal_run

        self.close()
        return seal_run(self._folder, key=self._key)

    def _encode(self, kind: str, body: Mapping[str, Any]) -> str:
        try:
            text = encode_json(dict(body))
            if len(text) > MAX_LINE_BYTES - 300:
                raise BadLineError(f"expected at most {MAX_LINE_BYTES} bytes, got {len(text)}")
            if text.count("[") + text.count("{") > 32:
                parse_line(encode_line(text, kind, GENESIS, 0))  # Nested no deeper than allowed.
        except (ValueError, TypeError, RecursionError) as error:
            raise TraceError(
                f"Cannot record '{kind}': expected JSON values within the limits, got: {error}. "
                "See docs/traces.md for the limits."
            ) from error
        return text

    def _add(self, kind: str, body: str) -> None:
        line = encode_line(body, kind, self._head, self._count)
        self._head = sha256(line).hexdigest()
        self._tree.add(sha256(b"\x00" + line).digest())
        self._count += 1
        self._waiting.append(line + b"\n")

    def _add_checkpoint(self) -> None:
        body = build_checkpoint(
            self._key,
            self.header,
            count=self._count,
            head=self._head,
            root=self._tree.root().hex(),
            sealing=False,
        )
        self._add(CHECKPOINT, encode_json(body))
        self._checkpoint_count = self._count
        self._last_checkpoint = time.monotonic()

    def _flush(self) -> None:
        if self._waiting:
            path = self._folder / self.header.segment.file
            try:
                with storage_errors(path):
                    _write_all(self._descriptor, b"".join(self._waiting))
                    os.fsync(self._descriptor)
            except BaseException:
                # Part of a line may be on disk: only a new opening can tell.
                self._failed = True
                raise
            self._waiting.clear()
        self._acknowledged = self._count - 1
        self._last_sync = time.monotonic()

    def _check_open(self) -> None:
        if self._descriptor < 0 or self._failed:
            raise TraceError(
                f"Cannot write trace '{self._folder}': expected an open writer, got one that "
                f"{'failed' if self._failed else 'was closed'}. Open it again to resume."
            )

    def _unlock(self) -> None:
        for lock in self._locks:
            lock.close()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _check_same_run(folder: Path, scan: SegmentScan, run_id: str) -> None:
    if scan.header is not None and scan.header.run != run_id:
        raise TraceError(
            describe_mismatch(
                f"Cannot write trace '{folder}'",
                expected=f"run '{scan.header.run}'",
                got=f"'{run_id}'",
                fix="Give another folder.",
            )
        )
