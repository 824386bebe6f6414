"""Forecasts for a cooperative: from pilots before training, from stated losses before fusing."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from molora_fed.bank import build_calibration_bank
from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.manifest import Contribution, Manifest, load_contribution
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.errors import ConfigError
from molora_fed.forecasting.headline import Headline, choose_headline
from molora_fed.forecasting.history import collect_outcomes, collect_pilot_records
from molora_fed.forecasting.pilots import MAX_SHARE, build_past, extrapolate, fit_growth
from molora_fed.forecasting.records import ForecastRecord, make_forecasts
from molora_fed.fusion.plan import plan_fusion
from molora_fed.fusion.texts import list_measured, measure_loss_matrix
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.types import Case, LossMatrix, Progress

__all__ = [
    "CooperativeForecast",
    "build_stated_losses",
    "forecast_from_contributions",
    "forecast_from_pilots",
]

ACTOR = "molora forecast"


@dataclass(frozen=True)
class CooperativeForecast:
    """Forecasts that the ledger keeps.

    Attributes:
        records: One a predictor that applies.
        basis: What they were made from, for people.
        headline: Which of them stand above the others.
        missing: Why each other predictor said nothing, by its name.
    """

    records: tuple[ForecastRecord, ...]
    basis: str
    headline: Headline
    missing: Mapping[str, str]


def build_stated_losses(manifests: Sequence[Manifest]) -> LossMatrix:
    """Own-domain losses as contributors state them, on their own validation blocks.

    Contributors of one domain measure the base on different blocks: the base's loss is their mean,
    and each specialist keeps its own ratio to it.

    Raises:
        ConfigError: If there is none, or a stated loss is zero.
    """
    if not manifests or any(min(m.base_loss, m.specialist_loss) <= 0 for m in manifests):
        got = "none" if not manifests else "a loss of zero"
        raise ConfigError(
            f"Cannot forecast: expected contributions that state losses above 0 nats, got {got}. "
            "Give folders that `molora train` wrote."
        )
    domains = tuple(sorted({m.domain for m in manifests}))
    base = {d: fmean(m.base_loss for m in manifests if m.domain == d) for d in domains}
    specialists = {
        m.contributor: {m.domain: base[m.domain] * m.specialist_loss / m.base_loss}
        for m in manifests
    }
    return LossMatrix(domains, base, specialists, {m.contributor: m.domain for m in manifests})


def forecast_from_contributions(
    cooperative: Cooperative,
    folders: Sequence[Path] = (),
    *,
    past: Sequence[ForecastRecord] = (),
    plugins: Plugins | None = None,
) -> CooperativeForecast:
    """Forecast before fusing, from what contributors state; no model is run.

    Args:
        cooperative: Whose ledger keeps the forecasts.
        folders: Contributions, or folders that `molora train` wrote; with none, all that the
            ledger has admitted.
        past: Records of other cooperatives; scored ones are evidence.
        plugins: Where predictors are registered; the installed plugins by default.

    Raises:
        ConfigError: If there is no contribution, or one is of another cooperative.
        LedgerError: If another process works on the cooperative.
    """
    plugins = plugins or get_plugins()
    if folders:
        manifests = [one.manifest for one in _load(cooperative, folders)]
    else:
        with cooperative.read_ledger() as ledger:
            manifests = [e.manifest for e in ledger.contributions(ContributionState.ADMITTED)]
    case = Case(build_stated_losses(manifests), cooperative.charter.identity_hash)
    missing: dict[str, str] = {}
    fusion = cooperative.charter.amendment.fusion
    records = make_forecasts(
        case,
        fusion.router,
        plugins,
        choices=fusion.predictors,
        past=collect_outcomes(past),
        stage="contributions",
        on_missing=missing.__setitem__,
    )
    _keep(cooperative, records)
    return CooperativeForecast(
        tuple(records),
        f"{len(manifests)} contributors' stated losses on their own domains",
        _choose_headline(cooperative, records, case, plugins),
        missing,
    )


def forecast_from_pilots(
    cooperative: Cooperative,
    folders: Sequence[Path],
    *,
    past: Sequence[ForecastRecord] = (),
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> CooperativeForecast:
    """Forecast before training, from specialists after a small share of the planned steps.

    The pilots are measured on each other's calibration blocks, or admission blocks where none are
    pooled; their own-domain losses are extrapolated to the charter's steps.

    Args:
        cooperative: Whose ledger keeps the forecasts.
        folders: What `molora train --steps N` wrote, a pilot each.
        past: Records of other cooperatives; scored ones are evidence, and say how losses grow.
        plugins: Where everything is registered; the installed plugins by default.
        progress: Told of the passes over the blocks.

    Raises:
        ConfigError: If a pilot had too many steps, or pilots had different numbers of steps.
        LedgerError: If another process works on the cooperative.
        MoloraError: Whatever the adapters or the disk refuse.
    """
    plugins = plugins or get_plugins()
    charter = cooperative.charter
    pilots = _load(cooperative, folders)
    share = _compute_share(pilots, charter.amendment.training.steps)
    base = cooperative.load_base(progress)
    ordered = sorted(map(collect_contributed, pilots), key=lambda one: one.id)
    plan = plan_fusion(base, charter, ordered, plugins)
    with tempfile.TemporaryDirectory() as folder:
        bank = build_calibration_bank(
            Path(folder) / "bank",
            base,
            plan.experts,
            list_measured(ordered),
            progress=progress,
            **{**plan.bank, "readings": frozenset({"evidence"})},
        )
        losses = measure_loss_matrix(bank, plan.own_domain)
    known = collect_pilot_records(past)
    group = charter.identity_hash
    growth = fit_growth([r for r in known if r.outcome.case.group != group])
    case = extrapolate(losses, share, growth, group=group)
    missing: dict[str, str] = {}
    records = make_forecasts(
        case,
        plan.router,
        plugins,
        choices=charter.amendment.fusion.predictors,
        past=build_past(case, known),
        stage="pilots",
        share=share,
        on_missing=missing.__setitem__,
    )
    _keep(cooperative, records)
    return CooperativeForecast(
        tuple(records),
        f"{len(pilots)} pilots of {100 * share:.0f} % of the steps, growth {growth:.2f} from "
        + (f"{len(known)} records" if known else "the published figures"),
        _choose_headline(cooperative, records, case, plugins),
        missing,
    )


def _choose_headline(
    cooperative: Cooperative, records: Sequence[ForecastRecord], case: Case, plugins: Plugins
) -> Headline:
    said = {record.predictor: record.forecast for record in records}
    fusion = cooperative.charter.amendment.fusion
    return choose_headline(fusion.headline, said, case, plugins, choices=fusion.predictors)


def _load(cooperative: Cooperative, folders: Sequence[Path]) -> list[Contribution]:
    loaded = [
        load_contribution(inner if (inner := folder / "contribution").is_dir() else folder)
        for folder in folders
    ]
    expected = cooperative.charter.identity_hash
    strange = [
        one.manifest.contributor for one in loaded if one.manifest.charter_identity != expected
    ]
    if strange:
        raise ConfigError(
            f"Cannot forecast for cooperative '{cooperative.charter.identity.name}': expected "
            f"contributions made for it, got others from {', '.join(strange)}. Leave these out."
        )
    return loaded


def _compute_share(pilots: Sequence[Contribution], planned: int) -> float:
    """The share of the planned steps that all pilots had."""
    steps = {one.manifest.training.get("steps") for one in pilots}
    [first] = steps if len(steps) == 1 else [None]
    if not isinstance(first, int) or not 0 < first <= MAX_SHARE * planned:
        raise ConfigError(
            f"Cannot forecast from pilots: expected each to have the same number of steps, at most "
            f"{int(MAX_SHARE * planned)} of the planned {planned}, got "
            f"{', '.join(sorted(map(str, steps))) or 'none'}. Train them with `molora train "
            "--steps N`."
        )
    return first / planned


def _keep(cooperative: Cooperative, records: Sequence[ForecastRecord]) -> None:
    """Write forecasts into the ledger before their outcome; the next fusion scores them."""
    with cooperative.open_ledger() as ledger:
        for record in records:
            ledger.add_record("forecast", record.to_json(), actor=ACTOR)
