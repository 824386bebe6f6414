"""The collapse guard: a router that loses a domain is refitted from another start, or replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from molora_fed.evaluation.evaluate import compute_domain_losses, compute_router_losses
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.routing.summed import (
    Finished,
    FitSetting,
    SumEntry,
    SummedFit,
    SummedState,
    locate_domains,
)
from molora_fed.types import Progress

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = [
    "Attempt",
    "GuardedRouter",
    "SummedJudgement",
    "choose_published",
    "compare_attempt",
    "compute_best_expert_losses",
    "fit_guarded",
    "keep_best",
]

_LARGEST_LOSS = 100.0  # nats; in sums a token that costs more counts as this much

Router = TypeVar("Router", bound=OutputRouter)


@dataclass(frozen=True)
class Attempt:
    """One fit.

    Attributes:
        seed: It was fitted with.
        loss_nats: Equal-weight calibration loss.
        excess_nats: Calibration loss above the domain's best expert, by domain.
        collapsed: Domains whose excess is above the threshold.
    """

    seed: int
    loss_nats: float
    excess_nats: Mapping[str, float]
    collapsed: tuple[str, ...]


@dataclass(frozen=True)
class GuardedRouter(Generic[Router]):
    """The router that was kept, and how it was found.

    Attributes:
        router: The one with the fewest collapsed domains, then the lowest loss.
        attempts: All fits, in order; none where no text was there to judge it on.
        kept: Index of the attempt that was kept.
    """

    router: Router
    attempts: tuple[Attempt, ...]
    kept: int

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Domains that the router still loses."""
        return self.attempts[self.kept].collapsed if self.attempts else ()

    def to_json(self) -> dict[str, Any]:
        """The router's entry of `guard` in report.json."""
        return {
            "kept": self.kept,
            "collapsed": list(self.collapsed),
            "attempts": [
                {**vars(a), "excess_nats": dict(a.excess_nats), "collapsed": list(a.collapsed)}
                for a in self.attempts
            ],
        }


def compute_best_expert_losses(bank: "CalibrationBank") -> dict[str, float]:
    """Calibration loss of each domain's best expert, nats per token."""
    tables = [compute_domain_losses(bank, bank.expert_nll(e)) for e in range(bank.num_experts)]
    return {domain: min(table[domain] for table in tables) for domain in bank.domains}


def fit_guarded(
    router: type[Router],
    bank: "CalibrationBank",
    options: RouterOptions,
    seed: int,
    *,
    collapse_nats: float = 0.05,
    restarts: int = 3,
    progress: Progress | None = None,
) -> GuardedRouter[Router]:
    """Fit a router, and again from another seed while a domain is lost.

    Args:
        router: Class of the router.
        bank: Calibration bank with the columns it reads.
        options: Its options.
        seed: Of the first fit; each later one adds 1.
        collapse_nats: A domain whose loss is this far above its best expert's is lost.
        restarts: Largest number of further fits. A router whose fit does not depend on the seed
            is fitted twice at most.
        progress: Handed to each fit.

    Returns:
        The best of the fits; it may still lose a domain, which the caller reports.

    Raises:
        RoutingError: If the router cannot be fitted on this bank.
    """
    best_expert = compute_best_expert_losses(bank)
    fits: list[Router] = []
    attempts: list[Attempt] = []
    for number in range(restarts + 1):
        fitted = router.fit(bank, options, seed + number, progress)
        if fits and _equal(fits[-1].state_tensors(), fitted.state_tensors()):
            break
        fits.append(fitted)
        attempts.append(_judge(bank, fitted, seed + number, best_expert, collapse_nats))
        if not attempts[-1].collapsed:
            break
    return keep_best(fits, attempts)


class SummedJudgement(SummedFit[RouterOptions]):
    """One round that judges a fitted router: losses by domain, its own and every expert's.

    Args:
        setting: What all agree on.
        router: Class of the router.
        tensors: What it learned.
    """

    rounds = 1

    def __init__(
        self, setting: FitSetting, router: type[OutputRouter], tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__(setting, router.narrow(setting.options))
        self._router = router
        self._tensors = tensors

    @override
    def start(self) -> SummedState:
        return self._tensors

    @override
    def entries(self, state: SummedState) -> dict[str, SumEntry]:
        domains = len(self.setting.domains)
        return {
            "router": SumEntry((domains,), _LARGEST_LOSS),
            "experts": SumEntry((domains, self.setting.num_experts), _LARGEST_LOSS),
        }

    @override
    def measure(
        self, bank: "CalibrationBank", state: SummedState, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        router = self._router(self.setting.num_experts, self.options, state)
        domains = self.setting.domains
        by_domain = torch.tensor([weights.get(d, 0.0) for d in domains], dtype=torch.float64)
        domain_of = locate_domains(bank, domains)

        def add(nll: Tensor) -> Tensor:
            per_block = nll.double().cpu().clamp(0.0, _LARGEST_LOSS).sum(dim=1)
            total = torch.zeros(len(domains), dtype=torch.float64)
            return total.index_add_(0, domain_of, per_block) * by_domain * len(domains)

        experts = [add(bank.expert_nll(expert)) for expert in range(bank.num_experts)]
        return {
            "router": add(compute_router_losses(bank, router).nll),
            "experts": torch.stack(experts, dim=1),
        }

    @override
    def advance(self, state: SummedState, totals: Mapping[str, Tensor]) -> Finished:
        return Finished(totals)


def keep_best(fits: Sequence[Router], attempts: Sequence[Attempt]) -> GuardedRouter[Router]:
    """Of fitted routers the one with the fewest collapsed domains, then the lowest loss."""
    kept = min(range(len(attempts)), key=lambda index: _rank(attempts[index]))
    return GuardedRouter(fits[kept], tuple(attempts), kept)


def choose_published(guarded: Mapping[str, GuardedRouter[Any]], router: str, fallback: str) -> str:
    """Name of the router to publish: the chosen one, or the last resort if that collapsed.

    Args:
        guarded: Fitted routers by name.
        router: The chosen router.
        fallback: The last resort; empty, or a router that was not fitted, if there is none.

    Returns:
        `fallback` if it loses fewer domains than `router` does after all its refits.
    """
    found = guarded.get(fallback)
    if found is not None and len(found.collapsed) < len(guarded[router].collapsed):
        return fallback
    return router


def _judge(
    bank: "CalibrationBank",
    router: OutputRouter,
    seed: int,
    best_expert: Mapping[str, float],
    collapse_nats: float,
) -> Attempt:
    losses = compute_domain_losses(bank, compute_router_losses(bank, router).nll)
    return compare_attempt(losses, seed, best_expert, collapse_nats)


def compare_attempt(
    losses: Mapping[str, float],
    seed: int,
    best_expert: Mapping[str, float],
    collapse_nats: float,
) -> Attempt:
    """A fit as its calibration losses show it.

    Args:
        losses: The fitted router's by domain, nats per token.
        seed: It was fitted with.
        best_expert: Of each domain's best expert.
        collapse_nats: A domain whose loss is this far above its best expert's is lost.
    """
    excess = {domain: loss - best_expert[domain] for domain, loss in losses.items()}
    collapsed = tuple(domain for domain, nats in excess.items() if nats > collapse_nats)
    return Attempt(seed, sum(losses.values()) / len(losses), excess, collapsed)


def _rank(attempt: Attempt) -> tuple[int, float]:
    return len(attempt.collapsed), attempt.loss_nats


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
