"""Builds a contribution's folder; lists what is sent before anything is; measures the start."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from pydantic import JsonValue, ValidationError

from molora_fed.charter import Charter
from molora_fed.contributions.manifest import (
    MANIFEST_FILE,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    REQUIRED_ADAPTER_FILES,
    SAMPLE_SPLITS,
    SIGNATURE_FILE,
    STATISTICS_FILE,
    Contribution,
    FileEntry,
    Manifest,
    Origin,
    QueryEntry,
    SampleEntry,
    load_contribution,
    locate_carried,
    parse_manifest,
)
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import AdapterError, CorpusError
from molora_fed.models.forward import compute_block_losses
from molora_fed.models.hidden_statistics import HiddenStatistics
from molora_fed.storage.files import hash_file, replace_folder, write_bytes, write_json
from molora_fed.storage.keys import build_public_pem, sign
from molora_fed.storage.settings import describe_offenders
from molora_fed.types import ADAPTER_FILES, AdapterFile, Split

__all__ = [
    "OutgoingRow",
    "build_contribution",
    "choose_samples",
    "compute_sample_bytes",
    "count_samples",
    "describe_contribution",
    "find_loss_dtype",
    "measure_start_loss",
    "state_loss_dtype",
]


MAX_HEADER_BYTES = 4_096
"""More than the header of a samples file ever takes."""
MAX_FIGURES_BYTES = 1_000_000
"""Largest figures of an answer; see `molora_fed.population.questions`."""


@dataclass(frozen=True)
class OutgoingRow:
    """One thing that leaves a contributor's machine.

    Attributes:
        what: Name for people.
        blocks: Number of blocks of text; 0 if it holds no text.
        tokens: Number of tokens of text.
        bytes: Size.
        exact: False if the figures are upper bounds, because the thing is not made yet.
        numbers: How many figures of text it holds; 0 if none.
        times: How often it is sent; all other figures are of once.
    """

    what: str
    blocks: int
    tokens: int
    bytes: int
    exact: bool
    numbers: int = 0
    times: int = 1


def count_samples(charter: Charter) -> dict[Split, int]:
    """How many blocks of each split a charter asks to be sent; splits with none are left out.

    Where texts are private none are.
    """
    if charter.is_private:
        return {}
    rules = charter.amendment.samples
    counts = {
        Split.CALIBRATION: rules.calibration,
        Split.ADMISSION: rules.admission,
        Split.HELD_OUT: rules.held_out,
    }
    return {split: count for split, count in counts.items() if count > 0}


def compute_sample_bytes(blocks: int, block_size: int) -> int:
    """Largest file that `blocks` blocks of `block_size` tokens take: three int32 arrays."""
    return blocks * block_size * 3 * 4 + MAX_HEADER_BYTES


def describe_contribution(source: Manifest | Charter) -> list[OutgoingRow]:
    """List what a contribution holds, to be shown before it is sent.

    Args:
        source: A manifest, for exact figures; or a charter, for the most that its rules allow.

    Returns:
        A row for each sample, then one for the adapter, one for each carried file and one for the
        manifest.
    """
    if isinstance(source, Manifest):
        rows = [
            OutgoingRow(f"{split} sample", entry.blocks, entry.tokens, entry.bytes, exact=True)
            for split in SAMPLE_SPLITS
            for name, entry in source.sample_files.items()
            if name == split
        ]
        adapter = sum(entry.bytes for entry in source.adapter_files.values())
        rows.append(OutgoingRow("adapter", 0, 0, adapter, exact=True))
        rows += [
            OutgoingRow(_label_carried(name), 0, 0, entry.bytes, exact=True)
            for name, entry in source.carried_files.items()
        ]
        rows.append(OutgoingRow("manifest", 0, 0, len(source.canonical), exact=True))
        return rows
    size = source.identity.corpus.block_size
    rows = [
        OutgoingRow(
            f"{split} sample", count, count * size, compute_sample_bytes(count, size), exact=False
        )
        for split, count in count_samples(source).items()
    ]
    adapter = source.identity.adapters.max_bytes + 2 * MAX_CONFIG_BYTES
    # Its size is known after training; until then, what the charter admits.
    rows.append(OutgoingRow("adapter, by the charter's limit", 0, 0, adapter, exact=False))
    fusion = source.amendment.fusion
    rows += [
        OutgoingRow(_label_carried(name), 0, 0, fusion.max_carried_bytes, exact=False)
        for name in fusion.carried_names
    ]
    rows.append(OutgoingRow("manifest", 0, 0, MAX_MANIFEST_BYTES, exact=False))
    return rows


def _label_carried(name: str) -> str:
    return f"carried file '{name}', computed by a plugin"


def build_contribution(
    folder: Path,
    *,
    adapter: Path,
    kind: str,
    samples: Mapping[Split, Blocks],
    key: EllipticCurvePrivateKey,
    charter: Charter,
    contributor: str,
    domain: str,
    training: Mapping[str, JsonValue],
    base_loss: float,
    specialist_loss: float,
    contamination: float | None = None,
    start_loss: float | None = None,
    origin: Origin | None = None,
    held_out_query: QueryEntry | None = None,
    statistics: HiddenStatistics | None = None,
    carried: Mapping[str, bytes] | None = None,
) -> Contribution:
    """Make and sign the folder of a contribution, whole or not at all.

    The same inputs give the same bytes, signature included.

    Args:
        folder: Where; replaced if it holds another contribution.
        adapter: Folder with the adapter's files. Only those in `ADAPTER_FILES` are taken: what
            else lies there stays on this machine.
        kind: Adapter kind.
        samples: Blocks by split, shape (N, T). No more than the charter asks for are taken.
        key: The contributor's private key.
        charter: The cooperative's charter, with the amendment the contributor saw.
        contributor: The contributor's name.
        domain: Domain the specialist was trained on.
        training: Training record, JSON values.
        base_loss: The base's loss on the contributor's validation blocks, nats per token.
        specialist_loss: The specialist's loss on the same blocks, nats per token.
        contamination: Share of held-out word 8-grams that occur in train, in [0, 1].
        start_loss: Loss of the model that training started from on the admission sample, nats
            per token (`molora_fed.contributions.build.measure_start_loss`); None states nothing.
        origin: What an adapter made elsewhere claims; None for one trained here.
        held_out_query: Commits to the query about its held-out blocks; None if it asks nobody.
        statistics: What is published of the base's hidden states over its text; None if nothing.
        carried: What plugins computed, by their registered names
            (`molora_fed.contributions.carried.compute_carried`); None if nothing.

    Raises:
        AdapterError: If an adapter file is missing, or a value cannot stand in a manifest.
        CorpusError: If blocks of a split the charter asks for are missing or of another size.
        StorageError: On I/O errors; nothing is left behind.
    """
    chosen = choose_samples(samples, charter, domain=domain)
    with replace_folder(folder) as temporary:
        manifest = _make_manifest(
            contributor=contributor,
            public_key=build_public_pem(key),
            domain=domain,
            charter_identity=charter.identity_hash,
            amendment=charter.amendment.number,
            base_weights=charter.identity.base.weights,
            base_tokenizer=charter.identity.base.tokenizer,
            kind=kind,
            adapter_files=_copy_adapter(adapter, temporary / "adapter"),
            sample_files=_write_samples(chosen, temporary / "samples"),
            training=dict(training),
            base_loss=base_loss,
            specialist_loss=specialist_loss,
            contamination=contamination,
            start_loss=start_loss,
            origin=origin,
            held_out_query=held_out_query,
            statistics_file=_write_statistics(statistics, temporary / STATISTICS_FILE),
            carried_files=_write_carried(carried or {}, temporary),
        )
        write_json(temporary / MANIFEST_FILE, manifest.model_dump(mode="json"))
        write_bytes(temporary / SIGNATURE_FILE, (sign(key, manifest.canonical) + "\n").encode())
    return load_contribution(folder)


def _make_manifest(**fields: Any) -> Manifest:
    """A manifest that a coordinator can read."""
    try:
        return parse_manifest(Manifest(**fields).canonical)
    except ValidationError as error:
        raise AdapterError(
            f"Cannot build contribution of '{fields['contributor']}': expected values a manifest "
            f"can hold, got {describe_offenders(error, whole='manifest')}. Correct these."
        ) from error


def _write_samples(chosen: Mapping[Split, Blocks], folder: Path) -> dict[Split, SampleEntry]:
    entries = {}
    for split, blocks in chosen.items():
        path = folder / f"{split}.safetensors"
        blocks.save(path)
        entries[split] = SampleEntry(
            **_describe(path), blocks=len(blocks), tokens=blocks.tokens.size
        )
    return entries


def _write_statistics(statistics: HiddenStatistics | None, path: Path) -> FileEntry | None:
    if statistics is None:
        return None
    statistics.save(path)
    return FileEntry(**_describe(path))


def _write_carried(carried: Mapping[str, bytes], folder: Path) -> dict[str, FileEntry]:
    entries = {}
    for name, data in carried.items():
        path = folder / locate_carried(name)
        write_bytes(path, data)
        entries[name] = FileEntry(**_describe(path))
    return entries


def choose_samples(
    samples: Mapping[Split, Blocks], charter: Charter, *, domain: str
) -> dict[Split, Blocks]:
    """Cut the samples to what the charter asks for.

    Args:
        samples: Blocks by split, shape (N, T).
        charter: The cooperative's charter.
        domain: Domain that the blocks must be of.

    Raises:
        CorpusError: If blocks of a split the charter asks for are missing or of another size.
    """
    size = charter.identity.corpus.block_size
    chosen = {}
    problems = []
    for split, count in count_samples(charter).items():
        blocks = samples.get(split)
        if blocks is None or len(blocks) == 0:
            problems.append(f"no {split} block")
        elif blocks.block_size != size or blocks.split != split or blocks.domain != domain:
            problems.append(
                f"{split}: blocks of {blocks.block_size} tokens of '{blocks.domain}', "
                f"split {blocks.split}"
            )
        else:
            chosen[split] = blocks.take(count)
    if problems:
        raise CorpusError(
            f"Cannot build contribution for domain '{domain}': expected blocks of {size} tokens "
            f"of every split the charter asks for, got {'; '.join(problems)}. "
            "Add text, and prepare the corpus again."
        )
    return chosen


def _copy_adapter(source: Path, target: Path) -> dict[AdapterFile, FileEntry]:
    target.mkdir()
    missing = [name for name in REQUIRED_ADAPTER_FILES if not (source / name).is_file()]
    if missing:
        raise AdapterError(
            f"Cannot build contribution from adapter '{source}': expected files "
            f"{', '.join(REQUIRED_ADAPTER_FILES)}, got no {', '.join(missing)}. "
            "Point to the folder that training wrote."
        )
    entries: dict[AdapterFile, FileEntry] = {}
    for name in ADAPTER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            entries[name] = FileEntry(**_describe(target / name))
    return entries


def _describe(path: Path) -> dict[str, Any]:
    return {"sha256": hash_file(path), "bytes": path.stat().st_size}


def state_loss_dtype(record: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A training record that says in which dtype its losses were measured, if it was another.

    Args:
        record: How an adapter was trained; its `dtype` is float32 if it says none.
        model: What its losses were measured with.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    if find_loss_dtype(record) == dtype:
        return dict(record)
    return {**record, "losses_in": dtype}


def find_loss_dtype(record: Mapping[str, Any]) -> str:
    """The dtype in which a training record's losses were measured, e.g. "bfloat16"; a claim."""
    found = record.get("losses_in", record.get("dtype"))
    return found if found in ("float32", "bfloat16") else "float32"


def measure_start_loss(
    model: Any, samples: Mapping[Split, Blocks], charter: Charter, *, domain: str
) -> float:
    """Loss of the model that training starts from on the very blocks that admission measures on.

    Args:
        model: The model before its first step, as this machine has it.
        samples: Blocks by split, shape (N, T), as given to `build_contribution`.
        charter: The cooperative's charter.
        domain: Domain of the blocks.

    Returns:
        Nats per token, for the manifest's `start_loss`.

    Raises:
        CorpusError: If blocks of a split the charter asks for are missing.
    """
    chosen = choose_samples(samples, charter, domain=domain)
    losses = compute_block_losses(
        model,
        chosen[Split.ADMISSION].tokens,
        batch=charter.identity.corpus.evaluation_batch,
    )
    return float(losses.double().mean())
