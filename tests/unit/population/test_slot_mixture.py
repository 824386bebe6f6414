from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.errors import PopulationError
from molora_fed.population.mixture import Mixture
from molora_fed.population.slots import make_population, slot_adapter
from molora_fed.testing.models import build_random_adapter, build_tiny_model

RANKS = (4, 1, 7)
BASE = "ab" * 32


def build_population(model, ranks=RANKS, **options):
    """Mixed ranks; the second slot changes the last block alone."""
    adapters = [
        build_random_adapter(model, rank=rank, seed=seed, frozen_depth=int(seed == 1))
        for seed, rank in enumerate(ranks)
    ]
    named = [(adapter.name, f"domain-{seed}", adapter) for seed, adapter in enumerate(adapters)]
    options = {"num_slots": len(ranks), **options}
    return make_population(SimpleNamespace(model=model, weights=BASE), named, **options)


def draw_gates(tokens, num_slots=3, seed=3):
    shape = (*tokens.shape, num_slots)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def slot_by_slot(model, population, gates, run):
    """Reference: every layer adds its slots in a plain loop."""

    def hook_of(name):
        def hook(_module, args, output):
            for index, slot in enumerate(population.slots):
                update = slot.updates.get(name)
                if update is not None:
                    added = args[0] @ update.a.T @ update.b.T * update.scale
                    output = output + gates[..., index : index + 1] * added
            return output

        return hook

    names = {name for slot in population.slots for name in slot.updates}
    handles = [model.get_submodule(n).register_forward_hook(hook_of(n)) for n in names]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_a_slot_at_gate_1_is_its_specialist_and_all_at_0_are_the_base(model, tokens):
    population = build_population(model)
    mixture = Mixture(model, population)
    base = model(tokens).logits
    gates = torch.zeros(*tokens.shape, mixture.num_slots)
    with mixture.mixed(gates):
        assert torch.equal(model(tokens).logits, base)
    for slot in range(mixture.num_slots):
        with applied(model, slot_adapter(population, slot)):
            expected = model(tokens).logits
        assert (expected - base).abs().max() > 0.1
        for one_hot in (torch.eye(mixture.num_slots)[slot], gates.clone()):
            one_hot[..., slot] = 1
            with mixture.mixed(one_hot):
                found = model(tokens).logits
            assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_gates_scale_updates_token_by_token(model, tokens):
    population = build_population(model)
    gates = draw_gates(tokens)
    with Mixture(model, population).mixed(gates):
        found = model(tokens).logits
    expected = slot_by_slot(model, population, gates, lambda: model(tokens).logits)
    assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_no_gates_are_all_ones(tiny_model, tokens):
    model = tiny_model()
    mixture = Mixture(model, build_population(model))
    with mixture.mixed():
        found = model(tokens).logits
    with mixture.mixed(torch.ones(*tokens.shape, mixture.num_slots)):
        assert torch.equal(model(tokens).logits, found)


MODEL = build_tiny_model("gpt_neox")


