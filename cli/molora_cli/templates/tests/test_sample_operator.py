"""The contract of operators, and what makes this operator this operator."""

import numpy as np
import pytest
import torch
from molora_fed import Fitness, LifecycleState, Population
from molora_fed.adapters import LinearUpdate
from molora_fed.population.contract import Birth, Slot
from molora_fed.testing import check_operator_conformance

from molora_sample_operator.operator import (
    SampleOperator,
    SampleOptions,
)


@pytest.fixture
def state():
    """Three slots of which the second does harm."""
    update = LinearUpdate(a=torch.ones(1, 2), b=torch.ones(3, 1))
    slots = tuple(Slot(Birth(f"g0-s{i}", "admitted"), None, {"layer": update}) for i in range(3))
    values = np.array([0.2, -0.1, 0.1])
    fitness = Fitness("global", values, np.full(3, 1e-3), values[:, None], np.array([-0.2]))
    return LifecycleState(Population("ab" * 32, 0, slots), fitness, ("words",), generation=1)


def test_keeps_the_contract():
    check_operator_conformance(SampleOperator)


def test_frees_the_slot_that_does_harm(state):
    operator = SampleOperator(SampleOptions())
    assert operator.apply(state, seed=0).freed == (1,)


def test_spares_slots_above_the_threshold(state):
    operator = SampleOperator(SampleOptions(threshold=-1.0))
    assert operator.apply(state, seed=0).freed == ()
