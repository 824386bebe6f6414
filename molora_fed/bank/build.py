"""Builds banks: announces their size, then one pass per expert, resumable after each."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.adapters.compatibility import applied
from molora_fed.bank.adapters import open_adapters
from molora_fed.bank.assembly import (
    check_blocks,
    check_experts,
    describe_blocks,
    open_column_of,
    open_columns,
)
from molora_fed.bank.bank import Bank, CalibrationBank, HeldOutBank
from molora_fed.bank.passes import ColumnMaker, Expert, Wanted, check_room, estimate_bank_bytes
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import BankError
from molora_fed.models.batches import fit_batch
from molora_fed.models.head import find_readout
from molora_fed.models.layout import block_index, decoder_blocks
from molora_fed.models.states import can_resume
from molora_fed.types import Mixture, Progress, Reading, Split

if TYPE_CHECKING:
    from molora_fed.adapters.updates import Adapter
    from molora_fed.models.base import Base

__all__ = ["build_calibration_bank", "build_held_out_bank"]

AnyBank = TypeVar("AnyBank", bound=Bank)


@dataclass(frozen=True)
class BankPlan:
    """What a bank is built for.

    Attributes:
        readings: Columns that routers read.
        mixture: How the bank's `nll` mixes.
        batch: Blocks per forward pass that are wanted; by tokens if None.
        frozen_depth: K, for `prefix_hidden`.
        stand_ins: Names of experts that are not run: the base's columns stand for theirs.
    """

    readings: frozenset[Reading]
    mixture: Mixture
    batch: int | None
    frozen_depth: int
    stand_ins: Collection[str]


def build_calibration_bank(
    folder: Path,
    base: "Base",
    experts: Sequence[Expert],
    blocks: Sequence[Blocks],
    *,
    readings: frozenset[Reading] = frozenset({"evidence"}),
    mixture: Mixture = "probability",
    batch: int | None = None,
    frozen_depth: int = 0,
    stand_ins: Collection[str] = (),
    progress: Progress | None = None,
) -> CalibrationBank:
    """Build, or find again, the bank that routers are fitted on.

    Args:
        folder: Where columns are kept; several banks may share it.
        base: The base checkpoint.
        experts: Experts in canonical order; if the base is one, it is the first.
        blocks: Blocks of any split but held-out, of equal block size.
        readings: Columns that routers read; others are not made.
        mixture: How the bank's `nll` mixes; the logit mixture keeps every expert's state.
        batch: Blocks per forward pass, by tokens if None; fewer where the device's memory does not
            suffice (`molora_fed.models.batches`).
        frozen_depth: K, for `prefix_hidden`.
        stand_ins: Names of experts that are not run: the base's columns stand for theirs.
        progress: Receives blocks done and in all over all passes, with `bank_bytes` and `expert`.

    Returns:
        The bank. Safe to interrupt; called again, it resumes with the first unfinished expert.

    Raises:
        BankError: If blocks or experts do not fit together, or an expert's numbers are not finite.
        IncompatibleAdapterError: If an adapter does not fit the base.
        RoutingError: If logits cannot be mixed with this base.
        StorageError: If the disk has no room.
    """
    if any(part.split == Split.HELD_OUT for part in blocks):
        raise BankError(
            "Cannot build a calibration bank: expected no held-out blocks, got some. "
            "Use the calibration split; held-out blocks are for reports."
        )
    plan = BankPlan(readings, mixture, batch, frozen_depth, stand_ins)
    return _build(CalibrationBank, folder, base, experts, blocks, plan, progress)


def build_held_out_bank(
    folder: Path,
    base: "Base",
    experts: Sequence[Expert],
    blocks: Sequence[Blocks],
    *,
    readings: frozenset[Reading] = frozenset({"evidence"}),
    mixture: Mixture = "probability",
    batch: int | None = None,
    frozen_depth: int = 0,
    stand_ins: Collection[str] = (),
    kept: Sequence[NDArray[np.bool_]] | None = None,
    progress: Progress | None = None,
) -> HeldOutBank:
    """Build, or find again, the bank that figures are reported from.

    Arguments, result and errors as of `build_calibration_bank`, but every block must be of the
    held-out split, and no router can be fitted on the result. `kept` says which blocks the bank
    shows, a mask (N,) for each list, all if None; columns are made of all blocks, so that another
    choice finds them.

    Raises:
        BankError: If a block is of another split, or none is kept.
    """
    if any(part.split != Split.HELD_OUT for part in blocks):
        raise BankError(
            "Cannot build a held-out bank: expected only held-out blocks, got others. "
            "Use the held-out split."
        )
    plan = BankPlan(readings, mixture, batch, frozen_depth, stand_ins)
    return _build(HeldOutBank, folder, base, experts, blocks, plan, progress, kept)


def _build(
    kind: type[AnyBank],
    folder: Path,
    base: "Base",
    experts: Sequence[Expert],
    blocks: Sequence[Blocks],
    plan: BankPlan,
    progress: Progress | None,
    kept: Sequence[NDArray[np.bool_]] | None = None,
) -> AnyBank:
    check_experts(experts)
    check_blocks(blocks)
    masks = kept or [np.ones(len(part), dtype=np.bool_) for part in blocks]
    chosen = [(part, mask) for part, mask in zip(blocks, masks, strict=True) if mask.any()]
    blocks, shown = [part for part, _ in chosen], [part.select(mask) for part, mask in chosen]
    check_blocks(blocks)
    model = base.model
    batch = fit_batch(model, blocks[0].block_size, plan.batch)
    readout = find_readout(model) if plan.mixture == "logit" else None
    hidden_size = base.hidden_size
    wanted = Wanted.of(plan.readings, plan.mixture)
    # The frozen blocks run once for all experts, if there are several, now or later.
    resumes = can_resume(model, plan.frozen_depth)
    made = replace(wanted, prefix=wanted.prefix or resumes)
    num_bytes = estimate_bank_bytes(
        num_tokens=sum(part.tokens.size for part in blocks),
        num_experts=len(experts),
        hidden_size=hidden_size,
        itemsize=model.dtype.itemsize,
        readings=plan.readings,
        mixture=plan.mixture,
        keeps_prefix=resumes,
    )
    check_room(folder, num_bytes)
    makers = [
        ColumnMaker(
            folder,
            base,
            part,
            batch,
            plan.frozen_depth,
            hidden_size,
            None if mask.all() else torch.from_numpy(np.flatnonzero(mask)),
        )
        for part, mask in chosen
    ]
    run = [Expert(e.name, None) if e.name in plan.stand_ins else e for e in experts]
    order = _run_passes(makers, run, made, num_bytes, progress, resumes=resumes)
    return kind(
        **describe_blocks(shown),
        **open_columns(folder, makers, order, wanted),
        expert_names=tuple(expert.name for expert in experts),
        has_base_expert=experts[0].adapter is None,
        hidden_size=hidden_size,
        readings=plan.readings,
        mixture=plan.mixture,
        adapters=open_adapters(experts, model, plan.frozen_depth),
        readout=readout,
        folder=folder,
        device=model.device,
        measure=partial(_measure, makers),
        carried={expert.name: expert.carried for expert in experts},
    )


def _run_passes(
    makers: Sequence[ColumnMaker],
    experts: Sequence[Expert],
    wanted: Wanted,
    num_bytes: int,
    progress: Progress | None,
    *,
    resumes: bool,
) -> list[str]:
    """Make what is missing, one expert in memory at a time; returns the experts' hashes."""
    order = [_hash_of(expert) for expert in experts]
    passes = [*enumerate(experts)]
    if order[0]:
        passes.insert(0, (-1, Expert("base", None)))
    total = len(passes) * sum(len(maker.blocks) for maker in makers)
    done = 0
    if progress is not None:
        progress(0, total, bank_bytes=num_bytes)
    for index, expert in passes:
        is_needed = any(maker.plan(order, index, wanted) for maker in makers)
        with _applied(makers[0], expert.load() if is_needed else None) as is_late:
            for maker in makers:
                # Planned now: two contributors may have sent the very same blocks.
                if work := maker.plan(order, index, wanted):
                    step = _shift(progress, done, total, expert.name)
                    maker.run(expert.name, order, work, resumes=resumes and is_late, progress=step)
                done += len(maker.blocks)
        if progress is not None:
            progress(done, total, bank_bytes=num_bytes, expert=expert.name)
    return order


