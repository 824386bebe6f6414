import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from molora_fed import hookimpl
from molora_fed.errors import ConfigError
from molora_fed.forecasting.records import make_forecasts, parse_record, score_forecasts
from molora_fed.plugins import load_plugins
from molora_fed.types import Case, Forecast, LossMatrix

MATRIX = LossMatrix(
    ("law", "art"),
    {"law": 4.0, "art": 2.0},
    {"ann": {"law": 3.0, "art": 2.5}, "bob": {"law": 4.5, "art": 1.0}},
    {"ann": "law", "bob": "art"},
)
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Predictors:
    @hookimpl
    def register_gain_predictors(self, register):
        register(
            "always-five",
            lambda case, past: Forecast("best_alone", 5.0, 4.0, 6.0, 0.5, "test"),
            summary="five",
            source="own definition",
        )
        register("never", lambda case, past: None, summary="abstains", source="own definition")


@pytest.fixture
def records():
    plugins = load_plugins([("test (test 1)", Predictors())])
    return make_forecasts(Case(MATRIX, "tiny"), "evidence", plugins, now=NOW)


def test_every_predictor_that_applies_gives_one_record_sorted_by_name(records):
    assert [r.predictor for r in records] == [
        "always-five",
        "fitted",
        "forgetting",
        "kalavai-law",
        "kalavai-law-refit",
        "loss-matrix",
        "measured-alone",
        "measured-specialist",
        "own-loss",
        "own-loss-bracket",
    ]
    assert records[0].origin == "test (test 1)"
    assert {r.created for r in records} == {"2026-01-02T03:04:05+00:00"}
    assert all(r.actual is None and r.is_inside is None for r in records)


def test_score_uses_the_reference_of_the_forecast(records):
    scored = score_forecasts(records, {"evidence": {"best_alone": 5.5, "best_specialist": 50.0}})
    assert {r.predictor: r.actual for r in scored} == {
        r.predictor: {"best_alone": 5.5, "best_specialist": 50.0}[r.forecast.reference]
        for r in records
    }
    assert scored[0].is_inside is True
    assert scored[3].is_inside is False
    assert records[0].actual is None


def test_a_record_is_scored_once(records):
    with pytest.raises(ConfigError, match="Keep the first score"):
        records[0].score(1.0).score(2.0)


def test_an_outcome_must_be_a_number_and_measured(records):
    with pytest.raises(ConfigError, match="finite gain"):
        records[0].score(float("nan"))
    with pytest.raises(ConfigError, match="measured gain of router 'evidence', got linear"):
        score_forecasts(records, {"linear": {"best_alone": 1.0, "best_specialist": 1.0}})


def test_a_record_survives_json(records):
    piloted = replace(records[0], pilots=MATRIX)
    for record in [*records, records[0].score(5.5), piloted]:
        assert parse_record(json.loads(json.dumps(record.to_json()))) == record


def test_a_record_of_an_earlier_version_is_read(records):
    value = records[0].to_json()
    for name in ("group", "pilots"):
        del value[name]
    del value["forecast"]["floor"]
    assert parse_record(value).group == ""


@pytest.mark.parametrize("damage", ["losses", "forecast", "router"])
def test_a_damaged_record_is_refused(records, damage):
    value = records[0].to_json()
    del value[damage]
    with pytest.raises(ConfigError, match="Cannot read a forecast record"):
        parse_record(value)


def test_an_unknown_reference_is_refused(records):
    value = records[0].to_json()
    value["forecast"]["reference"] = "best_guess"
    with pytest.raises(ConfigError, match="best_guess"):
        parse_record(value)


def test_summary_has_the_fields_of_the_report(records):
    summary = records[0].score(5.5).summary()
    assert {"reference", "router", "point", "low", "high", "level", "actual"} <= summary.keys()
    assert summary["inside"] is True


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"point": 10.0}, "low 4.0, point 10.0, high 6.0"),
        ({"low": 7.0}, "low 7.0, point 5.0"),
        ({"level": 1.8}, "level 1.8"),
        ({"level": None}, "an interval without a level"),
        ({"point": float("nan")}, "point nan"),
        ({"point": "5"}, "point '5'"),
        ({"high": True}, "high True"),
        ({"reference": "best_ever"}, "reference 'best_ever'"),
        ({"note": "one\ntwo"}, "not one line"),
        ({"note": "x" * 501}, "a note of 501 characters"),
    ],
)
def test_a_forecast_is_checked_when_it_is_made(changes, reason):
    claim = Forecast("best_alone", 5.0, 4.0, 6.0, 0.5, "test")
    with pytest.raises(ConfigError, match="Cannot make a forecast") as caught:
        replace(claim, **changes)
    assert reason in str(caught.value)
