import json
import math
from importlib.resources import files
from pathlib import Path
from statistics import mean

import pytest
from molora_kalavai.predictors import (
    BRACKET_LEVEL,
    COLLAPSED,
    group_means,
    load_published_runs,
    predict_kalavai_law,
    predict_own_loss,
    predict_own_loss_bracket,
)

from molora_fed.forecasting.divergence import compute_divergences, compute_gains
from molora_fed.forecasting.intervals import fit_line, leave_one_out_residuals
from molora_fed.plugins import load_plugins
from molora_fed.types import LossMatrix


def compute_rmse(predict, *, leave_out=None):
    """Root mean square of gain minus forecast over the published runs, percentage points."""
    squares = [
        (compute_gains(run.losses, run.fused)[forecast.reference] - forecast.point) ** 2
        for run in load_published_runs()
        if (run.group, run.seed) != leave_out
        for forecast in [predict(run.losses)]
    ]
    return math.sqrt(sum(squares) / len(squares))


def compute_oracle_gain(run):
    oracle = {
        d: min(losses[d] for losses in run.losses.specialists.values()) for d in run.losses.domains
    }
    return compute_gains(run.losses, oracle)["best_alone"]


def test_the_table_is_packaged_with_its_source():
    table = json.loads(files("molora_kalavai").joinpath("published.json").read_text("utf-8"))
    assert table["source"] == "arXiv 2603.22755, published result files"
    assert len(load_published_runs()) == 21
    assert len(group_means(lambda run: 0.0)) == 7


@pytest.mark.parametrize(
    ("predict", "all_runs", "without_collapse"),
    [(predict_kalavai_law, 4.0, 3.1), (predict_own_loss, 3.3, 1.9)],
)
def test_published_errors_are_reproduced(predict, all_runs, without_collapse):
    assert round(compute_rmse(predict), 1) == all_runs
    assert round(compute_rmse(predict, leave_out=COLLAPSED), 1) == without_collapse


def test_the_law_reproduces_the_published_constants():
    losses = LossMatrix(
        ("a", "b"),
        {"a": 1.0, "b": 1.0},
        {"a": {"a": 0.9, "b": 1.0}, "b": {"a": 1.0, "b": 0.7}},
        {"a": "a", "b": "b"},
    )
    forecast = predict_kalavai_law(losses)
    assert forecast.reference == "best_specialist"
    assert forecast.point == pytest.approx(0.82 * 20 - 2.72)


def test_own_loss_is_exact_where_specialists_forget_nothing():
    losses = LossMatrix(
        ("a", "b"),
        {"a": 3.0, "b": 5.0},
        {"x": {"a": 2.0, "b": 5.0}, "y": {"a": 3.0, "b": 4.5}, "z": {"a": 2.9, "b": 5.0}},
        {"x": "a", "y": "b", "z": "a"},
    )
    oracle = {"a": 2.0, "b": 4.5}
    assert predict_own_loss(losses).point == pytest.approx(
        compute_gains(losses, oracle)["best_specialist"]
    )


def test_bracket_level_is_the_share_counted_on_the_published_runs():
    inside, groups = 0, {}
    for run in load_published_runs():
        forecast = predict_own_loss_bracket(run.losses)
        hit = forecast.low <= compute_oracle_gain(run) <= forecast.high
        inside += hit
        groups.setdefault(run.group, []).append(hit)
    assert (inside, BRACKET_LEVEL) == (18, 18 / 21)
    assert sum(all(hits) for hits in groups.values()) == 6
    assert sum(any(hits) for hits in groups.values()) == 6


def test_bracket_held_the_measured_gain_on_all_but_the_collapsed_run():
    missed = [
        (run.group, run.seed)
        for run in load_published_runs()
        for forecast in [predict_own_loss_bracket(run.losses)]
        if not forecast.low <= compute_gains(run.losses, run.fused)["best_alone"] <= forecast.high
    ]
    assert missed == [COLLAPSED]


def test_a_levels_interval_covers_the_groups_it_came_from():
    for predict in (predict_kalavai_law, predict_own_loss):
        low = group_means(lambda run, predict=predict: predict(run.losses).low)
        high = group_means(lambda run, predict=predict: predict(run.losses).high)
        gain = group_means(lambda run: compute_gains(run.losses, run.fused)["best_specialist"])
        covered = sum(a <= g + 1e-9 <= b + 2e-9 for a, g, b in zip(low, gain, high, strict=True))
        assert predict(load_published_runs()[0].losses).level == 7 / 8
        assert covered >= 6


def test_specialists_of_one_domain_cannot_be_forecast():
    losses = LossMatrix(
        ("a",), {"a": 3.0}, {"x": {"a": 2.0}, "y": {"a": 1.0}}, {"x": "a", "y": "a"}
    )
    for name in ("kalavai-law", "own-loss", "own-loss-bracket"):
        assert load_plugins().gain_predictors.resolve(name)(losses) is None


def test_worse_specialists_give_an_ordered_bracket():
    losses = LossMatrix(
        ("a", "b"),
        {"a": 1.0, "b": 1.0},
        {"x": {"a": 1.2, "b": 1.5}, "y": {"a": 1.5, "b": 1.3}},
        {"x": "a", "y": "b"},
    )
    forecast = predict_own_loss_bracket(losses)
    assert forecast.low <= forecast.high


def test_the_page_on_forecasts_shows_the_residuals_of_the_table():
    page = (Path(__file__).parents[2] / "docs" / "forecasts.md").read_text()
    divergence = group_means(lambda run: mean(compute_divergences(run.losses).values()))
    gain = group_means(lambda run: compute_gains(run.losses, run.fused)["best_specialist"])
    law = leave_one_out_residuals(divergence, gain, fit_line)
    own = group_means(
        lambda run: (
            compute_gains(run.losses, run.fused)["best_specialist"]
            - predict_own_loss(run.losses).point
        )
    )
    groups = sorted({run.group for run in load_published_runs()})
    for name, *residuals in zip(groups, law, own, strict=True):
        first, second = (f"{value:+.2f}".replace("-", "\u2212") for value in residuals)
        assert f"| {name} | {first} | {second} |" in page
    assert f"± {max(map(abs, law)):.1f} for the law" in page
    assert f"± {max(map(abs, own)):.1f} for `own-loss`" in page
