"""From the probe's agreement to the probability that an answer is right, fitted on held-out tasks.

One ridge logistic regression a mode: shared coefficients, and deviations of each family that are
drawn to zero. Strength of the draw and the frontier of costs come from tasks that were left out of
the fit (five folds, by task id), so that a budget holds on tasks nobody has seen.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from molora_acar.calibration_table import Calibration, Features, Frontier, describe_cells
from molora_fed.cascade.contract import MODES, Mode, ProbeEvidence
from molora_fed.errors import ConfigError

__all__ = ["Observation", "fit_calibration"]

_FOLDS = 5
_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)
_SHARED_STRENGTH = 0.05
_MAX_RATES = 200
_MIN_TASKS = 50

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """What became of one calibration task in every mode.

    Attributes:
        evidence: What the probe said.
        correct: Whether the answer of each mode was right.
        cost: Of each mode in any one unit, probe included.
    """

    evidence: ProbeEvidence
    correct: Mapping[Mode, bool]
    cost: Mapping[Mode, float]


def fit_calibration(observations: Sequence[Observation]) -> Calibration:
    """Fit a table on tasks whose answers are known and that no reported result uses.

    Args:
        observations: At least 50, of at least five tasks, each with every mode; the same task under
            several seeds is one task: it is left out whole.

    Returns:
        The table; the same observations give the same one, in whatever order they come.

    Raises:
        ConfigError: If there are too few, or one lacks a mode.

    Source: own derivation, see docs/extractors_judges.md.
    """
    _check(observations)
    ordered = sorted(observations, key=_order)
    features = Features.fit([one.evidence for one in ordered])
    rows = np.stack([features.vector(one.evidence) for one in ordered])  # (N, F)
    right = np.array([[one.correct[mode] for mode in MODES] for one in ordered], dtype=float)
    cost = np.array([[one.cost[mode] for mode in MODES] for one in ordered], dtype=float)
    folds = np.array([_fold(one.evidence.task.id) for one in ordered])
    strength = min(_STRENGTHS, key=lambda one: _left_out_loss(rows, right, folds, features, one))
    left_out = _predict_left_out(rows, right, folds, features, strength)  # (N, modes)
    fits = [_fit(rows, right[:, place], features, strength) for place in range(len(MODES))]
    families = np.array([one.evidence.task.family for one in ordered])
    costs = {mode: _mean_by_family(cost[:, place], families) for place, mode in enumerate(MODES)}
    expected = np.array([[costs[mode][one] for mode in MODES] for one in families])
    sigma_places = [_sigma_place(one.evidence.sigma) for one in ordered]
    every = np.arange(len(ordered))
    return Calibration(
        num_tasks=len({one.evidence.task.id for one in ordered}),
        num_observations=len(ordered),
        strength=strength,
        features=features,
        coefficients={mode: fits[place][0].tolist() for place, mode in enumerate(MODES)},
        covariance={mode: fits[place][1].tolist() for place, mode in enumerate(MODES)},
        costs=costs,
        frontier=_trace_frontier(left_out, expected, right, cost),
        sigma_cost=float(cost[every, sigma_places].mean()),
        sigma_accuracy=float(right[every, sigma_places].mean()),
        cells=describe_cells([(one.evidence, one.correct["single_agent"]) for one in ordered]),
    )


def _check(observations: Sequence[Observation]) -> None:
    ids = {one.evidence.task.id for one in observations}
    if len(observations) < _MIN_TASKS or len({_fold(one) for one in ids}) < _FOLDS:
        raise ConfigError(
            f"Cannot fit a calibration: expected at least {_MIN_TASKS} observations in all "
            f"{_FOLDS} folds, got {len(observations)} of {len(ids)} tasks. Sample more tasks."
        )
    for one in observations:
        if set(one.correct) != set(MODES) or set(one.cost) != set(MODES):
            raise ConfigError(
                f"Cannot fit a calibration for task '{one.evidence.task.id}': expected the modes "
                f"{', '.join(MODES)}, got {', '.join(sorted({*one.correct} & {*one.cost}))}. "
                "Give rightness and cost of every mode."
            )
        if not all(np.isfinite(value) and value >= 0 for value in one.cost.values()):
            raise ConfigError(
                f"Cannot fit a calibration for task '{one.evidence.task.id}': expected costs from "
                f"0 up, got {dict(one.cost)}. Correct them."
            )


def _order(one: Observation) -> tuple[Any, ...]:
    answers = tuple((answer is None, answer or "") for answer in one.evidence.answers)
    correct = tuple(one.correct[mode] for mode in MODES)
    return one.evidence.task.id, answers, correct, tuple(one.cost[mode] for mode in MODES)


def _fold(task_id: str) -> int:
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:8], "big") % _FOLDS


def _sigma_place(sigma: float) -> int:
    """Place of the mode that the sigma policy takes."""
    return 0 if sigma == 0 else 2 if sigma == 1 else 1


def _mean_by_family(values: Floats, families: NDArray[np.str_]) -> dict[str, float]:
    means = {str(one): float(values[families == one].mean()) for one in sorted(set(families))}
    return {**means, "": float(values.mean())}


def _fit(rows: Floats, right: Floats, features: Features, strength: float) -> tuple[Floats, Floats]:
    """Coefficients (F,) of a penalised logistic regression, and their covariance (F, F)."""
    penalty = np.where(features.is_shared(), _SHARED_STRENGTH, strength)

    def loss(weights: Floats) -> tuple[float, Floats]:
        logits = rows @ weights
        value = np.logaddexp(0, logits).sum() - right @ logits + 0.5 * penalty @ weights**2
        return float(value), rows.T @ (expit(logits) - right) + penalty * weights

    def curvature(weights: Floats) -> Floats:
        chance = expit(rows @ weights)
        return (rows * (chance * (1 - chance))[:, None]).T @ rows + np.diag(penalty)

    start = np.zeros(rows.shape[1])
    found = minimize(loss, start, jac=True, hess=curvature, method="trust-exact")
    best: Floats = np.asarray(found.x, dtype=float)
    return best, np.asarray(np.linalg.inv(curvature(best)), dtype=float)


def _predict_left_out(
    rows: Floats, right: Floats, folds: NDArray[np.int_], features: Features, strength: float
) -> Floats:
    """Probability (N, modes) of each row by the fit on the other folds."""
    chances = np.empty_like(right)
    for fold in range(_FOLDS):
        out = folds == fold
        for place in range(right.shape[1]):
            weights, _ = _fit(rows[~out], right[~out, place], features, strength)
            chances[out, place] = expit(rows[out] @ weights)
    return chances


def _left_out_loss(
    rows: Floats, right: Floats, folds: NDArray[np.int_], features: Features, strength: float
) -> float:
    """Mean log loss of rows that were left out, nats."""
    chances = _predict_left_out(rows, right, folds, features, strength).clip(1e-6, 1 - 1e-6)
    return float(-np.mean(right * np.log(chances) + (1 - right) * np.log1p(-chances)))


def _trace_frontier(
    chances: Floats, expected: Floats, right: Floats, cost: Floats
) -> tuple[Frontier, ...]:
    """Mean cost and accuracy of left-out rows at every rate that changes a choice."""
    rates = [0.0]
    for cheap, dear in ((0, 1), (0, 2), (1, 2)):
        more = expected[:, dear] - expected[:, cheap]
        gain = chances[:, dear] - chances[:, cheap]
        rates.extend((gain / np.where(more == 0, 1, more))[(more > 0) & (gain > 0)].tolist())
    distinct = np.unique(rates)
    if len(distinct) > _MAX_RATES:
        distinct = np.unique(np.quantile(distinct, np.linspace(0, 1, _MAX_RATES)))
    every = np.arange(len(right))
    rows = []
    for rate in [*distinct.tolist(), float(distinct[-1]) * 2 + 1e-300]:
        places = np.argmax(chances - rate * expected, axis=1)
        rows.append(
            Frontier(
                rate=rate,
                cost=float(cost[every, places].mean()),
                accuracy=float(right[every, places].mean()),
            )
        )
    return tuple(rows)
