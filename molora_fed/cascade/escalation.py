"""Deciding a task from samples: extraction, sigma, mode, members, judge.

`decide` is a pure function of recorded samples (and of what the judge was told), so that running,
studying and replaying share it. Who samples, and when, is the business of `running`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from molora_fed.cascade.asking import JudgeCall, recording_models
from molora_fed.cascade.contract import (
    Candidate,
    CascadeModel,
    CascadeTask,
    EscalationPolicy,
    Extractor,
    JudgeFunction,
    JudgeRequest,
    Mode,
    ProbeEvidence,
    Sample,
    compute_sigma,
)
from molora_fed.errors import CascadeError

__all__ = [
    "Cost",
    "Decision",
    "Lineup",
    "Probing",
    "Rules",
    "add_costs",
    "assess_probe",
    "decide",
    "find_majority",
    "hide_answer",
    "list_asked",
]

NUM_VERIFIERS = 2
"""Members that verify a majority answer in arena_lite."""


@dataclass(frozen=True)
class Lineup:
    """Who takes part.

    Attributes:
        probe: Name of the probe; None if every member is always asked.
        members: Names in the order in which they are asked; the first two verify.
    """

    probe: str | None
    members: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Rules:
    """What decides.

    Attributes:
        extract: Makes a sample's answer canonical.
        policy: Chooses the mode; not used without a probe.
        judge: Chooses among the members' answers.
        judge_options: What the judge is told beside.
    """

    extract: Extractor
    policy: EscalationPolicy
    judge: JudgeFunction
    judge_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What samples cost together.

    Attributes:
        flops: Floating-point operations, reading included.
        price: In the currency of the cost table.
        prompt_tokens: Tokens read.
        new_tokens: Tokens written.
        samples: How many.
        seconds: Sum of their times.
    """

    flops: float = 0.0
    price: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Probing:
    """What the probe's samples say.

    Attributes:
        answers: Canonical answer of each; None where it has none.
        sigma: Their disagreement.
        majority: Place of the first sample with the answer most of them gave; None if no sample
            has an answer.
        mode: What the policy chose.
    """

    answers: tuple[str | None, ...]
    sigma: float
    majority: int | None
    mode: Mode


@dataclass(frozen=True)
class Decision:
    """The answer to a task, and how it came about.

    Attributes:
        task: Id of the task.
        mode: How many members were asked.
        sigma: Disagreement of the probe; None without a probe.
        probe_answers: Canonical answers of the probe's samples.
        member_answers: Canonical answer of every member that was asked, in order.
        winner: Name of the model whose answer it is; None if there is none.
        answer: Canonical answer; None if nobody has one.
        reason: One line.
        calls: What the judge asked of models.
        cost: Of probe, members and judge.
        correct: Whether the answer is the right one; None if nobody knows.
    """

    task: str
    mode: Mode
    sigma: float | None
    probe_answers: tuple[str | None, ...]
    member_answers: Mapping[str, str | None]
    winner: str | None
    answer: str | None
    reason: str
    calls: tuple[JudgeCall, ...]
    cost: Cost
    correct: bool | None


@dataclass(frozen=True)
class _Choice:
    winner: str | None
    answer: str | None
    reason: str
    calls: tuple[JudgeCall, ...] = ()


def add_costs(samples: Sequence[Sample]) -> Cost:
    """Sum of what samples cost."""
    return Cost(
        flops=sum(one.flops for one in samples),
        price=sum(one.price for one in samples),
        prompt_tokens=sum(one.prompt_tokens for one in samples),
        new_tokens=sum(one.new_tokens for one in samples),
        samples=len(samples),
        seconds=sum(one.seconds for one in samples),
    )


def hide_answer(task: CascadeTask) -> CascadeTask:
    """The task as extractors, policies and judges may see it."""
    return replace(task, answer=None)


