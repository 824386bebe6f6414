"""The coordinator's side of a fusion whose blocks stay with their owners: sums become a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from molora_fed.errors import SumError
from molora_fed.evaluation.composition import (
    MethodLosses,
    compose_baseline_gains,
    compose_report,
    name_specialist,
)
from molora_fed.evaluation.moments import INTERVAL_METHOD, Moments, add_by_domain, estimate
from molora_fed.evaluation.summed import Compared, MemberSums, name_difference
from molora_fed.forecasting.divergence import reduce_percent
from molora_fed.types import LossMatrix

__all__ = ["SummedEvaluation", "compose_loss_matrix", "compose_summed"]

_LEFT_OUT = {
    "excess_nats": "the largest excess is one document's figure; each member holds its own "
    "documents against what a router promises, and answers only if all keep to it",
    "baseline_gain_percent.domain_oracle": "its interval needs sums of each pair of specialists",
}


def compose_loss_matrix(
    parts: Sequence[tuple[str, Moments]], own_domain: Mapping[str, str]
) -> LossMatrix:
    """The coordinator's side: losses by domain from what members said of calibration blocks.

    Args:
        parts: Domain and `measure_alone` of each member, in a fixed order.
        own_domain: Domain each specialist was trained on, by its name.
    """
    by_domain = add_by_domain(parts)

    def losses(method: str) -> dict[str, float]:
        return {domain: own.mean(method) for domain, own in by_domain.items()}

    specialists = {name: losses(name_specialist(name)) for name in own_domain}
    return LossMatrix(tuple(by_domain), losses("base"), specialists, dict(own_domain))


class _StudentIntervals:
    """Intervals from moments; which differences there are is `Compared.pairs`."""

    def __init__(self, by_domain: Mapping[str, Moments], alone: Sequence[str]) -> None:
        self._moments = tuple(by_domain.values())
        self.best = {domain: min(alone, key=own.mean) for domain, own in by_domain.items()}

    def of_loss(self, method: str) -> dict[str, float]:
        return _ends(estimate(self._moments, self._spread(method)))

    def of_difference(self, method: str, other: str) -> dict[str, float]:
        columns, sign = self._find(method, other)
        return _ends(estimate(self._moments, columns, sign))

    def of_gain(self, reference: str, method: str) -> dict[str, float]:
        if reference == method:
            return {"low": 0.0, "high": 0.0}
        columns, _ = self._find(reference, method)
        losses = [self._average(name) for name in (reference, method)]
        gain = reduce_percent(*losses)
        rest = [
            own.take_residual(one, other, column, gain / 100.0)
            for own, one, other, column in zip(
                self._moments, self._spread(reference), self._spread(method), columns, strict=True
            )
        ]
        found = estimate(rest, ["residual"] * len(rest), 100.0 / losses[0])
        width = found["high"] - found["point"]
        return {"low": gain - width, "high": gain + width}

    def _spread(self, method: str) -> list[str]:
        """The method's column in each domain."""
        is_oracle = method == "domain_oracle"
        return list(self.best.values()) if is_oracle else [method] * len(self._moments)

    def _average(self, method: str) -> float:
        chosen = zip(self._moments, self._spread(method), strict=True)
        return float(np.mean([own.mean(name) for own, name in chosen]))

    def _find(self, method: str, other: str) -> tuple[list[str], float]:
        """The columns of their difference in each domain, and the sign they stand with."""
        for one, two, sign in ((method, other, 1.0), (other, method, -1.0)):
            chosen = zip(self._spread(one), self._spread(two), strict=True)
            names = [name_difference(*pair) for pair in chosen]
            if all(n in m.columns for n, m in zip(names, self._moments, strict=True)):
                return names, sign
        raise SumError(
            f"Cannot compare '{method}' with '{other}': expected sums of their difference, got "
            "none. Compare methods that `Compared.pairs` has."
        )


def _ends(found: Mapping[str, float]) -> dict[str, float]:
    return {"low": found["low"], "high": found["high"]}


def _tabulate(
    by_domain: Mapping[str, Moments], methods: Sequence[str], best: Mapping[str, str]
) -> MethodLosses:
    table = {m: {domain: own.mean(m) for domain, own in by_domain.items()} for m in methods}
    table["domain_oracle"] = {domain: own.mean(best[domain]) for domain, own in by_domain.items()}
    return MethodLosses(table)


