"""Fusing: admitted contributions in; a fused model, scored forecasts and one evaluation out.

The order is the protocol: bank on calibration blocks; forecasts written down; routers fitted under
the collapse guard; held-out blocks compared with known text and read once; forecasts scored; the
fused model saved. `molora fuse` and the federation's server call the same function.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from molora_fed.adapters.updates import Adapter
from molora_fed.charter import Charter
from molora_fed.contributions.contributed import Contributed
from molora_fed.forecasting.headline import choose_headline
from molora_fed.forecasting.records import ForecastRecord, make_forecasts, score_forecasts
from molora_fed.fusion.boundary import NotMeasured
from molora_fed.fusion.collapse import GuardedRouter, choose_published
from molora_fed.fusion.plan import BASE_EXPERT, FusionPlan, plan_fusion
from molora_fed.fusion.result import FusionOutcome, build_result
from molora_fed.fusion.texts import Control, FusionTexts, PooledTexts
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.routing.bundle import save_fused
from molora_fed.routing.fused import FusedExpert, FusedModel
from molora_fed.storage.files import write_json
from molora_fed.types import Case, Progress, Reference

__all__ = ["PHASES", "FusionResult", "fuse", "fuse_texts"]

PHASES = ("calibration-bank", "forecasts", "routers", "held-out-bank", "evaluation", "saving")
"""What `on_phase` is told, in order; also the keys of `seconds`."""

FORECASTS_FILE = "forecasts.json"
RESULT_FILE = "result.json"


@dataclass(frozen=True, eq=False)
class FusionResult:
    """What a fusion gives.

    Attributes:
        result: Content of report.json as far as fusing knows it (docs/report.schema.json); also
            in `result.json` of the folder.
        fused: The fused model.
        fused_folder: Where it was saved.
        forecasts: Scored forecasts.
        evaluation: Held-out figures.
    """

    result: dict[str, Any]
    fused: FusedModel
    fused_folder: Path
    forecasts: tuple[ForecastRecord, ...]
    evaluation: Any


@dataclass
class _Clock:
    """Names the phase that runs and how long each took."""

    on_phase: Callable[[str], None] | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.on_phase is not None:
            self.on_phase(name)
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start


def fuse(
    base: Base,
    charter: Charter,
    contributions: Sequence[Contributed],
    folder: Path,
    *,
    plugins: Plugins | None = None,
    seed: int | None = None,
    controls: Mapping[str, Control] | None = None,
    on_phase: Callable[[str], None] | None = None,
    on_forecasts: Callable[[Sequence[ForecastRecord]], None] | None = None,
    excluded: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> FusionResult:
    """Fuse contributions whose samples are here; `fuse_texts` with `PooledTexts`.

    Args:
        base: See `fuse_texts`.
        charter: See `fuse_texts`.
        contributions: Admitted contributions, in any order.
        folder: See `fuse_texts`.
        plugins: See `fuse_texts`.
        seed: See `fuse_texts`.
        controls: Models of equal cost to report beside the fused one, by name.
        on_phase: See `fuse_texts`.
        on_forecasts: See `fuse_texts`.
        excluded: See `fuse_texts`.
        progress: See `fuse_texts`.
    """
    return fuse_texts(
        base,
        charter,
        PooledTexts(contributions, controls or {}),
        folder,
        plugins=plugins,
        seed=seed,
        on_phase=on_phase,
        on_forecasts=on_forecasts,
        excluded=excluded,
        progress=progress,
    )


def fuse_texts(
    base: Base,
    charter: Charter,
    texts: FusionTexts,
    folder: Path,
    *,
    plugins: Plugins | None = None,
    seed: int | None = None,
    on_phase: Callable[[str], None] | None = None,
    on_forecasts: Callable[[Sequence[ForecastRecord]], None] | None = None,
    excluded: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> FusionResult:
    """Fuse contributions under a charter, wherever their texts lie.

    Args:
        base: The charter's base checkpoint.
        charter: Decides experts, routers, mixture and batch size.
        texts: The contributions and their texts.
        folder: Receives `bank/`, `forecasts.json`, `fused/` and `result.json`. Killed and called
            again, it goes on with what is missing.
        plugins: Where routers, adapter kinds and gain predictors are registered; the installed
            ones if None.
        seed: Of routers and bootstraps; the amendment's if None.
        on_phase: Told the phase of `PHASES` that begins.
        on_forecasts: Receives the forecasts before any router is fitted, so that a ledger can
            commit them; again, scored, after the evaluation.
        excluded: Why contributors are not among the contributions, by name, for the report.
        progress: Receives progress within a phase.

    Returns:
        The saved fused model with everything that was measured.

    Raises:
        BaseCheckpointError: If the base is not the charter's.
        CharterError: If a router's options are wrong.
        ConfigError: If contributions clash or lack blocks.
        ExpertError: If the numbers of one contribution cannot be used; it is named.
        RoutingError: If a router cannot be fitted; MoloraError in general for what the bank, the
            adapters, the members and the disk refuse.
    """
    plugins = plugins or get_plugins()
    seed = charter.amendment.seed if seed is None else seed
    plan = plan_fusion(base, charter, texts.contributions, plugins)
    clock = _Clock(on_phase)
    missing = NotMeasured()
    for name, why in plan.failed.items():
        missing.add("router", name, why)
    for name, why in (excluded or {}).items():
        missing.add("contribution", name, why)
    with clock.phase("calibration-bank"):
        run = texts.open(base, plan, folder, seed=seed, missing=missing, progress=progress)
        matrix = run.measure_matrix()
    with clock.phase("forecasts"):
        case = Case(matrix, group=charter.identity_hash)
        forecasts = make_forecasts(
            case,
            plan.router,
            plugins,
            choices=charter.amendment.fusion.predictors,
            on_missing=partial(missing.add, "gain predictor"),
        )
        said = {record.predictor: record.forecast for record in forecasts}
        fusion = charter.amendment.fusion
        headline = choose_headline(fusion.headline, said, case, plugins, choices=fusion.predictors)
        _record(forecasts, folder, on_forecasts)
    with clock.phase("routers"):
        guarded, left_out = run.fit()
        published = choose_published(guarded, plan.router, charter.amendment.fusion.fallback)
    with clock.phase("held-out-bank"):
        run.prepare_held_out()
    with clock.phase("evaluation"):
        routers = {name: found.router for name, found in guarded.items()}
        evaluation = run.evaluate(routers, frozenset({published, plan.router}))
        measured = {
            **evaluation.to_json(),
            "control_difference_nats": {
                name: evaluation.difference(f"fused:{published}", name) for name in texts.controls
            },
        }
        forecasts = score_forecasts(forecasts, _name_gains(measured["gain_percent"]))
        _record(forecasts, folder, on_forecasts)
    with clock.phase("saving"):
        fused = _build_fused(base, plan, plan.load_adapters(), published, routers[published])
        fused_folder = folder / "fused"
        save_fused(fused, fused_folder, adapters=plan.adapter_folders)
    outcome = FusionOutcome(
        plan=plan,
        texts=run.describe(),
        fused=fused,
        measured=measured,
        forecasts=forecasts,
        headline=headline,
        guard=_describe_guard(guarded, left_out, plan.router, published),
        seconds=clock.seconds,
        folder=folder,
        controls={name: control.compute for name, control in texts.controls.items()},
        not_measured=missing.reasons,
    )
    result = build_result(outcome, charter, seed)
    write_json(folder / RESULT_FILE, result)
    return FusionResult(result, fused, fused_folder, tuple(forecasts), evaluation)


def _record(
    forecasts: Sequence[ForecastRecord],
    folder: Path,
    on_forecasts: Callable[[Sequence[ForecastRecord]], None] | None,
) -> None:
    """On disk first, then to whoever keeps the ledger."""
    write_json(folder / FORECASTS_FILE, [record.to_json() for record in forecasts])
    if on_forecasts is not None:
        on_forecasts(forecasts)


def _describe_guard(
    guarded: Mapping[str, GuardedRouter[Any]],
    left_out: Mapping[str, Mapping[str, Any]],
    chosen: str,
    published: str,
) -> dict[str, Any]:
    """The report's `guard`; a router that another was published for says so.

    Of routers that nothing was fitted for there is nothing to say.
    """
    described: dict[str, Any] = {
        n: found.to_json() for n, found in guarded.items() if found.attempts
    }
    if published != chosen:
        described[chosen]["replaced_by"] = published
    return {**described, **left_out}


def _name_gains(
    gains: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[Reference, float]]:
    """Gains by router and reference, from report.json's names."""
    return {
        router: {"best_alone": g["vs_best_alone"], "best_specialist": g["vs_best_specialist"]}
        for router, g in gains.items()
    }


def _build_fused(
    base: Base,
    plan: FusionPlan,
    adapters: Sequence[Adapter | None],
    key: str,
    router: Any,
) -> FusedModel:
    sources = {c.contributor: c for c in plan.contributions}
    experts = []
    for expert, adapter in zip(plan.experts, adapters, strict=True):
        source = sources.get(expert.name)
        experts.append(
            FusedExpert(BASE_EXPERT, None)
            if source is None
            else FusedExpert(expert.name, adapter, source.domain, source.id)
        )
    return FusedModel(
        base,
        tuple(experts),
        router,
        plan.router_entry(key).name,
        plan.bank["mixture"],
        plan.rules.frozen_depth,
        plan.router_entry(key),
    )
