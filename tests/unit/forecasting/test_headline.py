"""Which forecast is announced, and why none is."""

import pytest

from molora_fed.forecasting.headline import choose_headline
from molora_fed.forecasting.pilots import extrapolate
from molora_fed.plugins import load_plugins
from molora_fed.types import Case, Forecast, LossMatrix

FULL = LossMatrix(
    ("a", "b"),
    {"a": 3.0, "b": 3.0},
    {"x": {"a": 2.0, "b": 3.5}, "y": {"a": 3.5, "b": 2.0}},
    {"x": "a", "y": "b"},
)
OWN = LossMatrix(FULL.domains, FULL.base, {"x": {"a": 2.0}, "y": {"b": 2.0}}, FULL.own_domain)
ONE = LossMatrix(FULL.domains, FULL.base, FULL.specialists, {"x": "a", "y": "a"})
SAID = Forecast("best_alone", 5.0, 4.0, 6.0, 0.8, "A note.")
NAMES = ("measured-alone", "measured-specialist")


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


def test_the_charters_order_counts_and_a_point_is_needed(plugins):
    said = {"law": SAID, "a": SAID, "b": SAID, "c": Forecast("best_alone", None, 1, 2, 0.8, "")}
    found = choose_headline(("b", "c", "a", "gone"), said, Case(FULL), plugins)
    assert found.predictors == ("b", "a") and found.reason == ""
    assert found.to_json() == {"predictors": ["b", "a"], "reason": None}


@pytest.mark.parametrize(
    ("names", "case", "reason"),
    [
        (NAMES, Case(OWN), "losses of every specialist on every domain are needed"),
        (NAMES, Case(ONE), "specialists of two domains or more are needed"),
        (("gone", "lost"), Case(FULL), "no installed plugin has the predictors gone, lost"),
        ((), Case(FULL), "the charter names no predictor"),
        (NAMES, Case(FULL), "measured-alone, measured-specialist know too little"),
        (NAMES, extrapolate(FULL, 0.1, 0.4), "measured-alone, measured-specialist know too little"),
    ],
)
def test_why_there_is_none_is_one_line(plugins, names, case, reason):
    found = choose_headline(names, {"law": SAID, "measured-alone": None}, case, plugins)
    assert found.predictors == ()
    assert found.reason.startswith(reason) and "\n" not in found.reason
    assert found.to_json()["reason"] == found.reason


def test_what_to_do_is_said_where_only_own_losses_are_known(plugins):
    reason = choose_headline(NAMES, {}, Case(OWN), plugins).reason
    assert "fuse" in reason and "--pilot" in reason
