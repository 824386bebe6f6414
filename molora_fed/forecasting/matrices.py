"""Loss matrices of many runs in one JSON file, and their outcomes by group.

A run has `condition`, `domains`, `base` (a loss a domain) and `specialists` (a row a specialist,
a column a domain); row i is the specialist of domain i, unless `own_domain` names each row's.
`group` (the condition without its seed), `seed` and `fused` may be there.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.errors import ConfigError, describe_mismatch
from molora_fed.forecasting.divergence import best_own_losses, compute_gains
from molora_fed.forecasting.intervals import Interval, compute_interval
from molora_fed.types import Case, LossMatrix, Outcome, Reference

__all__ = [
    "MAX_BYTES",
    "Fit",
    "MatrixRun",
    "Model",
    "compute_group_residuals",
    "fit_and_forecast",
    "group_outcomes",
    "is_same_condition",
    "leave_out_group",
    "load_runs",
    "parse_runs",
]


MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class MatrixRun:
    """One run of a file of loss matrices.

    Attributes:
        condition: Its name.
        case: Its losses and group.
        seed: Seed; None if not given.
        fused: Loss of the fused model by domain, nats per token; None if not given.
    """

    condition: str
    case: Case
    seed: int | None
    fused: Mapping[str, float] | None

    @property
    def outcome(self) -> Outcome | None:
        """The run as a past outcome; None without a fused model."""
        if self.fused is None:
            return None
        return Outcome(self.case, compute_gains(self.case.losses, self.fused))


def load_runs(path: Path, *, own_domain_only: bool = False) -> tuple[MatrixRun, ...]:
    """Read a file of loss matrices.

    Args:
        path: JSON file.
        own_domain_only: Read `base` and each specialist's loss on its own domain, nothing else.

    Raises:
        ConfigError: If it is missing, too large or malformed.
    """
    what = f"Cannot read loss matrices '{path}'"
    fix = "Give a file in the published form, see docs/forecasts.md."
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                describe_mismatch(
                    what, expected=f"at most {MAX_BYTES} bytes", got=str(size), fix=fix
                )
            )
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            describe_mismatch(what, expected="a JSON file", got=reason, fix=fix)
        ) from error
    return parse_runs(table, what=what, own_domain_only=own_domain_only)


def parse_runs(
    table: Any, *, what: str = "Cannot read loss matrices", own_domain_only: bool = False
) -> tuple[MatrixRun, ...]:
    """Read loss matrices from JSON values.

    Args:
        table: A mapping with a list `runs`, or the list.
        what: Start of an error's message.
        own_domain_only: Read `base` and each specialist's loss on its own domain, nothing else.

    Raises:
        ConfigError: If it is malformed.
    """
    runs = table.get("runs") if isinstance(table, Mapping) else table
    if not _is_list(runs) or not runs:
        raise ConfigError(
            f"{what}: expected a list 'runs' of at least one run, got {type(runs).__name__}. "
            "Give a file in the published form, see docs/forecasts.md."
        )
    return tuple(
        _parse_run(run, f"{what}, run {number}", own_domain_only)
        for number, run in enumerate(runs, start=1)
    )


def _parse_run(run: Any, what: str, own_domain_only: bool) -> MatrixRun:
    _require(isinstance(run, Mapping), what, "a mapping", run)
    condition, group = run.get("condition", ""), run.get("group") or ""
    _require(isinstance(condition, str), what, "text as 'condition'", condition)
    _require(isinstance(group, str), what, "text as 'group'", group)
    what = f"{what} '{condition}'"
    domains = _parse_names(run.get("domains"), what, "domains")
    _require(len(set(domains)) == len(domains), what, "different 'domains'", domains)
    base = dict(zip(domains, _parse_losses(run.get("base"), domains, what, "base"), strict=True))
    rows = run.get("specialists")
    _require(_is_list(rows) and len(rows) > 0, what, "a row a specialist in 'specialists'", rows)
    owned = _parse_names(run.get("own_domain", list(domains)), what, "own_domain")
    _require(
        len(owned) == len(rows) and set(owned) <= set(domains),
        what,
        f"one of the domains for each of the {len(rows)} rows of 'specialists'",
        owned,
    )
    specialists: dict[str, dict[str, float]] = {}
    own_domain: dict[str, str] = {}
    for number, (domain, row) in enumerate(zip(owned, rows, strict=True), start=1):
        name = domain if owned.count(domain) == 1 else f"{domain}-{number}"
        own_domain[name] = domain
        label = f"row {number} of specialists"
        if own_domain_only:
            size = len(domains)
            _require(_is_list(row) and len(row) == size, what, f"{size} numbers as {label}", row)
            loss = _parse_loss(row[domains.index(domain)], what, label)
            specialists[name] = {domain: loss}
        else:
            losses = _parse_losses(row, domains, what, label)
            specialists[name] = dict(zip(domains, losses, strict=True))
    fused = None if own_domain_only else run.get("fused")
    if fused is not None:
        fused = dict(zip(domains, _parse_losses(fused, domains, what, "fused"), strict=True))
    seed = run.get("seed")
    return MatrixRun(
        condition=condition,
        case=Case(LossMatrix(domains, base, specialists, own_domain), group=group),
        seed=seed if isinstance(seed, int) else None,
        fused=fused,
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _parse_names(value: Any, what: str, key: str) -> tuple[str, ...]:
    is_names = _is_list(value) and all(isinstance(name, str) and name for name in value)
    _require(is_names and len(value) > 0, what, f"a list of names as '{key}'", value)
    return tuple(value)


def _parse_losses(value: Any, domains: Sequence[str], what: str, label: str) -> list[float]:
    expected = f"a loss for each of the {len(domains)} domains as {label}"
    _require(_is_list(value) and len(value) == len(domains), what, expected, value)
    return [_parse_loss(loss, what, label) for loss in value]


def _parse_loss(value: Any, what: str, label: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    _require(
        is_number and math.isfinite(value) and value > 0,
        what,
        f"finite losses above 0 nats as {label}",
        value,
    )
    return float(value)


def _require(is_met: bool, what: str, expected: str, got: Any) -> None:
    if not is_met:
        text = repr(got)
        raise ConfigError(
            describe_mismatch(
                what,
                expected=expected,
                got=text if len(text) <= 60 else f"{text[:57]}...",
                fix="Correct the file, see docs/forecasts.md.",
            )
        )


Model = Callable[[Case], float]
"""Forecasts a case's gain in percent."""

