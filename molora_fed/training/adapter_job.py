"""One adapter to train: its job, its run, and the specialist that it leaves on disk."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.contract import open_kind
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import AdapterRules
from molora_fed.errors import TrainingError, describe_mismatch
from molora_fed.guard import guarded
from molora_fed.models.base import Base
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.runtime import limit_threads
from molora_fed.plugins import Plugins
from molora_fed.storage.files import canonical_json, hash_bytes, write_json
from molora_fed.training.language_model import TrainConfig, TrainResult, train
from molora_fed.training.loop import CHECKPOINT_NAME, METRICS_NAME
from molora_fed.training.team import ALONE, Team
from molora_fed.types import OnMemory, Progress

__all__ = [
    "AdapterJob",
    "Specialist",
    "find_finished",
    "finish_job",
    "load_specialist",
    "run_job",
    "train_job",
]

FORMAT_VERSION = 1
_ADAPTER_FOLDER = "adapter"
_RECORD = "record.json"
_LEFT_OUT = (
    "options",
    "domain_options",
    "loss_on",
    "train_targets",
    "num_train_targets",
    "reset_documents",
    "train_starts",
)
"""What a record says only where it is not as usual."""


@dataclass(frozen=True, eq=False)
class Specialist:
    """A trained specialist on disk.

    Attributes:
        folder: Holds `adapter/`, `record.json` and `metrics.jsonl`.
        domain: Domain it was trained on; the control names all of them, joined by "+".
        kind: Adapter kind.
        base_loss: The base's loss on all validation blocks, nats per token.
        loss: Its own loss on the same blocks, measured on the adapter read back from disk.
        adapter_hash: Hash of the adapter's files.
        record: Settings, seeds, steps, tokens, threads, dtype, versions, fingerprints; JSON values
            without wall times.
    """

    folder: Path
    domain: str
    kind: str
    base_loss: float
    loss: float
    adapter_hash: str
    record: Mapping[str, Any]

    @property
    def adapter_folder(self) -> Path:
        """Folder of the adapter's files."""
        return self.folder / _ADAPTER_FOLDER

    @property
    def metrics_file(self) -> Path:
        """JSON lines of the training run."""
        return self.folder / METRICS_NAME


