"""Plain values that cross rooms. Imports neither torch nor numpy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

__all__ = [
    "Document",
    "Finding",
    "Forecast",
    "GainPredictor",
    "LossMatrix",
    "Mixture",
    "Progress",
    "Reading",
    "Reference",
    "Split",
]

Reading = Literal["base_hidden", "prefix_hidden", "mean_hidden", "experts_hidden", "evidence"]
"""What a router may read of a view; the bank makes only the columns that are read."""

Mixture = Literal["probability", "logit"]
"""How experts' distributions are combined by gates."""

Reference = Literal["best_alone", "best_specialist"]
"""What a gain is measured against: min(base, best specialist), or the best specialist."""


class Split(StrEnum):
    """The five splits of a corpus; a near-duplicate cluster lies in exactly one."""

    TRAIN = "train"
    VALIDATION = "validation"
    CALIBRATION = "calibration"
    ADMISSION = "admission"
    HELD_OUT = "held-out"


@dataclass(frozen=True)
class Document:
    """One text of a domain.

    Attributes:
        name: Where it came from, relative to its source; unique within the domain.
        text: Decoded text.
    """

    name: str
    text: str


@dataclass(frozen=True)
class LossMatrix:
    """Losses of the base and of every specialist on every domain, in nats per token.

    Attributes:
        domains: Domain names in reporting order.
        base: Loss of the base by domain.
        specialists: Loss by specialist name and domain.
        own_domain: The domain each specialist was trained on, by specialist name.
    """

    domains: tuple[str, ...]
    base: Mapping[str, float]
    specialists: Mapping[str, Mapping[str, float]]
    own_domain: Mapping[str, str]


@dataclass(frozen=True)
class Forecast:
    """A predicted fusion gain in percent against `reference`.

    Attributes:
        reference: What the gain is measured against.
        point: Predicted gain, percent; None if only an interval is claimed.
        low: Lower end of the interval, percent; None if the evidence does not suffice.
        high: Upper end, percent; None likewise.
        level: Nominal coverage of the interval in (0, 1); None if there is no interval.
        note: One sentence on where the interval comes from.
    """

    reference: Reference
    point: float | None
    low: float | None
    high: float | None
    level: float | None
    note: str


GainPredictor = Callable[[LossMatrix], Forecast | None]
"""Registered by `register_gain_predictors`; None when it does not apply to the matrix."""


@dataclass(frozen=True)
class Finding:
    """What an admission check found wrong.

    Attributes:
        expected: What the charter or the base asks for.
        found: What the contribution has.
        fix: One thing the contributor can do, a full sentence.
        quarantine: True if a person should look at it, False if it is refused for good.
    """

    expected: str
    found: str
    fix: str
    quarantine: bool = False


class Progress(Protocol):
    """Receives progress of long work; the command line draws it, tests ignore it."""

    def __call__(self, done: int, total: int, **fields: float | str) -> None:
        """Report `done` of `total` units, with named figures such as loss=2.31."""
