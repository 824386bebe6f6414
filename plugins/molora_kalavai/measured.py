"""What our own fusions gained: runs of kept studies with pilots and gains of the evidence router.

Groups are conditions that share no trained specialist, not even through others; seeds of a
condition are one group. `bench/measured_outcomes.py` makes the file from docs/results/kalavai.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from molora_fed.forecasting.matrices import parse_runs
from molora_fed.forecasting.pilots import PilotRecord
from molora_fed.types import Case, LossMatrix, Outcome, Reference

__all__ = ["MeasuredRun", "has_learnt", "list_measured_runs", "load_measured_runs"]


@dataclass(frozen=True)
class MeasuredRun:
    """One run of our own.

    Attributes:
        condition: Its name with the seed.
        outcome: Calibration losses, and the gains that were measured on held-out blocks.
        oracle: The domain oracle's gain on held-out blocks, percent by reference; known only
            afterwards, so that no forecast reads it.
        pilots: The same run with its pilots; None where none were trained.
    """

    condition: str
    outcome: Outcome
    oracle: Mapping[Reference, float]
    pilots: PilotRecord | None


@cache
def load_measured_runs() -> tuple[MeasuredRun, ...]:
    """All runs of measured.json, in its order.

    Source: measured.json beside this file, from docs/results/kalavai.
    """
    table = json.loads(files("molora_kalavai").joinpath("measured.json").read_text("utf-8"))
    return tuple(
        _read(run.condition, run.case, row)
        for run, row in zip(parse_runs(table), table["runs"], strict=True)
    )


def _read(condition: str, case: Case, row: Mapping[str, Any]) -> MeasuredRun:
    outcome, oracle = Outcome(case, row["gains"]), row["oracle"]
    pilots = row.get("pilots")
    if pilots is None:
        return MeasuredRun(condition, outcome, oracle, None)
    losses = case.losses
    matrix = LossMatrix(
        losses.domains,
        _name(losses.domains, pilots["base"]),
        {
            name: _name(losses.domains, values)
            for name, values in zip(losses.specialists, pilots["specialists"], strict=True)
        },
        losses.own_domain,
    )
    return MeasuredRun(condition, outcome, oracle, PilotRecord(matrix, pilots["share"], outcome))


def _name(domains: Sequence[str], losses: Sequence[float]) -> dict[str, float]:
    return dict(zip(domains, losses, strict=True))


def has_learnt(losses: LossMatrix) -> bool:
    """Whether any specialist is better than the base on any domain.

    Where none is, every gain is zero whatever the router does, so that the outcome is no evidence.
    """
    return any(
        loss < losses.base[domain]
        for row in losses.specialists.values()
        for domain, loss in row.items()
    )


@cache
def list_measured_runs() -> tuple[MeasuredRun, ...]:
    """The runs that are evidence: those in which something was learnt."""
    return tuple(run for run in load_measured_runs() if has_learnt(run.outcome.case.losses))
