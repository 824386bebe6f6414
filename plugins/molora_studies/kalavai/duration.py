"""How long specialists train, with and without frozen blocks: where freezing starts to pay."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from pydantic import Field

from molora_studies.framework.contract import (
    Cell,
    Claim,
    Figure,
    Study,
    StudyOptions,
    Summary,
    Table,
    Verdict,
)
from molora_studies.kalavai.conditions import (
    THREE_DOMAINS,
    Estimate,
    choose_seeds,
    draw_estimates,
    estimate,
    plan_depth,
    read_gain,
    read_gain_over_base,
)
from molora_studies.verdicts import Span, judge_above, judge_below, name_unit

__all__ = ["DurationOptions", "DurationStudy"]

# arXiv 2603.22755, steps x freeze: percent below the base, (K = 0, K = 4 of 24).
_PUBLISHED = {
    50: (4.0, 3.5), 100: (5.1, 4.5), 500: (9.2, 8.3), 1000: (12.1, 10.8), 2000: (15.5, 14.2),
    5000: (17.7, 17.5), 10000: (16.7, 17.7), 20000: (14.7, 17.0),
}  # fmt: skip


class DurationOptions(StudyOptions):
    """Options.

    Attributes:
        domains: One contributor each.
        steps: Steps of a specialist.
        depth: The frozen depth compared with none.
        screened: Lengths run at the first seed only.
    """

    domains: tuple[str, ...] = THREE_DOMAINS
    steps: tuple[int, ...] = Field(default=(50, 150, 600, 1800), min_length=2)
    depth: int = 1
    screened: tuple[int, ...] = ()


class DurationStudy(Study):
    """Every length at both depths; the learning rate's schedule fits each length."""

    Options: ClassVar[type[StudyOptions]] = DurationOptions
    title: ClassVar[str] = "Training length, with and without frozen blocks"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: DurationOptions) -> Sequence[Cell]:
        """A cell a length, depth and seed."""
        return [
            Cell(
                f"steps {steps} freeze {depth} seed {seed}",
                {"steps": steps, "depth": depth, "seed": seed},
                plan_depth(options.domains, steps, depth, seed),
            )
            for steps in options.steps
            for depth in (0, options.depth)
            for seed in choose_seeds(options.seeds, screened=steps in options.screened)
        ]

    @classmethod
    def summarise(
        cls, options: DurationOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """Reductions by length and depth, and where the two curves cross."""

        def read(steps: int, depth: int, figure: Any) -> list[float]:
            return [
                figure(results[f"steps {steps} freeze {depth} seed {seed}"])
                for seed in choose_seeds(options.seeds, screened=steps in options.screened)
            ]

        depths = (0, options.depth)
        over_base = {
            (s, d): estimate(read(s, d, read_gain_over_base)) for s in options.steps for d in depths
        }
        gains = {(s, d): estimate(read(s, d, read_gain)) for s in options.steps for d in depths}
        cost = {
            s: estimate(
                a - b
                for a, b in zip(
                    read(s, 0, read_gain_over_base),
                    read(s, options.depth, read_gain_over_base),
                    strict=True,
                )
            )
            for s in options.steps
        }
        crossing = find_crossing({s: e.mean for s, e in cost.items()})
        longest = max(options.steps)
        unit = name_unit("training seed", len(options.seeds))
        return Summary(
            findings={
                "over_base_percent": _by_steps(over_base),
                "gain_percent": _by_steps(gains),
                "cost_of_freezing_pp": {str(s): e.to_json() for s, e in cost.items()},
                "crossover_steps": crossing,
            },
            claims=[
                Claim(
                    "Freezing costs at short training",
                    "4.0 against 3.5 % below the base at 50 steps",
                    "; ".join(f"{s}: {cost[s].show('pp')}" for s in options.steps),
                    _judge_cost([cost[s] for s in options.steps]),
                    unit,
                    "cost by steps; holds if the shortest length's interval lies above 0, differs "
                    "if only longer ones do",
                ),
                Claim(
                    "Freezing pays at long training (the crossover)",
                    "near 10,000 steps; 14.7 against 17.0 % at 20,000",
                    (f"crosses near {crossing:.0f} steps" if crossing else "no crossing seen")
                    + f"; cost {cost[longest].show('pp')} at {longest} steps",
                    judge_below([Span.of(cost[longest])]) if crossing else "not decided",
                    unit,
                    "holds if the curves cross and the interval at the longest training lies below "
                    "0; the best weights by validation are kept here, so that longer training does "
                    "not over-fit the own domain as the published recipe does",
                ),
            ],
            tables=[
                Table(
                    "Reduction of the loss on the base, percent",
                    ("steps", "K = 0", f"K = {options.depth}", "cost of freezing"),
                    [
                        (
                            str(s),
                            over_base[s, 0].show(),
                            over_base[s, options.depth].show(),
                            cost[s].show("pp"),
                        )
                        for s in options.steps
                    ],
                )
            ],
            figures=[
                Figure(
                    "steps",
                    "Reduction of the loss on the base by training length; bars are 95 % "
                    "intervals over seeds, dashed lines the published figures.",
                    lambda figure: _draw(figure, options, over_base),
                )
            ],
            notes=[
                "The rate is the kind's default whatever the length; where it is too high for so "
                "few steps, the weights kept are the base's and the reduction is 0.",
            ],
        )


def find_crossing(cost: Mapping[int, float]) -> float | None:
    """Where the cost of freezing falls to 0, steps, by interpolation over log steps; or None."""
    lengths = sorted(cost)
    for before, after in pairwise(lengths):
        if cost[before] > 0 >= cost[after]:
            share = cost[before] / (cost[before] - cost[after])
            return float(before * (after / before) ** share)
    return None


def _by_steps(figures: Mapping[tuple[int, int], Estimate]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for (steps, depth), figure in figures.items():
        table.setdefault(str(steps), {})[str(depth)] = figure.to_json()
    return table


def _judge_cost(costs: Sequence[Estimate]) -> Verdict:
    """Of the costs from the shortest to the longest training."""
    shortest, *longer = [judge_above([Span.of(cost)]) for cost in costs]
    if shortest == "holds":
        return "holds"
    if any(cost.low is None for cost in costs):
        return "not decided"
    return "differs" if "holds" in longer else shortest


def _draw(
    figure: Any, options: DurationOptions, over_base: Mapping[tuple[int, int], Estimate]
) -> None:
    axes = figure.subplots()
    for place, depth in enumerate((0, options.depth)):
        found = {steps: over_base[steps, depth] for steps in options.steps}
        lines = draw_estimates(axes, found, f"K = {depth}, here")
        axes.plot(
            list(_PUBLISHED), [pair[place] for pair in _PUBLISHED.values()], linestyle="--",
            color=lines[0].get_color(), label=f"K = {(0, 4)[place]} of 24, published",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("steps of a specialist")
    axes.set_ylabel("reduction of the loss on the base, %")
    axes.legend()
