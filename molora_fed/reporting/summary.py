"""What a run prints when it is done: Rich tables of a result. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from molora_fed.forecasting.records import FAILED
from molora_fed.reporting.cells import as_text, join_lines
from molora_fed.reporting.headline import list_headline, list_notes, order_forecasts
from molora_fed.reporting.methods import (
    Method,
    describe_controls,
    describe_excess,
    describe_replacement,
    list_control_costs,
    list_failures,
    list_methods,
    list_settings,
    mask_controls,
    order_phases,
)
from molora_fed.reporting.overlap import OVERLAP_COLUMNS, describe_overlap, list_overlap
from molora_fed.reporting.privacy import describe_privacy, list_senders, list_sent
from molora_fed.storage.untrusted import clean

if TYPE_CHECKING:
    from molora_fed.contributions.build import OutgoingRow

__all__ = [
    "build_basis_text",
    "build_contamination_table",
    "build_forecast_table",
    "build_headline_text",
    "build_history_table",
    "build_loss_table",
    "build_outgoing_table",
    "build_run_forecast",
    "build_run_forecast_table",
    "build_sample_text",
    "build_summary",
    "build_time_table",
]

MAX_LINE = 1_000
"""Characters of a sentence that names what came from outside."""
_STYLES = {"fused": "cyan", "oracle": "dim", "control": "yellow"}


def _new_table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=as_text(title, "bold"), title_justify="left", header_style="")
    table.add_column(as_text(first), no_wrap=True)
    for column in columns:
        table.add_column(as_text(column), justify="right")
    return table


def _add_row(table: Table, *cells: str | Text, style: str = "", end_section: bool = False) -> None:
    table.add_row(*map(as_text, cells), style=style, end_section=end_section)


def _describe_gain(result: Mapping[str, Any]) -> Text:
    """The honest comparison first, then the others."""
    router = result.get("router") or min(result["gain_percent"])
    gain = result["gain_percent"][router]
    interval = result.get("gain_interval_percent", {}).get(router, {}).get("vs_best_alone")
    alone = clean(result.get("best_alone", {}).get("name", "min(base, best specialist)"))
    gap = result["oracle_gap_nats"][router]
    text = Text()
    if replaced := describe_replacement(result):
        text.append(f"{clean(replaced, MAX_LINE)}\n", style="bold yellow")
    text.append(f"{gain['vs_best_alone']:+.2f} %", style="bold cyan")
    text.append(f" gain over the best anyone has alone ({alone}), router {clean(router)}")
    if interval:
        text.append(f", 95 % interval {interval['low']:+.2f} to {interval['high']:+.2f} %")
    text.append(
        f".\nAgainst the best specialist only: {gain['vs_best_specialist']:+.2f} %. "
        f"Gap to the domain oracle: {gap['point']:+.4f} nats "
        f"({gap['low']:+.4f} to {gap['high']:+.4f})."
    )
    excess = result.get("excess_nats", {}).get(router)
    if excess and excess["largest"] is not None:
        text.append(f"\n{describe_excess(excess)}")
    for sentence in describe_controls(result):
        text.append(f"\n{clean(sentence, MAX_LINE)}")
    return text


def _interval(method: Method) -> str:
    if method.low is None or method.high is None:
        return "-"
    return f"{method.low:.3f} to {method.high:.3f}"


def build_loss_table(result: Mapping[str, Any]) -> Table:
    """Held-out loss of every method by domain, nats per token.

    Args:
        result: Content of report.json.
    """
    domains = result["domains"]
    table = _new_table(
        "Held-out loss, nats per token", "method", *domains, "equal weight", "95 % interval",
        "vs alone",
    )  # fmt: skip
    published = f"fused:{result.get('router')}"
    for method in list_methods(result):
        style = "bold cyan" if method.key == published else _STYLES.get(method.kind, "")
        _add_row(
            table,
            method.label,
            *(f"{method.losses[domain]:.3f}" for domain in domains),
            f"{method.point:.4f}",
            _interval(method),
            f"{method.change_percent:+.2f} %",
            style=style,
        )
    return table


def build_forecast_table(result: Mapping[str, Any]) -> Table:
    """Forecasts made before any router was evaluated, against what came out.

    Args:
        result: Content of report.json.
    """
    table = _new_table(
        "Forecast gain against outcome, percent", "predictor", "against", "router", "forecast",
        "interval", "level", "outcome", "inside",
    )  # fmt: skip
    first, rest = order_forecasts(result)
    for name, forecast in (*first, *rest):
        low, high, point = (forecast[key] for key in ("low", "high", "point"))
        actual, level = forecast["actual"], forecast["level"]
        has_interval = low is not None and high is not None
        is_scored = has_interval and actual is not None
        _add_row(
            table,
            name,
            forecast["reference"].replace("_", " "),
            forecast["router"],
            "-" if point is None else f"{point:+.2f}",
            f"{low:+.2f} to {high:+.2f}" if has_interval else "none claimed",
            "-" if level is None else f"{100 * level:.0f} %",
            "-" if actual is None else f"{actual:+.2f}",
            ("yes" if low <= actual <= high else "no") if is_scored else "-",
            style="bold" if name in dict(first) else "",
            end_section=bool(first) and name == first[-1][0],
        )
    for name in sorted(result.get("not_measured", {}).get("gain predictor", {})):
        _add_row(table, name, *["-"] * 7)
    return table


def build_headline_text(result: Mapping[str, Any]) -> Text | None:
    """The headline forecast and what it rests on; None for a result of an earlier version.

    Args:
        result: `forecasts` by predictor and `headline`, as in report.json.
    """
    lines = list_headline(result)
    if not lines:
        return None
    text = join_lines(lines, "bold")
    first, _ = order_forecasts(result)
    for note in list_notes(first):
        text.append(f"\n{clean(note, MAX_LINE)}", style="not bold dim")
    return text


def build_basis_text(result: Mapping[str, Any]) -> Text:
    """What the forecasts below the headline rest on.

    Args:
        result: `forecasts` by predictor, and `headline`.
    """
    _, rest = order_forecasts(result)
    return join_lines(list_notes(rest), "dim")


def build_run_forecast_table(run: Mapping[str, Any]) -> Table:
    """Every predictor's forecast of one case.

    Args:
        run: `condition`, and `forecasts` by predictor.
    """
    table = _new_table(
        f"{run['condition'] or 'run'}: forecast gain, percent",
        "predictor", "against", "forecast", "interval", "level", "floor", "verdict",
    )  # fmt: skip
    failed = []
    first, rest = order_forecasts(run)
    for name, forecast in (*first, *rest):
        low, high, level = (forecast[key] for key in ("low", "high", "level"))
        is_failed = forecast["note"].startswith(FAILED)
        failed += [f"{name} {forecast['note']}"] if is_failed else []
        _add_row(
            table,
            name,
            (forecast["reference"] or "-").replace("_", " "),
            "-" if forecast["point"] is None else f"{forecast['point']:+.2f}",
            "none claimed" if low is None or high is None else f"{low:+.2f} to {high:+.2f}",
            "-" if level is None else f"{100 * level:.0f} %",
            "-" if forecast["floor"] is None else f"{forecast['floor']:.1f}",
            "failed" if is_failed else forecast["verdict"] or "-",
            style="bold" if name in dict(first) else "",
            end_section=bool(first) and name == first[-1][0],
        )
    return _explain_below(table, failed)


def _explain_below(table: Table, lines: Sequence[str]) -> Table:
    """Say under a table what does not fit into its cells."""
    if lines:
        table.caption = join_lines(list(lines))
        table.caption_justify = "left"
    return table


def build_run_forecast(run: Mapping[str, Any]) -> RenderableType:
    """The headline forecast of one case, then every predictor's.

    Args:
        run: `condition`, `forecasts` by predictor, and `headline`.
    """
    headline = build_headline_text(run)
    parts: list[RenderableType] = [] if headline is None else [headline]
    return Group(*parts, build_run_forecast_table(run))


def build_history_table(history: Mapping[str, Any]) -> Table:
    """How good recorded forecasts were, by predictor and stage.

    Args:
        history: `History.to_json()`.
    """
    table = _new_table(
        "Recorded forecasts against their outcomes", "predictor", "stage", "forecasts", "groups",
        "inside", "95 % interval", "level", "MAE, pp", "bias, pp", "interval score, pp",
    )  # fmt: skip
    for row in history["predictors"]:
        runs = row["runs"]
        _add_row(
            table,
            row["predictor"],
            row["stage"],
            str(row["count"]),
            str(row["groups"]),
            "-" if runs is None else f"{runs['inside']} of {runs['count']}",
            "-" if runs is None else f"{100 * runs['low']:.0f} to {100 * runs['high']:.0f} %",
            "-" if row["level"] is None else f"{100 * row['level']:.0f} %",
            "-" if row["mae"] is None else f"{row['mae']:.2f}",
            "-" if row["bias"] is None else f"{row['bias']:+.2f}",
            "-" if row["interval_score"] is None else f"{row['interval_score']:.2f}",
        )
    return table


def build_contamination_table(result: Mapping[str, Any]) -> Table:
    """Share of held-out word 8-grams that occur in text that was trained on, and what followed.

    Args:
        result: Content of report.json; older ones know of the contributors' own train text only.
    """
    table = _new_table("Contamination of held-out text", "domain", *OVERLAP_COLUMNS)
    for row in list_overlap(result):
        _add_row(table, *row)
    table.caption = as_text(describe_overlap(result), limit=2 * MAX_LINE)
    return table


def build_time_table(seconds: Mapping[str, float], budget: Mapping[str, float]) -> Table:
    """Time of each phase against its budget.

    Args:
        seconds: Wall-clock seconds by phase.
        budget: Budgeted seconds by phase; phases without one are shown without.
    """
    table = _new_table("Time, seconds", "phase", "took", "budget")
    for name in order_phases(seconds):
        limit = budget.get(name)
        is_over = limit is not None and seconds[name] > limit
        took = Text(f"{seconds[name]:.1f}", style="yellow" if is_over else "")
        _add_row(table, name, took, "-" if limit is None else f"{limit:.0f}")
    table.add_section()
    _add_row(table, "in all", f"{sum(seconds.values()):.1f}", f"{sum(budget.values()):.0f}")
    return table


def build_outgoing_table(rows: "Sequence[OutgoingRow]") -> Table:
    """What a contributor sends.

    What is not known yet is shown by its upper limit: "at most".

    Args:
        rows: Of what `molora_fed.cooperative.outgoing` describes.
    """
    names = ("blocks", "tokens", "numbers", "times")
    shown = [n for n in names if any(getattr(row, n) > (n == "times") for row in rows)]
    table = _new_table("What is sent", "what", *shown, "bytes")
    table.columns[0].no_wrap = False

    def add(what: str, counts: Mapping[str, int], *, exact: bool) -> None:
        cells = [f"{counts[name]:,}" if counts[name] else "-" for name in shown]
        _add_row(table, what, *cells, f"{'' if exact else 'at most '}{counts['bytes']:,}")

    for row in rows:
        add(row.what, {n: getattr(row, n) for n in (*names, "bytes")}, exact=row.exact)
    table.add_section()
    sums = {n: sum(getattr(row, n) * row.times for row in rows) for n in (*names[:3], "bytes")}
    add("in all", {**sums, "times": 0}, exact=all(row.exact for row in rows))
    return table


def build_sample_text(sample: Mapping[str, Any]) -> Text:
    """A generated text after its prompt, with the expert that counted most.

    Args:
        sample: One of the result's `samples`.
    """
    text = as_text(sample["domain"], "bold")
    gates = sample.get("experts") or {}
    if gates:
        expert = max(gates, key=gates.__getitem__)
        text.append(f"  (mostly {clean(expert)}, mean gate {gates[expert]:.2f})", style="dim")
    text.append("\n" + mask_controls(sample["prompt"]), style="dim")
    text.append(mask_controls(sample["text"]), style="not bold")
    return text


def _build_sent_table(result: Mapping[str, Any], rows: Sequence[tuple[str, ...]]) -> Table:
    """Bytes that each contributor sent, by kind."""
    table = _new_table("Bytes sent", "what", *map(clean, list_senders(result)))
    for row in rows:
        _add_row(table, *row)
    return table


def _build_compute_text(result: Mapping[str, Any]) -> Text | None:
    compute = result.get("compute", {})
    base, contributors = compute.get("base"), compute.get("contributors", {})
    if not base and not contributors:
        return None
    parts = []
    if base:
        parts.append(f"base {base['steps']:,} steps, {base['tokens']:,} tokens")
    if contributors:
        steps = sum(row["steps"] for row in contributors.values())
        tokens = sum(row["tokens"] for row in contributors.values())
        parts.append(f"{len(contributors)} specialists {steps:,} steps, {tokens:,} tokens in all")
    for name, control in list_control_costs(compute).items():
        parts.append(f"{clean(name)} {control['steps']:,} steps, {control['tokens']:,} tokens")
    return Text("Training: " + "; ".join(parts) + ".")


def build_summary(result: Mapping[str, Any]) -> RenderableType:
    """What a run ends with: headline forecast, gain, methods, forecasts, contamination, compute.

    Args:
        result: Content of report.json.
    """
    headline = build_headline_text(result)
    settings = [f"Options: {line}" for line in list_settings(result)]
    losses = _explain_below(build_loss_table(result), [*settings, *list_failures(result)])
    gain = _describe_gain(result)
    # What was published comes first where it is not what the charter chose.
    parts: list[RenderableType] = [gain] if headline is None else [gain, headline]
    parts.append(losses)
    if result["forecasts"]:
        parts += [build_forecast_table(result), build_basis_text(result)]
    if list_overlap(result):
        parts.append(build_contamination_table(result))
    compute = _build_compute_text(result)
    if compute is not None:
        parts.append(compute)
    if rows := list_sent(result):
        parts.append(_build_sent_table(result, rows))
    if privacy := describe_privacy(result):
        parts.append(Text(privacy))
    return Group(*parts)
