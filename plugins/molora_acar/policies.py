"""Escalation policies: how many members a task is worth."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from molora_acar.calibration_table import load_calibration
from molora_fed.cascade.contract import EscalationPolicy, Mode, PolicyOptions, ProbeEvidence

__all__ = ["AlwaysPolicy", "CalibratedPolicy", "SigmaPolicy"]


class SigmaPolicy(EscalationPolicy):
    """The paper's rule: agreement stays with the probe, partial agreement asks two, none all.

    For N = 3 sigma is 0, 1/2 or 1. For other N every value between 0 and 1 is partial agreement.

    Source: arXiv 2602.21231, routing by self-consistency variance; other N by own definition.
    """

    label: ClassVar[str] = "ACAR-U"
    label_with_retrieval: ClassVar[str] = "ACAR-UJ"

    def choose(self, evidence: ProbeEvidence) -> Mode:
        """single_agent at sigma 0, full_arena at 1, arena_lite between."""
        if evidence.sigma == 0:
            return "single_agent"
        return "full_arena" if evidence.sigma == 1 else "arena_lite"


class AlwaysPolicy(EscalationPolicy):
    """One mode for every task: what escalation is compared with."""

    class Options(PolicyOptions):
        """Options of the fixed mode.

        Attributes:
            mode: Of every task.
        """

        mode: Mode = "full_arena"

    def choose(self, evidence: ProbeEvidence) -> Mode:
        """The mode of the options."""
        return self.options.mode


class CalibratedPolicy(EscalationPolicy):
    """Takes the mode whose expected rightness, less its price, is highest.

    A fitted table (`molora_acar.calibration.fit_calibration`) says from the probe's agreement how
    probably each mode is right; the price of a unit of cost is the lowest at which the calibration
    tasks cost no more than the budget on average. Unlike sigma it may escalate what the probe
    agrees on, and keep what no member would get right either.

    Source: own derivation, see docs/extractors_judges.md.
    """

    class Options(PolicyOptions):
        """Options of the calibrated policy.

        Attributes:
            table: JSON file of a fitted table.
            budget: Mean cost of a task, in the table's unit, probe included; None for what the
                sigma policy costs on the tasks of the table.
        """

        table: Path
        budget: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.calibration = load_calibration(options.table)
        self.rate = self.calibration.rate(options.budget)

    def choose(self, evidence: ProbeEvidence) -> Mode:
        """The mode that is worth most at the budget; of equals, the one that asks fewest."""
        return self.calibration.choose(evidence, self.rate)
