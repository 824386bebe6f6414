"""Standings: matches summed up by router, with intervals over independent trainings."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from molora_studies.verdicts import LEVEL, Span

__all__ = ["REFERENCE", "Estimate", "Standing", "estimate", "rank"]

REFERENCE = "linear"
"""The published router, which every other is compared with."""

Matches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Estimate:
    """A figure's mean over cooperatives, each the mean over its trainings.

    Attributes:
        mean: In the figure's unit.
        span: 95 % interval over trainings; without ends where a cooperative has one alone.
    """

    mean: float
    span: Span

    def show(self, digits: int = 4, *, sign: bool = True) -> str:
        """As text, e.g. "+0.0271 [+0.0233, +0.0314]"; no brackets without an interval."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.span.low is None else f"{mean} {self.span.show(digits, sign=sign)}"


@dataclass(frozen=True)
class Standing:
    """Where a router stands among the others.

    Attributes:
        router: Registered name.
        rank: From 1, by `gap`; None of a router that failed somewhere or cannot decode.
        failed: Why it has no figures; None if it played everywhere.
        loss: Equal-weight loss, nats per token.
        gap: Loss above the domain oracle's, nats.
        to_first: Loss less that of the router of rank 1, by pairs of the same training, nats.
        to_reference: The same less `REFERENCE`'s; None if that did not play.
        worst_domain: Largest excess of a domain over its best expert, nats per token.
        worst_domains: Which ones these are, over the trainings.
        worst_document: Largest excess of a document's part over its best expert, nats in all.
        unseen: Loss less the base's on text that nobody trained on, nats; None without such text.
        fit_seconds: Mean processor seconds of a fit under the collapse guard.
        step_seconds: The same of a token's step at batch 1; None if it cannot decode.
        base_seconds: Of the base's pass over a token beside it.
    """

    router: str
    rank: int | None = None
    failed: str | None = None
    loss: Estimate | None = None
    gap: Estimate | None = None
    to_first: Estimate | None = None
    to_reference: Estimate | None = None
    worst_domain: Estimate | None = None
    worst_domains: tuple[str, ...] = ()
    worst_document: Estimate | None = None
    unseen: Estimate | None = None
    fit_seconds: float | None = None
    step_seconds: float | None = None
    base_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def estimate(groups: Iterable[Sequence[float]]) -> Estimate:
    """The mean of several cooperatives' means, with its interval over trainings.

    Cooperatives are what they are; trainings of each are a sample. With one cooperative it is
    Student's interval.

    Args:
        groups: One figure a training, by cooperative; none is empty.

    Source: Satterthwaite 1946, degrees of freedom of a sum of variances.
    """
    samples = [np.asarray(list(group), dtype=float) for group in groups]
    mean = float(np.mean([sample.mean() for sample in samples]))
    if any(len(sample) < 2 for sample in samples):
        return Estimate(mean, Span(None, None))
    variances = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    total = float(variances.sum())
    if total == 0:
        return Estimate(mean, Span(mean, mean))
    freedom = np.array([len(sample) - 1 for sample in samples])
    degrees = total**2 / float((variances**2 / freedom).sum())
    half = float(stats.t.ppf(0.5 + LEVEL / 2, degrees)) * math.sqrt(total) / len(samples)
    return Estimate(mean, Span(mean - half, mean + half))


def rank(matches: Matches) -> list[Standing]:
    """Standings of all routers on some arenas, the best first, those that failed last.

    Args:
        matches: Of `hold_tournament`; every router once on every arena.
    """
    by_router: dict[str, list[Mapping[str, Any]]] = {}
    for match in matches:
        by_router.setdefault(match["router"], []).append(match)
    failed = {name: _find_failure(found) for name, found in by_router.items()}
    played = {name: found for name, found in by_router.items() if failed[name] is None}
    order = sorted(played, key=lambda name: (_estimate(played[name], "oracle_gap_nats").mean, name))
    ranked = [name for name in order if all(match["causal"] for match in played[name])]
    first = played[ranked[0]] if ranked else None
    standings = [
        _stand(
            name,
            played[name],
            ranked.index(name) + 1 if name in ranked else None,
            first,
            played.get(REFERENCE),
        )
        for name in order
    ]
    return standings + [
        Standing(name, failed=why) for name, why in sorted(failed.items()) if why is not None
    ]


def _find_failure(matches: Matches) -> str | None:
    return next((match["failed"] for match in matches if match["failed"] is not None), None)


def _stand(
    name: str, matches: Matches, place: int | None, first: Matches | None, reference: Matches | None
) -> Standing:
    seconds = [match["seconds"] for match in matches]
    decodes = all(each["step"] is not None for each in seconds)
    return Standing(
        router=name,
        rank=place,
        loss=_estimate(matches, "loss_nats"),
        gap=_estimate(matches, "oracle_gap_nats"),
        to_first=None if first is None else _compare(matches, first),
        to_reference=None if reference is None else _compare(matches, reference),
        worst_domain=estimate(_group(matches, [m["worst_domain"]["nats"] for m in matches])),
        worst_domains=tuple(sorted({m["worst_domain"]["domain"] for m in matches})),
        worst_document=_estimate_if_all(matches, "worst_document_nats"),
        unseen=_estimate_if_all(matches, "unseen_nats"),
        fit_seconds=float(np.mean([each["fit"] for each in seconds])),
        step_seconds=float(np.mean([each["step"] for each in seconds])) if decodes else None,
        base_seconds=float(np.mean([each["base"] for each in seconds])),
    )


def _group(matches: Matches, values: Sequence[float]) -> list[list[float]]:
    groups: dict[str, list[float]] = {}
    for match, value in zip(matches, values, strict=True):
        groups.setdefault(match["cooperative"], []).append(value)
    return list(groups.values())


def _estimate(matches: Matches, key: str) -> Estimate:
    return estimate(_group(matches, [match[key] for match in matches]))


def _estimate_if_all(matches: Matches, key: str) -> Estimate | None:
    return None if any(match[key] is None for match in matches) else _estimate(matches, key)


def _compare(matches: Matches, others: Matches) -> Estimate:
    """Paired by training: both were fitted and measured on the same banks."""
    pairs = zip(matches, others, strict=True)
    return estimate(_group(matches, [one["loss_nats"] - two["loss_nats"] for one, two in pairs]))
