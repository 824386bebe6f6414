"""Forecasts from pilots of a tenth of the steps, scored against what fusing gave."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar

from pydantic import Field

from molora_fed.forecasting.matrices import leave_out_group
from molora_fed.forecasting.pilots import (
    MAX_SHARE,
    PUBLISHED_GROWTH,
    PilotRecord,
    build_past,
    extrapolate,
    fit_growth,
)
from molora_fed.forecasting.records import ask_predictors
from molora_fed.fusion.texts import measure_loss_matrix
from molora_fed.plugins import get_plugins
from molora_fed.types import Forecast, Outcome
from molora_studies.framework.contract import (
    Cell,
    Claim,
    Study,
    StudyOptions,
    Summary,
    TaskContext,
    Verdict,
)
from molora_studies.framework.fusions import open_fusion
from molora_studies.kalavai.conditions import Estimate, estimate
from molora_studies.kalavai.divergence_law import (
    ForecastOptions,
    build_condition_table,
    choose_conditions,
    describe_strict,
)
from molora_studies.kalavai.forecast_conditions import (
    find_families,
    leave_relatives_out,
    parse_matrix,
    plan_outcome,
    plan_pilots,
    read_outcome,
)
from molora_studies.kalavai.forecast_verdicts import (
    drop_idle,
    judge_errors,
    judge_intervals,
    name_families,
)
from molora_studies.kalavai.scoreboard import INTERCEPT, LAW, OURS, Board, build_board
from molora_studies.verdicts import Span, judge_above

__all__ = ["PilotOptions", "PilotStudy", "measure_pilots"]


def measure_pilots(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Losses of base and pilots on all contributors' calibration blocks; see `plan_pilots`."""
    fusion = open_fusion(settings, context.needs, context.folder)
    bank = fusion.build_calibration_bank(frozenset({"evidence"}), context.progress)
    matrix = measure_loss_matrix(bank, fusion.own_domain)
    return {
        "pilots": {
            "domains": list(matrix.domains),
            "base": dict(matrix.base),
            "specialists": {name: dict(losses) for name, losses in matrix.specialists.items()},
            "own_domain": dict(matrix.own_domain),
        },
        "steps": max(int(done.result["steps"]) for done in fusion.adapters),
    }


class PilotOptions(ForecastOptions):
    """Options.

    Attributes:
        share: Share of the planned steps that a pilot has.
        learning_rate: Peak rate of a pilot: a quarter of the long training's, chosen on validation
            text of three domains, because the whole rate leaves 60 steps no better than the base.
    """

    share: float = Field(default=MAX_SHARE, gt=0, le=MAX_SHARE)
    learning_rate: float = Field(default=5e-4, gt=0)


