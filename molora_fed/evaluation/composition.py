"""The parts of report.json that held-out losses give, however their intervals were found."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from molora_fed.errors import BankError
from molora_fed.evaluation.bootstrap import LEVEL
from molora_fed.forecasting.divergence import reduce_percent

__all__ = [
    "RESERVED_NAMES",
    "Intervals",
    "MethodLosses",
    "compose_baseline_gains",
    "compose_report",
    "name_fused",
    "name_specialist",
]

_BEFORE = ("base", "uniform")
_AFTER = ("domain_oracle", "token_oracle")
_SPECIALIST, _FUSED = "specialist:", "fused:"
_GROUPS = (("specialists", _SPECIALIST), ("fused", _FUSED))

RESERVED_NAMES = frozenset((*_BEFORE, *_AFTER, *(key for key, _ in _GROUPS)))
"""What no baseline may be called."""


def name_specialist(expert: str) -> str:
    """A specialist as a method."""
    return f"{_SPECIALIST}{expert}"


def name_fused(router: str) -> str:
    """The model that a router fuses, as a method."""
    return f"{_FUSED}{router}"


class Intervals(Protocol):
    """95 % intervals by document cluster of figures of equal weight, each as `low` and `high`."""

    def of_loss(self, method: str) -> dict[str, float]:
        """Of a loss, nats per token."""
        ...

    def of_difference(self, method: str, other: str) -> dict[str, float]:
        """Of one method's loss less another's, nats per token; paired."""
        ...

    def of_gain(self, reference: str, method: str) -> dict[str, float]:
        """Of a reduction in percent of the reference's loss; paired."""
        ...


@dataclass(frozen=True)
class MethodLosses:
    """Held-out losses, and who is best by them.

    Attributes:
        by_method: Loss in nats per token by method and domain: base, uniform, domain_oracle,
            token_oracle, baselines, specialist:<name>, fused:<router>; in one order of domains.
    """

    by_method: Mapping[str, Mapping[str, float]]

    def equal_weight(self, method: str) -> float:
        """Plain mean over domains of the loss, nats per token."""
        return float(np.mean(list(self.by_method[method].values())))

    def best_specialist(self) -> str:
        """The specialist with the lowest equal-weight loss, as a method.

        Raises:
            BankError: If there is no specialist.
        """
        names = [method for method in self.by_method if method.startswith(_SPECIALIST)]
        if not names:
            raise BankError(
                "Cannot compare with the best specialist: expected one at least, got none. "
                "Fuse at least one contribution."
            )
        return min(names, key=self.equal_weight)

    def best_alone(self) -> str:
        """The better of the base and the best specialist, as a method."""
        return min(("base", self.best_specialist()), key=self.equal_weight)

    def references(self) -> dict[str, str]:
        """What gains are measured against, as methods by name in report.json."""
        return {
            "vs_best_alone": self.best_alone(),
            "vs_best_specialist": self.best_specialist(),
        }

    def list_plain(self) -> list[str]:
        """Base, uniform gates, baselines by name, oracles: what is neither specialist nor fused."""
        baselines = (n for n in self.by_method if n not in RESERVED_NAMES and ":" not in n)
        return [m for m in (*_BEFORE, *sorted(baselines), *_AFTER) if m in self.by_method]

    def to_json(self) -> dict[str, Any]:
        """`losses` of report.json."""
        losses: dict[str, Any] = {method: self.by_method[method] for method in self.list_plain()}
        for key, prefix in _GROUPS:
            losses[key] = {
                method.removeprefix(prefix): table
                for method, table in self.by_method.items()
                if method.startswith(prefix)
            }
        return losses


def compose_report(
    losses: MethodLosses,
    gates: Mapping[str, Mapping[str, Mapping[str, float]]],
    intervals: Intervals,
) -> dict[str, Any]:
    """Put losses into the words of report.json.

    Args:
        losses: Of every method.
        gates: Mean gate by router, domain and expert; its keys are the routers.
        intervals: Of the same losses.

    Returns:
        `losses`, `equal_weight`, `best_alone`, `best_specialist`, `gain_percent`,
        `gain_interval_percent`, `oracle_gap_nats` and `gates`, as docs/report.schema.json says.

    Raises:
        BankError: If there is no specialist.
    """
    references = losses.references()
    routers = {name: name_fused(name) for name in gates}
    return {
        "losses": losses.to_json(),
        "equal_weight": {
            name: {"point": losses.equal_weight(name), **intervals.of_loss(name)}
            for name in losses.by_method
        },
        "best_alone": _describe(losses, references["vs_best_alone"]),
        "best_specialist": _describe(losses, references["vs_best_specialist"]),
        "gain_percent": {
            router: {
                label: reduce_percent(losses.equal_weight(reference), losses.equal_weight(method))
                for label, reference in references.items()
            }
            for router, method in routers.items()
        },
        "gain_interval_percent": {
            router: {
                label: intervals.of_gain(reference, method)
                for label, reference in references.items()
            }
            for router, method in routers.items()
        },
        "oracle_gap_nats": {
            router: {
                "point": losses.equal_weight(method) - losses.equal_weight("domain_oracle"),
                **intervals.of_difference(method, "domain_oracle"),
                "level": LEVEL,
            }
            for router, method in routers.items()
        },
        "gates": {
            router: {domain: dict(row) for domain, row in by_domain.items()}
            for router, by_domain in gates.items()
        },
    }


def compose_baseline_gains(
    losses: MethodLosses, methods: Iterable[str], intervals: Intervals
) -> dict[str, Any]:
    """`baseline_gain_percent` of report.json.

    Args:
        losses: Of every method.
        methods: Those that are wanted, of `losses.list_plain()`.
        intervals: Of the same losses.
    """
    references = losses.references()
    return {
        method: {
            label: {
                "point": reduce_percent(
                    losses.equal_weight(reference), losses.equal_weight(method)
                ),
                **intervals.of_gain(reference, method),
            }
            for label, reference in references.items()
        }
        for method in methods
    }


def _describe(losses: MethodLosses, method: str) -> dict[str, Any]:
    return {"name": method.removeprefix(_SPECIALIST), "loss": losses.equal_weight(method)}
