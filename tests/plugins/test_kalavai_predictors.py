import json
import math
from dataclasses import replace
from importlib.resources import files

import pytest
from molora_kalavai.formulas import (
    ceiling_gain,
    forgetting_gain,
    mean_divergence,
    measure_forgetting,
    oracle_gain,
    own_loss_gain,
)
from molora_kalavai.predictors import gather_evidence, predict_fitted
from molora_kalavai.published import (
    COLLAPSED,
    is_collapsed,
    list_published_outcomes,
    load_published_runs,
)

from molora_fed.forecasting.divergence import compute_gains, keep_own_losses
from molora_fed.forecasting.matrices import is_same_condition
from molora_fed.forecasting.records import ask_predictors
from molora_fed.plugins import load_plugins
from molora_fed.types import Case, LossMatrix, Outcome

OWN_DOMAIN_ONLY = {
    "fitted", "forgetting", "kalavai-law", "kalavai-law-refit", "own-loss", "own-loss-bracket",
}  # fmt: skip
NAMES = OWN_DOMAIN_ONLY | {"loss-matrix"}


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


@pytest.fixture(scope="module")
def ask(plugins):
    return lambda case, past=(): {
        name: forecast
        for name, forecast in ask_predictors(case, past, plugins).items()
        if name in NAMES
    }


def build_case(*, own=(2.0, 4.5), group=""):
    losses = LossMatrix(
        ("a", "b"),
        {"a": 3.0, "b": 5.0},
        {"x": {"a": own[0], "b": 5.0}, "y": {"a": 3.0, "b": own[1]}, "z": {"a": 2.9, "b": 5.0}},
        {"x": "a", "y": "b", "z": "a"},
    )
    return Case(losses, group)


def build_own_past(count, scale):
    """Outcomes of `scale` times own-loss, a group each."""
    past = []
    for number in range(count):
        case = build_case(own=(2.0 - number / 10, 4.5 - number / 5), group=f"own-{number}")
        gain = scale * own_loss_gain(case)
        past.append(Outcome(case, {"best_alone": gain, "best_specialist": gain}))
    return past


def compute_rmse(ask, name, *, collapsed):
    """Root mean square of gain minus forecast over the published runs, percentage points."""
    squares = [
        (run.outcome.gains["best_specialist"] - ask(run.case)[name].point) ** 2
        for run in load_published_runs()
        if collapsed or not is_collapsed(run)
    ]
    return math.sqrt(sum(squares) / len(squares))


def test_the_table_is_packaged_with_its_source():
    table = json.loads(files("molora_kalavai").joinpath("published.json").read_text("utf-8"))
    assert table["source"] == "arXiv 2603.22755, published result files"
    assert len(load_published_runs()) == 21
    assert len({run.case.group for run in load_published_runs()}) == 7
    assert len(list_published_outcomes()) == 20
    assert COLLAPSED in {(run.case.group, run.seed) for run in load_published_runs()}


@pytest.mark.parametrize(
    ("name", "all_runs", "without_collapse"),
    [("kalavai-law", 4.0, 3.1), ("own-loss", 3.3, 1.9)],
)
def test_published_errors_are_reproduced(ask, name, all_runs, without_collapse):
    assert round(compute_rmse(ask, name, collapsed=True), 1) == all_runs
    assert round(compute_rmse(ask, name, collapsed=False), 1) == without_collapse


def test_a_constant_fitted_to_other_groups_halves_the_error_of_own_loss(ask):
    assert compute_rmse(ask, "fitted", collapsed=False) <= 0.9


def test_the_laws_have_the_published_constants_and_floors(ask):
    losses = LossMatrix(
        ("a", "b"),
        {"a": 1.0, "b": 1.0},
        {"a": {"a": 0.9, "b": 1.0}, "b": {"a": 1.0, "b": 0.7}},
        {"a": "a", "b": "b"},
    )
    forecasts = ask(Case(losses))
    assert mean_divergence(Case(losses)) == pytest.approx(20)
    assert forecasts["kalavai-law"].point == pytest.approx(0.82 * 20 - 2.72)
    assert forecasts["kalavai-law"].floor == pytest.approx(2.72 / 0.82)
    assert forecasts["kalavai-law-refit"].point == pytest.approx(0.83 * 20 - 2.80)
    assert {f.reference for n, f in forecasts.items() if n != "own-loss-bracket"} == {
        "best_specialist"
    }


def test_own_loss_is_exact_where_specialists_forget_nothing():
    case = build_case()
    gains = compute_gains(case.losses, {"a": 2.0, "b": 4.5})
    assert own_loss_gain(case) == pytest.approx(gains["best_specialist"])
    assert oracle_gain(case) == pytest.approx(gains["best_specialist"])


def test_the_forgetting_formula_is_exact_where_forgetting_is_in_proportion():
    losses = LossMatrix(
        ("a", "b"),
        {"a": 4.0, "b": 2.0},
        # 25 % better on its own domain, 5 % worse off it; 50 % better, 10 % worse.
        {"x": {"a": 3.0, "b": 2.1}, "y": {"a": 4.4, "b": 1.0}},
        {"x": "a", "y": "b"},
    )
    assert measure_forgetting(losses, "x") == pytest.approx(0.2)
    gain = compute_gains(losses, {"a": 3.0, "b": 1.0})["best_specialist"]
    assert forgetting_gain(Case(losses), lambda name: 0.2) == pytest.approx(gain)
    assert forgetting_gain(Case(losses), lambda name: 0.0) < gain


