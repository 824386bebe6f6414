"""Train in processes that the contributor's own launcher starts, e.g. `accelerate launch`.

The job is written down beside the training, in `launch/`; the launcher runs
`-m molora_fed.training.launched` on it in every process, see there. This process waits, hands
progress on, and ends them with itself.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import save

from molora_fed import errors
from molora_fed.errors import MoloraError, TrainingError
from molora_fed.models.runtime import Placement
from molora_fed.storage.files import make_folder, storage_errors, write_bytes, write_json
from molora_fed.storage.locks import hold_lock
from molora_fed.storage.untrusted import clean
from molora_fed.training.adapter_job import AdapterJob
from molora_fed.types import Progress

__all__ = [
    "ARRAYS",
    "ARRAYS_FILE",
    "JOB_FILE",
    "LAUNCH_FOLDER",
    "PROCESS_LOG",
    "PROGRESS_FILE",
    "launch",
]

LAUNCH_FOLDER = "launch"
JOB_FILE = "job.json"
ARRAYS_FILE = "blocks.safetensors"
PROGRESS_FILE = "progress.jsonl"
PROCESS_LOG = "process-{}.log"
"""What one process says, by its number."""
ARRAYS = (
    "train_tokens",
    "validation_tokens",
    "watched_tokens",
    "train_targets",
    "watched_targets",
    "train_starts",
)
"""Arrays of a job, the last three only where it has them."""
_LOG_FILE = "launcher.log"
_MODULE = "molora_fed.training.launched"
_LOOK_SECONDS = 0.2
_END_SECONDS = 10.0  # a launcher has to end its processes once it was asked to
_SHOWN = 300  # characters of what a launcher or a process said last
_WORDS = 3  # lines of a process, the last of which names the fault that ended it
# What Python says of an abort or a forbidden access; the stacks of all threads follow.
_FAULT = re.compile(r"^Fatal Python error: .*$", re.MULTILINE)


def launch(
    job: AdapterJob, folder: Path, launcher: Sequence[str], progress: Progress | None
) -> None:
    """Run a job in the processes of a launcher, to the end; its record is in the folder then.

    Stopped at any moment and called again, it goes on from the checkpoint.

    Args:
        job: What to train; its kind is one of the installed plugins'.
        folder: Of the training.
        launcher: Words of the command, before `-m MODULE JOB`.
        progress: Told what the first process tells.

    Raises:
        MoloraError: What the processes refused.
        TrainingError: If the launcher cannot be started, fails, or another one trains there.
        StorageError: On I/O errors.
    """
    shown = shlex.join([Path(launcher[0]).name, *launcher[1:]])
    busy = TrainingError(
        f"Cannot train in '{folder}': expected no other launcher there, got one at work. "
        "Wait for it, or choose another folder."
    )
    place = folder / LAUNCH_FOLDER
    with hold_lock(folder / ".launch.lock", busy):
        _write_job(job, folder, place)
        log = place / _LOG_FILE
        with storage_errors(log), log.open("wb") as output:
            command = [*launcher, "-m", _MODULE, str((place / JOB_FILE).absolute())]
            with _started(command, output, shown) as process:
                _wait(process, place / PROGRESS_FILE, progress)
        if process.returncode:
            raise _find_error(place, process.returncode, shown)
        shutil.rmtree(place, ignore_errors=True)


def _write_job(job: AdapterJob, folder: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped
    with storage_errors(place):
        make_folder(place)
    arrays = {name: getattr(job, name) for name in ARRAYS}
    there = {n: np.ascontiguousarray(array) for n, array in arrays.items() if array is not None}
    write_bytes(place / ARRAYS_FILE, save(there))
    placement = Placement.of(job.base.model)
    described = {
        "folder": str(folder.absolute()),
        "base": str(job.base.folder.absolute()),
        "base_weights": job.base.weights,
        "device": placement.device.type,
        "dtype": str(placement.dtype).removeprefix("torch."),
        "domain": job.domain,
        "kind": job.kind,
        "rank": job.rank,
        "rules": job.rules.model_dump(mode="json"),
        "config": asdict(job.config),
        "options": dict(job.options),
        "domain_options": dict(job.domain_options),
        # What was launched ends with the process that asked for it.
        "host": platform.node(),
        "process": os.getpid(),
        "started": psutil.Process().create_time(),
    }
    write_json(place / JOB_FILE, described)


@contextmanager
def _started(command: Sequence[str], output: Any, shown: str) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher at work; it is ended with the block."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
        )
    except OSError as error:
        raise TrainingError(
            f"Cannot train with the launcher '{shown}': expected a program that can be started, "
            f"got {error.strerror}. Try the command in a terminal."
        ) from error
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # the processes it started end by themselves
                process.wait()


def _wait(process: subprocess.Popen[bytes], path: Path, progress: Progress | None) -> None:
    """Hand on what the first process tells, until the launcher has ended."""
    position = 0
    ended = False
    while not ended:
        ended = process.poll() is not None
        if progress is not None and path.exists():
            with path.open("rb") as file:
                file.seek(position)
                whole, newline, _ = file.read().rpartition(b"\n")
            position += len(whole) + len(newline)
            for line in whole.splitlines():
                told = json.loads(line)
                progress(told.pop("done"), told.pop("total"), **told)
        if not ended:
            time.sleep(_LOOK_SECONDS)


def _find_error(place: Path, code: int, shown: str) -> MoloraError:
    """Why launched processes failed: what one of them refused, or what was said last."""
    met = ""
    for path in sorted(place.glob("error-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = getattr(errors, found["type"], None)
        if isinstance(kind, type) and issubclass(kind, MoloraError):
            if isinstance(kind.__init__, FunctionType):
                kind = TrainingError  # takes other arguments than a message
            error: MoloraError = kind(found["message"])
            return error
        met = met or f"{found['type']}: {found['message']}"
    # One that met an error may have met it because another one was gone.
    reason = _find_fault(place) or met or " ".join(_read_words(_read(place / _LOG_FILE))[-1:])
    got = f"exit code {code}" + (f": {clean(reason, _SHOWN)}" if reason else "")
    return TrainingError(
        f"Cannot train with the launcher '{shown}': expected all its processes to end well, got "
        f"{got.rstrip('.')}. See '{place}'."
    )


def _find_fault(place: Path) -> str:
    """The last words of a process that a fault below Python ended; empty if none did."""
    for path in sorted(place.glob(PROCESS_LOG.format("*"))):
        said = _read(path)
        fault = _FAULT.search(said)
        if fault is not None:
            words = _read_words(said[: fault.end()])[-_WORDS:]
            number = path.stem.rpartition("-")[2]
            return f"process {number}: {'; '.join(clean(w, _SHOWN // _WORDS) for w in words)}"
    return ""


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _read_words(said: str) -> list[str]:
    """Lines that say something."""
    lines = map(str.strip, said.splitlines())
    return [line for line in lines if any(character.isalpha() for character in line)]
