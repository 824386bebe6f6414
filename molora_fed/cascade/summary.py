"""What runs of a cascade say: accuracy by cost, escalation, agreement, latency, with intervals."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, bootstrap, spearmanr

from molora_fed.cascade.attribution import CASCADE
from molora_fed.cascade.contract import MODES, EscalationPolicy
from molora_fed.errors import CascadeError
from molora_fed.plugins import get_plugins
from molora_fed.tracing.reading import read_records

__all__ = [
    "RunRecords",
    "compute_bootstrap_interval",
    "compute_correlation",
    "compute_share",
    "label_run",
    "read_run",
    "summarise_runs",
]


RESAMPLES = 2_000


def compute_share(hits: int, total: int) -> dict[str, float]:
    """A share with its 95 % Wilson interval.

    Args:
        hits: How many.
        total: Of how many, at least 1.

    Returns:
        point, low, high in [0, 1].
    """
    interval = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    return {"point": hits / total, "low": float(interval.low), "high": float(interval.high)}


def compute_bootstrap_interval(values: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """A mean with its 95 % bootstrap interval (percentile).

    Args:
        values: One a task, at least one.
        seed: Of the resampling.

    Returns:
        point, low, high.
    """
    sample = np.asarray(values, dtype=float)
    point = float(sample.mean())
    if np.ptp(sample) == 0:
        return {"point": point, "low": point, "high": point}
    interval = bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=100,
    ).confidence_interval
    return {"point": point, "low": float(interval.low), "high": float(interval.high)}


def compute_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one of the two never changes.

    Args:
        first: Values.
        second: As many values.
    """
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


TRACE_FOLDER = "trace"
MAX_REASONS = 20


@dataclass
class RunRecords:
    """What a summary needs of one run.

    Attributes:
        run: Body of its "run" record.
        decisions: By task, without texts.
        surveys: By task, if members were asked beside.
        models: Samples, cost and failures of each model.
        states: States the run went through.
    """

    run: dict[str, Any]
    decisions: dict[str, dict[str, Any]] = field(default_factory=dict)
    surveys: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)


def read_run(path: Path) -> RunRecords:
    """Read a run's trace.

    Args:
        path: Folder of a run, of its trace, or an exported trace.

    Raises:
        CascadeError: If it holds no run of a cascade, or a record is malformed.
        TraceError: If the trace cannot be read.
    """
    inner = path / TRACE_FOLDER
    found: RunRecords | None = None
    try:
        for record in read_records(inner if inner.is_dir() else path):
            if record.kind == "run" and found is None:
                found = RunRecords(dict(record.body))
            elif found is not None:
                _take(found, record.kind, record.body)
    except (KeyError, TypeError, AttributeError) as error:
        raise CascadeError(
            f"Cannot read run '{path}': expected records of `molora cascade run`, got "
            f"{type(error).__name__}: {error}. Verify the trace."
        ) from error
    if found is None or not found.decisions:
        raise CascadeError(
            f"Cannot read run '{path}': expected decisions of a cascade, got none. "
            "Run `molora cascade run`."
        )
    return found


def _take(found: RunRecords, kind: str, body: Mapping[str, Any]) -> None:
    match kind:
        case "state":
            found.states.append(str(body["state"]))
        case "survey":
            found.surveys[body["task"]] = {k: body[k] for k in ("outcomes", "proxies")}
        case "decision":
            kept = ("family", "level", "sigma", "mode", "winner", "answer", "correct", "cost")
            one = {key: body[key] for key in kept}
            one["seconds"] = body.get("seconds")
            one["agreed"] = _find_agreed(body)
            found.decisions[body["task"]] = one
            _count_samples(found.models, body)


def _find_agreed(body: Mapping[str, Any]) -> bool | None:
    """Whether the answer that all probe samples gave is right; None if they did not agree."""
    answers = [one["answer"] for one in body["samples"] if one["role"] == "probe"]
    if not answers or body["sigma"] != 0 or body["right"] is None:
        return None
    return bool(answers[0] == body["right"])


