"""Effects between populations of the substrate, as tables and figures say them."""

from collections.abc import Mapping, Sequence
from typing import Any

from molora_studies.framework.contract import Table
from molora_studies.statistics import (
    Effect,
    adjust_by_holm,
    aggregate_arithmetic,
    aggregate_balanced,
)
from molora_studies.verdicts import name_unit

__all__ = [
    "AGGREGATORS",
    "EQUAL_BUDGET",
    "count_births",
    "draw_effects",
    "name_replicates",
    "read_log_perplexity",
    "tabulate_effects",
    "to_json",
]

AGGREGATORS = {"balanced": aggregate_balanced, "arithmetic": aggregate_arithmetic}

EQUAL_BUDGET = (
    "All populations of a replicate have equal adaptation steps on equal batches and equal fitness "
    "measurements; a population without a lifecycle measures its fitness and nothing reads it."
)


def name_replicates(count: int) -> str:
    """The unit of replication of studies of the substrate."""
    return name_unit("seed of everything but the documents", count)


def read_log_perplexity(result: Mapping[str, Any], aggregator: str = "balanced") -> float:
    """Held-out log-perplexity over domains of an evolved population, nats."""
    return AGGREGATORS[aggregator](result["held_out"])


def to_json(effects: Mapping[str, Effect]) -> dict[str, Any]:
    """JSON values of a family of effects, with p values adjusted over the family."""
    adjusted = adjust_by_holm({name: effect.p for name, effect in effects.items()})
    return {
        name: {**effect.to_json(), "p_holm": adjusted[name]} for name, effect in effects.items()
    }


def tabulate_effects(title: str, effects: Mapping[str, Effect]) -> Table:
    """A family of effects, Holm's correction over the family."""
    adjusted = adjust_by_holm({name: effect.p for name, effect in effects.items()})
    return Table(
        title,
        (
            "effect",
            "nats [95 %]",
            "t",
            "p",
            "p (Holm)",
            "detectable at 80 %",
            "p of equivalence",
            "within the margin",
        ),
        [
            (
                name,
                effect.show(),
                "-" if effect.t is None else f"{effect.t:.2f}",
                f"{effect.p:.3g}",
                f"{adjusted[name]:.3g}",
                f"{effect.detectable:.4f}",
                f"{effect.equivalence_p:.3g}",
                "yes" if effect.is_null else "no",
            )
            for name, effect in effects.items()
        ],
    )


def draw_effects(
    figure: Any,
    effects: Mapping[str, Mapping[str, Effect]],
    published: Mapping[str, float],
    margin: float,
) -> None:
    """Effects with intervals, one row a name and one marker a family.

    Args:
        figure: An empty matplotlib figure.
        effects: Families by label, effects by name in each.
        published: Published sizes by name.
        margin: Half width of the zone of equivalence.
    """
    axes = figure.subplots()
    names = list(dict.fromkeys(name for family in effects.values() for name in family))
    axes.axvspan(-margin, margin, alpha=0.15, label=f"within {margin} nats")
    for place, (label, family) in enumerate(effects.items()):
        shift = 0.25 * (place - (len(effects) - 1) / 2)
        chosen = [name for name in names if name in family]
        axes.errorbar(
            [family[name].mean for name in chosen],
            [names.index(name) + shift for name in chosen],
            xerr=[family[name].mean - family[name].low for name in chosen],
            fmt="o",
            capsize=3,
            label=label,
        )
    known = [name for name in names if name in published]
    if known:
        axes.plot(
            [published[name] for name in known],
            [names.index(name) for name in known],
            "k|",
            markersize=14,
            label="published",
        )
    axes.axvline(0, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("reduction of log-perplexity, nats")
    axes.legend()


def count_births(results: Sequence[Mapping[str, Any]]) -> float:
    """Mean number of newborns of some populations."""
    return sum(result["births"] for result in results) / len(results)
