"""The result of a fusion in the form of report.json (docs/report.schema.json)."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from molora_fed.adapters.compatibility import count_changed
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import Charter
from molora_fed.forecasting.headline import Headline
from molora_fed.forecasting.records import ForecastRecord
from molora_fed.fusion.plan import FusionPlan
from molora_fed.options import list_settings
from molora_fed.routing.fused import FusedExpert, FusedModel
from molora_fed.routing.top_k import TopKRouter

__all__ = ["FusionOutcome", "build_result"]

FORMAT_VERSION = 1
_LIBRARIES = (
    "molora-fed", "numpy", "peft", "safetensors", "scipy", "tokenizers", "torch", "transformers",
)  # fmt: skip
_COMPUTE = ("steps", "tokens", "threads", "seconds", "parameters", "kind", "domain")


@dataclass(frozen=True, eq=False)
class FusionOutcome:
    """What a fusion did, before it is put into words.

    Attributes:
        plan: What was fused.
        texts: Of which texts the figures are; `TextsRun.describe`.
        fused: The fused model.
        measured: The evaluation's parts of the report.
        forecasts: Scored forecasts.
        headline: Which of them stand above the others.
        guard: What the collapse guard did, by router.
        seconds: Wall time by phase.
        folder: Where bank and fused model lie.
        controls: Cost of each control by name.
        not_measured: Why there are no figures of a router, merge, predictor or contribution, by
            kind and name.
    """

    plan: FusionPlan
    texts: Mapping[str, Any]
    fused: FusedModel
    measured: Mapping[str, Any]
    forecasts: Sequence[ForecastRecord]
    headline: Headline
    guard: Mapping[str, Any]
    seconds: Mapping[str, float]
    folder: Path
    controls: Mapping[str, Mapping[str, Any]]
    not_measured: Mapping[str, Mapping[str, str]]


def build_result(outcome: FusionOutcome, charter: Charter, seed: int) -> dict[str, Any]:
    """Compose the content of report.json that fusing knows.

    Args:
        outcome: What was done and measured.
        charter: Under which rules.
        seed: Of routers and bootstraps.

    Returns:
        JSON values that satisfy docs/report.schema.json.
    """
    plan, fused = outcome.plan, outcome.fused
    return {
        **outcome.measured,
        "format_version": FORMAT_VERSION,
        "cooperative": charter.identity.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "router": fused.router_name,
        "top_k": fused.router.top_k if isinstance(fused.router, TopKRouter) else None,
        "mixture": fused.mixture,
        "privacy_mode": charter.identity.privacy_mode,
        "domains": sorted(outcome.measured["losses"]["base"]),
        "experts": [_describe_expert(expert) for expert in fused.experts],
        "own_domain": plan.own_domain,
        "guard": dict(outcome.guard),
        "plugins": _list_plugins(outcome, charter),
        **_describe_settings(plan),
        "not_measured": {kind: dict(why) for kind, why in outcome.not_measured.items()},
        "forecasts": {record.predictor: record.summary() for record in outcome.forecasts},
        "headline": outcome.headline.to_json(),
        "contamination": _collect_contamination(plan),
        "overlap": outcome.texts["overlap"],
        "corpus": outcome.texts["corpus"],
        **{name: outcome.texts[name] for name in ("claims",) if name in outcome.texts},
        "compute": _collect_compute(outcome),
        "bytes": {
            "adapters": {e.name: e.adapter.num_bytes for e in fused.experts if e.adapter},
            "bank": _count_bytes(outcome.folder / "bank"),
            "fused": _count_bytes(outcome.folder / "fused"),
        },
        "seconds": dict(outcome.seconds),
        "threads": {"fuse": torch.get_num_threads()},
        "measured_on": _describe_placement(fused.base.model, plan.bank["batch"]),
        "fingerprints": {
            "base": fused.base.weights,
            "tokenizer": fused.base.tokenizer_fingerprint,
            "charter": charter.identity_hash,
            "contributions": {c.contributor: c.id for c in plan.contributions},
            "adapters": {e.name: e.adapter.hash for e in fused.experts if e.adapter},
            **{name: outcome.texts[name] for name in ("calibration", "held_out", "held_out_kept")},
        },
        "versions": {
            **{name: version(name) for name in _LIBRARIES},
            "python": platform.python_version(),
        },
    }


def _describe_placement(model: Any, batch: int) -> dict[str, str | int]:
    """Device, dtype and blocks of the passes that every loss comes from; losses are float32."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {"device": model.device.type, "dtype": dtype, "blocks_per_pass": batch}


