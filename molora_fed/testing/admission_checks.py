"""Conformance checks of admission checks, on a tiny contribution and on odd ones made of it."""

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.contributions.admission import AdmissionCandidate, Stage
from molora_fed.contributions.decision import AdmissionLosses
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import AdapterError, CorpusError, RoutingError, SignatureError
from molora_fed.guard import one_line
from molora_fed.storage.files import hash_file
from molora_fed.testing.cooperatives import (
    TinyCooperative,
    build_candidate,
    build_tiny_cooperative,
)
from molora_fed.testing.findings import (
    CheckResult,
    Remark,
    describe_raised,
    examine,
    refuse_broken,
)
from molora_fed.testing.targets import open_target, other_chance
from molora_fed.types import Finding

__all__ = ["check_admission_check_conformance", "examine_admission_check"]

MOST_SECONDS = 10.0
"""Of one check on a contribution that takes milliseconds to measure."""

MOST_CHARACTERS = 2_000
"""Of a finding's texts; longer ones are cut where they are shown."""

_REFUSING = (AdapterError, CorpusError, RoutingError, SignatureError)
"""What a check may raise about a contribution, instead of describing it."""


def check_admission_check_conformance(target: Any, options: Any = None) -> None:
    """Check an admission check against the whole contract, on tiny contributions.

    Args:
        target: What is registered: a function, or a class with options.
        options: Options of the class; its defaults if None.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title = f"Admission check '{getattr(target, '__name__', target)}'"
    refuse_broken(
        title, examine_admission_check(target, options), page="docs/hooks/admission-checks.md"
    )


def examine_admission_check(target: Any, options: Any = None) -> tuple[CheckResult, ...]:
    """What `check_admission_check_conformance` finds, one result a check.

    Args:
        target: What is registered: a function, or a class with options.
        options: Options of the class; its defaults if None.
    """
    name = "judges an honest contribution"
    try:
        check = open_target(target, options)
        start = time.monotonic()
        said = check(build_candidate(_get_tiny()))
        seconds = time.monotonic() - start
        fault = _find_fault(said)
    except (Exception, SystemExit) as error:
        fault = f"expected a Finding or None, got {describe_raised(error)}"
    if fault is not None:  # nothing else can be asked of it
        return (CheckResult(name, fault),)
    remark = "" if said is None else f"expected {said.expected}, got {said.found}. {said.fix}"
    results = examine(_CHECKS, _Subject(check, seconds))
    return (CheckResult(name, None, one_line(remark)), *results)


@cache
def _get_tiny() -> TinyCooperative:
    """One tiny cooperative for all checks of a process, gone when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="molora-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build_tiny_cooperative(folder)


def _find_fault(found: Any) -> str | None:
    """Describe what a check may not give, or None."""
    if found is None:
        return None
    if type(found) is not Finding:
        return f"expected a Finding or None, got {type(found).__name__}"
    for part in ("expected", "found", "fix"):
        text = getattr(found, part)
        if not isinstance(text, str) or not text.strip():
            return f"expected a Finding that says what is {part}, got {text!r}"
        if len(text.splitlines()) > 1:
            return f"expected one line as '{part}', got {len(text.splitlines())}"
        if len(text) > MOST_CHARACTERS:
            return (
                f"expected at most {MOST_CHARACTERS} characters as '{part}', got {len(text)} "
                "(quote what a contributor sent by `list_quoted` of contributions.decision)"
            )
    return None


@dataclass(eq=False)
class _Subject:
    check: Callable[[AdmissionCandidate], Any]
    seconds: float

    @property
    def stage(self) -> Any:
        return getattr(self.check, "stage", Stage.MODEL)


class _UntimelyError(Exception):
    """A check asked for more than its stage has."""


def _refuse(name: str) -> Any:
    def ask(self: Any, *arguments: Any) -> Any:
        raise _UntimelyError(name)

    return ask


