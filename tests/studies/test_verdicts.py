"""The rule of verdicts: intervals over independent replicates, and over documents, must agree."""

import pytest
from molora_studies.framework.contract import Claim
from molora_studies.kalavai.comparisons import Replicated
from molora_studies.verdicts import (
    Span,
    compute_share,
    compute_span,
    join_verdicts,
    judge_above,
    judge_below,
    judge_exists,
    judge_prevention,
    judge_within,
)
from scipy import stats

from molora_fed.errors import StudyError


def test_the_interval_over_replicates_is_students_and_one_replicate_has_none():
    values = [1.26, 4.10, -1.72]
    found = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    span = compute_span(values)
    assert (span.low, span.high) == (pytest.approx(found.low), pytest.approx(found.high))
    assert compute_span([3.0]) == Span(None, None)
    assert compute_span([3.0]).show() == "no interval"
    assert Span.of({"low": 1.0, "high": 2.0}).show(1, sign=False) == "[1.0, 2.0]"


@pytest.mark.parametrize(
    ("low", "high", "above", "within"),
    [
        (0.1, 0.2, "holds", "does not hold"),
        (-0.2, -0.1, "does not hold", "does not hold"),
        (-0.005, 0.005, "not decided", "holds"),
        (-0.02, 0.005, "not decided", "not decided"),
        (None, None, "not decided", "not decided"),
    ],
)
def test_verdicts_follow_from_an_interval(low, high, above, within):
    span = Span(low, high)
    opposite = {"holds": "does not hold", "does not hold": "holds"}
    assert judge_above([span]) == above
    assert judge_below([span]) == opposite.get(above, above)
    assert judge_within([span], 0.01) == within


def test_every_interval_must_agree():
    sure, open_ = Span(0.1, 0.2), Span(-0.1, 0.3)
    assert judge_above([sure, sure]) == "holds"
    assert judge_above([sure, open_]) == "not decided"
    assert judge_above([sure, Span(None, None)]) == "not decided"
    assert judge_above([sure, Span(-0.2, -0.1)]) == "not decided"
    assert judge_within([Span(-0.01, 0.01), open_], 0.05) == "not decided"
    assert judge_above([]) == "not decided"


def test_what_seeds_share_does_not_decide_over_seeds():
    found = Replicated.of_difference(
        {"seeds": [0.02, -0.03, 0.04], "point": 0.01, "low": 0.005, "high": 0.015}
    )
    assert judge_above(found.documents) == "holds"
    assert judge_above(found.spans) == "not decided"
    assert found.unit == "training seed (3), and document cluster of the mean"
    each = Replicated.of_seeds([{"point": p, "low": p - 1, "high": p + 1} for p in (3.0, 3.1)])
    assert each.unit == "training seed (2), and document cluster at every seed"
    assert judge_above(each.spans) == "holds"
    one = Replicated.of_seeds([{"point": 3.0, "low": 2.0, "high": 4.0}])
    assert judge_above(one.spans) == "not decided"
    assert one.show("%") == "+3.00 % no interval over 1 seed, [+2.00, +4.00] over documents"


def test_shares_have_exact_intervals():
    span = compute_share(50, 50)
    assert (span.low, span.high) == (pytest.approx(0.025 ** (1 / 50)), 1.0)
    assert compute_share(0, 3).high == pytest.approx(1 - 0.025 ** (1 / 3))
    assert compute_share(0, 0) == Span(0.0, 1.0)


def test_one_case_shows_that_there_is_one_and_none_of_a_few_does_not_show_that_there_is_none():
    assert [judge_exists(count) for count in (1, 0)] == ["holds", "not decided"]


@pytest.mark.parametrize(
    ("without", "with_it", "verdict"),
    [
        (0, 0, "not decided"),
        (3, 3, "does not hold"),
        (1, 2, "does not hold"),
        (3, 0, "not decided"),  # three pairs of one sign: p = 0.25
        (6, 0, "holds"),  # p = 0.031
        (9, 3, "differs"),
        (5, 3, "not decided"),
    ],
)
def test_prevention_needs_more_pairs_than_chance_gives(without, with_it, verdict):
    assert judge_prevention(without, with_it) == verdict


def test_a_claim_of_parts_is_as_good_as_its_worst():
    assert join_verdicts(["holds", "not decided"]) == "not decided"
    assert join_verdicts(["not decided", "does not hold", "holds"]) == "does not hold"
    assert join_verdicts(["holds", "by construction"]) == "by construction"


def test_a_claim_without_its_unit_is_refused():
    with pytest.raises(StudyError, match="expected its unit of replication, got none"):
        Claim("Sums grow.", "yes", "yes", "holds", " ")