@dataclass(frozen=True, eq=False)
class AdapterJob:
    """One adapter to train.

    Attributes:
        base: The base; it stays as it is.
        domain: Name kept in the record.
        train_tokens: Blocks to train on, (N, T).
        validation_tokens: Blocks the record's losses are measured on, (N', T).
        watched_tokens: Blocks the best weights are chosen by, (N'', T).
        kind: Adapter kind.
        rank: R of low-rank kinds.
        rules: Limits of the adapter.
        config: Settings of the loop.
        options: Options of the kind.
        domain_options: Options of the registered domain that the text is of.
        train_targets: Which tokens to train on count in the loss, (N, T); None counts all.
        watched_targets: Which tokens the best weights are chosen by, (N'', T); None counts all.
        train_starts: Where documents start that are read alone in training, (N, T); None reads
            blocks whole.
        team: The processes that train it together.
    """

    base: Base
    domain: str
    train_tokens: NDArray[np.int32]
    validation_tokens: NDArray[np.int32]
    watched_tokens: NDArray[np.int32]
    kind: str
    rank: int
    rules: AdapterRules
    config: TrainConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    domain_options: Mapping[str, Any] = field(default_factory=dict)
    train_targets: NDArray[np.bool_] | None = None
    watched_targets: NDArray[np.bool_] | None = None
    train_starts: NDArray[np.bool_] | None = None
    team: Team = ALONE

    def describe(self) -> dict[str, Any]:
        """The inputs as JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "domain": self.domain,
            "kind": self.kind,
            "rank": self.rank,
            "frozen_depth": self.rules.frozen_depth,
            "base_weights": self.base.weights,
            "base_tokenizer": self.base.tokenizer_fingerprint,
            "train_blocks": _hash_tokens(self.train_tokens),
            "validation_blocks": _hash_tokens(self.validation_tokens),
            "num_train_blocks": len(self.train_tokens),
            "num_validation_blocks": len(self.validation_tokens),
            "settings": self.config.describe(),
            # Left out where empty: so are they in records from before there were any.
            **({"options": dict(self.options)} if self.options else {}),
            **({"domain_options": dict(self.domain_options)} if self.domain_options else {}),
            **self._describe_targets(),
            **self._describe_starts(),
            **self.team.describe(),
        }

    def _describe_targets(self) -> dict[str, Any]:
        """Which tokens count, likewise left out where all do."""
        if self.train_targets is None:
            return {}
        return {
            "loss_on": "assistant",
            "train_targets": _hash_tokens(self.train_targets),
            "num_train_targets": int(self.train_targets.sum()),
        }

    def _describe_starts(self) -> dict[str, Any]:
        """Where documents are read alone, likewise left out where blocks are read whole."""
        if self.train_starts is None:
            return {}
        return {"reset_documents": True, "train_starts": _hash_tokens(self.train_starts)}


def _hash_tokens(tokens: NDArray[Any]) -> str:
    head = canonical_json(list(tokens.shape))
    return hash_bytes(head + np.ascontiguousarray(tokens).tobytes())


def load_specialist(folder: Path) -> Specialist:
    """Read a finished specialist's record.

    Raises:
        TrainingError: If there is none, or it is malformed.
    """
    path = folder / _RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Specialist(
            folder=folder,
            domain=str(record["domain"]),
            kind=str(record["kind"]),
            base_loss=float(record["base_loss"]),
            loss=float(record["loss"]),
            adapter_hash=str(record["adapter_hash"]),
            record=record,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"Cannot read specialist '{folder}': expected a finished training with '{_RECORD}', "
            f"got {type(error).__name__}: {error}. Train it with `molora train`."
        ) from error


def find_finished(job: AdapterJob, folder: Path, plugins: Plugins) -> Specialist | None:
    """The specialist, if this very job was finished in the folder before.

    Args:
        job: What to train.
        folder: Of the training.
        plugins: Where the kind is looked up.

    Raises:
        TrainingError: If another job was, or its adapter changed since.
    """
    if not (folder / _RECORD).exists():
        return None
    specialist = load_specialist(folder)
    wanted = replace(job, team=ALONE).describe()  # by however many processes
    names = [*wanted, *(n for n in _LEFT_OUT if n in specialist.record and n not in wanted)]
    differing = [n for n in names if specialist.record.get(n) != wanted.get(n)]
    what = f"Cannot train in '{folder}'"
    if differing:
        raise TrainingError(
            describe_mismatch(
                what,
                expected="an empty folder or the same training",
                got=f"a finished one that differs in {', '.join(differing)}",
                fix="Choose another folder.",
            )
        )
    adapter = load_adapter(
        specialist.adapter_folder, model=job.base.model, plugins=plugins, name=folder.name
    )
    if adapter.hash != specialist.adapter_hash:
        raise TrainingError(
            describe_mismatch(
                what,
                expected=f"the adapter {specialist.adapter_hash} of its record",
                got=adapter.hash,
                fix="Remove the folder and train again.",
            )
        )
    return specialist


def _compute_mean_loss(job: AdapterJob, adapter: Adapter | None) -> float:
    """Loss on all validation blocks, nats per token; None measures the base."""
    with applied(job.base.model, adapter) as model:
        losses = compute_block_losses(
            model, job.validation_tokens, batch=job.config.evaluation_batch
        )
    return float(losses.double().mean())


def run_job(
    job: AdapterJob,
    folder: Path,
    plugins: Plugins,
    progress: Progress | None,
    on_memory: OnMemory | None = None,
) -> Specialist:
    """Train, export, read back, measure, and write the record last.

    Args:
        job: What to train.
        folder: Gets `adapter/`, `record.json` and `metrics.jsonl`; a finished job is loaded.
        plugins: Where the kind is looked up.
        progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.
        on_memory: See `molora_fed.training.language_model.train`.

    Raises:
        ComputeError: If it needs more memory than is free.
        TrainingError: If the folder holds another job, or see
            `molora_fed.training.language_model.train`.
        AdapterError: If the adapter breaks the job's rules.
        UnknownNameError: If no plugin registers the kind.
        StorageError: On I/O errors.
    """
    finished = find_finished(job, folder, plugins)
    if finished is not None:
        return finished
    return finish_job(job, *train_job(job, folder, plugins, progress, on_memory), folder, plugins)


def train_job(
    job: AdapterJob,
    folder: Path,
    plugins: Plugins,
    progress: Progress | None,
    on_memory: OnMemory | None = None,
) -> tuple[Any, TrainResult]:
    """Train, by every process of the job's team; returns the trained model and how it ended.

    Raises:
        MoloraError: As `run_job` says.
    """
    kind = open_kind(job.kind, job.options, plugins)
    with guarded(plugins.adapter_kinds.entry(job.kind), "preparing"):
        model, parameters = kind.prepare(job.base.model, job.rules, job.rank, seed=job.config.seed)
    result = train(
        model,
        parameters,
        job.train_tokens,
        job.watched_tokens,
        job.config,
        folder,
        train_targets=job.train_targets,
        validation_targets=job.watched_targets,
        train_starts=job.train_starts,
        context={"job": hash_bytes(canonical_json(job.describe()))},
        team=job.team,
        on_memory=on_memory,
        progress=progress,
    )
    return model, result


def finish_job(
    job: AdapterJob, model: Any, result: TrainResult, folder: Path, plugins: Plugins
) -> Specialist:
    """Export what was trained, read it back, measure it, and write the record last.

    Raises:
        MoloraError: As `run_job` says.
    """
    for left_over in folder.glob(f".{_ADAPTER_FOLDER}.*"):
        shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed
    kind = open_kind(job.kind, job.options, plugins)
    with limit_threads(result.threads):
        with guarded(plugins.adapter_kinds.entry(job.kind), "exporting"):
            kind.export(
                model,
                job.base.model,
                folder / _ADAPTER_FOLDER,
                job.rank,
                job.rules,
                base_weights=job.base.weights,
            )
        adapter = load_adapter(
            folder / _ADAPTER_FOLDER,
            rules=job.rules,
            model=job.base.model,
            plugins=plugins,
            name=folder.name,
        )
        record = {
            **job.describe(),
            **result.to_record(),
            "watched_loss": result.loss,
            "base_loss": _compute_mean_loss(job, None),
            "loss": _compute_mean_loss(job, adapter),
            "adapter_hash": adapter.hash,
            "adapter_bytes": adapter.num_bytes,
        }
    write_json(folder / _RECORD, record)
    (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    return load_specialist(folder)
