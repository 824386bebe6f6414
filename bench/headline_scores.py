"""Headline forecasts on our own fusions, each without its group, and on the demo as it was kept.

    python bench/headline_scores.py             # writes docs/results/headline.json and headline.md

Groups are those of measured.json: conditions that share no trained specialist. The method was
fixed, and committed, before the demo was scored.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from molora_kalavai.formulas import mean_divergence, mean_over_group
from molora_kalavai.headline import fit_shift, oracle_gain
from molora_kalavai.measured import MeasuredRun, list_measured_runs, load_measured_runs

from molora_fed.charter import FusionRules
from molora_fed.forecasting.intervals import compute_interval, fit_line
from molora_fed.forecasting.matrices import (
    Fit,
    compute_group_residuals,
    fit_and_forecast,
    group_outcomes,
)
from molora_fed.forecasting.pilots import build_past, extrapolate, fit_growth
from molora_fed.forecasting.records import ask_predictors
from molora_fed.forecasting.scoring import ScoredForecast, score_all
from molora_fed.plugins import get_plugins
from molora_fed.types import Case, Forecast, Outcome, Reference

OUT = Path("docs/results")
DEMO = OUT / "demo"
SEEDS = (42, 137, 2026)
ROUTER = "evidence"
HEADLINE = FusionRules().headline
REFERENCES: tuple[Reference, ...] = ("best_alone", "best_specialist")
# Seed 42's forecast by the full matrix as README.md prints it: its report was kept before there was
# that predictor, and those of the other seeds hold no loss of specialists off their domains.
README_ORACLE = {42: 9.60}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    found = {
        "groups": _count_groups(),
        "calibration": _score(_forecast_from_matrices),
        "pilots": _score(_forecast_from_pilots),
        "parts": _split_errors(),
        "demo": _score_demo(),
    }
    (OUT / "headline.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = render(found)
    (OUT / "headline.md").write_text(text, encoding="utf-8")
    print(text)


def _count_groups() -> dict[str, dict[str, int]]:
    counted: dict[str, dict[str, int]] = {}
    for run in load_measured_runs():
        row = counted.setdefault(run.outcome.case.group, {"runs": 0, "evidence": 0})
        row["runs"] += 1
        row["evidence"] += run in list_measured_runs()
    return counted


Said = Mapping[str, Forecast | None]


def _forecast_from_matrices(run: MeasuredRun, others: Sequence[MeasuredRun]) -> Said:
    """Every predictor and fit from the calibration matrix; own predictors rest on their file."""
    case, past = run.outcome.case, [other.outcome for other in others]
    plugins = get_plugins()
    said = ask_predictors(case, past, plugins)
    own = ask_predictors(case, (), plugins)
    said.update({name: own[name] for name in HEADLINE})
    for reference in REFERENCES:
        fits: dict[str, Fit] = {
            "line refitted": fit_gain_line(reference),
            "mean": fit_mean(reference),
            "oracle without a shift": fit_nothing(reference),
        }
        groups = group_outcomes(past)
        for name, fit in fits.items():
            point, i = fit_and_forecast(case, groups, fit, reference)
            said[f"{name} {reference}"] = Forecast(reference, point, i.low, i.high, i.level, name)
    return said


def _forecast_from_pilots(run: MeasuredRun, others: Sequence[MeasuredRun]) -> Said:
    if run.pilots is None:
        return {}
    records = [other.pilots for other in others if other.pilots is not None]
    growth = fit_growth(records)
    group = run.outcome.case.group
    case = extrapolate(run.pilots.pilots, run.pilots.share, growth, group=group)
    past, plugins = build_past(case, records), get_plugins()
    said = ask_predictors(case, past, plugins)
    own = ask_predictors(case, (), plugins)
    said.update({name: own[name] for name in HEADLINE})
    for reference in REFERENCES:
        point, i = fit_and_forecast(case, group_outcomes(past), fit_mean(reference), reference)
        said[f"mean {reference}"] = Forecast(reference, point, i.low, i.high, i.level, "mean")
    return said


def fit_gain_line(reference: Reference) -> Fit:
    """The law's form fitted anew to group means."""

    def fit(groups: Sequence[Sequence[Outcome]]) -> Callable[[Case], float]:
        line = fit_line(
            [mean_over_group(g, lambda o: mean_divergence(o.case)) for g in groups],
            [mean_over_group(g, lambda o: o.gains[reference]) for g in groups],
        )
        return lambda case: line(mean_divergence(case))

    return fit


