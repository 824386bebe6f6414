"""A cascade of scripted models, by rules that look at no registry."""

from collections.abc import Mapping
from typing import Any

from molora_fed.cascade.contract import EscalationPolicy, ProbeEvidence, Verdict
from molora_fed.cascade.escalation import Lineup, Rules, find_majority
from molora_fed.cascade.running import Cascade, CascadeSettings, answer_task


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