@contextmanager
def _applied(maker: ColumnMaker, adapter: "Adapter | None") -> Iterator[bool]:
    """Apply an adapter; whether it leaves all frozen blocks as they are."""
    is_late = False
    if adapter is not None:
        prefix, _ = decoder_blocks(maker.base.model)
        places = [block_index(name, prefix) for name in adapter.updates]
        is_late = all(place is not None and place >= maker.depth for place in places)
    with applied(maker.base.model, adapter):
        yield is_late


def _hash_of(expert: Expert) -> str:
    adapter = expert.load()
    return "" if adapter is None else adapter.hash


def _shift(progress: Progress | None, before: int, whole: int, expert: str) -> Progress | None:
    """Progress of one list of blocks, told as progress of all passes."""
    if progress is None:
        return None
    report = progress

    def shifted(done: int, total: int, **fields: float | str) -> None:
        report(before + done, whole, expert=expert, **fields)

    return shifted


def _measure(
    makers: Sequence[ColumnMaker], adapter: "Adapter", progress: Progress | None = None
) -> Tensor:
    """Loss of an adapter that is no expert on the bank's blocks, (N, T-1) nats."""
    order = [adapter.hash]
    wanted = Wanted(base=False, prefix=False, mean=False, experts=False)
    if any(maker.plan(order, 0, wanted) for maker in makers):
        resumes = can_resume(makers[0].base.model, makers[0].depth)
        with _applied(makers[0], adapter) as is_late:
            for maker in makers:
                if work := maker.plan(order, 0, wanted):
                    maker.run(
                        adapter.name, order, work, resumes=resumes and is_late, progress=progress
                    )
    return -torch.cat([open_column_of(maker, "logprob", order) for maker in makers])[:, 1:]
