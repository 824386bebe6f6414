"""Cooperatives in which routers may collapse: languages the base never saw, and near-twins."""

from collections.abc import Mapping, Sequence
from typing import Any

from molora_fed.types import Mixture
from molora_studies.framework.contract import Task
from molora_studies.framework.substrate import (
    FusionSettings,
    Member,
    SpecialistSettings,
    plan_base,
    plan_corpus,
    plan_fusion,
    plan_specialist,
)

__all__ = [
    "AS_PUBLISHED",
    "LANGUAGES",
    "LOST_NATS",
    "ROUTERS",
    "WITH_DEFAULT",
    "count_excess",
    "plan_languages",
    "plan_part",
    "plan_twins",
]

LOST_NATS = 0.05
"""A domain whose fused loss is this far above its best expert's is lost: the router collapsed."""

LANGUAGES = ("de", "fr", "nl", "pt", "ru", "uk")
"""Languages whose manual pages most machines have; two pairs of them are close relatives."""

ROUTERS: Mapping[str, Mapping[str, Any]] = {
    "uniform": {},
    "linear": {},
    "linear-base": {"router": "linear", "input": "base_hidden"},
    "linear-curriculum": {"router": "linear", "curriculum": 0.2},
    "linear-noncausal": {},
    "mlp": {},
    "hard": {},
    "dispatch": {},
    "statistics": {},
    "evidence-zero": {},
    "evidence": {},
    "evidence-share": {},
    "evidence-hidden": {},
}
"""Every router by label, fused as this project does but for the guard, which is counted apart."""

WITH_DEFAULT: Mapping[str, Mapping[str, Any]] = {**ROUTERS, "evidence-mixed": {}}
"""And the default router, which is younger than what study `collapse` has kept."""

AS_PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "linear-noncausal": {},
    "linear-noncausal-curriculum": {"router": "linear-noncausal", "curriculum": 0.2},
}
"""The paper's router and its remedy, fused as published: logits mixed, no base among experts."""


def plan_languages(
    name: str,
    languages: Sequence[str],
    others: Sequence[str],
    seed: int,
    *,
    steps: int,
    routers: Mapping[str, Mapping[str, Any]] = ROUTERS,
    as_published: bool = False,
) -> Task:
    """Specialists of manual pages in several languages, and of other domains, fused.

    Args:
        name: For people.
        languages: Suffixes of the domains `man-...`.
        others: Further domains, which the base was trained on.
        seed: Of specialists, routers and bootstrap.
        steps: Of a specialist.
        routers: Routers by label.
        as_published: Whether logits are mixed and the base is no expert.
    """
    base = plan_base()
    domains = [*(f"man-{language}" for language in languages), *others]
    corpora = {domain: plan_corpus(base, domain) for domain in domains}
    return _plan(name, base, corpora, seed, steps, routers, as_published)


def plan_twins(
    name: str,
    domain: str,
    others: Sequence[str],
    seed: int,
    *,
    steps: int,
    routers: Mapping[str, Mapping[str, Any]] = ROUTERS,
) -> Task:
    """Two specialists of halves of one domain, each a domain of its own, and others, fused.

    Args:
        name: For people.
        domain: Is halved by near-duplicate cluster.
        others: Further domains.
        seed: Of specialists, routers and bootstrap.
        steps: Of a specialist.
        routers: Routers by label.
    """
    base = plan_base()
    corpora = {f"{domain}-{part + 1}": plan_part(base, domain, part, 2) for part in range(2)}
    corpora |= {other: plan_corpus(base, other) for other in others}
    return _plan(name, base, corpora, seed, steps, routers, as_published=False)


def plan_part(base: Task, domain: str, part: int, parts: int) -> Task:
    """Blocks of a part of a domain as a domain of its own, "python-1" for example."""
    return Task(
        name=f"corpus {domain}-{part + 1}",
        action="prepare-part",
        settings={
            "domain": f"{domain}-{part + 1}",
            "of": domain,
            "shard": [part, parts],
            "block_size": base.settings.get("block_size", 128),
        },
        needs=(base,),
        seconds=15,
    )


def _plan(
    name: str,
    base: Task,
    corpora: Mapping[str, Task],
    seed: int,
    steps: int,
    routers: Mapping[str, Mapping[str, Any]],
    as_published: bool,
) -> Task:
    recipe = SpecialistSettings(steps=steps, seed=seed)
    members = [
        Member(domain, plan_specialist(base, corpus, recipe), corpus)
        for domain, corpus in corpora.items()
    ]
    mixture: Mixture = "logit" if as_published else "probability"
    settings = FusionSettings(
        routers=routers,
        guarded=False,
        mixture=mixture,
        base_expert=not as_published,
        seed=seed,
    )
    return plan_fusion(name, base, members, settings)


def count_excess(result: Mapping[str, Any], label: str, *, has_base: bool) -> dict[str, float]:
    """Held-out loss of a router above the best expert's, nats by domain.

    Args:
        result: Of a fusion task.
        label: The router's.
        has_base: Whether the base is among the experts.
    """
    losses = result["held_out"]
    experts = [*losses["specialists"].values(), *([losses["base"]] if has_base else [])]
    return {
        domain: losses["fused"][label][domain] - min(each[domain] for each in experts)
        for domain in losses["domains"]
    }
