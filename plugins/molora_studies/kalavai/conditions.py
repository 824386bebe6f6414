"""The usual condition of a study (some domains, one recipe, one seed), and figures over seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from molora_studies.framework.contract import Task
from molora_studies.framework.substrate import (
    BaseSettings,
    FusionSettings,
    Member,
    SpecialistSettings,
    plan_base,
    plan_corpus,
    plan_fusion,
    plan_specialist,
)

__all__ = [
    "ROUTERS",
    "THREE_DOMAINS",
    "Estimate",
    "choose_seeds",
    "draw_estimates",
    "estimate",
    "plan_aged_base",
    "plan_condition",
    "plan_depth",
    "read_gain",
    "read_gain_over_base",
]

THREE_DOMAINS = ("cpp", "python", "science")
"""Domains of studies that ask about the recipe: code, code, prose, as the paper's three."""

ROUTERS: Mapping[str, Mapping[str, Any]] = {"evidence": {}, "linear": {}}
"""Ours, and the paper's made causal."""

LEVEL = 0.95


def plan_aged_base(steps: int) -> Task:
    """The default base trained for another number of steps; the default's own age is that base."""
    if steps == BaseSettings().steps:
        return plan_base()
    return plan_base(BaseSettings(steps=steps, threads=1))  # its tasks share the cores


def plan_condition(
    name: str,
    domains: Sequence[str],
    seed: int,
    specialist: Mapping[str, Any] | None = None,
    *,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    base: Task | None = None,
    routers: Mapping[str, Mapping[str, Any]] = ROUTERS,
    fusion: Mapping[str, Any] | None = None,
    further: Sequence[str] = (),
) -> Task:
    """One specialist a domain, fused.

    Args:
        name: For people.
        domains: Domains, one contributor each; the contributor has the domain's name.
        seed: Of specialists, routers and bootstrap.
        specialist: Fields of `SpecialistSettings` that differ from its defaults.
        own: The same for single domains.
        base: The base; the studies' default base if None.
        routers: Routers by label.
        fusion: Further fields of `FusionSettings`.
        further: Domains that are measured without a contributor.
    """
    shared = base or plan_base()
    members = []
    for domain in domains:
        recipe = {**(specialist or {}), **(own or {}).get(domain, {}), "seed": seed}
        corpus = plan_corpus(shared, domain)
        adapter = plan_specialist(shared, corpus, SpecialistSettings(**recipe))
        members.append(Member(domain, adapter, corpus))
    settings = FusionSettings(routers=routers, seed=seed, **(fusion or {}))
    unowned = [plan_corpus(shared, domain) for domain in further]
    return plan_fusion(name, shared, members, settings, further=unowned)


def plan_depth(domains: Sequence[str], steps: int, depth: int, seed: int) -> Task:
    """The usual condition with a training length and a frozen depth K."""
    return plan_condition(
        f"{len(domains)} domains, {steps} steps, K={depth}, seed {seed}",
        domains,
        seed,
        {"steps": steps, "frozen_depth": depth},
    )


def choose_seeds(seeds: Sequence[int], *, screened: bool) -> Sequence[int]:
    """The seeds of a condition; what is screened is run at the first one only."""
    return seeds[:1] if screened else seeds


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval.

    Attributes:
        mean: Mean.
        low: Lower end of the 95 % interval (Student's t over seeds); the mean of one seed has none.
        high: Upper end.
        count: Number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    def show(self, unit: str = "%", digits: int = 2, sign: bool = True) -> str:
        """As text, e.g. "+5.96 % [+5.31, +6.61], 3 seeds"."""
        form = f"{{:{'+' if sign else ''}.{digits}f}}"
        text = f"{form.format(self.mean)} {unit}".strip()
        if self.low is not None and self.high is not None:
            text += f" [{form.format(self.low)}, {form.format(self.high)}]"
        return f"{text}, {self.count} seed{'s' if self.count > 1 else ''}"

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return dict(vars(self))


def estimate(values: Iterable[float]) -> Estimate:
    """Mean of one figure a seed, with Student's interval at 95 %."""
    numbers = np.asarray(list(values), dtype=float)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Estimate(mean, None, None, len(numbers))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(numbers) - 1) * stats.sem(numbers))
    return Estimate(mean, mean - half, mean + half, len(numbers))


def draw_estimates(axes: Any, found: Mapping[int, Estimate], label: str) -> Any:
    """Draw means with the lower half of their intervals as error bars.

    Args:
        axes: Matplotlib axes.
        found: Figures by place on the x axis.
        label: For the legend.

    Returns:
        What matplotlib's `errorbar` returns.
    """
    errors = [e.mean - e.low if e.low is not None else 0.0 for e in found.values()]
    means = [e.mean for e in found.values()]
    return axes.errorbar(list(found), means, yerr=errors, marker="o", capsize=3, label=label)


def read_gain(
    result: Mapping[str, Any], router: str = "evidence", reference: str = "best_alone"
) -> float:
    """Fusion gain in percent of a fusion task's result."""
    return float(result["gains"][router][reference])


def read_gain_over_base(result: Mapping[str, Any], router: str = "evidence") -> float:
    """Reduction of the equal-weight loss against the base, percent."""
    held_out = result["held_out"]
    domains = held_out["domains"]
    base = sum(held_out["base"][d] for d in domains)
    fused = sum(held_out["fused"][router][d] for d in domains)
    return 100.0 * (base - fused) / base
