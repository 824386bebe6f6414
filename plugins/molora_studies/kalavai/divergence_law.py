"""Does divergence predict the gain? The law, and what does better, on conditions of our own."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar

from molora_kalavai.formulas import mean_divergence, mean_over_group, own_loss_gain
from pydantic import Field, field_validator

from molora_fed.forecasting.matrices import group_outcomes
from molora_fed.forecasting.records import ask_predictors
from molora_fed.plugins import get_plugins
from molora_fed.types import Outcome, Reference
from molora_studies.framework.contract import (
    Cell,
    Claim,
    Figure,
    Study,
    StudyOptions,
    Summary,
    Table,
)
from molora_studies.kalavai.forecast_conditions import (
    CONDITIONS,
    Condition,
    find_families,
    leave_relatives_out,
    plan_outcome,
    read_outcome,
)
from molora_studies.kalavai.forecast_verdicts import (
    drop_idle,
    judge_intervals,
    merge_families,
    name_families,
)
from molora_studies.kalavai.scoreboard import (
    INTERCEPT,
    LAW,
    OURS,
    Board,
    GroupFit,
    build_board,
    fit_line_by_group,
)
from molora_studies.verdicts import Span, judge_above

__all__ = ["DivergenceLawStudy", "ForecastOptions", "choose_conditions", "describe_strict"]

_PUBLISHED = (0.82, -2.72, 0.856)  # slope, offset, R2: arXiv 2603.22755, abstract


class ForecastOptions(StudyOptions):
    """Options.

    Attributes:
        conditions: Names of conditions, each a group.
    """

    conditions: tuple[str, ...] = Field(
        default=tuple(condition.name for condition in CONDITIONS), min_length=6
    )

    @field_validator("conditions")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = [condition.name for condition in CONDITIONS]
        unknown = [name for name in names if name not in known]
        if unknown or len(set(names)) != len(names):
            raise ValueError(f"different ones of {', '.join(known)}")
        return names


def choose_conditions(options: ForecastOptions) -> list[Condition]:
    """The conditions of a study, in their usual order."""
    return [condition for condition in CONDITIONS if condition.name in options.conditions]


class DivergenceLawStudy(Study):
    """Every condition at every seed; forecasts from calibration losses of the other conditions."""

    Options: ClassVar[type[StudyOptions]] = ForecastOptions
    title: ClassVar[str] = "Divergence and gain on our own conditions"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: ForecastOptions) -> Sequence[Cell]:
        """A cell a condition and seed."""
        return [
            Cell(
                f"{condition.name}, seed {seed}",
                {"condition": condition.name, "seed": seed},
                plan_outcome(condition, seed),
            )
            for condition in choose_conditions(options)
            for seed in options.seeds
        ]

    @classmethod
    def summarise(
        cls, options: ForecastOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """The law refitted, and every predictor scored without its own condition."""
        outcomes = [
            read_outcome(condition, results[f"{condition.name}, seed {seed}"])
            for condition in choose_conditions(options)
            for seed in options.seeds
        ]
        plugins = get_plugins()
        board = build_board(outcomes, lambda o, others: ask_predictors(o.case, others, plugins))
        judged = drop_idle(outcomes)
        strict = build_board(
            judged,
            lambda o, others: ask_predictors(o.case, others, plugins),
            lambda o: leave_relatives_out(o.case.group, judged),
        )
        families = find_families(list(dict.fromkeys(o.case.group for o in judged)))
        line = fit_line_by_group(outcomes)
        apart = fit_line_by_group(merge_families(judged, families))
        alone = fit_line_by_group(outcomes, "best_alone")
        runs = f"{len(outcomes)} runs in {line.groups} conditions"
        return Summary(
            findings={
                "line": line.to_json(),
                "line_over_families": apart.to_json(),
                "families": families,
                "line_on_best_alone": alone.to_json(),
                "scores": board.to_json(),
                "scores_without_relatives": strict.to_json(),
            },
            claims=[
                _judge_line(apart, strict, families),
                *judge_intervals(strict, families),
            ],
            tables=[
                strict.build_table(describe_strict(outcomes, judged)),
                board.build_table(f"Leaving one condition out alone ({runs}); no verdict"),
                build_condition_table(outcomes, board),
            ],
            figures=[
                Figure(
                    "divergence",
                    "Gain on the best specialist by mean divergence, a point a condition; the law "
                    "as published, and refitted here.",
                    lambda figure: _draw(figure, outcomes, line),
                ),
                board.build_figure(
                    "forecasts",
                    f"Forecast with its interval against the measured gain, {runs}.",
                    (*OURS, LAW, INTERCEPT),
                ),
            ],
            notes=[
                f"Against the best specialist: {line.show()}.",
                f"Against the best alone: {alone.show()}.",
                "Forecasts read calibration blocks, gains are of held-out blocks and the evidence "
                "router; the published runs are no evidence here, four own groups suffice.",
                "All predictors were fixed before any condition was forecast. At first only "
                "`fitted` was to be judged; `forgetting` was added when five conditions were in.",
                "Conditions that differ in their domains only share specialists: verdicts are on "
                "the first table, which leaves these out as well, and count such conditions once.",
                "All conditions share domains and, but for their ages, one base.",
            ],
        )


def _judge_line(line: GroupFit, board: Board, families: Mapping[str, str]) -> Claim:
    """The law's line over families: slope, and what it forecasts of a family left out."""
    slope, offset, r_squared = _PUBLISHED
    rmse = board.scores[LAW].rmse or 0.0
    agrees = line.slope_low <= slope <= line.slope_high
    verdict = judge_above([Span(line.slope_low, line.slope_high)])
    if verdict == "holds" and not (agrees and line.q_squared >= 0.5):
        verdict = "differs"
    return Claim(
        "The gain on the best specialist rises linearly with mean divergence",
        f"gain = {slope} div {offset}, R2 {r_squared} (n = 6)",
        f"{line.show()}; the published line misses by {rmse:.1f} pp (RMSE)",
        verdict,
        name_families(families),
        "holds if the slope's interval contains the published slope and is above 0, and half of "
        "the variance is forecast leaving one out; conditions that share specialists are one point",
    )