Fit = Callable[[Sequence[Sequence[Outcome]]], Model]
"""Fits a model to groups of outcomes."""

_BASE_TOLERANCE = 0.005
_OWN_TOLERANCE = 0.02


def is_same_condition(first: LossMatrix, second: LossMatrix) -> bool:
    """Whether two matrices are of one condition with different seeds, by their losses alone.

    Names and order of domains do not count: equally many domains whose base losses agree within
    0.5 % and whose own-domain losses agree within 2 %.
    """
    if len(first.domains) != len(second.domains):
        return False
    own = best_own_losses(first), best_own_losses(second)
    pairs = zip(
        sorted((first.base[d], own[0][d]) for d in first.domains),
        sorted((second.base[d], own[1][d]) for d in second.domains),
        strict=True,
    )
    return all(
        abs(a[0] - b[0]) <= _BASE_TOLERANCE * b[0] and abs(a[1] - b[1]) <= _OWN_TOLERANCE * b[1]
        for a, b in pairs
    )


def leave_out_group(case: Case, outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Outcomes that may be evidence for a case: those of other groups.

    Names of groups decide where both have one; else the losses do.
    """
    return [outcome for outcome in outcomes if not _is_same_group(case, outcome.case)]


def _is_same_group(first: Case, second: Case) -> bool:
    if first.group and second.group:
        return first.group == second.group
    return is_same_condition(first.losses, second.losses)


def group_outcomes(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    """Outcomes by group, sorted by its name; an outcome without one is a group of its own."""
    named: dict[str, list[Outcome]] = {}
    alone = []
    for outcome in outcomes:
        if outcome.case.group:
            named.setdefault(outcome.case.group, []).append(outcome)
        else:
            alone.append([outcome])
    return [named[name] for name in sorted(named)] + alone


def compute_group_residuals(
    groups: Sequence[Sequence[Outcome]], models: Sequence[Model], reference: Reference
) -> list[float]:
    """The residual of largest size in each group.

    The largest, so that an interval that holds for a group holds for each of its runs.

    Args:
        groups: Outcomes by group.
        models: One a group, fitted without it or not fitted at all.
        reference: What gains are against.

    Returns:
        Outcome minus forecast, percentage points, one a group.
    """
    return [
        max((o.gains[reference] - model(o.case) for o in group), key=abs)
        for group, model in zip(groups, models, strict=True)
    ]


def fit_and_forecast(
    case: Case, groups: Sequence[Sequence[Outcome]], fit: Fit, reference: Reference
) -> tuple[float, Interval]:
    """Forecast a case by a model fitted to past groups, with an interval that leaves each out.

    Args:
        case: What to forecast; of none of the groups.
        groups: Past outcomes by group.
        fit: Fits a model to any of these groups but one.
        reference: What gains are against.

    Returns:
        Point in percent, and its interval.

    Raises:
        ConfigError: If there is no group, or a fit is refused.
    """
    point = fit(groups)(case)
    models = [fit([*groups[:i], *groups[i + 1 :]]) for i in range(len(groups))]
    residuals = compute_group_residuals(groups, models, reference)
    return point, compute_interval(point, residuals, fits=[model(case) for model in models])
