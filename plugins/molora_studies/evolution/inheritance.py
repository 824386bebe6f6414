"""What a newborn should inherit: the share alpha of its parent's product."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
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
    EvolutionSettings,
    SubstrateOptions,
    build_lifecycle,
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
from molora_studies.statistics import MARGIN_NATS, Effect, adjust_by_holm, judge, measure_effect

__all__ = ["InheritanceOptions", "InheritanceStudy"]


class InheritanceOptions(SubstrateOptions):
    """Options.

    Attributes:
        vocabularies: The first one is used.
        alphas: Shares of the parent's product; 0 is a fresh start.
    """

    vocabularies: tuple[int, ...] = Field(default=(2048,), min_length=1)
    alphas: tuple[float, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=2)


class InheritanceStudy(Study):
    """The full system at every alpha, and without a lifecycle."""

    Options: ClassVar[type[StudyOptions]] = InheritanceOptions
    title: ClassVar[str] = "Shares of the parent in a newborn"
    measures: ClassVar[tuple[str, ...]] = ("molora_evolution",)

    @classmethod
    def plan(cls, options: InheritanceOptions) -> Sequence[Cell]:
        """A cell an alpha and seed; `None` is the population without a lifecycle."""
        shares: tuple[float | None, ...] = (None, *options.alphas)
        return [_plan_cell(options, alpha, seed) for alpha in shares for seed in options.seeds]

    @classmethod
    def summarise(
        cls, options: InheritanceOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """Every alpha against a fresh start and against no lifecycle, and the trend."""

        def read(alpha: float | None) -> list[float]:
            return [read_log_perplexity(results[_name(alpha, seed)]) for seed in options.seeds]

        def compare(reference: float | None, alpha: float) -> Effect:
            pairs = zip(read(reference), read(alpha), strict=True)
            return measure_effect([before - after for before, after in pairs])

        fresh, *inherited = sorted(options.alphas)
        against_fresh = {f"alpha = {a:g}": compare(fresh, a) for a in inherited}
        against_none = {f"alpha = {a:g}": compare(None, a) for a in (fresh, *inherited)}
        losses = np.array([read(a) for a in options.alphas])  # (alphas, seeds)
        trend = measure_effect((-np.polyfit(options.alphas, losses, 1)[0]).tolist())
        return Summary(
            findings={
                "against_fresh_start": to_json(against_fresh),
                "against_no_lifecycle": to_json(against_none),
                "trend_per_unit_of_alpha": trend.to_json(),
            },
            claims=[_claim(options, against_fresh)],
            tables=[
                tabulate_effects(f"Against alpha = {fresh:g}", against_fresh),
                tabulate_effects("Against no lifecycle", against_none),
                Table(
                    "Trend: reduction of log-perplexity per unit of alpha",
                    ("nats [95 %]", "p", "detectable at 80 %"),
                    [(trend.show(), f"{trend.p:.3g}", f"{trend.detectable:.4f}")],
                ),
            ],
            figures=[
                Figure(
                    "alphas",
                    "Reduction of balanced log-perplexity by share of the parent; bars are 95 % "
                    "intervals over seeds, the band is the zone of equivalence.",
                    partial(
                        draw_effects,
                        effects={
                            "against a fresh start": against_fresh,
                            "against no lifecycle": against_none,
                        },
                        published={},
                        margin=MARGIN_NATS,
                    ),
                )
            ],
            notes=[
                EQUAL_BUDGET,
                "New router, per-domain scope, no guard; one adapter dies in every generation. A "
                "newborn with alpha = 0 has fresh gates, others their parent's. Holm's correction "
                "is over the alphas of a table.",
            ],
        )


def _name(alpha: float | None, seed: int) -> str:
    what = "no lifecycle" if alpha is None else f"alpha {alpha:g}"
    return f"{what} seed {seed}"


def _plan_cell(options: InheritanceOptions, alpha: float | None, seed: int) -> Cell:
    settings = EvolutionSettings(
        scope="per-domain", lifecycle=() if alpha is None else build_lifecycle(alpha)
    )
    task = plan_evolution(
        options,
        settings,
        seed=seed,
        vocabulary=options.vocabularies[0],
        label="no lifecycle" if alpha is None else f"alpha {alpha:g}",
    )
    return Cell(_name(alpha, seed), {"alpha": alpha, "seed": seed}, task)


def _claim(options: InheritanceOptions, against_fresh: Mapping[str, Effect]) -> Claim:
    """The counterfactual at the share nearest to one half, which is the lifecycle's own."""
    fresh, *inherited = sorted(options.alphas)
    alpha = min(inherited, key=lambda share: abs(share - 0.5))
    effect = against_fresh[f"alpha = {alpha:g}"]
    p = adjust_by_holm({name: e.p for name, e in against_fresh.items()})[f"alpha = {alpha:g}"]
    return Claim(
        "What a newborn inherits makes no consistent difference",
        "alpha = 0 counterfactual sign-inconsistent and underpowered, n = 3",
        f"alpha = {alpha:g} against {fresh:g}: {effect.show()} nats, p = {p:.2g} (Holm), n = "
        f"{effect.count}; detectable {effect.detectable:.4f}",
        judge(effect, None, p),
        name_replicates(effect.count),
        "holds if shown to lie within 0.005 nats, does not hold if significant and not within; a "
        "difference that is not significant shows nothing",
    )
