"""Weights of evidence and of hidden states, and whether hidden states help text left out."""

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from molora_fed.evaluation.bootstrap import ClusterIndex, compute_interval, resample_domain_means
from molora_fed.routing.fitting import compute_score_loss, fit_on_whole
from molora_fed.types import Progress
from molora_kalavai.evidence import EvidenceOptions

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["EvidenceFit", "EvidenceHiddenOptions"]

_RESAMPLES = 1000


class EvidenceHiddenOptions(EvidenceOptions):
    """Options of the evidence router with hidden states.

    Attributes:
        input: Hidden state the discriminant is on.
        folds: Parts of the cross-validation that chooses its shrinkage and temperature.
        confidence: How sure it must be, by document cluster, that hidden states help on
            calibration text that was left out; below, the router is by evidence alone.
    """

    input: Literal["base_hidden", "prefix_hidden", "mean_hidden"] = "base_hidden"
    folds: int = Field(default=5, ge=2)
    confidence: float = Field(default=0.9, gt=0.5, lt=1)


class EvidenceFit:
    """The few numbers of the router, fitted on all or some blocks, with and without hidden states.

    Attributes:
        bank: The bank, under the probability mixture.
        own: The bank under its own mixture.
        features: Evidence sums, then the statistics' out-of-fold log-gates, (N, T, E, K + 1).
    """

    def __init__(
        self, bank: "CalibrationBank", features: Tensor, options: EvidenceHiddenOptions
    ) -> None:
        # Evidence weighs distributions, and so it is fitted, a vocabulary's width cheaper.
        self.bank = bank.under_probability_mixture()
        self.own = bank
        self.features = features
        self.options = options

    def start(self) -> tuple[Tensor, Tensor]:
        """Weights and prior of the zero form."""
        weights = torch.zeros(self.features.shape[-1], device=self.bank.device)
        weights[0] = 1.0
        return weights, torch.zeros(self.bank.num_experts, device=self.bank.device)

    def fit(
        self, with_hidden: bool, rows: Tensor | None, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weights, the last 0 without hidden states, and prior.

        Args:
            with_hidden: Whether the last weight is fitted.
            rows: Blocks to fit on; None takes all.
            progress: Receives evaluations done.
        """
        weights, prior = self.start()
        evidence, hidden = weights[:-1].clone(), weights[-1:].clone()

        def score(features: Tensor) -> Tensor:
            return features @ torch.cat([evidence, hidden]) + prior

        parameters = [evidence, hidden] if with_hidden else [evidence]
        fit_on_whole(
            self.bank,
            self.features,
            [*parameters, prior] if self.options.prior else parameters,
            score,
            iterations=self.options.iterations,
            rows=rows,
            progress=progress,
        )
        return torch.cat([evidence, hidden]).detach(), prior

    def is_hidden_better(self) -> bool:
        """Two-fold: fitted on either half, compared on the other's clusters."""
        halves = _halve(self.bank.domain_of, len(self.bank.domains))
        if halves is None:
            return False
        differences = []
        for mine, other in (halves, halves[::-1]):
            rows = torch.from_numpy(mine)
            fits = [self.fit(with_hidden, rows) for with_hidden in (True, False)]
            losses = [self._compute_losses(fit, torch.from_numpy(other)) for fit in fits]
            is_new = ~np.isin(self.bank.clusters[other], self.bank.clusters[mine])[:, 1:]
            differences.append((other, losses[0] - losses[1], is_new))
        return self._is_below_zero(differences)

    @torch.no_grad()
    def _compute_losses(self, fit: tuple[Tensor, Tensor], rows: Tensor) -> NDArray[np.float32]:
        """Losses of some blocks, (B, T-1)."""
        weights, prior = fit
        scores = self.features[rows].to(prior.device) @ weights + prior
        return self.bank.score_nll(scores, rows).cpu().numpy()

    def _is_below_zero(
        self, differences: list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]]
    ) -> bool:
        """Whether the equal-weight mean of differences is below 0, resampled by cluster."""
        count = self.bank.block_size - 1
        shape = (self.bank.num_blocks, count)
        values, is_used = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        for rows, difference, is_new in differences:
            values[rows], is_used[rows] = difference * is_new, is_new
        index = ClusterIndex.build(self.bank.clusters, self.bank.domain_of)
        used = index.sum(is_used)
        if np.any(np.bincount(index.domain_of, weights=used, minlength=index.num_domains) == 0):
            return False  # a domain whose halves share all clusters says nothing
        sums = [index.sum(values), used]
        means = resample_domain_means(index, sums, seed=0, resamples=_RESAMPLES)
        # Both are means over all tokens: their ratio is the mean over those that were compared.
        resampled = (means[:, 0] / np.maximum(means[:, 1], 1e-12)).mean(axis=1)
        level = 2 * self.options.confidence - 1
        return compute_interval(resampled, level=level)[1] < 0

    def keep_better(
        self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The one of the lower loss under the bank's own mixture."""

        def compute_loss(fit: tuple[Tensor, Tensor]) -> float:
            weights, prior = fit
            return compute_score_loss(self.own, self.features, lambda f: f @ weights + prior)

        return min((one, other), key=compute_loss)


def _halve(
    domain_of: NDArray[np.int64], num_domains: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Blocks of the first and second half of each domain; None if a domain has one block.

    Halves, not every second block: documents span neighbouring blocks.
    """
    first, second = [], []
    for domain in range(num_domains):
        rows = np.flatnonzero(domain_of == domain)
        if len(rows) < 2:
            return None
        middle = len(rows) // 2
        first.append(rows[:middle])
        second.append(rows[middle:])
    return np.concatenate(first), np.concatenate(second)