def compose_summed(
    by_domain: Mapping[str, Moments],
    alone: Sequence[str],
    methods: Sequence[str],
    gates: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, Any]:
    """What `compose_report` gives, from moments.

    Args:
        by_domain: Moments of each domain, with columns of all methods and of each of `alone` less
            each fused model.
        alone: Base and specialists, as methods.
        methods: All methods but the domain oracle.
        gates: Mean gate by router, domain and expert.

    Returns:
        The parts of report.json, with `interval_method`.
    """
    intervals = _StudentIntervals(by_domain, alone)
    losses = _tabulate(by_domain, methods, intervals.best)
    return {"interval_method": INTERVAL_METHOD, **compose_report(losses, gates, intervals)}


@dataclass(frozen=True, eq=False)
class SummedEvaluation:
    """The coordinator's side: what all members said, by domain.

    Attributes:
        compared: What was asked for.
        by_domain: Moments of each domain, its members' added up.
        gates: Mean gate by router, domain and expert.
        members: Number of members by domain.
        shortlist: What is said of shortlists of experts, JSON values; None where all members
            measured all experts.
    """

    compared: Compared
    by_domain: Mapping[str, Moments]
    gates: Mapping[str, Mapping[str, Mapping[str, float]]]
    members: Mapping[str, int]
    shortlist: Mapping[str, Any] | None = None

    @classmethod
    def add(cls, compared: Compared, answers: Sequence[MemberSums]) -> "SummedEvaluation":
        """Add up what members said.

        Args:
            compared: What was asked for.
            answers: One of each member, in a fixed order.

        Raises:
            SumError: If there is none.
        """
        if not answers:
            raise SumError(
                "Cannot evaluate from sums: expected the answer of one member at least, got none. "
                "Ask the members."
            )
        by_domain = add_by_domain([(one.domain, one.moments) for one in answers])
        gates: dict[str, dict[str, dict[str, float]]] = {}
        for router in compared.routers:
            gates[router] = {}
            for domain, own in by_domain.items():
                parts = [one.gates[router] for one in answers if one.domain == domain]
                means = np.sum(parts, axis=0) / own.tokens
                gates[router][domain] = dict(zip(compared.experts, map(float, means), strict=True))
        found = [one.domain for one in answers]
        return cls(compared, by_domain, gates, {d: found.count(d) for d in by_domain})

    def losses(self, method: str) -> dict[str, float]:
        """Loss by domain, nats per token."""
        return dict(self._table.by_method[method])

    def equal_weight(self, method: str) -> float:
        """Plain mean over domains of the loss, nats per token."""
        return self._table.equal_weight(method)

    def to_json(self) -> dict[str, Any]:
        """The parts of report.json that `Evaluation.to_json` gives, as far as sums tell them.

        Returns:
            The same keys but `excess_nats`, with `interval_method` and `sums`: how many members,
            clusters and tokens each domain's figures are of, how many numbers each member said,
            and what is left out.
        """
        alone, methods = self.compared.alone, self.compared.methods
        more = 0 if self.shortlist is None else 3 + 3 * len(self.compared.routers)
        plain = [name for name in self._table.list_plain() if name != "domain_oracle"]
        return {
            **compose_summed(self.by_domain, alone, methods, self.gates),
            "baseline_gain_percent": compose_baseline_gains(self._table, plain, self._intervals),
            "sums": {
                "members": dict(self.members),
                "clusters": {domain: own.clusters for domain, own in self.by_domain.items()},
                "tokens": {domain: int(own.tokens) for domain, own in self.by_domain.items()},
                "numbers": self.compared.count_numbers() + more,
                "left_out": dict(_LEFT_OUT),
                **({} if self.shortlist is None else {"shortlist": dict(self.shortlist)}),
            },
        }

    def difference(self, method: str, other: str) -> dict[str, float]:
        """Equal-weight loss of one method minus another's, nats per token.

        Args:
            method: One of `compared.methods`, or "domain_oracle".
            other: Another one.

        Returns:
            `point`, and `low` and `high` of the 95 % interval by document cluster.

        Raises:
            SumError: If nobody was asked for sums of this difference.
        """
        return {
            "point": self.equal_weight(method) - self.equal_weight(other),
            **self._intervals.of_difference(method, other),
        }

    @cached_property
    def _intervals(self) -> _StudentIntervals:
        return _StudentIntervals(self.by_domain, self.compared.alone)

    @cached_property
    def _table(self) -> MethodLosses:
        return _tabulate(self.by_domain, self.compared.methods, self._intervals.best)
