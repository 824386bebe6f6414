"""Figures of the study `acar`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["draw_accuracy_by_family", "draw_escalation", "draw_frontier"]

_MODES = ("probe alone", "two members", "three members")


def draw_frontier(
    figure: Any,
    points: Mapping[str, tuple[float, float]],
    lines: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Accuracy against cost: configurations as points, families of policies as lines.

    Args:
        figure: An empty figure.
        points: Cost relative to a single model, and accuracy in per cent.
        lines: The same of policies from the cheapest to the dearest.
    """
    axes = figure.subplots()
    for name, line in lines.items():
        cost, accuracy = zip(*sorted(line), strict=True)
        axes.plot(cost, accuracy, marker=".", linewidth=1.2, label=name)
    for place, (name, point) in enumerate(sorted(points.items(), key=lambda item: item[1])):
        axes.plot(*point, marker="o", linestyle="none", color="black", markersize=4)
        beside = (4, -11 if place % 2 else 5)  # neighbours would write over each other
        axes.annotate(name, point, xytext=beside, textcoords="offset points", fontsize=8)
    axes.set_xlabel("operations, relative to a single model")
    axes.set_ylabel("right answers, %")
    axes.legend()


def draw_escalation(figure: Any, shares: Mapping[str, Sequence[float]]) -> None:
    """How many members each family's tasks were worth, stacked.

    Args:
        figure: An empty figure.
        shares: Per cent of tasks by mode, by family.
    """
    axes = figure.subplots()
    names = list(shares)
    left = np.zeros(len(names))
    for place, mode in enumerate(_MODES):
        widths = np.array([shares[name][place] for name in names])
        axes.barh(names, widths, left=left, label=mode)
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("tasks, %")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_accuracy_by_family(figure: Any, shares: Mapping[str, Mapping[str, float]]) -> None:
    """Accuracy of configurations by family.

    Args:
        figure: An empty figure.
        shares: Per cent of right answers by configuration, by family.
    """
    axes = figure.subplots()
    names = list(shares)
    configurations = list(shares[names[0]])
    height = 0.8 / len(configurations)
    for place, configuration in enumerate(configurations):
        at = np.arange(len(names)) + (place - (len(configurations) - 1) / 2) * height
        axes.barh(at, [shares[n][configuration] for n in names], height, label=configuration)
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("right answers, %")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
