"""Fits by sums: how a router is fitted on text that stays with its owners.

In each round everybody gets the same small state and answers with sums over their own tokens; the
sums add up over members, and from the totals follows the next state, or the fitted router. A router
takes part through `OutputRouter.by_sums`; `summed_run.fit_by_sums` runs all members in one process.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from molora_fed.adapters.carried_files import CarriedFiles, complete_carried
from molora_fed.bank.adapters import ExpertAdapters
from molora_fed.errors import RoutingError
from molora_fed.routing.contract import OptionsT, OutputRouter, RouterOptions
from molora_fed.types import Mixture

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = [
    "Finished",
    "FitSetting",
    "NoRounds",
    "SumEntry",
    "SummedFit",
    "SummedState",
    "find_owner",
    "learns_nothing",
    "locate_domains",
    "plan_summed_fit",
]

SummedState = Mapping[str, Tensor]
"""What everybody is sent at the beginning of a round."""


@dataclass(frozen=True)
class FitSetting:
    """What all members of a fit by sums agree on before the first round.

    Attributes:
        expert_names: Experts in the canonical order; E of them.
        domains: Domains, sorted; C of them.
        hidden_size: D.
        tokens: Predicted calibration tokens of all members together.
        mixture: How the fused model mixes.
        options: The router's options.
        seed: Of whatever is drawn.
        adapters: The experts' adapters by name, see `ExpertAdapters`; the coordinator and all
            members have the same.
        carried: What each expert's contribution carries, by the expert's name, as of a bank; all
            None where no expert is known yet and it is asked how much a fit will send.
    """

    expert_names: tuple[str, ...]
    domains: tuple[str, ...]
    hidden_size: int
    tokens: int
    mixture: Mixture
    options: RouterOptions
    seed: int
    adapters: ExpertAdapters = field(default_factory=ExpertAdapters, repr=False, compare=False)
    carried: Mapping[str, CarriedFiles] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "carried", complete_carried(self.carried, self.expert_names))

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.expert_names)


@dataclass(frozen=True)
class SumEntry:
    """One tensor of a member's answer.

    Attributes:
        shape: Its shape.
        bound: No number of a member's answer, nor of the members' total, is larger in size; what
            masking in fixed point and clipping take as the range.
    """

    shape: tuple[int, ...]
    bound: float

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Finished:
    """The end of a fit.

    Attributes:
        tensors: Everything learned, named and shaped as the router's `shapes` says.
    """

    tensors: Mapping[str, Tensor]


class SummedFit(abc.ABC, Generic[OptionsT]):
    """How a router is fitted in rounds of sums; it remembers nothing between two calls.

    The coordinator calls `start` and `advance`, a member `measure`, perhaps in another process and
    on another day: what a round needs is in the state. The equal-weight mean of a number over the
    domains is its sum over all members' tokens, each times the weight of its domain (see
    `weigh_domains`), so that a total never has to be told apart by domain.

    Attributes:
        rounds: Largest number of rounds.
        uses_seed: Whether another seed gives another router.
        setting: What all agree on.
    """

    rounds: int
    uses_seed: ClassVar[bool] = False

    def __init__(self, setting: FitSetting, options: OptionsT) -> None:
        self.setting = setting
        self.options = options

    @abc.abstractmethod
    def start(self) -> SummedState | Finished:
        """State of the first round; `Finished` where there is nothing to fit."""

    def send(self, state: SummedState) -> SummedState:
        """What members get of a state; the coordinator alone keeps the rest until `advance`."""
        return state

    @abc.abstractmethod
    def entries(self, state: SummedState) -> Mapping[str, SumEntry]:
        """Names, shapes and bounds of the answer to a state, in the order they are sent in.

        It is asked of the state as it was sent.
        """

    def limit_numbers(self) -> tuple[int, ...]:
        """Most numbers of the answer to each round, known before the first; `rounds` of them.

        Members agree to these, and refuse a state that asks for more. A fit whose later rounds ask
        for other numbers than the first says so here.
        """
        state = self.start()
        if isinstance(state, Finished):
            return ()
        entries = self.entries(self.send(state))
        return (sum(entry.size for entry in entries.values()),) * self.rounds

    @abc.abstractmethod
    def measure(
        self, bank: "CalibrationBank", state: SummedState, weights: Mapping[str, float]
    ) -> Mapping[str, Tensor]:
        """Sums over the tokens of a member's own bank.

        Sums of the parts of a bank add up to those of the bank, whichever blocks are in which.

        Args:
            bank: The member's own; its domains are some of the setting's.
            state: Of this round, as it was sent.
            weights: Weight of a predicted token by domain, of the bank's domains at least; over
                all members' tokens weights sum to 1.

        Returns:
            float64, as `entries` says.
        """

    @abc.abstractmethod
    def advance(self, state: SummedState, totals: Mapping[str, Tensor]) -> SummedState | Finished:
        """What follows from the members' total answer.

        Args:
            state: Of the round that was answered, all of it.
            totals: float64, as `entries` says.
        """


class NoRounds(SummedFit[RouterOptions]):
    """Of routers that learn nothing of text: what they learned is known before the first round.

    Args:
        setting: What all agree on.
        options: The router's.
        tensors: What it learned, of the adapters say, as the router's `shapes` says.
    """

    rounds = 0

    def __init__(
        self, setting: FitSetting, options: RouterOptions, tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__(setting, options)
        self._tensors = tensors

    @override
    def start(self) -> Finished:
        return Finished(self._tensors)

    @override
    def entries(self, state: SummedState) -> Mapping[str, SumEntry]:
        return {}

    @override
    def measure(
        self, bank: "CalibrationBank", state: SummedState, weights: Mapping[str, float]
    ) -> Mapping[str, Tensor]:
        return {}

    @override
    def advance(self, state: SummedState, totals: Mapping[str, Tensor]) -> Finished:
        return self.start()


def plan_summed_fit(router: type[OutputRouter], setting: FitSetting) -> SummedFit:
    """How a router is fitted by sums.

    Args:
        router: Its class.
        setting: What all members agree on.

    Raises:
        RoutingError: If it cannot be fitted by sums, or the options are another router's.
    """
    options = router.narrow(setting.options)
    if learns_nothing(router, setting.num_experts, options):
        return NoRounds(setting, options, {})
    # A class that learns in a way of its own cannot be fitted as the class it is derived from.
    is_own = issubclass(find_owner(router, "by_sums"), find_owner(router, "learn"))
    fit = router.by_sums(setting) if is_own else None
    if fit is None:
        raise RoutingError(
            f"Cannot fit router '{router.name or router.__name__}' by sums: expected a router with "
            "`by_sums`, got one that is fitted on pooled text only. Choose another router, or "
            "pool calibration text."
        )
    return fit


def learns_nothing(router: type[OutputRouter], num_experts: int, options: RouterOptions) -> bool:
    """Whether a router is the same whatever the text.

    Args:
        router: Its class.
        num_experts: E.
        options: Its own.
    """
    is_plain = find_owner(router, "learn") is OutputRouter
    return is_plain and not router.shapes(num_experts, options)


def find_owner(router: type[OutputRouter], name: str) -> type:
    """The class whose method of that name a router has."""
    return next(each for each in router.__mro__ if name in vars(each))


def locate_domains(bank: "CalibrationBank", domains: Sequence[str]) -> Tensor:
    """Index into `domains` of each block of a bank, (N,) int64.

    Raises:
        RoutingError: If the bank has a domain that is not among them.
    """
    unknown = sorted(set(bank.domains) - set(domains))
    if unknown:
        raise RoutingError(
            f"Cannot fit by sums: expected blocks of {', '.join(domains)}, got some of "
            f"{', '.join(unknown)}. Build the bank from blocks of the cooperative's domains."
        )
    index = np.array([domains.index(domain) for domain in bank.domains])
    return torch.from_numpy(index[bank.domain_of])
