"""States of runs and of the files they leave: forward only."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from molora_fed.errors import CascadeError
from molora_fed.storage.files import hash_bytes, hash_file, write_bytes

__all__ = ["ArtifactState", "RunState", "StateRecorder", "advance", "store_artifact"]

_State = TypeVar("_State", bound=StrEnum)

StateRecorder = Callable[[str, dict[str, Any]], object]
"""Receives kind and body of a record."""


class RunState(StrEnum):
    """Where a run, or the answering of one task, is."""

    PENDING = "PENDING"
    EXECUTING = "EXECUTING"
    VERIFYING = "VERIFYING"
    COMPLETED = "COMPLETED"
    FAILED_MODELS = "FAILED_MODELS"
    """Every model that was asked failed."""
    FAILED_ANSWER = "FAILED_ANSWER"
    """Models said something, but nothing that the extractor takes for an answer."""
    FAILED_VERIFICATION = "FAILED_VERIFICATION"
    """What was recorded does not give the recorded decisions."""


class ArtifactState(StrEnum):
    """Where a file of a run is."""

    CREATED = "CREATED"
    STORING = "STORING"
    STORED = "STORED"
    VERIFIED = "VERIFIED"


_NEXT: dict[StrEnum, tuple[StrEnum, ...]] = {
    RunState.PENDING: (RunState.EXECUTING,),
    RunState.EXECUTING: (RunState.VERIFYING, RunState.FAILED_MODELS),
    RunState.VERIFYING: (
        RunState.COMPLETED,
        RunState.FAILED_ANSWER,
        RunState.FAILED_VERIFICATION,
    ),
    ArtifactState.CREATED: (ArtifactState.STORING,),
    ArtifactState.STORING: (ArtifactState.STORED,),
    ArtifactState.STORED: (ArtifactState.VERIFIED,),
}


def advance(now: _State, following: _State) -> _State:
    """Go on to the next state.

    Args:
        now: The state before.
        following: The state after.

    Returns:
        `following`.

    Raises:
        CascadeError: If it does not follow.
    """
    allowed = _NEXT.get(now, ())
    if following not in allowed:
        raise CascadeError(
            f"Cannot go from state {now} to {following}: expected "
            f"{' or '.join(allowed) or 'no further state'}, got {following}. Start a new run."
        )
    return following


def store_artifact(path: Path, data: bytes, record: StateRecorder) -> None:
    """Write a file of a run, read it back, and record each state it passes.

    Args:
        path: Target, replaced.
        data: Whole content.
        record: Receives one "artifact" record a state, with the file's name and SHA-256.

    Raises:
        CascadeError: If another content is read back.
        StorageError: On I/O errors.
    """
    body = {"artifact": path.name, "sha256": hash_bytes(data)}
    state = ArtifactState.CREATED
    record("artifact", {**body, "state": state})
    state = advance(state, ArtifactState.STORING)
    record("artifact", {**body, "state": state})
    write_bytes(path, data)
    state = advance(state, ArtifactState.STORED)
    record("artifact", {**body, "state": state})
    if hash_file(path) != body["sha256"]:
        raise CascadeError(
            f"Cannot keep '{path}': expected the bytes that were written, got others back. "
            "Check the disk and run again."
        )
    record("artifact", {**body, "state": advance(state, ArtifactState.VERIFIED)})
