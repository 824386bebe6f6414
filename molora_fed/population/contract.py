"""What a population is made of, and the contracts of its routers, scopes and operators.

A population is P slots, each a low-rank adapter of one base. An adapter router gives every slot a
gate at every token; the gates scale the slots' updates inside the layers:
`y = W x + sum_i g_i * s_i * B_i (A_i x)`. Adaptation trains adapters and router through the model;
a generation then measures fitness, and lifecycle operators replace slots.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from molora_fed.adapters.updates import LinearUpdate
from molora_fed.bank.views import GateReading, GateView
from molora_fed.guard import guarded
from molora_fed.plugins import Entry
from molora_fed.storage.options import PluginOptions

__all__ = [
    "AdapterRouter",
    "AdapterRouterOptions",
    "Birth",
    "Fitness",
    "FitnessScope",
    "LifecycleOperator",
    "LifecycleState",
    "LossTable",
    "OperatorOptions",
    "Population",
    "Slot",
]


@dataclass(frozen=True)
class Birth:
    """How an adapter came to be; its entry in the lineage.

    Attributes:
        id: Unique in the run, e.g. "g3-s2".
        operator: Registered name of the operator that made it, or several joined by "+" in their
            order; "admitted", "clone" or "fresh" for the first generation.
        parents: Ids of the adapters it came from; for an admitted one the name it was admitted
            under, which is no id of the population.
        generation: In which it was born; 0 is the start.
        seed: Of the random numbers of the operator, the first of several.
        fitness_before: Fitness of the adapter whose slot it took, nats; None at the start.
    """

    id: str
    operator: str
    parents: tuple[str, ...] = ()
    generation: int = 0
    seed: int = 0
    fitness_before: float | None = None


@dataclass(frozen=True, eq=False)
class Slot:
    """One adapter of a population.

    Attributes:
        birth: Where it came from.
        domain: Domain it is meant for; None if for none in particular.
        updates: Low-rank update by module name, `scale * b @ a`; ranks may differ by module.
        stale: Generations in a row its fitness was below the death threshold.
    """

    birth: Birth
    domain: str | None
    updates: Mapping[str, LinearUpdate] = field(repr=False)
    stale: int = 0


@dataclass(frozen=True, eq=False)
class Population:
    """P slots of one base.

    Attributes:
        base_weights: Fingerprint of the base.
        frozen_depth: K; no slot changes a block below it.
        slots: The slots, in a fixed order that routers know them by.
    """

    base_weights: str
    frozen_depth: int
    slots: tuple[Slot, ...]

    @property
    def num_slots(self) -> int:
        """P."""
        return len(self.slots)


class AdapterRouterOptions(PluginOptions):
    """Base of every adapter router's options: unknown keys are refused."""


class AdapterRouter(nn.Module, abc.ABC):
    """Gates of a population's slots, trained through the model.

    The gate at position t scales the slots' updates while token x_t is read, so it weighs the
    prediction of x_{t+1}, and may depend on x_0 .. x_t only.

    Attributes:
        Options: Pydantic model of its options.
        num_slots: P.
        width: D of the states it reads.
        entry: Who registered it; None of one that was made by hand.
    """

    Options: ClassVar[type[AdapterRouterOptions]] = AdapterRouterOptions
    entry: Entry | None = None

    def __init__(self, num_slots: int, width: int, options: AdapterRouterOptions) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.width = width
        self.options = options

    @classmethod
    @abc.abstractmethod
    def build(cls, num_slots: int, width: int, options: Any, seed: int) -> Self:
        """A fresh router for P slots and states of width D; the seed decides its start."""

    @classmethod
    @abc.abstractmethod
    def reads(cls, options: Any) -> frozenset[GateReading]:
        """The columns of the view it reads under these options."""

    @abc.abstractmethod
    def forward(self, view: GateView) -> Tensor:
        """Gates, (B, T, P), each in [0, 1]; they need not sum to 1."""

    def compute_gates(self, view: GateView) -> Tensor:
        """What `forward` gives, computed under the guard that names the plugin if it fails."""
        with nullcontext() if self.entry is None else guarded(self.entry, "gates"):
            gates: Tensor = self(view)
        return gates

    @abc.abstractmethod
    def set_progress(self, share: float) -> None:
        """Tell how much of the adaptation is done, in [0, 1]: anneals what is annealed."""

    @abc.abstractmethod
    def reset_slot(self, slot: int, parent: int | None, seed: int) -> None:
        """Prepare a slot for a newborn: the parent's gate parameters, or fresh ones if None."""


@dataclass(frozen=True, eq=False)
class LossTable:
    """Losses of a population and of its counterfactuals, as sums per document cluster.

    Attributes:
        domains: Domain names.
        domain_of: Index of each cluster's domain, (C,).
        counts: Predicted tokens of each cluster, (C,).
        base: Sum of the base's losses per cluster, (C,) nats.
        full: The same of the whole population.
        without: The same of the population without slot i, (P, C).
        passes: Evaluation passes through the model it took.
    """

    domains: tuple[str, ...]
    domain_of: NDArray[np.int64]
    counts: NDArray[np.float64]
    base: NDArray[np.float64]
    full: NDArray[np.float64]
    without: NDArray[np.float64]
    passes: int


@dataclass(frozen=True, eq=False)
class Fitness:
    """What every slot is worth to the population.

    Attributes:
        scope: Registered name of the scope.
        values: Fitness of each slot, (P,) nats: the loss the population would have more without it.
        errors: Standard errors by document cluster, (P,).
        by_domain: The same for each domain, (P, domains).
        regret: Loss of the population less that of the base by domain, (domains,) nats, below 0
            where slots help; a freed slot goes where it is largest.
    """

    scope: str
    values: NDArray[np.float64]
    errors: NDArray[np.float64]
    by_domain: NDArray[np.float64]
    regret: NDArray[np.float64]


FitnessScope = Callable[[LossTable], Fitness]
"""Registered by `register_fitness_scopes`."""


class OperatorOptions(PluginOptions):
    """Base of every operator's options: unknown keys are refused."""


class LifecycleOperator(abc.ABC):
    """One step of the lifecycle, registered as a class by `register_lifecycle_operators`.

    Operators run in the order the options name them; each gets what the one before left.

    Attributes:
        Options: Pydantic model of its options.
    """

    Options: ClassVar[type[OperatorOptions]] = OperatorOptions

    def __init__(self, options: Any) -> None:
        self.options = options

    @abc.abstractmethod
    def apply(self, state: "LifecycleState", seed: int) -> "LifecycleState":
        """The state after this operator; the same state and seed give the same bytes."""


@dataclass(frozen=True, eq=False)
class LifecycleState:
    """What operators hand on.

    Attributes:
        population: Its slots; a freed slot keeps its last adapter until it is filled.
        fitness: Of the population before the lifecycle.
        domains: Domain names, as in the fitness.
        generation: Number of this generation, from 1.
        freed: Slots whose adapter died and that nobody filled yet.
        parents: Slot each newborn's gate parameters come from, by slot; None starts fresh.
        events: One line for people per thing that happened.
    """

    population: Population
    fitness: Fitness
    domains: tuple[str, ...]
    generation: int
    freed: tuple[int, ...] = ()
    parents: Mapping[int, int | None] = field(default_factory=dict)
    events: Sequence[str] = ()
