"""Conformance checks of judges, on made-up candidates and models that follow a script.

`check_judge_conformance(MyJudge)` is the whole test a plugin's judge needs.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from molora_fed.cascade.asking import JudgeCall, playback_models, recording_models
from molora_fed.cascade.contract import (
    Candidate,
    CascadeModel,
    JudgeRequest,
    Request,
    Sample,
    Scorer,
    Verdict,
)
from molora_fed.hookspecs import check_callable
from molora_fed.testing.cascades import ScriptedModel, ScriptedScorer, build_judge_request
from molora_fed.testing.findings import CheckResult, refuse_broken
from molora_fed.testing.targets import Target, describe_target, examine_target, other_chance

__all__ = ["check_judge_conformance", "examine_judge"]

_ANSWERS: tuple[tuple[str | None, ...], ...] = (
    ("a",),
    (None,),
    ("a", "a", "b"),
    ("b", "a", "c"),
    (None, "a", None),
    (None, None, None),
    ("a", "b", None, "a", "c"),
)


def check_judge_conformance(judge: Any, options: Any = None) -> None:
    """Check a judge against the whole contract.

    It may ask the models "m0" to "m4", of which the candidates are, and "scorer", which scores.

    Args:
        judge: What is registered: a subclass of `Judge`, or a function.
        options: Of a class, its defaults if None; of a function, the mapping in its requests.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title = describe_target("judge", judge)
    refuse_broken(title, examine_judge(judge, options), page="docs/hooks/judges.md")


def examine_judge(judge: Any, options: Any = None) -> tuple[CheckResult, ...]:
    """What `check_judge_conformance` finds, one result a check.

    Args:
        judge: What is registered: a subclass of `Judge`, or a function.
        options: Of a class, its defaults if None; of a function, the mapping in its requests.
    """
    made = inspect.isclass(judge)
    case = _Case(judge, options if made else None, None if made else options)
    return examine_target(_CHECKS, case, contract=check_callable)


@dataclass(frozen=True)
class _Case(Target):
    raw: Mapping[str, Any] | None = None

    def list_requests(self, models: Sequence[CascadeModel]) -> Iterator[JudgeRequest]:
        for answers in _ANSWERS:
            yield build_judge_request(answers, models=models, options=self.raw)


class _Failing(ScriptedScorer):
    """Every sample failed; what it is asked to score is all alike."""

    def sample(self, requests: Sequence[Request]) -> Sequence[Sample]:
        """Failed samples."""
        return [Sample("", failure="out of order") for _ in requests]

    def score(self, prompt: str, answers: Sequence[str]) -> Sequence[float]:
        """The same for all."""
        return [0.0] * len(answers)


def _build_models() -> list[CascadeModel]:
    members = [ScriptedModel(f"m{place}", "A", "B") for place in range(5)]
    return [*members, ScriptedScorer("scorer", "A", "b")]


def _name(request: JudgeRequest) -> str:
    answers = ", ".join(str(one.answer) for one in request.candidates)
    return f"candidates that answer {answers}"


def _find_fault(request: JudgeRequest, verdict: Verdict) -> str | None:
    if not isinstance(verdict, Verdict):
        return f"expected a Verdict, got {type(verdict).__name__}"
    if type(verdict.chosen) is not int or not 0 <= verdict.chosen < len(request.candidates):
        last = len(request.candidates) - 1
        return f"expected a candidate from 0 to {last}, got {verdict.chosen!r}"
    if not isinstance(verdict.reason, str) or len(verdict.reason.splitlines()) != 1:
        return f"expected one line as reason, got {verdict.reason!r}"
    return None


def _find_any_fault(case: _Case, requests: Iterator[JudgeRequest], where: str = "") -> str | None:
    judge = case.make()
    for request in requests:
        if (fault := _find_fault(request, judge(request))) is not None:
            return f"{fault} for {_name(request)}{where}"
    return None


def _chooses_a_candidate(case: _Case) -> str | None:
    return _find_any_fault(case, case.list_requests(_build_models()))


def _chooses_an_answer_where_there_is_one(case: _Case) -> str | None:
    judge = case.make()
    for request in case.list_requests(_build_models()):
        answers = [one.answer for one in request.candidates]
        if any(answers) and answers[judge(request).chosen] is None:
            return f"expected a candidate with an answer for {_name(request)}, got one without"
    return None


def _follows_from_what_models_say(case: _Case) -> str | None:
    first, again = case.make(), case.make()
    for once, twice in zip(
        case.list_requests(_build_models()), case.list_requests(_build_models()), strict=True
    ):
        with other_chance(0):
            one = first(once)
        with other_chance(991):
            other = again(twice)
        if one != other:
            return f"expected the same verdict on {_name(once)}, got another"
    return None


def _replays_from_what_was_recorded(case: _Case) -> str | None:
    """A trace holds what the models said; another run of the judge on it gives the same verdict."""
    models = _build_models()
    scorers = [one.name for one in models if isinstance(one, Scorer)]
    for request in case.list_requests(models):
        calls: list[JudgeCall] = []
        said = case.make()(replace(request, models=recording_models(request.models, calls)))
        fingerprints = {name: one.fingerprint for name, one in request.models.items()}
        played = playback_models(fingerprints, calls, scorers)
        if case.make()(replace(request, models=played)) != said:
            return f"expected the recorded verdict on {_name(request)}, got another"
    return None


def _lists_what_it_asked(case: _Case) -> str | None:
    for request in case.list_requests(_build_models()):
        calls: list[JudgeCall] = []
        verdict = case.make()(replace(request, models=recording_models(request.models, calls)))
        asked = [
            (call.model, sample)
            for call in calls
            if call.sort == "sample"
            for sample in call.samples
        ]
        if list(verdict.samples) != asked:
            return (
                f"expected the {len(asked)} samples it asked for in Verdict.samples for "
                f"{_name(request)}, got {len(verdict.samples)}, or others"
            )
    return None


def _copes_with_candidates_of_models_that_are_not_there(case: _Case) -> str | None:
    outside = [one for one in _build_models() if one.name not in ("m0", "m1")]
    requests = (
        replace(r, candidates=(*r.candidates, Candidate("stranger", "z", "z")))
        for r in case.list_requests(outside)
    )
    return _find_any_fault(case, requests, " of models that are not there")


def _copes_with_models_that_fail(case: _Case) -> str | None:
    members = [_Failing(f"m{place}") for place in range(5)]
    failing: list[CascadeModel] = [_SampleOnly(one) for one in members]
    return _find_any_fault(
        case, case.list_requests([*failing, _Failing("scorer")]), " where all models fail"
    )


class _SampleOnly:
    """A model without its scores."""

    is_local = True

    def __init__(self, model: CascadeModel) -> None:
        self.name, self.fingerprint, self.sample = model.name, model.fingerprint, model.sample


def _leaves_the_request_alone(case: _Case) -> str | None:
    models = _build_models()
    for request, fresh in zip(case.list_requests(models), case.list_requests(models), strict=True):
        case.make()(request)
        if (dict(request.models), dict(request.options)) != (
            dict(fresh.models),
            dict(fresh.options),
        ):
            return f"expected the request as it was for {_name(fresh)}, got changes"
    return None


_CHECKS: tuple[Callable[[_Case], str | None], ...] = (
    _chooses_a_candidate,
    _chooses_an_answer_where_there_is_one,
    _follows_from_what_models_say,
    _replays_from_what_was_recorded,
    _lists_what_it_asked,
    _copes_with_candidates_of_models_that_are_not_there,
    _copes_with_models_that_fail,
    _leaves_the_request_alone,
)
