"""Statistics of paired designs, against worked examples."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from molora_studies.statistics import (
    adjust_by_holm,
    aggregate_arithmetic,
    aggregate_balanced,
    compute_contrasts,
    compute_detectable,
    judge,
    measure_effect,
)

from molora_fed.errors import StudyError

# Student 1908, additional hours of sleep: the second drug less the first; R's `sleep`.
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]

# Montgomery, 2^3 design of the plasma etch rate (gap, flow, power), two replicates.
ETCH = {
    (False, False, False): (550, 604),
    (True, False, False): (669, 650),
    (False, True, False): (633, 601),
    (True, True, False): (642, 635),
    (False, False, True): (1037, 1052),
    (True, False, True): (749, 868),
    (False, True, True): (1075, 1063),
    (True, True, True): (729, 860),
}

finite = st.floats(-100, 100)


def test_the_paired_t_test_of_students_sleep_data():
    effect = measure_effect(SLEEP)
    assert effect.mean == pytest.approx(1.58)
    assert effect.t == pytest.approx(4.0621, abs=1e-4)
    assert effect.p == pytest.approx(0.002833, abs=1e-6)
    assert (effect.low, effect.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert effect.show(2, "h") == "+1.58 [+0.70, +2.46] h"


def test_the_papers_own_figures_follow_from_each_other():
    # Router rewrite: +0.0426, t = 12.86 at n = 3 gives p = 0.006; lifecycle: t = -4.46, p = 0.047.
    pattern = np.array([-1.0, 0.0, 1.0])
    for mean, t, p in ((0.0426, 12.86, 0.006), (-0.028, -4.46, 0.047)):
        effect = measure_effect(mean + pattern * abs(mean / t) * math.sqrt(3))
        assert effect.t == pytest.approx(t)
        assert effect.p == pytest.approx(p, abs=5e-4)


def test_the_detectable_effect_agrees_with_published_sample_sizes():
    # 80 % power for half a standard deviation takes 33.37 pairs (R's pwr.t.test, paired).
    assert compute_detectable(1.0, 34) < 0.5 < compute_detectable(1.0, 33)
    assert compute_detectable(1.0, 20) == pytest.approx(0.6604, abs=1e-4)  # the same, 20 pairs
    assert compute_detectable(2.0, 34) == pytest.approx(2 * compute_detectable(1.0, 34))


def test_the_detectable_effect_is_found_four_times_in_five():
    size, count = compute_detectable(1.0, 5), 5
    random = np.random.default_rng(3)
    draws = random.normal(size, 1.0, (4000, count))
    t = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(count))
    assert np.mean(np.abs(t) > 2.776445) == pytest.approx(0.8, abs=0.02)


def test_two_one_sided_tests_agree_with_the_interval_at_ninety_percent():
    # Mean 1.58, error 0.38896: the upper end at 90 % is 1.58 + 1.833113 * 0.38896 = 2.29300.
    assert measure_effect(SLEEP, margin=2.2931).is_null
    assert not measure_effect(SLEEP, margin=2.2929).is_null
    assert measure_effect(SLEEP, margin=2.29300).equivalence_p == pytest.approx(0.05, abs=1e-4)


def test_differences_without_spread_are_known_as_they_are():
    nothing, much = measure_effect([0.0, 0.0, 0.0]), measure_effect([0.1, 0.1])
    assert (nothing.p, nothing.t, nothing.is_null, nothing.detectable) == (1.0, None, True, 0.0)
    assert (much.p, much.is_null, much.low) == (0.0, False, 0.1)


def test_holms_worked_example():
    assert adjust_by_holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert adjust_by_holm({}) == {}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_value_and_never_reorders(p_values):
    adjusted = adjust_by_holm(p_values)
    assert list(adjusted) == list(p_values)
    assert all(p_values[name] <= adjusted[name] <= 1 for name in p_values)
    ordered = sorted(p_values, key=p_values.__getitem__)
    assert [adjusted[name] for name in ordered] == sorted(adjusted.values())


def test_the_contrasts_of_montgomerys_etch_experiment():
    found = compute_contrasts(("A", "B", "C"), ETCH)
    assert {name: values.mean() for name, values in found.items()} == pytest.approx(
        {
            "A": -101.625,
            "B": 7.375,
            "C": 306.125,
            "A x B": -24.875,
            "A x C": -153.625,
            "B x C": -2.125,
            "A x B x C": 5.625,
        }
    )


@given(st.lists(finite, min_size=4, max_size=4))
def test_effects_give_the_cells_back(values):
    cells = dict(zip([(a, b) for a in (False, True) for b in (False, True)], values, strict=True))
    found = compute_contrasts(("a", "b"), {cell: [value] for cell, value in cells.items()})
    for (a, b), value in cells.items():
        signs = {"a": 2 * a - 1, "b": 2 * b - 1, "a x b": (2 * a - 1) * (2 * b - 1)}
        rebuilt = np.mean(values) + sum(signs[n] * found[n][0] for n in found) / 2
        assert rebuilt == pytest.approx(value, abs=1e-9)


def test_the_two_aggregators_can_disagree():
    # The second is better on the mean of the losses, and worse on the mean of perplexities.
    even, uneven = {"a": 3.0, "b": 3.0}, {"a": 1.9, "b": 3.9}
    assert aggregate_balanced(uneven) < aggregate_balanced(even)
    assert aggregate_arithmetic(uneven) > aggregate_arithmetic(even)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6))
def test_the_arithmetic_aggregator_is_never_below_the_balanced(values):
    losses = {str(index): value for index, value in enumerate(values)}
    assert aggregate_arithmetic(losses) >= aggregate_balanced(losses) - 1e-12


def test_verdicts():
    clear = measure_effect([0.040, 0.043, 0.045])
    null = measure_effect([0.0005, -0.0004, 0.0001])
    loose = measure_effect([0.05, -0.04, 0.01])
    assert judge(clear, 0.0426) == "holds"
    assert judge(clear, 0.2) == "differs"
    assert judge(clear, -0.028) == "does not hold"
    assert judge(clear, None) == "does not hold"
    assert judge(clear, 0.0426, p=0.2) == "not decided"
    assert judge(null, None) == "holds"
    assert judge(null, 0.0426) == "does not hold"
    assert judge(loose, None) == "not decided"
    assert judge(loose, 0.0426) == "not decided"


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")]])
def test_too_few_seeds_are_refused(values):
    with pytest.raises(StudyError, match="two seeds at least"):
        measure_effect(values)


def test_a_missing_cell_is_refused():
    with pytest.raises(StudyError, match="all 4 cells"):
        compute_contrasts(("a", "b"), {(False, False): [1.0]})
