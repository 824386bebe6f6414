"""The figures of a training record that reports show: typed, bounded, and read as such only."""

import contextlib
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, JsonValue, ValidationError

from molora_fed.storage.settings import UntrustedModel

__all__ = ["TrainingFigures", "check_figures", "pick_figures"]

Count = Annotated[int, Field(ge=0, le=2**53)]
"""A whole number that every reader of JSON holds exactly."""
_PLAIN = r"^[A-Za-z0-9_-]{0,64}$"


class TrainingFigures(UntrustedModel):
    """The figures of a training record that reports show; what else is in one is not read.

    Attributes:
        steps: Optimiser steps.
        tokens: Tokens read.
        threads: Torch threads.
        seconds: Wall time.
        parameters: Parameters that were trained.
        kind: Adapter kind.
        domain: Domain it was trained on.
    """

    steps: Count = 0
    tokens: Count = 0
    threads: Count = 0
    seconds: float = Field(default=0.0, ge=0, le=1e12)
    parameters: Count = 0
    kind: str = Field(default="", pattern=_PLAIN)
    domain: str = Field(default="", pattern=_PLAIN)


def check_figures(training: Mapping[str, JsonValue]) -> None:
    """Refuse a training record with malformed figures; what else is in it stays as it is.

    Raises:
        ValidationError: Naming all of them.
    """
    TrainingFigures.model_validate(
        {name: training[name] for name in TrainingFigures.model_fields.keys() & training.keys()}
    )


def pick_figures(training: Mapping[str, JsonValue]) -> dict[str, int | float | str]:
    """What a report shows of a training record, as far as it is there and well-formed.

    A record that an earlier version let in may hold anything.
    """
    found: dict[str, int | float | str] = {}
    for name in TrainingFigures.model_fields.keys() & training.keys():
        with contextlib.suppress(ValidationError):
            one = TrainingFigures.model_validate({name: training[name]})
            found |= one.model_dump(exclude_unset=True)
    return found
