"""Plain values that cross folders. Imports neither torch nor numpy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol, get_args

from molora_fed.errors import ConfigError

__all__ = [
    "ADAPTER_FILES",
    "BASE_EXPERT",
    "CONFIG_FILES",
    "TOKENIZER_FILES",
    "WEIGHTS_INDEX",
    "AdapterFile",
    "Case",
    "Document",
    "ExpertsPerText",
    "Finding",
    "Forecast",
    "GainPredictor",
    "LossMatrix",
    "LossOn",
    "Markup",
    "Mixture",
    "OnMemory",
    "Outcome",
    "Progress",
    "Reading",
    "Reference",
    "Span",
    "Split",
    "Verdict",
]

BASE_EXPERT = "base"
"""Name of the base as an expert; no contributor may have it."""

AdapterFile = Literal["adapter_config.json", "adapter_model.safetensors", "molora_adapter.json"]
"""Names of an adapter's files: PEFT's two, and what PEFT has no place for."""

ADAPTER_FILES: tuple[AdapterFile, ...] = get_args(AdapterFile)
"""The only file names an adapter may have, so that no name from outside becomes a path."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
CONFIG_FILES = ("config.json", "generation_config.json")
WEIGHTS_INDEX = "model.safetensors.index.json"
"""Files of a base checkpoint beside its weights; the weights are safetensors of any name."""

Reading = Literal["base_hidden", "prefix_hidden", "mean_hidden", "experts_hidden", "evidence"]
"""What a router may read of a view; the bank makes only the columns that are read."""

Mixture = Literal["probability", "logit"]
"""How experts' distributions are combined by gates."""

ExpertsPerText = int | Literal["merged"]
"""Who goes on with a text after its prompt: so many experts, or all merged into one model."""

Reference = Literal["best_alone", "best_specialist"]
"""What a gain is measured against: min(base, best specialist), or the best specialist."""


class Split(StrEnum):
    """The five splits of a corpus; a near-duplicate cluster lies in exactly one."""

    TRAIN = "train"
    VALIDATION = "validation"
    CALIBRATION = "calibration"
    ADMISSION = "admission"
    HELD_OUT = "held-out"


LossOn = Literal["all", "assistant"]
"""Tokens that count in a training loss: all, or those of the assistant's messages and responses."""

Span = tuple[int, int]
"""A part of a text: its first character, and the first one after it."""


@dataclass(frozen=True)
class Markup:
    """What the parts of a chat, or of an instruction with its response, are.

    Attributes:
        special: Parts that are special tokens of a chat template, one token each; the same
            characters anywhere else are text.
        frame: Parts that a template or a system message adds to every chat; they are not compared
            when near-duplicates are searched.
        answers: Parts that the assistant says; only their tokens count in a training loss. The
            end-of-text token counts with a part that ends the text. None: all tokens count.
    """

    special: tuple[Span, ...] = ()
    frame: tuple[Span, ...] = ()
    answers: tuple[Span, ...] | None = None


@dataclass(frozen=True)
class Document:
    """One text of a domain.

    Attributes:
        name: Where it came from, relative to its source; unique within the domain.
        text: Decoded text.
        markup: What its parts are; None for plain text.
    """

    name: str
    text: str
    markup: Markup | None = None

    @property
    def compared(self) -> str:
        """The text that is compared with others' to find near-duplicates: without any frame."""
        if self.markup is None or not self.markup.frame:
            return self.text
        pieces, start = [], 0
        for first, end in self.markup.frame:
            pieces.append(self.text[start:first])
            start = end
        return "\n".join([*pieces, self.text[start:]])


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
class Case:
    """What a gain is forecast from.

    Attributes:
        losses: Losses that are known; of a specialist, the one on its own domain at least.
        group: The condition without its seed: runs of one group are never evidence for each other.
            Empty if unknown.
        pilots: Losses of specialists after a small share of the steps, under the same names;
            None without pilots.
        is_extrapolated: Whether `losses` are extrapolated from the pilots, not measured.
        share: Share of the planned steps that the pilots had, in (0, 1); None without pilots.
    """

    losses: LossMatrix
    group: str = ""
    pilots: LossMatrix | None = None
    is_extrapolated: bool = False
    share: float | None = None


