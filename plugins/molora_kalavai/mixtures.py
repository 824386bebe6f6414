"""Each domain's best constant gates, and their mixture by the domains' probabilities."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["fit_mixtures", "mix_log"]

_EM_STEPS = 50
_LEAST_WEIGHT = 1e-30  # keeps logarithms finite where EM gives an expert nothing


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