@settings(max_examples=15, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_constant_gates_are_the_weighted_sum_of_products(ranks, seed):
    population = build_population(MODEL, ranks)
    gates = torch.rand(len(ranks), generator=torch.Generator().manual_seed(seed))
    dense = {}
    for gate, slot in zip(gates, population.slots, strict=True):
        for name, update in slot.updates.items():
            dense[name] = dense.get(name, 0) + gate * update.product()
    updates = {name: LinearUpdate(dense=product) for name, product in dense.items()}
    merged = Adapter("merged", "delta", 0, updates, hash="", num_bytes=0)
    tokens = torch.arange(24).view(2, 12) + seed
    with applied(MODEL, merged):
        expected = MODEL(tokens).logits
    with Mixture(MODEL, population).mixed(gates):
        assert torch.allclose(MODEL(tokens).logits, expected, atol=1e-5)


@torch.no_grad()
def test_permuting_slots_permutes_gates_only(tiny_model, tokens):
    model = tiny_model("llama")
    population = build_population(model)
    order = [2, 0, 1]
    permuted = replace(population, slots=tuple(population.slots[i] for i in order))
    gates = draw_gates(tokens)
    with Mixture(model, population).mixed(gates):
        found = model(tokens).logits
    with Mixture(model, permuted).mixed(gates[..., order]):
        assert torch.allclose(model(tokens).logits, found, atol=1e-5)


@torch.no_grad()
def test_cached_steps_with_gates_of_new_positions_equal_the_full_pass(model, tokens):
    mixture = Mixture(model, build_population(model))
    gates = draw_gates(tokens)
    with mixture.mixed(gates):
        full = model(tokens).logits
    prompt, cache, steps = 5, None, []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))]:
        with mixture.mixed(gates[:, start:stop]):
            output = model(tokens[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    assert torch.allclose(torch.cat(steps, dim=1), full, atol=1e-4)


def test_gradients_equal_those_of_the_plain_loop(model, tokens):
    population = build_population(model)
    mixture = Mixture(model, population)
    gates = draw_gates(tokens).requires_grad_(True)
    with mixture.mixed(gates):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    found_gates, gates.grad = gates.grad, None
    leaves = [
        tensor.requires_grad_(True)
        for slot in population.slots
        for update in slot.updates.values()
        for tensor in (update.a, update.b)
    ]
    slot_by_slot(model, population, gates, lambda: model(tokens, labels=tokens).loss).backward()
    assert torch.allclose(found_gates, gates.grad, atol=1e-5)
    for name, layer in zip(mixture.names, mixture.layers, strict=True):
        updates = [slot.updates[name] for slot in population.slots if name in slot.updates]
        a = torch.cat([update.a.grad for update in updates])
        b = torch.cat([update.b.grad for update in updates], dim=1)
        assert torch.allclose(layer.a.grad, a, atol=1e-5)
        assert torch.allclose(layer.b.grad, b, atol=1e-5)
    assert all(leaf.grad is not None for leaf in leaves)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_moves_the_loss_and_reaches_the_slots(tiny_model, tokens):
    model = tiny_model()
    population = build_population(model, filling="fresh", num_slots=4)
    mixture = Mixture(model, population)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        with mixture.mixed():
            loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    trained = mixture.read_slots(population)
    with torch.no_grad(), mixture.mixed():
        expected = model(tokens).logits
    with torch.no_grad(), Mixture(model, trained).mixed():
        assert torch.equal(model(tokens).logits, expected)
    for old, new in zip(population.slots, trained.slots, strict=True):
        assert (new.birth, new.domain) == (old.birth, old.domain)
        assert all(not torch.equal(new.updates[n].b, u.b) for n, u in old.updates.items())


def test_reading_untrained_slots_gives_them_back(model):
    population = build_population(model)
    read = Mixture(model, population).read_slots(population)
    for old, new in zip(population.slots, read.slots, strict=True):
        assert list(new.updates) == list(old.updates)
        for name, update in old.updates.items():
            found = new.updates[name]
            assert torch.equal(found.a, update.a)
            assert torch.equal(found.b, update.b)
            assert found.scale == update.scale


def test_the_model_is_left_as_it_was(model, tokens):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mixture = Mixture(model, build_population(model))
    with pytest.raises(KeyError), mixture.mixed():
        raise KeyError
    with torch.no_grad(), mixture.mixed():
        model(tokens)
    assert all(not module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    inside = {id(parameter) for parameter in mixture.parameters()}
    assert not inside & {id(parameter) for parameter in model.parameters()}


class _CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


@torch.no_grad()
def test_as_many_operations_for_many_slots_as_for_two(tiny_model, tokens):
    model = tiny_model("qwen3")
    counts = []
    for num_slots in (2, 9):
        mixture = Mixture(model, build_population(model, [3] * num_slots))
        gates = draw_gates(tokens, num_slots)
        with _CountOperations() as operations, mixture.mixed(gates):
            model(tokens)
        counts.append(operations.count)
    assert counts[0] == counts[1]


@torch.no_grad()
def test_mixes_in_the_precision_of_the_base(tiny_model, tokens):
    model = tiny_model().bfloat16()
    mixture = Mixture(model, build_population(model))
    assert {parameter.dtype for parameter in mixture.parameters()} == {torch.float32}
    base = model(tokens).logits
    with mixture.mixed(torch.zeros(*tokens.shape, 3)):
        assert torch.equal(model(tokens).logits, base)
    with mixture.mixed(draw_gates(tokens)):
        found = model(tokens).logits
    assert found.dtype == torch.bfloat16
    assert not torch.equal(found, base)


@torch.no_grad()
def test_layers_that_get_positions_in_one_row_are_mixed_alike(tiny_model, tokens):
    model = tiny_model()
    mixture = Mixture(model, build_population(model))
    layer = model.get_submodule(mixture.names[0])
    inputs = torch.randn(*tokens.shape, layer.in_features)
    with mixture.mixed(draw_gates(tokens)):
        rows = layer(inputs.flatten(0, 1))
        assert torch.allclose(layer(inputs).flatten(0, 1), rows, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 24, 2), (24, 3), (2,), (2, 24, 3, 1)])
def test_refuses_gates_of_another_shape(shape, tiny_model):
    model = tiny_model()
    mixture = Mixture(model, build_population(model))
    with pytest.raises(PopulationError, match="expected gates"), mixture.mixed(torch.ones(shape)):
        pass


@pytest.mark.parametrize("shape", [(2, 1, 3), (1, 24, 3), (2, 25, 3), (24, 2, 3)])
def test_refuses_gates_of_other_positions(shape, tiny_model, tokens):
    model = tiny_model()
    mixture = Mixture(model, build_population(model))
    with (
        torch.no_grad(),
        mixture.mixed(torch.ones(shape)),
        pytest.raises(PopulationError, match="as many positions as gates"),
    ):
        model(tokens)


def test_refuses_a_second_use_at_once(tiny_model):
    model = tiny_model()
    mixture = Mixture(model, build_population(model))
    with (
        mixture.mixed(),
        pytest.raises(PopulationError, match="not to be in use"),
        mixture.mixed(),
    ):
        pass
    with mixture.mixed():  # and can be used again
        pass


def test_reads_slots_of_its_own_population_only(tiny_model):
    model = tiny_model()
    mixture = Mixture(model, build_population(model))
    with pytest.raises(PopulationError, match="expected a population of 3, got 2"):
        mixture.read_slots(build_population(model, RANKS[:2]))
    with pytest.raises(PopulationError, match="'g0-s2': expected the layers and ranks"):
        mixture.read_slots(build_population(model, (4, 1, 5)))
