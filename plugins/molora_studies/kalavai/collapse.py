"""How often each router loses a domain, over many fits, where domains are easily confused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    Task,
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
from molora_studies.verdicts import (
    LEVEL,
    PREVENTION,
    Span,
    compute_share,
    judge_exists,
    judge_prevention,
    name_unit,
)

__all__ = ["CollapseOptions", "CollapseStudy", "Count"]

Results = Mapping[str, Mapping[str, Any]]

_TWINS, _LANGUAGES, _PUBLISHED = "near-twins", "cross-lingual", "cross-lingual, as published"
_OURS = ("evidence", "evidence-zero", "evidence-share", "evidence-hidden", "statistics")
_SPACING = 100  # between seeds: the guard goes on with the next ones
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

    Refits on one set of specialists are no replicates: intervals are over sets of specialists, and
    a set counts as lost if any of its fits is.

    Attributes:
        sets: Sets of specialists.
        lost_sets: Sets on which a fit loses a domain.
        misrouted_sets: Sets on which a fit loses a domain by sending it to another's expert.
        guarded_sets: Sets on which a fit loses a domain although the guard chose; None if it did
            not.
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

    sets: int
    lost_sets: int
    misrouted_sets: int
    guarded_sets: int | None
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
        sets = [result["fits"][: _distinct(result)] for result in results]
        fits = [fit for fits_of_set in sets for fit in fits_of_set]
        worst = [max((nats, domain) for domain, nats in fit["excess"].items()) for fit in fits]
        guarded = [max(fit["guarded"]["excess"].values()) for fit in fits if "guarded" in fit]
        return Count(
            sets=len(sets),
            lost_sets=sum(any(map(_loses, one)) for one in sets),
            misrouted_sets=sum(any(map(_misroutes, one)) for one in sets),
            guarded_sets=sum(any(_loses(fit["guarded"]) for fit in one) for one in sets)
            if guarded
            else None,
            lost=sum(map(_loses, fits)),
            fits=len(fits),
            misrouted=sum(map(_misroutes, fits)),
            guarded=sum(nats > LOST_NATS for nats in guarded) if guarded else None,
            replaced=sum(f["guarded"]["replaced"] for f in fits) if guarded else None,
            worst_domain=max(worst)[1],
            worst_nats=max(worst)[0],
            worst_guarded_nats=max(guarded, default=None),
            gap_nats=sum(fit["gap"] for fit in fits) / len(fits),
        )

    def interval(self) -> Span:
        """Exact interval of the share of sets on which an unguarded fit loses a domain."""
        return compute_share(self.lost_sets, self.sets)

    def show(self) -> str:
        """As text, e.g. "1 of 3 sets [1 %, 91 %], 2 of 20 fits"."""
        return f"{_show_sets(self.lost_sets, self.sets)}, {self.lost} of {self.fits} fits"

    def to_json(self) -> dict[str, Any]:
        """JSON values; `low` and `high` of the share of sets."""
        span = self.interval()
        return {**vars(self), "low": span.low, "high": span.high, "level": LEVEL}


def _loses(fit: Mapping[str, Any]) -> bool:
    return bool(max(fit["excess"].values()) > LOST_NATS)


def _misroutes(fit: Mapping[str, Any]) -> bool:
    return any(fit["excess"][domain] > LOST_NATS for domain in fit["misrouted"])


def _show_sets(count: int, total: int) -> str:
    span = compute_share(count, total)
    low, high = (100 * (end or 0.0) for end in (span.low, span.high))
    return f"{count} of {total} sets [{low:.0f} %, {high:.0f} %]"


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
                "specialists, one a training seed. Fits on one set are no replicates: intervals "
                "are exact ones over sets, and a set is lost if any of its fits is. A fit that no "
                "seed changes is counted once a set.",
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


_PROMISE = (
    "this project's own claim, not the paper's; one loss refutes it, and none on a few sets does "
    "not show that there never is one: not decided then"
)


def _name_sets(count: int) -> str:
    return name_unit("set of specialists", count)


def _claim_collapse(counts: Mapping[str, Count]) -> Claim:
    count = counts["linear-noncausal"]
    return Claim(
        "The linear router collapses on some seeds where languages are fused",
        "1 of 3 seeds",
        f"on {_show_sets(count.misrouted_sets, count.sets)} a fit sends a domain to another's "
        f"expert ({count.misrouted} of {count.fits} fits); {count.lost} fits lose one, worst "
        f"{count.worst_domain} {count.worst_nats:+.3f} nats",
        judge_exists(count.misrouted_sets),
        _name_sets(count.sets),
        "as published: pooled over the whole sequence, logits mixed, no base expert; holds if a "
        "fit sends a domain to an expert that loses it, which one set shows",
    )


def _claim_curriculum(counts: Mapping[str, Count]) -> Claim:
    plain, with_it = (counts[label] for label in AS_PUBLISHED)
    return Claim(
        "A curriculum prevents the collapse",
        "0 of 1 seed that had collapsed",
        f"with it a fit sends a domain to another's expert on "
        f"{_show_sets(with_it.misrouted_sets, with_it.sets)}, without on "
        f"{_show_sets(plain.misrouted_sets, plain.sets)}; {with_it.misrouted} and "
        f"{plain.misrouted} of {plain.fits} fits",
        judge_prevention(plain.misrouted_sets, with_it.misrouted_sets),
        _name_sets(plain.sets),
        PREVENTION,
    )


def _claim_unguarded(counts: Mapping[str, Mapping[str, Count]]) -> Claim:
    lost, shown = 0, []
    for name in (_TWINS, _LANGUAGES):
        found = {label: counts[name][label] for label in _OURS}
        lost += sum(count.lost_sets for count in found.values())
        collapsed = ", ".join(
            f"{label} on {_show_sets(count.lost_sets, count.sets)}"
            for label, count in found.items()
            if count.lost_sets
        )
        shown.append(f"{name}: {collapsed or 'none'} (linear {counts[name]['linear'].show()})")
    sets = counts[_TWINS]["linear"].sets
    return Claim(
        "Evidence and statistics routers never lose a domain, without any guard",
        "",
        "; ".join(shown),
        "does not hold" if lost else "not decided",
        f"{_name_sets(sets)} in each of two cooperatives",
        _PROMISE,
    )


def _claim_guarded(counts: Mapping[str, Mapping[str, Count]]) -> Claim:
    lost, shown = 0, []
    for name in (_TWINS, _LANGUAGES):
        found = {label: counts[name][label] for label in _GUARDED}
        lost += sum(count.guarded_sets or 0 for count in found.values())
        parts = [
            f"{label} on {_show_sets(count.guarded_sets or 0, count.sets)}, {count.guarded} of "
            f"{count.fits} fits, {count.replaced} replaced"
            for label, count in found.items()
        ]
        shown.append(f"{name}: {'; '.join(parts)}")
    sets = counts[_TWINS]["linear"].sets
    return Claim(
        "Under the guard no fusion is published that loses a domain",
        "",
        ". ".join(shown),
        "does not hold" if lost else "not decided",
        f"{_name_sets(sets)} in each of two cooperatives",
        f"{_PROMISE}; where refits do not help, the guard publishes evidence-zero in the router's "
        "place, which is counted as replaced",
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
