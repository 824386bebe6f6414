"""The contract of adapter routers, and what makes this router this router."""

import pytest
import torch
from molora_fed import GateView
from molora_fed.testing import check_adapter_router_conformance

from molora_sample_adapter_router.gates import (
    SampleAdapterRouter,
    SampleOptions,
)


def test_keeps_the_contract():
    check_adapter_router_conformance(SampleAdapterRouter)
    options = SampleOptions(start=1.0)
    check_adapter_router_conformance(SampleAdapterRouter, options)


def test_fresh_slots_are_half_open():
    options = SampleOptions()
    router = SampleAdapterRouter.build(3, 8, options, seed=0)
    gates = router(GateView(document_starts=torch.zeros(2, 5, dtype=torch.bool)))
    assert gates.shape == (2, 5, 3)
    assert gates.unique().item() == pytest.approx(0.5)
