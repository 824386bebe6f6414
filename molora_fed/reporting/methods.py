"""The methods a report compares, and the phases it times: names, order, losses, intervals."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2

from molora_fed.forecasting.records import FAILED
from molora_fed.storage.untrusted import clean, clean_lines

__all__ = [
    "BUDGET_SECONDS",
    "MALFORMED",
    "Method",
    "as_label",
    "compute_equal_weight",
    "describe_choice",
    "describe_controls",
    "describe_excess",
    "describe_replacement",
    "list_control_costs",
    "list_failures",
    "list_methods",
    "list_settings",
    "mask_controls",
    "order_phases",
]


MALFORMED = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
    jinja2.TemplateError,
)  # fmt: skip
"""What rendering and drawing raise on a result of somebody else's making."""
MAX_LABEL = 60
"""Characters of a name in a figure."""
_LABELS = {
    "base": "base",
    "monolithic": "pooled text, linear layers",
    "base_continued": "pooled text, all parameters",
    "control": "pooled text, linear layers",  # its name in earlier reports
    "uniform": "uniform gates",
    "weight_average": "weight average (B@A)",
    "domain_oracle": "domain oracle",
    "token_oracle": "token oracle",
}
_KINDS = {
    "base": "alone",
    "monolithic": "control",
    "base_continued": "control",
    "control": "control",
    "uniform": "baseline",
    "weight_average": "baseline",
    "domain_oracle": "oracle",
    "token_oracle": "oracle",
}


_CONTROLS = tuple(key for key, kind in _KINDS.items() if kind == "control")


_TRAINED = {
    "monolithic": "one adapter of the linear layers trained on",
    "base_continued": "the base continued with all its parameters on",
    "control": "one adapter of the linear layers trained on",
}


@dataclass(frozen=True)
class Method:
    """One row of a report's tables.

    Attributes:
        key: Its key in `equal_weight`, e.g. "fused:evidence".
        label: Name for people.
        kind: "alone", "control", "baseline", "oracle" or "fused".
        losses: Held-out loss by domain, nats per token.
        point: Equal-weight loss over domains, nats per token.
        low: Lower end of the interval, None if there is none.
        high: Upper end, None likewise.
        change_percent: Loss against the best anyone has alone, percent; negative is better.
    """

    key: str
    label: str
    kind: str
    losses: Mapping[str, float]
    point: float
    low: float | None
    high: float | None
    change_percent: float


def compute_equal_weight(losses: Mapping[str, float]) -> float:
    """The plain mean over domains, nats per token."""
    return sum(losses.values()) / len(losses)


def list_methods(result: Mapping[str, Any]) -> list[Method]:
    """All methods of a result: what anyone has alone, baselines, routers, oracles.

    Args:
        result: Content of report.json.

    Returns:
        Methods in reporting order: base, specialists, controls, baselines (those this page knows no
        label for by name), routers (the published one first), oracles. Methods the result lacks
        are left out.
    """
    losses = result["losses"]
    rows: list[tuple[str, str, str, Mapping[str, float]]] = []

    def add(key: str) -> None:
        if key in losses:
            label, kind = _LABELS.get(key, key), _KINDS.get(key, "baseline")
            rows.append((key, label, kind, losses[key]))

    add("base")
    own = result.get("own_domain", {})
    for name, values in losses["specialists"].items():
        domain = own.get(name, name)
        suffix = "" if domain == name else f" ({domain})"
        rows.append((f"specialist:{name}", f"specialist {name}{suffix}", "alone", values))
    further = sorted(losses.keys() - _LABELS.keys() - {"specialists", "fused"})
    for key in (*_CONTROLS, "uniform", "weight_average", *further):
        add(key)
    published = result.get("router")
    for name in sorted(losses["fused"], key=lambda router: (router != published, router)):
        rows.append((f"fused:{name}", f"fused, {name}", "fused", losses["fused"][name]))
    for key in ("domain_oracle", "token_oracle"):
        add(key)

    alone = min(compute_equal_weight(values) for _, _, kind, values in rows if kind == "alone")
    intervals = result.get("equal_weight", {})
    methods = []
    for key, label, kind, values in rows:
        interval = intervals.get(key, {})
        point = interval.get("point", compute_equal_weight(values))
        change = 100.0 * (point - alone) / alone
        methods.append(
            Method(
                key,
                label,
                kind,
                values,
                point,
                interval.get("low"),
                interval.get("high"),
                change,
            )
        )
    return methods


