"""Running a fit by sums: packing members' sums into vectors, and all rounds in one process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from molora_fed.errors import RoutingError
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.routing.fitting import check_calibration
from molora_fed.routing.summed import (
    Finished,
    FitSetting,
    SumEntry,
    SummedFit,
    SummedState,
    locate_domains,
    plan_summed_fit,
)
from molora_fed.types import Progress

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = [
    "AddUp",
    "SummedResult",
    "Vector",
    "add_plainly",
    "answer_round",
    "collect_setting",
    "count_entries",
    "fit_by_sums",
    "list_bounds",
    "pack_sums",
    "run_rounds",
    "unpack_sums",
    "weigh_domains",
]

Vector = NDArray[np.float64]
"""What one member answers in a round, (L,); L follows from the state."""

AddUp = Callable[[Sequence[Vector], Vector], Vector]
"""Adds members' vectors up, (L,) each; the second argument is the bound of every number, (L,)."""

_SLACK = 1e-6  # of a bound: rounding of the sums


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
        adapters=first.adapters.take(first.expert_names) if first.adapters else first.adapters,
        carried=first.carried,
    )


def weigh_domains(banks: Sequence["CalibrationBank"]) -> dict[str, float]:
    """Weight of a predicted token by domain: 1 / (domains x the domain's tokens in all banks)."""
    tokens: dict[str, int] = {}
    for bank in banks:
        blocks = np.bincount(bank.domain_of, minlength=len(bank.domains))
        for domain, count in zip(bank.domains, blocks.tolist(), strict=True):
            tokens[domain] = tokens.get(domain, 0) + count * (bank.block_size - 1)
    return {domain: 1 / (len(tokens) * count) for domain, count in tokens.items()}


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
        weights: Weight of a predicted token by domain, of each of the bank's.

    Raises:
        RoutingError: If the bank is of other experts or domains, a weight is missing, or the router
            breaks its word.
    """
    check_calibration(bank)
    if bank.expert_names != fit.setting.expert_names:
        raise RoutingError(
            f"Cannot fit by sums: expected experts {', '.join(fit.setting.expert_names)}, got "
            f"{', '.join(bank.expert_names)}. Build the bank from the admitted experts."
        )
    locate_domains(bank, fit.setting.domains)
    missing = sorted(set(bank.domains) - weights.keys())
    if missing:
        raise RoutingError(
            f"Cannot fit by sums: expected a weight for each of the bank's domains, got none for "
            f"{', '.join(missing)}. Ask the coordinator for all of them."
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
        RoutingError: If the router breaks its word, or needs more rounds or numbers than it said.
    """
    name, limits = type(fit).__name__, fit.limit_numbers()
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
        if count_entries(entries) > limits[done]:
            raise RoutingError(
                f"Cannot fit by sums with {name}: expected at most {limits[done]} numbers in round "
                f"{done + 1}, got {count_entries(entries)}. Correct its `limit_numbers`."
            )
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
