"""The fitted table of the calibrated policy: what it holds, how it is read and what it says."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from scipy.special import expit, ndtri
from scipy.stats import binomtest

from molora_fed.cascade.contract import MODES, Mode, ProbeEvidence
from molora_fed.errors import ConfigError, StorageError
from molora_fed.storage.files import write_bytes

__all__ = [
    "Calibration",
    "Cell",
    "Features",
    "Frontier",
    "Probability",
    "describe_cells",
    "load_calibration",
    "save_calibration",
]

_MAX_BYTES = 16 * 2**20
_CONFIDENCE = 0.95


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Probability(_Part):
    """A probability with its 95 % interval.

    Attributes:
        point: The estimate.
        low: Lower end.
        high: Upper end.
    """

    point: float
    low: float
    high: float


class Cell(_Part):
    """How often the probe was right at one agreement in one family.

    Attributes:
        family: Of the tasks.
        agreeing: Samples that gave the commonest answer.
        samples: Samples drawn.
        right: Tasks whose commonest answer was right.
        tasks: Tasks in the cell.
        low: Lower end of the share's 95 % interval (Wilson).
        high: Upper end.
    """

    family: str
    agreeing: int
    samples: int
    right: int
    tasks: int
    low: float
    high: float


class Frontier(_Part):
    """What the calibration tasks cost at one rate, each by a fit without its fold.

    Attributes:
        rate: Probability of being right that one unit of cost must bring.
        cost: Mean cost of a task.
        accuracy: Share of tasks answered rightly.
    """

    rate: FiniteFloat
    cost: FiniteFloat
    accuracy: FiniteFloat


class Features(_Part):
    """What a prediction is made from: agreement, lengths and family; never the level.

    Attributes:
        families: With coefficients of their own; any other family has the shared ones alone.
        prompt_length: Mean and deviation of log(1 + characters of the prompt).
        answer_length: The same of the commonest answer.
    """

    families: tuple[str, ...]
    prompt_length: tuple[FiniteFloat, FiniteFloat]
    answer_length: tuple[FiniteFloat, FiniteFloat]

    @classmethod
    def fit(cls, evidence: Sequence[ProbeEvidence]) -> "Features":
        """Families and scales of calibration tasks."""
        return cls(
            families=tuple(sorted({one.task.family for one in evidence})),
            prompt_length=_scale([math.log1p(len(one.task.prompt)) for one in evidence]),
            answer_length=_scale([math.log1p(len(_commonest(one)[0] or "")) for one in evidence]),
        )

    def vector(self, evidence: ProbeEvidence) -> NDArray[np.float64]:
        """The features of a task, shape (F,)."""
        answer, agreeing = _commonest(evidence)
        total = len(evidence.answers)
        missing = sum(one is None for one in evidence.answers)
        own = np.array(
            [
                1.0,
                agreeing / total,
                float(agreeing == total),
                _standardise(len(evidence.task.prompt), self.prompt_length),
                _standardise(len(answer or ""), self.answer_length),
                missing / total,
            ]
        )
        deviations = [own * (evidence.task.family == family) for family in self.families]
        return np.concatenate([own, *deviations])

    def is_shared(self) -> NDArray[np.bool_]:
        """Whether each feature is shared by all families, shape (F,)."""
        count = 6
        return np.arange(count * (1 + len(self.families))) < count


class Calibration(_Part):
    """A fitted table.

    Attributes:
        format: Version of the file.
        num_tasks: Tasks it was fitted on.
        num_observations: Their observations, several seeds counted apart.
        strength: How strongly families are drawn together.
        features: What predictions are made from.
        coefficients: Of each mode, (F,).
        covariance: Of the coefficients, (F, F).
        costs: Mean cost by mode and family; "" is the mean of all.
        frontier: By rising rate.
        sigma_cost: Mean cost of the sigma policy on the same observations.
        sigma_accuracy: Its share of right answers.
        cells: The probe's agreement and rightness, counted.
    """

    format: int = 1
    num_tasks: int
    num_observations: int
    strength: FiniteFloat
    features: Features
    coefficients: dict[Mode, tuple[FiniteFloat, ...]]
    covariance: dict[Mode, tuple[tuple[FiniteFloat, ...], ...]]
    costs: dict[Mode, dict[str, FiniteFloat]]
    frontier: tuple[Frontier, ...]
    sigma_cost: FiniteFloat
    sigma_accuracy: FiniteFloat
    cells: tuple[Cell, ...]

    def probability(self, evidence: ProbeEvidence, mode: Mode = "single_agent") -> Probability:
        """Probability that a mode's answer is right, with the interval of the fit (Laplace).

        For "single_agent" it is the probability that the probe's agreed answer is right.
        """
        vector = self.features.vector(evidence)
        logit = float(vector @ np.array(self.coefficients[mode]))
        spread = float(np.sqrt(vector @ np.array(self.covariance[mode]) @ vector))
        reach = float(ndtri(0.5 + _CONFIDENCE / 2)) * spread
        low, point, high = (float(expit(logit + one)) for one in (-reach, 0.0, reach))
        return Probability(point=point, low=low, high=high)

    def rate(self, budget: float | None = None) -> float:
        """The lowest rate at which left-out calibration tasks cost no more than a budget.

        Args:
            budget: Mean cost of a task; None for what the sigma policy costs.

        Raises:
            ConfigError: If even the probe alone costs more.
        """
        limit = self.sigma_cost if budget is None else budget
        for one in self.frontier:
            if one.cost <= limit * (1 + 1e-12):
                return one.rate
        raise ConfigError(
            f"Cannot keep a budget of {limit:g} a task: expected at least "
            f"{self.frontier[-1].cost:g}, what the probe alone costs. Raise the budget."
        )

    def choose(self, evidence: ProbeEvidence, rate: float) -> Mode:
        """The mode of highest probability less rate times cost; of equals, the cheapest."""
        vector = self.features.vector(evidence)

        def worth(mode: Mode) -> float:
            means = self.costs[mode]
            cost = means.get(evidence.task.family, means[""])
            return float(expit(vector @ np.array(self.coefficients[mode]))) - rate * cost

        return max(MODES, key=worth)


def describe_cells(rows: Sequence[tuple[ProbeEvidence, bool]]) -> tuple[Cell, ...]:
    """Count how often the probe's commonest answer is right, by family and agreement.

    Args:
        rows: What the probe said, and whether its commonest answer is right.
    """
    counts: Counter[tuple[str, int, int]] = Counter()
    hits: Counter[tuple[str, int, int]] = Counter()
    for evidence, right in rows:
        key = (evidence.task.family, len(evidence.answers), _commonest(evidence)[1])
        counts[key] += 1
        hits[key] += right
    cells = []
    for key in sorted(counts):
        interval = binomtest(hits[key], counts[key]).proportion_ci(_CONFIDENCE, method="wilson")
        cells.append(
            Cell(
                family=key[0],
                samples=key[1],
                agreeing=key[2],
                right=hits[key],
                tasks=counts[key],
                low=float(interval.low),
                high=float(interval.high),
            )
        )
    return tuple(cells)


def save_calibration(path: Path, calibration: Calibration) -> None:
    """Write a table as JSON; the same table gives the same bytes.

    Raises:
        StorageError: On I/O errors.
    """
    write_bytes(path, calibration.model_dump_json(indent=1).encode() + b"\n")


def load_calibration(path: Path) -> Calibration:
    """Read a table.

    Raises:
        StorageError: If it cannot be read.
        ConfigError: If it is not a table, or its parts do not fit one another.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise StorageError(
            f"Cannot read calibration '{path}': {error.strerror}. Correct the path."
        ) from error
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"expected at most {_MAX_BYTES} bytes, got more")
        calibration = Calibration.model_validate_json(data)
        _check(calibration)
    except ValueError as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
        raise ConfigError(f"Cannot read calibration '{path}': {reason}. Fit it again.") from error
    return calibration


