"""The headline forecast: evidence that is what kept results say, groups left out, honest levels."""

import importlib.util
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_kalavai.headline import (
    fit_shift,
    oracle_gain,
    predict_measured_alone,
    predict_measured_specialist,
)
from molora_kalavai.measured import has_learnt, list_measured_runs, load_measured_runs

from molora_fed.forecasting.divergence import compute_gains, keep_own_losses
from molora_fed.forecasting.pilots import extrapolate
from molora_fed.types import Case, LossMatrix, Outcome

ROOT = Path(__file__).parents[2]
PREDICTORS = {"best_alone": predict_measured_alone, "best_specialist": predict_measured_specialist}
BOTH = pytest.mark.parametrize("reference", sorted(PREDICTORS))
LARGEST = "600 steps and 12 others"


def build_case(size=3, own=0.9, off=1.1, group=""):
    """Base losses 3, 4, ...; specialists at `own` of them on their domain, at `off` elsewhere."""
    domains = tuple("abcdefgh"[:size])
    base = {d: 3.0 + i for i, d in enumerate(domains)}
    rows = {d: {e: base[e] * (own if d == e else off) for e in domains} for d in domains}
    return Case(LossMatrix(domains, base, rows, {d: d for d in domains}), group)


def build_past(count, residual):
    past = []
    for number in range(count):
        case = build_case(own=0.9 - 0.01 * number, group=f"mine-{number}")
        gains = {r: oracle_gain(case.losses, r) + residual(number) for r in PREDICTORS}
        past.append(Outcome(case, gains))
    return past


