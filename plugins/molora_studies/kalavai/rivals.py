"""What could have been done instead of fusing, planned for equal cost; shared by two studies."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from molora_studies.framework.contract import Claim, StudyOptions, Task
from molora_studies.framework.substrate import (
    DEFAULT_DOMAINS,
    BaseSettings,
    Member,
    SpecialistSettings,
    plan_base,
    plan_corpus,
    plan_pooled,
    plan_specialist,
)
from molora_studies.kalavai.baselines import find_width, plan_joint, plan_whole, plan_wider
from molora_studies.kalavai.comparisons import Replicated

__all__ = [
    "TRAINED",
    "UNTUNED",
    "Rival",
    "RivalOptions",
    "claim_rivals",
    "plan_cooperative",
    "plan_rivals",
    "wide_base",
]

Rival = Literal["base_continued", "monolithic", "wider", "joint"]
"""`base_continued`: all parameters of the base trained on, on pooled text; `monolithic`: an adapter
of its linear layers, on pooled text; `wider`: the same on a base with as many parameters as base
and specialists together; `joint`: specialists and a router trained on together."""

TRAINED: Mapping[str, str] = {
    "monolithic": "linear layers, pooled text",
    "base_continued": "all parameters, pooled text",
    "pooled_lora": "one LoRA adapter, pooled text",
    "wider": "linear layers of a wider base, pooled text",
    "joint": "experts and router, pooled text",
}
"""What each rival trains, as tables and claims say it."""

UNTUNED: Mapping[str, str] = {
    "wider": "one recipe, copied from the narrow base: neither the wide base's rate nor that of "
    "its training on pooled text was tried, where routers had several recipes; no verdict until "
    "they are tuned on validation text",
    "joint": "one length, one share of the rate tried twice on 120 steps, where routers had "
    "several recipes; no verdict until it is tuned on validation text",
}
"""Rivals whose recipe had fewer tries than ours, and why: their figures carry no verdict."""


class RivalOptions(StudyOptions):
    """Options of studies that compare a cooperative with its rivals.

    Attributes:
        base: The base.
        domains: One contributor each.
        steps: Steps of a specialist; rivals but `joint` take as many as all specialists together.
        joint_steps: Steps of `joint` after the specialists' own; each runs every expert.
        rivals: Which are trained; a wider base exists for the built-in base only.
        calibration: Calibration blocks of each domain.
        held_out: Held-out blocks of each domain.
    """

    base: BaseSettings = BaseSettings()
    domains: tuple[str, ...] = Field(default=DEFAULT_DOMAINS, min_length=2)
    steps: int = Field(default=600, ge=1)
    joint_steps: int = Field(default=300, ge=1)
    rivals: tuple[Rival, ...] = ("base_continued", "monolithic", "wider", "joint")
    calibration: int = Field(default=150, ge=1)
    held_out: int = Field(default=160, ge=1)

    @property
    def total_steps(self) -> int:
        """Steps of all specialists together."""
        return self.steps * len(self.domains)

    @property
    def chosen(self) -> tuple[Rival, ...]:
        """Rivals that this base can have."""
        return tuple(r for r in self.rivals if r != "wider" or self.base.source == "builtin")


def plan_cooperative(options: RivalOptions, seed: int) -> tuple[Task, list[Member]]:
    """The base, and one specialist a domain, named after it."""
    base = plan_base(options.base)
    recipe = SpecialistSettings(steps=options.steps, seed=seed)
    members = []
    for domain in options.domains:
        corpus = plan_corpus(base, domain)
        members.append(Member(domain, plan_specialist(base, corpus, recipe), corpus))
    return base, members


def wide_base(options: RivalOptions) -> BaseSettings:
    """The base with as many parameters as the cooperative, trained on the same tokens."""
    width = find_width(options.base, len(options.domains))
    return options.base.model_copy(update={"hidden": width, "threads": 1})


def plan_rivals(
    options: RivalOptions, base: Task, members: Sequence[Member], seed: int
) -> Mapping[str, Task]:
    """Tasks of the chosen rivals by name.

    Args:
        options: The study's options.
        base: The cooperative's base.
        members: Its contributors.
        seed: Of data order; all share one base, wide or not.
    """
    corpora = [member.corpus for member in members]
    steps, held_out = options.total_steps, options.held_out
    planned: dict[str, Task] = {}
    for rival in options.chosen:
        if rival == "monolithic":
            recipe = SpecialistSettings(steps=steps, seed=seed)
            planned[rival] = plan_pooled(base, corpora, recipe)
        elif rival == "base_continued":
            planned[rival] = plan_whole(base, corpora, steps=steps, seed=seed, held_out=held_out)
        elif rival == "wider":
            wide = plan_base(wide_base(options))
            planned[rival] = plan_wider(
                base, wide, corpora, steps=steps, seed=seed, held_out=held_out
            )
        else:
            planned[rival] = plan_joint(
                base, members, steps=options.joint_steps, seed=seed, held_out=held_out
            )
    return planned


_RIVAL_CLAIMS = {
    ("linear", "wider"): (
        "A wider model of as many parameters beats the linear fusion", "+10.87 % beside +7.72 %",
    ),
    ("evidence", "wider"): (
        "A wider model of as many parameters beats our fusion", "+10.87 % beside +7.72 %",
    ),
    ("evidence", "joint"): (
        "Joint training of experts and router beats our fusion",
        "ours: meant as the upper bound of fusing as in BTX",
    ),
}  # fmt: skip


def claim_rivals(differences: Mapping[tuple[str, str], Replicated]) -> list[Claim]:
    """Claims about rivals that were not tuned: their figures, without a verdict.

    Args:
        differences: Loss of the fusion minus the rival's in nats, by router label and rival.
    """
    return [
        Claim(
            text,
            published,
            f"{label} - {rival}: {differences[label, rival].show('nats', 4)}",
            "not tuned",
            differences[label, rival].unit,
            UNTUNED[rival],
        )
        for (label, rival), (text, published) in _RIVAL_CLAIMS.items()
        if (label, rival) in differences
    ]