def find_majority(answers: Sequence[str | None]) -> int | None:
    """Place of the answer most samples gave, the earliest of equals; None if there is none."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    first = {answer: answers.index(answer) for answer in votes}
    return first[max(votes, key=lambda answer: (votes[answer], -first[answer]))]


def _extract(task: CascadeTask, sample: Sample, rules: Rules) -> str | None:
    return None if sample.failure is not None else rules.extract(hide_answer(task), sample.text)


def assess_probe(task: CascadeTask, samples: Sequence[Sample], rules: Rules) -> Probing:
    """Extract the probe's answers and choose the mode.

    A sample that failed has no answer, so that it counts as disagreement.

    Args:
        task: The task; its right answer is hidden from extractor and policy.
        samples: Of the probe, at least one.
        rules: What decides.

    Raises:
        ValueError: If there are no samples.
    """
    answers = tuple(_extract(task, sample, rules) for sample in samples)
    sigma = compute_sigma(answers)
    texts = tuple(sample.text for sample in samples)
    mode = rules.policy.choose_mode(ProbeEvidence(hide_answer(task), answers, texts, sigma))
    return Probing(answers, sigma, find_majority(answers), mode)


def list_asked(mode: Mode, lineup: Lineup) -> tuple[str, ...]:
    """Names of the members that a mode asks, in order: none, the first two, or all."""
    if lineup.probe is None or mode == "full_arena":
        return lineup.members
    return () if mode == "single_agent" else lineup.members[:NUM_VERIFIERS]


def decide(
    task: CascadeTask,
    lineup: Lineup,
    probe_samples: Sequence[Sample],
    member_samples: Mapping[str, Sample],
    rules: Rules,
    *,
    models: Mapping[str, CascadeModel] | None = None,
    seed: int = 0,
) -> Decision:
    """Decide a task from samples; the same samples give the same decision.

    single_agent: the answer most probe samples gave, the earliest of equals, stands. arena_lite:
    it stands unless both verifying members give one and the same other answer; where the probe has
    no answer, the first member's that has one. full_arena: all members answer and the judge
    selects; where no member has an answer, the probe's most frequent one stands. Without a probe
    all members answer and the judge selects, and one member alone needs no judge.

    Args:
        task: The task.
        lineup: Who takes part.
        probe_samples: Of the probe; none without a probe.
        member_samples: One of every member that the mode asks; those of others are not looked at,
            and cost nothing.
        rules: What decides.
        models: All models by name, for judges that ask.
        seed: Of the judge.

    Raises:
        CascadeError: If a sample that is needed is missing.
        ValueError: If there is a probe without samples.

    Source: modes after arXiv 2602.21231; how two members verify is our own definition.
    """
    probing = assess_probe(task, probe_samples, rules) if lineup.probe is not None else None
    mode = _choose_mode(probing, lineup)
    asked = list_asked(mode, lineup)
    missing = [name for name in asked if name not in member_samples]
    if missing or not (lineup.members or probing):
        raise CascadeError(
            f"Cannot decide task '{task.id}': expected a sample of every model asked, got none of "
            f"{', '.join(missing) or 'any'}. Sample them first."
        )
    answers = {name: _extract(task, member_samples[name], rules) for name in asked}
    if mode == "single_agent":
        choice = _choose_alone(probing, lineup, answers)
    elif mode == "arena_lite" and probing is not None:
        choice = _verify(probing, lineup, answers)
    elif probing is not None and set(answers.values()) == {None}:
        choice = replace(_choose_alone(probing, lineup, answers), reason="no member has an answer")
    else:
        texts = {name: member_samples[name].text for name in asked}
        choice = _judge(task, answers, texts, rules, models or {}, seed)
    used = [*(probe_samples if probing else ()), *(member_samples[name] for name in asked)]
    used += [sample for call in choice.calls for sample in call.samples]
    return Decision(
        task=task.id,
        mode=mode,
        sigma=None if probing is None else probing.sigma,
        probe_answers=() if probing is None else probing.answers,
        member_answers=answers,
        winner=choice.winner,
        answer=choice.answer,
        reason=choice.reason,
        calls=choice.calls,
        cost=add_costs(used),
        correct=None if task.answer is None else choice.answer == task.answer,
    )


def _choose_mode(probing: Probing | None, lineup: Lineup) -> Mode:
    if probing is not None:
        # Without members there is nobody to escalate to.
        return probing.mode if lineup.members else "single_agent"
    return "single_agent" if len(lineup.members) == 1 else "full_arena"


def _choose_alone(
    probing: Probing | None, lineup: Lineup, answers: Mapping[str, str | None]
) -> _Choice:
    """The probe's majority; without a probe, the only member's answer."""
    if probing is None:
        ((name, answer),) = answers.items()
        return _Choice(None if answer is None else name, answer, "the only member's answer")
    if probing.majority is None:
        return _Choice(None, None, "the probe has no answer")
    answer = probing.answers[probing.majority]
    count = probing.answers.count(answer)
    reason = f"{count} of {len(probing.answers)} probe samples agree"
    return _Choice(lineup.probe, answer, reason)


def _verify(probing: Probing, lineup: Lineup, answers: Mapping[str, str | None]) -> _Choice:
    given = {name: answer for name, answer in answers.items() if answer is not None}
    if probing.majority is None:
        if not given:
            return _Choice(None, None, "neither the probe nor a member has an answer")
        first = next(iter(given))
        return _Choice(first, given[first], "the probe has no answer, the first member's counts")
    majority = probing.answers[probing.majority]
    agreed = set(given.values())
    if len(given) == NUM_VERIFIERS and len(agreed) == 1 and majority not in agreed:
        first = next(iter(given))
        return _Choice(first, given[first], "both members agree on another answer")
    backing = sum(answer == majority for answer in given.values())
    reason = f"the probe's majority, backed by {backing} of {len(answers)} members"
    return _Choice(lineup.probe, majority, reason)


def _judge(
    task: CascadeTask,
    answers: Mapping[str, str | None],
    texts: Mapping[str, str],
    rules: Rules,
    models: Mapping[str, CascadeModel],
    seed: int,
) -> _Choice:
    calls: list[JudgeCall] = []
    candidates = tuple(Candidate(name, answer, texts[name]) for name, answer in answers.items())
    recording = recording_models(models, calls)
    verdict = rules.judge(
        JudgeRequest(hide_answer(task), candidates, recording, seed, rules.judge_options)
    )
    if not 0 <= verdict.chosen < len(candidates):
        raise CascadeError(
            f"Cannot decide task '{task.id}': expected the judge to choose a candidate from 0 to "
            f"{len(candidates) - 1}, got {verdict.chosen}. Correct the judge."
        )
    chosen = candidates[verdict.chosen]
    winner = None if chosen.answer is None else chosen.model
    return _Choice(winner, chosen.answer, verdict.reason, tuple(calls))
