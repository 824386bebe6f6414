"""The contract of admission checks, and what makes this check this check."""

from types import SimpleNamespace

import torch
from molora_fed.adapters import LinearUpdate
from molora_fed.testing import check_admission_check_conformance

from molora_sample_check.check import (
    SampleCheck,
    SampleOptions,
)


def judge(size):
    """What it finds of an adapter of one layer whose update has this Frobenius norm."""
    update = LinearUpdate(a=torch.ones(1, 1), b=torch.full((1, 1), size))
    check = SampleCheck(SampleOptions(limit=2.0))
    return check(SimpleNamespace(adapter=SimpleNamespace(updates={"layer": update})))


def test_keeps_the_contract():
    check_admission_check_conformance(SampleCheck)


def test_refuses_what_is_larger_than_the_limit():
    assert judge(1.0) is None
    assert "at layer" in judge(4.0).found
    assert judge(float("nan")) is not None
