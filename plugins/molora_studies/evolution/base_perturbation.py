"""Whether the lifecycle's role depends on the base: its effect on perturbed bases."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, ClassVar

from pydantic import Field

from molora_studies.evolution.effects import (
    EQUAL_BUDGET,
    draw_effects,
    name_replicates,
    read_log_perplexity,
    tabulate_effects,
    to_json,
)
from molora_studies.evolution.substrate import (
    LIFECYCLE,
    EvolutionSettings,
    SubstrateOptions,
    plan_evolution,
)
from molora_studies.framework.contract import (
    Cell,
    Claim,
    Figure,
    Study,
    StudyOptions,
    Summary,
    Table,
)
from molora_studies.statistics import (
    MARGIN_NATS,
    Effect,
    adjust_by_holm,
    aggregate_balanced,
    judge,
    measure_effect,
)

__all__ = ["BasePerturbationOptions", "BasePerturbationStudy"]


class BasePerturbationOptions(SubstrateOptions):
    """Options.

    Attributes:
        vocabularies: The first one is used.
        perturbations: Noise on every matrix of the base, relative to the spread of its entries;
            the first is the reference.
    """

    vocabularies: tuple[int, ...] = Field(default=(2048,), min_length=1)
    perturbations: tuple[float, ...] = Field(default=(0.0, 0.05, 0.2), min_length=2)


class BasePerturbationStudy(Study):
    """The new router with and without the lifecycle, on every base."""

    Options: ClassVar[type[StudyOptions]] = BasePerturbationOptions
    title: ClassVar[str] = "The lifecycle on perturbed bases"
    measures: ClassVar[tuple[str, ...]] = ("molora_evolution",)

    @classmethod
    def plan(cls, options: BasePerturbationOptions) -> Sequence[Cell]:
        """A cell a perturbation, lifecycle and seed."""
        return [
            Cell(
                _name(size, living, seed),
                {"perturbation": size, "lifecycle": living, "seed": seed},
                plan_evolution(
                    options,
                    EvolutionSettings(scope="per-domain", lifecycle=LIFECYCLE if living else ()),
                    seed=seed,
                    vocabulary=options.vocabularies[0],
                    perturbation=size,
                    label=f"lifecycle {'on' if living else 'off'}",
                ),
            )
            for size, living, seed in product(
                options.perturbations, (False, True), options.seeds
            )
        ]  # fmt: skip

    @classmethod
    def summarise(
        cls, options: BasePerturbationOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """The lifecycle's effect on every base, and how the perturbation changes it."""
        gains = {size: _read_gains(options, results, size) for size in options.perturbations}
        reference, *perturbed = options.perturbations
        effects = {f"noise {size:g}": measure_effect(values) for size, values in gains.items()}
        changes = {
            f"noise {size:g}": measure_effect(
                [a - b for a, b in zip(gains[size], gains[reference], strict=True)]
            )
            for size in perturbed
        }
        adjusted = adjust_by_holm({name: effect.p for name, effect in changes.items()})
        return Summary(
            findings={
                "lifecycle": to_json(effects),
                "change": to_json(changes),
                "base": {str(size): _mean_base(options, results, size) for size in gains},
            },
            claims=[
                Claim(
                    f"The lifecycle's role does not depend on the base ({name})",
                    "base-perturbation probe refutes a genomic-context reading",
                    f"change of the lifecycle's effect {effect.show()} nats, p = "
                    f"{adjusted[name]:.2g} (Holm), n = {effect.count}; detectable "
                    f"{effect.detectable:.4f}",
                    judge(effect, None, adjusted[name]),
                    name_replicates(effect.count),
                    "holds if the change is shown to lie within 0.005 nats",
                )
                for name, effect in changes.items()
            ],
            tables=[
                tabulate_effects("Effect of the lifecycle", effects),
                tabulate_effects(f"Its change against noise {reference:g}", changes),
                Table(
                    "Bases: balanced log-perplexity, mean over seeds",
                    ("noise", "base alone", "adapted, no lifecycle", "with lifecycle"),
                    [_describe(options, results, size) for size in options.perturbations],
                ),
            ],
            figures=[_build_figure(effects, changes)],
            notes=[
                EQUAL_BUDGET,
                "Specialists are trained on the unperturbed base and transplanted; noise is drawn "
                "anew at every seed. New router, per-domain scope, no guard; one adapter dies in "
                "every generation.",
            ],
        )


def _name(size: float, living: bool, seed: int) -> str:
    return f"noise {size:g} lifecycle {'on' if living else 'off'} seed {seed}"


def _read_gains(
    options: BasePerturbationOptions, results: Mapping[str, Mapping[str, Any]], size: float
) -> list[float]:
    """Reduction of log-perplexity by the lifecycle at every seed, nats."""
    return [
        read_log_perplexity(results[_name(size, False, seed)])
        - read_log_perplexity(results[_name(size, True, seed)])
        for seed in options.seeds
    ]


def _mean_base(
    options: BasePerturbationOptions, results: Mapping[str, Mapping[str, Any]], size: float
) -> float:
    losses = [
        aggregate_balanced(results[_name(size, False, seed)]["base"]) for seed in options.seeds
    ]
    return sum(losses) / len(losses)


def _describe(
    options: BasePerturbationOptions, results: Mapping[str, Mapping[str, Any]], size: float
) -> tuple[str, ...]:
    means = [_mean_base(options, results, size)]
    for living in (False, True):
        losses = [read_log_perplexity(results[_name(size, living, seed)]) for seed in options.seeds]
        means.append(sum(losses) / len(losses))
    return (f"{size:g}", *(f"{mean:.4f}" for mean in means))


def _build_figure(effects: Mapping[str, Effect], changes: Mapping[str, Effect]) -> Figure:
    return Figure(
        "perturbations",
        "Effect of the lifecycle on balanced log-perplexity by noise on the base, and its change; "
        "bars are 95 % intervals over seeds, the band is the zone of equivalence.",
        partial(
            draw_effects,
            effects={"effect of the lifecycle": effects, "its change": changes},
            published={},
            margin=MARGIN_NATS,
        ),
    )
