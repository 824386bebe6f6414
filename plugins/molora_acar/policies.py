"""Escalation policies: how many members a task is worth."""

from molora_fed.cascade.contract import EscalationPolicy, Mode, ProbeEvidence

__all__ = ["SigmaPolicy"]


class SigmaPolicy(EscalationPolicy):
    """The paper's rule: agreement stays with the probe, partial agreement asks two, none all.

    For N = 3 sigma is 0, 1/2 or 1. For other N every value between 0 and 1 is partial agreement.

    Source: arXiv 2602.21231, routing by self-consistency variance; other N by own definition.
    """

    def choose(self, evidence: ProbeEvidence) -> Mode:
        """single_agent at sigma 0, full_arena at 1, arena_lite between."""
        if evidence.sigma == 0:
            return "single_agent"
        return "full_arena" if evidence.sigma == 1 else "arena_lite"
