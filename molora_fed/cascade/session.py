"""A run of a cascade in a folder: its trace, labels and answers; safe to interrupt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel

from molora_fed.cascade.attribution import survey_task
from molora_fed.cascade.building import build_cascade
from molora_fed.cascade.config import load_config
from molora_fed.cascade.contract import CascadeTask, EscalationPolicy, Scorer
from molora_fed.cascade.records import (
    RunState,
    advance,
    drop_survey_times,
    drop_times,
    store_artifact,
)
from molora_fed.cascade.replay import ReplayReport, replay_trace
from molora_fed.cascade.running import (
    Cascade,
    RunTotals,
    add_to_totals,
    answer_task,
    describe_totals,
)
from molora_fed.cascade.task_files import hash_tasks
from molora_fed.errors import CascadeError
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import canonical_json, hash_bytes, write_bytes
from molora_fed.storage.keys import build_public_pem
from molora_fed.storage.untrusted import writable
from molora_fed.tracing.reading import read_records
from molora_fed.tracing.segments import SEAL_FILE
from molora_fed.tracing.writing import TraceWriter
from molora_fed.types import Progress

__all__ = [
    "ANSWERS_FILE",
    "RunResult",
    "describe_cascade",
    "describe_options",
    "load_cascade",
    "run_in_folder",
]


MAX_POLICY_FILE_BYTES = 1_000_000


def describe_options(policy: EscalationPolicy) -> dict[str, Any]:
    """A policy's options, and the text of the files among them, so that a trace needs no other.

    Args:
        policy: The policy.

    Raises:
        CascadeError: If a file is too large, or no text.
    """
    options: dict[str, Any] = {}
    files: dict[str, str] = {}
    if isinstance(policy.options, BaseModel):
        options = policy.options.model_dump(mode="json")
        values = {name: getattr(policy.options, name) for name in options}
        for name, path in values.items():
            if isinstance(path, Path):
                options[name] = path.name
                files[name] = _read_text(path)
    return {"options": options, **({"files": files} if files else {})}


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_POLICY_FILE_BYTES:
            raise ValueError(f"more than {MAX_POLICY_FILE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CascadeError(
            f"Cannot record policy file '{path}': expected text of at most "
            f"{MAX_POLICY_FILE_BYTES} bytes, got {error}. Fit a smaller one."
        ) from error


def describe_cascade(cascade: Cascade, plugins: Plugins) -> dict[str, Any]:
    """What the "run" record says of a cascade: everything that decides its records.

    Args:
        cascade: The cascade.
        plugins: Where its policy, judge and extractors are registered.
    """
    settings = cascade.settings
    return {
        "probe": cascade.lineup.probe,
        "members": list(cascade.lineup.members),
        "models": {
            name: {
                "fingerprint": model.fingerprint,
                "is_local": model.is_local,
                "scores": isinstance(model, Scorer),
            }
            for name, model in sorted(cascade.models.items())
        },
        "policy": {
            "name": cascade.policy_name,
            **describe_options(cascade.policy),
            "origin": plugins.escalation_policies.entry(cascade.policy_name).origin,
        },
        "judge": {
            "name": cascade.judge_name,
            "options": dict(cascade.judge_options),
            "origin": plugins.judges.entry(cascade.judge_name).origin,
        },
        "extractors": {
            name: plugins.extractors.entry(name).origin for name in sorted(cascade.extractors)
        },
        "settings": {
            "samples": settings.samples,
            "temperature": settings.temperature,
            "member_temperature": settings.member_temperature,
            "max_new_tokens": settings.max_new_tokens,
            "stop": list(settings.stop),
            "seed": settings.seed,
        },
        "template": {
            "text": settings.template.text,
            "example": settings.template.example,
            "sha256": settings.template.hash,
        },
        "retrieval": None if cascade.retrieval is None else cascade.retrieval.describe(),
        "environment": cascade.environment_hash,
    }


TRACE_FOLDER = "trace"
PUBLIC_FILE = "public.pem"
ANSWERS_FILE = "answers.jsonl"
FORMAT_VERSION = 1
_ANSWER = ("task", "answer", "winner", "mode", "state")


@dataclass(frozen=True)
class RunResult:
    """A run that is over.

    Attributes:
        folder: Its folder.
        totals: Tasks, right answers and cost.
        root: Merkle root of the sealed trace, hex; keep it elsewhere.
        replay: What deciding again from the record found.
    """

    folder: Path
    totals: RunTotals
    root: str
    replay: ReplayReport


@dataclass
class _Found:
    """What a run's trace holds so far."""

    run: Mapping[str, Any] | None
    state: RunState | None
    decided: dict[str, dict[str, Any]]
    surveyed: set[str]
    totals: RunTotals


