import pytest
import torch
from fused_helpers import (
    ALL_COLUMNS,
    ProbeRouter,
    build_fused,
    random_tokens,
    reference_forward,
)

from molora_fed.adapters.compatibility import applied
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.mixing import mix_distributions
from molora_fed.models.base import load_base
from molora_fed.routing.fused import FusedModel
from molora_fed.testing import ARCHITECTURES


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tiny_checkpoint):
    return load_base(tiny_checkpoint(request.param))


@pytest.fixture(scope="module")
def neox(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.mark.parametrize("mixture", ["probability", "logit"])
@pytest.mark.parametrize("kinds", [("lora", None, "delta"), ("svd", "lora")])
def test_full_form_equals_experts_run_one_by_one(base, mixture, kinds):
    fused = build_fused(base, columns=ALL_COLUMNS, mixture=mixture, kinds=kinds)
    tokens = random_tokens(2, 24)
    starts = torch.zeros(2, 24, dtype=torch.bool)
    starts[:, 0] = True
    starts[1, 9] = True
    expected, gates = reference_forward(fused, tokens, starts)
    output = build_causal_lm(fused)(tokens, document_starts=starts)
    assert output.gates.std() > 0.01  # gates that do not move would prove nothing
    torch.testing.assert_close(output.gates, gates, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("mixture", ["probability", "logit"])
def test_future_tokens_never_change_past_outputs(base, mixture):
    fused = build_fused(base, columns=ALL_COLUMNS, mixture=mixture)
    tokens = random_tokens(2, 20)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 101) % 256
    before, after = build_causal_lm(fused)(tokens), build_causal_lm(fused)(changed)
    torch.testing.assert_close(before.logits[:, :12], after.logits[:, :12], atol=1e-5, rtol=0)
    torch.testing.assert_close(before.gates[:, :12], after.gates[:, :12], atol=1e-5, rtol=0)
    assert not torch.allclose(before.logits[:, 12:], after.logits[:, 12:], atol=1e-3)


def test_forward_leaves_the_base_as_it_was(neox):
    model = neox.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    model.train()
    build_causal_lm(build_fused(neox, columns=ALL_COLUMNS))(random_tokens(1, 8))
    assert model.training
    model.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("mixture", ["probability", "logit"])
def test_one_expert_with_gate_one_is_that_expert(neox, mixture):
    fused = build_fused(neox, mixture=mixture)

    class OneHot(ProbeRouter):
        def gates(self, view):
            gates = torch.zeros(*view.document_starts.shape, self.num_experts)
            gates[..., 2] = 1.0
            return gates

    one_hot = OneHot(3, fused.router.options, fused.router.state_tensors())
    single = FusedModel(neox, fused.experts, one_hot, "one-hot", mixture, 1)
    tokens = random_tokens(2, 10)
    with applied(neox.model, fused.experts[2].adapter), torch.no_grad():
        expected = neox.model(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(
        build_causal_lm(single)(tokens).logits, expected, atol=1e-4, rtol=1e-4
    )


def test_permuting_experts_permutes_gates_only(neox):
    fused = build_fused(neox)
    order = [2, 0, 1]
    router = ProbeRouter(3, fused.router.options, {"projection": fused.router.projection[:, order]})
    shuffled = FusedModel(
        neox, tuple(fused.experts[i] for i in order), router, "probe", "probability", 1
    )
    tokens = random_tokens(2, 10)
    before, after = build_causal_lm(fused)(tokens), build_causal_lm(shuffled)(tokens)
    torch.testing.assert_close(before.logits, after.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before.gates[..., order], after.gates, atol=1e-5, rtol=1e-5)


def test_mixtures_are_normalised(neox):
    for mixture in ("probability", "logit"):
        log_probs = build_causal_lm(build_fused(neox, mixture=mixture))(random_tokens(2, 6)).logits
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 6), atol=1e-5, rtol=0)


def test_shapes_are_checked(neox):
    fused = build_fused(neox)
    with pytest.raises(ShapeError, match=r"expected token ids of shape \(B, T\)"):
        build_causal_lm(fused)(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ShapeError, match="expected gates of shape"):
        mix_distributions(torch.zeros(3, 1, 2, 4), torch.ones(1, 2, 2), "probability")
    with pytest.raises(RoutingError, match="expected 3 experts, got 2"):
        FusedModel(neox, fused.experts[:2], fused.router, "probe", "probability", 1)