def _count_samples(models: dict[str, dict[str, Any]], body: Mapping[str, Any]) -> None:
    asked = [(one["model"], one) for one in body["samples"]]
    for call in body["judge"]["calls"]:
        asked += [(call["model"], one) for one in call["samples"]]
    for name, sample in asked:
        empty = {"samples": 0, "failed": 0, "flops": 0.0, "price": 0.0, "won": 0, "failures": {}}
        one = models.setdefault(name, empty)
        one["samples"] += 1
        one["flops"] += sample["flops"]
        one["price"] += sample["price"]
        if sample["failure"] is not None:
            one["failed"] += 1
            reason = str(sample["failure"])
            if reason in one["failures"] or len(one["failures"]) < MAX_REASONS:
                one["failures"][reason] = one["failures"].get(reason, 0) + 1
    if body["winner"] in models:
        models[body["winner"]]["won"] += 1


def label_run(run: Mapping[str, Any]) -> str:
    """The name a run goes by in tables.

    Args:
        run: Body of its "run" record.
    """
    if run["probe"] is None:
        members = run["members"]
        return f"single:{members[0]}" if len(members) == 1 else f"arena-{len(members)}"
    name, retrieval = str(run["policy"]["name"]), run["retrieval"] is not None
    policies = get_plugins().escalation_policies
    own = ""
    if name in policies.names():  # a trace may come from where another plugin is installed
        policy: type[EscalationPolicy] = policies.resolve(name)
        own = policy.label_with_retrieval if retrieval else policy.label
    return own or f"{name}{' with retrieval' if retrieval else ''}"


def _describe_outcomes(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy and mean cost of one configuration."""
    known = [one["correct"] for one in outcomes if one["correct"] is not None]
    return {
        "tasks": len(outcomes),
        "accuracy": compute_share(sum(known), len(known)) if known else None,
        "flops": float(np.mean([one["cost"]["flops"] for one in outcomes])),
        "price": float(np.mean([one["cost"]["price"] for one in outcomes])),
        "samples": float(np.mean([one["cost"]["samples"] for one in outcomes])),
    }


def _list_configurations(found: RunRecords, label: str) -> dict[str, dict[str, Any]]:
    listed = {label: _describe_outcomes(list(found.decisions.values()))}
    names = next(iter(found.surveys.values()))["outcomes"] if found.surveys else ()
    for name in names:
        if name != CASCADE and not name.startswith("without:"):
            outcomes = [one["outcomes"][name] for one in found.surveys.values()]
            listed.setdefault(name, _describe_outcomes(outcomes))
    return listed


def summarise_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Numbers of one run, and of others over the same tasks beside it.

    Args:
        folders: Of runs; the first is the subject.

    Returns:
        JSON values; shares come with 95 % Wilson intervals, attribution with bootstrap intervals
        by task.

    Raises:
        CascadeError: If a run cannot be read, or is over other tasks.
        TraceError: If a trace cannot be read.
    """
    runs = [read_run(folder) for folder in folders]
    first = runs[0]
    label = label_run(first.run)
    configurations = _list_configurations(first, label)
    for folder, other in zip(folders[1:], runs[1:], strict=True):
        if other.run["tasks"] != first.run["tasks"]:
            raise CascadeError(
                f"Cannot compare run '{folder}': expected the tasks of '{folders[0]}', got others. "
                "Run both over one file."
            )
        for name, one in _list_configurations(other, label_run(other.run)).items():
            free = name if name not in configurations else f"{name} ({folder.name})"
            if name == label_run(other.run) or name not in configurations:
                configurations[free] = one
    return {
        "label": label,
        "run": {key: first.run[key] for key in _DESCRIBED},
        "states": first.states,
        "configurations": configurations,
        "families": _summarise_families(first),
        "sigma": _count_sigma(first),
        "modes": _summarise_modes(first),
        "agreement": _summarise_agreement(first),
        "latency": _summarise_latency(first),
        "models": {name: first.models[name] for name in sorted(first.models)},
        "attribution": _summarise_attribution(first),
    }


_DESCRIBED = (
    "probe",
    "members",
    "models",
    "policy",
    "judge",
    "settings",
    "retrieval",
    "tasks",
    "environment_details",
)


def _summarise_families(found: RunRecords) -> dict[str, Any]:
    families: dict[str, list[dict[str, Any]]] = {}
    for one in found.decisions.values():
        families.setdefault(one["family"], []).append(one)
    return {
        name: {
            **_describe_outcomes(decisions),
            "modes": {mode: sum(one["mode"] == mode for one in decisions) for mode in MODES},
            "agreed_wrong": sum(one["agreed"] is False for one in decisions),
        }
        for name, decisions in sorted(families.items())
    }


def _count_sigma(found: RunRecords) -> list[dict[str, float]]:
    """How often each value of sigma came, lowest first."""
    counts = Counter(one["sigma"] for one in found.decisions.values() if one["sigma"] is not None)
    return [{"sigma": float(value), "tasks": counts[value]} for value in sorted(counts)]


def _summarise_modes(found: RunRecords) -> dict[str, Any]:
    parts = {
        mode: [one for one in found.decisions.values() if one["mode"] == mode] for mode in MODES
    }
    return {mode: _describe_outcomes(part) for mode, part in parts.items() if part}


def _summarise_agreement(found: RunRecords) -> dict[str, Any] | None:
    """How often the probe agreed on a wrong answer, of agreements and of all tasks.

    A policy may rescue some of these by escalating nonetheless; `kept` are those it did not.
    """
    judged = [one for one in found.decisions.values() if one["agreed"] is not None]
    known = sum(one["correct"] is not None for one in found.decisions.values())
    if not judged:
        return None
    wrong = [one for one in judged if one["agreed"] is False]
    return {
        "agreed": len(judged),
        "wrong": len(wrong),
        "kept": sum(one["correct"] is False for one in wrong),
        "of_agreed": compute_share(len(wrong), len(judged)),
        "of_all": compute_share(len(wrong), known),
    }


def _summarise_latency(found: RunRecords) -> dict[str, dict[str, float]]:
    """Seconds from the first question to the decision, by mode."""
    by_mode: dict[str, list[float]] = {}
    for one in found.decisions.values():
        if one["seconds"] is not None:
            by_mode.setdefault(one["mode"], []).append(float(one["seconds"]))
    found_modes = [mode for mode in MODES if mode in by_mode]
    return {
        mode: {
            name: float(np.quantile(by_mode[mode], level))
            for name, level in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))
        }
        for mode in found_modes
    }


