"""A linear discriminant of domains on a running mean, in closed form; see docs/routers.md."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.bank.views import RouterView
from molora_fed.routing.causal import causal_mean, count_since_start
from molora_fed.types import Reading
from molora_kalavai.hidden import read_hidden
from molora_kalavai.mixtures import fit_mixtures, mix_log
from molora_kalavai.moments import ClassMoments, assign_folds, collect_moments

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = [
    "CONSTANTS",
    "SAMPLED_TOKENS",
    "Discriminant",
    "FittedDiscriminant",
    "Sample",
    "assume_constants",
    "diagonalise",
    "fit_discriminant",
    "try_constants",
]

_SHRINKAGES = (0.1, 0.5, 0.9)
_CORRELATIONS = (1.0, 3.0, 10.0, 30.0)
_TEMPERATURES = (2.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.0)
# Where nothing tells: a document's mean is as far from its domain's as a token is from it, and ten
# tokens tell as much as one independent one. Chosen on calibration text of three trainings.
_ASSUMED_SPREAD, _ASSUMED_CORRELATION = 1.0, 10.0
CONSTANTS = tuple(itertools.product(_SHRINKAGES, _CORRELATIONS, _TEMPERATURES))
"""Shrinkage, correlation and temperature that are tried."""
SAMPLED_TOKENS = 16_384
"""About as many positions constants are chosen on."""


@dataclass(frozen=True, eq=False)
class Discriminant:
    """P(domain | mean of a document's first n hidden states), domains equally likely before.

    In coordinates where tokens have covariance 1 around their document's mean and documents'
    means have the diagonal covariance `spread` around their domain's, the mean of n tokens has
    variance spread + correlation / n along each axis.

    Attributes:
        centre: Origin of the coordinates, (D,).
        basis: Axes as columns, (D, D).
        means: Domains' means in these coordinates, (C, D).
        spread: Variance of documents' means along each axis, (D,).
        correlation: Tokens that tell as much as one independent token, (1,).
        temperature: Factor on log-odds, (1,); 0 leaves all domains equally likely.
    """

    centre: Tensor
    basis: Tensor
    means: Tensor
    spread: Tensor
    correlation: Tensor
    temperature: Tensor

    @staticmethod
    def of(moments: ClassMoments, shrinkage: float) -> "Discriminant":
        """The discriminant of these moments, correlation and temperature 1.

        Args:
            moments: Of calibration blocks.
            shrinkage: In [0, 1]; at 1 documents spread alike along all axes.
        """
        return diagonalise(moments).shrink(shrinkage)

    def shrink(self, shrinkage: float) -> "Discriminant":
        """With every variance of documents' means moved towards their mean over axes."""
        moved = (1 - shrinkage) * self.spread + shrinkage * self.spread.mean()
        return replace(self, spread=moved)

    def weigh(self, correlation: float, temperature: float) -> "Discriminant":
        """With another correlation and temperature."""
        return replace(
            self,
            correlation=self.correlation.new_tensor([correlation]),
            temperature=self.temperature.new_tensor([temperature]),
        )

    def to(self, device: torch.device) -> "Discriminant":
        """The same on another device."""
        return Discriminant(**{name: t.to(device) for name, t in self.tensors().items()})

    def place(self, mean: Tensor) -> Tensor:
        """Coordinates of running means, (..., D) both."""
        return (mean - self.centre) @ self.basis

    def compute_odds(self, placed: Tensor, count: Tensor) -> Tensor:
        """Log-odds of domains, up to what they share, before the temperature.

        Args:
            placed: Coordinates of the means, (..., D).
            count: Tokens each mean is over, (...).

        Returns:
            (..., C).
        """
        precision = 1 / (self.spread + (self.correlation / count).unsqueeze(-1))
        linear = (precision * placed) @ self.means.T
        return linear - precision @ (self.means**2).T / 2

    def log_posterior(self, mean: Tensor, count: Tensor) -> Tensor:
        """Log P(domain | mean of the first n hidden states), (..., C).

        Args:
            mean: Running means, (..., D) float32.
            count: n, (...).
        """
        odds = self.compute_odds(self.place(mean), count)
        return torch.log_softmax(odds * self.temperature, dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for safetensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class FittedDiscriminant:
    """A discriminant, and what it says of calibration text it was not fitted on.

    Attributes:
        discriminant: Fitted on all of the bank.
        mixtures: Weight of each expert in each domain, (C, E).
        folds: Discriminants of the bank without each fold, with the same constants.
        fold_of: Fold of every token, (N, T).
    """

    discriminant: Discriminant
    mixtures: Tensor
    folds: tuple[Discriminant, ...]
    fold_of: Tensor

    def out_of_fold(self, bank: "CalibrationBank", name: Reading, label: str) -> Tensor:
        """Log-posteriors of every token from the other folds, (N, T, C), on the CPU."""
        result = torch.empty(bank.num_blocks, bank.block_size, len(bank.domains))
        for rows in bank.chunks():
            mean, count = _read_means(bank.view(rows), name, label)
            for index, fold in enumerate(self.folds):
                mine = self.fold_of[rows] == index
                result[rows][mine] = fold.log_posterior(mean[mine], count[mine])
        return result


def fit_discriminant(
    bank: "CalibrationBank", name: Reading, folds: int, label: str
) -> FittedDiscriminant:
    """Fit on calibration; constants are those of lowest loss on text left out of the sums.

    Args:
        bank: Calibration bank with the column.
        name: Hidden column to read.
        folds: Parts of the cross-validation, by near-duplicate cluster.
        label: The router's name, for errors.

    Raises:
        RoutingError: If the bank lacks the column.
    """
    fold_of = assign_folds(bank, folds)
    parts = collect_moments(bank, name, fold_of, label)
    whole = sum(parts[1:], start=parts[0])
    others = [whole - part for part in parts] if len(parts) > 1 else [whole]
    mixtures = fit_mixtures(bank)
    # The decomposition is shared by all constants, so it is done once for each fold.
    plain = [diagonalise(moments) for moments in others]
    sample = Sample.draw(bank, name, fold_of, label)
    shrinkage, correlation, temperature = _choose_constants(sample, plain, mixtures)

    def finish(found: Discriminant) -> Discriminant:
        return found.shrink(shrinkage).weigh(correlation, temperature)

    return FittedDiscriminant(
        finish(diagonalise(whole)),
        mixtures,
        tuple(finish(found) for found in plain),
        torch.from_numpy(fold_of),
    )


def diagonalise(moments: ClassMoments) -> Discriminant:
    """Coordinates in which both covariances are diagonal, nothing shrunk but what rank demands."""
    means, within = moments.means(), moments.within()
    width, count = len(within), float(moments.tokens.sum())
    typical = float(within.diagonal().mean()) or 1.0  # states that never vary have no scale
    ridge = width / (width + count)
    within = (1 - ridge) * within + ridge * typical * torch.eye(width, dtype=within.dtype)
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors / values.clamp_min(1e-9 * typical).sqrt()
    spread, turn = torch.linalg.eigh(whiten.T @ moments.between() @ whiten)
    centre, basis = means.mean(dim=0), whiten @ turn
    one = torch.ones(1)
    return Discriminant(
        centre.float(),
        basis.float().contiguous(),
        ((means - centre) @ basis).float(),
        spread.clamp_min(0).float(),
        one,
        one.clone(),
    )


def assume_constants(found: Discriminant) -> Discriminant:
    """With what is assumed where neither documents nor losses are known; see docs/routers.md.

    Args:
        found: Of moments without documents, whose spread is 0.
    """
    assumed = replace(found, spread=torch.full_like(found.spread, _ASSUMED_SPREAD))
    return assumed.weigh(_ASSUMED_CORRELATION, 1.0)


@dataclass(frozen=True, eq=False)
class Sample:
    """Positions spread over the bank, on which constants are chosen.

    Attributes:
        mean: Running means, (M, D).
        count: Tokens they are over, (M,).
        logprob: Of the token after each position, (M, E).
        weight: Of each position, (M,).
        fold: Fold of each position, (M,).
        domain: Domain of each position, (M,).
    """

    mean: Tensor
    count: Tensor
    logprob: Tensor
    weight: Tensor
    fold: Tensor
    domain: Tensor

    @staticmethod
    def draw(
        bank: "CalibrationBank", name: Reading, fold_of: NDArray[np.int64], label: str
    ) -> "Sample":
        """Every so many positions of each block, beginning at its number."""
        stride = max(1, bank.num_blocks * (bank.block_size - 1) // SAMPLED_TOKENS)
        begins = torch.arange(bank.num_blocks)
        domains = torch.from_numpy(bank.domain_of)
        taken = Sample.take(bank, name, fold_of, domains, stride, begins, label)
        per_domain = torch.bincount(taken.domain, minlength=len(bank.domains)).clamp_min(1)
        weight = 1.0 / (per_domain[taken.domain] * len(bank.domains))
        return replace(taken, weight=weight.float())

    @staticmethod
    def take(
        bank: "CalibrationBank",
        name: Reading,
        fold_of: NDArray[np.int64],
        domain_of: Tensor,
        stride: int,
        begins: Tensor,
        label: str,
    ) -> "Sample":
        """Positions t of each block for which t + its `begins`, (N,), is a multiple of `stride`."""
        length = bank.block_size - 1  # the last position predicts nothing
        parts = []
        for rows in bank.chunks():
            mean, count = _read_means(bank.view(rows), name, label)
            taken = (torch.arange(length) + begins[rows].unsqueeze(1)) % stride == 0  # (B, T-1)
            row, at = taken.nonzero(as_tuple=True)
            fold = torch.from_numpy(fold_of[rows])[row, at]
            domain = domain_of[rows][row]
            logprob = bank.logprob[rows][row, at + 1]
            parts.append((mean[row, at], count[row, at], logprob, domain, fold))
        mean, count, logprob, domain, fold = (torch.cat(list(p)) for p in zip(*parts, strict=True))
        return Sample(mean, count, logprob, torch.ones(len(mean)), fold, domain)


def _choose_constants(
    sample: Sample, plain: list[Discriminant], mixtures: Tensor
) -> tuple[float, float, float]:
    """Shrinkage, correlation and temperature of the lowest loss, all positions out of fold."""
    best, chosen = float("inf"), CONSTANTS[0]
    for constants, likelihood in try_constants(sample, plain, mixtures):
        loss = -float(likelihood @ sample.weight)
        if loss < best:
            best, chosen = loss, constants
    return chosen


def try_constants(
    sample: Sample, plain: Sequence[Discriminant], mixtures: Tensor
) -> Iterator[tuple[tuple[float, float, float], Tensor]]:
    """Each of `CONSTANTS`, and the log-likelihood of every position's next token, (M,) nats.

    Args:
        sample: Positions.
        plain: Discriminants of all text but each fold, nothing shrunk.
        mixtures: Weight of each expert in each domain, (C, E).
    """
    placed = torch.empty_like(sample.mean)
    members = [sample.fold == index for index in range(len(plain))]
    for mine, found in zip(members, plain, strict=True):
        placed[mine] = found.place(sample.mean[mine])
    log_mixture_odds = torch.empty(len(sample.mean), len(mixtures))
    for shrinkage, correlation in itertools.product(_SHRINKAGES, _CORRELATIONS):
        for mine, found in zip(members, plain, strict=True):
            form = found.shrink(shrinkage).weigh(correlation, 1.0)
            log_mixture_odds[mine] = form.compute_odds(placed[mine], sample.count[mine])
        for temperature in _TEMPERATURES:
            posterior = torch.log_softmax(log_mixture_odds * temperature, dim=-1)
            likelihood = torch.logsumexp(mix_log(posterior, mixtures) + sample.logprob, dim=-1)
            yield (shrinkage, correlation, temperature), likelihood


def _read_means(view: RouterView, name: Reading, label: str) -> tuple[Tensor, Tensor]:
    """Running means (B, T, D) and their counts (B, T), on the CPU."""
    hidden = read_hidden(view, name, label)
    mean = causal_mean(hidden, view.document_starts)
    return mean.cpu(), count_since_start(view.document_starts).cpu()