def fit_nothing(reference: Reference) -> Fit:
    """The domain oracle's gain as it is."""
    return lambda groups: lambda case: oracle_gain(case.losses, reference)


def fit_mean(reference: Reference) -> Fit:
    """The mean gain of past groups, whatever the case."""

    def fit(groups: Sequence[Sequence[Outcome]]) -> Callable[[Case], float]:
        mean = fmean(mean_over_group(g, lambda o: o.gains[reference]) for g in groups)
        return lambda case: mean

    return fit


def _score(
    forecast: Callable[[MeasuredRun, Sequence[MeasuredRun]], Said],
) -> dict[str, dict[str, Any]]:
    scored: dict[tuple[str, str], list[ScoredForecast]] = defaultdict(list)
    runs = list_measured_runs()
    for run in runs:
        group = run.outcome.case.group
        others = [other for other in runs if other.outcome.case.group != group]
        for name, said in forecast(run, others).items():
            if said is not None:
                actual = run.outcome.gains[said.reference]
                scored[said.reference, name].append(
                    ScoredForecast(group, said.point, said.low, said.high, said.level, actual)
                )
    rows: dict[str, dict[str, Any]] = {}
    for (reference, name), found in scored.items():
        groups = defaultdict(list)
        for one in found:
            groups[one.group].append(one.interval_score)
        rows.setdefault(reference, {})[name.removesuffix(f" {reference}")] = {
            **score_all(found).to_json(),
            "interval_score_by_group": None
            if None in [s for g in groups.values() for s in g]
            else fmean(fmean(g) for g in groups.values()),
        }
    return rows


def _split_errors() -> dict[str, dict[str, float]]:
    """RMSE of the parts of what the shift forecasts, each leaving its group out, pp.

    Mixing: what the router gains beyond the domain oracle on the same held-out blocks. Sampling:
    the domain oracle's gain there minus that on calibration blocks. A predictor that measured the
    mixing on calibration blocks would at best be left with the error of the other.
    """
    found: dict[str, dict[str, float]] = {}
    for reference in REFERENCES:
        parts: dict[str, dict[str, list[float]]] = {}
        for run in list_measured_runs():
            gain, oracle = run.outcome.gains[reference], run.oracle[reference]
            promised = oracle_gain(run.outcome.case.losses, reference)
            for name, value in (
                ("mixing", gain - oracle),
                ("sampling", oracle - promised),
                ("both", gain - promised),
            ):
                groups = parts.setdefault(name, {})
                groups.setdefault(run.outcome.case.group, []).append(value)
        found[reference] = {name: _measure_spread(groups) for name, groups in parts.items()}
    return found


def _measure_spread(groups: Mapping[str, Sequence[float]]) -> float:
    errors = []
    for group, values in groups.items():
        shift = median(fmean(other) for name, other in groups.items() if name != group)
        errors += [value - shift for value in values]
    return math.sqrt(fmean(error * error for error in errors))


def _score_demo() -> list[dict[str, Any]]:
    """The headline on the demo's kept reports, as far as they hold what it reads.

    Against the best alone, which is the base there, the domain oracle's gain on calibration blocks
    is the upper end of the bracket that was recorded then: percent by which own experts beat it.
    """
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        report = json.loads((DEMO / f"seed-{seed}" / "report.json").read_text(encoding="utf-8"))
        oracles: dict[Reference, float | None] = {
            "best_alone": report["forecasts"]["own-loss-bracket"]["high"],
            "best_specialist": README_ORACLE.get(seed),
        }
        for reference, oracle in oracles.items():
            actual = report["gain_percent"][ROUTER][f"vs_{reference}"]
            row = {"seed": seed, "reference": reference, "actual": actual, "oracle": oracle}
            for label, groups in _choose_groups().items():
                said = None if oracle is None else _forecast_demo(oracle, groups, reference)
                inside = None if said is None else said["low"] <= actual <= said["high"]
                rows.append({**row, "evidence": label, "forecast": said, "inside": inside})
    return rows


def _choose_groups() -> dict[str, list[list[Outcome]]]:
    """All groups; and what the predictor keeps where it takes the demo for a condition of ours.

    The largest group has one of the demo's domains at fewer steps, and is left out whole if its
    losses are within tolerance of the demo's; the kept reports do not hold what decides it.
    """
    groups = group_outcomes(run.outcome for run in list_measured_runs())
    largest = max(groups, key=len)
    return {"all groups": groups, "without the largest": [g for g in groups if g is not largest]}


