"""The escalation policy: how many members a task is worth."""

from molora_fed import EscalationPolicy, PolicyOptions, ProbeEvidence
from molora_fed.cascade.contract import Mode
from pydantic import Field


class SampleOptions(PolicyOptions):
    """Options, set where a cascade names the policy.

    Attributes:
        agreement: Largest disagreement sigma, in [0, 1], at which the probe's answer is kept.
    """

    agreement: float = Field(default=0.0, ge=0, le=1)


class SamplePolicy(EscalationPolicy):
    """Asks all members where the probe's samples disagree more than allowed, else none."""

    Options = SampleOptions

    def choose(self, evidence: ProbeEvidence) -> Mode:
        """Decide how many members are asked: the one method to fill in.

        The same evidence gives the same mode: decisions are replayed.

        Args:
            evidence: Canonical answers of the probe's N samples, None where one has none; their
                texts; and their disagreement `sigma`, (distinct - 1) / (N - 1), in [0, 1].

        Returns:
            "single_agent" asks nobody else, "arena_lite" two members, "full_arena" all three.

        See docs/hooks/escalation-policies.md, and docs/cascades.md.
        """
        return "single_agent" if evidence.sigma <= self.options.agreement else "full_arena"
