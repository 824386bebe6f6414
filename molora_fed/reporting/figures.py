"""The figures of all reports as PNG bytes: labelled units, colours told apart by everyone.

Drawn on `matplotlib.figure.Figure` directly, without pyplot: nothing global, no display needed.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from molora_fed.forecasting.history import History
from molora_fed.reporting.headline import order_forecasts
from molora_fed.reporting.methods import as_label, list_methods

__all__ = [
    "PALETTE",
    "draw_cells",
    "draw_forecasts",
    "draw_gates",
    "draw_history",
    "draw_loss_matrix",
    "draw_losses",
    "draw_training_curves",
    "save_figure",
    "tidy_axes",
]


PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's colours; blue and vermilion come first because they differ most."""

KIND_STYLE = {
    "alone": ("#7A7A7A", "o", "anyone alone"),
    "control": ("#E69F00", "D", "trained on pooled text"),
    "baseline": ("#56B4E9", "s", "fused without a router"),
    "fused": ("#0072B2", "o", "fused with a router"),
    "oracle": ("#000000", "^", "oracle (not usable)"),
}
_LINES = ("-", "--", "-.", ":")
_DPI = 150
_CELLS_INCHES = 12.0  # all columns of a heat map; memory to draw it grows with its area
_INK = "#222222"


def _new(width: float, height: float) -> tuple[Figure, Any]:
    """An empty figure with one plain pair of axes; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tidy_axes(axes)
    return figure, axes


def tidy_axes(axes: Any) -> None:
    """Left and lower spines only, with small ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9, colors=_INK)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=11, loc="left", color=_INK)


