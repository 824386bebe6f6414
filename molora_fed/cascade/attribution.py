"""What each model is worth: the answer with it against the answer without it, task by task."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log

from molora_fed.cascade.contract import CascadeModel, CascadeTask, Sample
from molora_fed.cascade.escalation import Decision, Lineup, Rules, decide
from molora_fed.cascade.retrieval import compute_vectors

__all__ = ["compute_entropy", "compute_similarities", "decide_without", "leave_one_out"]


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