def test_the_shipped_file_is_what_the_kept_results_give(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "bench" / "measured_outcomes.py"
    spec = importlib.util.spec_from_file_location("measured_outcomes", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, spec.name, module)
    spec.loader.exec_module(module)
    text = module.render(module.collect_runs(module.RESULTS))
    assert text == module.OUT.read_text(encoding="utf-8")


def test_groups_share_no_specialist_and_what_learnt_nothing_is_no_evidence():
    counted = Counter(run.outcome.case.group for run in load_measured_runs())
    assert len(counted) == 7 and counted[LARGEST] == 39 and sum(counted.values()) == 57
    left = {run.outcome.case.group for run in list_measured_runs()}
    assert set(counted) - left == {"50 steps"}
    for run in load_measured_runs():
        assert has_learnt(run.outcome.case.losses) == (run.outcome.case.group != "50 steps")
        assert run.pilots is None or run.pilots.share == pytest.approx(0.1)
    # Nothing of the demo: its specialists had more steps on these four domains.
    assert not any(
        "1400" in run.condition or "demo" in run.condition for run in list_measured_runs()
    )


@BOTH
def test_the_point_is_the_oracle_and_the_shift_of_the_groups(reference):
    case = build_case()
    said = PREDICTORS[reference](case, ())
    groups = {}
    for run in list_measured_runs():
        outcome = run.outcome
        residual = outcome.gains[reference] - oracle_gain(outcome.case.losses, reference)
        groups.setdefault(outcome.case.group, []).append(residual)
    means = sorted(sum(values) / len(values) for values in groups.values())
    shift = (means[2] + means[3]) / 2  # six groups
    assert said.point == pytest.approx(oracle_gain(case.losses, reference) + shift)
    assert said.reference == reference and said.level == 0.8
    assert "6 measured groups" in said.note
    # Six groups: 80 % is the largest residual, so it covers every one of them.
    largest = max(abs(value - shift) for values in groups.values() for value in values)
    assert said.high - said.point >= largest - 0.1
    assert said.low < said.point < said.high


@BOTH
def test_a_group_of_ours_is_forecast_without_itself(reference):
    for run in list_measured_runs()[::7]:
        case = run.outcome.case
        said = PREDICTORS[reference](case, ())
        assert "5 measured groups" in said.note and said.level == 0.8
        # By whatever name it comes, its losses give it away, and its whole group goes.
        renamed = PREDICTORS[reference](replace(case, group="charter"), ())
        assert "6 measured groups" not in renamed.note


@BOTH
def test_intervals_hold_on_our_own_fusions_as_the_page_says(reference):
    inside = Counter()
    for run in list_measured_runs():
        said = PREDICTORS[reference](run.outcome.case, ())
        inside[run.outcome.case.group] += said.low <= run.outcome.gains[reference] <= said.high
    assert sum(inside.values()) == 50
    assert inside[LARGEST] == 35 and all(n == 3 for g, n in inside.items() if g != LARGEST)


@BOTH
def test_own_outcomes_replace_ours_from_four_groups_on(reference):
    predict, case = PREDICTORS[reference], build_case(size=4)
    assert "6 measured and 3 own" in predict(case, build_past(3, lambda n: 0.1)).note
    said = predict(case, build_past(4, lambda n: 0.1 * n))
    assert "the 4 own groups" in said.note and said.level == 0.8
    assert said.point == pytest.approx(oracle_gain(case.losses, reference) + 0.15)


def test_where_the_best_alone_is_a_specialist_both_forecasts_are_one():
    case = build_case(off=0.99)
    alone, specialist = (PREDICTORS[r](case, ()) for r in sorted(PREDICTORS))
    assert (alone.point, alone.low, alone.high) == (
        specialist.point,
        specialist.low,
        specialist.high,
    )
    assert alone.reference == "best_alone"
    case = build_case()
    assert predict_measured_alone(case, ()).point != predict_measured_specialist(case, ()).point


@BOTH
def test_nothing_is_said_without_losses_off_domain_or_of_one_domain(reference):
    case = build_case()
    assert PREDICTORS[reference](replace(case, losses=keep_own_losses(case.losses)), ()) is None
    losses = replace(case.losses, own_domain=dict.fromkeys("abc", "a"))
    assert PREDICTORS[reference](replace(case, losses=losses), ()) is None


@BOTH
def test_without_any_group_there_is_a_point_and_no_interval(reference, monkeypatch):
    monkeypatch.setattr("molora_kalavai.headline.list_measured_runs", tuple)
    said = PREDICTORS[reference](build_case(), ())
    assert said.point == pytest.approx(oracle_gain(build_case().losses, reference))
    assert (said.low, said.high, said.level) == (None, None, None)
    assert said.verdict == "small"
    one = PREDICTORS[reference](build_case(), build_past(1, lambda n: 0.2))
    assert one.level == pytest.approx(0.5)


@BOTH
def test_pilots_give_an_interval_from_outcomes_of_pilots(reference):
    run = next(r for r in list_measured_runs() if r.pilots and r.outcome.case.group == LARGEST)
    pilots, share = run.pilots.pilots, run.pilots.share
    said = PREDICTORS[reference](extrapolate(pilots, share, 0.39, group=LARGEST), ())
    assert said.low < said.point < said.high and said.level == 0.8
    assert "5 measured groups" in said.note and "pilots" in said.note
    # The exponent that the caller extrapolated with plays no part.
    other = PREDICTORS[reference](extrapolate(pilots, share, 0.9, group=LARGEST), ())
    assert other == said


@BOTH
@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.integers(2, 6))
def test_the_interval_holds_the_point_and_the_order_of_domains_does_not_count(
    reference, data, size
):
    loss = st.floats(0.5, 8.0)
    domains = tuple("abcdef"[:size])
    base = {d: data.draw(loss) for d in domains}
    rows = {f"s{d}": {e: data.draw(loss) for e in domains} for d in domains}
    own = {f"s{d}": d for d in domains}
    case = Case(LossMatrix(domains, base, rows, own))
    said = PREDICTORS[reference](case, ())
    assert said.low <= said.point <= said.high
    assert 0 < said.level <= 0.8
    order = data.draw(st.permutations(domains))
    turned = LossMatrix(
        tuple(order),
        {d: base[d] for d in order},
        {f"s{d}": {e: rows[f"s{d}"][e] for e in order} for d in order},
        {f"s{d}": d for d in order},
    )
    again = PREDICTORS[reference](Case(turned), ())
    for first, second in (
        (said.point, again.point),
        (said.low, again.low),
        (said.high, again.high),
    ):
        assert math.isclose(first, second, abs_tol=1e-6)


@BOTH
def test_a_shift_needs_no_group(reference):
    case = build_case()
    gains = compute_gains(case.losses, {d: 0.9 * loss for d, loss in case.losses.base.items()})
    assert fit_shift(reference)([])(case) == pytest.approx(gains[reference])
