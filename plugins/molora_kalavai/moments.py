"""Sums over a bank from which a linear discriminant follows: counts, class means, two covariances.

They add up: contributors could send their own, and leaving some documents out is a subtraction.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.models.hidden_statistics import HiddenStatistics
from molora_fed.types import Reading
from molora_kalavai.hidden import read_hidden

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["ClassMoments", "add_up_moments", "assign_folds", "collect_moments"]


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Sums over tokens and over segments; a segment is a document's part within a block.

    All are float64 and relative to `shift`, with n_s the tokens of segment s, h a hidden state and
    z_s the sum of a segment's hidden states.

    Attributes:
        shift: What was taken off every hidden state, (D,); for exactness alone.
        tokens: Number of tokens by domain, (C,).
        squares: Sum of n_s squared by domain, (C,).
        segments: Number of segments by domain, (C,).
        sums: Sum of h by domain, (C, D).
        total: Sum of h h^T, (D, D).
        grouped: Sum of z_s z_s^T / n_s, (D, D).
    """

    shift: Tensor
    tokens: Tensor
    squares: Tensor
    segments: Tensor
    sums: Tensor
    total: Tensor
    grouped: Tensor

    @staticmethod
    def zeros(num_domains: int, shift: Tensor) -> "ClassMoments":
        """Nothing added yet."""
        width = len(shift)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return ClassMoments(
            shift,
            tokens=zeros(num_domains),
            squares=zeros(num_domains),
            segments=zeros(num_domains),
            sums=zeros(num_domains, width),
            total=zeros(width, width),
            grouped=zeros(width, width),
        )

    @staticmethod
    def of_statistics(
        statistics: Iterable[HiddenStatistics], domains: Sequence[str]
    ) -> "ClassMoments":
        """The moments of all texts together, as far as published statistics tell.

        They tell nothing of documents: each domain's text counts as one segment, so that the
        covariance within segments is that of all tokens around their domain's mean.

        Args:
            statistics: Of each text.
            domains: All their domains; C of them.
        """
        parts = list(statistics)
        shift = torch.stack([part.mean.double() for part in parts]).mean(dim=0)
        whole = ClassMoments.zeros(len(domains), shift)
        for part in parts:
            domain, mean = domains.index(part.domain), part.mean.double() - shift
            whole.tokens[domain] += part.tokens
            whole.sums[domain] += part.tokens * mean
            whole.total.add_(part.tokens * (part.covariance.double() + torch.outer(mean, mean)))
        return whole.without_documents()

    def without_documents(self) -> "ClassMoments":
        """The same sums with each domain's text as one segment."""
        scaled = self.sums / self.tokens.sqrt().unsqueeze(1)
        return replace(
            self,
            squares=self.tokens**2,
            segments=torch.ones_like(self.tokens),
            grouped=scaled.T @ scaled,
        )

    def __add__(self, other: "ClassMoments") -> "ClassMoments":
        return self._combine(other, 1.0)

    def __sub__(self, other: "ClassMoments") -> "ClassMoments":
        return self._combine(other, -1.0)

    def _combine(self, other: "ClassMoments", sign: float) -> "ClassMoments":
        mine, theirs = dict(vars(self)), vars(other)
        shift = mine.pop("shift")
        return ClassMoments(
            shift, **{name: own + sign * theirs[name] for name, own in mine.items()}
        )

    def add_block_states(self, hidden: Tensor, segment_of: Tensor, domain_of: Tensor) -> None:
        """Add hidden states in place.

        Args:
            hidden: (M, D) float32, shift taken off.
            segment_of: Segment of each, (M,) int64; numbers are this call's own.
            domain_of: Domain of each, (M,) int64.
        """
        _, segment_of = segment_of.unique(return_inverse=True)
        count = int(segment_of.max()) + 1 if len(segment_of) else 0
        sizes = torch.bincount(segment_of, minlength=count).double()
        states = hidden.double()
        segment_sums = torch.zeros(count, hidden.shape[1], dtype=torch.float64)
        segment_sums.index_add_(0, segment_of, states)
        domain = torch.zeros(count, dtype=torch.int64)
        domain[segment_of] = domain_of
        self.tokens.index_add_(0, domain, sizes)
        self.squares.index_add_(0, domain, sizes**2)
        self.segments.index_add_(0, domain, torch.ones_like(sizes))
        self.sums.index_add_(0, domain, segment_sums)
        self.total.add_((hidden.T @ hidden).double())
        scaled = segment_sums / sizes.sqrt().unsqueeze(1)
        self.grouped.add_(scaled.T @ scaled)

    def means(self) -> Tensor:
        """Mean hidden state by domain, (C, D), shift added back."""
        return self.sums / self.tokens.unsqueeze(1) + self.shift

    def within(self) -> Tensor:
        """Covariance of tokens around their segment's mean, (D, D)."""
        freedom = (self.tokens.sum() - self.segments.sum()).clamp_min(1.0)
        return (self.total - self.grouped) / freedom

    def between(self) -> Tensor:
        """Covariance of segments' means around their domain's, (D, D), by moments.

        The one-way random-effects estimate for groups of unequal size; it may have negative
        eigenvalues, and is 0 where every domain has one segment only.
        """
        centre = (self.sums / self.tokens.sqrt().unsqueeze(1)).T
        spread = self.grouped - centre @ centre.T
        freedom = self.segments.sum() - len(self.segments)
        typical = (self.tokens - self.squares / self.tokens).sum()
        if float(freedom) < 1 or float(typical) <= 0:
            return torch.zeros_like(spread)
        return (spread - freedom * self.within()) / typical


