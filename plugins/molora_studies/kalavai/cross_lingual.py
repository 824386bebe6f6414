"""Specialists of languages the base never saw: the paper's largest gain, and its collapse."""

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
from molora_studies.framework.substrate import plan_mean
from molora_studies.kalavai.conditions import Estimate, estimate
from molora_studies.kalavai.languages import (
    AS_PUBLISHED,
    LANGUAGES,
    LOST_NATS,
    WITH_DEFAULT,
    count_excess,
    plan_languages,
)
from molora_studies.kalavai.method_table import draw_gains, list_rows, read_gain_interval, tabulate
from molora_studies.verdicts import (
    PREVENTION,
    Span,
    judge_above,
    judge_exists,
    judge_prevention,
    name_unit,
)

__all__ = ["CrossLingualOptions", "CrossLingualStudy"]

Results = Mapping[str, Mapping[str, Any]]

_FORMS = {"ours": WITH_DEFAULT, "as published": AS_PUBLISHED}
_PUBLISHED_GAIN = 21.76  # arXiv 2603.22755: Tamil, Yoruba, Welsh, code; percent
_PUBLISHED_DIVERGENCE = 25.65
_PAPERS = "linear-noncausal"


class CrossLingualOptions(StudyOptions):
    """Options.

    Attributes:
        languages: Manual pages of these languages, one contributor each; six at least.
        others: Domains that the base was trained on, one contributor each.
        steps: Steps of a specialist.
    """

    languages: tuple[str, ...] = Field(default=LANGUAGES, min_length=6)
    others: tuple[str, ...] = ("cpp",)
    steps: int = Field(default=600, ge=1)


class CrossLingualStudy(Study):
    """The same specialists fused as this project does, and as published."""

    Options: ClassVar[type[StudyOptions]] = CrossLingualOptions
    title: ClassVar[str] = "Languages the base was not trained on"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: CrossLingualOptions) -> Sequence[Cell]:
        """A fusion of each form and seed, and each form's mean over seeds."""
        cells = []
        for form, routers in _FORMS.items():
            fusions = [
                plan_languages(
                    f"languages {form} seed {seed}",
                    options.languages,
                    options.others,
                    seed,
                    steps=options.steps,
                    routers=routers,
                    as_published=form == "as published",
                )
                for seed in options.seeds
            ]
            cells += [
                Cell(f"{form} seed {seed}", {"form": form, "seed": seed}, fusion)
                for seed, fusion in zip(options.seeds, fusions, strict=True)
            ]
            mean = plan_mean(f"languages {form}, mean", fusions)
            cells.append(Cell(f"{form}, mean", {"form": form}, mean))
        return cells

    @classmethod
    def summarise(cls, options: CrossLingualOptions, results: Results) -> Summary:
        """Divergence by language, every router's gain, and the domains each loses."""
        ours, published = (
            [results[f"{form} seed {seed}"] for seed in options.seeds] for form in _FORMS
        )
        divergence = _measure_divergence(ours)
        excess = {label: _list_excess(ours, label, has_base=True) for label in WITH_DEFAULT}
        theirs = {label: _list_excess(published, label, has_base=False) for label in AS_PUBLISHED}
        rows = list_rows(results["ours, mean"])
        mean = estimate(
            sum(d[i] for d in divergence.values()) / len(divergence)
            for i in range(len(options.seeds))
        )
        gains = estimate(result["gains"][_PAPERS]["best_specialist"] for result in published)
        return Summary(
            findings={
                "divergence_percent": {d: estimate(v).to_json() for d, v in divergence.items()},
                "mean_divergence_percent": mean.to_json(),
                "gain_percent": {row.name: row.alone for row in rows if row.alone},
                "gain_over_best_specialist_percent": {
                    row.name: row.specialist for row in rows if row.specialist
                },
                "excess_nats": {"ours": excess, "as published": theirs},
                "domains_lost": {
                    "ours": {label: _count(found) for label, found in excess.items()},
                    "as published": {label: _count(found) for label, found in theirs.items()},
                },
            },
            claims=[
                _claim_gain(mean, gains, published),
                _claim_collapse(theirs),
                _claim_curriculum(theirs),
            ],
            tables=[
                tabulate(
                    f"Every router, mean of {len(options.seeds)} seeds, 95 % intervals by "
                    "document cluster",
                    rows,
                    {
                        "domains lost": {n: _show_count(found) for n, found in excess.items()},
                        "worst domain": {n: _show_worst(found) for n, found in excess.items()},
                    },
                ),
                _tabulate_published(published, theirs),
                Table(
                    "Own-domain divergence from the base",
                    ("domain", "divergence"),
                    [(domain, estimate(v).show()) for domain, v in divergence.items()],
                ),
            ],
            figures=[
                Figure(
                    "gains",
                    "Gain of every method on the best anyone has alone; bars are 95 % intervals by "
                    "document cluster.",
                    lambda figure: draw_gains(figure, rows),
                )
            ],
            notes=(
                f"A domain is lost if the fused loss is more than {LOST_NATS} nats above its best "
                "expert's on held-out text. Routers are fitted once a seed, without the collapse "
                "guard; study `collapse` fits them from more seeds, with it and without.",
                "The base was trained on none of the languages, its tokenizer neither: a letter "
                "that is not ASCII takes up to two tokens.",
            ),
        )


