"""How often each router loses a domain, over many fits, where domains are easily confused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field
from scipy.stats import binomtest

from molora_studies.framework.contract import (
    Cell,
    Claim,
    Figure,
    Study,
    StudyOptions,
    Summary,
    Table,
    Task,
    Verdict,
)
from molora_studies.kalavai.languages import (
    AS_PUBLISHED,
    LANGUAGES,
    LOST_NATS,
    ROUTERS,
    plan_languages,
    plan_twins,
)
from molora_studies.kalavai.refits import plan_refits

__all__ = ["CollapseOptions", "CollapseStudy", "Count"]

Results = Mapping[str, Mapping[str, Any]]

_TWINS, _LANGUAGES, _PUBLISHED = "near-twins", "cross-lingual", "cross-lingual, as published"
_OURS = ("evidence", "evidence-zero", "evidence-share", "evidence-hidden", "statistics")
_SPACING = 100  # between seeds: the guard goes on with the next ones
_LEVEL = 0.95
_SECONDS = {_TWINS: 120.0, _LANGUAGES: 300.0, _PUBLISHED: 200.0}
_GUARDED = ("linear", "linear-base", "statistics")


class CollapseOptions(StudyOptions):
    """Options; `seeds` are the specialists'.

    Attributes:
        fits: Fits of each router, dealt to the specialists' seeds in turn.
        twins: Domain whose halves are two contributors' domains.
        twins_others: Further domains beside them.
        languages: As of the study `cross-lingual`, whose specialists are used.
        others: Likewise.
        steps: Steps of a specialist.
    """

    fits: int = Field(default=20, ge=2)
    twins: str = "python"
    twins_others: tuple[str, ...] = ("cpp", "science")
    languages: tuple[str, ...] = LANGUAGES
    others: tuple[str, ...] = ("cpp",)
    steps: int = Field(default=600, ge=1)


@dataclass(frozen=True)
class Count:
    """Fits of one router in one cooperative.

    Attributes:
        lost: Fits that lose a domain.
        fits: All fits; one per specialists' seed where the fit does not depend on a seed.
        misrouted: Fits that lose a domain by sending it, by its largest mean gate, to an expert
            that loses it by itself: the paper's collapse.
        guarded: Fits that lose a domain although the guard chose; None if it did not.
        replaced: Fits for which the guard published its last resort; likewise.
        worst_domain: Domain of the largest excess of all unguarded fits.
        worst_nats: That excess over the best expert's loss.
        worst_guarded_nats: The same under the guard, or None.
        gap_nats: Mean equal-weight loss above the domain oracle, unguarded.
    """

    lost: int
    fits: int
    misrouted: int
    guarded: int | None
    replaced: int | None
    worst_domain: str
    worst_nats: float
    worst_guarded_nats: float | None
    gap_nats: float

    @staticmethod
    def of(results: Sequence[Mapping[str, Any]]) -> "Count":
        """Count the fits of one router over the specialists' seeds."""
        fits = [fit for result in results for fit in result["fits"][: _distinct(result)]]
        worst = [max((nats, domain) for domain, nats in fit["excess"].items()) for fit in fits]
        guarded = [max(fit["guarded"]["excess"].values()) for fit in fits if "guarded" in fit]
        return Count(
            lost=sum(nats > LOST_NATS for nats, _ in worst),
            fits=len(fits),
            misrouted=sum(
                any(fit["excess"][domain] > LOST_NATS for domain in fit["misrouted"])
                for fit in fits
            ),
            guarded=sum(nats > LOST_NATS for nats in guarded) if guarded else None,
            replaced=sum(f["guarded"]["replaced"] for f in fits) if guarded else None,
            worst_domain=max(worst)[1],
            worst_nats=max(worst)[0],
            worst_guarded_nats=max(guarded, default=None),
            gap_nats=sum(fit["gap"] for fit in fits) / len(fits),
        )

    def interval(self) -> tuple[float, float]:
        """Clopper-Pearson interval of the share of unguarded fits that lose a domain."""
        found = binomtest(self.lost, self.fits).proportion_ci(_LEVEL, method="exact")
        return float(found.low), float(found.high)

    def show(self) -> str:
        """As text, e.g. "3 of 20 [3 %, 38 %]"."""
        low, high = self.interval()
        return f"{self.lost} of {self.fits} [{100 * low:.0f} %, {100 * high:.0f} %]"

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        low, high = self.interval()
        return {**vars(self), "low": low, "high": high, "level": _LEVEL}


