"""What a bank holds, and how routers and the evaluator read it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.adapters.carried_files import CarriedFiles, complete_carried
from molora_fed.bank.adapters import ExpertAdapters
from molora_fed.bank.columns import make_scratch
from molora_fed.bank.mixture import (
    compute_log_gates,
    compute_logit_nll,
    compute_probability_nll,
)
from molora_fed.bank.views import RouterView
from molora_fed.errors import BankError, ShapeError
from molora_fed.models.head import Readout
from molora_fed.types import Mixture, Progress, Reading

if TYPE_CHECKING:
    from molora_fed.adapters.updates import Adapter

__all__ = ["Bank", "CalibrationBank", "HeldOutBank"]

_CHUNK = 32  # blocks handled at once where a whole bank is gone through

Rows: TypeAlias = "slice | Tensor"


@dataclass(frozen=True, eq=False, kw_only=True)
class Bank:
    """Frozen measurements of the base and of E experts on N blocks of T tokens.

    Columns are memory-mapped: only rows that are read are in memory. Made by
    `build_calibration_bank` and `build_held_out_bank`.

    Attributes:
        tokens: Token ids, (N, T) int32.
        document_starts: True at a document's first token, (N, T) bool.
        clusters: Near-duplicate cluster of each token, (N, T), unique over the whole bank.
        domains: Domain names, sorted.
        domain_of: Index into `domains` of each block, (N,).
        expert_names: Names in the canonical order; index e in every tensor.
        has_base_expert: Whether expert 0 is the base itself.
        base_logprob: The base's `log p(x_t | x_<t)` in nats, (N, T) float32; 0 at t = 0.
        logprob: The same of every expert, (N, T, E).
        hidden_size: D.
        readings: The columns that a view has.
        mixture: How `nll` mixes.
        base_hidden: (N, T, D), or None if not made.
        prefix_hidden: (N, T, D), or None.
        mean_hidden: (N, T, D), or None.
        experts_hidden: E tensors (N, T, D), or None.
        adapters: The experts' adapters by name, see `ExpertAdapters`; None is the base's.
        readout: The head that logits are mixed under; None for the probability mixture.
        folder: Where derived numbers are kept; None keeps them in memory.
        device: Where views and losses are computed.
        measure: Runs an adapter over the bank's blocks; None if the bank has no models.
        carried: What each expert's contribution carries, by the expert's name:
            `carried[expert][name]` has tensors by name, or is None (`CarriedFiles`).
    """

    tokens: Tensor
    document_starts: Tensor
    clusters: NDArray[np.int64]
    domains: tuple[str, ...]
    domain_of: NDArray[np.int64]
    expert_names: tuple[str, ...]
    has_base_expert: bool
    base_logprob: Tensor
    logprob: Tensor
    hidden_size: int
    readings: frozenset[Reading]
    mixture: Mixture = "probability"
    base_hidden: Tensor | None = None
    prefix_hidden: Tensor | None = None
    mean_hidden: Tensor | None = None
    experts_hidden: tuple[Tensor, ...] | None = None
    adapters: ExpertAdapters = field(default_factory=ExpertAdapters, repr=False)
    readout: Readout | None = None
    folder: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    measure: Callable[..., Tensor] | None = None
    carried: Mapping[str, CarriedFiles] = field(default_factory=dict, repr=False)
    _derived: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "carried", complete_carried(self.carried, self.expert_names))

    @property
    def num_blocks(self) -> int:
        """N."""
        return int(self.tokens.shape[0])

    @property
    def block_size(self) -> int:
        """T."""
        return int(self.tokens.shape[1])

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.expert_names)

    def chunks(self) -> Iterator[slice]:
        """Slices over all blocks, a few at a time."""
        for start in range(0, self.num_blocks, _CHUNK):
            yield slice(start, min(start + _CHUNK, self.num_blocks))

    def view(self, rows: Rows) -> RouterView:
        """What a router may look at, for some blocks.

        Args:
            rows: A slice, or indices (B,) int64.

        Returns:
            A view of B blocks with the bank's readings; other columns are None.
        """
        starts = self._take(self.document_starts, rows)
        columns: dict[str, Tensor] = {}
        for name in self.readings - {"evidence", "experts_hidden"}:
            columns[name] = self._take(self._column(name), rows)
        if "experts_hidden" in self.readings:
            columns["experts_hidden"] = self._hidden_of_experts(rows)
        if "evidence" in self.readings:
            columns["evidence"] = self._take(self.logprob, rows).masked_fill(starts[..., None], 0.0)
        return RouterView(document_starts=starts, **columns)

    def nll(self, gates: Tensor, rows: Rows) -> Tensor:
        """Loss of gates under the bank's mixture.

        Args:
            gates: (B, T, E), non-negative, summing to 1 over E; position t weighs x_{t+1}.
            rows: The blocks they are for, a slice or indices (B,) int64.

        Returns:
            Loss of x_1 .. x_{T-1} in nats, (B, T-1); differentiable in `gates`.

        Raises:
            ShapeError: If the gates do not fit the blocks.
        """
        self._check_gates(gates)
        if self.readout is None:
            return self._probability_nll(compute_log_gates(gates), rows)
        return self._logit_nll(gates, rows, self.readout)

    def score_nll(self, scores: Tensor, rows: Rows) -> Tensor:
        """Loss of the gates softmax(scores): cheaper to fit through than `nll`.

        Args:
            scores: (B, T, E), any finite numbers; position t ranks experts for x_{t+1}.
            rows: The blocks they are for, a slice or indices (B,) int64.

        Returns:
            Loss of x_1 .. x_{T-1} in nats, (B, T-1); differentiable in `scores`.

        Raises:
            ShapeError: If the scores do not fit the blocks.
        """
        self._check_gates(scores)
        if self.readout is None:
            return self._probability_nll(torch.log_softmax(scores, dim=-1), rows)
        return self._logit_nll(torch.softmax(scores, dim=-1), rows, self.readout)

    def under_probability_mixture(self) -> Self:
        """The same bank with the experts' distributions mixed; columns are shared."""
        return replace(self, mixture="probability", readout=None)

    def stamp(self) -> dict[str, tuple[int, ...]]:
        """What tells, compared with a later stamp, what somebody changed in between.

        Numbers that decide losses are summed up; columns of hidden states, which can be large, are
        known by their place and by torch's count of changes, as are adapters that were read.
        """
        arrays = {"clusters": self.clusters, "domain_of": self.domain_of}
        stamps: dict[str, tuple[int, ...]] = {
            name: (crc32(np.ascontiguousarray(array).data),) for name, array in arrays.items()
        }
        for name in ("tokens", "document_starts", "base_logprob", "logprob"):
            column: Tensor = getattr(self, name)
            stamps[name] = (column._version, crc32(column.contiguous().cpu().numpy()))
        hidden = {n: getattr(self, n) for n in ("base_hidden", "prefix_hidden", "mean_hidden")}
        hidden |= {f"experts_hidden {n}": c for n, c in enumerate(self.experts_hidden or ())}
        hidden |= {f"derived {n}": c for n, c in self._derived.items()}
        stamps |= {n: (c._version, c.data_ptr()) for n, c in hidden.items() if c is not None}
        changes = self.adapters.count_changes()
        return {**stamps, **{f"the adapter of {name}": (n,) for name, n in changes.items()}}

    def uniform_gates(self, rows: Rows) -> Tensor:
        """The same gate for every expert, (B, T, E)."""
        count = len(range(*rows.indices(self.num_blocks))) if isinstance(rows, slice) else len(rows)
        shape = (count, self.block_size, self.num_experts)
        return torch.full(shape, 1 / self.num_experts, device=self.device)

    def base_nll(self) -> Tensor:
        """Loss of the base alone, (N, T-1) nats."""
        return -self.base_logprob[:, 1:]

    def expert_nll(self, expert: int) -> Tensor:
        """Loss of one expert alone, (N, T-1) nats."""
        return -self.logprob[:, 1:, expert]

    def add_column(
        self, name: str, adapter: "Adapter", *, progress: Progress | None = None
    ) -> Tensor:
        """Measure an adapter that is no expert, a weight average for example.

        Args:
            name: What it is, for errors.
            adapter: What to add to the base; kept on disk under its hash.
            progress: Receives blocks done and blocks in all.

        Returns:
            Its loss on the bank's blocks, (N, T-1) nats, at the bank's batch size.

        Raises:
            BankError: If the bank has no models, or the losses are not finite.
            IncompatibleAdapterError: If the adapter does not fit the base.
        """
        if self.measure is None:
            raise BankError(
                f"Cannot measure '{name}': expected a bank built from models, got numbers only. "
                "Build the bank with build_held_out_bank."
            )
        return self.measure(adapter, progress)

    def derive(self, name: str, compute: Callable[[RouterView], Tensor]) -> Tensor:
        """Numbers computed once from all views, for a router's `fit` to read many times.

        Args:
            name: What they are, with every option that decides them; equal names share numbers.
            compute: Turns a view of B blocks into a tensor (B, ...), block by block.

        Returns:
            The tensors of all blocks, (N, ...), memory-mapped where the bank has a folder.
        """
        if name not in self._derived:
            whole: Tensor | None = None
            with torch.no_grad():
                for rows in self.chunks():
                    part = compute(self.view(rows)).cpu()
                    if whole is None:
                        shape = (self.num_blocks, *part.shape[1:])
                        whole = make_scratch(self.folder, shape, part.dtype)
                    whole[rows] = part
            if whole is None:
                raise BankError(f"Cannot derive '{name}': expected blocks, got none. Add some.")
            self._derived[name] = whole
        return self._derived[name]

    def _check_gates(self, gates: Tensor) -> None:
        if gates.shape[1:] != (self.block_size, self.num_experts):
            raise ShapeError(
                f"Cannot mix experts: expected gates (B, {self.block_size}, {self.num_experts}), "
                f"got {tuple(gates.shape)}. Use a router fitted for these experts."
            )

    def _probability_nll(self, log_gates: Tensor, rows: Rows) -> Tensor:
        return compute_probability_nll(log_gates, self._take(self.logprob, rows))

    def _logit_nll(self, gates: Tensor, rows: Rows, readout: Readout) -> Tensor:
        tokens = self._take(self.tokens, rows)
        return compute_logit_nll(gates, self._hidden_of_experts(rows), tokens, readout)

    def _take(self, column: Tensor, rows: Rows) -> Tensor:
        taken = column[rows] if isinstance(rows, slice) else column.index_select(0, rows)
        return taken.to(self.device)

    def _column(self, name: str) -> Tensor:
        column: Tensor | None = getattr(self, name)
        if column is None:
            raise BankError(
                f"Cannot read bank column '{name}': expected one of "
                f"{', '.join(sorted(self.readings))}. Build the bank with this reading."
            )
        return column

    def _hidden_of_experts(self, rows: Rows) -> Tensor:
        if self.experts_hidden is None:
            self._column("experts_hidden")
        return torch.stack([self._take(c, rows) for c in self.experts_hidden or ()], dim=2)


@dataclass(frozen=True, eq=False, kw_only=True)
class CalibrationBank(Bank):
    """A bank that routers may be fitted on."""


@dataclass(frozen=True, eq=False, kw_only=True)
class HeldOutBank(Bank):
    """A bank that figures are reported from; no `fit` takes it."""
