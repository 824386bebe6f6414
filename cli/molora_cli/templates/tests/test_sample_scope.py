"""The contract of fitness scopes, and what makes this scope this scope."""

import numpy as np
import pytest
from molora_fed import LossTable
from molora_fed.testing import check_scope_conformance

from molora_sample_scope.scope import measure


@pytest.fixture
def table():
    """Two domains of two clusters of ten tokens; the first slot helps one and harms the other."""
    return LossTable(
        domains=("prose", "code"),
        domain_of=np.array([0, 0, 1, 1]),
        counts=np.full(4, 10.0),
        base=np.full(4, 40.0),
        full=np.full(4, 30.0),
        without=np.array([[40.0, 40.0, 29.0, 29.0], [31.0, 31.0, 31.0, 31.0]]),
        passes=1,
    )


def test_keeps_the_contract():
    check_scope_conformance(measure)


def test_a_slot_is_worth_what_it_is_worth_at_its_worst(table):
    assert measure(table).values == pytest.approx([-0.1, 0.1])
