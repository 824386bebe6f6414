"""What a contribution states of an adapter: of one trained here, and of one made elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from molora_fed.adapters.compatibility import applied, check_effect, count_changed
from molora_fed.adapters.convert import convert_adapter
from molora_fed.adapters.files import META_FILE, check_adapter_fits, load_adapter
from molora_fed.adapters.peft_folder import read_claims
from molora_fed.contributions.build import measure_start_loss, state_loss_dtype
from molora_fed.contributions.manifest import Origin
from molora_fed.cooperative.cooperative import CharterAndBase
from molora_fed.corpus.prepare import Corpus
from molora_fed.errors import AdapterError
from molora_fed.models.base import Base
from molora_fed.models.forward import compute_block_losses
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.files import is_file, is_folder, resolve_inside
from molora_fed.storage.untrusted import clean, parse_json
from molora_fed.training.adapter_job import Specialist
from molora_fed.types import Progress, Split

__all__ = ["MeasuredAdapter", "measure_given", "measure_start", "measure_trained"]

_RECORD_FILE = "record.json"
MAX_RECORD_BYTES = 500_000
"""Of a training record beside an adapter; it becomes a part of a manifest."""


@dataclass(frozen=True, eq=False)
class MeasuredAdapter:
    """An adapter on disk with what a contribution states of it.

    Attributes:
        folder: Folder of the adapter's files.
        kind: Adapter kind.
        base_loss: The base's loss on all validation blocks, nats per token.
        loss: The adapter's loss on the same blocks, nats per token.
        record: How it was made, JSON values.
        start_loss: Loss of the model that training started from on the admission sample, nats per
            token; None states nothing.
        origin: What the folder of one made elsewhere claims; None of one that was trained here.
        changed: Modules whose change is not exactly zero; None if that was not counted.
        modules: Modules that it has changes of; None likewise.
    """

    folder: Path
    kind: str
    base_loss: float
    loss: float
    record: Mapping[str, Any]
    start_loss: float | None = None
    origin: Origin | None = None
    changed: int | None = None
    modules: int | None = None

    @classmethod
    def of_specialist(cls, specialist: Specialist, start_loss: float | None) -> "MeasuredAdapter":
        """A specialist's adapter, with the losses of its record."""
        return cls(
            specialist.adapter_folder,
            specialist.kind,
            specialist.base_loss,
            specialist.loss,
            dict(specialist.record),
            start_loss,
        )


def measure_trained(
    base: Base, specialist: Specialist, start_loss: float | None, plugins: Plugins
) -> MeasuredAdapter:
    """A specialist's adapter, which has to change something.

    Args:
        base: What it was trained on.
        specialist: What training gave.
        start_loss: Loss of the checkpoint that its training started from, if it is known.
        plugins: Where kinds are registered.

    Raises:
        AdapterError: If it changes nothing.
    """
    adapter = load_adapter(
        specialist.adapter_folder,
        model=base.model,
        plugins=plugins,
        name=specialist.adapter_folder.parent.name,
    )
    measured = MeasuredAdapter.of_specialist(specialist, start_loss)
    return replace(measured, changed=check_effect(adapter), modules=len(adapter.updates))


def measure_given(
    under: CharterAndBase,
    corpus: Corpus,
    given: Path,
    folder: Path,
    *,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> MeasuredAdapter:
    """Read an adapter made earlier, here or elsewhere, and measure it on this contributor's text.

    One that another program made is written anew in the normal form, bit for bit the same factors
    (`molora_fed.adapters.convert`): that is what a contribution then holds.

    Args:
        under: Charter and base.
        corpus: Prepared text of the domain.
        given: The adapter's folder, or the folder of a training.
        folder: Gets `adapter/` if it is written anew.
        plugins: Where kinds are registered; the installed plugins by default.
        progress: Receives blocks done while losses are measured.

    Raises:
        AdapterError: If it cannot be used, or changes nothing; names what repairs it.
        StorageError: On I/O errors.
    """
    charter, base = under.charter, under.base
    plugins = plugins or get_plugins()
    source = given / "adapter" if is_folder(given / "adapter") else given
    _check_links(given, source)
    record = _read_record(given)
    place = source
    if is_folder(source) and not is_file(source / META_FILE):
        place = folder / "adapter"
        convert_adapter(
            source,
            place,
            model=base.model,
            tokenizer=base.tokenizer,
            replaces=True,
            name=str(given),
        )
    adapter = load_adapter(
        place, rules=charter.identity.adapters, model=base.model, plugins=plugins, name=str(given)
    )
    check_adapter_fits(adapter, base.model, rules=charter.identity.adapters)
    losses = []
    for update in (None, adapter):
        with applied(base.model, update) as model:
            nll = compute_block_losses(
                model,
                corpus.blocks[Split.VALIDATION].tokens,
                batch=charter.identity.corpus.evaluation_batch,
                progress=progress,
            )
        losses.append(float(nll.double().mean()))
    # An adapter that does not say what it was trained on states no start, either.
    is_known = adapter.base_weights == base.weights
    start = measure_start(under, corpus) if is_known else None
    base_loss, loss = losses
    return MeasuredAdapter(
        place,
        adapter.kind,
        base_loss,
        loss,
        state_loss_dtype(record, base.model),
        start,
        # Nothing tells that it was trained on this base.
        origin=None if adapter.base_weights else Origin.of_claims(read_claims(source, str(given))),
        changed=count_changed(adapter),
        modules=len(adapter.updates),
    )


def _check_links(given: Path, folder: Path) -> None:
    """Refuse an adapter of links: their files would be sent, and its record be published.

    Raises:
        AdapterError: Naming the first.
    """
    found = [given / _RECORD_FILE, folder, *(sorted(folder.iterdir()) if folder.is_dir() else [])]
    for path in found:
        if resolve_inside(path, given) is None:
            raise AdapterError(
                f"Cannot use adapter '{given}': expected files of its own, got '{path.name}', a "
                "link that leads out of the folder. Put the file itself there."
            )


def _read_record(given: Path) -> Mapping[str, Any]:
    """How an adapter trained earlier was made, as far as its folder says."""
    path = given / _RECORD_FILE
    unknown = {"source": "an adapter trained earlier"}
    try:
        with path.open("rb") as file:
            record = parse_json(file.read(MAX_RECORD_BYTES + 1), max_bytes=MAX_RECORD_BYTES)
        if not isinstance(record, dict):
            raise ValueError(type(record).__name__)
    except FileNotFoundError:
        return unknown
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"Cannot read '{path}': expected a JSON object of at most {MAX_RECORD_BYTES} bytes, "
            f"got {clean(error)}. Delete the file and try again."
        ) from error
    return record or unknown


def measure_start(under: CharterAndBase, corpus: Corpus) -> float | None:
    """Loss of the base on the admission sample; None where no sample goes along to compare it."""
    if under.charter.is_private:
        return None
    return measure_start_loss(under.base.model, corpus.blocks, under.charter, domain=corpus.domain)
