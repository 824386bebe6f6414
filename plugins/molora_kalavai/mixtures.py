"""Each domain's best constant gates, and their mixture by the domains' probabilities."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = [
    "MIXTURES_TRIED",
    "assume_mixtures",
    "fit_mixtures",
    "measure_mixtures",
    "mix_log",
    "propose_mixtures",
]

_EM_STEPS = 50
_LEAST_WEIGHT = 1e-30  # keeps logarithms finite where EM gives an expert nothing
_LEAST_TRIED = 1e-6  # of constant gates that are tried: none rules an expert out for good
_WAYS = (1.0, 0.5, 0.2)  # how far towards the model's best gates is tried
_OWN_SHARE = 0.9  # of a domain's gates that is its own specialists', where no loss can choose
_SURE = 1e4  # how much more a sum of gates that is not 1 costs than any loss
MIXTURES_TRIED = len(_WAYS) + 1
"""Constant gates that `propose_mixtures` proposes."""


def mix_log(log_posterior: Tensor, mixtures: Tensor) -> Tensor:
    """Log-gates of posterior-weighted mixtures, (..., C) and (C, E) -> (..., E)."""
    return (log_posterior.exp() @ mixtures).clamp_min(_LEAST_WEIGHT).log()


def fit_mixtures(bank: "CalibrationBank") -> Tensor:
    """For each domain the constant gates of lowest calibration loss, (C, E), by EM.

    EM only ever lowers the loss, which is convex in the gates; the probability mixture is fitted.
    """
    rows = []
    for domain in range(len(bank.domains)):
        chosen = torch.from_numpy(np.flatnonzero(bank.domain_of == domain))
        logprob = bank.logprob[chosen][:, 1:].flatten(0, 1)
        likelihood = (logprob - logprob.amax(dim=1, keepdim=True)).exp()  # (M, E)
        weights = torch.full((bank.num_experts,), 1 / bank.num_experts)
        for _ in range(_EM_STEPS):
            weights = weights * (likelihood / (likelihood @ weights).unsqueeze(1)).mean(dim=0)
        rows.append(weights / weights.sum())
    return torch.stack(rows)


def assume_mixtures(owners: Sequence[str], domains: Sequence[str]) -> Tensor:
    """Constant gates of each domain where no loss can choose them, (C, E).

    Most of a domain's gates is its own specialists', in equal shares; the rest everybody's.

    Args:
        owners: Domain of each expert; "" of the base. E of them.
        domains: C domains.
    """
    own = torch.tensor([[owner == domain for owner in owners] for domain in domains]).float()
    return _OWN_SHARE * own / own.sum(dim=1, keepdim=True) + (1 - _OWN_SHARE) / len(owners)


def measure_mixtures(logprob: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens from which the best constant gates follow in second-order steps.

    With r_e = w_e p_e / sum_i w_i p_i, the responsibility of expert e for a token, they are of
    bounded numbers: the gradient is -sum r_e / w_e, the Hessian sum r_e r_i / (w_e w_i).

    Args:
        logprob: Of M tokens, (M, E).
        points: Gates to measure at, (P, E), all above 0.

    Returns:
        Loss above that of the best expert at each token, (P,) nats; sum of r, (P, E); sum of the
        upper half of r r^T, (P, E * (E + 1) / 2); all float64.
    """
    log_gates = points.double().log().unsqueeze(1)  # (P, 1, E)
    relative = (logprob - logprob.amax(dim=-1, keepdim=True)).double()
    joint = log_gates + relative  # (P, M, E)
    loss = -torch.logsumexp(joint, dim=-1).sum(dim=1)
    shares = torch.softmax(joint, dim=-1)
    products = shares.transpose(1, 2) @ shares
    row, column = torch.triu_indices(points.shape[-1], points.shape[-1])
    return loss, shares.sum(dim=1), products[:, row, column]


def propose_mixtures(point: Tensor, shares: Tensor, products: Tensor) -> Tensor:
    """Constant gates to try next: ways towards the second-order model's best, and a step of EM.

    Args:
        point: Gates w, (E,) float64, all above 0.
        shares: Mean responsibility r of each expert, (E,).
        products: Mean of the upper half of r r^T, as `measure_mixtures` gives it.

    Returns:
        (MIXTURES_TRIED, E) float64, each at least a little above 0 and summing to 1.
    """
    size = len(point)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    row, column = torch.triu_indices(size, size)
    matrix[row, column] = matrix[column, row] = products
    # With v_e = w_e u_e the model is u^T R u / 2 - 2 r^T u, and R 1 = r: least squares of
    # R^1/2 (u - 2), where u is not negative and the gates sum to 1.
    values, vectors = torch.linalg.eigh(matrix)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    rows = torch.cat([root, _SURE * point.unsqueeze(0)])
    wanted = torch.cat([root @ torch.full_like(point, 2.0), point.new_tensor([_SURE])])
    best = point * torch.from_numpy(nnls(rows.numpy(), wanted.numpy())[0])
    tried = torch.stack([*(point + way * (best - point) for way in _WAYS), shares])
    tried = tried.clamp_min(_LEAST_TRIED)
    return tried / tried.sum(dim=-1, keepdim=True)
