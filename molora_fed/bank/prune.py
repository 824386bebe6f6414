"""Deletes the columns of a bank that its present experts and blocks do not need."""

from collections.abc import Iterable
from itertools import product
from pathlib import Path

import torch

from molora_fed.bank.columns import build_key, column_path
from molora_fed.files import storage_errors

__all__ = ["prune_bank"]

_OWN_COLUMNS = ("logprob", "hidden", "prefix")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prune_bank(
    folder: Path,
    *,
    base: str,
    adapters: Iterable[str],
    blocks: Iterable[str],
    batch: int,
    frozen_depth: int,
) -> int:
    """Delete every column but those of these adapters, one at a time, on these blocks.

    Averages over all experts go, too: with other experts they are others.

    Args:
        folder: The bank's folder; no bank in it may be open.
        base: Fingerprint of the base's weights; the base's own columns are kept.
        adapters: Hashes of the adapters whose columns are kept.
        blocks: Fingerprints of the blocks that columns are kept of.
        batch: Blocks per forward pass.
        frozen_depth: K.

    Returns:
        Bytes that are free now.

    Raises:
        StorageError: If the disk refuses; called again, it goes on.
    """
    kept = {
        column_path(
            folder,
            build_key(
                name, [own], base=base, blocks=part, dtype=dtype, batch=batch, depth=frozen_depth
            ),
        )
        for name, own, part, dtype in product(_OWN_COLUMNS, ("", *adapters), [*blocks], _DTYPES)
    }
    freed = 0
    with storage_errors(folder):
        for path in sorted(folder.glob("*.bin")):
            if path not in kept:
                freed += path.stat().st_size
                path.unlink()
    return freed