def _forecast_demo(
    oracle: float, groups: Sequence[Sequence[Outcome]], reference: Reference
) -> dict[str, float]:
    """The headline predictor's arithmetic for a case of which the oracle's gain alone was kept."""
    fit = fit_shift(reference)
    models = [fit([g for g in groups if g is not left]) for left in groups]
    some = groups[0][0].case
    shifts = [model(some) - oracle_gain(some.losses, reference) for model in (fit(groups), *models)]
    interval = compute_interval(
        oracle + shifts[0],
        compute_group_residuals(groups, models, reference),
        fits=[oracle + shift for shift in shifts[1:]],
    )
    return {"point": oracle + shifts[0], **vars(interval)}


_TITLES = {
    "calibration": "From the full matrix of calibration losses",
    "pilots": "From pilots of a tenth of the steps",
}


def render(found: Mapping[str, Any]) -> str:
    """The page."""
    groups = found["groups"]
    lines = [
        "# Headline forecasts, scored",
        "",
        "`python bench/headline_scores.py`: every run of our own that is evidence "
        "(`plugins/molora_kalavai/measured.json`), forecast without its group. Groups share no",
        "trained specialist, directly or through others:",
        "",
        "| group | runs | evidence |",
        "|---|---:|---:|",
        *(f"| {name} | {row['runs']} | {row['evidence']} |" for name, row in groups.items()),
        "",
        "Where no specialist learnt anything every gain is zero, so these runs are no evidence and "
        "are not scored. Percentage points; coverage over runs and over",
        "whole groups with 95 % Clopper-Pearson intervals. Interval scores: lower is better.",
    ]
    for stage, title in _TITLES.items():
        for reference in REFERENCES:
            lines += _tabulate(f"{title}, gain on the {reference.replace('_', ' ')}",
                               found[stage][reference])  # fmt: skip
    lines += [
        "",
        "## What the error is made of",
        "",
        "RMSE of a constant for each part, leaving the group out: the router's gain beyond the "
        "domain oracle on held-out blocks (mixing), the domain",
        "oracle's gain there minus that on calibration blocks (sampling), and their sum, which the "
        "headline forecasts.",
        "",
        "| reference | mixing | sampling | both |",
        "|---|---:|---:|---:|",
        *(
            f"| {reference} | {row['mixing']:.2f} | {row['sampling']:.2f} | {row['both']:.2f} |"
            for reference, row in found["parts"].items()
        ),
    ]
    lines += _tabulate_demo(found["demo"])
    return "\n".join(lines) + "\n"


def _tabulate(title: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    ordered = sorted(rows.items(), key=lambda item: item[1]["interval_score_by_group"] or 1e9)
    return [
        "",
        f"## {title}",
        "",
        "| predictor | RMSE | bias | inside, runs | inside, whole groups | level | mean width | "
        "interval score, runs | interval score, mean of groups |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {_show(row['rmse'])} | {_show(row['bias'], '+.2f')} "
            f"| {_cover(row['runs'])} | {_cover(row['by_group'])} "
            f"| {_show(row['level'], '.0%').replace('%', ' %')} "
            f"| {_show(row['width'])} | {_show(row['interval_score'])} "
            f"| {_show(row['interval_score_by_group'])} |"
            for name, row in ordered
        ),
    ]


def _show(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _cover(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    low, high = 100 * value["low"], 100 * value["high"]
    return f"{value['inside']} of {value['count']} [{low:.0f}, {high:.0f}] %"


def _tabulate_demo(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "",
        "## The demo, which is no evidence",
        "",
        "The kept reports are older than these predictors; `-`: they do not hold the losses.",
        "",
        "| seed | reference | evidence | oracle on calibration | forecast | interval | level "
        "| outcome | inside |",
        "|---|---|---|---:|---:|---|---:|---:|---|",
    ]
    for row in rows:
        said, start = row["forecast"], f"| {row['seed']} | {row['reference']} | {row['evidence']} "
        told = "| - | - | - | - "
        if said is not None:
            told = (
                f"| {row['oracle']:+.2f} | {said['point']:+.2f} "
                f"| {said['low']:+.2f} to {said['high']:+.2f} | {100 * said['level']:.0f} % "
            )
        inside = {True: "yes", False: "no", None: "-"}[row["inside"]]
        lines.append(f"{start}{told}| {row['actual']:+.2f} | {inside} |")
    return lines


if __name__ == "__main__":
    main()
