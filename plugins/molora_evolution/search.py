"""Search on the routing channel: evolution strategies and gradient, on one objective.

Both minimise a loss over a vector of parameters that is measured on a new batch at every update.
An evaluation is one such measurement; both take as many as they are told. The gradient's has a
backward pass besides (about two forward passes more), and sees a new batch at every evaluation;
the evolution strategy compares all perturbations of an update on one batch.

Source: antithetic evolution strategies with centred ranks (arXiv 1703.03864, section 2), steps by
Adam (arXiv 1412.6980); which search the paper (arXiv 2605.11153) used is not known.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from molora_fed.bank.states import BaseStates, take_balanced
from molora_fed.errors import PopulationError
from molora_fed.models.base import Base
from molora_fed.models.states import evaluating
from molora_fed.population.adaptation import compute_loss
from molora_fed.population.contract import AdapterRouter, Population
from molora_fed.population.mixture import Mixture
from molora_fed.storage.seeds import derive_seed

__all__ = [
    "Objective",
    "SearchConfig",
    "SearchResult",
    "search_by_evolution",
    "search_by_gradient",
    "search_router",
]

Objective = Callable[[Tensor, int], Tensor]
"""Loss of parameters (n,) on the batch of an update, a scalar; differentiable for the gradient."""


@dataclass(frozen=True)
class SearchConfig:
    """Settings of a search.

    Attributes:
        evaluations: Measurements of the objective in all; for the evolution strategy a multiple
            of 2 * `pairs`.
        learning_rate: Adam's rate.
        seed: Of the perturbations.
        pairs: Pairs of opposite perturbations per update of the evolution strategy.
        spread: Standard deviation of a perturbation, in units of the parameters.
    """

    evaluations: int
    learning_rate: float = 0.02
    seed: int = 0
    pairs: int = 8
    spread: float = 0.1


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found and what it took.

    Attributes:
        parameters: Where it ended, (n,); the last ones, none are chosen by loss.
        losses: Mean loss of each update's evaluations, in order, measured before the update.
        evaluations: Measurements of the objective.
        forward_passes: The same in forward passes, a backward pass counted as two.
    """

    parameters: Tensor
    losses: tuple[float, ...]
    evaluations: int
    forward_passes: int


def search_by_gradient(objective: Objective, start: Tensor, config: SearchConfig) -> SearchResult:
    """Minimise by gradient: one evaluation and one step of Adam per update.

    Args:
        objective: What is minimised; update u measures it on batch u.
        start: Parameters to start from, (n,).
        config: Settings; pairs and spread play no part.

    Raises:
        PopulationError: If the settings cannot be used, or a loss is not finite.
    """
    _check(config, 1)
    parameters, optimizer = _prepare(start, config)
    losses = []
    for update in range(config.evaluations):
        optimizer.zero_grad()
        loss = objective(parameters, update)
        loss.backward()
        losses.append(_check_finite(float(loss.detach()), update))
        optimizer.step()
    found = parameters.detach().clone()
    return SearchResult(found, tuple(losses), config.evaluations, 3 * config.evaluations)


