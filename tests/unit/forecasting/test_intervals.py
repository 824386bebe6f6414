import random

import pytest

from molora_fed.errors import ConfigError
from molora_fed.forecasting.intervals import compute_interval, fit_line, leave_one_out_residuals


def test_interval_is_as_wide_as_the_largest_residual_and_claims_no_more():
    interval = compute_interval(10.0, [1.0, -3.0, 2.0])
    assert (interval.low, interval.high, interval.level) == (7.0, 13.0, 0.75)


def test_level_holds_on_exchangeable_cases():
    rng = random.Random(7)
    hits = 0
    for _ in range(4000):
        *seen, new = (rng.gauss(0.5, 2.0) for _ in range(8))
        interval = compute_interval(0.0, seen)
        hits += interval.low <= new <= interval.high
    assert hits / 4000 == pytest.approx(7 / 8, abs=0.02)


def test_no_interval_without_residuals():
    with pytest.raises(ConfigError, match="at least one residual"):
        compute_interval(1.0, [])


def test_line_is_least_squares():
    line = fit_line([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert line(10.0) == pytest.approx(21.0)
    assert fit_line([0.0, 1.0, 2.0], [0.0, 3.0, 0.0])(5.0) == pytest.approx(1.0)


@pytest.mark.parametrize(("inputs", "outcomes"), [([1.0], [1.0]), ([1.0, 1.0], [1.0, 2.0])])
def test_an_undetermined_line_is_refused(inputs, outcomes):
    with pytest.raises(ConfigError, match="two or more different inputs"):
        fit_line(inputs, outcomes)


def test_leaving_one_out_uses_only_the_others():
    residuals = leave_one_out_residuals([0.0, 1.0, 2.0], [0.0, 1.0, 8.0], fit_line)
    assert residuals == pytest.approx([6.0, -3.0, 6.0])