def list_control_costs(compute: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What each control cost, by its label.

    Args:
        compute: `compute` of report.json; earlier ones hold one control.
    """
    costs = dict(compute.get("controls", {}))
    if "control" in compute:
        costs["control"] = compute["control"]
    return {_LABELS[key]: costs[key] for key in _CONTROLS if costs.get(key)}


def describe_controls(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each control: what it trained, and how the fused model compares.

    Args:
        result: Content of report.json.
    """
    methods = {method.key: method for method in list_methods(result)}
    fused = methods[f"fused:{result.get('router') or min(result['gain_percent'])}"]
    sentences = []
    for key in _CONTROLS:
        if key not in methods:
            continue
        control = methods[key]
        gain = 100 * (control.point - fused.point) / control.point
        text = (
            f"Against {_TRAINED[key]} everybody's text pooled, for as many steps in all: "
            f"{gain:+.2f} %"
        )
        nats = result.get("control_difference_nats", {}).get(key)
        if nats:
            better = "fusing" if nats["high"] < 0 else "pooling" if nats["low"] > 0 else "neither"
            text += (
                f", {nats['point']:+.4f} nats ({nats['low']:+.4f} to {nats['high']:+.4f}): "
                f"{better} is better"
            )
        sentences.append(f"{text}.")
    return sentences


def describe_excess(excess: Mapping[str, Any]) -> str:
    """One sentence on what any document cost above its best expert, and what was promised.

    Args:
        excess: A router's entry of `excess_nats` in report.json, with a largest.
    """
    promised = "nothing is promised of it"
    if excess["bound"] is not None:
        promised = f"at most {excess['bound']:.3f} are promised"
    return (
        f"No document costs more than {excess['largest']:.3f} nats above its best expert "
        f"({excess['parts']:,} parts of documents); {promised}."
    )


def mask_controls(text: str) -> str:
    """Text without the characters that could steer a terminal or a page; line breaks stay."""
    return clean_lines(text)


def as_label(text: str) -> str:
    """A name from outside as the label of a figure, in which "$" begins no formula."""
    return clean(text, MAX_LABEL).replace("$", "\\$").removeprefix("_")


BUDGET_SECONDS: Mapping[str, float] = {
    "base": 120.0,
    "starting": 30.0,
    "corpus": 20.0,
    "training": 210.0,
    "admission": 10.0,
    "calibration-bank": 20.0,
    "forecasts": 2.0,
    "routers": 5.0,
    "held-out-bank": 20.0,
    "evaluation": 5.0,
    "saving": 3.0,
    "delivery": 20.0,
    "samples": 5.0,
    "report": 10.0,
}
"""Wall-clock budget of the demo by phase, 480 s in all: two cores, four contributors, downloads
not counted. The controls, which are only trained on request, have none."""

_FIRST = ("base", *_CONTROLS)


def order_phases(names: Iterable[str]) -> list[str]:
    """Phases in the order they happen; unknown ones follow by name."""
    order = list(dict.fromkeys((*_FIRST, *BUDGET_SECONDS)))
    rank = {name: index for index, name in enumerate(order)}
    return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))


def describe_replacement(result: Mapping[str, Any]) -> str | None:
    """One line on the router that the collapse guard replaced, or None.

    Args:
        result: Content of report.json.
    """
    for name, found in result.get("guard", {}).items():
        if "replaced_by" in found:
            lost, excess = found["collapsed"], found["attempts"][found["kept"]]["excess_nats"]
            return (
                f"Router '{name}' lost {', '.join(lost)} ({max(excess[d] for d in lost):.3f} nats "
                f"above their best expert): '{found['replaced_by']}' published instead."
            )
    return None


def describe_choice(value: str | Mapping[str, Any]) -> str:
    """What a charter chose: a plain name, or with label and options.

    Args:
        value: As a charter writes a `Choice`.
    """
    if isinstance(value, str):
        return value
    name, options = value["name"], value.get("options", {})
    label = value.get("label", "") or name
    said = [name] if label != name else []
    said += [f"{key} = {json.dumps(one)}" for key, one in options.items()]
    return f"{label} ({', '.join(said)})" if said else str(label)


def list_settings(result: Mapping[str, Any]) -> list[str]:
    """One line for each router, merge and predictor that has a label or options.

    Args:
        result: Content of report.json.
    """
    return [
        f"{kind} {describe_choice({**one, 'label': key})}"
        for kind, chosen in sorted(result.get("settings", {}).items())
        for key, one in sorted(chosen.items())
    ]


def list_failures(result: Mapping[str, Any]) -> list[str]:
    """One line for each router, merge and predictor that failed in a fusion.

    Args:
        result: Content of report.json.
    """
    return [
        f"{kind} {name} {why}"
        for kind, reasons in sorted(result.get("not_measured", {}).items())
        for name, why in sorted(reasons.items())
        if why.startswith(FAILED)
    ]
