"""The work behind `adapter-regime`: small adapters made of one full training, and comparisons."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.contract import LinearOptions
from molora_fed.adapters.files import AdapterMeta, load_adapter
from molora_fed.adapters.kinds import SvdKind
from molora_fed.adapters.save import write_differences, write_factors
from molora_fed.adapters.updates import Adapter, LinearUpdate, Spectrum, decompose
from molora_fed.evaluation.bootstrap import compute_interval, resample_domain_means
from molora_fed.evaluation.evaluate import Evaluation
from molora_fed.models.forward import compute_block_losses
from molora_fed.plugins import get_plugins
from molora_fed.training.loop import METRICS_NAME
from molora_fed.types import Split
from molora_studies.framework.actions import open_base, open_corpus, train_domain
from molora_studies.framework.contract import TaskContext
from molora_studies.framework.fusions import load_evaluation

__all__ = ["compare_fusions", "derive_adapter", "screen_variants", "train_recipe"]

ROUTER = "evidence"
_FUSED = f"fused:{ROUTER}"


class _Maker:
    """Small adapters of one full difference; every matrix is decomposed once."""

    def __init__(self, full: Adapter) -> None:
        self._full = full
        self._spectra: dict[str, Spectrum] = {}

    def write(self, variant: Mapping[str, Any], folder: Path) -> None:
        """Write one variant.

        Args:
            variant: `kind`, `rank`, `precision` and `budget_percent` of the full difference's
                file, as in `adapter_regime.Variant`.
            folder: Target.
        """
        kind, precision = variant["kind"], variant["precision"]
        meta = AdapterMeta(
            kind=kind,
            frozen_depth=self._full.frozen_depth,
            base_weights=self._full.base_weights,
        )
        if kind == "delta":
            options = LinearOptions(precision=precision)
            write_differences(folder, self._full.updates, meta, options=options)
            return
        percent = variant["budget_percent"]
        budget = None if percent is None else int(self._full.num_bytes * percent / 100)
        svd = SvdKind({"precision": precision, "budget_bytes": budget})
        write_factors(folder, self._shorten(svd, variant["rank"]), meta, options=svd.options)

    def _shorten(self, svd: SvdKind, rank: int) -> dict[str, LinearUpdate]:
        """As kind `svd` does after training; changes of biases are left out, as it trains none."""
        if not self._spectra:
            self._spectra = {n: decompose(u.product()) for n, u in self._full.updates.items()}
        return svd.shorten(self._spectra, rank)


def _load_full(context: TaskContext, index: int) -> Adapter:
    folder = context.needs[index].folder / "adapter"
    return load_adapter(folder, plugins=get_plugins(), name="full")


def derive_adapter(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Write one small adapter of a full training into `adapter/`.

    Args:
        settings: The variant.
        context: Needs the full training.
    """
    full = context.needs[0]
    folder = context.folder / "adapter"
    _Maker(_load_full(context, 0)).write(settings, folder)
    made = load_adapter(folder, plugins=get_plugins(), name="small")
    kept = ("domain", "base_loss", "steps", "frozen_depth")
    return {
        **{name: full.result[name] for name in kept},
        "kind": made.kind,
        "adapter_bytes": made.num_bytes,
        "full_bytes": full.result["adapter_bytes"],
    }


