"""Models that say what a test wants, and a cascade of them."""

from collections.abc import Mapping
from typing import Any

from molora_fed.cascade.contract import (
    CascadeTask,
    EscalationPolicy,
    ProbeEvidence,
    Sample,
    Verdict,
)
from molora_fed.cascade.escalation import Lineup, Rules, find_majority
from molora_fed.cascade.running import Cascade, CascadeSettings, answer_task


class SaidModel:
    """Says a fixed text, or the next of several; counts what it is asked."""

    is_local = True

    def __init__(self, name, *texts, fails=False):
        self.name, self.fingerprint = name, f"fingerprint-{name}"
        self.texts, self.fails, self.asked = texts, fails, []

    def sample(self, requests):
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


class SigmaLike(EscalationPolicy):
    def choose(self, evidence: ProbeEvidence):
        assert evidence.task.answer is None
        if evidence.sigma == 0:
            return "single_agent"
        return "full_arena" if evidence.sigma == 1 else "arena_lite"


def extract(task, text):
    assert task.answer is None
    return text.strip() or None


def judge(request):
    assert request.task.answer is None
    at = find_majority([one.answer for one in request.candidates])
    return Verdict(0 if at is None else at, "most say so")


RULES = Rules(extract, SigmaLike(None), judge)
LINEUP = Lineup("probe", ("a", "b", "c"))


def make_task(number=0, answer: str | None = "x", **more):
    return CascadeTask(f"t{number}", "fam", f"prompt {number}", "plain", answer, **more)


def make_cascade(models: Mapping[str, Any], **more) -> Cascade:
    members = tuple(name for name in models if name in "abc")
    given = {
        "lineup": Lineup("probe" if "probe" in models else None, members),
        "models": models,
        "policy": SigmaLike(None),
        "policy_name": "sigma",
        "judge": judge,
        "judge_name": "majority",
        "extractors": {"plain": extract},
        "settings": CascadeSettings(max_new_tokens=8),
    }
    return Cascade(**{**given, **more})


class Kept:
    """A recorder that keeps records in memory."""

    def __init__(self):
        self.records = []

    def append(self, kind, body):
        self.records.append((kind, body))
        return len(self.records) - 1


def answer_all(tasks, cascade, recorder):
    """Answer tasks in order, and record each decision."""
    for task in tasks:
        recorder.append("decision", answer_task(task, cascade))
