import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.errors import ConfigError
from molora_fed.forecasting.pilots import (
    PUBLISHED_GROWTH,
    PilotRecord,
    build_past,
    extrapolate,
    fit_growth,
)
from molora_fed.types import Case, LossMatrix, Outcome


def build_losses(law_drop, art_drop):
    """Drops in log loss on the own domains; off-domain losses a little above the base's."""
    base = {"law": 4.0, "art": 2.0}
    return LossMatrix(
        ("law", "art"),
        base,
        {
            "ann": {"law": 4.0 * math.exp(-law_drop), "art": 2.1},
            "bob": {"law": 4.2, "art": 2.0 * math.exp(-art_drop)},
        },
        {"ann": "law", "bob": "art"},
    )


def build_record(growth, group, share=0.1):
    factor = share**growth
    final = Case(build_losses(0.4, 0.2), group)
    pilots = build_losses(0.4 * factor, 0.2 * factor)
    return PilotRecord(pilots, share, Outcome(final, {"best_alone": 1.0, "best_specialist": 2.0}))


@given(growth=st.floats(0.05, 1.0), share=st.floats(0.01, 0.5))
def test_what_grew_as_a_power_is_met_exactly(growth, share):
    record = build_record(growth, "a", share)
    assert fit_growth([record]) == pytest.approx(growth)
    case = extrapolate(record.pilots, share, growth, group="a")
    for name, own in (("ann", "law"), ("bob", "art")):
        final = record.outcome.case.losses.specialists[name][own]
        assert case.losses.specialists[name] == {own: pytest.approx(final)}
    assert case.is_extrapolated and case.pilots == record.pilots and case.group == "a"


def test_groups_count_once_each_and_without_records_the_published_exponent_does():
    records = [build_record(0.2, "a"), build_record(0.2, "a"), build_record(0.6, "b")]
    assert fit_growth(records) == pytest.approx(0.4)
    assert fit_growth([]) == PUBLISHED_GROWTH
    worse = PilotRecord(build_losses(-0.1, -0.1), 0.1, records[0].outcome)
    assert fit_growth([worse]) == PUBLISHED_GROWTH


def test_a_pilot_worse_than_the_base_stays_as_it_is():
    pilots = build_losses(-0.1, 0.1)
    case = extrapolate(pilots, 0.1, 0.5)
    assert case.losses.specialists["ann"]["law"] == pytest.approx(pilots.specialists["ann"]["law"])
    assert case.losses.specialists["bob"]["art"] < pilots.specialists["bob"]["art"]


def test_evidence_from_pilots_never_uses_its_own_group_nor_the_cases():
    records = [build_record(0.2, "a"), build_record(0.6, "b"), build_record(0.8, "c")]
    case = extrapolate(records[2].pilots, 0.1, 0.4, group="c")
    past = build_past(case, records)
    assert [outcome.case.group for outcome in past] == ["a", "b"]
    # a is extrapolated with the exponent of b alone, and b with that of a.
    for outcome, record, growth in zip(past, records[:2], (0.6, 0.2), strict=True):
        expected = extrapolate(record.pilots, 0.1, growth).losses.specialists
        assert outcome.case.losses.specialists["ann"]["law"] == pytest.approx(
            expected["ann"]["law"]
        )


@pytest.mark.parametrize("share", [0.0, 1.0, 2.0])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        extrapolate(build_losses(0.1, 0.1), share, 0.4)
