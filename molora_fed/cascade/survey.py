"""A survey beside a run: every member asked on every task, so that configurations compare.

What it asks is recorded apart from the decision and is no part of the decision's cost.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from molora_fed.cascade.attribution import (
    compute_entropy,
    compute_similarities,
    decide_without,
)
from molora_fed.cascade.contract import CascadeTask, Sample
from molora_fed.cascade.escalation import Decision, Lineup, decide
from molora_fed.cascade.records import parse_record
from molora_fed.cascade.running import Cascade, ask

__all__ = ["CASCADE", "ORACLE", "survey_task"]

CASCADE, ORACLE = "cascade", "oracle"
NUM_PAIR = 2
_OUTCOME = ("mode", "winner", "answer", "correct", "cost")


def survey_task(cascade: Cascade, body: Mapping[str, Any]) -> dict[str, Any]:
    """Ask the members that the decision did not need, and decide in every configuration.

    Configurations: each member alone, the first two always, all always, the cascade as it is and
    without each of its models, and the oracle, which is right where anyone is and costs all.

    Args:
        cascade: The cascade.
        body: Of the task's "decision" record.

    Returns:
        Body of a "survey" record: samples that were asked beside, and by configuration winner,
        answer, whether it is right, and cost.
    """
    recorded = parse_record(body)
    task, rules = recorded.task, cascade.rules(recorded.task)
    samples = recorded.member_samples
    extra = {}
    for name in cascade.lineup.members:
        if name not in samples:
            extra[name] = _ask_member(cascade, name, task, recorded.prompt)
    everyone = {**samples, **extra}
    probe = recorded.probe_samples

    def settle(lineup: Lineup) -> Decision:
        return decide(
            task,
            lineup,
            probe if lineup.probe else (),
            everyone,
            rules,
            models=cascade.models,
            seed=recorded.judge_seed,
        )

    members, lineup = cascade.lineup.members, cascade.lineup
    found = {f"single:{name}": settle(Lineup(None, (name,))) for name in members}
    if len(members) > 1:
        found[f"arena-{NUM_PAIR}"] = settle(Lineup(None, members[:NUM_PAIR]))
    if len(members) > NUM_PAIR:
        found[f"arena-{len(members)}"] = settle(Lineup(None, members))
    names = [*([lineup.probe] if lineup.probe else []), *members]
    if len(names) > 1:
        for name in names:
            found[f"without:{name}"] = decide_without(
                name,
                task,
                lineup,
                probe,
                everyone,
                rules,
                models=cascade.models,
                seed=recorded.judge_seed,
            )
    outcomes = {name: _describe(one) for name, one in found.items()}
    outcomes[CASCADE] = {key: body[key] for key in _OUTCOME}
    outcomes[ORACLE] = _find_oracle(outcomes, members)
    answers = {name: found[f"single:{name}"].answer for name in members}
    texts = {name: everyone[name].text for name in members}
    return {
        "task": task.id,
        "family": task.family,
        "samples": [{"model": name, **asdict(one)} for name, one in extra.items()],
        "outcomes": outcomes,
        "proxies": {
            "similarity": compute_similarities(texts) if len(texts) > 1 else {},
            "entropy": compute_entropy(list(answers.values())),
        },
    }


def _ask_member(cascade: Cascade, name: str, task: CascadeTask, prompt: str) -> Sample:
    (sample,) = ask(cascade.models[name], cascade.build_requests(name, "member", task.id, prompt))
    return sample


def _describe(decision: Decision) -> dict[str, Any]:
    values = {**vars(decision), "cost": asdict(decision.cost)}
    return {key: values[key] for key in _OUTCOME}


def _find_oracle(
    outcomes: Mapping[str, Mapping[str, Any]], members: tuple[str, ...]
) -> dict[str, Any]:
    """Right where the cascade or any member is; it costs what all members cost."""
    alone = [outcomes[f"single:{name}"] for name in members]
    candidates = [outcomes[CASCADE], *alone]
    best = next((one for one in candidates if one["correct"]), candidates[0])
    costs = [one["cost"] for one in alone]
    total = {key: sum(cost[key] for cost in costs) for key in best["cost"]}
    return {**best, "mode": "full_arena", "cost": total}
