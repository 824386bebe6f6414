"""What the answers and decisions of the study `acar` say, as figures with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molora_fed.cascade.contract import MODES
from molora_studies.acar.measures import (
    Estimate,
    Sampled,
    Values,
    compare_correlation,
    estimate,
    integrate,
    interpolate,
    unpack_numbers,
)

__all__ = ["CONFIGURATIONS", "OTHERS", "Findings"]

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

OTHERS = (
    "calibrated, families hidden",
    "probe, single_agent",
    "probe, arena_lite",
    "probe, full_arena",
    "ACAR-UJ always",
)
"""What is told beside."""

_PLAIN = ("000", "001", "002", "012", "022", "222")
"""Modes at sigma 0, between, and 1, from the cheapest policy to the dearest; "012" is the rule."""

Results = Sequence[Mapping[str, Any]]


class _Reader:
    """Outcomes of one seed as numbers; costs are relative to the seed's single model."""

    def __init__(self, outcomes: Mapping[str, Mapping[str, Any]]) -> None:
        self._outcomes = outcomes
        self._unit = float(unpack_numbers(outcomes["single"]["cost"]).mean())
        self.count = len(outcomes["single"]["correct"])
        self._modes = {
            key: np.stack([self.take(f"probe, {mode}", key) for mode in MODES])
            for key in ("cost", "correct")
        }

    def take(self, name: str, key: str) -> NDArray[Any]:
        """A number a task of a configuration."""
        outcome = self._outcomes[name]
        if key not in outcome:
            return self.by_mode(outcome["mode"], key)
        if key == "cost":
            return unpack_numbers(outcome["cost"]) / self._unit
        return np.array([int(digit) for digit in outcome[key]], dtype=float)

    def by_mode(self, modes: str, key: str) -> NDArray[Any]:
        """A number a task of a policy, by the modes it chose."""
        places = np.array([int(digit) for digit in modes])
        chosen: NDArray[Any] = self._modes[key][places, np.arange(len(places))]
        return chosen


