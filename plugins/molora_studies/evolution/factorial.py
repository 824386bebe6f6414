"""What router, fitness scope and lifecycle are worth: a full 2^3 design, and the router's parts."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, ClassVar

from molora_studies.evolution.effects import (
    AGGREGATORS,
    EQUAL_BUDGET,
    count_births,
    draw_effects,
    name_replicates,
    read_log_perplexity,
    tabulate_effects,
    to_json,
)
from molora_studies.evolution.substrate import (
    LIFECYCLE,
    NEW_ROUTER,
    OLD_ROUTER,
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
    compute_contrasts,
    judge,
    measure_effect,
)

__all__ = ["FACTORS", "PARTS", "FactorialOptions", "FactorialStudy", "build_settings"]

FACTORS = ("router", "scope", "lifecycle")

PARTS: Mapping[str, tuple[Any, Any]] = {
    "competition": ("softmax", "sigmoid"),
    "floor": (0.0, 0.1),
    "anneal": (False, True),
    "input": ("embeddings", "base_hidden"),
}
"""Options of the router before and after the rewrite."""

# arXiv 2605.11153: nats of balanced log-perplexity, n = 3; None is a null.
_PUBLISHED = {"router": 0.0426, "scope": None, "lifecycle": -0.028, "full system": 0.015}
_SAID = {
    "router": "+0.0426 nats, t = 12.86, p = 0.006, n = 3",
    "scope": "null at seed resolution, n = 3",
    "lifecycle": "-0.028 nats, t = -4.46, p = 0.047, n = 3",
    "full system": "+0.015 nats, t = 1.94, p = 0.19, n = 3",
}
_CLAIMS = {
    "router": "The rewritten router helps",
    "scope": "The fitness scope makes no difference",
    "lifecycle": "The bare lifecycle harms",
    "full system": "The full system is better than the static baseline B3",
}

Level = tuple[bool, bool, bool]
LEVELS: tuple[Level, ...] = tuple((r, s, c) for r, s, c in product((False, True), repeat=3))


class FactorialOptions(SubstrateOptions):
    """Options.

    Attributes:
        parts: Whether the parts of the rewrite are measured alone, at the first vocabulary.
    """

    parts: bool = True


def build_settings(level: Level) -> EvolutionSettings:
    """A cell of the design: the rewrite, per-domain fitness, and the lifecycle, each on or off."""
    rewritten, per_domain, living = level
    return EvolutionSettings(
        router=NEW_ROUTER if rewritten else OLD_ROUTER,
        scope="per-domain" if per_domain else "global",
        lifecycle=LIFECYCLE if living else (),
    )


class FactorialStudy(Study):
    """All eight cells at every seed and vocabulary, and each part of the rewrite alone."""

    Options: ClassVar[type[StudyOptions]] = FactorialOptions
    title: ClassVar[str] = "Router, fitness scope and lifecycle, decomposed"
    measures: ClassVar[tuple[str, ...]] = ("molora_evolution",)

    @classmethod
    def plan(cls, options: FactorialOptions) -> Sequence[Cell]:
        """A cell a level and seed; cells without a lifecycle share a task over scopes."""
        cells = []
        for vocabulary, level, seed in product(options.vocabularies, LEVELS, options.seeds):
            settings = build_settings(level)
            labels = dict(zip(FACTORS, level, strict=True))
            cells.append(
                Cell(
                    _name(vocabulary, level, seed),
                    {"vocabulary": vocabulary, **labels, "seed": seed},
                    plan_evolution(
                        options,
                        settings,
                        seed=seed,
                        vocabulary=vocabulary,
                        label=_describe_level(level),
                    ),
                )
            )
        for part, kind, seed in product(PARTS, ("added", "removed"), options.seeds):
            if options.parts:
                cells.append(_plan_part(options, part, kind, seed))
        return cells

    @classmethod
    def summarise(
        cls, options: FactorialOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """Effects by vocabulary and aggregator, parts, and the paper's claims."""
        families = {
            (vocabulary, aggregator): _measure(options, results, vocabulary, aggregator)
            for vocabulary in options.vocabularies
            for aggregator in AGGREGATORS
        }
        named = {key: _name_contrasts(options, results, *key) for key in families}
        parts = _measure_parts(options, results) if options.parts else {}
        ratios = {v: f"D/V = {options.hidden / v:.3f}" for v in options.vocabularies}
        tables = [
            tabulate_effects(f"Balanced log-perplexity, {ratios[v]}", families[v, "balanced"])
            for v in options.vocabularies
        ]
        tables += [
            tabulate_effects(f"Named contrasts, {ratios[v]}", named[v, "balanced"])
            for v in options.vocabularies
        ]
        if parts:
            tables.append(tabulate_effects("Each part of the rewrite alone", parts))
        tables += [
            tabulate_effects(f"Arithmetic aggregator, {ratios[v]}", families[v, "arithmetic"])
            for v in options.vocabularies
        ]
        tables.append(_tabulate_cells(options, results))
        claims = [c for v in options.vocabularies for c in _claim(families, named, v, ratios[v])]
        shown = {ratios[v]: families[v, "balanced"] for v in options.vocabularies}
        return Summary(
            findings={
                "effects": {
                    f"{v} {aggregator}": to_json(family)
                    for (v, aggregator), family in families.items()
                },
                "contrasts": {f"{v} {a}": to_json(family) for (v, a), family in named.items()},
                "parts": to_json(parts),
                "records": _list_records(options, results),
            },
            claims=[*claims, _claim_aggregator(families)],
            tables=tables,
            figures=[
                Figure(
                    "effects",
                    "Main effects and interactions on balanced log-perplexity; bars are 95 % "
                    "intervals over seeds, the band is the zone of equivalence.",
                    partial(
                        draw_effects,
                        effects=shown,
                        published={k: v for k, v in _PUBLISHED.items() if v and k in FACTORS},
                        margin=MARGIN_NATS,
                    ),
                )
            ],
            notes=_NOTES,
        )