def load_cascade(
    config: Path,
    tasks: Sequence[CascadeTask],
    plugins: Plugins | None = None,
    *,
    compute: Compute | None = None,
) -> Cascade:
    """Load the models of a description, with the extractors that tasks need.

    Args:
        config: TOML file; paths in it are relative to its folder.
        tasks: The tasks.
        plugins: Where everything is registered; the installed ones if None.
        compute: Where local models run, and in which dtype.

    Raises:
        CascadeError: If description or tasks cannot be used.
        MoloraError: Whatever loading a model refuses.
    """
    extractors = tuple(sorted({task.extractor for task in tasks}))
    plugins = plugins or get_plugins()
    return build_cascade(
        load_config(config), config.parent, plugins, extractors=extractors, compute=compute
    )


def _keep(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the file of answers needs; samples stay on disk.

    Answers of earlier versions may hold halves of characters, which the trace can carry.
    """
    found = {key: body[key] for key in _ANSWER}
    answer = found["answer"]
    return {**found, "answer": writable(answer) if isinstance(answer, str) else answer}


def _read_found(trace: Path) -> _Found:
    found = _Found(None, None, {}, set(), RunTotals())
    if not trace.is_dir():
        return found
    for record in read_records(trace):
        match record.kind:
            case "run" if found.run is None:
                found.run = record.body
            case "state":
                found.state = RunState(record.body["state"])
            case "decision":
                found.decided[record.body["task"]] = _keep(record.body)
                found.totals = add_to_totals(found.totals, record.body)
            case "survey":
                found.surveyed.add(record.body["task"])
    return found


def run_in_folder(
    cascade: Cascade,
    tasks: Sequence[CascadeTask],
    folder: Path,
    *,
    key: ec.EllipticCurvePrivateKey,
    survey: bool = False,
    with_times: bool = True,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Run a cascade over tasks, record everything, replay the record and seal it.

    Stopped or killed at any moment and called again, it goes on after the last decision on disk;
    called again when done, it reads what is there.

    Args:
        cascade: What answers.
        tasks: Each with an id of its own.
        folder: Of the run: `trace/`, `public.pem`, `answers.jsonl`.
        key: Signs the trace.
        survey: Ask every member on every task as well, apart from the decision.
        with_times: Record wall times; without them the same inputs give the same bytes.
        plugins: Where everything is registered; the installed ones if None.
        progress: Receives tasks done and tasks in all, with accuracy and cost so far.

    Raises:
        CascadeError: If the folder holds another run.
        TraceError: If the trace cannot be written or read.
        StorageError: On I/O errors.
        MoloraError: Whatever extractor, policy or judge refuse for good.
    """
    plugins = plugins or get_plugins()
    trace = folder / TRACE_FOLDER
    run = {
        "format_version": FORMAT_VERSION,
        **describe_cascade(cascade, plugins),
        "environment_details": dict(cascade.environment),
        "tasks": {"count": len(tasks), "sha256": hash_tasks(tasks)},
        "survey": survey,
        "times": with_times,
    }
    _check_same(folder, _read_found(trace).run, run)
    if (trace / SEAL_FILE).exists():
        return _read_finished(folder, key, plugins)
    run_id = f"cascade-{hash_bytes(canonical_json(run))[:16]}"
    with TraceWriter(trace, key=key, run_id=run_id) as writer:
        found = _read_found(trace)  # again, now that no other process writes
        _begin(writer, found, run)
        session = _Session(cascade, writer, trace, found, survey, with_times)
        session.answer_all(tasks, progress)
        report = _finish(writer, session, folder, tasks, plugins)
        write_bytes(folder / PUBLIC_FILE, build_public_pem(key).encode())
        root = writer.seal()
    return RunResult(folder, found.totals, root, report)


def _check_same(folder: Path, recorded: Mapping[str, Any] | None, run: Mapping[str, Any]) -> None:
    if recorded is None:
        return
    differing = sorted(k for k in {*recorded, *run} if recorded.get(k) != run.get(k))
    if differing:
        raise CascadeError(
            f"Cannot resume run '{folder}': expected the cascade, tasks, options and versions "
            f"it was begun with, got others: {', '.join(differing)}. Choose another folder."
        )


def _begin(writer: TraceWriter, found: _Found, run: Mapping[str, Any]) -> None:
    if found.run is None:
        writer.append("run", run)
    if found.state is None:
        found.state = RunState.PENDING
        writer.append("state", {"state": found.state.value})
    if found.state == RunState.PENDING:
        _set_state(writer, found, RunState.EXECUTING)


def _set_state(writer: TraceWriter, found: _Found, state: RunState) -> None:
    if found.state is None:
        raise CascadeError(f"Cannot go to state {state}: expected a run that was begun, got none.")
    found.state = advance(found.state, state)
    writer.append("state", {"state": state.value})


@dataclass
class _Session:
    """The answering of one run."""

    cascade: Cascade
    writer: TraceWriter
    trace: Path
    found: _Found
    survey: bool
    with_times: bool

    def answer_all(self, tasks: Sequence[CascadeTask], progress: Progress | None) -> None:
        for number, task in enumerate(tasks, start=1):
            self._answer(task)
            if progress is not None:
                progress(number, len(tasks), **describe_totals(self.found.totals))

    def _answer(self, task: CascadeTask) -> None:
        found = self.found
        if task.id in found.decided and not (self.survey and task.id not in found.surveyed):
            return
        if task.id in found.decided:
            # Killed between decision and survey: the decision is read again.
            body = self._find_decision(task.id)
        else:
            body = answer_task(task, self.cascade)
            self.writer.append("decision", body if self.with_times else drop_times(body))
            found.decided[task.id] = _keep(body)
            found.totals = add_to_totals(found.totals, body)
        if self.survey:
            surveyed = survey_task(self.cascade, body)
            self.writer.append(
                "survey", surveyed if self.with_times else drop_survey_times(surveyed)
            )
            found.surveyed.add(task.id)

    def _find_decision(self, task_id: str) -> dict[str, Any]:
        for record in read_records(self.trace):
            if record.kind == "decision" and record.body["task"] == task_id:
                return record.body
        raise CascadeError(f"Cannot survey task '{task_id}': its decision is not in the trace.")


def _finish(
    writer: TraceWriter,
    session: _Session,
    folder: Path,
    tasks: Sequence[CascadeTask],
    plugins: Plugins,
) -> ReplayReport:
    """Decide again from what was recorded, and leave the answers as a file."""
    found = session.found
    if found.state == RunState.EXECUTING:
        _set_state(writer, found, RunState.VERIFYING)
    writer.sync()
    report = replay_trace(folder / TRACE_FOLDER, plugins=plugins)
    if found.state != RunState.VERIFYING:
        return report
    answers = [found.decided[task.id] for task in tasks]
    lines = [canonical_json(one) + b"\n" for one in answers]
    store_artifact(folder / ANSWERS_FILE, b"".join(lines), writer.append)
    failed = bool(report.differences)
    end = RunState.FAILED_VERIFICATION if failed else RunState.COMPLETED
    if failed:
        writer.append("differences", {"found": list(report.differences[:100])})
    _set_state(writer, found, end)
    return report


def _read_finished(folder: Path, key: ec.EllipticCurvePrivateKey, plugins: Plugins) -> RunResult:
    from molora_fed.tracing.verifying import seal_run

    trace = folder / TRACE_FOLDER
    return RunResult(
        folder,
        _read_found(trace).totals,
        seal_run(trace, key=key),
        replay_trace(trace, plugins=plugins),
    )
