"""Gradient against evolution strategies on the routing channel of a synthetic teacher.

Every method takes equally many evaluations of the same objective, from the same start. Rates and
the perturbations' spread were chosen on a teacher whose seed is not reported.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any, ClassVar, get_args

import torch
from molora_evolution.search import SearchConfig, search_by_evolution, search_by_gradient
from pydantic import Field

from molora_studies.evolution.teacher import (
    Channel,
    Teacher,
    build_objective,
    compute_gates,
    count_parameters,
    measure_loss,
)
from molora_studies.framework.contract import (
    Cell,
    Claim,
    Figure,
    Study,
    StudyOptions,
    Summary,
    Table,
    Task,
    TaskContext,
)
from molora_studies.statistics import Effect, adjust_by_holm, measure_effect
from molora_studies.verdicts import name_unit

__all__ = ["SandboxOptions", "SandboxStudy", "search_channels"]

CHANNELS: tuple[Channel, ...] = get_args(Channel)
BATCH = 64
TEST_EXAMPLES = 4096
START_SPREAD = 0.1
GRADIENT_RATE, EVOLUTION_RATE, PERTURBATION, PAIRS = 0.05, 0.1, 0.3, 8
MARGIN = 0.005  # of the base's loss, which is 1
EFFECTS = ("worth", "net", "advantage", "advantage_same_cost", "refinement")


class SandboxOptions(StudyOptions):
    """Options.

    Attributes:
        seeds: Of teachers, data and searches.
        alignments: Cosines between an adapter and its task.
        noises: Standard deviations of the label noise over the signal's.
        evaluations: Measurements of the objective by every method, a multiple of 96.
        examples: Training examples, which batches go through again and again.
    """

    seeds: tuple[int, ...] = tuple(range(10))
    alignments: tuple[float, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=2)
    noises: tuple[float, ...] = Field(default=(0.0, 1.0, 4.0, 16.0), min_length=1)
    evaluations: int = Field(default=1632, gt=0, multiple_of=6 * 2 * PAIRS)
    examples: int = Field(default=200 * BATCH, ge=BATCH, multiple_of=BATCH)


def search_channels(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Search both channels of one teacher by every method.

    Returns:
        By channel: losses without label noise on fresh examples, of `base` (no gate), `start`,
        `gradient`, `gradient_same_cost` (a third of the evaluations: the same forward passes, a
        backward pass counted as two), `evolution`, and `refined` (the gradient's first half, then
        evolution); and `first_half`, the gradient's.
    """
    seed, evaluations = settings["seed"], settings["evaluations"]
    teacher = Teacher(settings["alignment"], seed)
    sample = teacher.draw(settings["examples"], settings["noise"], 0)
    test = teacher.draw(TEST_EXAMPLES, 0.0, 1)
    generator = torch.Generator().manual_seed(seed)
    start = START_SPREAD * torch.randn(count_parameters(), generator=generator)
    half = evaluations // 2
    found: dict[str, Any] = {}
    for channel in CHANNELS:
        early = build_objective(sample, channel, BATCH)
        late = build_objective(sample, channel, BATCH, first=half)

        def by_gradient(objective: Any, origin: Any, count: int) -> Any:
            config = SearchConfig(count, learning_rate=GRADIENT_RATE, seed=seed)
            return search_by_gradient(objective, origin, config).parameters

        def by_evolution(objective: Any, origin: Any, count: int) -> Any:
            config = SearchConfig(count, EVOLUTION_RATE, seed, PAIRS, PERTURBATION)
            return search_by_evolution(objective, origin, config).parameters

        middle = by_gradient(early, start, half)
        ends = {
            "start": start,
            "first_half": middle,
            "gradient": by_gradient(late, middle, half),
            "gradient_same_cost": by_gradient(early, start, evaluations // 3),
            "evolution": by_evolution(early, start, evaluations),
            "refined": by_evolution(late, middle, half),
        }
        with torch.no_grad():
            losses = {n: float(measure_loss(p, test, channel)) for n, p in ends.items()}
            gates = float(compute_gates(ends["evolution"], test.cues, channel).mean())
        base = float(test.targets.square().sum(dim=1).mean())
        found[channel] = {"base": base, **losses, "mean_gate_evolution": gates}
    return found


class SandboxStudy(Study):
    """A task a seed at every alignment and noise, both channels in it."""

    Options: ClassVar[type[StudyOptions]] = SandboxOptions
    title: ClassVar[str] = "Evolution against gradient on the routing channel, synthetic teacher"
    measures: ClassVar[tuple[str, ...]] = ("molora_evolution",)

    @classmethod
    def plan(cls, options: SandboxOptions) -> Sequence[Cell]:
        """A cell an alignment, noise and seed."""
        return [
            Cell(
                _name(alignment, noise, seed),
                {"alignment": alignment, "noise": noise, "seed": seed},
                Task(
                    f"sandbox {_name(alignment, noise, seed)}",
                    "search-channels",
                    {
                        "alignment": alignment,
                        "noise": noise,
                        "seed": seed,
                        "evaluations": options.evaluations,
                        "examples": options.examples,
                    },
                    seconds=0.1 + 1.1e-3 * options.evaluations,
                ),
            )
            for alignment in options.alignments
            for noise in options.noises
            for seed in options.seeds
        ]

    @classmethod
    def summarise(
        cls, options: SandboxOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """What search is worth, and what it is worth beside the gradient, at every point."""
        points = [
            point
            for channel in CHANNELS
            for point in _measure_points(options, results, channel)
        ]  # fmt: skip
        bounds = {
            channel: {
                str(noise): {
                    "search_is_worth_the_margin": _cross(options, points, channel, noise, "worth"),
                    "evolution_equals_gradient": _cross(
                        options, points, channel, noise, "advantage"
                    ),
                }
                for noise in options.noises
            }
            for channel in CHANNELS
        }
        return Summary(
            findings={"points": [_to_json(point) for point in points], "boundaries": bounds},
            claims=_claim(options, points),
            tables=[_tabulate(points, channel) for channel in CHANNELS],
            figures=_build_figures(options, points),
            notes=[
                f"Equal evaluations: {options.evaluations} of every method, from one start on one "
                "set of batches. An evaluation of the gradient has a backward pass besides; at "
                "equal forward passes it has a third of the evaluations (column 'same cost').",
                "Losses are in units of the base's without label noise, on fresh examples; the "
                f"margin of equivalence is {MARGIN} of it. Holm's correction is over the points "
                "of a channel.",
                "Adapters stay as they are; the router alone is searched. Rates and the spread of "
                "perturbations are the same at every point.",
                "A hard gate cannot take a share of an adapter: at alignment 0.5 and below no "
                "adapters are best. What evolution gains on the gradient there is leaving them "
                "out; 'against the better of both' is what it finds beyond that.",
                "Boundaries are interpolated between alignments; they are lists, for a line may "
                "cross more than once, or never.",
            ],
        )


def _name(alignment: float, noise: float, seed: int) -> str:
    return f"alignment {alignment:g} noise {noise:g} seed {seed}"


def _measure_points(
    options: SandboxOptions, results: Mapping[str, Mapping[str, Any]], channel: str
) -> list[dict[str, Any]]:
    """Effects and outcomes of one channel at every alignment and noise."""
    points: list[dict[str, Any]] = []
    for alignment, noise in product(options.alignments, options.noises):
        rows = [results[_name(alignment, noise, seed)][channel] for seed in options.seeds]

        def compare(reference: str, other: str, rows: Any = rows) -> Effect:
            return measure_effect([row[reference] - row[other] for row in rows], margin=MARGIN)

        points.append(
            {
                "channel": channel,
                "alignment": alignment,
                "noise": noise,
                "worth": compare("base", "evolution"),
                "net": measure_effect(
                    [min(row["base"], row["gradient"]) - row["evolution"] for row in rows],
                    margin=MARGIN,
                ),
                "advantage": compare("gradient", "evolution"),
                "advantage_same_cost": compare("gradient_same_cost", "evolution"),
                "refinement": compare("gradient", "refined"),
            }
        )
    for key in EFFECTS:
        adjusted = adjust_by_holm({str(i): point[key].p for i, point in enumerate(points)})
        for index, point in enumerate(points):
            point[f"{key}_outcome"] = _decide(point[key], adjusted[str(index)])
    return points


def _decide(effect: Effect, p: float) -> str:
    """`tie` if shown to be within the margin, else `better` or `worse` if significant."""
    if effect.is_null:
        return "tie"
    if p < 0.05:
        return "better" if effect.mean > 0 else "worse"
    return "open"


def _to_json(point: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.to_json() if isinstance(v, Effect) else v for k, v in point.items()}


def _cross(
    options: SandboxOptions,
    points: Sequence[Mapping[str, Any]],
    channel: str,
    noise: float,
    key: str,
) -> list[float]:
    """Alignments at which a mean passes the margin (of `worth`) or 0, by interpolation."""
    level = MARGIN if key == "worth" else 0.0
    means = {
        point["alignment"]: point[key].mean - level
        for point in points
        if point["channel"] == channel and point["noise"] == noise
    }
    return [
        round(a - means[a] * (b - a) / (means[b] - means[a]), 4)
        for a, b in pairwise(sorted(options.alignments))
        if (means[a] > 0) != (means[b] > 0)
    ]


def _count(points: Sequence[Mapping[str, Any]], key: str) -> str:
    outcomes = [point[f"{key}_outcome"] for point in points]
    found = {o: outcomes.count(o) for o in ("better", "tie", "worse", "open") if o in outcomes}
    return ", ".join(f"{count} {outcome}" for outcome, count in found.items())


def _claim(options: SandboxOptions, points: Sequence[Mapping[str, Any]]) -> list[Claim]:
    claims = []
    unit = f"{name_unit('seed of teacher and labels', len(options.seeds))} at every point"
    for channel in CHANNELS:
        own = [point for point in points if point["channel"] == channel]
        most = [point for point in own if point["alignment"] == max(options.alignments)]
        least = [point for point in own if point["alignment"] == min(options.alignments)]
        below = [point for point in own if point["alignment"] < max(options.alignments)]
        useful = all(point["worth_outcome"] == "better" for point in most)
        useless = all(point["worth_outcome"] in ("tie", "worse") for point in least)
        broken = any(point["worth_outcome"] == "better" for point in least) or any(
            point["worth_outcome"] in ("tie", "worse") for point in most
        )
        claims.append(
            Claim(
                f"Search on the routing channel carries weight only with aligned adapters "
                f"({channel} gates)",
                "load-bearing only when adapters are pre-aligned to the task",
                f"worth at alignment {max(options.alignments):g}: {_count(most, 'worth')}; at "
                f"{min(options.alignments):g}: {_count(least, 'worth')}",
                "holds" if useful and useless else "does not hold" if broken else "not decided",
                unit,
                "holds if it is worth more than nothing at every noise where adapters are "
                "aligned, and at none where they are not",
            )
        )
        better = [
            point
            for point in below
            if "better" in (point["advantage_outcome"], point["refinement_outcome"])
        ]
        open_points = [
            point
            for point in below
            if "open" in (point["advantage_outcome"], point["refinement_outcome"])
        ]
        claims.append(
            Claim(
                f"Elsewhere it is no better than the gradient ({channel} gates)",
                "ties, underperforms or degrades the gradient solution",
                f"{len(below)} points below alignment {max(options.alignments):g}: evolution "
                f"against gradient {_count(below, 'advantage')}; evolution after the gradient "
                f"{_count(below, 'refinement')}; aligned: {_count(most, 'advantage')}",
                "does not hold" if better else "not decided" if open_points else "holds",
                unit,
                "holds if evolution is better at no point, and every point is decided",
            )
        )
    return claims


def _tabulate(points: Sequence[Mapping[str, Any]], channel: str) -> Table:
    def show(point: Mapping[str, Any], key: str) -> str:
        return f"{point[key].show(3)} {point[f'{key}_outcome']}"

    return Table(
        f"Routing channel with {channel} gates: reduction of the loss by evolution",
        (
            "alignment",
            "noise",
            "against no adapters",
            "against the better of both",
            "against gradient",
            "against gradient, same cost",
            "after gradient, against going on",
        ),
        [
            (f"{p['alignment']:g}", f"{p['noise']:g}", *(show(p, key) for key in EFFECTS))
            for p in points
            if p["channel"] == channel
        ],
    )


def _build_figures(options: SandboxOptions, points: Sequence[Mapping[str, Any]]) -> list[Figure]:
    return [
        Figure(
            key,
            f"{caption} Bars are 95 % intervals over seeds.",
            partial(_draw, options=options, points=points, key=key, label=label),
        )
        for key, label, caption in (
            (
                "advantage",
                "gradient's loss - evolution's",
                "Evolution against gradient at equal evaluations by alignment, a line a noise; "
                "above 0 evolution is better.",
            ),
            (
                "worth",
                "base's loss - evolution's",
                "What the router found by evolution is worth against no adapters.",
            ),
            (
                "net",
                "better of both - evolution's",
                "Evolution against the better of the gradient and no adapters; above 0 it finds "
                "what neither gives.",
            ),
        )
    ]


def _draw(
    figure: Any,
    options: SandboxOptions,
    points: Sequence[Mapping[str, Any]],
    key: str,
    label: str,
) -> None:
    for axes, channel in zip(figure.subplots(1, len(CHANNELS)), CHANNELS, strict=True):
        axes.axhline(0, linewidth=1, linestyle=":")
        for noise in options.noises:
            effects = [p[key] for p in points if p["channel"] == channel and p["noise"] == noise]
            axes.errorbar(
                options.alignments,
                [effect.mean for effect in effects],
                yerr=[effect.mean - effect.low for effect in effects],
                marker="o",
                capsize=3,
                label=f"noise {noise:g}",
            )
        axes.set_title(f"{channel} gates")
        axes.set_xlabel("alignment")
        axes.set_ylabel(label)
    axes.legend()