def save_figure(figure: Figure) -> bytes:
    """The figure as PNG; without dates or versions, so that equal input gives equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def draw_cells(axes: Any, values: np.ndarray, colours: Any, labels: Sequence[Sequence[str]]) -> Any:
    """A heat map with a number in every cell, dark on light and light on dark."""
    # A mesh: an image would be resampled to the figure's pixels in several copies.
    rows, columns = (np.arange(count + 1) - 0.5 for count in values.shape)
    image = axes.pcolormesh(columns, rows, values, **colours)
    axes.set_ylim(rows[-1], rows[0])
    rgba = image.cmap(image.norm(values))
    luminance = rgba[..., :3] @ np.array([0.2126, 0.7152, 0.0722])
    for row, column in np.ndindex(*values.shape):
        axes.text(
            column,
            row,
            labels[row][column],
            ha="center",
            va="center",
            fontsize=9,
            color="white" if luminance[row, column] < 0.5 else _INK,
        )
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return image


def draw_loss_matrix(result: Mapping[str, Any]) -> bytes:
    """Heat map of held-out loss by method (rows) and domain (columns).

    Cells hold the loss in nats per token; colour is its change against the base in percent, so
    that domains of different difficulty can be compared.

    Args:
        result: Content of report.json.

    Returns:
        PNG bytes.
    """
    domains = list(result["domains"])
    methods = list_methods(result)
    losses = np.array([[method.losses[d] for d in domains] for method in methods])  # (M, domains)
    base = np.array([result["losses"]["base"][d] for d in domains])
    change = 100.0 * (losses - base) / base
    limit = max(1.0, float(np.quantile(np.abs(change), 0.9)))
    cell = min(1.25, _CELLS_INCHES / len(domains))
    figure, axes = _new(2.6 + cell * len(domains), 1.5 + 0.36 * len(methods))
    labels = [[f"{value:.3f}" for value in row] for row in losses]
    colours = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}
    image = draw_cells(axes, change, colours, labels)
    turned = {"rotation": 35, "ha": "right"} if cell < 1.0 else {}
    axes.set_xticks(range(len(domains)), map(as_label, domains), **turned)
    axes.set_yticks(range(len(methods)), [as_label(method.label) for method in methods])
    axes.set_xlabel("domain of the held-out text", fontsize=9)
    _title(axes, "Held-out loss, nats per token")
    bar = figure.colorbar(image, ax=axes, extend="both", fraction=0.05, pad=0.02)
    bar.set_label("change against the base, %\n(purple: lower loss)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return save_figure(figure)


def draw_gates(result: Mapping[str, Any]) -> bytes:
    """Mean gate of every expert on every domain's held-out text, one panel per router.

    Args:
        result: Content of report.json, with `gates`.

    Returns:
        PNG bytes.
    """
    gates = result.get("gates", {})
    published = result.get("router")
    routers = sorted(gates, key=lambda router: (router != published, router))
    domains = list(result["domains"])
    experts = list(next(iter(gates[routers[0]].values()))) if routers else []
    columns = min(2, max(1, len(routers)))
    rows = max(1, math.ceil(len(routers) / columns))
    cell = min(0.72, _CELLS_INCHES / max(1, columns * len(experts)))
    width = max(7.0, 1.6 + columns * (0.6 + cell * max(1, len(experts))))
    height = rows * (1.3 + 0.42 * len(domains)) + 0.3
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for unused in panels[len(routers) :]:
        unused.set_axis_off()
    image = None
    for axes, router in zip(panels, routers, strict=False):
        tidy_axes(axes)
        values = np.array([[gates[router][d].get(e, 0.0) for e in experts] for d in domains])
        labels = [[f"{value:.2f}" for value in row] for row in values]
        image = draw_cells(axes, values, {"cmap": "Blues", "vmin": 0.0, "vmax": 1.0}, labels)
        axes.set_xticks(range(len(experts)), map(as_label, experts), rotation=35, ha="right")
        axes.set_yticks(range(len(domains)), map(as_label, domains))
        axes.set_xlabel("expert", fontsize=9)
        _title(axes, as_label(router) + (" (published)" if router == published else ""))
    for axes in panels[::columns]:
        axes.set_ylabel("domain of the text", fontsize=9)
    if image is not None:
        bar = figure.colorbar(image, ax=list(panels), fraction=0.03, pad=0.01)
        bar.set_label("mean gate (rows sum to 1)", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    return save_figure(figure)


def draw_losses(result: Mapping[str, Any]) -> bytes:
    """Equal-weight loss of every method with its interval, best first.

    Args:
        result: Content of report.json.

    Returns:
        PNG bytes.
    """
    methods = sorted(list_methods(result), key=lambda method: -method.point)
    alone = min(method.point for method in methods if method.kind == "alone")
    figure, axes = _new(8.0, 1.5 + 0.34 * len(methods))
    seen: set[str] = set()
    for row, method in enumerate(methods):
        colour, marker, legend = KIND_STYLE[method.kind]
        if method.low is not None and method.high is not None:
            axes.plot([method.low, method.high], [row, row], color=colour, linewidth=2, alpha=0.6)
        label = None if method.kind in seen else legend
        seen.add(method.kind)
        axes.plot(
            method.point, row, marker, color=colour, markersize=7, linestyle="none", label=label
        )
        axes.annotate(
            f"{method.point:.3f}  ({method.change_percent:+.1f} %)",
            (method.high if method.high is not None else method.point, row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    axes.axvline(alone, color="#D55E00", linewidth=1.2, linestyle="--", zorder=0)
    axes.annotate(
        " best anyone has alone",
        (alone, len(methods) - 0.4),
        fontsize=8,
        color="#B24E00",
        annotation_clip=False,
    )
    axes.set_yticks(range(len(methods)), [as_label(method.label) for method in methods])
    axes.set_ylim(-0.6, len(methods) + 0.1)
    axes.margins(x=0.18)
    axes.grid(axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.set_xlabel(
        "held-out loss, nats per token, equal weight over domains (lower is better; line: 95 % "
        "interval)",
        fontsize=9,
    )
    figure.legend(fontsize=8, frameon=False, loc="outside upper right", ncols=3)
    return save_figure(figure)


def draw_forecasts(result: Mapping[str, Any]) -> bytes:
    """Forecast gain with its interval against the outcome, one row per predictor.

    Args:
        result: Content of report.json, with `forecasts`.

    Returns:
        PNG bytes.
    """
    above, below = order_forecasts(result)
    forecasts = dict(reversed([*above, *below]))
    figure, axes = _new(8.0, 1.6 + 0.62 * max(1, len(forecasts)))
    for row, (_, forecast) in enumerate(forecasts.items()):
        low, high, point = (forecast[name] for name in ("low", "high", "point"))
        first = row == 0
        if low is not None and high is not None:
            axes.plot(
                [low, high],
                [row, row],
                color="#56B4E9",
                linewidth=9,
                solid_capstyle="butt",
                label="forecast interval" if first else None,
            )
        if point is not None:
            axes.plot(point, row, "|", color="#0072B2", markersize=18, markeredgewidth=2.5)
        if forecast["actual"] is not None:
            axes.plot(
                forecast["actual"],
                row,
                "D",
                color="#D55E00",
                markersize=8,
                markeredgecolor="white",
                label="outcome" if first else None,
            )
    axes.axvline(0.0, color="#999999", linewidth=1)
    labels = []
    for name, forecast in forecasts.items():
        against = forecast["reference"].replace("_", " ")
        level = forecast["level"]
        nominal = "" if level is None else f", level {100 * level:.0f} %"
        labels.append(f"{as_label(name)}\nagainst {as_label(against)}{nominal}")
    axes.set_yticks(range(len(forecasts)), labels)
    axes.set_ylim(-0.6, len(forecasts) - 0.4)
    axes.grid(axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.set_xlabel("fusion gain, % of the reference's equal-weight loss", fontsize=9)
    if forecasts:
        axes.plot([], [], "|", color="#0072B2", markeredgewidth=2.5, label="forecast point")
        figure.legend(fontsize=8, frameon=False, loc="outside upper right", ncols=3)
    return save_figure(figure)


def draw_training_curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Validation loss on the contributor's own text by optimiser step, one line per contributor.

    Args:
        metrics: Rows of each contributor's metrics.jsonl, by contributor; rows with
            "validation_loss" are drawn.

    Returns:
        PNG bytes.
    """
    figure, axes = _new(8.0, 4.0)
    for index, (name, rows) in enumerate(metrics.items()):
        points = [
            (row["step"], row["validation_loss"])
            for row in rows
            if row.get("validation_loss") is not None
        ]
        if not points:
            continue
        steps, losses = zip(*points, strict=True)
        axes.plot(
            steps,
            losses,
            color=PALETTE[index % len(PALETTE)],
            linestyle=_LINES[index % len(_LINES)],
            marker="o",
            markersize=3,
            label=as_label(name),
        )
    axes.grid(color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.set_xlabel("optimiser step", fontsize=9)
    axes.set_ylabel("validation loss, nats per token", fontsize=9)
    if axes.lines:
        axes.legend(fontsize=8, frameon=False)
    return save_figure(figure)


def draw_history(history: History) -> bytes:
    """Outcomes against forecasts with their intervals, and coverage with its own interval.

    Args:
        history: Scored forecasts by predictor and stage.

    Returns:
        PNG bytes.
    """
    height = 2.6 + 0.42 * max(4, len(history.scores))
    figure = Figure(figsize=(11.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    ends: list[float] = []
    for index, ((name, stage), forecasts) in enumerate(history.scored.items()):
        color = PALETTE[index % len(PALETTE)]
        for forecast in forecasts:
            low, high, actual = forecast.low, forecast.high, forecast.actual
            if low is not None and high is not None:
                left.plot([actual, actual], [low, high], color=color, linewidth=1, alpha=0.6)
                ends += [low, high]
            if forecast.point is not None:
                left.plot(actual, forecast.point, "o", color=color, markersize=4)
                ends.append(forecast.point)
            ends.append(actual)
        left.plot([], [], "o", color=color, label=as_label(f"{name}, {stage}"))
    if ends:
        left.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#999999", linewidth=1)
    left.set_xlabel("measured gain, %", fontsize=9)
    left.set_ylabel("forecast gain, %", fontsize=9)
    _draw_coverage(right, history)
    if history.scored:
        figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _draw_coverage(axes: Any, history: History) -> None:
    """Share of intervals that held, with its 95 % interval, beside the level they claimed."""
    labels: list[str] = []
    for (name, stage), score in history.scores.items():
        if score.runs is None:
            continue
        row, held = len(labels), score.runs
        axes.plot([held.low, held.high], [row, row], color="#56B4E9", linewidth=7)
        axes.plot(held.inside / held.count, row, "D", color="#D55E00", markersize=6)
        axes.plot(score.level, row, "|", color="#000000", markersize=16, markeredgewidth=2)
        labels.append(f"{as_label(name)}\n{as_label(stage)}")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(-0.6, max(len(labels), 1) - 0.4)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share of intervals that held (line: level claimed)", fontsize=9)