def _list_plugins(outcome: FusionOutcome, charter: Charter) -> dict[str, list[dict[str, str]]]:
    """What was used of which plugin in which version, by kind."""
    plugins = outcome.plan.plugins
    kinds = {e.adapter.kind for e in outcome.fused.experts if e.adapter is not None}
    fusion, asked = charter.amendment.fusion, {record.predictor for record in outcome.forecasts}
    predictors = list_settings(plugins.gain_predictors, fusion.predictors)
    used = (
        (plugins.routers, {fusion.routers[key].name for key in outcome.plan.routers}),
        (plugins.merges, {one.name for one in fusion.merges}),
        (plugins.gain_predictors, {one.name for one in predictors if one.key in asked}),
        (plugins.adapter_kinds, kinds & set(plugins.adapter_kinds.names())),
    )
    return {
        registry.kind: [registry.entry(name).describe() for name in sorted(names)]
        for registry, names in used
        if names
    }


def _describe_settings(plan: FusionPlan) -> dict[str, dict[str, dict[str, Any]]]:
    """Which plugin, with which options, what is called by a label or has options; by kind."""
    fusion, plugins = plan.charter.amendment.fusion, plan.plugins
    chosen = {
        plugins.routers.kind: fusion.routers.values(),
        plugins.merges.kind: fusion.merges,
        plugins.gain_predictors.kind: fusion.predictors,
    }
    found = {
        kind: {
            one.key: {"name": one.name, "options": one.options} for one in some if not one.is_plain
        }
        for kind, some in chosen.items()
    }
    found = {kind: some for kind, some in found.items() if some}
    return {"settings": found} if found else {}


def _describe_expert(expert: FusedExpert) -> dict[str, Any]:
    adapter: Adapter | None = expert.adapter
    return {
        "name": expert.name,
        "domain": expert.domain,
        "contribution": expert.contribution,
        "kind": None if adapter is None else adapter.kind,
        "rank": None if adapter is None else adapter.max_rank or None,
        "bytes": 0 if adapter is None else adapter.num_bytes,
        "changed": 0 if adapter is None else count_changed(adapter),
        "modules": 0 if adapter is None else len(adapter.updates),
    }


def _collect_contamination(plan: FusionPlan) -> dict[str, float]:
    """The worst of a domain's contributors, where it is known."""
    worst: dict[str, float] = {}
    for c in plan.contributions:
        if c.contamination is not None:
            worst[c.domain] = max(worst.get(c.domain, 0.0), c.contamination)
    return worst


def _collect_compute(outcome: FusionOutcome) -> dict[str, Any]:
    """Training cost where steps and tokens are known."""
    trainings: dict[str, Any] = {
        c.contributor: {**c.training, "domain": c.domain} for c in outcome.plan.contributions
    }
    contributors = {name: _pick_compute(record) for name, record in trainings.items()}
    compute: dict[str, Any] = {"contributors": {n: c for n, c in contributors.items() if c}}
    if found := _pick_compute(outcome.fused.base.training or {}):
        compute["base"] = found
    controls = {name: _pick_compute(record) for name, record in outcome.controls.items()}
    if controls:
        compute["controls"] = controls
    return compute


def _pick_compute(record: Mapping[str, Any]) -> dict[str, Any]:
    if not {"steps", "tokens"} <= record.keys():
        return {}
    return {name: record[name] for name in _COMPUTE if name in record}


def _count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