def _measure_divergence(results: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Own-domain divergence of each specialist on held-out text, percent, a number a seed."""
    found: dict[str, list[float]] = {}
    for result in results:
        losses = result["held_out"]
        for name, domain in losses["own_domain"].items():
            base = losses["base"][domain]
            own = losses["specialists"][name][domain]
            found.setdefault(domain, []).append(100.0 * (base - own) / base)
    return found


def _list_excess(
    results: Sequence[Mapping[str, Any]], label: str, *, has_base: bool
) -> list[dict[str, float]]:
    return [count_excess(result, label, has_base=has_base) for result in results]


def _count(excess: Sequence[Mapping[str, float]]) -> int:
    return sum(nats > LOST_NATS for each in excess for nats in each.values())


def _count_seeds(excess: Sequence[Mapping[str, float]]) -> int:
    return sum(any(nats > LOST_NATS for nats in each.values()) for each in excess)


def _show_count(excess: Sequence[Mapping[str, float]]) -> str:
    return f"{_count(excess)} of {sum(map(len, excess))}"


def _show_worst(excess: Sequence[Mapping[str, float]]) -> str:
    nats, domain = max((nats, domain) for each in excess for domain, nats in each.items())
    return f"{domain} {nats:+.3f} nats"


def _tabulate_published(
    results: Sequence[Mapping[str, Any]], excess: Mapping[str, Sequence[Mapping[str, float]]]
) -> Table:
    return Table(
        f"As published: logit mixture, no base expert; {len(results)} seeds",
        ("router", "gain on the best specialist", "by seed", "domains lost", "worst domain"),
        [
            (
                label,
                estimate(_read(results, label)).show(),
                ", ".join(f"{gain:+.2f} %" for gain in _read(results, label)),
                _show_count(found),
                _show_worst(found),
            )
            for label, found in excess.items()
        ],
    )


def _read(results: Sequence[Mapping[str, Any]], label: str) -> list[float]:
    return [float(result["gains"][label]["best_specialist"]) for result in results]


def _claim_gain(
    divergence: Estimate, gains: Estimate, published: Sequence[Mapping[str, Any]]
) -> Claim:
    documents = [
        Span.of(read_gain_interval(result["evaluation"], f"fused:{_PAPERS}", "best_specialist"))
        for result in published
    ]
    verdict = judge_above([Span.of(gains), *documents])
    if verdict == "holds" and not (gains.low or 0.0) <= _PUBLISHED_GAIN <= (gains.high or 0.0):
        verdict = "differs"
    domains = len(published[0]["held_out"]["domains"])
    return Claim(
        "Specialists of languages the base does not know fuse with the paper's largest gain",
        f"+{_PUBLISHED_GAIN:.2f} % on the best specialist at a mean divergence of "
        f"{_PUBLISHED_DIVERGENCE:.2f} %, 4 domains, 2 of 3 seeds (+6.14 % on the collapsed one)",
        f"{gains.show()}, at a mean divergence of {divergence.mean:.2f} %, {domains} domains",
        verdict,
        f"{name_unit('training seed', gains.count)}, and document cluster at every seed",
        "as published: pooled over the whole sequence, logits mixed, no base expert; differs if "
        "the gain is positive but its interval over seeds leaves out the published one",
    )


def _claim_collapse(excess: Mapping[str, Sequence[Mapping[str, float]]]) -> Claim:
    found = excess[_PAPERS]
    seeds = _count_seeds(found)
    return Claim(
        "The linear router collapses on some seeds: a language goes to another's expert",
        "1 of 3 seeds (Yoruba to Tamil, gate 99.84 %)",
        f"{seeds} of {len(found)} seeds, worst domain {_show_worst(found)}",
        judge_exists(seeds),
        name_unit("set of specialists", len(found)),
        f"a domain more than {LOST_NATS} nats above its best expert's loss, which one set shows; "
        "study `collapse` counts with more fits",
    )


def _claim_curriculum(excess: Mapping[str, Sequence[Mapping[str, float]]]) -> Claim:
    plain, with_it = (_count_seeds(excess[label]) for label in AS_PUBLISHED)
    return Claim(
        "A curriculum (the first fifth of steps on one domain each) prevents the collapse",
        "+22.04 % on the collapsed seed",
        f"{with_it} of {len(excess[_PAPERS])} seeds collapse with it, {plain} without",
        judge_prevention(plain, with_it),
        name_unit("set of specialists", len(excess[_PAPERS])),
        PREVENTION,
    )
