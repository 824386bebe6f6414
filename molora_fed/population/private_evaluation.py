"""Held-out figures of an evolved model, from sums that contributors say of texts of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from molora_fed.evaluation.bootstrap import LEVEL
from molora_fed.population.evolution import Branch
from molora_fed.population.moments import Moments
from molora_fed.population.private import PrivateData, name_slot
from molora_fed.population.questions import Question

__all__ = ["INTERVAL_METHOD", "evaluate_privately"]

INTERVAL_METHOD = "Student's t by document cluster, the reference's loss taken as known"


def evaluate_privately(
    data: PrivateData,
    last: Branch,
    start: Branch,
    specialists: Sequence[str],
    *,
    router_name: str,
    gates: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Ask for losses on held-out blocks, once.

    Args:
        data: Whom to ask.
        last: What was evolved.
        start: What it began with: its first slots, each at gate 1, are the specialists.
        specialists: Their names in reports.
        router_name: The name the router is registered under.
        gates: Mean gate by domain and slot.

    Returns:
        The figures of `Evaluation.to_json` that sums can give, with `interval_method`.
    """
    alone = ["base", *(name_slot(index) for index in range(len(specialists)))]
    slots = [name_slot(index) for index in range(start.population.num_slots)]
    columns = ["base", *slots, "uniform"]
    names = [*columns, "fused", *(f"{name}-less-fused" for name in columns)]
    moments = data.ask_moments(Question("held-out", {}, (last, start)), names)
    labels = {"base": "base", "uniform": "uniform", "fused": f"fused:{router_name}"}
    labels |= {name_slot(i): f"specialist:{name}" for i, name in enumerate(specialists)}

    def losses(name: str) -> dict[str, float]:
        return {d: own.mean(name) for d, own in zip(data.domains, moments, strict=True)}

    def average(name: str) -> float:
        return float(np.mean([own.mean(name) for own in moments]))

    best = [min(alone, key=own.mean) for own in moments]  # the oracle's choice in each domain
    specialist = min(alone[1:], key=average)
    references = {
        "vs_best_alone": min(alone, key=average),
        "vs_best_specialist": specialist,
    }
    gains = {
        label: _estimate(moments, [f"{name}-less-fused"] * len(moments), 100.0 / average(name))
        for label, name in references.items()
    }
    oracle = {d: own.mean(n) for d, own, n in zip(data.domains, moments, best, strict=True)}
    gap = _estimate(moments, [f"{name}-less-fused" for name in best], -1.0)
    spread = {label: [name] * len(moments) for name, label in labels.items()}
    spread["domain_oracle"] = best
    return {
        "interval_method": INTERVAL_METHOD,
        "losses": {
            "base": losses("base"),
            "uniform": losses("uniform"),
            "domain_oracle": oracle,
            "specialists": {name: losses(name_slot(i)) for i, name in enumerate(specialists)},
            "fused": {router_name: losses("fused")},
        },
        "equal_weight": {label: _estimate(moments, chosen) for label, chosen in spread.items()},
        **{
            key: {
                "name": labels[name].removeprefix("specialist:"),
                "loss": average(name),
            }
            for key, name in (
                ("best_alone", references["vs_best_alone"]),
                ("best_specialist", specialist),
            )
        },
        "gain_percent": {router_name: {label: g["point"] for label, g in gains.items()}},
        "gain_interval_percent": {
            router_name: {label: {"low": g["low"], "high": g["high"]} for label, g in gains.items()}
        },
        "oracle_gap_nats": {router_name: {**gap, "level": LEVEL}},
        "gates": {router_name: {domain: dict(row) for domain, row in gates.items()}},
    }


def _estimate(
    moments: Sequence[Moments], names: Sequence[str], factor: float = 1.0
) -> dict[str, float]:
    """Mean over domains of a column of each, times a factor, with its interval.

    Source: Cochran, Sampling Techniques, 3rd ed., sections 6.4 and 5.4, as in `guard`.
    """
    pairs = list(zip(moments, names, strict=True))
    spread = np.array([own.variance(name) for own, name in pairs])
    freedom = np.array([own.clusters - 1.0 for own in moments])
    squares = float((spread**2 / freedom).sum())
    degrees = float(spread.sum()) ** 2 / squares if squares > 0 else float(freedom.sum())
    error = float(np.sqrt(spread.sum())) / len(pairs)
    point = factor * float(np.mean([own.mean(name) for own, name in pairs]))
    width = abs(factor) * float(stats.t.ppf(0.5 + LEVEL / 2, degrees)) * error
    return {"point": point, "low": point - width, "high": point + width}
