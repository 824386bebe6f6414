"""The contract of carried files, and what makes this file this file."""

import torch
from molora_fed.testing import build_carried_context, check_carried_files_conformance

from molora_sample_carried_file.carried import compute


def test_keeps_the_contract():
    check_carried_files_conformance(compute)


def test_is_one_mean_state():
    context = build_carried_context()
    (mean,) = compute(context).values()
    assert mean.shape == (context.base.hidden_size,)
    assert torch.count_nonzero(mean) > 0
