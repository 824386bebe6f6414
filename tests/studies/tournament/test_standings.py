"""Standings: order, pairs, intervals over trainings, and what failed."""

import numpy as np
import pytest
from molora_studies.tournament.standings import estimate, rank
from molora_studies.verdicts import compute_span
from scipy import stats


def make(router, training, gap, *, cooperative="one", causal=True, failed=None, unseen=0.0):
    if failed is not None:
        return {
            "router": router,
            "cooperative": cooperative,
            "training": training,
            "failed": failed,
        }
    return {
        "router": router,
        "cooperative": cooperative,
        "training": training,
        "failed": None,
        "causal": causal,
        "loss_nats": 3.0 + gap,
        "oracle_gap_nats": gap,
        "worst_domain": {"domain": "law", "nats": 2 * gap},
        "worst_document_nats": 100 * gap,
        "unseen_nats": unseen,
        "seconds": {"fit": 1.0, "step": 0.001 if causal else None, "base": 0.01},
    }


def make_all(gaps, **fields):
    return [
        make(router, training, gap, **fields)
        for router, values in gaps.items()
        for training, gap in enumerate(values)
    ]


def test_one_cooperative_has_students_interval():
    values = [0.1, 0.13, 0.11]
    found = estimate([values])
    expected = compute_span(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.span.low == pytest.approx(expected.low)
    assert found.span.high == pytest.approx(expected.high)


def test_two_cooperatives_of_equal_size_have_the_interval_of_welchs_test():
    one, two = np.array([0.1, 0.13, 0.11]), np.array([0.4, 0.2, 0.33])
    found = estimate([one, two])
    # The mean of means is half of one - (-two), whose interval Welch's test gives.
    welch = stats.ttest_ind(one, -two, equal_var=False).confidence_interval(0.95)
    assert found.mean == pytest.approx((one.mean() + two.mean()) / 2)
    assert (found.span.low, found.span.high) == pytest.approx((welch.low / 2, welch.high / 2))


def test_one_training_has_no_interval_and_equal_ones_have_no_width():
    alone = estimate([[0.1, 0.2], [0.3]])
    assert alone.span.low is None and alone.show() == "+0.2250"
    assert estimate([[0.1, 0.1]]).span.low == pytest.approx(0.1)


def test_routers_stand_by_their_gap_and_are_paired_by_training():
    gaps = {"good": [0.01, 0.02], "linear": [0.03, 0.05], "bad": [0.2, 0.1]}
    first, second, third = rank(make_all(gaps))
    assert [(s.router, s.rank) for s in (first, second, third)] == [
        ("good", 1),
        ("linear", 2),
        ("bad", 3),
    ]
    assert first.to_reference.mean == pytest.approx(-0.025)
    assert third.to_first.mean == pytest.approx(0.135)
    paired = compute_span([0.2 - 0.01, 0.1 - 0.02])
    assert (third.to_first.span.low, third.to_first.span.high) == pytest.approx(
        (paired.low, paired.high)
    )
    assert first.worst_domain.mean == pytest.approx(0.03)
    assert first.worst_document.mean == pytest.approx(1.5)


def test_cooperatives_weigh_the_same_however_often_they_were_trained():
    matches = [
        *make_all({"a": [0.0, 0.0, 0.0], "b": [0.1, 0.1, 0.1]}),
        *make_all({"a": [0.4], "b": [0.1]}, cooperative="two"),
    ]
    assert [s.router for s in rank(matches)] == ["b", "a"]


def test_who_cannot_decode_has_no_rank_and_who_failed_once_is_last():
    matches = [
        *make_all({"sees-all": [0.001, 0.001]}, causal=False),
        *make_all({"good": [0.01, 0.02]}),
        make("broken", 0, 0.0),
        make("broken", 1, 0.0, failed="failed: it broke"),
    ]
    found = rank(matches)
    assert [(s.router, s.rank) for s in found] == [
        ("sees-all", None),
        ("good", 1),
        ("broken", None),
    ]
    assert found[0].step_seconds is None and found[0].to_reference is None
    assert found[-1].failed == "failed: it broke" and found[-1].gap is None


def test_text_that_was_not_measured_everywhere_has_no_figure():
    matches = [make("a", 0, 0.1), make("a", 1, 0.1, unseen=None)]
    assert rank(matches)[0].unseen is None
