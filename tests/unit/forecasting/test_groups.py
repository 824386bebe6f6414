import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from molora_kalavai.formulas import mean_over_group

from molora_fed.forecasting.matrices import (
    fit_and_forecast,
    group_outcomes,
    is_same_condition,
    leave_out_group,
)
from molora_fed.types import Case, LossMatrix, Outcome


def build_case(shift=0.0, group="", names=("law", "art")):
    law, art = names
    losses = LossMatrix(
        (law, art),
        {law: 4.0, art: 2.0},
        {"ann": {law: 3.0 + shift, art: 2.5}, "bob": {law: 4.5, art: 1.0 + shift / 3}},
        {"ann": law, "bob": art},
    )
    return Case(losses, group)


def build_outcome(gain, group="", shift=0.0):
    return Outcome(build_case(shift, group), {"best_alone": gain, "best_specialist": gain})


def fit_mean(groups):
    mean = sum(mean_over_group(g, lambda o: o.gains["best_specialist"]) for g in groups)
    return lambda case: mean / len(groups)


def test_a_named_group_is_left_out_by_name_and_others_stay():
    past = [build_outcome(1.0, "a"), build_outcome(2.0, "b"), build_outcome(3.0, "a")]
    assert leave_out_group(build_case(0.0, "a"), past) == [past[1]]


def test_without_names_the_losses_decide():
    past = [build_outcome(1.0, "a", shift=0.01), build_outcome(2.0, "b", shift=0.4)]
    assert leave_out_group(build_case(0.0), past) == [past[1]]
    nameless = [replace(o, case=replace(o.case, group="")) for o in past]
    assert leave_out_group(build_case(0.0, "a"), nameless) == [nameless[1]]
    assert leave_out_group(build_case(0.0, "c"), past) == past


def test_names_and_order_of_domains_do_not_hide_a_condition():
    first, second = build_case().losses, build_case(names=("sea", "sky")).losses
    turned = replace(second, domains=second.domains[::-1])
    assert is_same_condition(first, turned)
    assert not is_same_condition(first, build_case(0.2).losses)


def test_seeds_of_a_group_are_one_group_and_unnamed_outcomes_each_their_own():
    past = [build_outcome(float(i), group) for i, group in enumerate(["b", "", "a", "b", ""])]
    assert [[o.gains["best_alone"] for o in group] for group in group_outcomes(past)] == [
        [2.0], [0.0, 3.0], [1.0], [4.0],
    ]  # fmt: skip


def test_each_group_is_left_out_whole_and_its_worst_run_counts():
    groups = group_outcomes(
        build_outcome(gain, name)
        for name, gain in [("a", 1.0), ("a", 3.0), ("b", 4.0), ("c", 6.0), ("d", 4.0)]
    )
    point, interval = fit_and_forecast(build_case(), groups, fit_mean, "best_specialist")
    assert point == 4.0
    # Without a: 14/3, worst run 1; the fits reach from 10/3 (without c) to 14/3 (without a).
    assert interval.low == pytest.approx(10 / 3 - 11 / 3)
    assert interval.high == pytest.approx(14 / 3 + 11 / 3)
    assert interval.level == 0.8


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=8), st.randoms())
def test_the_order_of_outcomes_does_not_matter(gains, rng: random.Random):
    past = [build_outcome(gain, f"g{i // 2}") for i, gain in enumerate(gains)]
    if len({outcome.case.group for outcome in past}) < 2:
        return
    shuffled = past.copy()
    rng.shuffle(shuffled)
    first, second = (
        fit_and_forecast(build_case(), group_outcomes(p), fit_mean, "best_specialist")
        for p in (past, shuffled)
    )
    assert first[0] == pytest.approx(second[0], abs=1e-9)
    assert first[1].low == pytest.approx(second[1].low, abs=1e-9)
