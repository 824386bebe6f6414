"""Puts columns of several lists of blocks together, and checks that they belong together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.bank.columns import make_scratch
from molora_fed.bank.passes import ColumnMaker, Expert, Wanted, open_mean
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import BankError

__all__ = ["check_blocks", "check_experts", "describe_blocks", "open_column_of", "open_columns"]


def open_columns(
    folder: Path, makers: Sequence[ColumnMaker], order: Sequence[str], wanted: Wanted
) -> dict[str, Any]:
    """Map all columns of a bank, by the names of `Bank`'s attributes.

    Args:
        folder: Where joined columns are kept.
        makers: One per list of blocks.
        order: Hashes of all experts, in canonical order.
        wanted: Columns beside the log-probabilities.

    Raises:
        BankError: If one is not there.
        StorageError: If the disk has no room.
    """

    def join(name: str, adapters: Sequence[str]) -> Tensor:
        return _join(folder, [open_column_of(maker, name, adapters) for maker in makers])

    return {
        "base_logprob": join("logprob", [""]),
        "logprob": _stack(folder, [join("logprob", [own]) for own in order]),
        "base_hidden": join("hidden", [""]) if wanted.base else None,
        "prefix_hidden": join("prefix", [""]) if wanted.prefix else None,
        "mean_hidden": _join(folder, [_open_mean(maker, order) for maker in makers])
        if wanted.mean
        else None,
        "experts_hidden": tuple(join("hidden", [own]) for own in order) if wanted.experts else None,
    }


def open_column_of(maker: ColumnMaker, name: str, adapters: Sequence[str]) -> Tensor:
    """Map a column that has been made, its kept blocks alone.

    Raises:
        BankError: If it is not there.
    """
    return _take_kept(maker.open(name, adapters), name, maker)


def _open_mean(maker: ColumnMaker, order: Sequence[str]) -> Tensor:
    return _take_kept(open_mean(maker, order), "total", maker)


def _take_kept(column: Tensor | None, name: str, maker: ColumnMaker) -> Tensor:
    if column is None:
        raise BankError(
            f"Cannot open bank column '{name}' in '{maker.folder}': expected it to be there, got "
            "nothing. Do not clean the folder while a bank is built; run the same command again."
        )
    return column if maker.kept is None else column.index_select(0, maker.kept)


def _join(folder: Path, parts: Sequence[Tensor]) -> Tensor:
    """The blocks' columns one after the other; a single one stays where it is."""
    if len(parts) == 1:
        return parts[0]
    length = sum(len(part) for part in parts)
    whole = make_scratch(folder, (length, *parts[0].shape[1:]), parts[0].dtype)
    return torch.cat(list(parts), out=whole)


def _stack(folder: Path, columns: Sequence[Tensor]) -> Tensor:
    """Experts side by side, (N, T, E), so that one gather reads a batch of all of them."""
    whole = make_scratch(folder, (*columns[0].shape, len(columns)), columns[0].dtype)
    for expert, column in enumerate(columns):
        whole[..., expert] = column
    return whole


def describe_blocks(blocks: Sequence[Blocks]) -> dict[str, Any]:
    """What is known of the blocks without any model, by the names of `Bank`'s attributes."""
    domains = tuple(sorted({part.domain for part in blocks}))
    clusters: list[NDArray[np.int64]] = []
    offset = 0
    for part in blocks:
        # Contributors number their clusters on their own: shifted, none share a number.
        clusters.append(part.clusters.astype(np.int64) - int(part.clusters.min()) + offset)
        offset = int(clusters[-1].max()) + 1
    return {
        "tokens": torch.from_numpy(np.concatenate([part.tokens for part in blocks])),
        "document_starts": torch.from_numpy(
            np.concatenate([part.document_starts for part in blocks])
        ),
        "clusters": np.concatenate(clusters),
        "domains": domains,
        "domain_of": np.concatenate(
            [np.full(len(part), domains.index(part.domain), dtype=np.int64) for part in blocks]
        ),
    }


def check_experts(experts: Sequence[Expert]) -> None:
    """Refuse experts that cannot stand in one bank.

    Raises:
        BankError: If there is none, two share a name, or the base is not the first.
    """
    names = [expert.name for expert in experts]
    if not names or len(set(names)) != len(names):
        raise BankError(
            f"Cannot build a bank: expected experts with names of their own, got "
            f"{', '.join(names) or 'none'}. Give each contribution another name."
        )
    if any(expert.adapter is None for expert in experts[1:]):
        raise BankError(
            "Cannot build a bank: expected the base as expert 0, got it at another place. "
            "Put it first."
        )


def check_blocks(blocks: Sequence[Blocks]) -> None:
    """Refuse blocks that cannot stand in one bank.

    Raises:
        BankError: If there is none, one list is empty, or block sizes differ.
    """
    empty = sorted({part.domain for part in blocks if not len(part)})
    if not blocks or empty:
        raise BankError(
            f"Cannot build a bank: expected blocks of every domain, got none "
            f"of {', '.join(empty) or 'any'}. Leave that sample out or send some blocks."
        )
    sizes = sorted({part.block_size for part in blocks})
    if len(sizes) > 1:
        raise BankError(
            f"Cannot build a bank: expected blocks of one size, got sizes {sizes}. "
            "Pack them with the charter's block size."
        )