@dataclass(frozen=True)
class Outcome:
    """A past case and what its fusion gained.

    Attributes:
        case: What was known before.
        gains: Measured fusion gain in percent, by reference.
    """

    case: Case
    gains: Mapping[Reference, float]


Verdict = Literal["go", "small", "no"]
"""Whether to fuse: the whole interval is above zero; a gain is likely but not sure; none is."""


_NOTE_CHARACTERS = 500


@dataclass(frozen=True)
class Forecast:
    """A predicted fusion gain in percent against `reference`; checked when it is made.

    Attributes:
        reference: What the gain is measured against.
        point: Predicted gain, percent; None if only an interval is claimed.
        low: Lower end of the interval, percent; None if the evidence does not suffice.
        high: Upper end, percent; None likewise. low <= point <= high where they are there.
        level: Nominal coverage of the interval in (0, 1); None if there is no interval.
        note: One sentence on where the interval comes from, one line of at most 500 characters.
        floor: Mean divergence in percent from which on the predictor expects a gain; None if it
            knows none.

    Raises:
        ConfigError: If it claims what cannot be: an interval without its point or without a level,
            a number that is not finite, an unknown reference, a note of several lines.
    """

    reference: Reference
    point: float | None
    low: float | None
    high: float | None
    level: float | None
    note: str
    floor: float | None = None

    def __post_init__(self) -> None:
        faults = self._find_faults()
        if faults:
            raise ConfigError(
                "Cannot make a forecast: expected a known reference, finite numbers with low <= "
                f"point <= high, a level in (0, 1) and one line as note, got {'; '.join(faults)}. "
                "Correct the predictor."
            )

    def _find_faults(self) -> list[str]:
        faults = []
        if self.reference not in get_args(Reference):
            faults.append(f"reference {self.reference!r}")
        numbers = {n: getattr(self, n) for n in ("low", "point", "high", "level", "floor")}
        given = {n: value for n, value in numbers.items() if value is not None}
        wrong = [n for n, value in given.items() if not _is_finite(value)]
        faults += [f"{name} {given[name]!r}" for name in wrong]
        if not wrong:
            ordered = [given[n] for n in ("low", "point", "high") if n in given]
            if ordered != sorted(ordered):
                faults.append(f"low {self.low}, point {self.point}, high {self.high}")
            if self.level is not None and not 0 < self.level < 1:
                faults.append(f"level {self.level}")
            if self.level is None and {"low", "high"} & given.keys():
                faults.append("an interval without a level")
        if not isinstance(self.note, str) or len(self.note.splitlines()) > 1:
            faults.append("a note that is not one line")
        elif len(self.note) > _NOTE_CHARACTERS:
            faults.append(f"a note of {len(self.note)} characters")
        return faults

    @property
    def verdict(self) -> Verdict | None:
        """What follows; None if nothing is claimed, and never "go" without an interval."""
        ends = [value for value in (self.low, self.high) if value is not None]
        if self.point is None and not ends:
            return None
        if (self.point if self.point is not None else max(ends)) <= 0:
            return "no"
        return "go" if self.low is not None and self.low > 0 else "small"


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]


GainPredictor = Callable[[Case, Sequence[Outcome]], Forecast | None]
"""Registered by `register_gain_predictors`: forecasts a case from it and from past outcomes, of
which none is of the case's own group. None when it does not apply."""


@dataclass(frozen=True)
class Finding:
    """What an admission check found wrong.

    Attributes:
        expected: What the charter or the base asks for.
        found: What the contribution has.
        fix: One thing the contributor can do, a full sentence.
        quarantine: True if a person should look at it, False if it is refused for good.
        is_note: True if it is only said: the contribution is judged as if it were not there.
    """

    expected: str
    found: str
    fix: str
    quarantine: bool = False
    is_note: bool = False


OnMemory = Callable[[int, int], None]
"""Told the bytes that work needs, about, and the bytes that are free, before it starts."""


class Progress(Protocol):
    """Receives progress of long work; the command line draws it, tests ignore it."""

    def __call__(self, done: int, total: int, **fields: float | str) -> None:
        """Report `done` of `total` units, with named figures such as loss=2.31."""
