"""Decisions and states as records of a trace, and back: they hold all that deciding again needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar

from molora_fed.cascade.asking import JudgeCall
from molora_fed.cascade.contract import CascadeTask, Request, Sample
from molora_fed.cascade.escalation import Decision
from molora_fed.errors import CascadeError
from molora_fed.storage.files import hash_bytes, hash_file, write_bytes

__all__ = [
    "ArtifactState",
    "Asked",
    "RecordedDecision",
    "Recorder",
    "RunState",
    "StateRecorder",
    "advance",
    "build_record",
    "compare_records",
    "drop_survey_times",
    "drop_times",
    "find_state",
    "parse_record",
    "store_artifact",
]


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


_SAMPLE_FIELDS = tuple(one.name for one in fields(Sample))


class Recorder(Protocol):
    """Where records go; `molora_fed.tracing.writing.TraceWriter` is one."""

    def append(self, kind: str, body: Mapping[str, Any]) -> int:
        """Add a record and give its number."""


@dataclass(frozen=True)
class Asked:
    """One sample, and what was asked for it.

    Attributes:
        model: Name of the model.
        role: "probe" or "member".
        number: Which sample of this model on this task.
        request: What was asked.
        sample: What came.
    """

    model: str
    role: str
    number: int
    request: Request
    sample: Sample


@dataclass(frozen=True)
class RecordedDecision:
    """What a record holds.

    Attributes:
        task: The task with its right answer, if that was known.
        prompt: What the models read.
        asked: Samples in the order in which they were asked.
        judge_seed: Seed of the judge.
        calls: What the judge asked of models.
    """

    task: CascadeTask
    prompt: str
    asked: tuple[Asked, ...]
    judge_seed: int
    calls: tuple[JudgeCall, ...]

    @property
    def probe_samples(self) -> list[Sample]:
        """Samples of the probe, in order."""
        return [one.sample for one in self.asked if one.role == "probe"]

    @property
    def member_samples(self) -> dict[str, Sample]:
        """Sample of each member that was asked."""
        return {one.model: one.sample for one in self.asked if one.role == "member"}


def find_state(decision: Decision, asked: Sequence[Asked]) -> RunState:
    """How the answering of a task ended.

    Args:
        decision: What was decided.
        asked: The samples it rests on.
    """
    if asked and all(one.sample.failure is not None for one in asked):
        return RunState.FAILED_MODELS
    return RunState.COMPLETED if decision.answer is not None else RunState.FAILED_ANSWER


def build_record(
    recorded: RecordedDecision,
    decision: Decision,
    *,
    policy: str,
    judge: str,
    seconds: float = 0.0,
    examples: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The body of a "decision" record; wall times are under keys named "seconds".

    Args:
        recorded: Task, samples and judge's calls.
        decision: What was decided from them.
        policy: Registered name.
        judge: Registered name.
        seconds: From the first question to the decision.
        examples: Retrieved examples: id and similarity of each.
    """
    task = recorded.task
    answers = iter([*decision.probe_answers, *decision.member_answers.values()])
    invoked = [one.model for one in recorded.asked] + [call.model for call in decision.calls]
    return {
        "task": task.id,
        "family": task.family,
        "level": task.level,
        "extractor": task.extractor,
        "details": dict(task.details),
        "prompt": task.prompt,
        **({} if recorded.prompt == task.prompt else {"asked": recorded.prompt}),
        **({"examples": [dict(one) for one in examples]} if examples else {}),
        "samples": [_pack_asked(one, next(answers)) for one in recorded.asked],
        "sigma": decision.sigma,
        "policy": policy,
        "mode": decision.mode,
        "models": list(dict.fromkeys(invoked)),
        "judge": {
            "name": judge,
            "seed": recorded.judge_seed,
            "calls": [_pack_call(call) for call in decision.calls],
        },
        "winner": decision.winner,
        "answer": decision.answer,
        "reason": decision.reason,
        "right": task.answer,
        "correct": decision.correct,
        "cost": asdict(decision.cost),
        "state": find_state(decision, recorded.asked).value,
        "seconds": seconds,
    }


def _pack_asked(one: Asked, answer: str | None) -> dict[str, Any]:
    request = one.request
    return {
        "model": one.model,
        "role": one.role,
        "number": one.number,
        "seed": request.seed,
        "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "stop": list(request.stop),
        "answer": answer,
        **asdict(one.sample),
    }


def _pack_call(call: JudgeCall) -> dict[str, Any]:
    return {
        "model": call.model,
        "sort": call.sort,
        "request": call.request,
        "samples": [asdict(sample) for sample in call.samples],
        "scores": list(call.scores),
    }


def _unpack_sample(body: Mapping[str, Any]) -> Sample:
    return Sample(**{name: body[name] for name in _SAMPLE_FIELDS if name in body})


def parse_record(body: Mapping[str, Any]) -> RecordedDecision:
    """Read a "decision" record.

    Args:
        body: Of the record; its maker is not trusted.

    Raises:
        CascadeError: If it is not one that `build_record` made.
    """
    try:
        task = CascadeTask(
            id=_text(body["task"]),
            family=_text(body["family"]),
            prompt=_text(body["prompt"]),
            extractor=_text(body["extractor"]),
            answer=None if body["right"] is None else _text(body["right"]),
            level=int(body["level"]),
            details=dict(body["details"]),
        )
        prompt = _text(body.get("asked", task.prompt))
        asked = tuple(_unpack_asked(one, prompt) for one in body["samples"])
        calls = tuple(
            JudgeCall(
                model=_text(call["model"]),
                sort=call["sort"],
                request=_text(call["request"]),
                samples=tuple(_unpack_sample(one) for one in call["samples"]),
                scores=tuple(float(score) for score in call["scores"]),
            )
            for call in body["judge"]["calls"]
        )
        return RecordedDecision(task, prompt, asked, int(body["judge"]["seed"]), calls)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CascadeError(
            f"Cannot read a decision: expected a record of `molora cascade run`, got "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}. Verify the trace."
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _unpack_asked(body: Mapping[str, Any], prompt: str) -> Asked:
    request = Request(
        prompt=prompt,
        seed=int(body["seed"]),
        max_new_tokens=int(body["max_new_tokens"]),
        temperature=float(body["temperature"]),
        stop=tuple(_text(one) for one in body["stop"]),
    )
    sample = _unpack_sample(body)
    _text(sample.text)
    return Asked(_text(body["model"]), _text(body["role"]), int(body["number"]), request, sample)


def drop_times(body: Mapping[str, Any]) -> dict[str, Any]:
    """A "decision" record's body without wall times.

    Args:
        body: Of the record.
    """
    calls = [{**one, "samples": _without(one["samples"])} for one in body["judge"]["calls"]]
    (cost,) = _without([body["cost"]])
    return {
        **{key: value for key, value in body.items() if key != "seconds"},
        "samples": _without(body["samples"]),
        "judge": {**body["judge"], "calls": calls},
        "cost": cost,
    }


def drop_survey_times(body: Mapping[str, Any]) -> dict[str, Any]:
    """A "survey" record's body without wall times.

    Args:
        body: Of the record.
    """
    outcomes = {
        name: {**one, "cost": _without([one["cost"]])[0]} for name, one in body["outcomes"].items()
    }
    return {**body, "samples": _without(body["samples"]), "outcomes": outcomes}


def _without(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in one.items() if key != "seconds"} for one in parts]


def compare_records(recorded: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    """Names of the parts in which two bodies differ, times left out.

    Args:
        recorded: As the trace holds it.
        again: As it was made again.
    """
    first, second = drop_times(recorded), drop_times(again)
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
