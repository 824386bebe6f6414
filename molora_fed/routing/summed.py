"""Fits by sums: how a router is fitted on text that stays with its owners.

In each round everybody gets the same small state and answers with sums over their own tokens; the
sums add up over members, and from the totals follows the next state, or the fitted router. A router
takes part through `OutputRouter.by_sums`; `fit_by_sums` runs all members in one process.
"""

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor
from typing_extensions import TypeVar, override

from molora_fed.errors import RoutingError
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.routing.fitting import check_calibration
from molora_fed.types import Mixture, Progress

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = [
    "AddUp",
    "Finished",
    "FitSetting",
    "SumEntry",
    "SummedFit",
    "SummedResult",
    "SummedState",
    "Vector",
    "add_plainly",
    "answer_round",
    "collect_setting",
    "count_entries",
    "fit_by_sums",
    "list_bounds",
    "locate_domains",
    "pack_sums",
    "plan_summed_fit",
    "run_rounds",
    "unpack_sums",
    "weigh_domains",
]

Vector = NDArray[np.float64]
"""What one member answers in a round, (L,); L follows from the state."""

AddUp = Callable[[Sequence[Vector], Vector], Vector]
"""Adds members' vectors up, (L,) each; the second argument is the bound of every number, (L,)."""

SummedState = Mapping[str, Tensor]
"""What everybody is sent at the beginning of a round."""

