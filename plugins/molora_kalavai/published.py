"""The 21 published runs (arXiv 2603.22755, result files): seven groups, a condition with its seeds.

One run's router collapsed; it is named, and no evidence for anything: the collapse guard refits
such a router.
"""

import json
from functools import cache
from importlib.resources import files

from molora_fed.forecasting.matrices import MatrixRun, parse_runs
from molora_fed.types import Outcome

__all__ = ["COLLAPSED", "is_collapsed", "list_published_outcomes", "load_published_runs"]

COLLAPSED = ("phase2-cross_lingual", 42)
"""Group and seed of the published run whose router sent one language to another's expert."""


@cache
def load_published_runs() -> tuple[MatrixRun, ...]:
    """The 21 published runs, in the order of the table.

    Source: published.json beside this file, from arXiv 2603.22755's result files.
    """
    table = json.loads(files("molora_kalavai").joinpath("published.json").read_text("utf-8"))
    return parse_runs(table)


def is_collapsed(run: MatrixRun) -> bool:
    """Whether it is the run whose router collapsed."""
    return (run.case.group, run.seed) == COLLAPSED


@cache
def list_published_outcomes() -> tuple[Outcome, ...]:
    """What became of the published runs, without the collapsed one."""
    outcomes = (run.outcome for run in load_published_runs() if not is_collapsed(run))
    return tuple(outcome for outcome in outcomes if outcome is not None)
