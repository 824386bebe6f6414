"""The only evaluator: every loss that is reported or decided on is computed here."""

import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.errors import BankError, RoutingError
from molora_fed.evaluation.bootstrap import (
    ClusterIndex,
    compute_interval,
    resample_domain_means,
)
from molora_fed.evaluation.composition import (
    RESERVED_NAMES,
    MethodLosses,
    compose_baseline_gains,
    compose_report,
    name_fused,
    name_specialist,
)
from molora_fed.forecasting.divergence import reduce_percent
from molora_fed.routing.probes import find_distribution_fault
from molora_fed.types import Progress

if TYPE_CHECKING:
    from molora_fed.bank import Bank, HeldOutBank
    from molora_fed.routing.contract import OutputRouter

__all__ = [
    "Evaluation",
    "RouterLosses",
    "compute_best_domains",
    "compute_domain_losses",
    "compute_excess",
    "compute_router_losses",
    "evaluate",
]


BASELINE_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
"""What a non-expert model may be called in reports, e.g. "weight_average"."""

_GATES_NATS = 2e-2  # what gates that sum to 1 within their dtype's rounding may gain
_SUMS_NATS = 0.01  # rounding of float32 sums over a block


@dataclass(frozen=True, eq=False)
class RouterLosses:
    """What a router does on a bank.

    Attributes:
        nll: Loss of every predicted token in nats, (N, T-1) float32.
        gates: Mean gate of every expert by domain, (domains, E).
    """

    nll: Tensor
    gates: NDArray[np.float64]


@torch.no_grad()
def compute_router_losses(bank: "Bank", router: "OutputRouter | None") -> RouterLosses:
    """Run a router over a whole bank.

    Args:
        bank: Calibration or held-out.
        router: A fitted router; None gives every expert the same gate.

    Returns:
        Losses under the bank's mixture, and mean gates of the positions that predict.

    Raises:
        RoutingError: If gates are no distribution over the bank's experts, or a loss lies below
            that of the best expert at a token, which no mixture of probabilities can do.
    """
    nll = torch.empty(bank.num_blocks, bank.block_size - 1)
    gate_sums = np.zeros((len(bank.domains), bank.num_experts))
    for rows in bank.chunks():
        gates = bank.uniform_gates(rows)
        if router is not None:
            shape, gates = tuple(gates.shape), router.gates(bank.view(rows))
            _check_router(router, find_distribution_fault(gates, shape))
        nll[rows] = bank.nll(gates, rows).cpu()
        if bank.readout is None and router is not None:
            _check_router(router, _find_impossible(bank, nll[rows], rows))
        per_block = gates[:, :-1].double().mean(dim=1).cpu().numpy()
        np.add.at(gate_sums, bank.domain_of[rows], per_block)
    blocks = np.bincount(bank.domain_of, minlength=len(bank.domains))
    return RouterLosses(nll, gate_sums / blocks[:, None])


def _check_router(router: "OutputRouter", fault: str | None) -> None:
    if fault is not None:
        name = router.name or type(router).__name__
        raise RoutingError(f"Cannot use router '{name}': {fault}. Correct its gates.")


def _find_impossible(bank: "Bank", nll: Tensor, rows: slice) -> str | None:
    """Describe losses below the token oracle, or return None."""
    below = -bank.logprob[rows, 1:].amax(dim=-1) - nll
    if not bool((below > _GATES_NATS).any()):
        return None
    return (
        "expected no loss below that of the best expert at a token, got one lower by "
        f"{float(below.max()):.3f} nats"
    )


def compute_domain_losses(
    bank: "Bank", nll: Tensor, rows: NDArray[np.int64] | None = None
) -> dict[str, float]:
    """Mean loss of each domain, nats per token.

    Args:
        bank: The bank that `nll` was computed on.
        nll: Loss of every predicted token, (N, T-1) nats.
        rows: Which of the bank's blocks these are, (N,), some of every domain; None means all.
    """
    per_block = nll.double().mean(dim=1).cpu().numpy()
    domain_of = bank.domain_of if rows is None else bank.domain_of[rows]
    return {
        domain: float(per_block[domain_of == index].mean())
        for index, domain in enumerate(bank.domains)
    }


