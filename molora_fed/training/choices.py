"""What a contributor may choose for its own training; nothing here imports torch."""

from pydantic import Field

from molora_fed.charter import TrainingRules
from molora_fed.storage.settings import StrictModel

__all__ = ["TrainingChoices"]

MAX_ACCUMULATION = 4_096


class TrainingChoices(StrictModel):
    """Settings of one contributor's training; what is None is the charter's.

    All are kept in the training record of its manifest, but `checkpointing`, which changes no
    result.

    Attributes:
        steps: Optimiser steps.
        batch: Blocks per step.
        learning_rate: Peak of AdamW's rate.
        validate_every: Steps between validations.
        accumulation: Parts in which a step's batch is computed: less memory, the same result but
            for rounding.
        checkpointing: Whether activations are computed again for the gradient instead of kept:
            much less memory, a third more time, the same result.
    """

    steps: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    validate_every: int | None = Field(default=None, ge=1)
    accumulation: int = Field(default=1, ge=1, le=MAX_ACCUMULATION)
    checkpointing: bool = False

    def describe(self) -> dict[str, float]:
        """What is chosen, as far as it changes the result; empty where nothing is."""
        chosen = self.model_dump(exclude={"checkpointing"}, exclude_none=True)
        if self.accumulation == 1:
            del chosen["accumulation"]
        return chosen

    def over(self, rules: TrainingRules) -> TrainingRules:
        """A charter's rules with what is chosen here in their place."""
        chosen = self.model_dump(exclude={"accumulation", "checkpointing"}, exclude_none=True)
        return rules.model_copy(update=chosen)
