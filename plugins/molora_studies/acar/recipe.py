"""What the study `acar` is made of: models, what they are trained on, and tasks."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, model_validator

from molora_studies.framework.contract import StudyOptions, Task

__all__ = [
    "AcarOptions",
    "ModelSettings",
    "TrainingSettings",
    "plan_answers",
    "plan_base",
    "plan_outcomes",
    "plan_probe",
    "plan_specialists",
]

NUM_MEMBERS = 3
_FLOPS = 2e10  # of a quiet core on models as small as these, for estimates only
_LEVELS: Mapping[str, tuple[int, ...]] = {
    "arithmetic": (1,),
    "choices": (1, 2),
    "code": (1, 2, 3),
    "logic": (1, 2),
    "sequences": (1, 2),
    "sorting": (2, 3),
    "strings": (2, 3),
}
_EASY: Mapping[str, float] = {
    "arithmetic": 0.7,
    "choices": 1.0,
    "code": 1.0,
    "logic": 1.0,
    "sequences": 0.7,
    "sorting": 1.0,
    "strings": 1.0,
}
_HARD: Mapping[str, float] = {
    "arithmetic": 2.0,
    "choices": 1.0,
    "code": 1.0,
    "logic": 2.0,
    "sequences": 2.0,
    "sorting": 0.6,
    "strings": 0.8,
}
_MEMBERS: Mapping[str, Mapping[str, float]] = {
    "numbers": {"arithmetic": 3.0, "sequences": 2.0, "logic": 2.0, "sorting": 0.5},
    "symbols": {"arithmetic": 3.0, "logic": 2.0, "code": 1.0, "strings": 1.0},
    "words": {"choices": 1.5, "strings": 1.0, "sorting": 1.0, "code": 1.0},
}


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Settings):
    """A GPT-NeoX over bytes.

    Attributes:
        hidden: D.
        layers: L.
        heads: Attention heads.
        init_std: Standard deviation of initial weights.
    """

    hidden: int = 80
    layers: int = 3
    heads: int = 4
    init_std: float = 0.06


class TrainingSettings(_Settings):
    """How a model is trained on solved problems.

    Attributes:
        families: Weight of each family, equal ones if none is given; levels of a family have equal
            shares.
        steps: Optimiser steps.
        batch: Blocks per step.
        learning_rate: Peak of AdamW's rate.
        prompt_weight: Weight of a prompt's tokens in the loss; an answer's tokens have 1.
        block_size: T, tokens of a block; problems are not cut.
        problems: Problems drawn for the heaviest family, fewer for others; then they are repeated.
    """

    families: Mapping[str, float] = {}
    steps: int = 1000
    batch: int = 8
    learning_rate: float = 4e-3
    prompt_weight: float = 0.05
    block_size: int = 128
    problems: int = 24_000


class AcarOptions(StudyOptions):
    """Options.

    Attributes:
        levels: Levels of each family, in training and in tasks.
        members: Weight of each family in the training of each specialist.
        base: Base that the specialists share.
        probe: The probe; at most a quarter of a member's parameters.
        base_training: Of the base, on all families.
        probe_training: Of the probe, on all families.
        specialist_training: Of each specialist, on its member's families.
        kind: Adapter kind of the specialists.
        tasks: Test tasks of each family and level.
        calibration: Calibration tasks of each family and level.
        samples: N, samples of the probe.
        temperature: Of the probe.
        judge: What selects among members' answers; all judges are reported beside.
        threshold: Least similarity of a retrieved example in the variant UJ.
        examples: Solved problems of each family and level that are retrieved from.
    """

    levels: Mapping[str, tuple[int, ...]] = _LEVELS
    members: Mapping[str, Mapping[str, float]] = _MEMBERS
    base: ModelSettings = ModelSettings()
    probe: ModelSettings = ModelSettings(hidden=40, layers=2)
    base_training: TrainingSettings = TrainingSettings(families=_HARD, steps=6000)
    probe_training: TrainingSettings = TrainingSettings(
        families=_EASY, steps=9000, learning_rate=6e-3
    )
    specialist_training: TrainingSettings = TrainingSettings(steps=2000, learning_rate=3e-3)
    kind: str = "delta"
    tasks: int = 108
    calibration: int = 40
    samples: int = 3
    temperature: float = 0.8
    judge: str = "likelihood-base"
    threshold: float = 0.7
    examples: int = 100

    @model_validator(mode="after")
    def _knows_its_families(self) -> "AcarOptions":
        trained = [self.base_training.families, self.probe_training.families]
        named = {name for own in (*self.members.values(), *trained) for name in own}
        unknown = sorted(named - set(self.levels))
        if unknown:
            raise ValueError(f"families without levels: {', '.join(unknown)}")
        if len(self.members) != NUM_MEMBERS or not all(self.members.values()):
            raise ValueError(f"expected {NUM_MEMBERS} members with families")
        return self


def _levels(options: AcarOptions) -> dict[str, list[int]]:
    return {family: list(levels) for family, levels in sorted(options.levels.items())}


def _count_numbers(model: ModelSettings) -> int:
    return 12 * model.layers * model.hidden**2 + 2 * 257 * model.hidden


def _estimate(model: ModelSettings, training: TrainingSettings) -> float:
    tokens = training.steps * training.batch * training.block_size
    return 15 + 6.0 * _count_numbers(model) * tokens / _FLOPS + 0.008 * training.steps


def _plan_checkpoint(
    name: str, options: AcarOptions, model: ModelSettings, training: TrainingSettings, seed: int
) -> Task:
    families = dict(training.families) or dict.fromkeys(sorted(options.levels), 1.0)
    training = training.model_copy(update={"families": families})
    return Task(
        name=f"{name} D={model.hidden} steps={training.steps} seed={seed}",
        action="make-checkpoint",
        settings={
            "model": model.model_dump(mode="json"),
            "training": training.model_dump(mode="json"),
            "levels": _levels(options),
            "seed": seed,
        },
        seconds=_estimate(model, training),
    )


def plan_base(options: AcarOptions, seed: int) -> Task:
    """The base all specialists share; the task's folder holds the checkpoint in `base/`."""
    return _plan_checkpoint("base", options, options.base, options.base_training, seed)


