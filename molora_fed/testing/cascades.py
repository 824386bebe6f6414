"""What cascades are tested with: tasks, evidence, judges' requests, models that follow a script."""

from collections.abc import Mapping, Sequence
from typing import Any

from molora_fed.cascade.contract import (
    Candidate,
    CascadeModel,
    CascadeTask,
    JudgeRequest,
    ProbeEvidence,
    Request,
    Sample,
    compute_sigma,
)

__all__ = [
    "ScriptedModel",
    "ScriptedScorer",
    "build_evidence",
    "build_judge_request",
    "build_task",
]


class ScriptedModel:
    """Says fixed texts in turn, whatever it is asked.

    Args:
        name: Its name in the cascade.
        texts: What it says, one a request, from the first again in every call.
        fails: Whether it raises instead.

    Attributes:
        asked: The requests of every call.
    """

    is_local = True

    def __init__(self, name: str, *texts: str, fails: bool = False) -> None:
        self.name, self.fingerprint = name, f"fingerprint-{name}"
        self.texts, self.fails = texts, fails
        self.asked: list[list[Request]] = []

    def sample(self, requests: Sequence[Request]) -> Sequence[Sample]:
        """The next texts; two tokens, 10 operations and a price of 0.5 each."""
        self.asked.append(list(requests))
        if self.fails:
            raise RuntimeError("out of order")
        return [
            Sample(
                self.texts[at % len(self.texts)],
                prompt_tokens=len(request.prompt),
                new_tokens=2,
                flops=10.0,
                price=0.5,
                seconds=0.25,
            )
            for at, request in enumerate(requests)
        ]


class ScriptedScorer(ScriptedModel):
    """The same for a model that scores: its text is the likeliest answer, then shorter ones."""

    def score(self, prompt: str, answers: Sequence[str]) -> Sequence[float]:
        """0 nats for what it says itself, one nat less for each character of the others."""
        return [0.0 if one.strip() in self.texts else -float(len(one)) for one in answers]

    def count_scoring(self, prompt: str, answers: Sequence[str]) -> Sample:
        """A sample of 7 operations."""
        return Sample("", flops=7.0, seconds=0.5)


def build_task(
    number: int = 0,
    answer: str | None = "x",
    *,
    extractor: str = "plain",
    level: int = 1,
    details: Mapping[str, Any] | None = None,
) -> CascadeTask:
    """A task.

    Args:
        number: In its id and its prompt.
        answer: Canonical right answer.
        extractor: Registered name.
        level: Difficulty.
        details: What the extractor needs beside.
    """
    prompt = f"prompt {number}"
    return CascadeTask(f"t{number}", "fam", prompt, extractor, answer, level, details or {})


def build_evidence(
    answers: Sequence[str | None] = ("a", "a", "b"),
    *,
    texts: Sequence[str] | None = None,
    task: CascadeTask | None = None,
) -> ProbeEvidence:
    """What a policy is given.

    Args:
        answers: Canonical answer of each of N samples, at least one.
        texts: The samples; the answers if None.
        task: Without its right answer.
    """
    said = [answer or "" for answer in answers] if texts is None else texts
    known = build_task(answer=None) if task is None else task
    return ProbeEvidence(known, tuple(answers), tuple(said), compute_sigma(answers))


def build_judge_request(
    answers: Sequence[str | None] = ("a", "a", "b"),
    *,
    models: Sequence[CascadeModel] = (),
    seed: int = 7,
    options: Mapping[str, Any] | None = None,
    task: CascadeTask | None = None,
) -> JudgeRequest:
    """What a judge is given: candidates of the members "m0", "m1" and so on.

    Args:
        answers: Canonical answer of each candidate, at least one.
        models: Those the judge may ask.
        seed: Of whatever the judge draws.
        options: For a judge that is a plain function.
        task: Without its right answer.
    """
    candidates = tuple(
        Candidate(f"m{place}", answer, f" {answer}\n") for place, answer in enumerate(answers)
    )
    known = build_task(answer=None) if task is None else task
    return JudgeRequest(known, candidates, {one.name: one for one in models}, seed, options or {})
