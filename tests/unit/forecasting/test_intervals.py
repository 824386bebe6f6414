import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.errors import ConfigError
from molora_fed.forecasting.intervals import compute_interval, compute_interval_score, fit_line

sizes = st.floats(min_value=-50, max_value=50)


def test_few_residuals_claim_no_more_than_they_show():
    interval = compute_interval(10.0, [1.0, -3.0, 2.0])
    assert (interval.low, interval.high, interval.level) == (7.0, 13.0, 0.75)


@pytest.mark.parametrize(("count", "largest_left_out"), [(4, 0), (8, 0), (9, 1), (14, 2)])
def test_four_groups_suffice_for_80_percent_and_more_leave_out_the_largest(count, largest_left_out):
    interval = compute_interval(0.0, [float(size) for size in range(1, count + 1)])
    assert (interval.high, interval.level) == (count - largest_left_out, 0.8)


@pytest.mark.parametrize(("count", "share"), [(4, 4 / 5), (7, 7 / 8), (9, 8 / 10)])
def test_level_holds_on_exchangeable_cases(count, share):
    rng = random.Random(7)
    hits = 0
    for _ in range(4000):
        *seen, new = (rng.gauss(0.5, 2.0) for _ in range(count + 1))
        interval = compute_interval(0.0, seen)
        hits += interval.low <= new <= interval.high
        assert share >= interval.level
    assert hits / 4000 == pytest.approx(share, abs=0.02)


def test_level_holds_where_the_point_was_fitted_to_the_residuals_cases():
    rng = random.Random(8)
    hits = 0
    for _ in range(2000):
        *seen, new = (rng.gauss(5.0, 2.0) for _ in range(5))
        fits = [(sum(seen) - one) / 3 for one in seen]
        residuals = [one - fit for one, fit in zip(seen, fits, strict=True)]
        interval = compute_interval(sum(seen) / 4, residuals, fits=fits)
        hits += interval.low <= new <= interval.high
    assert hits / 2000 >= 0.8


@given(point=sizes, residuals=st.lists(sizes, min_size=1, max_size=12), fits=st.lists(sizes))
def test_an_interval_holds_its_point_and_every_fit(point, residuals, fits):
    interval = compute_interval(point, residuals, fits=fits)
    assert all(interval.low <= value <= interval.high for value in (point, *fits))
    assert 0 < interval.level <= 0.8


def test_a_bracket_is_widened_by_what_lay_outside():
    interval = compute_interval((2.0, 5.0), [0.0, 1.5, 0.0, 0.0])
    assert (interval.low, interval.high, interval.level) == (0.5, 6.5, 0.8)


def test_no_interval_without_residuals():
    with pytest.raises(ConfigError, match="at least one residual"):
        compute_interval(1.0, [])


def test_interval_score_is_the_width_and_ten_times_the_miss_at_80_percent():
    assert compute_interval_score(1.0, 3.0, 0.8, 2.0) == pytest.approx(2.0)
    assert compute_interval_score(1.0, 3.0, 0.8, 3.5) == pytest.approx(7.0)
    assert compute_interval_score(1.0, 3.0, 0.8, 0.0) == pytest.approx(12.0)


def test_line_is_least_squares():
    line = fit_line([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert line(10.0) == pytest.approx(21.0)
    assert fit_line([0.0, 1.0, 2.0], [0.0, 3.0, 0.0])(5.0) == pytest.approx(1.0)


@pytest.mark.parametrize(("inputs", "outcomes"), [([1.0], [1.0]), ([1.0, 1.0], [1.0, 2.0])])
def test_an_undetermined_line_is_refused(inputs, outcomes):
    with pytest.raises(ConfigError, match="two or more different inputs"):
        fit_line(inputs, outcomes)