def describe_strict(outcomes: Sequence[Outcome], judged: Sequence[Outcome]) -> str:
    """Title of the table that verdicts rest on."""
    kept = {outcome.case.group for outcome in judged}
    idle = sorted({outcome.case.group for outcome in outcomes} - kept)
    left = f", nor {', '.join(idle)}, which learnt nothing" if idle else ""
    return f"Also without every condition that shares a specialist{left} (judged)"


def build_condition_table(outcomes: Sequence[Outcome], board: Board) -> Table:
    """What each condition gained, and what was forecast."""
    names = (*OURS, "own-loss", LAW)
    rows = []
    for group in group_outcomes(outcomes):
        name = group[0].case.group
        errors = [
            f"{fmean(f.actual - (f.point or 0.0) for f in found):+.2f}"
            + ("" if all(f.is_inside for f in found) else " (outside)")
            for found in (
                [f for f in board.forecasts[predictor] if f.group == name] for predictor in names
            )
        ]
        rows.append(
            (
                name,
                f"{mean_over_group(group, lambda o: mean_divergence(o.case)):.2f} %",
                f"{mean_over_group(group, lambda o: o.gains['best_alone']):+.2f} %",
                f"{mean_over_group(group, lambda o: o.gains['best_specialist']):+.2f} %",
                f"{mean_over_group(group, lambda o: own_loss_gain(o.case)):+.2f} %",
                *errors,
            )
        )
    return Table(
        "By condition, means over seeds; last columns: gain on the best specialist minus forecast",
        (
            "condition", "mean divergence", "gain on best alone", "gain on best specialist",
            "own-loss formula", *(f"error of {name}, pp" for name in names),
        ),
        rows,
    )  # fmt: skip


def _draw(figure: Any, outcomes: Sequence[Outcome], line: GroupFit) -> None:
    axes = figure.subplots()
    groups = group_outcomes(outcomes)
    x = [mean_over_group(group, lambda o: mean_divergence(o.case)) for group in groups]
    references: tuple[Reference, ...] = ("best_specialist", "best_alone")
    for reference in references:
        gains = [fmean(o.gains[reference] for o in group) for group in groups]
        axes.plot(x, gains, "o", label=f"on the {reference.replace('_', ' ')}")
    ends = [min(x), max(x)]
    slope, offset, _ = _PUBLISHED
    axes.plot(ends, [slope * end + offset for end in ends], "--", label="published law")
    axes.plot(ends, [line.slope * end + line.offset for end in ends], label="refitted here")
    axes.set_xlabel("mean divergence, %")
    axes.set_ylabel("gain, %")
    axes.legend()
