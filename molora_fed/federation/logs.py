"""Structured logs of a server and a contributor: one JSON object a line, of bounded size.

Every process of either side writes to its standard output, which its supervisor has bound to a
file of the home's `logs/`; the supervisor itself writes what it reports to `logs/events.jsonl`.
Each line has `time` (UTC), `process`, `level`, `event` and what belongs to it. Keys, tokens and
text are never among it. Imports neither torch nor flwr.
"""

import datetime
import json
import logging
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from molora_fed.federation.status import FederationEvent
from molora_fed.storage.untrusted import clean, clean_lines

__all__ = ["EventLog", "LogLimit", "log", "shorten_log", "start_logging", "take_records"]

Level = Literal["info", "warning", "error"]

MAX_LOG_BYTES = 8 * 2**20
"""A log that grows beyond is moved to NAME.1, whose earlier content goes."""
MAX_VALUE = 500
"""Characters of one value."""
MAX_TRACE = 8_000
RECORDS_A_MINUTE = 30
TRACE = "trace"
"""The value that has several lines."""

_process = ""  # a library's user has standard output for other things


def start_logging(process: str) -> None:
    """Name this process in its log; what nobody catches is written there as one line, too.

    Args:
        process: "link", "coordinator", "node", "letters", "worker" or "pool worker".
    """
    global _process
    _process = process
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda arguments: _log_uncaught(
        arguments.exc_type, arguments.exc_value, arguments.exc_traceback
    )


def log(event: str, level: Level = "info", *, to: TextIO | None = None, **values: Any) -> None:
    """Write one line.

    Args:
        event: What happened, a few fixed words.
        level: How bad it is.
        to: Where it is written; if not given, standard output of a process of the federation, and
            standard error of any other.
        values: What belongs to it; text may come from outside.
    """
    # A log that cannot be written, because the disk is full, ends nothing.
    with suppress(OSError, ValueError):
        print(_format(event, level, values), file=to or _find_stream(), flush=True)


def _find_stream() -> TextIO:
    return sys.stdout if _process else sys.stderr


def _format(event: str, level: Level, values: dict[str, Any]) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    line = {"time": now.replace("+00:00", "Z"), "process": _process or "molora", "level": level}
    shown = {name: _show(name, value) for name, value in values.items() if value not in (None, "")}
    return json.dumps({**line, "event": event, **shown}, ensure_ascii=False)


def _show(name: str, value: Any) -> Any:
    if name == TRACE:  # its lines stay lines, which JSON writes as \\n
        return clean_lines(str(value)[-MAX_TRACE:])
    is_plain = isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63)
    return value if is_plain else clean(value, MAX_VALUE)


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    text = "".join(traceback.format_exception(kind, error, trace))
    log("ended by an error", "error", type=kind.__name__, reason=error, trace=text)


class LogLimit:
    """Lets so many lines of a kind through in a minute, and counts the rest.

    Args:
        most: Lines a minute.
        now: Monotonic seconds.
    """

    def __init__(self, most: int, now: Callable[[], float] = time.monotonic) -> None:
        self._most, self._now = most, now
        self._since, self._count, self._left_out = now(), 0, 0

    def take(self) -> int | None:
        """Ask for a line.

        Returns:
            How many were left out since the last one that was let through; None leaves this out.
        """
        now = self._now()
        if now - self._since >= 60.0:
            self._since, self._count = now, 0
        if self._count >= self._most:
            self._left_out += 1
            return None
        self._count += 1
        left_out, self._left_out = self._left_out, 0
        return left_out


class _Records(logging.Handler):
    """Writes what a library logs as lines of this log, so many a minute."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._limit = LogLimit(RECORDS_A_MINUTE)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one, or count it: requests from outside cause them."""
        left_out = self._limit.take()
        if left_out is not None:
            level: Level = "error" if record.levelno >= logging.ERROR else "warning"
            trace = record.exc_info and "".join(traceback.format_exception(*record.exc_info))
            text = record.getMessage()
            log(f"{record.name} says", level, reason=text, trace=trace, left_out=left_out or None)


def take_records(*names: str) -> None:
    """Let what libraries log from warnings on become lines of this log.

    Args:
        names: Names of their loggers.
    """
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [_Records()], False
        logger.setLevel(logging.WARNING)


class EventLog:
    """What a supervisor reports, in a file.

    Args:
        logs: Folder of the logs.
    """

    def __init__(self, logs: Path) -> None:
        self._path = logs / "events.jsonl"

    def add(self, event: FederationEvent) -> None:
        """Write one event; on a full disk it is left out."""
        values = asdict(event)
        level: Level = "warning" if values.pop("problem") else "info"
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            shorten_log(self._path)
            opened = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(opened, "a", encoding="utf-8") as file:
                log("state", level, to=file, **values)


def shorten_log(path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Move what a log holds to NAME.1 if it has grown too large; whoever writes it goes on.

    Raises:
        OSError: On I/O errors.
    """
    try:
        if path.stat().st_size <= max_bytes:
            return
    except FileNotFoundError:
        return
    # Copied, not renamed: the process that writes it has it open, at its end.
    try:
        shutil.copyfile(path, path.with_name(f"{path.name}.1"))
    finally:  # on a full disk above all
        os.truncate(path, 0)
