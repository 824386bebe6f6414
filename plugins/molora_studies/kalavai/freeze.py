"""How many blocks may stay frozen: depth K against the fusion gain."""

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
    estimate,
    plan_depth,
    read_gain,
    read_gain_over_base,
)
from molora_studies.verdicts import Span, join_verdicts, judge_above, name_unit

__all__ = ["FreezeOptions", "FreezeStudy"]

# arXiv 2603.22755, freeze depth at 2,000 steps: percent of gain by K of 24 blocks.
_PUBLISHED = {0: 7.92, 2: 7.86, 4: 7.72, 6: 7.49, 8: 7.17, 12: 6.03}
_PUBLISHED_LAYERS = 24


class FreezeOptions(StudyOptions):
    """Options.

    Attributes:
        domains: One contributor each.
        depths: Frozen depths K.
        layers: L of the base, for shares.
        steps: Steps of a specialist.
    """

    domains: tuple[str, ...] = THREE_DOMAINS
    depths: tuple[int, ...] = Field(default=(0, 1, 2, 3), min_length=2)
    layers: int = 4
    steps: int = 600


class FreezeStudy(Study):
    """Every depth at every seed."""

    Options: ClassVar[type[StudyOptions]] = FreezeOptions
    title: ClassVar[str] = "Frozen depth against the fusion gain"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: FreezeOptions) -> Sequence[Cell]:
        """A cell a depth and seed."""
        return [
            Cell(
                f"freeze {depth} seed {seed}",
                {"depth": depth, "seed": seed},
                plan_depth(options.domains, options.steps, depth, seed),
            )
            for depth in options.depths
            for seed in options.seeds
        ]

    @classmethod
    def summarise(cls, options: FreezeOptions, results: Mapping[str, Mapping[str, Any]]) -> Summary:
        """Gains by depth, and the paper's claim that freezing costs little."""

        def read(depth: int, figure: Any = read_gain) -> list[float]:
            return [figure(results[f"freeze {depth} seed {seed}"]) for seed in options.seeds]

        gains = {depth: estimate(read(depth)) for depth in options.depths}
        over_base = {depth: estimate(read(depth, read_gain_over_base)) for depth in options.depths}
        free, half = options.depths[0], min(options.depths, key=_distance_to_half(options.layers))
        kept = estimate(100 * a / b for a, b in zip(read(half), read(free), strict=True))
        published = 100 * _PUBLISHED[_PUBLISHED_LAYERS // 2] / _PUBLISHED[0]
        steps = {
            deep: estimate(a - b for a, b in zip(read(less), read(deep), strict=True))
            for less, deep in pairwise(sorted(options.depths))
        }
        unit = name_unit("training seed", len(options.seeds))
        return Summary(
            findings={
                "gain_percent": {str(k): g.to_json() for k, g in gains.items()},
                "gain_over_base_percent": {str(k): g.to_json() for k, g in over_base.items()},
                "kept_at_half_depth_percent": kept.to_json(),
            },
            claims=[
                Claim(
                    "Freezing the first half of the blocks keeps most of the gain",
                    f"{published:.0f} % of the gain without freezing (K = 12 of 24)",
                    f"{kept.show(sign=False)} (K = {half} of {options.layers})",
                    _judge(kept.low, kept.high, published),
                    unit,
                    "holds if the interval of the share kept reaches the published share",
                ),
                Claim(
                    "Every frozen block costs gain at short training",
                    "7.92 % at K = 0 falls to 6.03 % at K = 12",
                    "; ".join(f"K = {deep}: {e.show('pp')}" for deep, e in steps.items())
                    + " lost against the depth before",
                    join_verdicts([judge_above([Span.of(e)]) for e in steps.values()]),
                    unit,
                    "holds if the interval of every step lies above 0, paired by seed",
                ),
            ],
            tables=[
                Table(
                    "Gain by frozen depth",
                    ("K", "share of blocks", "gain on the best alone", "reduction on the base"),
                    [
                        (
                            str(k),
                            f"{k / options.layers:.2f}",
                            gains[k].show(),
                            over_base[k].show(),
                        )
                        for k in options.depths
                    ],
                )
            ],
            figures=[
                Figure(
                    "depth",
                    "Gain on the best anyone has alone, relative to K = 0; bars are 95 % "
                    "intervals over seeds.",
                    lambda figure: _draw(figure, options, gains),
                )
            ],
        )


def _distance_to_half(layers: int) -> Any:
    return lambda depth: abs(depth - layers / 2)


def _judge(low: float | None, high: float | None, published: float) -> Verdict:
    """Of the share kept in percent: most of it, and as much as published or more."""
    most = judge_above([Span(low, high)], 50.0)
    if most == "holds" and high is not None and high < published:
        return "differs"
    return most


def _draw(figure: Any, options: FreezeOptions, gains: Mapping[int, Any]) -> None:
    axes = figure.subplots()
    first = gains[options.depths[0]].mean
    shares = [depth / options.layers for depth in options.depths]
    means = [gains[depth].mean / first for depth in options.depths]
    errors = [
        (gains[d].mean - gains[d].low) / first if gains[d].low is not None else 0.0
        for d in options.depths
    ]
    axes.errorbar(shares, means, yerr=errors, marker="o", capsize=3, label="measured here")
    axes.plot(
        [k / _PUBLISHED_LAYERS for k in _PUBLISHED],
        [gain / _PUBLISHED[0] for gain in _PUBLISHED.values()],
        marker="s",
        linestyle="--",
        label="published, 410M",
    )
    axes.set_xlabel("share of blocks frozen")
    axes.set_ylabel("gain relative to no freezing")
    axes.set_ylim(bottom=0)
    axes.legend()
