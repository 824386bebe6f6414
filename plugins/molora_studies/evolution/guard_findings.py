"""What the study `guard` says of its results: harm by seed, decisions, claims, tables, figures."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from molora_fed.population.guard import compare_branches
from molora_studies.evolution.effects import draw_effects, name_replicates
from molora_studies.framework.contract import Claim, Figure, Table, Verdict
from molora_studies.statistics import MARGIN_NATS, Effect, judge
from molora_studies.verdicts import Span, compute_span, judge_above

__all__ = [
    "BARE",
    "HELP",
    "WANTED",
    "claim_bare",
    "claim_guarded",
    "claim_planted",
    "describe_comparisons",
    "make_bounds_figure",
    "make_effects_figure",
    "measure_harm",
    "tabulate_decisions",
    "tabulate_seeds",
]

BARE = "bare lifecycle"
HARM, HELP = "ruin", "restore"
WANTED = {HARM: 0.95, HELP: 0.5}
"""Share of right decisions that is asked for, by planted operator."""

_LEVEL = 0.95
_PUBLISHED = -0.028  # arXiv 2605.11153: the lifecycle, nats of balanced log-perplexity, n = 3


def measure_harm(with_it: Mapping[str, Any], without: Mapping[str, Any]) -> dict[str, float]:
    """Harm of a lifecycle at one seed, by document cluster.

    Args:
        with_it: `clusters` of the population with the lifecycle.
        without: The same of the one without.

    Returns:
        `effect`, nats, above 0 where the lifecycle helps; its `error`; and `p`, one-sided, of no
        harm.
    """
    found = compare_branches(
        np.asarray(with_it["sums"], dtype=float),
        np.asarray(without["sums"], dtype=float),
        np.asarray(without["tokens"], dtype=float),
        np.asarray(without["domain"], dtype=np.int64),
    )
    if found.error == 0:  # bit for bit the same population
        p = float(found.difference <= 0)
    else:
        p = float(stats.t.sf(found.difference / found.error, found.degrees))
    return {"effect": -found.difference, "error": found.error, "p": p}


def _describe_share(count: int, total: int) -> dict[str, Any]:
    """A share of decisions with its exact interval (Clopper and Pearson)."""
    if total == 0:
        return {"count": 0, "total": 0, "share": None, "low": 0.0, "high": 1.0}
    interval = stats.binomtest(count, total).proportion_ci(_LEVEL, method="exact")
    return {
        "count": count,
        "total": total,
        "share": count / total,
        "low": float(interval.low),
        "high": float(interval.high),
    }


def describe_comparisons(
    comparisons: Sequence[Mapping[str, Any]], *, helps: bool = False
) -> dict[str, Any]:
    """What became of some comparisons.

    Args:
        comparisons: Each as `Comparison.to_json()`.
        helps: Whether all of these lifecycles are known to help; else keeping is not right.

    Returns:
        Shares `kept` and `right`; means of `difference` and `error`, nats, and the `least` and
        `most` difference; the chance that a lifecycle is kept at such errors whose harm is 0
        (`idle`), half of delta (`half`) or delta (`full`). None where there are none.
    """
    kept = sum(bool(one["kept"]) for one in comparisons)
    count = len(comparisons)
    differences = [one["difference"] for one in comparisons]

    def expect(share: float) -> list[float]:
        return [_expect_kept(one, share * one["delta"]) for one in comparisons]

    def mean(values: Sequence[float]) -> float | None:
        return float(np.mean(values)) if values else None

    return {
        "kept": _describe_share(kept, count),
        "right": _describe_share(kept if helps else count - kept, count),
        "difference": mean(differences),
        "least": min(differences, default=None),
        "most": max(differences, default=None),
        "error": mean([one["error"] for one in comparisons]),
        "idle": mean(expect(0.0)),
        "half": mean(expect(0.5)),
        "full": mean(expect(1.0)),
    }


def _expect_kept(one: Mapping[str, Any], harm: float) -> float:
    """Chance that a lifecycle of this true harm, nats, is kept at a comparison's error."""
    room = one["delta"] - harm
    if not one["error"] > 0:
        return float(room >= 0)
    quantile = stats.t.ppf(one["level"], one["degrees"])
    return float(stats.t.cdf(room / one["error"] - quantile, one["degrees"]))


def _show_share(found: Mapping[str, Any]) -> str:
    if found["share"] is None:
        return "none asked"
    return (
        f"{found['count']} of {found['total']}, {100 * found['share']:.0f} % "
        f"[{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
    )


def claim_bare(effect: Effect) -> Claim:
    """The published one, of the lifecycle without a guard."""
    return Claim(
        "The bare lifecycle harms",
        "-0.028 nats, t = -4.46, p = 0.047, n = 3",
        f"{effect.show()} nats, p = {effect.p:.2g}, n = {effect.count}; detectable "
        f"{effect.detectable:.4f}",
        judge(effect, _PUBLISHED),
        name_replicates(effect.count),
        "holds if significant with the published size in the interval, differs if significant "
        "with another size; does not hold if the other way or shown to lie within 0.005 nats",
    )