class CollapseStudy(Study):
    """Routers of three cooperatives, fitted again from many seeds over the specialists' seeds."""

    Options: ClassVar[type[StudyOptions]] = CollapseOptions
    title: ClassVar[str] = "Router collapse, counted"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: CollapseOptions) -> Sequence[Cell]:
        """A cell a cooperative and specialists' seed."""
        cells = []
        for cooperative in _SECONDS:
            for turn, seed in enumerate(options.seeds):
                fits = range(turn, options.fits, len(options.seeds))
                name = f"{cooperative} seed {seed}"
                task = plan_refits(
                    f"refits {name}",
                    _plan_fusion(options, cooperative, seed),
                    [_SPACING * fit for fit in fits],
                    guarded=() if cooperative == _PUBLISHED else _GUARDED,
                    seconds=_SECONDS[cooperative],
                )
                cells.append(Cell(name, {"cooperative": cooperative, "seed": seed}, task))
        return cells

    @classmethod
    def summarise(cls, options: CollapseOptions, results: Results) -> Summary:
        """Counts by cooperative and router, each with its interval."""
        counts = {
            cooperative: _count(
                [results[f"{cooperative} seed {seed}"]["routers"] for seed in options.seeds]
            )
            for cooperative in _SECONDS
        }
        return Summary(
            findings={
                name: {label: found.to_json() for label, found in by_router.items()}
                for name, by_router in counts.items()
            },
            claims=[
                _claim_collapse(counts[_PUBLISHED]),
                _claim_curriculum(counts[_PUBLISHED]),
                _claim_unguarded(counts),
                _claim_guarded(counts),
            ],
            tables=[_tabulate(name, by_router) for name, by_router in counts.items()],
            figures=[
                Figure(
                    "excess",
                    "Largest held-out loss of a domain above its best expert's, over all fits, "
                    f"unguarded; a domain is lost beyond {LOST_NATS} nats.",
                    lambda figure: _draw(figure, counts),
                )
            ],
            notes=(
                f"{options.fits} fits of each router over {len(options.seeds)} sets of "
                "specialists. A fit that no seed changes is counted once a set of specialists.",
                f"A fit loses a domain if it is more than {LOST_NATS} nats above the domain's best "
                "expert on held-out text. The guard judges on calibration text alone, fits again "
                "from up to three other seeds, and then takes its last resort.",
                "A fit misroutes a domain if the expert with its largest mean gate loses the "
                "domain by itself: with the loss, the paper's collapse. A domain can be lost "
                "without: hidden states need some tokens to tell domains apart, and where experts "
                "differ by nats a few tokens a block cost more than the threshold.",
            ),
        )


def _plan_fusion(options: CollapseOptions, cooperative: str, seed: int) -> Task:
    if cooperative == _TWINS:
        return plan_twins(
            f"twins seed {seed}",
            options.twins,
            options.twins_others,
            seed,
            steps=options.steps,
        )
    as_published = cooperative == _PUBLISHED
    form = "as published" if as_published else "ours"
    return plan_languages(
        f"languages {form} seed {seed}",
        options.languages,
        options.others,
        seed,
        steps=options.steps,
        routers=AS_PUBLISHED if as_published else ROUTERS,
        as_published=as_published,
    )


def _distinct(result: Mapping[str, Any]) -> int:
    return len(result["fits"]) if result["is_seeded"] else 1


def _count(results: Sequence[Mapping[str, Any]]) -> dict[str, Count]:
    return {label: Count.of([result[label] for result in results]) for label in results[0]}


