"""Losses of tokens without all logits at once, against the model as it is called."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from molora_fed.models import head as heads
from molora_fed.models.head import find_head

TOKENS = torch.randint(0, 60, (3, 17), generator=torch.Generator().manual_seed(2))


def compute_whole(model, tokens):
    """The same losses from a plain call and all logits."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view(len(tokens), -1)


@pytest.fixture(params=["head frozen", "head trained"])
def prepared(request, model, monkeypatch):
    """A model of every architecture with some or all of its weights free; seven rows at a time."""
    monkeypatch.setattr(heads, "_LEAST_ROWS", 7)
    monkeypatch.setattr(heads, "_LOGITS_AT_ONCE", 1)
    model.requires_grad_(True)
    if request.param == "head frozen":
        for module in (model.get_output_embeddings(), model.get_input_embeddings()):
            module.requires_grad_(False)
    return model.train()


def test_losses_and_gradients_are_those_of_the_whole_model(prepared):
    found = []
    for compute in (compute_whole, lambda model, tokens: find_head(model).compute_losses(tokens)):
        losses = compute(prepared, TOKENS)
        losses.mean().backward()
        named = prepared.named_parameters()
        found.append((losses.detach(), {n: p.grad for n, p in named if p.grad is not None}))
        prepared.zero_grad()
    (whole, expected), (parts, gradients) = found
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_finding_the_head_leaves_the_model_as_it_was(model):
    model.train()
    before = copy.deepcopy(model.state_dict())
    find_head(model)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_that_does_more_than_its_head_is_not_split(tiny_model):
    model = tiny_model("llama")
    assert find_head(model) is not None

    def change(logits):
        other = tiny_model("llama")
        call = other.forward

        def forward(**inputs):
            found = call(**inputs)
            found.logits = logits(found.logits)
            return found

        other.forward = forward
        return other

    assert find_head(change(lambda logits: -2 * logits)).readout.scale == pytest.approx(-2)
    assert find_head(change(lambda logits: logits**3)) is None
    model.register_forward_hook(lambda *_: None)
    assert find_head(model) is None  # whoever watches the model sees all its passes


class _Watching(TorchDispatchMode):
    """Notes how many rows over the vocabulary each new tensor has."""

    def __init__(self, model):
        super().__init__()
        self.vocabulary, self.width = model.get_output_embeddings().weight.shape
        self.rows = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor) and each.shape[-1:] == (self.vocabulary,):
                rows = each.shape[:-1].numel()
                if rows != self.width:  # the head itself, transposed
                    self.rows.append(rows)
        return made


def test_no_tensor_of_all_logits_exists(tiny_model, monkeypatch):
    """Of 3 x 16 positions at most seven rows over the vocabulary are there at a time."""
    monkeypatch.setattr(heads, "_LEAST_ROWS", 7)
    monkeypatch.setattr(heads, "_LOGITS_AT_ONCE", 1)
    model = tiny_model("llama").requires_grad_(True)
    model.get_output_embeddings().requires_grad_(False)
    head = find_head(model)
    with _Watching(model) as watching:
        head.compute_losses(TOKENS).mean().backward()
    assert watching.rows and max(watching.rows) <= 7
