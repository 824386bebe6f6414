"""The page of a cascade's run: accuracy by cost, escalation, agreement, latency, attribution."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from molora_fed.reporting.figures import PALETTE, save_figure, tidy_axes
from molora_fed.reporting.methods import as_label, mask_controls
from molora_fed.storage.files import write_bytes, write_json

__all__ = ["draw_costs", "draw_escalation", "draw_sigma", "write_cascade_report"]

MODE_STYLE = {
    "single_agent": ("#56B4E9", "", "probe alone"),
    "arena_lite": ("#E69F00", "//", "two members verify"),
    "full_arena": ("#D55E00", "xx", "all members, judged"),
}


def _new(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tidy_axes(axes)
    return figure, axes


def _choose_cost(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Operations where anyone knows them, else the price."""
    counted = any(one["flops"] for one in summary["configurations"].values())
    if counted:
        return "flops", "operations a task, reading included"
    return "price", "price a task"


def draw_costs(summary: Mapping[str, Any]) -> bytes:
    """Accuracy against mean cost of every configuration, with 95 % intervals.

    Args:
        summary: Of `summarise_runs`.

    Returns:
        PNG bytes.
    """
    figure, axes = _new(7.5, 4.4)
    cost, label = _choose_cost(summary)
    known = {n: o for n, o in summary["configurations"].items() if o["accuracy"] is not None}
    for at, (name, one) in enumerate(known.items()):
        share = one["accuracy"]
        point = 100 * share["point"]
        spread = [[point - 100 * share["low"]], [100 * share["high"] - point]]
        axes.errorbar(
            [one[cost]],
            [point],
            yerr=np.maximum(spread, 0.0),
            fmt="os^Dv*P"[at % 7],
            color=PALETTE[at % len(PALETTE)],
            markersize=8,
            capsize=3,
            label=as_label(name),
        )
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("right answers, %", fontsize=9)
    axes.set_xlim(left=0)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    return save_figure(figure)


def draw_escalation(summary: Mapping[str, Any]) -> bytes:
    """Share of each mode by family.

    Args:
        summary: Of `summarise_runs`.

    Returns:
        PNG bytes.
    """
    families = summary["families"]
    figure, axes = _new(7.5, 1.4 + 0.36 * len(families))
    left = np.zeros(len(families))
    for mode, (colour, hatch, label) in MODE_STYLE.items():
        width = np.array([100 * f["modes"][mode] / f["tasks"] for f in families.values()])
        axes.barh(
            range(len(families)),
            width,
            left=left,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=label,
        )
        left += width
    axes.set_yticks(
        range(len(families)), [f"{as_label(n)} ({f['tasks']})" for n, f in families.items()]
    )
    axes.invert_yaxis()
    axes.set_xlabel("tasks, %", fontsize=9)
    figure.legend(fontsize=8, frameon=False, loc="outside upper right", ncols=3)
    return save_figure(figure)


def draw_sigma(summary: Mapping[str, Any]) -> bytes:
    """Histogram of sigma.

    Args:
        summary: Of `summarise_runs`.

    Returns:
        PNG bytes.
    """
    figure, axes = _new(5.5, 3.2)
    counts = summary["sigma"]
    total = sum(one["tasks"] for one in counts)
    bars = axes.bar(
        range(len(counts)), [one["tasks"] for one in counts], color=PALETTE[0], width=0.6
    )
    axes.bar_label(bars, [f"{100 * one['tasks'] / total:.1f} %" for one in counts], fontsize=9)
    axes.set_xticks(range(len(counts)), [f"{one['sigma']:.2g}" for one in counts])
    axes.set_xlabel("sigma, disagreement of the probe's samples", fontsize=9)
    axes.set_ylabel("tasks", fontsize=9)
    return save_figure(figure)


def _draw(summary: Mapping[str, Any]) -> dict[str, bytes]:
    drawn = {"escalation": draw_escalation(summary)}
    if any(one["accuracy"] is not None for one in summary["configurations"].values()):
        drawn["costs"] = draw_costs(summary)
    if summary["sigma"]:
        drawn["sigma"] = draw_sigma(summary)
    return drawn


def write_cascade_report(summary: Mapping[str, Any], folder: Path) -> Path:
    """Write page, figures and numbers of a cascade's run.

    Args:
        summary: Of `molora_fed.cascade.summary.summarise_runs`.
        folder: Target; `cascade.html`, `cascade.json` and figures are replaced in it.

    Returns:
        Path of the page.

    Raises:
        StorageError: On I/O errors.
    """
    images = _draw(summary)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("molora_fed.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clean"] = mask_controls
    inlined = {name: base64.b64encode(data).decode() for name, data in images.items()}
    page = environment.get_template("cascade.html.j2").render(
        summary=summary, images=inlined, modes={m: style[2] for m, style in MODE_STYLE.items()}
    )
    for name, data in images.items():
        write_bytes(folder / f"{name}.png", data)
    write_json(folder / "cascade.json", dict(summary))
    write_bytes(folder / "cascade.html", page.encode())
    return folder / "cascade.html"
