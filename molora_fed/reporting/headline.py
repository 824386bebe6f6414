"""The headline forecast in words, and forecasts in the order in which they are shown."""

from collections.abc import Mapping
from typing import Any

__all__ = ["describe_claim", "list_headline", "list_notes", "order_forecasts"]

Row = Mapping[str, Any]


def order_forecasts(
    result: Mapping[str, Any],
) -> tuple[list[tuple[str, Row]], list[tuple[str, Row]]]:
    """Forecasts by predictor: those of the headline, and all others by name.

    Args:
        result: `forecasts` by predictor, and `headline` unless an earlier version wrote it.
    """
    forecasts = result["forecasts"]
    chosen = (result.get("headline") or {}).get("predictors", ())
    first = [(name, forecasts[name]) for name in chosen if name in forecasts]
    rest = [(n, row) for n, row in sorted(forecasts.items()) if n not in dict(first)]
    return first, rest


def describe_claim(row: Row) -> str:
    """A forecast, and its outcome where it is known, as one line."""
    point, low, high, level = (row[key] for key in ("point", "low", "high", "level"))
    text = "no single value" if point is None else f"{point:+.2f} %"
    text += f" on the {str(row['reference']).replace('_', ' ')}, "
    has_interval = low is not None and high is not None and level is not None
    text += (
        f"{100 * level:.0f} % interval {low:+.2f} to {high:+.2f}"
        if has_interval
        else "no interval claimed"
    )
    actual = row.get("actual")
    if actual is None:
        return text
    text += f"; came out {actual:+.2f} %"
    return f"{text}: {'inside' if low <= actual <= high else 'outside'}" if has_interval else text


def list_headline(result: Mapping[str, Any]) -> list[str]:
    """The headline forecast as lines of text: a claim a reference, or why there is none.

    Args:
        result: As for `order_forecasts`; no lines for one of an earlier version.
    """
    headline = result.get("headline")
    if headline is None:
        return []
    first, _ = order_forecasts(result)
    if not first:
        return [f"No headline forecast: {headline.get('reason') or 'nobody made one'}."]
    claims = headline.get("claims", {})  # restated forecasts keep their own reference here
    return [f"Forecast: {describe_claim(claims.get(name, row))}." for name, row in first]


def list_notes(rows: list[tuple[str, Row]]) -> list[str]:
    """Where forecasts come from: a line for each basis, named by the predictors that share it."""
    notes: dict[str, list[str]] = {}
    for name, row in rows:
        if note := row.get("note"):
            notes.setdefault(note, []).append(name)
    return [f"{', '.join(names)}: {note}" for note, names in notes.items()]
