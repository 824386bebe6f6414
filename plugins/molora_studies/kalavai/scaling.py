"""From two to five specialists: what each further one adds."""

from collections.abc import Mapping, Sequence
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
    Estimate,
    draw_estimates,
    estimate,
    plan_condition,
    read_gain,
    read_gain_over_base,
)
from molora_studies.verdicts import Span, join_verdicts, judge_above, name_unit

__all__ = ["ScalingOptions", "ScalingStudy"]

_PUBLISHED = {2: 1.76, 3: 4.39, 4: 11.39, 5: 12.95}  # arXiv 2603.22755, percent


class ScalingOptions(StudyOptions):
    """Options.

    Attributes:
        domains: In the order in which contributors join; the first two begin.
        steps: Steps of a specialist.
    """

    domains: tuple[str, ...] = Field(
        default=("cpp", "python", "science", "readme", "man-de"), min_length=3
    )
    steps: int = 600


class ScalingStudy(Study):
    """Every number of specialists, on the domains of those who joined and on all domains."""

    Options: ClassVar[type[StudyOptions]] = ScalingOptions
    title: ClassVar[str] = "Adding specialists"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: ScalingOptions) -> Sequence[Cell]:
        """A cell a number of specialists, set of measured domains and seed."""
        return [
            Cell(
                _name(count, seed, everywhere=len(domains) > count),
                {"specialists": count, "measured": len(domains), "seed": seed},
                plan_condition(
                    f"{count} specialists on {len(domains)} domains, seed {seed}",
                    domains[:count],
                    seed,
                    {"steps": options.steps},
                    further=domains[count:],
                ),
            )
            for count in range(2, len(options.domains) + 1)
            for domains in dict.fromkeys((options.domains[:count], options.domains))
            for seed in options.seeds
        ]

    @classmethod
    def summarise(
        cls, options: ScalingOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """Gains by number of specialists, against both references."""
        counts = list(range(2, len(options.domains) + 1))

        def read(count: int, reference: str) -> list[float]:
            return [
                read_gain(results[_name(count, seed)], reference=reference)
                for seed in options.seeds
            ]

        def read_everywhere(count: int) -> list[float]:
            is_all = count == len(options.domains)
            return [
                read_gain_over_base(results[_name(count, seed, everywhere=not is_all)])
                for seed in options.seeds
            ]

        alone = {n: read(n, "best_alone") for n in counts}
        specialist = {n: estimate(read(n, "best_specialist")) for n in counts}
        found = {n: estimate(values) for n, values in alone.items()}
        steps = {
            n: estimate(b - a for a, b in zip(alone[n - 1], alone[n], strict=True))
            for n in counts[1:]
        }
        whole = {n: read_everywhere(n) for n in counts}
        added = {
            n: estimate(b - a for a, b in zip(whole[n - 1], whole[n], strict=True))
            for n in counts[1:]
        }
        return Summary(
            findings={
                "gain_percent": {str(n): e.to_json() for n, e in found.items()},
                "gain_over_best_specialist_percent": {
                    str(n): e.to_json() for n, e in specialist.items()
                },
                "added_pp": {str(n): e.to_json() for n, e in steps.items()},
                "all_domains_over_base_percent": {
                    str(n): estimate(values).to_json() for n, values in whole.items()
                },
                "all_domains_added_pp": {str(n): e.to_json() for n, e in added.items()},
            },
            claims=[
                Claim(
                    "The gain rises with the number of specialists",
                    ", ".join(f"{n}: {gain:+.2f} %" for n, gain in _PUBLISHED.items()),
                    ", ".join(f"{n}: {found[n].mean:+.2f} %" for n in counts)
                    + f", {len(options.seeds)} seeds",
                    _judge(steps),
                    name_unit("training seed", len(options.seeds)),
                    "each number is measured on the domains of those who joined, so that its text "
                    "changes, too; holds if every step's interval lies above 0",
                ),
                Claim(
                    "On the same text every further specialist lowers the fused loss",
                    "not published",
                    ", ".join(f"{n}: {e.mean:+.2f} pp" for n, e in added.items())
                    + f" added, {len(options.seeds)} seeds",
                    _judge(added),
                    name_unit("training seed", len(options.seeds)),
                    "reduction on the base over all domains, contributed or not; holds if every "
                    "step's interval lies above 0",
                ),
            ],
            tables=[
                Table(
                    "Gain by number of specialists",
                    ("specialists", "joins", "on the best alone", "added",
                     "on the best specialist", "published (on the best specialist)",
                     "on the base, all domains", "added there"),
                    [
                        (
                            str(n),
                            options.domains[n - 1],
                            found[n].show(),
                            steps[n].show("pp") if n in steps else "",
                            specialist[n].show(),
                            f"{_PUBLISHED[n]:+.2f} %" if n in _PUBLISHED else "",
                            estimate(whole[n]).show(),
                            added[n].show("pp") if n in added else "",
                        )
                        for n in counts
                    ],
                )
            ],
            figures=[
                Figure(
                    "specialists",
                    "Gain by number of specialists; bars are 95 % intervals over seeds.",
                    lambda figure: _draw(figure, found, specialist),
                )
            ],
        )  # fmt: skip


def _name(count: int, seed: int, *, everywhere: bool = False) -> str:
    where = " on all domains" if everywhere else ""
    return f"{count} specialists{where} seed {seed}"


def _judge(steps: Mapping[int, Estimate]) -> Verdict:
    return join_verdicts([judge_above([Span.of(step)]) for step in steps.values()])


def _draw(figure: Any, alone: Mapping[int, Estimate], specialist: Mapping[int, Estimate]) -> None:
    axes = figure.subplots()
    for label, found in (("on the best alone", alone), ("on the best specialist", specialist)):
        draw_estimates(axes, found, label)
    axes.plot(
        list(_PUBLISHED), list(_PUBLISHED.values()), marker="s", linestyle="--", label="published"
    )
    axes.set_xticks(list(alone))
    axes.set_xlabel("specialists")
    axes.set_ylabel("gain, %")
    axes.legend()
