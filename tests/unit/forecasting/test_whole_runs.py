from dataclasses import replace

import pytest

from molora_fed.forecasting.divergence import compute_gains, keep_own_losses
from molora_fed.forecasting.history import describe_forecast, restate_against_best_specialist
from molora_fed.types import Forecast, LossMatrix

FORGETFUL = LossMatrix(
    ("law", "art"),
    {"law": 4.0, "art": 2.0},
    {"ann": {"law": 3.0, "art": 4.0}, "bob": {"law": 6.0, "art": 1.0}},
    {"ann": "law", "bob": "art"},
)
CLAIM = Forecast("best_alone", 30.0, 20.0, None, 0.8, "test.", 1.0)


def test_a_gain_on_the_best_alone_is_restated_exactly_where_all_losses_are_known():
    fused = {"law": 3.0, "art": 1.2}
    gains = compute_gains(FORGETFUL, fused)
    assert gains["best_alone"] == pytest.approx(30.0)
    restated = restate_against_best_specialist(CLAIM, FORGETFUL)
    assert restated.point == pytest.approx(gains["best_specialist"])
    assert restated.high is None
    assert (restated.reference, restated.note) == ("best_specialist", "test.")


def test_without_them_the_assumption_is_said():
    restated = restate_against_best_specialist(CLAIM, keep_own_losses(FORGETFUL))
    assert (restated.point, restated.low) == (30.0, 20.0)
    assert "no worse than the base" in restated.note


def test_what_is_against_the_best_specialist_stays():
    claim = replace(CLAIM, reference="best_specialist")
    assert restate_against_best_specialist(claim, FORGETFUL) is claim


def test_no_forecast_is_all_null():
    assert {v for k, v in describe_forecast(None).items() if k != "note"} == {None}


@pytest.mark.parametrize(
    ("point", "low", "high", "verdict"),
    [
        (5.0, 1.0, 9.0, "go"),
        (5.0, -1.0, 9.0, "small"),
        (5.0, None, None, "small"),
        (0.0, -1.0, 1.0, "no"),
        (None, 1.0, 2.0, "go"),
        (None, -1.0, 2.0, "small"),
        (None, -2.0, -1.0, "no"),
        (None, None, None, None),
    ],
)
def test_verdict(point, low, high, verdict):
    assert Forecast("best_alone", point, low, high, 0.8, "").verdict == verdict