def _summarise_attribution(found: RunRecords) -> dict[str, Any] | None:
    """Mean value of each model, and how well proxies that need no answer follow it."""
    surveyed = [
        one for one in found.surveys.values() if one["outcomes"][CASCADE]["correct"] is not None
    ]
    names = (
        [name for name in surveyed[0]["outcomes"] if name.startswith("without:")]
        if surveyed
        else []
    )
    if not names:
        return None
    values = {
        name.removeprefix("without:"): np.array(
            [
                int(one["outcomes"][CASCADE]["correct"]) - int(one["outcomes"][name]["correct"])
                for one in surveyed
            ],
            dtype=float,
        )
        for name in names
    }
    return {
        "tasks": len(surveyed),
        "models": {
            name: {
                "value": compute_bootstrap_interval(one),
                "helped": int((one > 0).sum()),
                "harmed": int((one < 0).sum()),
            }
            for name, one in values.items()
        },
        "proxies": _correlate_proxies(surveyed, values),
    }


def _correlate_proxies(
    surveyed: Sequence[Mapping[str, Any]], values: Mapping[str, Any]
) -> dict[str, float | None]:
    """Rank correlation of similarity and entropy with the true value of members, by task."""
    similarity, entropy, truth, total = [], [], [], []
    for at, one in enumerate(surveyed):
        shown = one["proxies"]["similarity"]
        for name, proxy in shown.items():
            similarity.append(float(proxy))
            truth.append(float(values[name][at]))
        if shown:
            entropy.append(float(one["proxies"]["entropy"]))
            total.append(sum(float(values[name][at]) for name in shown))
    return {
        "similarity": compute_correlation(similarity, truth),
        "entropy": compute_correlation(entropy, total),
    }
