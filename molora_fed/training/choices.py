"""What a contributor may choose for its own training; nothing here imports torch."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from molora_fed.charter import TrainingRules
from molora_fed.errors import ConfigError
from molora_fed.storage.settings import StrictModel

__all__ = ["TrainingChoices"]

MAX_ACCUMULATION = 4_096


class TrainingChoices(StrictModel):
    """Settings of one contributor's training; what is None is the charter's.

    All are kept in the training record of its manifest, but `checkpointing`, which changes no
    result, and `launcher`, of which the number of processes is kept.

    Attributes:
        steps: Optimiser steps.
        batch: Blocks per step.
        learning_rate: Peak of AdamW's rate.
        validate_every: Steps between validations.
        accumulation: Parts in which a step's batch is computed: less memory, the same result but
            for rounding.
        checkpointing: Whether activations are computed again for the gradient instead of kept:
            much less memory, a third more time, the same result.
        reset_documents: Whether each document of a block is trained on as if it stood alone: its
            tokens see no other, and its positions start at 0.
        launcher: Command that starts the training's processes, e.g. "accelerate launch
            --multi_gpu"; empty trains in this one.
    """

    steps: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    validate_every: int | None = Field(default=None, ge=1)
    accumulation: int = Field(default=1, ge=1, le=MAX_ACCUMULATION)
    checkpointing: bool = False
    reset_documents: bool = False
    launcher: str = ""

    @field_validator("launcher")
    @classmethod
    def _can_be_split(cls, value: str) -> str:
        shlex.split(value)  # its ValueError says what is missing
        return value

    def split_launcher(self) -> list[str]:
        """Words of the launcher's command, the first a program that is there; none without one.

        Of a program in several places, the one of this Python's environment is taken: what it
        starts has to find this package.

        Raises:
            ConfigError: If there is no such program.
        """
        words = shlex.split(self.launcher)
        if not words:
            return []
        found = shutil.which(words[0], path=str(Path(sys.executable).parent))
        found = found or shutil.which(words[0])
        if found is None:
            raise ConfigError(
                f"Cannot train with the launcher '{words[0]}': expected a program of this machine, "
                "got none of that name. Install it, or give its whole path."
            )
        return [found, *words[1:]]

    def describe(self) -> dict[str, Any]:
        """What is chosen, as far as it changes the result; empty where nothing is."""
        chosen = self.model_dump(exclude={"checkpointing", "launcher"}, exclude_none=True)
        for name, usual in (("accumulation", 1), ("reset_documents", False)):
            if chosen[name] == usual:
                del chosen[name]
        return chosen

    def over(self, rules: TrainingRules) -> TrainingRules:
        """A charter's rules with what is chosen here in their place."""
        chosen = self.model_dump(include=set(TrainingRules.model_fields), exclude_none=True)
        return rules.model_copy(update=chosen)