class _BeforeModel(AdmissionCandidate):
    """A candidate whose adapter may still be one that cannot be run."""

    losses = property(_refuse("losses"))
    base_loss = property(_refuse("base_loss"))
    measure = _refuse("measure")


class _BeforeAdapter(_BeforeModel):
    """A candidate whose files may still be ones that cannot be read."""

    adapter = property(_refuse("adapter"))
    effect = property(_refuse("effect"))
    text = property(_refuse("text"))
    admission_blocks = property(_refuse("admission_blocks"))


class _Changed(AdmissionCandidate):
    """A candidate with another adapter or other text than its contribution has."""

    def __init__(self, candidate: AdmissionCandidate, **changes: Any) -> None:
        super().__init__(**{name: getattr(candidate, name) for name in _FIELDS})
        vars(self).update(changes)


_FIELDS = (
    "contribution", "charter", "base", "plugins", "others", "received_under", "progress",
    "public_folder",
)  # fmt: skip


def _says_what_it_needs(subject: _Subject) -> str | None:
    stage = subject.stage
    if not isinstance(stage, Stage):
        return f"expected a Stage of molora_fed.contributions.admission, got {stage!r}"
    if stage == Stage.MODEL:
        is_said = hasattr(subject.check, "stage")
        return None if is_said else Remark("runs last: `needs(Stage.ADAPTER)` lets it run earlier")
    kind = _BeforeAdapter if stage == Stage.MANIFEST else _BeforeModel
    honest = build_candidate(_get_tiny())
    try:
        subject.check(kind(**{name: getattr(honest, name) for name in _FIELDS}))
    except _UntimelyError as error:
        wanted = "the manifest alone" if stage == Stage.MANIFEST else "manifest and files"
        return f"expected Stage.{stage.name} to read {wanted}, got a look at candidate.{error}"
    return None


def _raises_on_no_contribution(subject: _Subject) -> str | None:
    failed = []
    for what, candidate in _list_odd(subject.stage):
        try:
            found = subject.check(candidate)
        except _REFUSING:
            continue
        except (Exception, SystemExit) as error:
            failed.append(f"{describe_raised(error)} of {what}")
            continue
        fault = _find_fault(found)
        if fault is not None:
            failed.append(f"{fault}, of {what}")
    if not failed:
        return None
    return f"expected a Finding or None of any contribution, got {' and '.join(failed[:3])}"


def _list_odd(stage: Stage) -> Iterator[tuple[str, AdmissionCandidate]]:
    """Candidates that get as far as a stage, and what is odd about them."""
    honest = build_candidate(_get_tiny())

    def restate(**changes: Any) -> AdmissionCandidate:
        manifest = honest.contribution.manifest.model_copy(update=changes)
        return replace(honest, contribution=replace(honest.contribution, manifest=manifest))

    yield "the first contributor", replace(honest, others=())
    yield "a contribution without a training record", restate(training={})
    yield "a training record of other things", restate(training=_ODD_RECORD)
    yield "a contribution without text here", restate(sample_files={})
    yield "a contribution that states little", restate(contamination=None, start_loss=None)
    yield "a specialist worse than the base", restate(base_loss=1.0, specialist_loss=9.0)
    if stage == Stage.MANIFEST:
        yield (
            "adapter files that cannot be read",
            _BeforeAdapter(**{name: getattr(honest, name) for name in _FIELDS}),
        )
        return
    yield "an adapter that changes nothing", _scale(honest, 0.0)
    yield "an adapter of very large numbers", _scale(honest, 1e4)
    if stage == Stage.MODEL:
        yield "losses that are not finite", _Changed(honest, losses=_NO_LOSSES, base_loss=1.0)
        yield "a lone admission block", _Changed(honest, admission_blocks=_take_one(honest))
    else:  # where numbers are not finite, no model is run
        yield "an adapter of NaN", _scale(honest, float("nan"))
        yield (
            "an adapter without updates",
            _Changed(honest, adapter=replace(honest.adapter, updates={})),
        )


