"""The phases of a whole run, in order, and the time each may take on two cores."""

from collections.abc import Iterable, Mapping

__all__ = ["BUDGET_SECONDS", "order_phases"]

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
not counted. The control, which is only trained on request, has none."""

_FIRST = ("base", "control")


def order_phases(names: Iterable[str]) -> list[str]:
    """Phases in the order they happen; unknown ones follow by name."""
    order = list(dict.fromkeys((*_FIRST, *BUDGET_SECONDS)))
    rank = {name: index for index, name in enumerate(order)}
    return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))