_NOTES = (
    EQUAL_BUDGET,
    "An effect is the reduction of the log-perplexity over domains, nats; above 0 is better. A "
    "seed is a replicate of everything but the documents: base, specialists, population, router "
    "and data order are its own, train and held-out documents are the same at all seeds.",
    "Without a lifecycle nothing reads the fitness, so the two scopes are one population there: "
    "the main effect of the scope and its interaction with the lifecycle are the same number, half "
    "the simple effect with the lifecycle on (named contrast 'scope').",
    "In every generation the least fit adapter dies, whatever its fitness: equal deaths in all "
    "cells with a lifecycle, and no guard.",
    "Holm's correction is over the seven effects of a table of the design, over the named "
    "contrasts, and over the parts. Learning rates are the same in all cells.",
)


def _name(vocabulary: int, level: Level, seed: int) -> str:
    return f"V={vocabulary} {_describe_level(level)} seed {seed}"


def _describe_level(level: Level) -> str:
    router, scope, lifecycle = level
    return (
        f"{'new' if router else 'old'} router, {'per-domain' if scope else 'global'} scope, "
        f"lifecycle {'on' if lifecycle else 'off'}"
    )


def _name_part(part: str, kind: str, seed: int) -> str:
    return f"{part} {kind} alone seed {seed}"


def _plan_part(options: FactorialOptions, part: str, kind: str, seed: int) -> Cell:
    """The old router with one part of the rewrite, or the new one without it."""
    added = kind == "added"
    chosen = {
        name: after if (name == part) == added else before
        for name, (before, after) in PARTS.items()
    }
    settings = EvolutionSettings(router=NEW_ROUTER, router_options=chosen)
    vocabulary = options.vocabularies[0]
    return Cell(
        _name_part(part, kind, seed),
        {"vocabulary": vocabulary, "part": part, "kind": kind, "seed": seed},
        plan_evolution(
            options, settings, seed=seed, vocabulary=vocabulary, label=f"{part} {kind} alone"
        ),
    )


def _read(
    options: FactorialOptions,
    results: Mapping[str, Mapping[str, Any]],
    vocabulary: int,
    level: Level,
    aggregator: str = "balanced",
) -> list[float]:
    """Log-perplexity at every seed, nats."""
    return [
        read_log_perplexity(results[_name(vocabulary, level, seed)], aggregator)
        for seed in options.seeds
    ]


def _measure(
    options: FactorialOptions,
    results: Mapping[str, Mapping[str, Any]],
    vocabulary: int,
    aggregator: str,
) -> dict[str, Effect]:
    """Main effects and interactions, positive where log-perplexity falls."""
    cells: dict[tuple[bool, ...], Sequence[float]] = {
        level: _read(options, results, vocabulary, level, aggregator) for level in LEVELS
    }
    contrasts = compute_contrasts(FACTORS, cells)
    return {name: measure_effect((-values).tolist()) for name, values in contrasts.items()}


def _name_contrasts(
    options: FactorialOptions,
    results: Mapping[str, Mapping[str, Any]],
    vocabulary: int,
    aggregator: str,
) -> dict[str, Effect]:
    """Differences of cells with a name of their own, positive where the second is better."""

    def read(*level: bool) -> list[float]:
        router, scope, lifecycle = level
        return _read(options, results, vocabulary, (router, scope, lifecycle), aggregator)

    def compare(*pairs: tuple[list[float], list[float]]) -> Effect:
        rows = [[r - t for r, t in zip(*pair, strict=True)] for pair in pairs]
        return measure_effect([sum(row) / len(row) for row in zip(*rows, strict=True)])

    return {
        "full system": compare((read(False, False, False), read(True, True, True))),
        "scope": compare(
            *((read(router, False, True), read(router, True, True)) for router in (False, True))
        ),
        "router without lifecycle": compare((read(False, False, False), read(True, False, False))),
        "lifecycle with the new router": compare(
            (read(True, False, False), read(True, False, True)),
            (read(True, True, False), read(True, True, True)),
        ),
        "lifecycle with the old router": compare(
            (read(False, False, False), read(False, False, True)),
            (read(False, True, False), read(False, True, True)),
        ),
    }