def test_pilots_say_what_is_forgotten(ask):
    case = build_case()
    pilots = LossMatrix(
        ("a", "b"),
        {"a": 3.0, "b": 5.0},
        {n: {"a": 2.7, "b": 5.5} if n != "y" else {"a": 3.3, "b": 4.5} for n in "xyz"},
        {"x": "a", "y": "b", "z": "a"},
    )
    with_pilots = ask(replace(case, pilots=pilots))
    ratio = measure_forgetting(pilots, "x")
    assert ratio == pytest.approx(1.0)
    assert with_pilots["forgetting"].point == pytest.approx(forgetting_gain(case, lambda n: 1.0))
    assert with_pilots["forgetting"].point > ask(case)["forgetting"].point
    assert with_pilots["own-loss"] == ask(case)["own-loss"]


def test_off_domain_losses_and_outcomes_are_not_read_from_own_domain_losses(ask):
    for run in load_published_runs()[::3]:
        own = replace(run.case, losses=keep_own_losses(run.case.losses))
        found, full = ask(own), ask(run.case)
        assert {name: found[name] for name in OWN_DOMAIN_ONLY} == {
            name: full[name] for name in OWN_DOMAIN_ONLY
        }
        assert found["loss-matrix"] is None and full["loss-matrix"] is not None


def test_a_run_is_never_forecast_with_its_own_group_whatever_it_is_called(ask):
    for run in load_published_runs():
        named = ask(run.case)
        assert {o.case.group for g in gather_evidence(run.case, ()) for o in g} == {
            other.case.group for other in load_published_runs()
        } - {run.case.group}
        assert ask(replace(run.case, group="")) == named
        assert ask(replace(run.case, group="renamed")) == named


def test_seeds_of_a_published_group_are_known_by_their_losses_and_no_other_group_is():
    runs = load_published_runs()
    for first in runs:
        for second in runs:
            same = is_same_condition(first.case.losses, second.case.losses)
            assert same == (first.case.group == second.case.group)


def test_evidence_of_ones_own_counts_beside_the_published_until_there_is_enough():
    case = build_case(group="new")
    sizes = {count: len(gather_evidence(case, build_own_past(count, 2.0))) for count in (0, 3, 4)}
    assert sizes == {0: 7, 3: 10, 4: 4}
    forecast = predict_fitted(case, build_own_past(4, 2.0))
    assert forecast.point == pytest.approx(2.0 * own_loss_gain(case))
    assert forecast.high - forecast.low == pytest.approx(0.0, abs=1e-9)
    assert forecast.level == 0.8
    assert "4 own groups" in forecast.note


def test_intervals_of_every_predictor_are_at_80_percent_and_hold_their_point(ask):
    for run in load_published_runs()[::4]:
        for forecast in ask(run.case).values():
            assert forecast.level == 0.8
            assert forecast.low < forecast.high
            assert forecast.point is None or forecast.low <= forecast.point <= forecast.high


def test_verdicts_follow_the_interval(ask):
    by_group = {run.case.group: ask(run.case) for run in load_published_runs()}
    assert {f.verdict for f in by_group["regression_extension-p2_4domain"].values()} == {"go"}
    assert by_group["real-corrected_eval_qwen"]["fitted"].verdict == "small"
    assert by_group["real-corrected_eval_qwen"]["kalavai-law"].verdict == "no"


def test_bracket_held_the_measured_gain_on_all_but_the_collapsed_run(ask):
    missed = [
        (run.case.group, run.seed)
        for run in load_published_runs()
        for forecast in [ask(run.case)["own-loss-bracket"]]
        if not forecast.low <= run.outcome.gains["best_alone"] <= forecast.high
    ]
    assert missed == [COLLAPSED]


def test_bracket_held_the_oracles_gain_on_18_of_21(ask):
    inside = 0
    for run in load_published_runs():
        oracle = {
            d: min(row[d] for row in run.case.losses.specialists.values())
            for d in run.case.losses.domains
        }
        gain = compute_gains(run.case.losses, oracle)["best_alone"]
        inside += own_loss_gain(run.case) <= gain <= ceiling_gain(run.case)
    assert inside == 18


def test_specialists_of_one_domain_cannot_be_forecast(ask):
    losses = LossMatrix(
        ("a",), {"a": 3.0}, {"x": {"a": 2.0}, "y": {"a": 1.0}}, {"x": "a", "y": "a"}
    )
    assert set(ask(Case(losses)).values()) == {None}


def test_worse_specialists_give_an_ordered_bracket_and_no_gain(ask):
    forecasts = ask(build_case(own=(3.3, 5.5)))
    bracket = forecasts["own-loss-bracket"]
    assert bracket.low <= bracket.high
    assert forecasts["fitted"].verdict == "no"


def test_the_best_of_a_domains_specialists_counts(ask):
    with_third, case = ask(build_case()), build_case()
    kept = {name: case.losses.specialists[name] for name in "xy"}
    two = replace(case.losses, specialists=kept, own_domain={"x": "a", "y": "b"})
    without = ask(Case(two))
    assert {n: f.point for n, f in with_third.items()} == {n: f.point for n, f in without.items()}
