"""Lifecycle operators that decide which slots are freed and what they are for.

Source: arXiv 2605.11153, abstract; rules and options are our own definition.
"""

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from molora_fed.population.contract import LifecycleOperator, LifecycleState, OperatorOptions

__all__ = ["Death", "DeathOptions", "SlotReallocation"]


class DeathOptions(OperatorOptions):
    """Options of `death`.

    Attributes:
        threshold: Fitness below which a slot is not worth its place, nats.
        patience: Generations in a row it must have been below.
        min_age: Generations an adapter must have lived since its birth; younger ones are spared.
        at_most: Deaths per generation. Fitness says what one slot is worth while all others are
            there, so that two copies of one adapter both look useless: one at a time.
    """

    threshold: float = Field(default=0.001, allow_inf_nan=False)
    patience: int = Field(default=2, ge=1)
    min_age: int = Field(default=2, ge=1)
    at_most: int = Field(default=1, ge=1)


class Death(LifecycleOperator):
    """Frees the least fit slots; at least one slot always lives."""

    Options: ClassVar[type[OperatorOptions]] = DeathOptions

    def apply(self, state: LifecycleState, seed: int) -> LifecycleState:
        """Count generations below the threshold, and free slots that were there too long."""
        options = self.options
        values = state.fitness.values
        slots = [
            slot
            if index in state.freed
            else replace(slot, stale=slot.stale + 1 if values[index] < options.threshold else 0)
            for index, slot in enumerate(state.population.slots)
        ]
        dying = [
            index
            for index, slot in enumerate(slots)
            if index not in state.freed
            and slot.stale >= options.patience
            and state.generation - slot.birth.generation >= options.min_age
        ]
        spare = len(slots) - len(state.freed) - 1
        dying = sorted(dying, key=lambda index: (values[index], index))
        dying = sorted(dying[: max(0, min(options.at_most, spare))])
        events = [
            f"'{slots[index].birth.id}' in slot {index} dies: fitness {values[index]:+.4f} nats, "
            f"below {options.threshold} for {slots[index].stale} generations"
            for index in dying
        ]
        return replace(
            state,
            population=replace(state.population, slots=tuple(slots)),
            freed=tuple(sorted({*state.freed, *dying})),
            events=(*state.events, *events),
        )


class SlotReallocation(LifecycleOperator):
    """Gives freed slots to the domains with the largest regret; fills none of them."""

    def apply(self, state: LifecycleState, seed: int) -> LifecycleState:
        """The first freed slot goes to the domain of largest regret, the next to the second."""
        regret = state.fitness.regret
        order = sorted(range(len(state.domains)), key=lambda index: (-regret[index], index))
        slots = list(state.population.slots)
        events = list(state.events)
        for place, slot in enumerate(state.freed):
            domain = order[place % len(order)]
            name = state.domains[domain]
            events.append(
                f"slot {slot} goes to '{name}': loss {regret[domain]:+.4f} nats against the base"
            )
            slots[slot] = replace(slots[slot], domain=name)
        population = replace(state.population, slots=tuple(slots))
        return replace(state, population=population, events=tuple(events))