class PilotStudy(Study):
    """Two cells a condition and seed: its pilots, and its outcome."""

    Options: ClassVar[type[StudyOptions]] = PilotOptions
    title: ClassVar[str] = "Forecasts from pilots"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: PilotOptions) -> Sequence[Cell]:
        """Pilots and outcome of every condition and seed."""
        cells = []
        for condition in choose_conditions(options):
            for seed in options.seeds:
                name, labels = f"{condition.name}, seed {seed}", {"condition": condition.name}
                pilots = plan_pilots(condition, seed, options.share, options.learning_rate)
                outcome = plan_outcome(condition, seed)
                cells.append(Cell(f"{name}, pilots", {**labels, "seed": seed}, pilots))
                cells.append(Cell(f"{name}, outcome", {**labels, "seed": seed}, outcome))
        return cells

    @classmethod
    def summarise(cls, options: PilotOptions, results: Mapping[str, Mapping[str, Any]]) -> Summary:
        """Every predictor scored on extrapolated pilots, without the condition's own records."""
        records = _read_records(options, results)
        known = {id(record.outcome): record for record in records}
        outcomes = [record.outcome for record in records]
        board = _score(outcomes, known, lambda o: leave_out_group(o.case, outcomes))
        judged = drop_idle(outcomes)
        strict = _score(judged, known, lambda o: leave_relatives_out(o.case.group, judged))
        families = find_families(list(dict.fromkeys(o.case.group for o in judged)))
        growth = estimate(
            _measure_growths([r for r in records if r.outcome.case.group in families], families)
        )
        return Summary(
            findings={
                "growth": growth.to_json(),
                "scores": board.to_json(),
                "scores_without_relatives": strict.to_json(),
            },
            claims=[
                *(
                    judge_errors(
                        strict,
                        families,
                        name,
                        f"From pilots of {100 * options.share:.0f} % of the steps",
                    )
                    for name in OURS
                ),
                *judge_intervals(strict, families),
                Claim(
                    "Drops grow with the steps as in the paper",
                    f"log drop ~ steps^{PUBLISHED_GROWTH} from 50 to 2,000 steps",
                    f"steps^{growth.mean:.2f} {Span.of(growth).show(sign=False)}, "
                    f"{growth.count} means over conditions that share specialists",
                    _judge_growth(growth),
                    name_families(families),
                    "holds if the interval lies above 0 and contains the published exponent, "
                    "differs if above 0 without it",
                ),
            ],
            tables=[
                strict.build_table(f"Forecasts from pilots. {describe_strict(outcomes, judged)}"),
                board.build_table("Leaving one condition out alone; no verdict"),
                build_condition_table(outcomes, board),
            ],
            figures=[
                board.build_figure(
                    "forecasts",
                    "Forecast from pilots with its interval against the measured gain.",
                    (*OURS, LAW, INTERCEPT),
                )
            ],
            notes=[
                "A pilot is trained with its own short schedule; its own-domain drop is "
                "extrapolated with the exponent of the other conditions, so that intervals hold "
                "the error of extrapolation.",
                "Shares are at most the stated one: the steps of a pilot are rounded down.",
            ],
        )


def _judge_growth(growth: Estimate) -> Verdict:
    verdict = judge_above([Span.of(growth)])
    if verdict == "holds" and not (growth.low or 0) <= PUBLISHED_GROWTH <= (growth.high or 0):
        return "differs"
    return verdict


def _read_records(
    options: PilotOptions, results: Mapping[str, Mapping[str, Any]]
) -> list[PilotRecord]:
    records = []
    for condition in choose_conditions(options):
        for seed in options.seeds:
            name = f"{condition.name}, seed {seed}"
            pilots = results[f"{name}, pilots"]
            records.append(
                PilotRecord(
                    pilots=parse_matrix(pilots["pilots"]),
                    share=pilots["steps"] / condition.steps,
                    outcome=read_outcome(condition, results[f"{name}, outcome"]),
                )
            )
    return records


def _score(
    outcomes: Sequence[Outcome],
    known: Mapping[int, PilotRecord],
    choose: Callable[[Outcome], Sequence[Outcome]],
) -> Board:
    """Score forecasts from pilots; evidence is what other conditions' pilots promised."""
    plugins = get_plugins()
    evidence: dict[int, list[Outcome]] = {}
    extrapolated = []
    for outcome in outcomes:
        record = known[id(outcome)]
        records = [known[id(other)] for other in choose(outcome)]
        case = extrapolate(
            record.pilots, record.share, fit_growth(records), group=outcome.case.group
        )
        made = Outcome(case, outcome.gains)
        evidence[id(made)] = build_past(case, records)
        extrapolated.append(made)

    def ask(made: Outcome, others: Sequence[Outcome]) -> Mapping[str, Forecast | None]:
        return ask_predictors(made.case, others, plugins)

    return build_board(extrapolated, ask, lambda made: evidence[id(made)])


def _measure_growths(records: Sequence[PilotRecord], families: Mapping[str, str]) -> list[float]:
    """The exponent of each family, the mean over its conditions."""
    groups: dict[str, list[PilotRecord]] = {}
    for record in records:
        groups.setdefault(record.outcome.case.group, []).append(record)
    found: dict[str, list[float]] = {}
    for name, group in groups.items():
        found.setdefault(families[name], []).append(fit_growth(group))
    return [fmean(exponents) for exponents in found.values()]
