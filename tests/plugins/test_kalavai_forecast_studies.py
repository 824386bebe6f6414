"""The studies of forecasts: planned without work, scored without a forecast's own group."""

import pytest
from molora_kalavai.published import list_published_outcomes
from molora_kalavai.studies.published import PublishedStudy, forecast_published
from molora_kalavai.studies.scoreboard import build_board, fit_line_by_group

from molora_fed.files import canonical_json
from molora_fed.studies.contract import StudyOptions
from molora_fed.types import Forecast


@pytest.fixture(scope="module")
def published():
    return forecast_published({}, None)


def test_the_published_runs_are_scored_as_the_page_says(published):
    options = StudyOptions()
    [cell] = PublishedStudy.plan(options)
    assert cell.task.action.endswith("published:forecast_published")
    summary = PublishedStudy.summarise(options, {cell.name: published})
    scores = summary.findings["scores"]
    assert scores["fitted"]["rmse"] <= 0.9
    assert round(scores["kalavai-law"]["rmse"], 1) == 3.1
    assert round(scores["own-loss"]["rmse"], 1) == 1.9
    ours = scores["fitted"]["interval_score"]
    assert ours < scores["kalavai-law"]["interval_score"]
    assert ours < scores["intercept only"]["interval_score"]
    assert scores["fitted"]["count"] == 20 and scores["fitted"]["groups"] == 7
    assert summary.findings["scores_with_the_collapsed_run"]["fitted"]["count"] == 21
    assert [claim.verdict for claim in summary.claims] == ["differs", "holds", "holds"]


def test_the_result_is_the_same_json_each_time(published):
    assert canonical_json(published) == canonical_json(forecast_published({}, None))


def test_baselines_never_see_the_group_they_forecast():
    outcomes = list_published_outcomes()
    claim = Forecast("best_specialist", 1.0, 0.0, 2.0, 0.8, "")
    board = build_board(outcomes, lambda outcome: {"one": claim, "none": None})
    assert set(board.forecasts) == {"one", "intercept only", "line refitted"}
    gains = {o.case.group: [] for o in outcomes}
    for outcome in outcomes:
        gains[outcome.case.group].append(outcome.gains["best_specialist"])
    means = {group: sum(values) / len(values) for group, values in gains.items()}
    for forecast in board.forecasts["intercept only"]:
        others = [mean for group, mean in means.items() if group != forecast.group]
        assert forecast.point == pytest.approx(sum(others) / 6)


def test_the_line_over_published_groups():
    line = fit_line_by_group(list_published_outcomes())
    assert line.groups == 7
    assert 0 < line.q_squared < line.r_squared < 1
