"""The package's own tests: the conformance kit, and what makes this router this router."""

import torch
from molora_last_token.router import LastTokenOptions, LastTokenRouter

from molora_fed import RouterView
from molora_fed.testing import check_router_conformance


def test_keeps_the_contract():
    check_router_conformance(LastTokenRouter)
    check_router_conformance(LastTokenRouter, LastTokenOptions(sharpness=3.0))


def test_follows_whoever_predicted_the_last_token():
    evidence = torch.tensor([[[-1.0, -5.0], [-6.0, -0.5]]])
    view = RouterView(document_starts=torch.zeros(1, 2, dtype=torch.bool), evidence=evidence)
    gates = LastTokenRouter(2, LastTokenOptions()).gates(view)
    assert gates.argmax(-1).tolist() == [[0, 1]]
