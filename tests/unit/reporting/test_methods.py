import pytest

from molora_fed.reporting.methods import (
    BUDGET_SECONDS,
    compute_equal_weight,
    list_methods,
    mask_controls,
    order_phases,
)


def test_the_published_router_comes_first_among_the_fused(result):
    result["router"] = "linear"
    fused = [method.key for method in list_methods(result) if method.kind == "fused"]
    assert fused == ["fused:linear", "fused:evidence", "fused:evidence-zero"]


def test_change_is_against_the_better_of_base_and_best_specialist(result):
    methods = {method.key: method for method in list_methods(result)}
    assert methods["base"].change_percent == 0.0  # the base is the best anyone has alone here
    expected = -result["gain_percent"]["evidence"]["vs_best_alone"]
    assert methods["fused:evidence"].change_percent == pytest.approx(expected, abs=1e-2)
    result["losses"]["specialists"]["cpp-1"] = dict.fromkeys(result["domains"], 2.6)
    del result["equal_weight"]
    methods = {method.key: method for method in list_methods(result)}
    assert methods["specialist:cpp-1"].change_percent == pytest.approx(0.0, abs=1e-12)
    assert methods["base"].change_percent > 0


def test_methods_that_were_not_measured_are_left_out(minimal):
    keys = {method.key for method in list_methods(minimal)}
    assert "control" not in keys and "uniform" not in keys
    assert {"base", "domain_oracle", "token_oracle"} <= keys
    assert all(method.low is None for method in list_methods(minimal))


def test_baselines_without_a_label_stand_between_the_known_ones_and_the_routers(result):
    for name in ("wider", "ties"):
        result["losses"][name] = dict(result["losses"]["base"])
    found = [method.key for method in list_methods(result) if method.kind == "baseline"]
    assert found == ["uniform", "weight_average", "ties", "wider"]
    keys = [method.key for method in list_methods(result)]
    assert keys.index("wider") < keys.index("fused:evidence")


def test_equal_weight():
    assert compute_equal_weight({"a": 1.0, "b": 2.0}) == 1.5


def test_control_characters_do_not_reach_the_terminal():
    assert mask_controls("a\x1b[2Jb\x07\n\tc\x9b") == "a\ufffd[2Jb\ufffd\n\tc\ufffd"


def test_phases_come_in_the_order_they_happen():
    names = ["evaluation", "unknown", "training", "base_continued", "base"]
    assert order_phases(names) == ["base", "base_continued", "training", "evaluation", "unknown"]


def test_the_budgets_sum_to_eight_minutes():
    assert sum(BUDGET_SECONDS.values()) == 480