def _measure_parts(
    options: FactorialOptions, results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Effect]:
    """What each part is worth: added to the old router, and removed from the new one."""
    vocabulary = options.vocabularies[0]
    old = _read(options, results, vocabulary, (False, False, False))
    new = _read(options, results, vocabulary, (True, False, False))
    found = {}
    for part, kind in product(PARTS, ("added", "removed")):
        losses = [
            read_log_perplexity(results[_name_part(part, kind, seed)]) for seed in options.seeds
        ]
        pair = (old, losses) if kind == "added" else (losses, new)
        label = f"{part}, added to the old" if kind == "added" else f"{part}, kept in the new"
        found[label] = measure_effect([a - b for a, b in zip(*pair, strict=True)])
    return found


def _claim(
    families: Mapping[tuple[int, str], Mapping[str, Effect]],
    named: Mapping[tuple[int, str], Mapping[str, Effect]],
    vocabulary: int,
    ratio: str,
) -> list[Claim]:
    family, contrasts = families[vocabulary, "balanced"], named[vocabulary, "balanced"]
    adjusted = adjust_by_holm({name: effect.p for name, effect in family.items()})
    claims = []
    for name, published in _PUBLISHED.items():
        single = name in contrasts
        effect = contrasts[name] if single else family[name]
        p = effect.p if single else adjusted[name]
        claims.append(
            Claim(
                f"{_CLAIMS[name]} ({ratio})",
                _SAID[name],
                f"{effect.show()} nats, p = {p:.2g}{'' if single else ' (Holm)'}, n = "
                f"{effect.count}; detectable {effect.detectable:.4f}",
                judge(effect, published, p),
                name_replicates(effect.count),
                "holds if shown to lie within 0.005 nats"
                if published is None
                else "holds if significant with the published size in the interval, differs if "
                "significant with another size; does not hold if the other way or shown to lie "
                "within 0.005 nats",
            )
        )
    return claims


def _claim_aggregator(families: Mapping[tuple[int, str], Mapping[str, Effect]]) -> Claim:
    """Whether any effect changes its sign or its significance with the aggregator."""
    flips, changes = [], []
    for (vocabulary, aggregator), family in families.items():
        if aggregator != "balanced":
            continue
        other = families[vocabulary, "arithmetic"]
        for name, effect in family.items():
            if effect.mean * other[name].mean < 0:
                flips.append(f"{name} at V = {vocabulary}")
                if effect.p < 0.05 and other[name].p < 0.05:
                    changes.append(flips[-1])
    return Claim(
        "An arithmetic aggregator can flip a conclusion",
        "once flipped one",
        f"sign of {', '.join(flips) or 'no effect'} flips; significant both ways: "
        f"{', '.join(changes) or 'none'}",
        "holds" if changes else "not decided",
        name_replicates(next(iter(families.values()))["router"].count),
        "holds if an effect is significant in opposite directions under the two aggregators",
    )


def _list_records(
    options: FactorialOptions, results: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One record per cell and seed."""
    return [
        {
            **cell.labels,
            **{name: read_log_perplexity(results[cell.name], name) for name in AGGREGATORS},
            "base": AGGREGATORS["balanced"](results[cell.name]["base"]),
            "held_out": dict(results[cell.name]["held_out"]),
            "births": results[cell.name]["births"],
            "steps": results[cell.name]["steps"],
            "fitness_measurements": results[cell.name]["fitness_measurements"],
        }
        for cell in FactorialStudy.plan(options)
    ]


def _tabulate_cells(options: FactorialOptions, results: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for vocabulary, level in product(options.vocabularies, LEVELS):
        own = [results[_name(vocabulary, level, seed)] for seed in options.seeds]
        losses = [read_log_perplexity(result) for result in own]
        base = [AGGREGATORS["balanced"](result["base"]) for result in own]
        gain = measure_effect([b - loss for b, loss in zip(base, losses, strict=True)])
        rows.append(
            (
                f"{options.hidden / vocabulary:.3f}",
                _describe_level(level),
                f"{sum(losses) / len(losses):.4f}",
                gain.show(),
                f"{count_births(own):.1f}",
            )
        )
    return Table(
        "Cells of the design: balanced log-perplexity, mean over seeds",
        ("D/V", "cell", "nats", "reduction on the base [95 %]", "newborns"),
        rows,
    )
