"""Contributing a checkpoint that was fine-tuned elsewhere: its difference to the base.

Only what an adapter may change is taken, and everything else must be the base's bit by bit: a
checkpoint whose frozen tensors differ started from another base or trained what is frozen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.contract import AdapterKind, open_kind
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import Charter, TrainingRules
from molora_fed.contributions.build import measure_start_loss, state_loss_dtype
from molora_fed.corpus.prepare import Corpus
from molora_fed.errors import (
    AdapterError,
    IncompatibleAdapterError,
    describe_mismatch,
    list_offenders,
)
from molora_fed.models.base import Base, fingerprint_weights, load_model
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.frozen import find_changed_frozen
from molora_fed.models.runtime import Placement
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.files import write_json
from molora_fed.training.adapter_job import Specialist, load_specialist
from molora_fed.types import Progress, Split

__all__ = ["Imported", "import_checkpoint"]


@dataclass(frozen=True, eq=False)
class Imported:
    """A checkpoint as a specialist of a cooperative.

    Attributes:
        specialist: Its adapter and record, as training would have left them.
        checkpoint_loss: Loss of the checkpoint itself on all validation blocks, nats per token;
            the specialist's may be higher where the kind keeps less than the whole difference.
        start_loss: Loss of the checkpoint that it started from on the admission sample; None if
            it was not given.
    """

    specialist: Specialist
    checkpoint_loss: float
    start_loss: float | None


def import_checkpoint(
    base: Base,
    charter: Charter,
    corpus: Corpus,
    checkpoint: Path,
    folder: Path,
    *,
    kind: str | None = None,
    started_from: Path | None = None,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Turn a fine-tuned checkpoint into an adapter, and measure it as training would.

    Args:
        base: The cooperative's base.
        charter: Its charter: frozen depth, limits, rank and options of the kind.
        corpus: Text of the domain that the checkpoint was not trained on.
        checkpoint: Folder of a Hugging Face checkpoint of the base's architecture.
        folder: Gets `adapter/` and `record.json`.
        kind: Adapter kind; the charter's if None.
        started_from: Folder of the checkpoint that the fine-tuning started from; its loss on the
            admission sample is stated in the contribution.
        plugins: Where kinds are registered; the installed plugins by default.
        progress: Receives blocks done while losses are measured.

    Raises:
        IncompatibleAdapterError: If it is of another architecture, or a frozen tensor differs from
            the base; names them.
        AdapterError: If the kind cannot be made of a checkpoint, it is the base itself, or the
            adapter breaks the charter's limits.
        BaseCheckpointError: If a checkpoint cannot be loaded.
        UnknownNameError: If no plugin registers the kind.
        StorageError: On I/O errors.
    """
    plugins = plugins or get_plugins()
    rules, training = charter.identity.adapters, charter.amendment.training
    chosen = _open_kind(kind or training.kind, training, rules.kinds, plugins)
    weights = fingerprint_weights(checkpoint)
    if weights == base.weights:
        raise AdapterError(
            f"Cannot import checkpoint '{checkpoint}': expected one that was fine-tuned, got the "
            "base itself. Point to what training saved."
        )
    model = load_model(checkpoint, Placement.of(base.model))
    _check_derived(base.model, model, rules.frozen_depth, checkpoint)
    target = folder / "adapter"
    chosen.export(model, base.model, target, training.rank, rules, base_weights=base.weights)
    adapter = load_adapter(target, rules=rules, model=base.model, plugins=plugins, name=folder.name)
    tokens = corpus.blocks[Split.VALIDATION].tokens
    batch = charter.identity.corpus.evaluation_batch

    def measure(measured: Any, update: Adapter | None) -> float:
        with applied(measured, update) as ready:
            losses = compute_block_losses(ready, tokens, batch=batch, progress=progress)
        return float(losses.double().mean())

    record: dict[str, Any] = {
        "source": "a checkpoint fine-tuned elsewhere",
        "checkpoint_weights": weights,
        "checkpoint_loss": measure(model, None),
        "domain": corpus.domain,
        "kind": chosen.name,
        "frozen_depth": rules.frozen_depth,
        "base_weights": base.weights,
        "base_loss": measure(base.model, None),
        "loss": measure(base.model, adapter),
        "adapter_hash": adapter.hash,
        "adapter_bytes": adapter.num_bytes,
    }
    record = state_loss_dtype(record, base.model)
    write_json(folder / "record.json", record)
    return Imported(
        load_specialist(folder),
        record["checkpoint_loss"],
        _measure_start(started_from, base, corpus, charter),
    )


def _open_kind(
    name: str, training: TrainingRules, allowed: tuple[str, ...], plugins: Plugins
) -> AdapterKind:
    """The kind with its options, if it can be made of a checkpoint.

    Raises:
        AdapterError: If it cannot, or the charter does not accept it; names those that can.
    """
    kind = open_kind(name, training.options if name == training.kind else None, plugins)
    if name not in allowed or not kind.exports_checkpoints:
        able = [n for n in allowed if plugins.adapter_kinds.resolve(n).exports_checkpoints]
        raise AdapterError(
            f"Cannot import a checkpoint as kind '{name}': expected one of "
            f"{', '.join(able) or 'no kind of this charter'}, got '{name}'. Choose with --kind."
        )
    return kind


def _check_derived(base_model: Any, model: Any, frozen_depth: int, checkpoint: Path) -> None:
    """Refuse a model that is not the base with other free weights.

    Raises:
        IncompatibleAdapterError: Naming what differs.
    """
    what = f"Cannot import checkpoint '{checkpoint}'"
    expected, found = (_describe_shapes(m.state_dict()) for m in (base_model, model))
    different = sorted({n for n, _ in expected.items() ^ found.items()})
    if different:
        raise IncompatibleAdapterError(
            describe_mismatch(
                what,
                expected=f"the tensors of the base, a {type(base_model).__name__}",
                got=f"a {type(model).__name__} that differs in {list_offenders(different)}",
                fix="Fine-tune the cooperative's base.",
            )
        )
    changed = find_changed_frozen(base_model, model, frozen_depth)
    if changed:
        raise IncompatibleAdapterError(
            describe_mismatch(
                what,
                expected=f"embedding, head, norms and the first {frozen_depth} blocks "
                "bit-identical to the base",
                got=list_offenders(changed),
                fix="Fine-tune the cooperative's base in its own dtype with these frozen.",
            )
        )


def _describe_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _measure_start(
    started_from: Path | None, base: Base, corpus: Corpus, charter: Charter
) -> float | None:
    if started_from is None:
        return None
    start = load_model(started_from, Placement.of(base.model))
    return measure_start_loss(start, corpus.blocks, charter, domain=corpus.domain)
