import pytest

from molora_fed.forecasting.scoring import ScoredForecast, compute_coverage, score_all


def build(group, point, actual, half=1.0):
    return ScoredForecast(group, point, point - half, point + half, 0.8, actual)


def test_scores_are_over_runs_and_coverage_over_groups_too():
    score = score_all([build("a", 5.0, 5.5), build("a", 5.0, 7.0), build("b", 3.0, 2.5)])
    assert (score.count, score.groups) == (3, 2)
    assert score.rmse == pytest.approx(((0.25 + 4 + 0.25) / 3) ** 0.5)
    assert score.mae == pytest.approx(1.0)
    assert score.bias == pytest.approx(2 / 3)
    assert (score.runs.inside, score.runs.count) == (2, 3)
    assert (score.by_group.inside, score.by_group.count) == (1, 2)
    assert score.interval_score == pytest.approx((2 + 12 + 2) / 3)
    assert score.width == pytest.approx(2.0)


def test_coverage_is_clopper_pearson():
    coverage = compute_coverage([True] * 6 + [False])
    assert (coverage.low, coverage.high) == (
        pytest.approx(0.4213, abs=1e-4),
        pytest.approx(0.9964, abs=1e-4),
    )
    assert compute_coverage([]) is None


def test_points_without_intervals_and_intervals_without_points():
    score = score_all([ScoredForecast("a", 5.0, None, None, None, 6.0)])
    assert score.mae == pytest.approx(1.0)
    assert score.runs is None and score.interval_score is None and score.width is None
    score = score_all([ScoredForecast("a", None, 1.0, 2.0, 0.8, 3.0)])
    assert score.rmse is None
    assert score.interval_score == pytest.approx(11.0)
