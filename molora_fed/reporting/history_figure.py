"""The figure of `molora forecast history`: what was forecast, what came out, how often it held."""

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from molora_fed.forecasting.history import History
from molora_fed.reporting.figures import PALETTE

__all__ = ["draw_history"]


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
        left.plot([], [], "o", color=color, label=f"{name}, {stage}")
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
        labels.append(f"{name}\n{stage}")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(-0.6, max(len(labels), 1) - 0.4)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share of intervals that held (line: level claimed)", fontsize=9)