_ODD_RECORD: dict[str, Any] = {
    "steps": "many",
    "licence": None,
    "kind": 7,
    "versions": [1, {"torch": {"of": "mine"}}],
    "note": "\u202e\x00\n" + 5_000 * "x",
}
_NO_LOSSES = AdmissionLosses(float("nan"), float("inf"))


def _scale(candidate: AdmissionCandidate, factor: float) -> AdmissionCandidate:
    """The candidate with its adapter's products times a factor."""

    def scale(update: LinearUpdate) -> LinearUpdate:
        if update.a is not None and update.b is not None:
            return replace(update, b=update.b * factor)
        return replace(update, dense=torch.as_tensor(update.dense) * factor)

    adapter = candidate.adapter
    updates = {name: scale(update) for name, update in adapter.updates.items()}
    return _Changed(candidate, adapter=replace(adapter, updates=updates))


def _take_one(candidate: AdmissionCandidate) -> Blocks:
    return candidate.admission_blocks.take(1)


def _gives_the_same_answer_twice(subject: _Subject) -> str | None:
    first = subject.check(build_candidate(_get_tiny()))
    with other_chance():
        second = subject.check(build_candidate(_get_tiny()))
    if first == second:
        return None
    return "expected the same answer for the same contribution, got another"


def _ends_soon(subject: _Subject) -> str | None:
    if subject.seconds <= MOST_SECONDS:
        return None
    return (
        f"expected an answer within {MOST_SECONDS:.0f} s on a tiny contribution, got one after "
        f"{subject.seconds:.0f} s"
    )


def _leaves_the_candidate_unchanged(subject: _Subject) -> str | None:
    candidate = build_candidate(_get_tiny())
    before = _Snapshot(candidate)
    try:
        subject.check(candidate)
    finally:
        changed = before.find_changes(candidate)
        before.restore(candidate)
    if changed:
        return f"expected the candidate as it was, got changes of {', '.join(changed)}"
    return None


class _Snapshot:
    """What a candidate is, to be compared later; the base is shared by all that follow."""

    def __init__(self, candidate: AdmissionCandidate) -> None:
        model = candidate.base.model
        self.model = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        self.training = model.training
        self.adapter = _list_numbers(candidate.adapter)
        self.manifest = candidate.contribution.manifest.canonical
        self.charter = candidate.charter.model_dump_json()
        self.files = _hash_files(candidate.contribution.folder)

    def find_changes(self, candidate: AdmissionCandidate) -> list[str]:
        model = candidate.base.model
        state = model.state_dict()
        same = {
            "the base's weights": all(torch.equal(t, state[n]) for n, t in self.model.items()),
            "the base's flags": model.training == self.training
            and self.flags == [(p.requires_grad, p.grad is None) for p in model.parameters()],
            "the adapter": self.adapter == _list_numbers(candidate.adapter),
            "the manifest": self.manifest == candidate.contribution.manifest.canonical,
            "the charter": self.charter == candidate.charter.model_dump_json(),
            "its files": self.files == _hash_files(candidate.contribution.folder),
        }
        return [what for what, is_same in same.items() if not is_same]

    def restore(self, candidate: AdmissionCandidate) -> None:
        """Put back the base, which others are judged on."""
        candidate.base.model.load_state_dict(self.model)
        candidate.base.model.train(self.training)
        candidate.base.model.requires_grad_(False)


def _list_numbers(adapter: Adapter) -> dict[str, bytes]:
    return {
        f"{module}.{name}": tensor.contiguous().numpy().tobytes()
        for module, update in adapter.updates.items()
        for name, tensor in update.tensors().items()
    }


def _hash_files(folder: Path) -> dict[str, str]:
    return {str(path): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


_CHECKS: tuple[Callable[[_Subject], str | None], ...] = (
    _says_what_it_needs,
    _raises_on_no_contribution,
    _gives_the_same_answer_twice,
    _ends_soon,
    _leaves_the_candidate_unchanged,
)
