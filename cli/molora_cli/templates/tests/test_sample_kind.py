"""The contract of adapter kinds, and what makes this kind this kind."""

import torch
from molora_fed.charter import AdapterRules
from molora_fed.testing import build_tiny_model, check_adapter_kind_conformance

from molora_sample_kind.kind import SampleKind


def test_keeps_the_contract():
    check_adapter_kind_conformance(SampleKind)


def test_trains_b_alone():
    model = build_tiny_model("gpt_neox")
    trained, parameters = SampleKind().prepare(model, AdapterRules(), 4)
    free = [name for name, p in trained.named_parameters() if p.requires_grad]
    assert free
    assert all(".lora_B." in name for name in free)
    assert len(free) == len(parameters)
    assert all(torch.count_nonzero(parameter) == 0 for parameter in parameters)
