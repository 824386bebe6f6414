"""The rounds of an evolution on private texts, as the charter alone decides them.

One step on one block is that block's gradient. So a question names its place in the evolution, and
nothing else: coordinator and contributors each find steps, batch, rates and factor in the charter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from molora_fed.charter import Amendment
from molora_fed.errors import PopulationError
from molora_fed.population.adaptation import Factor
from molora_fed.population.adaptation_config import AdaptationConfig
from molora_fed.population.setup import build_config

__all__ = [
    "MIN_ADAPTATION_BLOCKS",
    "PlannedRound",
    "count_limits",
    "plan_rounds",
    "split_rounds",
]

MAX_ROUNDS = 10_000
"""Rounds of one evolution; each is an exchange with everybody."""
MIN_ADAPTATION_BLOCKS = 8
"""Blocks of a contributor that a round trains on at least, before what it learned is sent."""


@dataclass(frozen=True)
class PlannedRound:
    """A round of an adaptation.

    Attributes:
        config: Its steps, batch, rates and place in the whole run.
        factor: The factor of every slot that it trains.
        branches: Branches that are adapted at this place: with a guard, lifecycle and twin.
    """

    config: AdaptationConfig
    factor: Factor
    branches: int = 1


def split_rounds(config: AdaptationConfig, rounds: int, *, batch: int) -> list[PlannedRound]:
    """Cut an adaptation into rounds.

    B is trained first: while a fresh slot's B is zero, its A has no gradient.

    Args:
        config: The whole adaptation.
        rounds: How many rounds; no more than there are steps.
        batch: Blocks of each contributor in a step.
    """
    rounds = min(rounds, config.steps)
    if rounds == 0:
        return []
    edges = [config.steps * turn // rounds for turn in range(rounds + 1)]
    return [
        PlannedRound(
            replace(
                config,
                batch=batch,
                steps=edges[turn + 1] - edges[turn],
                first_step=config.first_step + edges[turn],
                total_steps=config.whole,
            ),
            "b" if turn % 2 == 0 else "a",
        )
        for turn in range(rounds)
    ]


def plan_rounds(amendment: Amendment, *, threads: int) -> dict[int, PlannedRound]:
    """All rounds of an evolution by their first step in the whole run, as the charter has them.

    Args:
        amendment: The charter's.
        threads: Torch threads.

    Raises:
        PopulationError: If there are too many rounds, or one would train on too few blocks.
    """
    rules = amendment.population
    if (rules.generations + 1) * rules.rounds > MAX_ROUNDS:
        raise PopulationError(
            f"Cannot take part with private texts: expected at most {MAX_ROUNDS} rounds, got "
            f"{rules.rounds} in each of {rules.generations} generations. Ask the coordinator."
        )
    config = build_config(rules, 1, seed=amendment.seed, threads=threads)
    planned = {}
    for generation in range(rules.generations + 1):
        schedule = config.schedule(generation)
        branches = 2 if generation and rules.guard != "off" else 1
        for one in split_rounds(schedule, rules.rounds, batch=rules.blocks_per_domain):
            planned[one.config.first_step] = replace(one, branches=branches)
    fewest = min((one.config.steps * one.config.batch for one in planned.values()), default=0)
    if planned and fewest < MIN_ADAPTATION_BLOCKS:
        raise PopulationError(
            f"Cannot take part with private texts: expected {MIN_ADAPTATION_BLOCKS} blocks at "
            "least in each round of adaptation, so that no block can be told from what is sent, "
            f"got {fewest}. Ask the coordinator for more steps or blocks, or fewer rounds."
        )
    return planned


def count_limits(amendment: Amendment, rounds: Mapping[int, PlannedRound]) -> dict[str, int]:
    """How often each place of one evolution may be asked, each time with another population.

    Args:
        amendment: The charter's.
        rounds: From `plan_rounds`.
    """
    rules = amendment.population
    limits = {"fitness": rules.generations, "gates": rules.generations + 1, "held-out": 1}
    limits |= {f"adapt {step}": one.branches for step, one in rounds.items()}
    each = 1 if rules.guard == "fresh" else rules.generations
    return limits | {f"guard {sample}": each for sample in range(rules.guard_samples)}