_SLACK = 1e-6  # of a bound: rounding of the sums


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
    """

    expert_names: tuple[str, ...]
    domains: tuple[str, ...]
    hidden_size: int
    tokens: int
    mixture: Mixture
    options: RouterOptions
    seed: int

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


OptionsT = TypeVar("OptionsT", bound=RouterOptions, default=RouterOptions)


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

    rounds: ClassVar[int]
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


class _NothingToFit(SummedFit[RouterOptions]):
    """Of routers that learn nothing."""

    rounds = 0

    @override
    def start(self) -> Finished:
        return Finished({})

    @override
    def entries(self, state: SummedState) -> Mapping[str, SumEntry]:
        raise NotImplementedError

    @override
    def measure(
        self, bank: "CalibrationBank", state: SummedState, weights: Mapping[str, float]
    ) -> Mapping[str, Tensor]:
        raise NotImplementedError

    @override
    def advance(self, state: SummedState, totals: Mapping[str, Tensor]) -> Finished:
        raise NotImplementedError


def plan_summed_fit(router: type[OutputRouter], setting: FitSetting) -> SummedFit:
    """How a router is fitted by sums.

    Args:
        router: Its class.
        setting: What all members agree on.

    Raises:
        RoutingError: If it cannot be fitted by sums, or the options are another router's.
    """
    options = router.narrow(setting.options)
    if _find_owner(router, "learn") is OutputRouter and not router.shapes(
        setting.num_experts, options
    ):
        return _NothingToFit(setting, options)
    # A class that learns in a way of its own cannot be fitted as the class it is derived from.
    is_own = issubclass(_find_owner(router, "by_sums"), _find_owner(router, "learn"))
    fit = router.by_sums(setting) if is_own else None
    if fit is None:
        raise RoutingError(
            f"Cannot fit router '{router.name or router.__name__}' by sums: expected a router with "
            "`by_sums`, got one that is fitted on pooled text only. Choose another router, or "
            "pool calibration text."
        )
    return fit


def _find_owner(router: type[OutputRouter], name: str) -> type:
    return next(each for each in router.__mro__ if name in vars(each))


def collect_setting(
    banks: Sequence["CalibrationBank"], options: RouterOptions, seed: int
) -> FitSetting:
    """What members of these banks agree on.

    Args:
        banks: One of each member.
        options: The router's.
        seed: Of whatever is drawn.

    Raises:
        RoutingError: If there is no bank, one is no calibration bank, or they are of different
            experts, widths or mixtures.
    """
    if not banks:
        raise RoutingError(
            "Cannot fit by sums: expected the bank of one member at least, got none. Give some."
        )
    for bank in banks:
        check_calibration(bank)
    first = banks[0]
    for bank in banks:
        for what in ("expert_names", "hidden_size", "mixture"):
            if getattr(bank, what) != getattr(first, what):
                raise RoutingError(
                    f"Cannot fit by sums: expected banks of equal {what}, got "
                    f"{getattr(first, what)} and {getattr(bank, what)}. Build them from the same "
                    "experts."
                )
    return FitSetting(
        expert_names=first.expert_names,
        domains=tuple(sorted({domain for bank in banks for domain in bank.domains})),
        hidden_size=first.hidden_size,
        tokens=sum(bank.num_blocks * (bank.block_size - 1) for bank in banks),
        mixture=first.mixture,
        options=options,
        seed=seed,
    )


def weigh_domains(banks: Sequence["CalibrationBank"]) -> dict[str, float]:
    """Weight of a predicted token by domain: 1 / (domains x the domain's tokens in all banks)."""
    tokens: dict[str, int] = {}
    for bank in banks:
        blocks = np.bincount(bank.domain_of, minlength=len(bank.domains))
        for domain, count in zip(bank.domains, blocks.tolist(), strict=True):
            tokens[domain] = tokens.get(domain, 0) + count * (bank.block_size - 1)
    return {domain: 1 / (len(tokens) * count) for domain, count in tokens.items() if count}


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


def count_entries(entries: Mapping[str, SumEntry]) -> int:
    """L, the length of an answer."""
    return sum(entry.size for entry in entries.values())


def list_bounds(entries: Mapping[str, SumEntry]) -> Vector:
    """Bound of every number of an answer, (L,)."""
    parts = [np.full(entry.size, entry.bound) for entry in entries.values()]
    return np.concatenate(parts) if parts else np.zeros(0)


def pack_sums(sums: Mapping[str, Tensor], entries: Mapping[str, SumEntry], *, who: str) -> Vector:
    """An answer as one vector, (L,).

    Args:
        sums: What `measure` gave.
        entries: What it should have given.
        who: The router's name, for errors.

    Raises:
        RoutingError: If names, shapes or dtypes are not as declared, or a number is not finite or
            beyond its bound.
    """
    faults = [name for name in sums if name not in entries]
    parts = []
    for name, entry in entries.items():
        values = sums.get(name)
        if (
            values is None
            or tuple(values.shape) != entry.shape
            or values.dtype != torch.float64
            or not bool((values.abs() <= entry.bound * (1 + _SLACK)).all())  # NaN is not
        ):
            faults.append(name)
            continue
        parts.append(values.detach().cpu().numpy().ravel())
    if faults:
        raise RoutingError(
            f"Cannot send sums of router '{who}': expected finite float64 sums as declared and "
            f"within their bounds, got others in {', '.join(sorted(faults))}. Correct its "
            "`entries` or `measure`."
        )
    return np.concatenate(parts) if parts else np.zeros(0)


def unpack_sums(vector: Vector, entries: Mapping[str, SumEntry]) -> dict[str, Tensor]:
    """The tensors of a vector of sums, float64.

    Raises:
        RoutingError: If it is no finite vector of the declared length.
    """
    length = count_entries(entries)
    if vector.shape != (length,) or not np.isfinite(vector).all():
        raise RoutingError(
            f"Cannot use sums: expected {length} finite numbers, got an array of shape "
            f"{vector.shape}. Ask the members again."
        )
    parts = np.split(vector.astype(np.float64), np.cumsum([e.size for e in entries.values()])[:-1])
    return {
        name: torch.from_numpy(part.copy()).reshape(entry.shape)
        for (name, entry), part in zip(entries.items(), parts, strict=True)
    }


def add_plainly(vectors: Sequence[Vector], bounds: Vector) -> Vector:
    """The sum of members' vectors, in their order, (L,)."""
    return np.sum(np.stack(vectors), axis=0)


def answer_round(
    fit: SummedFit, bank: "CalibrationBank", state: SummedState, weights: Mapping[str, float]
) -> Vector:
    """A member's side of a round: its vector, (L,).

    Args:
        fit: From `plan_summed_fit`.
        bank: The member's own.
        state: As it was sent.
        weights: Weight of a predicted token by domain.

    Raises:
        RoutingError: If the bank is of other experts or domains, or the router breaks its word.
    """
    check_calibration(bank)
    if bank.expert_names != fit.setting.expert_names:
        raise RoutingError(
            f"Cannot fit by sums: expected experts {', '.join(fit.setting.expert_names)}, got "
            f"{', '.join(bank.expert_names)}. Build the bank from the admitted experts."
        )
    sums = fit.measure(bank, state, weights)
    return pack_sums(sums, fit.entries(state), who=type(fit).__name__)


@dataclass(frozen=True)
class SummedResult:
    """What a fit by sums gives.

    Attributes:
        tensors: What was learned.
        rounds: Rounds it took.
        state_bytes: Size of the states that every member got, together.
        answer_numbers: Numbers that every member answered with, together.
    """

    tensors: Mapping[str, Tensor]
    rounds: int
    state_bytes: int
    answer_numbers: int


def run_rounds(
    fit: SummedFit,
    banks: Sequence["CalibrationBank"],
    weights: Mapping[str, float],
    *,
    add: AddUp = add_plainly,
    progress: Progress | None = None,
) -> SummedResult:
    """Run a fit to its end, all members in this process, through the calls a federation makes.

    Args:
        fit: From `plan_summed_fit`.
        banks: One of each member, in a fixed order.
        weights: Weight of a predicted token by domain.
        add: How members' vectors are added up.
        progress: Receives rounds done and at most.

    Raises:
        RoutingError: If the router breaks its word, or needs more rounds than it said.
    """
    name = type(fit).__name__
    state, done, state_bytes, numbers = fit.start(), 0, 0, 0
    while not isinstance(state, Finished):
        if done == fit.rounds:
            raise RoutingError(
                f"Cannot fit by sums with {name}: expected an end after {fit.rounds} rounds, got "
                "another state. Correct its `rounds` or `advance`."
            )
        state = load(_write(state))  # as a coordinator finds it again after a kill
        message = _write(fit.send(state))
        sent = load(message)
        entries = fit.entries(sent)
        vectors = [answer_round(fit, bank, sent, weights) for bank in banks]
        totals = unpack_sums(add(vectors, list_bounds(entries)), entries)
        state = fit.advance(state, totals)
        done += 1
        state_bytes += len(message)
        numbers += count_entries(entries)
        if progress is not None:
            progress(done, fit.rounds)
    return SummedResult(state.tensors, done, state_bytes, numbers)


def _write(state: SummedState) -> bytes:
    return save({name: tensor.detach().cpu().clone() for name, tensor in state.items()})


Router = TypeVar("Router", bound=OutputRouter)


def fit_by_sums(
    router: type[Router],
    banks: Sequence["CalibrationBank"],
    options: RouterOptions,
    seed: int,
    *,
    add: AddUp = add_plainly,
    progress: Progress | None = None,
) -> tuple[Router, SummedResult]:
    """Fit a router on the banks of several members without putting them together.

    Args:
        router: Its class.
        banks: One of each member, in a fixed order.
        options: Its options.
        seed: Of whatever is drawn.
        add: How members' vectors are added up.
        progress: Receives rounds done and at most.

    Returns:
        The router, on the CPU, and how it was found.

    Raises:
        RoutingError: If the router cannot be fitted by sums, or banks do not fit together.
    """
    setting = collect_setting(banks, options, seed)
    fit = plan_summed_fit(router, setting)
    result = run_rounds(fit, banks, weigh_domains(banks), add=add, progress=progress)
    return router(setting.num_experts, router.narrow(options), result.tensors), result
