"""The contract of carried files, and what makes this file this file."""

import torch
from molora_fed.testing import build_carried_context, check_carried_files_conformance

from molora_sample_carried_file.compute import compute


def test_keeps_the_contract():
    check_carried_files_conformance(compute)


def test_it_is_the_mean_over_all_of_the_text():
    context = build_carried_context()
    tokens = torch.cat([torch.from_numpy(b.tokens) for b in context.blocks("validation")]).long()
    with torch.no_grad():
        states = context.base.model(tokens, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(compute(context)["mean"], states.mean(dim=(0, 1)))
