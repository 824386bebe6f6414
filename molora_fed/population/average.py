"""The mean of branches that contributors adapted from one branch, each on texts of its own.

In a round everybody trains one factor of every slot's product B A, and the other is the same
everywhere; so the mean of the trained factors is the factor of the mean product, and nothing is
lost to a truncation. Rounds take the factors in turn.

Source: alternating factors of LoRA in federated averaging, arXiv 2502.01755 (RoLoRA); training B
alone, arXiv 2403.12313 (FFA-LoRA).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.errors import PopulationError
from molora_fed.population.adaptation import Factor
from molora_fed.population.contract import AdapterRouter, Slot
from molora_fed.population.evolution import Branch

__all__ = ["average_branches", "check_adapted", "choose_factor"]


def choose_factor(turn: int) -> Factor:
    """The factor that is trained in a round, from 0.

    B comes first: while a fresh slot's B is zero, its A has no gradient.
    """
    return "b" if turn % 2 == 0 else "a"


def check_adapted(found: Branch, start: Branch, *, who: str) -> None:
    """Refuse what is not the branch that was sent, adapted.

    Args:
        found: What a contributor returned, read and found finite.
        start: What it was sent.
        who: The contributor, for errors.

    Raises:
        PopulationError: If slots, layers, ranks or the router's parameters are others.
    """
    faults = []
    if len(found.population.slots) != len(start.population.slots):
        faults.append(f"{len(found.population.slots)} slots")
    for theirs, sent in zip(found.population.slots, start.population.slots, strict=False):
        if theirs.birth.id != sent.birth.id or _shapes(theirs) != _shapes(sent):
            faults.append(f"other layers or ranks in '{sent.birth.id}'")
    if _describe(found.router) != _describe(start.router):
        faults.append("another router")
    if faults:
        raise PopulationError(
            f"Cannot use the adapted population of '{who}': expected the slots and router it was "
            f"sent, got {'; '.join(faults[:5])}. Ask that contributor to run the same molora-fed "
            "version, or withdraw it."
        )


def _shapes(slot: Slot) -> dict[str, tuple[object, ...]]:
    return {
        name: (float(u.scale), *(tuple(t.shape) for t in u.tensors().values()))
        for name, u in slot.updates.items()
    }


def _describe(router: AdapterRouter) -> tuple[object, ...]:
    shapes = {name: tuple(value.shape) for name, value in router.state_dict().items()}
    return type(router), router.options, router.num_slots, router.width, shapes


def average_branches(
    start: Branch, adapted: Sequence[Branch], weights: Sequence[float], factor: Factor
) -> Branch:
    """The mean of branches that were adapted from one.

    Args:
        start: The branch that was sent to everybody; all but the trained tensors is taken from it.
        adapted: What came back, each found good by `check_adapted`.
        weights: Of each, summing to 1.
        factor: The factor that was trained; of the other, theirs is not looked at.
    """
    slots = []
    for index, sent in enumerate(start.population.slots):
        updates: dict[str, LinearUpdate] = {}
        for name, old in sent.updates.items():
            theirs = [one.population.slots[index].updates[name] for one in adapted]
            mean = _mean([own.tensors()[factor] for own in theirs], weights)
            tensors: Mapping[str, Tensor] = {**old.tensors(), factor: mean}
            updates[name] = LinearUpdate(a=tensors["a"], b=tensors["b"], scale=old.scale)
        slots.append(replace(sent, updates=updates))
    router = copy.deepcopy(start.router)
    states = [one.router.state_dict() for one in adapted]
    router.load_state_dict({name: _mean([s[name] for s in states], weights) for name in states[0]})
    return Branch(replace(start.population, slots=tuple(slots)), router.eval())


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Summed in double precision, in the order given; of equal tensors it is that tensor."""
    total = sum(weight * value.double() for weight, value in zip(weights, values, strict=True))
    return torch.as_tensor(total).to(values[0].dtype)