def assign_folds(bank: "CalibrationBank", folds: int) -> NDArray[np.int64]:
    """Deal the bank's tokens to folds, near-duplicate clusters whole, each domain evenly.

    Where a domain has too few clusters, blocks are dealt instead; every fold leaves every domain
    something to be fitted on.

    Args:
        bank: The bank.
        folds: Wanted number of folds, >= 2.

    Returns:
        Fold of every token, (N, T); all 0 where even blocks do not suffice for two folds.
    """
    shape = bank.clusters.shape
    blocks = np.broadcast_to(np.arange(shape[0])[:, None], shape)
    for units in (bank.clusters, blocks):
        found = [np.unique(units[bank.domain_of == d]) for d in range(len(bank.domains))]
        count = min(folds, *(len(values) for values in found))
        if count >= 2:
            return _deal(units, bank.domain_of, len(bank.domains), count)
    return np.zeros(shape, dtype=np.int64)


def _deal(
    units: NDArray[np.int64], domain_of: NDArray[np.int64], num_domains: int, folds: int
) -> NDArray[np.int64]:
    """The largest units first, in turn."""
    fold_of = np.zeros(units.shape, dtype=np.int64)
    for domain in range(num_domains):
        rows = domain_of == domain
        _, inverse, sizes = np.unique(units[rows], return_inverse=True, return_counts=True)
        order = np.argsort(-sizes, kind="stable")
        turn = np.empty(len(order), dtype=np.int64)
        turn[order] = np.arange(len(order)) % folds
        fold_of[rows] = turn[inverse].reshape(fold_of[rows].shape)
    return fold_of


def collect_moments(
    bank: "CalibrationBank", name: Reading, fold_of: NDArray[np.int64], label: str
) -> list[ClassMoments]:
    """Moments of each fold, in one pass over the bank.

    Args:
        bank: The bank.
        name: Hidden column to read.
        fold_of: Fold of every token, (N, T).
        label: The router's name, for errors.

    Raises:
        RoutingError: If the bank lacks the column.
    """
    count = int(fold_of.max()) + 1
    folds: list[ClassMoments] = []
    domains = torch.from_numpy(bank.domain_of)
    for rows in bank.chunks():
        view = bank.view(rows)
        hidden = read_hidden(view, name, label).float().cpu()
        if not folds:
            shift = hidden.double().mean(dim=(0, 1))
            folds = [ClassMoments.zeros(len(bank.domains), shift) for _ in range(count)]
        states = hidden.flatten(0, 1) - shift.float()
        _add_states(folds, states, view.document_starts, domains[rows], fold_of[rows])
    return folds


def add_up_moments(
    bank: "CalibrationBank",
    name: Reading,
    domain_of: Tensor,
    num_domains: int,
    folds: int,
    *,
    largest: float,
    label: str,
) -> list[ClassMoments]:
    """Moments of each fold that add up over banks: about 0, all in float64.

    A token's fold follows from its cluster's number alone, so that whoever holds a document deals
    it alike. Where a domain has one cluster, a fold may be left without that domain.

    Args:
        bank: One member's.
        name: Hidden column to read.
        domain_of: Domain of each block, (N,) int64, among all members' domains.
        num_domains: C.
        folds: Number of folds.
        largest: States are clipped to this size, which bounds the sums.
        label: The router's name, for errors.

    Raises:
        RoutingError: If the bank lacks the column.
    """
    shift = torch.zeros(bank.hidden_size, dtype=torch.float64)
    parts = [ClassMoments.zeros(num_domains, shift) for _ in range(folds)]
    for rows in bank.chunks():
        view = bank.view(rows)
        states = read_hidden(view, name, label).double().cpu().clamp(-largest, largest)
        fold_of = bank.clusters[rows] % folds
        _add_states(parts, states.flatten(0, 1), view.document_starts, domain_of[rows], fold_of)
    return parts


def _add_states(
    folds: list[ClassMoments],
    states: Tensor,
    document_starts: Tensor,
    domain_of: Tensor,
    fold_of: NDArray[np.int64],
) -> None:
    """Add the states (B * T, D) of some blocks to the folds that their tokens are in."""
    starts = document_starts.cpu().clone()
    starts[:, 0] = True  # what came before a block is not known in it
    segment_of = starts.flatten().cumsum(0)
    domain_of = domain_of.repeat_interleave(starts.shape[1])
    fold = torch.from_numpy(np.ascontiguousarray(fold_of)).flatten()
    for index, moments in enumerate(folds):
        mine = fold == index
        moments.add_block_states(states[mine], segment_of[mine], domain_of[mine])
