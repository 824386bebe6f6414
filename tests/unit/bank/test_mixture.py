"""Both mixtures against their definitions, on every architecture."""

from types import SimpleNamespace

import pytest
import torch

from molora_fed.adapters.compatibility import applied
from molora_fed.bank.mixture import (
    compute_log_gates,
    compute_logit_nll,
    compute_probability_nll,
)
from molora_fed.errors import RoutingError
from molora_fed.models.forward import run_blocks
from molora_fed.models.head import Readout, find_readout
from molora_fed.models.states import Capture
from molora_fed.testing import build_random_adapter


def random_gates(shape, seed=0):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(2 * scores, dim=-1)


def test_probability_mixture_is_the_log_of_the_mixed_probability():
    gates = random_gates((2, 6, 3))
    logprob = -5 * torch.rand(2, 6, 3)
    found = compute_probability_nll(compute_log_gates(gates), logprob)
    expected = -(gates[:, :-1] * logprob[:, 1:].exp()).sum(-1).log()
    torch.testing.assert_close(found, expected)


def test_a_gate_of_zero_shuts_an_expert_out_and_stays_differentiable():
    gates = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], requires_grad=True)
    logprob = torch.tensor([[[0.0, 0.0], [-2.0, -1.0]]])
    nll = compute_probability_nll(compute_log_gates(gates), logprob)
    nll.sum().backward()
    assert nll.item() == pytest.approx(2.0)
    assert torch.isfinite(gates.grad).all()


@pytest.fixture
def experts(model, tokens):
    """Logits and states of two experts and the base, (E, B, T, V) and (B, T, E, D)."""
    logits, hidden = [], []
    for adapter in (None, build_random_adapter(model, seed=1), build_random_adapter(model, seed=2)):
        with applied(model, adapter):
            (step,) = run_blocks(model, tokens, capture=Capture(hidden=True))
            hidden.append(step.hidden.clone())
            with torch.no_grad():
                logits.append(model(input_ids=tokens).logits)
    return torch.stack(logits), torch.stack(hidden, dim=2)


def test_logit_mixture_is_the_softmax_of_mixed_logits(model, tokens, experts):
    logits, hidden = experts
    gates = random_gates((2, 24, 3))
    mixed = torch.einsum("bte,ebtv->btv", gates, logits)[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        mixed.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view(2, -1)
    found = compute_logit_nll(gates, hidden, tokens, find_readout(model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_logit_mixture_has_the_right_gradient(model, tokens, experts):
    logits, hidden = experts
    found_gates = random_gates((2, 24, 3)).requires_grad_(True)
    compute_logit_nll(found_gates, hidden, tokens, find_readout(model)).mean().backward()
    gates = random_gates((2, 24, 3)).requires_grad_(True)
    mixed = torch.einsum("bte,ebtv->btv", gates, logits)[:, :-1]
    torch.nn.functional.cross_entropy(mixed.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    # Gates sum to 1, so only differences between experts' gradients mean anything: the head's
    # form drops a constant per position where the model's logits have one.
    found, expected = (g.grad - g.grad.mean(-1, keepdim=True) for g in (found_gates, gates))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_one_expert_with_gate_one_is_that_expert(model, tokens, experts):
    logits, hidden = experts
    gates = torch.zeros(2, 24, 3)
    gates[..., 1] = 1.0
    expected = torch.nn.functional.cross_entropy(
        logits[1][:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view(2, -1)
    found = compute_logit_nll(gates, hidden, tokens, find_readout(model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gemma_needs_its_soft_cap(tiny_model):
    assert find_readout(tiny_model("gemma2")).softcap == 5.0
    assert find_readout(tiny_model("llama")).softcap is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_rows_in_parts_are_the_whole(monkeypatch, dtype, has_bias):
    monkeypatch.setattr("molora_fed.models.head._LEAST_ROWS", 5)
    monkeypatch.setattr("molora_fed.models.head._LOGITS_AT_ONCE", 1)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn((40, 8), generator=generator).to(dtype)
    bias = torch.randn(40, generator=generator).to(dtype) if has_bias else None
    readout = Readout(weight, bias, 0.5, None)
    tokens = torch.randint(0, 40, (2, 9), generator=generator)
    hidden = torch.randn((2, 9, 3, 8), generator=generator).to(dtype)
    results = []
    for whole in (False, True):
        gates = random_gates((2, 9, 3)).requires_grad_(True)
        if whole:
            logits = readout.mix(gates[:, :-1], hidden[:, :-1]).float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            ).view(2, 8)
        else:
            losses = compute_logit_nll(gates, hidden, tokens, readout)
        losses.mean().backward()
        results.append((losses.detach(), gates.grad))
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    )
    torch.testing.assert_close(results[0], results[1], **tolerance)


class Odd(torch.nn.Module):
    """A model whose logits are made from its head's output in some other way."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change, self.config = model, change, model.config

    def forward(self, **arguments):
        return SimpleNamespace(logits=self.change(self.model(**arguments).logits))

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()


def test_scaled_logits_are_found_by_their_numbers(tiny_model):
    assert find_readout(Odd(tiny_model(), lambda z: z / 16)).scale == pytest.approx(1 / 16)


def test_other_readouts_are_refused(tiny_model):
    with pytest.raises(RoutingError, match="Use the probability mixture"):
        find_readout(Odd(tiny_model(), lambda z: z + z.abs().sqrt()))
