"""Every method of an evaluation as a row: loss and gains with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molora_studies.framework.contract import Table
from molora_studies.kalavai.comparisons import show_interval
from molora_studies.kalavai.rivals import TRAINED, UNTUNED

__all__ = [
    "UNTUNED_MERGES",
    "MethodRow",
    "draw_gains",
    "list_rows",
    "read_gain_interval",
    "tabulate",
]

_KINDS = {
    "base": "alone",
    "domain_oracle": "oracle",
    "token_oracle": "oracle",
    "uniform": "router",
    "weight_average": "merge",
    "ties": "merge",
    "dare": "merge",
    "dare-ties": "merge",
}
UNTUNED_MERGES = ("ties", "dare", "dare-ties")
"""Merges whose densities and scale are fixed beforehand, unless a study tunes them."""

_HEADERS = (
    "method", "kind", "loss, nats", "by seed", "gain on the best alone",
    "gain on the best specialist",
)  # fmt: skip


@dataclass(frozen=True)
class MethodRow:
    """One method, the mean over seeds.

    Attributes:
        name: Router label or baseline.
        kind: "alone", "router", "merge", "trained" or "oracle".
        loss: Equal-weight loss, nats per token: point, low, high.
        seeds: The same of each seed.
        alone: Gain on the best alone, percent: point, low, high; None of a specialist.
        specialist: Gain on the best specialist, percent; None likewise.
    """

    name: str
    kind: str
    loss: Mapping[str, float]
    seeds: Sequence[float]
    alone: Mapping[str, float] | None
    specialist: Mapping[str, float] | None


def read_gain_interval(
    evaluation: Mapping[str, Any], method: str, reference: str
) -> dict[str, float]:
    """A method's gain in percent with its interval.

    Args:
        evaluation: From `Evaluation.to_json`.
        method: "fused:LABEL", or a baseline's name.
        reference: "best_alone" or "best_specialist".

    Returns:
        `point`, `low` and `high`.
    """
    key, label = f"vs_{reference}", method.removeprefix("fused:")
    if label == method:
        return dict(evaluation["baseline_gain_percent"][method][key])
    interval = evaluation["gain_interval_percent"][label][key]
    point = evaluation["gain_percent"][label][key]
    return {"point": point, "low": interval["low"], "high": interval["high"]}


def list_rows(mean: Mapping[str, Any]) -> list[MethodRow]:
    """Rows of a `plan_mean` result, lowest loss first; of specialists only the best is listed."""
    evaluation = mean["evaluation"]
    best = f"specialist:{evaluation['best_specialist']['name']}"
    rows = []
    for method, loss in evaluation["equal_weight"].items():
        is_specialist = method.startswith("specialist:")
        # Equal gates are measured anyway, and may have been asked for as a router, too.
        is_twice = method == "uniform" and "fused:uniform" in evaluation["equal_weight"]
        if is_twice or (is_specialist and method != best):
            continue
        is_fused = method.startswith("fused:")
        gains = [
            None if is_specialist else read_gain_interval(evaluation, method, reference)
            for reference in ("best_alone", "best_specialist")
        ]
        kind = "router" if is_fused else "alone" if is_specialist else _KINDS.get(method, "trained")
        name = f"best specialist ({best.partition(':')[2]})" if is_specialist else method
        seeds = [each[method] for each in mean["equal_weight"]]
        rows.append(MethodRow(name.removeprefix("fused:"), kind, loss, seeds, *gains))
    return sorted(rows, key=lambda row: row.loss["point"])


def tabulate(
    title: str, rows: Sequence[MethodRow], further: Mapping[str, Mapping[str, str]]
) -> Table:
    """A table of methods.

    Args:
        title: Title.
        rows: Rows in their order.
        further: Further columns by header, each with text by method name.
    """
    return Table(
        title,
        (*_HEADERS, *further),
        [
            (
                row.name,
                _describe_kind(row),
                show_interval(row.loss, "", digits=3, sign=False),
                f"{min(row.seeds):.3f} to {max(row.seeds):.3f}",
                "" if row.alone is None else show_interval(row.alone, "%"),
                "" if row.specialist is None else show_interval(row.specialist, "%"),
                *(texts.get(row.name, "") for texts in further.values()),
            )
            for row in rows
        ],
    )


def _describe_kind(row: MethodRow) -> str:
    """What a method is: what is trained, and whether its recipe had as many tries as ours."""
    if row.kind == "trained":
        name = "monolithic" if row.name.startswith("monolithic") else row.name
        what = f"trained: {TRAINED[name]}" if name in TRAINED else "trained"
        return f"{what}; not tuned" if name in UNTUNED else what
    return f"{row.kind}; not tuned" if row.name in UNTUNED_MERGES else row.kind


def draw_gains(figure: Any, rows: Sequence[MethodRow]) -> None:
    """Gains on the best alone, lowest at the bottom, with intervals."""
    shown = [row for row in rows[::-1] if row.alone is not None and row.name != "token_oracle"]
    axes = figure.subplots()
    for kind in dict.fromkeys(row.kind for row in rows):
        places = [i for i, row in enumerate(shown) if row.kind == kind]
        gains = [shown[i].alone or {} for i in places]
        axes.errorbar(
            [gain["point"] for gain in gains],
            places,
            xerr=[
                [gain["point"] - gain["low"] for gain in gains],
                [gain["high"] - gain["point"] for gain in gains],
            ],
            fmt="o",
            capsize=2,
            label=kind,
        )
    axes.axvline(0.0, color="#222222", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row.name for row in shown], fontsize=7)
    axes.set_xlabel("gain on the best anyone has alone, %")
    axes.legend()
