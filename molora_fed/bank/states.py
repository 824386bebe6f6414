"""The base's states over blocks: what adapter routers read and fitness is compared with.

One frozen pass of the base per domain, kept on disk under the same keys as a bank's columns, so
that a fusion and a population share it. Token embeddings are looked up where they are read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from molora_fed.bank.passes import ColumnMaker, Wanted, check_room
from molora_fed.bank.views import GateReading, GateView
from molora_fed.corpus.batches import choose_rows
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import PopulationError
from molora_fed.models.base import Base
from molora_fed.models.batches import fit_batch
from molora_fed.storage.seeds import derive_seed
from molora_fed.types import Progress

__all__ = [
    "BaseStates",
    "StateBatch",
    "build_states",
    "take_balanced",
]


@dataclass(frozen=True, eq=False)
class StateBatch:
    """Some blocks, and what a router may read of them.

    Attributes:
        tokens: Token ids, (B, T) int64.
        view: The base's states at the same positions.
    """

    tokens: Tensor
    view: GateView


@dataclass(frozen=True, eq=False)
class BaseStates:
    """The base over the blocks of one domain.

    Attributes:
        blocks: The blocks, (N, T) tokens.
        logprob: Log-probability the base gives each token, (N, T) float32 nats; 0 at t = 0.
        hidden: State that enters the output head, (N, T, D), mapped; None if nobody reads it.
        table: The base's token embeddings, (V, D); None if nobody reads them.
    """

    blocks: Blocks
    logprob: Tensor = field(repr=False)
    hidden: Tensor | None = field(default=None, repr=False)
    table: Tensor | None = field(default=None, repr=False)

    @property
    def domain(self) -> str:
        """The blocks' domain."""
        return self.blocks.domain

    def __len__(self) -> int:
        """Number of blocks N."""
        return len(self.blocks)

    def nll(self) -> Tensor:
        """The base's loss of every predicted token, (N, T-1) float32 nats."""
        return -self.logprob[:, 1:]

    def take(self, rows: Sequence[int], device: torch.device | str = "cpu") -> StateBatch:
        """Read some blocks' rows, (B, T, ...).

        Args:
            rows: Indices of blocks.
            device: Where they are put.
        """
        index = np.asarray(rows, dtype=np.int64)
        tokens = torch.from_numpy(self.blocks.tokens[index]).to(device, torch.int64)
        starts = torch.from_numpy(self.blocks.document_starts[index]).to(device)
        hidden = None if self.hidden is None else self.hidden[torch.from_numpy(index)].to(device)
        embeddings = None
        if self.table is not None:
            embeddings = self.table[tokens.to(self.table.device)].to(device)
        return StateBatch(tokens, GateView(starts, hidden, embeddings))

    def batches(self, batch: int, device: torch.device | str = "cpu") -> Iterator[StateBatch]:
        """All blocks in order, `batch` at a time."""
        for start in range(0, len(self), batch):
            yield self.take(range(start, min(start + batch, len(self))), device)


def build_states(
    base: Base,
    blocks: Sequence[Blocks],
    readings: frozenset[GateReading],
    folder: Path,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> tuple[BaseStates, ...]:
    """Run the base once over blocks, or find what an earlier run, or a bank, left on disk.

    Args:
        base: The base; its model runs where it lies.
        blocks: Blocks of each domain.
        readings: What routers read.
        folder: Where columns lie; a bank's folder will do.
        batch: Blocks per forward pass, as of a bank.
        progress: Told the blocks done and in all, of each domain in turn.

    Returns:
        The states, in the order of `blocks`.

    Raises:
        BankError: If the base's log-probabilities are not finite.
        StorageError: If the disk has too little room, or refuses.
    """
    wanted = Wanted(base="base_hidden" in readings, prefix=False, mean=False, experts=False)
    makers = [
        ColumnMaker(
            folder,
            base,
            part,
            fit_batch(base.model, part.block_size, batch),
            0,
            base.hidden_size,
        )
        for part in blocks
    ]
    work = [(maker, maker.plan([], -1, wanted)) for maker in makers]
    needed = 0
    for maker, missing in work:
        per_token = {"logprob": 4, "hidden": maker.dtype.itemsize * base.hidden_size}
        needed += maker.blocks.tokens.size * sum(per_token[name] for name in missing.columns)
    check_room(folder, needed)
    for maker, missing in work:
        if missing:
            maker.run("base", [], missing, progress=progress)
    table = base.model.get_input_embeddings().weight.detach() if "embeddings" in readings else None
    return tuple(_open(maker, wanted.base, table) for maker in makers)


def _open(maker: ColumnMaker, reads_hidden: bool, table: Tensor | None) -> BaseStates:
    logprob = maker.open("logprob", [""])
    hidden = maker.open("hidden", [""]) if reads_hidden else None
    if logprob is None or (reads_hidden and hidden is None):
        raise PopulationError(
            f"Cannot open base states in '{maker.folder}': expected the columns just written, got "
            "none. Let no other process delete files there, and run the same command again."
        )
    return BaseStates(maker.blocks, logprob, hidden, table)


def take_balanced(
    states: Sequence[BaseStates],
    step: int,
    *,
    batch: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> StateBatch:
    """A step's batch: equally many blocks of every domain, a pure function of (seed, step).

    Args:
        states: One per domain, of equal block size, none empty.
        step: Step from 0.
        batch: Blocks in all B; a multiple of the number of domains.
        seed: Of the order.
        device: Where it is put.

    Raises:
        PopulationError: If the batch cannot be shared equally.
    """
    share, rest = divmod(batch, len(states)) if states else (0, 0)
    empty = [state.domain for state in states if not len(state)]
    if rest or not share or empty:
        lacking = f", none of {', '.join(empty)}" if empty else ""
        raise PopulationError(
            "Cannot take a batch: expected a multiple of the number of domains, each with blocks, "
            f"got {batch} blocks for {len(states)} domains{lacking}. Choose another batch."
        )
    parts = []
    for index, state in enumerate(states):
        own = derive_seed(seed, index)
        parts.append(state.take(choose_rows(len(state), step, batch=share, seed=own), device))
    return _join(parts)


def _join(parts: Sequence[StateBatch]) -> StateBatch:
    columns: Mapping[str, list[Tensor | None]] = {
        name: [getattr(part.view, name) for part in parts]
        for name in ("document_starts", "base_hidden", "embeddings")
    }
    joined = {
        name: torch.cat([v for v in values if v is not None])
        for name, values in columns.items()
        if all(value is not None for value in values)
    }
    return StateBatch(torch.cat([part.tokens for part in parts]), GateView(**joined))