def claim_guarded(name: str, effect: Effect, seeds: Sequence[Mapping[str, Any]]) -> Claim:
    """That it cannot hurt; rows as in `tabulate_seeds`, with `p_holm`.

    A guard that kept nothing leaves the population without a lifecycle, so that nothing could have
    come out otherwise: no verdict.
    """
    worse = [str(row["seed"]) for row in seeds if row["p_holm"] < 1 - _LEVEL]
    verdict: Verdict = "not decided"
    if worse or effect.high < -MARGIN_NATS:
        verdict = "does not hold"
    elif not any(row["kept"] for row in seeds):
        verdict = "by construction"
    elif effect.low >= -MARGIN_NATS:
        verdict = "holds"
    kept = sum(row["kept"] for row in seeds)
    return Claim(
        f"It does not with a guard ({name})",
        "none: the paper has no guard",
        f"{effect.show()} nats, n = {effect.count}; seeds significantly worse (Holm): "
        f"{', '.join(worse) or 'none'}; {kept} lifecycles kept",
        verdict,
        f"{name_replicates(len(seeds))}; for harm at a seed, document cluster",
        f"holds if the interval's lower end is at least -{MARGIN_NATS} nats and no seed is "
        "significantly worse; does not hold if a seed is, or the whole interval is below; by "
        "construction if no lifecycle was kept, for the population is then the one without",
    )


def claim_planted(
    operator: str, found: Mapping[str, Any], by_seed: Sequence[float], delta: float
) -> Claim:
    """That the guard decides rightly on a planted operator.

    Args:
        operator: Its name.
        found: What `describe_comparisons` says, of one comparison at least.
        by_seed: Share of right decisions of each seed.
        delta: Largest bound that is kept, nats.
    """
    right, wanted = found["right"], WANTED[operator]
    what = "keeps help" if operator == HELP else "refuses harm"
    # Shares that are all alike have no spread: the exact interval over decisions says then.
    spans = [Span.of(right), compute_span(by_seed)]
    least, most = sorted((found["least"], found["most"]), key=abs)
    return Claim(
        f"The guard {what} that is planted, at least {100 * wanted:.0f} % of the time",
        "none: the paper has no guard",
        f"{_show_share(right)}; by seed {spans[1].show(2, sign=False)}; planted differences "
        f"{least:+.4f} to {most:+.4f} nats, {abs(least) / delta:.1f} to {abs(most) / delta:.1f} "
        "times delta",
        judge_above(spans, wanted),
        f"{name_replicates(len(by_seed))}, and planted decision ({right['total']})",
        "holds if the exact interval over decisions and the interval over seeds lie above that "
        "share; says nothing of differences nearer to delta than those planted",
    )


def tabulate_decisions(decisions: Mapping[str, Mapping[str, Any]]) -> Table:
    """What the guard kept, by lifecycle or planted operator."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return Table(
        "What the guard decided",
        (
            "lifecycle",
            "kept [95 %]",
            "mean difference, nats",
            "mean standard error",
            "kept were there no difference",
            "kept were the harm delta / 2",
            "kept were the harm delta",
        ),
        [
            (
                f"planted: {name}" if name in WANTED else name,
                _show_share(found["kept"]),
                show(found["difference"], "+.5f"),
                show(found["error"], ".5f"),
                *(show(found[size], ".0%") for size in ("idle", "half", "full")),
            )
            for name, found in decisions.items()
        ],
    )


def tabulate_seeds(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Every seed by itself; rows are `measure_harm` with seed, `p_holm`, births and kept."""
    return Table(
        f"Seeds by themselves: {name}",
        ("seed", "effect, nats", "standard error", "p of harm", "p (Holm)", "newborns", "kept"),
        [
            (
                str(row["seed"]),
                f"{row['effect']:+.5f}",
                f"{row['error']:.5f}",
                f"{row['p']:.3g}",
                f"{row['p_holm']:.3g}",
                str(row["births"]),
                str(row["kept"]),
            )
            for row in rows
        ],
    )


def make_effects_figure(effects: Mapping[str, Effect]) -> Figure:
    """Effects over seeds beside the published one."""
    return Figure(
        "effects",
        "Effect of the lifecycle on balanced held-out log-perplexity, bare and guarded; bars are "
        "95 % intervals over seeds, the band is the margin.",
        partial(
            draw_effects,
            effects={"against no lifecycle": effects},
            published={BARE: _PUBLISHED},
            margin=MARGIN_NATS,
        ),
    )


def make_bounds_figure(families: Mapping[str, Sequence[Mapping[str, Any]]], delta: float) -> Figure:
    """Comparisons with their upper bounds.

    Args:
        families: Comparisons by label.
        delta: Largest bound that is kept, nats.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, family in enumerate(families.values()):
            heights = place + np.linspace(-0.3, 0.3, len(family))
            differences = [one["difference"] for one in family]
            reach = [one["bound"] - one["difference"] for one in family]
            axes.errorbar(
                differences,
                heights,
                xerr=[np.zeros(len(family)), reach],
                fmt="o",
                markersize=3,
                linewidth=1,
            )
        axes.axvline(delta, linestyle="--", linewidth=1)
        axes.set_xscale("symlog", linthresh=0.002)
        axes.set_yticks(range(len(families)), list(families))
        axes.invert_yaxis()
        axes.set_xlabel("loss of the lifecycle branch less its twin's, nats")

    return Figure(
        "bounds",
        "Comparisons of the guard: difference on guard documents and, by the bar, its upper bound; "
        f"kept where the bound is left of the dashed line at {delta:g} nats.",
        draw,
    )