def _tabulate(name: str, counts: Mapping[str, Count]) -> Table:
    return Table(
        f"{name}: fits that lose a domain",
        ("router", "lose a domain", "by misrouting it", "lose one under the guard", "replaced",
         "worst domain", "worst under the guard", "mean oracle gap"),
        [
            (
                label,
                count.show(),
                f"{count.misrouted} of {count.fits}",
                "" if count.guarded is None else f"{count.guarded} of {count.fits}",
                "" if count.replaced is None else f"{count.replaced} of {count.fits}",
                f"{count.worst_domain} {count.worst_nats:+.3f} nats",
                "" if count.worst_guarded_nats is None else f"{count.worst_guarded_nats:+.3f} nats",
                f"{count.gap_nats:+.4f} nats",
            )
            for label, count in counts.items()
        ],
    )  # fmt: skip


def _claim_collapse(counts: Mapping[str, Count]) -> Claim:
    count = counts["linear-noncausal"]
    return Claim(
        "The linear router collapses on some seeds where languages are fused",
        "1 of 3 seeds",
        f"{count.show()} fits lose a domain, worst {count.worst_domain} "
        f"{count.worst_nats:+.3f} nats; {count.misrouted} send one to another's expert",
        "holds" if count.misrouted else "does not hold",
        "as published: pooled over the whole sequence, logits mixed, no base expert; holds if a "
        "fit sends a domain to an expert that loses it",
    )


def _claim_curriculum(counts: Mapping[str, Count]) -> Claim:
    plain, with_it = (counts[label] for label in AS_PUBLISHED)
    verdict: Verdict = "not decided"
    if plain.misrouted:
        verdict = "holds" if with_it.misrouted == 0 else "does not hold"
    if 0 < with_it.misrouted < plain.misrouted:
        verdict = "differs"
    return Claim(
        "A curriculum prevents the collapse",
        "0 of 1 seed that had collapsed",
        f"with it {with_it.misrouted} of {with_it.fits} fits send a domain to another's expert and "
        f"{with_it.lost} lose one; without {plain.misrouted} and {plain.lost} of {plain.fits}",
        verdict,
        "differs if it prevents some but not all; nothing to prevent if none collapses without it",
    )


def _claim_unguarded(counts: Mapping[str, Mapping[str, Count]]) -> Claim:
    lost, shown = 0, []
    for name in (_TWINS, _LANGUAGES):
        found = {label: counts[name][label].lost for label in _OURS}
        lost += sum(found.values())
        collapsed = ", ".join(f"{label} {number}" for label, number in found.items() if number)
        shown.append(f"{name}: {collapsed or 'none'} (linear {counts[name]['linear'].show()})")
    return Claim(
        "Evidence and statistics routers never lose a domain, without any guard",
        "",
        "; ".join(shown),
        "does not hold" if lost else "holds",
        "this project's own claim, not the paper's; fits that lose a domain, by router",
    )


def _claim_guarded(counts: Mapping[str, Mapping[str, Count]]) -> Claim:
    lost, shown = 0, []
    for name in (_TWINS, _LANGUAGES):
        found = {label: counts[name][label] for label in _GUARDED}
        lost += sum(count.guarded or 0 for count in found.values())
        parts = [
            f"{label} {count.guarded} of {count.fits}, {count.replaced} replaced"
            for label, count in found.items()
        ]
        shown.append(f"{name}: {'; '.join(parts)}")
    return Claim(
        "Under the guard no fusion is published that loses a domain",
        "",
        ". ".join(shown),
        "does not hold" if lost else "holds",
        "this project's own claim; where refits do not help, the guard publishes evidence-zero "
        "in the router's place, which is counted as replaced",
    )


def _draw(figure: Any, counts: Mapping[str, Mapping[str, Count]]) -> None:
    axes = figure.subplots()
    labels = list(ROUTERS)[::-1]
    for shift, name in enumerate((_TWINS, _LANGUAGES)):
        places = [place + 0.2 * (2 * shift - 1) for place in range(len(labels))]
        worst = [counts[name][label].worst_nats for label in labels]
        axes.barh(places, worst, height=0.38, label=name)
    axes.axvline(LOST_NATS, color="#222222", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xlabel("largest excess over the domain's best expert, nats per token")
    axes.legend()