def _check(calibration: Calibration) -> None:
    size = len(calibration.features.is_shared())
    if calibration.format != 1:
        raise ValueError(f"expected format 1, got {calibration.format}")
    for name in ("coefficients", "covariance", "costs"):
        if set(getattr(calibration, name)) != set(MODES):
            raise ValueError(f"{name}: expected the modes {', '.join(MODES)}")
    for mode in MODES:
        square = calibration.covariance[mode]
        if len(calibration.coefficients[mode]) != size or {len(square), *map(len, square)} != {
            size
        }:
            raise ValueError(f"{mode}: expected {size} coefficients and their covariance")
        if "" not in calibration.costs[mode]:
            raise ValueError(f"{mode}: expected a mean cost of all tasks")
    if not calibration.frontier:
        raise ValueError("expected a frontier, got none")


def _commonest(evidence: ProbeEvidence) -> tuple[str | None, int]:
    """The answer most samples gave, the earliest of equals, and how many gave it."""
    votes = Counter(one for one in evidence.answers if one is not None)
    return votes.most_common(1)[0] if votes else (None, 0)


def _scale(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values)) or 1.0


def _standardise(length: int, scale: tuple[float, float]) -> float:
    # Lengths far from any calibration task would carry a prediction to 0 or 1.
    return float(np.clip((math.log1p(length) - scale[0]) / scale[1], -3.0, 3.0))
