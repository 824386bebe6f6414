"""A bank that shrinks: an expert leaves its totals, and what nothing needs any more is deleted."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from molora_fed.adapters.compatibility import applied
from molora_fed.bank.columns import build_key, column_path
from molora_fed.bank.passes import ColumnMaker, list_totals
from molora_fed.corpus.blocks import Blocks
from molora_fed.models.batches import fit_batch, list_batches
from molora_fed.storage.files import storage_errors
from molora_fed.types import Progress

if TYPE_CHECKING:
    from molora_fed.adapters.updates import Adapter
    from molora_fed.models.base import Base

__all__ = ["prune_bank", "subtract_expert"]

_OWN_COLUMNS = ("logprob", "hidden", "prefix")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def subtract_expert(
    folder: Path,
    base: "Base",
    adapter: "Adapter",
    blocks: Sequence[Blocks],
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> bool:
    """Take an expert out of the totals on these blocks, with one pass of it at most.

    Args:
        folder: The bank's folder; no bank in it may be open.
        base: The base checkpoint.
        adapter: The expert that leaves.
        blocks: Blocks that stay, of any split.
        batch: Blocks per forward pass, as of the bank.
        progress: Receives blocks done and in all of one list of blocks after the other.

    Returns:
        Whether there was a total with it; without one nothing is run.

    Raises:
        IncompatibleAdapterError: If the adapter does not fit the base.
        StorageError: On I/O errors; called again, it goes on.
    """
    known = {total.blocks for total in list_totals(folder) if adapter.hash in total.adapters}
    concerned = [part for part in blocks if part.fingerprint in known]
    if not concerned:
        return False
    with applied(base.model, adapter):
        for part in concerned:
            # No total depends on the frozen depth.
            own = fit_batch(base.model, part.block_size, batch)
            maker = ColumnMaker(folder, base, part, own, -1, base.hidden_size)
            maker.subtract(adapter.hash, progress=progress)
    return True


def prune_bank(
    folder: Path,
    *,
    base: str,
    adapters: Iterable[str],
    blocks: Iterable[str],
    batch: int,
    frozen_depth: int,
) -> int:
    """Delete every column but those of these adapters, and totals of some of them, on these blocks.

    Args:
        folder: The bank's folder; no bank in it may be open.
        base: Fingerprint of the base's weights; the base's own columns are kept.
        adapters: Hashes of the adapters whose columns are kept.
        blocks: Fingerprints of the blocks that columns are kept of.
        batch: Blocks per forward pass that were wanted; columns of passes of fewer are kept, too.
        frozen_depth: K.

    Returns:
        Bytes that are free now.

    Raises:
        StorageError: On I/O errors; called again, it goes on.
    """
    experts, parts = ["", *adapters], set(blocks)
    kept = {
        column_path(
            folder,
            build_key(
                name, [own], base=base, blocks=part, dtype=dtype, batch=size, depth=frozen_depth
            ),
        )
        for name, own, part, dtype, size in product(
            _OWN_COLUMNS, experts, parts, _DTYPES, list_batches(batch)
        )
    }
    for total in list_totals(folder):
        if total.blocks in parts and not Counter(total.adapters) - Counter(experts):
            kept |= {total.path, total.path.with_suffix(".json")}
    freed = 0
    with storage_errors(folder):
        for path in [*sorted(folder.glob("*.bin")), *sorted(folder.glob("*.json"))]:
            if path not in kept:
                freed += path.stat().st_size
                path.unlink()
    return freed
