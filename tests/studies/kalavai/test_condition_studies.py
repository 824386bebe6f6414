"""Studies of the recipe: what they plan, and what they conclude from known figures."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from matplotlib.figure import Figure
from molora_studies.framework.action_ids import load_action
from molora_studies.framework.contract import Cell, Study, Summary
from molora_studies.framework.registry import load_studies
from molora_studies.kalavai.conditions import estimate
from molora_studies.kalavai.duration import DurationOptions, DurationStudy, find_crossing
from molora_studies.kalavai.freeze import FreezeOptions, FreezeStudy
from molora_studies.kalavai.heterogeneous import HeterogeneousOptions, HeterogeneousStudy
from molora_studies.kalavai.maturity import MaturityOptions, MaturityStudy
from molora_studies.kalavai.scaling import ScalingOptions, ScalingStudy
from molora_studies.kalavai.shared_init import SharedInitOptions, SharedInitStudy

STUDIES = load_studies().registry
DOMAINS = ("cpp", "python", "science")


def make_result(
    cell: Cell, gain: float, crossed: float = 0.1, reach: float = 0.0
) -> dict[str, Any]:
    """What a fusion of three domains returns, the fused model `gain` percent below the base.

    Intervals by document cluster reach `reach` percentage points to both sides.
    """
    base = {"cpp": 3.0, "python": 4.0, "science": 5.0}
    routers = ("evidence", "linear")
    share = {d: {e: crossed / 2 if e != d else 1 - crossed for e in DOMAINS} for d in DOMAINS}
    return {
        "held_out": {
            "domains": list(base),
            "base": base,
            "fused": {r: {d: nats * (1 - gain / 100) for d, nats in base.items()} for r in routers},
        },
        "gains": {r: {"best_alone": gain, "best_specialist": gain + 1} for r in routers},
        "evaluation": {
            "gates": dict.fromkeys(routers, share),
            "gain_percent": {r: {"vs_best_alone": gain} for r in routers},
            "gain_interval_percent": {
                r: {"vs_best_alone": {"low": gain - reach, "high": gain + reach}} for r in routers
            },
        },
        "members": {},
    }


def summarise(
    study: type[Study], options: Any, gain: Callable[[Mapping[str, Any]], float], **more: Any
) -> Summary:
    cells = study.plan(options)
    results = {cell.name: make_result(cell, gain(cell.labels), **more) for cell in cells}
    return study.summarise(options, results)


@pytest.mark.parametrize("name", STUDIES.names())
def test_every_study_plans_distinct_cells_of_known_actions(name: str):
    study = STUDIES.resolve(name)
    cells = study.plan(study.Options())
    assert cells
    assert len({cell.name for cell in cells}) == len(cells)
    tasks = {task.key: task for cell in cells for task in cell.task.walk()}
    for action in {task.action for task in tasks.values()}:
        assert callable(load_action(action)), action
    assert all(task.seconds > 0 for task in tasks.values())


def test_studies_share_their_specialists():
    freeze = {t.key for c in FreezeStudy.plan(FreezeOptions()) for t in c.task.walk()}
    duration = {t.key for c in DurationStudy.plan(DurationOptions()) for t in c.task.walk()}
    unfrozen = [c for c in FreezeStudy.plan(FreezeOptions()) if c.labels["depth"] == 0]
    assert all(t.key in duration for cell in unfrozen for t in cell.task.walk())
    assert freeze - duration


def test_an_estimate_of_several_seeds_has_students_interval():
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.low == pytest.approx(2.0 - 4.302653 / 3**0.5, abs=1e-5)
    assert estimate([1.0]).low is None
    assert found.show("pp") == "+2.00 pp [-0.48, +4.48], 3 seeds"


def test_the_crossing_is_interpolated_over_log_steps():
    assert find_crossing({100: 1.0, 1000: -1.0}) == pytest.approx(316.2, abs=0.1)
    assert find_crossing({100: 1.0, 1000: 0.5}) is None
    assert find_crossing({100: -1.0, 1000: -0.5}) is None


def test_freezing_that_costs_nothing_keeps_all_of_the_gain():
    found = summarise(FreezeStudy, FreezeOptions(), lambda labels: 6.0 + labels["seed"] / 1e6)
    assert found.findings["kept_at_half_depth_percent"]["mean"] == pytest.approx(100)
    assert [claim.verdict for claim in found.claims] == ["holds", "not decided"]


def test_freezing_that_costs_all_does_not_hold():
    found = summarise(FreezeStudy, FreezeOptions(), lambda labels: 6.0 - 2.9 * labels["depth"])
    assert [claim.verdict for claim in found.claims] == ["does not hold", "holds"]


def test_duration_finds_where_freezing_starts_to_pay():
    def gain(labels: Mapping[str, Any]) -> float:
        return 5.0 + (labels["depth"] and (-1.0 if labels["steps"] < 1000 else 1.0))

    found = summarise(DurationStudy, DurationOptions(), gain)
    assert 600 < found.findings["crossover_steps"] < 1800
    assert [claim.verdict for claim in found.claims] == ["holds", "holds"]


def test_a_large_spread_of_recipes_differs_from_the_paper():
    def gain(labels: Mapping[str, Any]) -> float:
        return 7.0 if labels["recipe"] == "half the steps" else 5.0

    found = summarise(HeterogeneousStudy, HeterogeneousOptions(), gain)
    assert found.findings["spread_pp"]["mean"] == pytest.approx(2.0)
    assert found.claims[0].verdict == "differs"


def test_scaling_holds_only_if_every_specialist_adds():
    rising = summarise(ScalingStudy, ScalingOptions(), lambda labels: 1.0 * labels["specialists"])
    assert rising.claims[0].verdict == "holds"
    falling = summarise(ScalingStudy, ScalingOptions(), lambda labels: -1.0 * labels["specialists"])
    assert falling.claims[0].verdict == "does not hold"


def test_maturity_compares_the_youngest_and_the_oldest_base():
    found = summarise(MaturityStudy, MaturityOptions(), lambda labels: 9.0 - labels["age"] / 1000)
    assert [claim.verdict for claim in found.claims] == ["holds", "holds"]


def test_shared_init_compares_with_a_matched_start_at_the_middle_age():
    def gain(labels: Mapping[str, Any]) -> float:
        return 6.0 + labels["seed"] / 1e5 if ":" in labels["ages"] else 8.0

    found = summarise(SharedInitStudy, SharedInitOptions(), gain)
    assert [claim.verdict for claim in found.claims] == ["holds", "not decided", "does not hold"]
    assert found.claims[0].unit == "training seed of the specialists (3)"
    assert found.findings["cross_routing_percent"]["matched"]["mean"] == pytest.approx(10)
    assert found.findings["cost_nats"]["1 : 2 : 4"]["mean"] == pytest.approx(0.08, abs=0.001)


def test_shared_init_judges_the_balanced_pair_whatever_the_order_of_its_ages():
    ages = SharedInitOptions().ages
    kept = SharedInitOptions(ages=dict(sorted(ages.items())))  # as a JSON file has them

    def gain(labels: Mapping[str, Any]) -> float:
        wide = 9.0 if labels["ages"] == "1 : 2 : 4" else 8.0  # the wide pair would refute it
        return labels["seed"] / 1e5 + (7.0 if labels["ages"] == "1 : 1.25 : 1.5" else wide)

    for options in (SharedInitOptions(), kept):
        found = summarise(SharedInitStudy, options, gain)
        assert found.claims[0].verdict == "holds"
        assert "verdict on 1 : 1.25 : 1.5" in found.claims[0].reason
        assert [row[0] for row in found.tables[0].rows][:3] == list(ages)
    unbalanced = SharedInitOptions(ages={"matched": (0, 0, 0), "wide": (0, 2600, 7800)})
    claims = summarise(SharedInitStudy, unbalanced, gain).claims
    assert {claim.verdict for claim in claims} == {"not decided"}


def test_one_training_of_an_age_is_left_out_of_the_verdict():
    def gain(labels: Mapping[str, Any]) -> float:
        return -5.0 if labels["age"] == 1300 else 9.0 - labels["age"] / 1000

    claims = summarise(MaturityStudy, MaturityOptions(), gain).claims
    assert claims[1].verdict == "holds" and "1300: -5.00 %, 1 seed" in claims[1].measured
    assert "document cluster at every seed" in claims[1].unit
    loose = summarise(MaturityStudy, MaturityOptions(), gain, reach=5.0).claims  # 3.8 - 5 < 0
    assert [claim.verdict for claim in loose] == ["holds", "not decided"]
    one = summarise(MaturityStudy, MaturityOptions(seeds=(42,)), gain).claims
    assert [claim.verdict for claim in one] == ["not decided"] * 2


@pytest.mark.parametrize(
    ("study", "options"),
    [
        (FreezeStudy, FreezeOptions()),
        (DurationStudy, DurationOptions()),
        (HeterogeneousStudy, HeterogeneousOptions()),
        (ScalingStudy, ScalingOptions()),
        (MaturityStudy, MaturityOptions()),
        (SharedInitStudy, SharedInitOptions()),
    ],
)
def test_figures_are_drawn(study: type[Study], options: Any):
    for drawn in summarise(study, options, lambda labels: 5.0).figures:
        figure = Figure()
        drawn.draw(figure)
        assert figure.axes[0].get_xlabel() or figure.axes[0].get_ylabel()
