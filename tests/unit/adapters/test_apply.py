import pytest
import torch

from molora_fed.adapters.compatibility import applied
from molora_fed.errors import IncompatibleAdapterError
from molora_fed.models.layout import adaptable_modules, bias_of, is_transposed, weight_of
from molora_fed.testing.models import build_random_adapter


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def parts_of(adapter):
    return {(n, p): t.clone() for n, u in adapter.updates.items() for p, t in u.tensors().items()}


@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_adds_the_products_and_restores_bit_exactly(kind, model):
    adapter = build_random_adapter(model, kind=kind, seed=1)
    before, before_parts = snapshot(model), parts_of(adapter)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    with applied(model, adapter) as same:
        assert same is model
        for name, module in adaptable_modules(model, 0).items():
            saved = before[f"{name}.weight"]
            old = saved.T if is_transposed(module) else saved
            assert torch.equal(weight_of(module), old + adapter.updates[name].product()), name
            if kind == "delta" and f"{name}.bias" in before:
                expected = before[f"{name}.bias"] + adapter.updates[name].bias
                assert torch.equal(bias_of(module), expected), name
    after = snapshot(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    parts = parts_of(adapter)
    assert all(torch.equal(parts[key], before_parts[key]) for key in before_parts)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_leaves_flags_and_mode_alone(trainable, training, tiny_model):
    model = tiny_model("llama").requires_grad_(trainable).train(training)
    adapter = build_random_adapter(model)
    with applied(model, adapter):
        assert all(p.requires_grad == trainable for p in model.parameters())
        assert all(m.training == training for m in model.modules())
    assert all(p.requires_grad == trainable and p.is_leaf for p in model.parameters())
    assert all(m.training == training for m in model.modules())


def test_restores_after_an_error_inside(model):
    before = snapshot(model)
    with pytest.raises(KeyError), applied(model, build_random_adapter(model)):
        raise KeyError
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_nests(model, tokens, logits):
    first, second = (build_random_adapter(model, seed=seed) for seed in (1, 2))
    with applied(model, first):
        alone = logits(model, tokens)
        with applied(model, second):
            assert not torch.equal(logits(model, tokens), alone)
        assert torch.equal(logits(model, tokens), alone)


def test_none_is_the_base(model, tokens, logits):
    expected = logits(model, tokens)
    with applied(model, None):
        assert torch.equal(logits(model, tokens), expected)


def test_bfloat16_base_is_rounded_once_and_restored(tiny_model):
    model = tiny_model("llama").bfloat16()
    adapter = build_random_adapter(model)
    name, module = next(iter(adaptable_modules(model, 0).items()))
    before = module.weight.clone()
    with applied(model, adapter):
        expected = (before.float() + adapter.updates[name].product()).bfloat16()
        assert torch.equal(module.weight, expected)
    assert torch.equal(module.weight, before)


def test_refuses_an_adapter_of_another_base_and_changes_nothing(tiny_model):
    model, other = tiny_model("gpt_neox"), tiny_model("llama")
    before = snapshot(model)
    with (
        pytest.raises(IncompatibleAdapterError, match="'theirs'"),
        applied(model, build_random_adapter(other, name="theirs")),
    ):
        pass
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
