"""The contract of merges, and what makes this merge this merge."""

import pytest
import torch
from molora_fed.testing import (
    build_random_adapter,
    build_tiny_model,
    check_merge_conformance,
)

from molora_sample_merge.merge import (
    SampleMerge,
    SampleOptions,
)


def test_keeps_the_contract():
    check_merge_conformance(SampleMerge)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_of_three_it_takes_the_middle_number(scale):
    model = build_tiny_model("gpt_neox")
    adapters = [build_random_adapter(model, seed=seed) for seed in range(3)]
    name = next(iter(adapters[0].updates))
    products = torch.stack([adapter.updates[name].product() for adapter in adapters])
    merge = SampleMerge(SampleOptions(scale=scale))
    merged = merge(adapters, name="merged", seed=0).updates[name].product()
    torch.testing.assert_close(merged, scale * products.sort(dim=0).values[1])
