"""Rules of a charter that stand by themselves: privacy, training, samples, admission, population.

`molora_fed.charter` hands their names on.
"""

from typing import Any, Literal, get_args

from pydantic import Field

from molora_fed.errors import ConfigError
from molora_fed.storage.options import Choice, Choices, name_choices
from molora_fed.storage.settings import StrictModel

__all__ = [
    "MIN_MEMBERS",
    "AdmissionRules",
    "OperatorRules",
    "PopulationRules",
    "PrivacyMode",
    "PrivacyRules",
    "SampleRules",
    "Summing",
    "TrainingRules",
    "choose_privacy",
]

# What a new cooperative is founded with where nobody chooses; its charter has them in writing. The
# core names plugins only here and in `molora_fed.charter`.
_DEFAULT_ROUTER = "evidence-mixed"
_DEFAULT_COMPARISONS = name_choices("evidence", "evidence-zero", "linear")
# The same where each round of a fit is an exchange of messages with everybody.
_DEFAULT_SUMMED = name_choices("evidence", "evidence-zero")
# The same where routers are made from published statistics, of those that can be.
_DEFAULT_PUBLISHED_ROUTER = "statistics"
_DEFAULT_PUBLISHED = name_choices("evidence-zero")
# What a key that a signed amendment leaves out has always meant.
_UNNAMED_SLOT_ROUTER = "parallel-sigmoid"
_UNNAMED_SCOPE = "per-domain"
_UNNAMED_OPERATORS = ("death", "slot-reallocation", "inheritance", "svd-mutation")

MIN_MEMBERS = 3
"""No masked total of fewer members is opened."""
PrivacyMode = Literal["pooled", "private", "statistics"]
Summing = Literal["masked", "robust"]


class PrivacyRules(StrictModel):
    """What a cooperative is founded with; see `Identity`, which has these keys of its own.

    Attributes:
        mode: What leaves contributors beside adapters.
        summing: How sums are added up.
    """

    mode: PrivacyMode = "private"
    summing: Summing = "masked"

    @property
    def router(self) -> str:
        """The router that a new cooperative publishes where nobody chooses."""
        return _DEFAULT_PUBLISHED_ROUTER if self.mode == "statistics" else _DEFAULT_ROUTER

    @property
    def comparisons(self) -> tuple[Choice, ...]:
        """Routers that a new cooperative compares where nobody chooses."""
        return {
            "pooled": _DEFAULT_COMPARISONS,
            "private": _DEFAULT_SUMMED,
            "statistics": _DEFAULT_PUBLISHED,
        }[self.mode]

    @property
    def min_members(self) -> int:
        """Fewest members whose texts can be fused."""
        return MIN_MEMBERS if self.mode != "pooled" and self.summing == "masked" else 1


class TrainingRules(StrictModel):
    """How contributors train, unless they say otherwise.

    Attributes:
        kind: Adapter kind made by `molora join`.
        rank: Rank of low-rank kinds.
        steps: Optimiser steps.
        batch: Blocks per step.
        learning_rate: Peak of AdamW's rate; None takes the kind's default.
        validate_every: Steps between validations.
        patience: Validations without improvement before stopping.
        options: Options of the kind, e.g. {"precision": "int8"}; unknown keys are refused by it.
    """

    kind: str = "svd"
    rank: int = Field(default=64, ge=1)
    steps: int = Field(default=1400, ge=1)
    batch: int = Field(default=4, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    validate_every: int = Field(default=100, ge=1)
    patience: int = Field(default=4, ge=1)
    # Left out where empty, so that amendments signed before there were any still verify.
    options: dict[str, Any] = Field(default={}, exclude_if=lambda options: not options)


class SampleRules(StrictModel):
    """Blocks each contributor sends under the pooled privacy mode; nothing else leaves.

    Attributes:
        calibration: Blocks the routers are fitted on.
        admission: Blocks the coordinator measures a contribution on before admitting it.
        held_out: Blocks of the reported figures.
    """

    calibration: int = Field(default=150, ge=0)
    admission: int = Field(default=32, ge=1)
    held_out: int = Field(default=160, ge=1)


class AdmissionRules(StrictModel):
    """Thresholds of the built-in admission checks.

    Attributes:
        max_loss_rise: Largest own-domain loss above the base's on the admission sample, nats.
        checks: Registered checks to run beside the core's own, which always run.
        max_start_gap: Largest difference between the loss that a contributor states of the model
            it started from and the base's, measured on the same blocks, nats.
    """

    max_loss_rise: float = Field(default=0.05, ge=0)
    checks: Choices = ()
    max_start_gap: float = Field(default=0.005, ge=0)


def choose_privacy(name: str, mode: str | None, summing: str | None) -> PrivacyRules:
    """What somebody chose of the privacy of a new cooperative; the usual of the rest.

    Args:
        name: The cooperative's, for errors.
        mode: None if not chosen.
        summing: Likewise.

    Raises:
        ConfigError: If there is no such mode or way, or texts are pooled and not summed.
    """
    known = {"mode": get_args(PrivacyMode), "summing": get_args(Summing)}
    chosen = {what: value for what, value in (("mode", mode), ("summing", summing)) if value}
    for what, value in chosen.items():
        if value not in known[what]:
            option = {"mode": "privacy", "summing": "summing"}[what]
            raise ConfigError(
                f"Cannot create '{name}': expected --{option} {' or '.join(known[what])}, got "
                f"'{value[:80]}'. Choose one of these."
            )
    rules = PrivacyRules.model_validate(chosen)
    if rules.mode == "pooled" and summing:
        raise ConfigError(
            f"Cannot create '{name}': expected --summing with --privacy private, got "
            f"'{rules.mode}', where nothing is summed. Leave --summing out, or pass --privacy "
            "private."
        )
    return rules


class OperatorRules(StrictModel):
    """One lifecycle operator.

    Attributes:
        name: Its registered name.
        options: Its options; unknown keys are refused by it.
    """

    name: str
    options: dict[str, Any] = Field(default={})


class PopulationRules(StrictModel):
    """How the coordinator evolves a population out of admitted contributions.

    Attributes:
        slots: P; 0 is one a contribution.
        rank: Largest rank of a slot.
        filling: What slots beyond the contributions get.
        router: The adapter router.
        options: Its options; unknown keys are refused by it.
        scope: The fitness scope, plainly or as a `Choice` with options.
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

    slots: int = Field(default=0, ge=0, le=1024)
    rank: int = Field(default=8, ge=1)
    filling: Literal["clone", "fresh"] = "clone"
    router: str = _UNNAMED_SLOT_ROUTER
    options: dict[str, Any] = Field(default={})
    scope: Choice = Choice(name=_UNNAMED_SCOPE)
    lifecycle: tuple[OperatorRules, ...] = tuple(
        OperatorRules(name=operator) for operator in _UNNAMED_OPERATORS
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
