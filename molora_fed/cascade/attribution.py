"""What each model is worth, task by task; and the survey that asks every member to find out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import log
from typing import Any

from molora_fed.cascade.contract import CascadeModel, CascadeTask, Sample
from molora_fed.cascade.escalation import Decision, Lineup, Rules, decide
from molora_fed.cascade.records import parse_record
from molora_fed.cascade.retrieval import compute_vectors
from molora_fed.cascade.running import Cascade, ask

__all__ = [
    "CASCADE",
    "ORACLE",
    "compute_entropy",
    "compute_similarities",
    "decide_without",
    "leave_one_out",
    "survey_task",
]


def decide_without(
    name: str,
    task: CascadeTask,
    lineup: Lineup,
    probe_samples: Sequence[Sample],
    member_samples: Mapping[str, Sample],
    rules: Rules,
    *,
    models: Mapping[str, CascadeModel] | None = None,
    seed: int = 0,
) -> Decision:
    """The decision of the same cascade without one model; all members must have been asked.

    Without the probe every member answers; without a member the others move up, so that another
    may verify.

    Args:
        name: The model left out.
        task: The task.
        lineup: Who takes part.
        probe_samples: Of the probe.
        member_samples: One of every member.
        rules: What decides.
        models: All models by name, for judges that ask.
        seed: Of the judge.

    Raises:
        CascadeError: If a sample that is needed is missing.
    """
    if name == lineup.probe:
        left = replace(lineup, probe=None)
    else:
        left = replace(lineup, members=tuple(one for one in lineup.members if one != name))
    return decide(task, left, probe_samples, member_samples, rules, models=models, seed=seed)


def leave_one_out(
    task: CascadeTask,
    lineup: Lineup,
    probe_samples: Sequence[Sample],
    member_samples: Mapping[str, Sample],
    rules: Rules,
    *,
    models: Mapping[str, CascadeModel] | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Value of each model on one task: 1 if the answer is right only with it, -1 only without.

    Args:
        task: The task; its right answer must be known.
        lineup: Who takes part; at least two models.
        probe_samples: Of the probe.
        member_samples: One of every member, asked or not.
        rules: What decides.
        models: All models by name, for judges that ask.
        seed: Of the judge.

    Returns:
        Correct with all less correct without, by name.

    Raises:
        CascadeError: If a sample that is needed is missing.
    """
    given = (task, lineup, probe_samples, member_samples, rules)
    whole = bool(decide(*given, models=models, seed=seed).correct)
    names = [*([lineup.probe] if lineup.probe else []), *lineup.members]
    without = {
        name: bool(
            decide_without(
                name,
                task,
                lineup,
                probe_samples,
                member_samples,
                rules,
                models=models,
                seed=seed,
            ).correct
        )
        for name in names
    }
    return {name: whole - right for name, right in without.items()}


def compute_similarities(texts: Mapping[str, str]) -> dict[str, float]:
    """Mean similarity of each text to the others: a proxy of value that needs no right answer.

    Args:
        texts: What each model said, at least two.

    Returns:
        Mean cosine of hashed three-character pieces, in [0, 1], by name.
    """
    vectors = compute_vectors(list(texts.values()))
    cosines = vectors @ vectors.T  # (models, models)
    others = max(1, len(texts) - 1)
    return {
        name: float((row.sum() - row[at]) / others)
        for at, (name, row) in enumerate(zip(texts, cosines, strict=True))
    }


def compute_entropy(answers: Sequence[str | None]) -> float:
    """Entropy of the distribution of answers, nats: the other proxy.

    Args:
        answers: Canonical answers; each None is an answer of its own.
    """
    if not answers:
        return 0.0
    counts = [*Counter(one for one in answers if one is not None).values()]
    counts += [1] * sum(one is None for one in answers)
    return -sum(count / len(answers) * log(count / len(answers)) for count in counts)


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
