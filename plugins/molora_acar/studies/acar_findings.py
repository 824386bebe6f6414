"""What the answers and decisions of the study `acar` say, as figures with intervals."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molora_acar.studies.acar_measures import (
    Estimate,
    Sampled,
    Values,
    compare_correlation,
    estimate,
    integrate,
)
from molora_fed.cascade.contract import MODES

__all__ = ["CONFIGURATIONS", "Findings"]

CONFIGURATIONS = (
    "single",
    "arena-2",
    "ACAR-U",
    "ACAR-UJ",
    "calibrated",
    "arena-3",
    "oracle",
)
"""As tables show them."""

_PLAIN = ("probe, single_agent", "ACAR-U", "probe, full_arena")

Results = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Findings:
    """Outcomes of all seeds.

    Attributes:
        results: What `decide_all` returned, seed by seed.
    """

    results: Results

    @cached_property
    def sampled(self) -> Sampled:
        """The resamples that all intervals share."""
        return Sampled([len(one["tasks"]) for one in self.results])

    def _numbers(self, name: str, key: str) -> list[NDArray[Any]]:
        """A number a task of a configuration; costs relative to the seed's single model."""
        found = []
        for one in self.results:
            values = np.array(one["outcomes"][name][key], dtype=float)
            unit = np.mean(one["outcomes"]["single"]["cost"]) if key == "cost" else 1.0
            found.append(values / unit)
        return found

    def mean(self, name: str, key: str = "correct") -> Estimate:
        """Accuracy (a share) or relative cost of a configuration."""
        return estimate(*self.sampled.mean(self._numbers(name, key)))

    def difference(self, name: str, other: str) -> Estimate:
        """Accuracy of one configuration less another's, on the same tasks."""
        pairs = zip(self._numbers(name, "correct"), self._numbers(other, "correct"), strict=True)
        return estimate(*self.sampled.mean([a - b for a, b in pairs]))

    def share(self, chosen: Sequence[Values]) -> Estimate:
        """Mean of a number a task, seed by seed."""
        return estimate(*self.sampled.mean(chosen))

    def sigmas(self) -> list[NDArray[Any]]:
        """Disagreement of every task."""
        return [np.array([task["sigma"] for task in one["tasks"]]) for one in self.results]

    def families(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(sorted({task["family"] for one in self.results for task in one["tasks"]}))

    def sigma_shares(self) -> dict[str, Estimate]:
        """Share of tasks with no, some and full disagreement."""
        picked = {
            "0": [one == 0 for one in self.sigmas()],
            "0.5": [(one > 0) & (one < 1) for one in self.sigmas()],
            "1": [one == 1 for one in self.sigmas()],
        }
        return {name: self.share([x.astype(float) for x in one]) for name, one in picked.items()}

    def agreement_but_wrong(self) -> dict[str, Estimate]:
        """How often the probe agrees on a wrong answer, and what that costs in accuracy.

        Returns:
            `of all` and `of agreed` tasks; `lost`: accuracy of all three members (probe asked as
            well) less that of the agreed answer, on agreed tasks, as a share of all tasks;
            `ceiling`: accuracy if every other task were answered rightly.
        """
        agreed = [one == 0 for one in self.sigmas()]
        probe = self._numbers("probe, single_agent", "correct")
        arena = self._numbers("arena-3", "correct")
        wrong = [a * (1 - p) for a, p in zip(agreed, probe, strict=True)]
        seeds, drawn = self.sampled.mean(wrong)
        seeds_agreed, drawn_agreed = self.sampled.mean([one.astype(float) for one in agreed])
        lost = [a * (m - p) for a, m, p in zip(agreed, arena, probe, strict=True)]
        return {
            "of all": estimate(seeds, drawn),
            "of agreed": estimate(
                seeds / np.maximum(seeds_agreed, 1e-9), drawn / np.maximum(drawn_agreed, 1e-9)
            ),
            "lost": self.share(lost),
            "ceiling": estimate(1 - seeds, 1 - drawn),
        }

    def at_equal_cost(self, name: str) -> Estimate:
        """Accuracy of a configuration less that of fixed ones at its cost.

        Fixed ones are the single model, two and three; between two of them a coin is tossed for
        each task.
        """
        fixed = ("single", "arena-2", "arena-3")
        cost = [self.sampled.mean(self._numbers(one, "cost")) for one in fixed]
        right = [self.sampled.mean(self._numbers(one, "correct")) for one in fixed]
        own_cost = self.sampled.mean(self._numbers(name, "cost"))
        own = self.sampled.mean(self._numbers(name, "correct"))

        def compare(place: int) -> Any:
            costs = np.stack([one[place] for one in cost], axis=-1)
            rights = np.stack([one[place] for one in right], axis=-1)
            rows = zip(own_cost[place], costs, rights, strict=True)
            return own[place] - np.array([np.interp(c, xs, ys) for c, xs, ys in rows])

        return estimate(compare(0), compare(1))

    def frontiers(self) -> tuple[dict[str, list[tuple[float, float]]], Estimate]:
        """Accuracy over cost of the plain rule and of the calibrated policy.

        The plain rule mixes at random between the probe alone, the rule itself, and all members
        always. The area is the mean accuracy over all budgets from the probe alone to all members.

        Returns:
            Points (relative cost, accuracy) by policy, and the calibrated area less the plain one.
        """
        plain = [self._point(name) for name in _PLAIN]
        count = min(len(one["frontier"]) for one in self.results)
        steps = [self._frontier_point(place / max(1, count - 1)) for place in range(count)]
        steps = [plain[0], *steps]

        def area(points: Sequence[Any], place: int) -> Any:
            cost = np.stack([one[0][place] for one in points], axis=-1)
            right = np.stack([one[1][place] for one in points], axis=-1)
            return integrate(cost, right, plain[0][0][place], plain[-1][0][place])

        gain = estimate(*(area(steps, place) - area(plain, place) for place in (0, 1)))
        shown = {
            name: [(float(c[0].mean()), float(r[0].mean())) for c, r in points]
            for name, points in (("plain rule", plain), ("calibrated", steps))
        }
        return shown, gain

    def _point(self, name: str) -> Any:
        return tuple(self.sampled.mean(self._numbers(name, key)) for key in ("cost", "correct"))

    def _frontier_point(self, where: float) -> Any:
        chosen = [
            one["frontier"][round(where * (len(one["frontier"]) - 1))] for one in self.results
        ]
        units = [np.mean(one["outcomes"]["single"]["cost"]) for one in self.results]
        costs = [np.array(one["cost"]) / unit for one, unit in zip(chosen, units, strict=True)]
        rights = [np.array(one["correct"], dtype=float) for one in chosen]
        return self.sampled.mean(costs), self.sampled.mean(rights)

    def attribution(self, kind: str) -> dict[str, Estimate]:
        """Leave-one-out value of each model: in the "cascade", or in the "arena" of three."""
        names = sorted(self.results[0]["attribution"][kind])
        return {
            name: self.share([one["attribution"][kind][name] for one in self.results])
            for name in names
        }

    def proxies(self) -> dict[str, Estimate]:
        """Rank correlation of each proxy with the leave-one-out values, over tasks and members."""
        found = {}
        names = sorted(self.results[0]["attribution"]["arena"])
        for proxy in ("similarity", "entropy"):
            parts = []
            for name in names:
                values, truth = (
                    [one["attribution"][kind][name] for one in self.results]
                    for kind in (proxy, "arena")
                )
                parts.append(compare_correlation(self.sampled, values, truth))
            found[proxy] = _average(parts)
        return found

    def by_family(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Per cent of right answers by family and configuration, mean over seeds."""
        return {
            family: {name: 100 * self._family_mean(family, name, "correct") for name in names}
            for family in self.families()
        }

    def _family_mean(self, family: str, name: str, key: str) -> float:
        means = []
        for one in self.results:
            own = [task["family"] == family for task in one["tasks"]]
            means.append(np.array(one["outcomes"][name][key], dtype=float)[own].mean())
        return float(np.mean(means))

    def modes_by_family(self, name: str) -> dict[str, tuple[float, ...]]:
        """Per cent of tasks by mode, by family, mean over seeds."""
        found: dict[str, tuple[float, ...]] = {}
        for family in self.families():
            shares = []
            for one in self.results:
                own = [
                    mode
                    for mode, task in zip(one["outcomes"][name]["mode"], one["tasks"], strict=True)
                    if task["family"] == family
                ]
                counts = Counter(own)
                shares.append([100 * counts[place] / len(own) for place in range(len(MODES))])
            found[family] = tuple(np.mean(shares, axis=0).tolist())
        return found

    def similarity(self) -> float:
        """Median similarity of the most similar solved problem."""
        return float(
            np.median([task["similarity"] for one in self.results for task in one["tasks"]])
        )


def _average(parts: Sequence[Estimate]) -> Estimate:
    """Mean of estimates; the ends are means, too, which is wide enough for dependent parts."""
    return Estimate(
        float(np.mean([one.point for one in parts])),
        float(np.mean([one.low for one in parts])),
        float(np.mean([one.high for one in parts])),
        tuple(np.mean([one.by_seed for one in parts], axis=0).tolist()),
    )