def compute_excess(bank: "Bank", nll: Tensor) -> Tensor:
    """How much more each part of a document costs than under its best expert, nats.

    A part is what a block holds of a document, without its first token: nobody has read anything
    of the document there.

    Args:
        bank: The bank that `nll` was computed on.
        nll: Loss of every predicted token, (N, T-1) nats.

    Returns:
        (P,) float64, parts of at least one token in the bank's order; below 0 where mixing beats
        every expert.
    """
    starts = bank.document_starts.clone()
    starts[:, 0] = True
    parts = starts.flatten().long().cumsum(0).view(starts.shape) - 1  # (N, T)
    inside = ~starts[:, 1:]  # which predictions are within a part
    owner = parts[:, 1:][inside].cpu()
    count = int(parts.max()) + 1

    def total(losses: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64).index_add_(
            0, owner, losses.cpu()[inside.cpu()].double()
        )

    best = torch.stack([total(bank.expert_nll(e)) for e in range(bank.num_experts)]).amin(dim=0)
    return (total(nll) - best)[owner.unique()]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Losses of all methods on one held-out bank, kept as sums per document cluster.

    Attributes:
        domains: Domain names.
        clusters: Which cluster each predicted token belongs to.
        sums: Sum of losses per cluster, (C,), by method: base, uniform, domain_oracle,
            token_oracle, each of the baselines, specialist:<name>, fused:<router>.
        gates: Mean gate by router, domain and expert.
        seed: Of the bootstrap.
        excess: By router, how much more each part of a document cost than under its best expert,
            (P,) nats, see `compute_excess`.
        bounds: What a router promises of that, nats; routers that promise nothing are left out.
    """

    domains: tuple[str, ...]
    clusters: ClusterIndex
    sums: Mapping[str, NDArray[np.float64]]
    gates: Mapping[str, Mapping[str, Mapping[str, float]]]
    seed: int
    excess: Mapping[str, Tensor] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)

    def losses(self, method: str) -> dict[str, float]:
        """Loss by domain, nats per token."""
        means = self.clusters.domain_means(self.sums[method])
        return {domain: float(mean) for domain, mean in zip(self.domains, means, strict=True)}

    def equal_weight(self, method: str) -> float:
        """Plain mean over domains of the loss, nats per token."""
        return float(self.clusters.domain_means(self.sums[method]).mean())

    def best_specialist(self) -> str:
        """The specialist with the lowest equal-weight loss, as a method name.

        Raises:
            BankError: If the bank has no specialist.
        """
        return self._tabulate().best_specialist()

    def best_alone(self) -> str:
        """The better of the base and the best specialist, as a method name."""
        return self._tabulate().best_alone()

    def to_json(self) -> dict[str, Any]:
        """The parts of report.json that come from held-out losses, intervals included.

        Returns:
            `losses`, `equal_weight`, `best_alone`, `best_specialist`, `gain_percent`,
            `gain_interval_percent`, `oracle_gap_nats`, `excess_nats`, `gates` and
            `baseline_gain_percent`, as docs/report.schema.json says. Intervals are the 95 %
            percentile bootstrap by document cluster.
        """
        losses = self._tabulate()
        intervals = self._resample(list(self.sums))
        return {
            **compose_report(losses, self.gates, intervals),
            "excess_nats": {
                router: {
                    "largest": float(excess.max()) if len(excess) else None,
                    "parts": len(excess),
                    "bound": self.bounds.get(router),
                }
                for router, excess in self.excess.items()
            },
            "baseline_gain_percent": compose_baseline_gains(losses, losses.list_plain(), intervals),
        }

    def difference(self, method: str, other: str) -> dict[str, float]:
        """Equal-weight loss of one method minus another's, nats per token.

        Args:
            method: Key of `sums`.
            other: Key of `sums`.

        Returns:
            `point`, and `low` and `high` of the 95 % interval by document cluster; both losses are
            resampled together.
        """
        return {
            "point": self.equal_weight(method) - self.equal_weight(other),
            **self._resample([method, other]).of_difference(method, other),
        }

    def _tabulate(self) -> MethodLosses:
        return MethodLosses({method: self.losses(method) for method in self.sums})

    def _resample(self, methods: list[str]) -> "_Resampled":
        sums = [self.sums[method] for method in methods]
        means = resample_domain_means(self.clusters, sums, seed=self.seed)
        return _Resampled(dict(zip(methods, means.mean(axis=2).T, strict=True)))


@dataclass(frozen=True, eq=False)
class _Resampled:
    """Percentile intervals; all methods are of the same resamples.

    Attributes:
        equal_weight: Equal-weight loss of each resample by method, (R,) nats per token.
    """

    equal_weight: Mapping[str, NDArray[np.float64]]

    def of_loss(self, method: str) -> dict[str, float]:
        return _interval(self.equal_weight[method])

    def of_difference(self, method: str, other: str) -> dict[str, float]:
        return _interval(self.equal_weight[method] - self.equal_weight[other])

    def of_gain(self, reference: str, method: str) -> dict[str, float]:
        return _interval(reduce_percent(self.equal_weight[reference], self.equal_weight[method]))


def evaluate(
    bank: "HeldOutBank",
    routers: Mapping[str, "OutputRouter"],
    baselines: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    watch: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> Evaluation:
    """Measure everything that is reported, from the columns of one held-out bank.

    Args:
        bank: Held-out bank with the columns the routers read.
        routers: Fitted routers by name.
        baselines: Losses (N, T-1) of models that are no experts, by name in lower case: a merge
            (from `bank.add_column`), one trained on all data, a wider model, ...
        seed: Of the bootstrap.
        progress: Receives methods done and in all.
        watch: Gives the context that each router, by its name, is run in.

    Returns:
        Losses of the base, each specialist, uniform gates, the baselines, the domain oracle (for
        each domain the best of base and experts), the token oracle (the same for each token) and
        each router.

    Raises:
        BankError: If it is no held-out bank, or a baseline has another name or shape.
        RoutingError: If a document costs more than a router promises, see `bound_excess`.
    """
    others = dict(baselines or {})
    _check_evaluation(bank, others)
    index = ClusterIndex.build(bank.clusters, bank.domain_of)
    sums: dict[str, NDArray[np.float64]] = {"base": index.sum(bank.base_nll().numpy())}
    first = int(bank.has_base_expert)
    for expert in range(first, bank.num_experts):
        name = name_specialist(bank.expert_names[expert])
        sums[name] = index.sum(bank.expert_nll(expert).numpy())
    alone = list(sums.values())
    for name, nll in others.items():
        sums[name] = index.sum(nll.numpy())
    sums["domain_oracle"] = compute_best_domains(index, alone)
    lowest = torch.minimum(bank.base_nll(), -bank.logprob[:, 1:].amax(dim=-1))
    sums["token_oracle"] = index.sum(lowest.numpy())
    sums["uniform"] = index.sum(compute_router_losses(bank, None).nll.numpy())
    gates: dict[str, dict[str, dict[str, float]]] = {}
    excess: dict[str, Tensor] = {}
    bounds: dict[str, float] = {}
    for done, (name, router) in enumerate(routers.items(), start=1):
        with watch(name):
            found = compute_router_losses(bank, router)
            excess[name] = compute_excess(bank, found.nll)
            bound = _find_bound(bank, router)
            if bound is not None:
                _check_bound(name, bound, excess[name])
                bounds[name] = bound
        sums[name_fused(name)] = index.sum(found.nll.numpy())
        gates[name] = {
            domain: dict(zip(bank.expert_names, map(float, row), strict=True))
            for domain, row in zip(bank.domains, found.gates, strict=True)
        }
        if progress is not None:
            progress(done, len(routers), router=name)
    return Evaluation(bank.domains, index, sums, gates, seed, excess, bounds)


def _find_bound(bank: "Bank", router: "OutputRouter") -> float | None:
    """What a router promises of its excess on this bank, nats; its promise is of one mixture."""
    return router.bound_excess(bank.num_experts) if bank.mixture == "probability" else None


def _check_bound(name: str, bound: Any, excess: Tensor) -> None:
    """Refuse figures of a router that breaks what it promises.

    Raises:
        RoutingError: If it promises no number, or a document cost more.
    """
    largest = max(excess.tolist(), default=-math.inf)
    is_number = isinstance(bound, float | int) and math.isfinite(bound)
    if not is_number or largest > bound + _SUMS_NATS:
        promised = f"at most {bound:.3f}" if is_number else "a finite number of"
        got = f"{largest:.3f}" if is_number else repr(bound)
        raise RoutingError(
            f"Cannot evaluate router '{name}': expected {promised} nats above the best expert for "
            f"every document, as it promises, got {got}. Correct its gates or `bound_excess`."
        )


def compute_best_domains(
    index: ClusterIndex, alone: list[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Sums per cluster of the model that is best on the cluster's whole domain.

    Args:
        index: Clusters of the predicted tokens.
        alone: Sums per cluster of each model, (C,).
    """
    table = np.stack([index.domain_means(sums) for sums in alone])  # (models, domains)
    best = table.argmin(axis=0)
    return np.stack(alone)[best[index.domain_of], np.arange(len(index.counts))]


def _check_evaluation(bank: object, baselines: Mapping[str, Tensor]) -> None:
    from molora_fed.bank import HeldOutBank

    if not isinstance(bank, HeldOutBank):
        raise BankError(
            f"Cannot report from this bank: expected a HeldOutBank, got {type(bank).__name__}. "
            "Build one of the held-out split."
        )
    shape = (bank.num_blocks, bank.block_size - 1)
    wrong = sorted(
        f"{name} {tuple(nll.shape)}"
        for name, nll in baselines.items()
        if name in RESERVED_NAMES or not BASELINE_NAME.fullmatch(name) or tuple(nll.shape) != shape
    )
    if wrong:
        raise BankError(
            f"Cannot evaluate baselines: expected names in lower case, none of "
            f"{', '.join(sorted(RESERVED_NAMES))}, with losses {shape}, got {', '.join(wrong)}. "
            "Rename them, or measure them on this bank's blocks."
        )


def _interval(statistics: NDArray[np.float64]) -> dict[str, float]:
    low, high = compute_interval(statistics)
    return {"low": low, "high": high}