def screen_variants(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Measure small adapters of one full training on validation blocks of its domain.

    Args:
        settings: `variants` by label, and `blocks`, how many are measured.
        context: Needs base, corpus and the full training.

    Returns:
        Losses of base and full training, bytes of the latter, and bytes and loss by label.
    """
    base = open_base(context.needs[0])
    tokens = open_corpus(context.needs[1]).blocks[Split.VALIDATION].take(settings["blocks"]).tokens
    full = _load_full(context, 2)
    maker = _Maker(full)

    def measure(adapter: Adapter | None) -> float:
        with applied(base.model, adapter) as model:
            return float(compute_block_losses(model, tokens).double().mean())

    found = {}
    for done, (label, variant) in enumerate(settings["variants"].items()):
        with tempfile.TemporaryDirectory(dir=context.folder) as temporary:
            folder = Path(temporary) / "adapter"
            maker.write(variant, folder)
            adapter = load_adapter(folder, plugins=get_plugins(), name=label)
            found[label] = {"bytes": adapter.num_bytes, "loss": measure(adapter)}
        if context.progress is not None:
            context.progress(done + 1, len(settings["variants"]))
    return {
        "domain": context.needs[2].result["domain"],
        "blocks": len(tokens),
        "base_loss": measure(None),
        "full_loss": measure(full),
        "full_bytes": full.num_bytes,
        "variants": found,
    }


def train_recipe(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Train a specialist as `plan_specialist` does, and keep its validation curve.

    Returns:
        What the substrate's action returns, and `curve`: steps and losses on the watched
        validation blocks, so that the last weights can be told from the best ones.
    """
    result = train_domain(settings, context)
    lines = (context.folder / METRICS_NAME).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = [(row["step"], row.get("validation_loss")) for row in rows]
    curve = [[step, loss] for step, loss in found if loss is not None]
    return {**result, "curve": curve}


def compare_fusions(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Share of full fine-tuning's fusion gain that small adapters keep.

    Both gains are measured from one reference, the best alone of full fine-tuning's cooperative
    (the lower of the base's and its best specialist's equal-weight loss), so that small adapters
    are not flattered by weaker specialists of their own.

    Args:
        settings: Unused; the needs say everything.
        context: Needs the full fusions of all seeds, then the small ones of the same seeds.

    Returns:
        `kept_percent` (of the mean over seeds, 95 % interval by document cluster),
        `kept_percent_by_seed`, the gains in nats and percent, `gains` as each fusion states them
        against references of its own, `bytes` and `full_bytes` of the adapters of one cooperative
        (means over seeds).
    """
    half = len(context.needs) // 2
    full, small = context.needs[:half], context.needs[half:]
    pairs = [
        (load_evaluation(a.folder), load_evaluation(b.folder))
        for a, b in zip(full, small, strict=True)
    ]
    gains = np.array([_read_gains(*pair) for pair in pairs])  # (seeds, 3)
    drawn = np.mean([_resample_gains(*pair) for pair in pairs], axis=0)  # (R, 2), shared draws
    low, high = compute_interval(100.0 * drawn[:, 1] / drawn[:, 0])
    mean = gains.mean(axis=0)
    return {
        "kept_percent": {"point": 100.0 * mean[1] / mean[0], "low": low, "high": high},
        "kept_percent_by_seed": [100.0 * row[1] / row[0] for row in gains],
        "full_gain_nats": mean[0],
        "small_gain_nats": mean[1],
        "full_gain_percent_by_seed": [100.0 * row[0] / row[2] for row in gains],
        "small_gain_percent_by_seed": [100.0 * row[1] / row[2] for row in gains],
        "gains": {
            "full": [dict(done.result["gains"][ROUTER]) for done in full],
            "small": [dict(done.result["gains"][ROUTER]) for done in small],
        },
        "full_bytes": _mean_bytes([done.result for done in full]),
        "bytes": _mean_bytes([done.result for done in small]),
        "seeds": half,
    }


def _read_gains(full: Evaluation, small: Evaluation) -> tuple[float, float, float]:
    """Gains in nats of both fusions over one reference, and the reference's loss."""
    reference = full.equal_weight(full.best_alone())
    return (
        reference - full.equal_weight(_FUSED),
        reference - small.equal_weight(_FUSED),
        reference,
    )


def _resample_gains(full: Evaluation, small: Evaluation) -> Any:
    """The first two under resampled clusters, (R, 2); both fusions read the same blocks."""
    sums = [full.sums[full.best_alone()], full.sums[_FUSED], small.sums[_FUSED]]
    means = resample_domain_means(full.clusters, sums, seed=full.seed).mean(axis=2)
    return np.stack([means[:, 0] - means[:, 1], means[:, 0] - means[:, 2]], axis=1)


def _mean_bytes(results: Sequence[Mapping[str, Any]]) -> float:
    """Bytes of all members' adapters, mean over fusions."""
    totals = [sum(m["adapter_bytes"] for m in r["members"].values()) for r in results]
    return float(np.mean(totals))
