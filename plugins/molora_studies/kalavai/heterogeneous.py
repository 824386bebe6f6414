"""Contributors with recipes of their own: one doubles its batch or rate, or stops half-way."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

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
    estimate,
    plan_condition,
    read_gain,
)
from molora_studies.verdicts import Span, judge_below, name_unit

__all__ = ["HeterogeneousOptions", "HeterogeneousStudy"]

_PUBLISHED_SPREAD = 0.41  # arXiv 2603.22755: percentage points


class HeterogeneousOptions(StudyOptions):
    """Options.

    Attributes:
        domains: One contributor each.
        differs: The contributor whose recipe differs.
        steps: Steps of the others.
        batch: Blocks per step of the others.
        learning_rate: Peak rate of the others.
    """

    domains: tuple[str, ...] = THREE_DOMAINS
    differs: str = "python"
    steps: int = 600
    batch: int = 4
    learning_rate: float = 2e-3


class HeterogeneousStudy(Study):
    """Four recipes of one contributor, the others unchanged."""

    Options: ClassVar[type[StudyOptions]] = HeterogeneousOptions
    title: ClassVar[str] = "Contributors with different recipes"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def _recipes(cls, options: HeterogeneousOptions) -> dict[str, dict[str, Any]]:
        return {
            "all alike": {},
            "batch x 2": {"batch": 2 * options.batch},
            "rate x 2": {"learning_rate": 2 * options.learning_rate},
            "half the steps": {"steps": options.steps // 2},
        }

    @classmethod
    def plan(cls, options: HeterogeneousOptions) -> Sequence[Cell]:
        """A cell a recipe and seed."""
        return [
            Cell(
                f"{label} seed {seed}",
                {"recipe": label, "seed": seed},
                plan_condition(
                    f"{options.differs} with {label}, seed {seed}",
                    options.domains,
                    seed,
                    {"steps": options.steps, "batch": options.batch},
                    own={options.differs: recipe},
                ),
            )
            for label, recipe in cls._recipes(options).items()
            for seed in options.seeds
        ]

    @classmethod
    def summarise(
        cls, options: HeterogeneousOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """Gains by recipe and their spread, paired by seed."""
        labels = list(cls._recipes(options))
        gains = {n: [read_gain(results[f"{n} seed {s}"]) for s in options.seeds] for n in labels}
        found = {n: estimate(values) for n, values in gains.items()}
        alike = gains[labels[0]]
        change = {
            n: estimate(a - b for a, b in zip(gains[n], alike, strict=True)) for n in labels[1:]
        }
        spread = estimate(max(row) - min(row) for row in zip(*gains.values(), strict=True))
        return Summary(
            findings={
                "gain_percent": {n: e.to_json() for n, e in found.items()},
                "change_pp": {n: e.to_json() for n, e in change.items()},
                "spread_pp": spread.to_json(),
            },
            claims=[
                Claim(
                    "A contributor with another batch, rate or length hardly moves the gain",
                    f"spread of at most {_PUBLISHED_SPREAD} pp",
                    f"spread {spread.show('pp', sign=False)}",
                    _judge(spread),
                    name_unit("training seed", len(options.seeds)),
                    "largest minus smallest gain of the four recipes by seed; holds if its "
                    "interval is not above the published spread, differs if it lies above",
                )
            ],
            tables=[
                Table(
                    f"Gain on the best alone when '{options.differs}' differs",
                    ("recipe", "gain", "against all alike"),
                    [(n, found[n].show(), change[n].show("pp") if n in change else "")
                     for n in labels],
                )
            ],
            figures=[
                Figure(
                    "recipes",
                    "Gain on the best alone by the recipe of one contributor; bars are 95 % "
                    "intervals over seeds.",
                    lambda figure: _draw(figure, found),
                )
            ],
        )  # fmt: skip


def _judge(spread: Estimate) -> Verdict:
    verdict = judge_below([Span.of(spread)], _PUBLISHED_SPREAD)
    return "differs" if verdict == "does not hold" else verdict


def _draw(figure: Any, found: Mapping[str, Estimate]) -> None:
    axes = figure.subplots()
    errors = [e.mean - e.low if e.low is not None else 0.0 for e in found.values()]
    axes.errorbar([e.mean for e in found.values()], list(found), xerr=errors, fmt="o", capsize=3)
    axes.set_xlabel("gain on the best alone, %")
    axes.set_ylim(-0.5, len(found) - 0.5)
    axes.invert_yaxis()