def _own(result: Mapping[str, Any], family: str) -> NDArray[Any]:
    """Whether each task is of a family."""
    return np.array([one == family for one in result["tasks"]["family"].split()])


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
        return Sampled([one.count for one in self._read])

    @cached_property
    def _read(self) -> list[_Reader]:
        return [_Reader(one["outcomes"]) for one in self.results]

    def _numbers(self, name: str, key: str) -> list[NDArray[Any]]:
        """A number a task of a configuration; costs relative to the seed's single model."""
        return [one.take(name, key) for one in self._read]

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
        return [unpack_numbers(one["tasks"]["sigma"]) for one in self.results]

    def families(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(
            sorted({name for one in self.results for name in one["tasks"]["family"].split()})
        )

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
            `of all` and `of agreed` tasks; `lost`: what three
            members always answer rightly more of agreed tasks, as a share of all tasks;
            `ceiling`: accuracy if every other task were answered rightly; `won back`: what the
            calibrated policy, at the rule's budget, answers more of agreed tasks.
        """
        agreed = [one == 0 for one in self.sigmas()]
        probe = self._numbers("probe, single_agent", "correct")
        arena = self._numbers("arena-3", "correct")
        wrong = [a * (1 - p) for a, p in zip(agreed, probe, strict=True)]
        seeds, drawn = self.sampled.mean(wrong)
        parts = self.sampled.mean([one.astype(float) for one in agreed])
        shares = [np.maximum(one, 1e-9) for one in parts]
        lost = [a * (m - p) for a, m, p in zip(agreed, arena, probe, strict=True)]
        other = self._numbers("calibrated", "correct")
        back = [a * (c - p) for a, c, p in zip(agreed, other, probe, strict=True)]
        return {
            "of all": estimate(seeds, drawn),
            "of agreed": estimate(seeds / shares[0], drawn / shares[1]),
            "lost": self.share(lost),
            "won back": self.share(back),
            "ceiling": estimate(1 - seeds, 1 - drawn),
        }

    def at_equal_cost(self, name: str) -> Estimate:
        """Accuracy of a configuration less that of fixed ones at its cost.

        Fixed ones are the single model, two and three; between two of them a coin is tossed for
        each task.
        """
        fixed = [self._point(one) for one in ("single", "arena-2", "arena-3")]
        own_cost, own = self._point(name)

        def compare(place: int) -> Any:
            costs, rights = (np.stack([one[k][place] for one in fixed], axis=-1) for k in (0, 1))
            return own[place] - interpolate(costs, rights, own_cost[place])

        return estimate(compare(0), compare(1))

    def frontiers(self) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Estimate]]:
        """Accuracy over cost of the plain rule and of the calibrated policies.

        The plain rule escalates in the order of sigma, `_PLAIN`, and mixes neighbours at random.
        The area is the mean accuracy over all budgets from the probe alone to all members.

        Returns:
            Points (relative cost, accuracy) by policy, and the area of each calibrated policy less
            that of the plain rule.
        """
        plain = [self._mode_point(self._follow_sigma(rule)) for rule in _PLAIN]

        def area(points: Sequence[Any], place: int) -> Any:
            cost = np.stack([one[0][place] for one in points], axis=-1)
            right = np.stack([one[1][place] for one in points], axis=-1)
            return integrate(cost, right, plain[0][0][place], plain[-1][0][place])

        lines = {"plain rule": plain}
        gains = {}
        for name in self.results[0]["frontiers"]:
            lines[name] = [plain[0], *self._list_points(name)]
            by_seed, drawn = (area(lines[name], place) - area(plain, place) for place in (0, 1))
            gains[name] = estimate(by_seed, drawn)
        shown = {
            name: [(float(c[0].mean()), float(r[0].mean())) for c, r in points]
            for name, points in lines.items()
        }
        return shown, gains

    def _point(self, name: str) -> Any:
        return tuple(self.sampled.mean(self._numbers(name, key)) for key in ("cost", "correct"))

    def _follow_sigma(self, rule: str) -> list[str]:
        """Modes of each seed's tasks where disagreement alone decides."""
        return [
            "".join(rule[0 if one == 0 else 2 if one == 1 else 1] for one in sigmas)
            for sigmas in self.sigmas()
        ]

    def _mode_point(self, modes: Sequence[str]) -> Any:
        """Cost and accuracy of a policy by the modes it chose, seed by seed."""
        return tuple(
            self.sampled.mean([r.by_mode(m, key) for r, m in zip(self._read, modes, strict=True)])
            for key in ("cost", "correct")
        )

    def _list_points(self, name: str) -> list[Any]:
        """Points of a policy from the least budget on; budgets of seeds are paired by place."""
        every = [one["frontiers"][name] for one in self.results]
        count = min(map(len, every))
        points = []
        for place in range(count):
            share = place / max(1, count - 1)
            modes = [line[round(share * (len(line) - 1))] for line in every]
            points.append(self._mode_point(modes))
        return points

    def attribution(self, kind: str) -> dict[str, Estimate]:
        """Leave-one-out value of each model: in the "cascade", or in the "arena" of three."""
        names = sorted(self.results[0]["attribution"][kind])
        return {
            name: self.share(
                [unpack_numbers(one["attribution"][kind][name]) for one in self.results]
            )
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
                    [unpack_numbers(one["attribution"][kind][name]) for one in self.results]
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
        pairs = zip(self.results, self._numbers(name, key), strict=True)
        return float(np.mean([values[_own(one, family)].mean() for one, values in pairs]))

    def modes_by_family(self, name: str) -> dict[str, tuple[float, ...]]:
        """Per cent of tasks by mode, by family, mean over seeds."""
        found: dict[str, tuple[float, ...]] = {}
        for family in self.families():
            shares = []
            for one, modes in zip(self.results, self._numbers(name, "mode"), strict=True):
                own = modes[_own(one, family)]
                shares.append([100 * np.mean(own == place) for place in range(len(MODES))])
            found[family] = tuple(np.mean(shares, axis=0).tolist())
        return found

    def probe_alone_by_seed(self, name: str, family: str) -> list[float]:
        """Share of a family's tasks that stay with the probe at every seed, per cent."""
        return [
            100 * float(np.mean(modes[_own(one, family)] == 0))
            for one, modes in zip(self.results, self._numbers(name, "mode"), strict=True)
        ]

    def similarity(self) -> float:
        """Median similarity of the most similar solved problem."""
        found = [unpack_numbers(one["tasks"]["similarity"]) for one in self.results]
        return float(np.median(np.concatenate(found)))


def _average(parts: Sequence[Estimate]) -> Estimate:
    """Mean of estimates; the ends are means, too, which is wide enough for dependent parts."""
    return Estimate(
        float(np.mean([one.point for one in parts])),
        float(np.mean([one.low for one in parts])),
        float(np.mean([one.high for one in parts])),
        tuple(np.mean([one.by_seed for one in parts], axis=0).tolist()),
    )
