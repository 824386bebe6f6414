"""How a state enters a decoder block, held against what the block's layers are given."""

import pytest
import torch

from molora_fed.models.block_input import find_block_input
from molora_fed.models.layout import adaptable_modules
from molora_fed.models.states import Capture, capture_states


@pytest.fixture
def shaken(model):
    """Norms of a trained model are not all ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name.replace("ln_", "norm"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("depth", [0, 1])
def test_the_layers_that_are_named_are_given_the_normalised_state(shaken, depth, tokens):
    entry = find_block_input(shaken, depth)
    assert entry.block.endswith(f".{depth}")
    assert entry.modules and set(entry.modules) <= adaptable_modules(shaken, depth).keys()
    given = {}
    hooks = [
        shaken.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: given.__setitem__(name, args[0])
        )
        for name in entry.modules
    ]
    with capture_states(shaken, Capture(prefix_depth=depth)) as states, torch.no_grad():
        shaken(tokens)
    for hook in hooks:
        hook.remove()
    found = entry.normalise(states["prefix"])
    for name in entry.modules:
        assert torch.allclose(found, given[name], atol=1e-4), name


def test_looking_leaves_the_model_as_it_is(shaken):
    shaken.train()
    before = {name: tensor.clone() for name, tensor in shaken.state_dict().items()}
    find_block_input(shaken, 1)
    assert shaken.training
    assert all(torch.equal(before[name], tensor) for name, tensor in shaken.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in shaken.modules())


def test_a_block_without_an_input_norm_reads_the_state_itself(tiny_model):
    model = tiny_model("llama").eval()
    _skip_norm(model.model.layers[1])
    entry = find_block_input(model, 1)
    assert entry.norm is None
    assert entry.modules[0].endswith("q_proj")
    states = torch.randn(1, 2, 32)
    assert torch.equal(entry.normalise(states), states)


def test_a_norm_of_another_form_is_not_guessed(tiny_model):
    model = tiny_model("llama").eval()
    norm = model.model.layers[1].input_layernorm
    plain = type(norm).forward
    norm.forward = lambda hidden: plain(norm, hidden).tanh()
    entry = find_block_input(model, 1)
    assert (entry.modules, entry.norm) == ((), None)


def _skip_norm(block):
    block.input_layernorm = torch.nn.Identity()
