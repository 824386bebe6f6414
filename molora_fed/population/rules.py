"""How a cooperative evolves a population: `[amendment.population]`. Imports no torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["OperatorRules", "PopulationRules"]


class OperatorRules(BaseModel):
    """One lifecycle operator.

    Attributes:
        name: Its registered name.
        options: Its options; unknown keys are refused by it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    options: dict[str, Any] = {}


class PopulationRules(BaseModel):
    """How the coordinator evolves a population out of admitted contributions.

    Attributes:
        slots: P; 0 is one a contribution.
        rank: Largest rank of a slot.
        filling: What slots beyond the contributions get.
        router: The adapter router.
        options: Its options; unknown keys are refused by it.
        scope: The fitness scope.
        lifecycle: Operators in the order in which they run; none gives adaptation alone.
        generations: Generations with a lifecycle.
        start_steps: Adaptation steps before the first of them.
        steps: Adaptation steps of each.
        blocks_per_domain: Blocks of every domain in a step.
        learning_rate: Peak of AdamW's rate for the slots.
        router_learning_rate: The same for the router.
        guard: Whether a lifecycle is kept only if it does no harm, and on which documents.
        delta: Largest upper bound of the harm that is kept, nats.
        level: Of the bound.
        adaptation_share: Part of the calibration text that adapts.
        fitness_share: Part of it that fitness is measured on.
        guard_share: Part of it that guards.
        data: Where the text lies: "pooled", with the coordinator, as samples that contributors
            send; "private", with each contributor, who sends figures and adapted slots instead.
        rounds: Rounds of an adaptation on private text; each trains one factor of every slot at
            all contributors, and takes the mean.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    slots: int = Field(default=0, ge=0, le=1024)
    rank: int = Field(default=8, ge=1)
    filling: Literal["clone", "fresh"] = "clone"
    router: str = "parallel-sigmoid"
    options: dict[str, Any] = {}
    scope: str = "per-domain"
    lifecycle: tuple[OperatorRules, ...] = (
        OperatorRules(name="death"),
        OperatorRules(name="slot-reallocation"),
        OperatorRules(name="inheritance"),
        OperatorRules(name="svd-mutation"),
    )
    generations: int = Field(default=3, ge=0)
    start_steps: int = Field(default=100, ge=0)
    steps: int = Field(default=100, ge=0)
    blocks_per_domain: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=1e-3, ge=0)
    router_learning_rate: float = Field(default=1e-2, ge=0)
    guard: Literal["fresh", "spending", "off"] = "fresh"
    delta: float = Field(default=0.002, allow_inf_nan=False)
    level: float = Field(default=0.95, gt=0, lt=1)
    adaptation_share: float = Field(default=0.5, gt=0)
    fitness_share: float = Field(default=0.25, gt=0)
    guard_share: float = Field(default=0.25, gt=0)
    # Left out where not set, so that amendments signed before there were any still verify.
    data: Literal["pooled", "private"] = Field(
        default="pooled", exclude_if=lambda data: data == "pooled"
    )
    rounds: int = Field(default=2, ge=1, exclude_if=lambda rounds: rounds == 2)

    @property
    def guard_samples(self) -> int:
        """Disjoint guard samples that a whole evolution needs."""
        draws = {"fresh": self.generations, "spending": min(1, self.generations), "off": 0}
        return draws[self.guard]