@torch.no_grad()
def search_by_evolution(objective: Objective, start: Tensor, config: SearchConfig) -> SearchResult:
    """Minimise by an antithetic evolution strategy.

    An update draws `pairs` perturbations e_j from N(0, 1), measures the loss at x + spread e_j and
    at x - spread e_j, replaces the 2 `pairs` losses by their centred ranks r in [-1/2, 1/2], and
    gives Adam the estimate sum_j (r+_j - r-_j) e_j / (2 pairs spread).

    Args:
        objective: What is minimised; all evaluations of update u measure it on batch u.
        start: Parameters to start from, (n,).
        config: Settings.

    Raises:
        PopulationError: If the settings cannot be used, or a loss is not finite.
    """
    _check(config, 2 * config.pairs)
    parameters, optimizer = _prepare(start, config)
    losses = []
    for update in range(config.evaluations // (2 * config.pairs)):
        noise = _draw(config, update, parameters)  # (pairs, n)
        measured = np.empty((config.pairs, 2))
        for row, perturbation in zip(measured, config.spread * noise, strict=True):
            row[0] = float(objective(parameters + perturbation, update))
            row[1] = float(objective(parameters - perturbation, update))
        losses.append(_check_finite(float(measured.mean()), update))
        ranks = (rankdata(measured, axis=None).reshape(measured.shape) - 1) / (measured.size - 1)
        weights = torch.from_numpy(ranks[:, 0] - ranks[:, 1]).to(parameters)  # r+ - r-
        parameters.grad = weights @ noise / (2 * config.pairs * config.spread)
        optimizer.step()
    found = parameters.detach().clone()
    return SearchResult(found, tuple(losses), config.evaluations, config.evaluations)


def _prepare(start: Tensor, config: SearchConfig) -> tuple[Tensor, torch.optim.Optimizer]:
    parameters = start.detach().clone().requires_grad_(True)
    return parameters, torch.optim.Adam([parameters], lr=config.learning_rate)


def _draw(config: SearchConfig, update: int, like: Tensor) -> Tensor:
    """The perturbations of an update: a pure function of (seed, update), (pairs, n)."""
    state = derive_seed(config.seed, update)
    generator = torch.Generator().manual_seed(state)
    return torch.randn((config.pairs, like.numel()), generator=generator).to(like)


def _check_finite(loss: float, update: int) -> float:
    if not math.isfinite(loss):
        raise PopulationError(
            f"Cannot search: expected finite losses, got {loss} at update {update}. "
            "Lower the learning rate or the spread."
        )
    return loss


def _check(config: SearchConfig, per_update: int) -> None:
    positive = ("evaluations", "learning_rate", "pairs", "spread")
    problems = [
        f"{name} {getattr(config, name)}" for name in positive if getattr(config, name) <= 0
    ]
    if not problems and config.evaluations % per_update:
        problems.append(f"{config.evaluations} evaluations of {per_update} per update")
    if problems:
        raise PopulationError(
            "Cannot search: expected positive settings and whole updates, got "
            f"{'; '.join(problems)}. Correct these."
        )


def search_router(
    search: Callable[[Objective, Tensor, SearchConfig], SearchResult],
    base: Base,
    population: Population,
    router: AdapterRouter,
    states: Sequence[BaseStates],
    config: SearchConfig,
    *,
    batch: int,
    seed: int,
) -> tuple[AdapterRouter, SearchResult]:
    """Search a router's parameters; the adapters stay as they are.

    The router's temperature stays where it is, so that all searches see one landscape.

    Args:
        search: `search_by_evolution` or `search_by_gradient`.
        base: The base; its model runs where it lies.
        population: The slots.
        router: Where the search starts; it stays as it is.
        states: The base over each domain's training blocks, with what the router reads.
        config: Settings of the search.
        batch: Blocks per evaluation, a multiple of the number of domains.
        seed: Of the data order; update u measures the batch that (seed, u) gives.

    Returns:
        The router found, on the CPU, and what it took.

    Raises:
        PopulationError: If the settings, the slots or the batch cannot be used, or a loss is not
            finite.
    """
    device = next(base.model.parameters()).device
    mixture = Mixture(base.model, population).to(device).requires_grad_(False)
    found = deepcopy(router).to(device).eval()
    names = [name for name, _ in found.named_parameters()]
    shapes = [p.shape for p in found.parameters()]
    sizes = [p.numel() for p in found.parameters()]

    def measure(vector: Tensor, update: int) -> Tensor:
        pieces = vector.split(sizes)
        values = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        rows = take_balanced(states, update, batch=batch, seed=seed, device=device)
        return compute_loss(
            base.model, mixture, lambda view: functional_call(found, values, (view,)), rows
        )

    start = parameters_to_vector(found.parameters()).detach()
    with evaluating(base.model):
        result = search(measure, start, config)
    vector_to_parameters(result.parameters, found.parameters())
    return found.cpu(), result
