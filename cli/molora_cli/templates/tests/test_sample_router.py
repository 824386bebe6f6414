"""The contract of routers, and what makes this router this router."""

import torch
from molora_fed import RouterView
from molora_fed.testing import check_router_conformance

from molora_sample_router.router import (
    SampleOptions,
    SampleRouter,
)


def test_keeps_the_contract():
    check_router_conformance(SampleRouter)
    options = SampleOptions(sharpness=3.0)
    check_router_conformance(SampleRouter, options)


def test_follows_whoever_predicted_the_last_token():
    evidence = torch.tensor([[[-1.0, -5.0], [-6.0, -0.5]]])
    view = RouterView(document_starts=torch.zeros(1, 2, dtype=torch.bool), evidence=evidence)
    router = SampleRouter(2, SampleOptions())
    assert router.gates(view).argmax(-1).tolist() == [[0, 1]]
