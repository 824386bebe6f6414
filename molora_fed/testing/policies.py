"""Conformance checks of escalation policies, on made-up evidence.

`check_policy_conformance(MyPolicy)` is the whole test a plugin's policy needs.
"""

import copy
import json
from collections.abc import Callable, Iterator

from molora_fed.cascade.contract import (
    MODES,
    CascadeTask,
    EscalationPolicy,
    JudgeRequest,
    PolicyOptions,
    ProbeEvidence,
    Verdict,
)
from molora_fed.cascade.escalation import Lineup, assess_probe
from molora_fed.cascade.records import parse_record
from molora_fed.cascade.running import Cascade, answer_task
from molora_fed.guard import one_line
from molora_fed.hookspecs import check_policy
from molora_fed.storage.files import canonical_json
from molora_fed.testing.cascades import ScriptedModel, build_evidence, build_task
from molora_fed.testing.findings import CheckResult, refuse_broken
from molora_fed.testing.targets import Target, describe_target, examine_target, other_chance

__all__ = ["check_policy_conformance", "examine_policy"]

_ANSWERS: tuple[tuple[str | None, ...], ...] = (
    ("a",),
    (None,),
    ("a", "a"),
    ("a", "b"),
    ("a", "a", "a"),
    ("a", "b", "a"),
    ("a", "b", "c"),
    ("a", "a", None),
    (None, None, None),
    ("a", "b", "c", "a", None, "d", "a"),
)
_TASKS = (
    build_task(answer=None),
    build_task(7, None, level=99),
    build_task(8, None, details={"choices": ("a", "b"), "tests": [{"arguments": [1]}]}),
    CascadeTask("", "never heard of", "", "unknown"),
)


def check_policy_conformance(
    policy: type[EscalationPolicy], options: PolicyOptions | None = None
) -> None:
    """Check an escalation policy against the whole contract.

    Args:
        policy: The class that is registered.
        options: Its options; its defaults if None.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title = describe_target("escalation policy", policy)
    refuse_broken(title, examine_policy(policy, options), page="docs/hooks/escalation-policies.md")


def examine_policy(
    policy: type[EscalationPolicy], options: PolicyOptions | None = None
) -> tuple[CheckResult, ...]:
    """What `check_policy_conformance` finds, one result a check.

    Args:
        policy: The class that is registered.
        options: Its options; its defaults if None.
    """
    return examine_target(_CHECKS, Target(policy, options), contract=check_policy)


def _list_evidence() -> Iterator[ProbeEvidence]:
    for task in _TASKS:
        for answers in _ANSWERS:
            yield build_evidence(answers, task=task)
    yield build_evidence(("", "\ud800", "🙂"), texts=("", "\0" * 9, "x" * 100_000))


def _name(evidence: ProbeEvidence) -> str:
    answers = ", ".join(ascii(one) for one in evidence.answers)
    return f"the answers {answers} at level {evidence.task.level} of '{evidence.task.family}'"


def _chooses_a_mode_for_any_evidence(case: Target) -> str | None:
    policy = case.make()
    for evidence in _list_evidence():
        try:
            mode = policy.choose(evidence)
        except Exception as error:
            found = f"{type(error).__name__}: {one_line(str(error))}"
            return f"expected a mode for {_name(evidence)}, got {found}"
        if mode not in MODES:
            return f"expected one of {', '.join(MODES)} for {_name(evidence)}, got {mode!r}"
    return None


def _follows_from_the_evidence(case: Target) -> str | None:
    evidence = list(_list_evidence())
    found = []
    for chance, order in ((0, evidence), (991, evidence[::-1])):
        policy = case.make()
        with other_chance(chance):
            found.append([policy.choose(one) for one in order])
    for one, mode, again in zip(evidence, found[0], found[1][::-1], strict=True):
        if mode != again:
            return f"expected the same mode for {_name(one)} in any order, got {mode} and {again}"
    return None


def _leaves_the_evidence_alone(case: Target) -> str | None:
    policy = case.make()
    for evidence in _list_evidence():
        before = copy.deepcopy(evidence)
        policy.choose(evidence)
        if evidence != before:
            return f"expected the evidence as it was for {_name(before)}, got changes"
    return None


def _extract(task: CascadeTask, text: str) -> str | None:
    return text.strip() or None


def _judge(request: JudgeRequest) -> Verdict:
    return Verdict(0, "the first")


def _replays_from_the_trace(case: Target) -> str | None:
    """What a trace holds of a decision is enough to choose the mode again."""
    members = [ScriptedModel(name, "a") for name in ("m0", "m1", "m2")]
    for texts in (("a", "a", "a"), ("a", "b", " "), ("a", "b", "c")):
        for task in _TASKS[:3]:
            cascade = Cascade(
                lineup=Lineup("probe", tuple(one.name for one in members)),
                models={one.name: one for one in (ScriptedModel("probe", *texts), *members)},
                policy=case.make(),
                policy_name="checked",
                judge=_judge,
                judge_name="first",
                extractors={task.extractor: _extract},
            )
            body = json.loads(canonical_json(answer_task(task, cascade)))
            recorded = parse_record(body)
            rules = cascade.rules(recorded.task)
            again = assess_probe(recorded.task, recorded.probe_samples, rules).mode
            if again != body["mode"]:
                return f"expected the recorded mode {body['mode']} from the trace, got {again}"
    return None


_CHECKS: tuple[Callable[[Target], str | None], ...] = (
    _chooses_a_mode_for_any_evidence,
    _follows_from_the_evidence,
    _leaves_the_evidence_alone,
    _replays_from_the_trace,
)
