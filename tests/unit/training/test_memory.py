"""What a training says that it needs, and what is refused before it starts."""

import pytest
import torch
from training_helpers import train_counting

from molora_fed.adapters.kinds import LoraKind
from molora_fed.charter import AdapterRules
from molora_fed.errors import ComputeError
from molora_fed.models import runtime
from molora_fed.models.base import load_base
from molora_fed.models.head import find_head
from molora_fed.models.runtime import Placement
from molora_fed.testing.models import ARCHITECTURES
from molora_fed.training import memory
from molora_fed.training.choices import TrainingChoices
from molora_fed.training.memory import TrainingSize, count_activations, estimate_bytes

SIZE = TrainingSize(rows=4, parts=1, length=24, validation_rows=1, checkpointing=False)


def prepare(model):
    model, parameters = LoraKind().prepare(model, AdapterRules(), 4)
    return model, find_head(model), parameters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_of_a_few_tokens_tell_those_of_many(tiny_model, architecture):
    model, head, _ = prepare(tiny_model(architecture))
    few = count_activations(model, head, 24)
    exact = memory._count_kept(model, head.decoder, 96)
    found = few.fixed + 96 * few.linear + 96**2 * few.square
    assert found == pytest.approx(exact, rel=1e-3)


def test_counting_changes_nothing(tiny_model):
    model, head, parameters = prepare(tiny_model())
    before, random = [p.detach().clone() for p in parameters], torch.get_rng_state()
    count_activations(model, head, 24)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert all(p.grad is None for p in parameters)
    assert torch.equal(random, torch.get_rng_state())


def estimate(tiny_model, **changes):
    model, head, parameters = prepare(tiny_model())
    activations = count_activations(model, head, 24)
    size = TrainingSize(**{**vars(SIZE), "length": 2_000, **changes})
    return estimate_bytes(model, head, parameters, activations, size, Placement())


def test_smaller_parts_and_activations_made_again_need_less(tiny_model):
    whole = estimate(tiny_model)
    assert estimate(tiny_model, rows=8) > whole > estimate(tiny_model, parts=4)
    assert estimate(tiny_model, parts=9) == estimate(tiny_model, parts=4)  # a block at least
    assert estimate(tiny_model, checkpointing=True) < whole
    assert SIZE.rows_at_once == 4


def test_whole_layers_need_gradient_moments_and_best_values(tiny_model):
    model = tiny_model().requires_grad_(True)
    parameters = list(model.parameters())
    activations = count_activations(model, find_head(model), 24)
    needed = estimate_bytes(model, find_head(model), parameters, activations, SIZE, Placement())
    assert needed >= 16 * sum(p.numel() for p in parameters)


def test_what_it_needs_and_what_is_free_is_told_before_the_first_step(tiny_checkpoint, tmp_path):
    told = []
    train_counting(
        load_base(tiny_checkpoint()), tmp_path, kind="lora",
        on_memory=lambda needed, free: told.append((needed, free)),
        progress=lambda done, total, **fields: told.append(done),
    )  # fmt: skip
    needed, free = told[0]
    assert 0 < needed < free and all(isinstance(one, int) for one in told[1:])


def test_a_training_that_does_not_fit_is_refused_with_what_makes_it_fit(
    tiny_checkpoint, tmp_path, monkeypatch
):
    base = load_base(tiny_checkpoint())
    told = []

    def find_free(device):
        return told[0] - 1 if told else 10**12

    monkeypatch.setattr(memory, "find_free_bytes", find_free)
    monkeypatch.setattr(runtime, "find_free_bytes", find_free)
    train_counting(
        base, tmp_path / "fits", kind="lora", on_memory=lambda needed, _: told.append(needed)
    )
    with pytest.raises(
        ComputeError,
        match=r"Cannot train beside the base: needs about .* on cpu, .* are free\. With "
        r"--checkpointing --accumulation 4 it is about .*\.",
    ) as error:
        train_counting(base, tmp_path / "refused", kind="lora")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "refused").glob("*"))
    choices = TrainingChoices(checkpointing=True, accumulation=4)
    monkeypatch.setattr(memory, "find_free_bytes", lambda device: 0)
    monkeypatch.setattr(runtime, "find_free_bytes", lambda device: 0)
    with pytest.raises(ComputeError, match="Use --dtype bfloat16, an adapter of fewer numbers"):
        train_counting(base, tmp_path / "none", kind="lora", choices=choices)


def test_whole_linear_layers_are_refused_before_they_are_copied(
    tiny_checkpoint, tmp_path, monkeypatch
):
    base = load_base(tiny_checkpoint())
    monkeypatch.setattr(runtime, "find_free_bytes", lambda device: 1_000)
    with pytest.raises(ComputeError, match="Cannot train whole linear layers: needs about"):
        train_counting(base, tmp_path, kind="svd")