def plan_probe(options: AcarOptions, seed: int) -> Task:
    """The probe; the task's folder holds the checkpoint in `base/`."""
    return _plan_checkpoint("probe", options, options.probe, options.probe_training, seed)


def plan_specialists(options: AcarOptions, base: Task, seed: int) -> dict[str, Task]:
    """A specialist of each member's families; each folder holds `adapter/`."""
    planned = {}
    for place, (name, families) in enumerate(sorted(options.members.items())):
        training = options.specialist_training.model_copy(update={"families": dict(families)})
        planned[name] = Task(
            name=f"specialist {name} seed={seed}",
            action="train-member",
            settings={
                "kind": options.kind,
                "training": training.model_dump(mode="json"),
                "levels": _levels(options),
                "seed": 1000 * seed + place,
            },
            needs=(base,),
            seconds=_estimate(options.base, training),
        )
    return planned


def plan_answers(options: AcarOptions, seed: int) -> Task:
    """What every model says to every task of a seed, asked or not."""
    base, probe = plan_base(options, seed), plan_probe(options, seed)
    specialists = plan_specialists(options, base, seed)
    cells = sum(len(levels) for levels in options.levels.values())
    return Task(
        name=f"answers seed={seed}",
        action="collect-answers",
        settings={
            "members": list(specialists),
            "levels": _levels(options),
            "tasks": options.tasks,
            "calibration": options.calibration,
            "samples": options.samples,
            "temperature": options.temperature,
            "examples": options.examples,
            "seed": seed,
        },
        needs=(base, probe, *specialists.values()),
        seconds=30 + 0.08 * cells * (options.tasks + options.calibration),
    )


def plan_outcomes(options: AcarOptions, seed: int) -> Task:
    """What every configuration makes of these answers."""
    return Task(
        name=f"outcomes seed={seed}",
        action="decide-all",
        settings={"threshold": options.threshold, "judge": options.judge},
        needs=(plan_answers(options, seed),),
        seconds=30,
        version=2,
    )
