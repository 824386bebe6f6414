"""How far the base was trained before it was shared: bases of several ages."""

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
)
from molora_studies.kalavai.conditions import (
    THREE_DOMAINS,
    Estimate,
    choose_seeds,
    draw_estimates,
    estimate,
    plan_aged_base,
    plan_condition,
    read_gain,
)
from molora_studies.kalavai.method_table import read_gain_interval
from molora_studies.verdicts import Span, join_verdicts, judge_above, name_unit

__all__ = ["MaturityOptions", "MaturityStudy"]


class MaturityOptions(StudyOptions):
    """Options.

    Attributes:
        domains: One contributor each.
        ages: Steps of the base.
        screened: Ages run at the first seed only.
        steps: Steps of a specialist.
    """

    domains: tuple[str, ...] = THREE_DOMAINS
    ages: tuple[int, ...] = Field(default=(325, 1300, 2600, 5200), min_length=2)
    screened: tuple[int, ...] = (1300,)
    steps: int = 600


class MaturityStudy(Study):
    """Every age of the base; each base has a schedule of its own, tokenizer and text are shared."""

    Options: ClassVar[type[StudyOptions]] = MaturityOptions
    title: ClassVar[str] = "Maturity of the base"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: MaturityOptions) -> Sequence[Cell]:
        """A cell an age and seed."""
        return [
            Cell(
                f"base {age} seed {seed}",
                {"age": age, "seed": seed},
                plan_condition(
                    f"base of {age} steps, seed {seed}",
                    options.domains,
                    seed,
                    {"steps": options.steps},
                    base=plan_aged_base(age),
                ),
            )
            for age in options.ages
            for seed in choose_seeds(options.seeds, screened=age in options.screened)
        ]

    @classmethod
    def summarise(
        cls, options: MaturityOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """Gain by age, and whether it falls as the base matures."""

        def read(age: int, figure: Any) -> list[Any]:
            return [
                figure(results[f"base {age} seed {seed}"])
                for seed in choose_seeds(options.seeds, screened=age in options.screened)
            ]

        gains = {age: estimate(read(age, read_gain)) for age in options.ages}
        on_specialist = {
            age: estimate(read(age, lambda r: read_gain(r, reference="best_specialist")))
            for age in options.ages
        }
        base_loss = {age: read(age, _base_loss)[0] for age in options.ages}
        youngest, oldest = min(options.ages), max(options.ages)
        pairs = zip(read(youngest, read_gain), read(oldest, read_gain), strict=False)
        fall = estimate(a - b for a, b in pairs)
        repeated = {
            a: [Span.of(e), *read(a, _read_documents)] for a, e in gains.items() if e.count > 1
        }
        unit = f"{name_unit('training seed', len(options.seeds))} on one base of each age"
        return Summary(
            findings={
                "gain_percent": {str(a): e.to_json() for a, e in gains.items()},
                "gain_over_best_specialist_percent": {
                    str(a): e.to_json() for a, e in on_specialist.items()
                },
                "base_loss_nats": {str(a): loss for a, loss in base_loss.items()},
            },
            claims=[
                Claim(
                    "A better trained base leaves less to gain",
                    "Qwen-1.5B gains +1.06 % where Pythia at step 10,000 gains +6.5 to +7.7 %",
                    f"from {youngest} to {oldest} steps the gain falls by {fall.show('pp')}",
                    judge_above([Span.of(fall)]),
                    unit,
                    "holds if the interval of the paired fall lies above 0",
                ),
                Claim(
                    "There is a gain at every age tried at several seeds",
                    "positive for all published bases",
                    ", ".join(f"{a}: {e.show()}" for a, e in gains.items()),
                    join_verdicts([judge_above(spans) for spans in repeated.values()])
                    if repeated
                    else "not decided",
                    f"{unit}, and document cluster at every seed",
                    "holds if the intervals of all ages with several seeds lie above 0; one "
                    "training decides nothing and is shown beside",
                ),
            ],
            tables=[
                Table(
                    "Gain by age of the base",
                    ("base steps", "base loss", "on the best alone", "on the best specialist"),
                    [
                        (
                            str(a),
                            f"{base_loss[a]:.3f} nats",
                            gains[a].show(),
                            on_specialist[a].show(),
                        )
                        for a in options.ages
                    ],
                )
            ],
            figures=[
                Figure(
                    "age",
                    "Gain by age of the base; bars are 95 % intervals over seeds.",
                    lambda figure: _draw(figure, gains, on_specialist),
                )
            ],
        )


def _read_documents(result: Mapping[str, Any]) -> Span:
    """Interval of the gain on the best alone by document cluster, percent."""
    return Span.of(read_gain_interval(result["evaluation"], "fused:evidence", "best_alone"))


def _base_loss(result: Mapping[str, Any]) -> float:
    losses = result["held_out"]["base"]
    return float(sum(losses.values()) / len(losses))


def _draw(figure: Any, alone: Mapping[int, Estimate], specialist: Mapping[int, Estimate]) -> None:
    axes = figure.subplots()
    for label, found in (("on the best alone", alone), ("on the best specialist", specialist)):
        draw_estimates(axes, found, label)
    axes.set_xscale("log")
    axes.set_xlabel("training steps of the base")
    axes.set_ylabel("gain, %")
    axes.legend()
