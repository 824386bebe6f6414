"""A task of the study `acar` with everything that was said to it, ready to be decided."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molora_acar.judges import LikelihoodJudge, LikelihoodOptions, MajorityJudge
from molora_acar.policies import SigmaPolicy

from molora_fed.cascade.contract import (
    CascadeTask,
    EscalationPolicy,
    JudgeFunction,
    JudgeOptions,
    PolicyOptions,
    ProbeEvidence,
    Request,
    Sample,
)
from molora_fed.cascade.escalation import (
    Decision,
    Lineup,
    Rules,
    assess_probe,
    decide,
    hide_answer,
)
from molora_studies.acar.answers import SCORERS

__all__ = ["JUDGES", "SIGMA", "Case", "open_case"]

SIGMA = SigmaPolicy(PolicyOptions())

JUDGES: Mapping[str, JudgeFunction] = {
    "majority": MajorityJudge(JudgeOptions()),
    **{f"likelihood-{name}": LikelihoodJudge(LikelihoodOptions(model=name)) for name in SCORERS},
}


class _Recorded:
    """A model that gives back the scores in the table."""

    is_local = True
    fingerprint = "recorded"

    def __init__(self, name: str, scores: Mapping[str, Sequence[float]]) -> None:
        self.name = name
        self._scores = scores

    def sample(self, requests: Sequence[Request]) -> Sequence[Sample]:
        """Nothing was recorded but scores."""
        return [Sample("", failure="not in the table") for _ in requests]

    def score(self, prompt: str, answers: Sequence[str]) -> Sequence[float]:
        """The recorded log-likelihoods."""
        return [self._scores[answer][0] for answer in answers]

    def count_scoring(self, prompt: str, answers: Sequence[str]) -> Sample:
        """What they cost."""
        return Sample("", flops=sum(self._scores[answer][1] for answer in answers))


@dataclass(frozen=True, eq=False)
class Case:
    """A task with everything that was said to one prompt.

    Attributes:
        task: The task.
        probe: Samples of the probe.
        members: Sample of each member.
        answers: Canonical answer by text.
        models: Scorers.
    """

    task: CascadeTask
    probe: tuple[Sample, ...]
    members: Mapping[str, Sample]
    answers: Mapping[str, str | None]
    models: Mapping[str, Any]

    def rules(self, policy: EscalationPolicy, judge: str) -> Rules:
        """What decides this task; answers are those in the table."""
        return Rules(lambda _, text: self.answers[text], policy, JUDGES[judge])

    def decide(self, lineup: Lineup, judge: str, policy: EscalationPolicy = SIGMA) -> Decision:
        """The decision of a configuration."""
        probe = self.probe if lineup.probe else ()
        rules = self.rules(policy, judge)
        return decide(self.task, lineup, probe, self.members, rules, models=self.models)

    def find_evidence(self) -> ProbeEvidence:
        """What a policy may look at."""
        probing = assess_probe(self.task, self.probe, self.rules(SIGMA, "majority"))
        texts = tuple(sample.text for sample in self.probe)
        return ProbeEvidence(hide_answer(self.task), probing.answers, texts, probing.sigma)


def open_case(row: Mapping[str, Any], said: Mapping[str, Any]) -> Case:
    """A row of the table; `said` is the row itself, or its part with a retrieved example."""
    packed = [*said["probe"], *said["members"].values()]
    samples = [Sample(one[0], one[2], one[3], flops=one[4]) for one in packed]
    count = len(said["probe"])
    return Case(
        task=CascadeTask(**row["task"]),
        probe=tuple(samples[:count]),
        members=dict(zip(said["members"], samples[count:], strict=True)),
        answers={one[0]: one[1] for one in packed},
        models={name: _Recorded(name, scores) for name, scores in said["scores"].items()},
    )
