"""The contract of gain predictors, and what makes this predictor this predictor."""

import pytest
from molora_fed import Case, LossMatrix
from molora_fed.testing import check_gain_predictor_conformance

from molora_sample_predictor.predictor import (
    SampleOptions,
    SamplePredictor,
)


@pytest.fixture
def case():
    """Two specialists, 10 and 30 percent better than the base on their own domains."""
    return Case(
        LossMatrix(
            domains=("prose", "code"),
            base={"prose": 4.0, "code": 2.0},
            specialists={"ann": {"prose": 3.6, "code": 2.1}, "ben": {"prose": 4.2, "code": 1.4}},
            own_domain={"ann": "prose", "ben": "code"},
        )
    )


def test_keeps_the_contract():
    check_gain_predictor_conformance(SamplePredictor)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_expects_a_share_of_the_mean_divergence(case, share):
    predict = SamplePredictor(SampleOptions(share=share))
    assert predict(case, []).point == pytest.approx(20.0 * share)
