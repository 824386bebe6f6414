"""The report of a fusion: `report.html` (self-contained), `report.json` and the figures."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from molora_fed.errors import ConfigError
from molora_fed.reporting import figures
from molora_fed.reporting.headline import list_headline, list_notes, order_forecasts
from molora_fed.reporting.methods import (
    MALFORMED,
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
from molora_fed.reporting.privacy import (
    CLAIM_COLUMNS,
    describe_privacy,
    list_claims,
    list_senders,
    list_sent,
)
from molora_fed.storage.files import canonical_json, write_bytes, write_json
from molora_fed.storage.untrusted import clean, parse_json

__all__ = [
    "REPORT_JSON",
    "MetricRows",
    "find_report",
    "load_report",
    "read_metrics",
    "write_report",
]

MetricRows = Sequence[Mapping[str, Any]]
"""Rows of one contributor's metrics.jsonl."""

REPORT_JSON = "report.json"
PAGE = "report.html"
METRICS_FOLDER = "metrics"
FIGURES = ("losses", "loss_matrix", "gates", "forecasts", "training_curves")
MAX_REPORT_BYTES = 64 * 2**20
MAX_ROW_BYTES = 100_000
_REQUIRED = (
    "seed", "domains", "losses", "gain_percent", "oracle_gap_nats", "forecasts", "contamination",
    "bytes", "seconds", "fingerprints", "versions",
)  # fmt: skip


def _seconds(value: float) -> str:
    """Seconds for people, e.g. "3.2 s" or "4 min 05 s"."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"


def _count(value: float) -> str:
    """A whole number with thin gaps between thousands."""
    return f"{value:,.0f}".replace(",", "\u202f")


def _size(value: float) -> str:
    """Bytes for people, decimal units."""
    for unit in ("B", "kB", "MB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def _total(value: Any) -> float:
    """A number, or the sum of a mapping of numbers."""
    return float(sum(value.values())) if isinstance(value, Mapping) else float(value)


def _signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign, or a dash where there is none."""
    return "\u2013" if value is None else f"{value:+.{digits}f}"


def _draw(result: Mapping[str, Any], metrics: Mapping[str, MetricRows]) -> dict[str, bytes]:
    """All figures the result has data for, as PNG bytes by file stem."""
    drawn = {
        "losses": figures.draw_losses(result),
        "loss_matrix": figures.draw_loss_matrix(result),
    }
    if result.get("gates"):
        drawn["gates"] = figures.draw_gates(result)
    if result["forecasts"]:
        drawn["forecasts"] = figures.draw_forecasts(result)
    if any(metrics.values()):
        drawn["training_curves"] = figures.draw_training_curves(metrics)
    return drawn


def render_html(result: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The page, with its figures inside it.

    Args:
        result: Content of report.json.
        images: PNG bytes by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("molora_fed.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=_count,
        describe_excess=describe_excess,
        list_control_costs=list_control_costs,
        describe_overlap=describe_overlap,
        list_overlap=list_overlap,
        mask_controls=mask_controls,
        order_phases=order_phases,
        seconds=_seconds,
        signed=_signed,
        size=_size,
        total=_total,
    )
    published = result.get("router") or min(result["losses"]["fused"])
    first, rest = order_forecasts(result)
    inlined = {name: base64.b64encode(data).decode() for name, data in images.items()}
    return environment.get_template("report.html.j2").render(
        result=result,
        methods=list_methods(result),
        controls=describe_controls(result),
        published=published,
        images=inlined,
        headline=list_headline(result),
        forecasts=(first, rest),
        notes=(list_notes(first), list_notes(rest)),
        overlap_columns=OVERLAP_COLUMNS,
        privacy=describe_privacy(result),
        sent=(list_senders(result), list_sent(result)),
        claims=(CLAIM_COLUMNS, list_claims(result)),
        replaced=describe_replacement(result),
        failures=list_failures(result),
        settings=list_settings(result),
    )


def write_report(
    result: Mapping[str, Any], metrics: Mapping[str, MetricRows], folder: Path
) -> Path:
    """Write page, figures, JSON and training metrics into a folder.

    Every file is whole or not there, report.json comes last, and other files in the folder stay.

    Args:
        result: Content of report.json, as docs/report.schema.json says.
        metrics: Training metrics by contributor; empty where they are not known.
        folder: Where; made if it is not there.

    Returns:
        Path of report.html.

    Raises:
        ConfigError: If the result lacks a part or one is malformed; nothing is written.
        StorageError: On I/O errors.
    """
    _check_result(result, str(folder))
    try:
        images = _draw(result, metrics)
        page = render_html(result, images)
    except MALFORMED as error:
        raise ConfigError(
            f"Cannot write report '{folder}': expected a result as docs/report.schema.json says, "
            f"got {type(error).__name__}: {clean(error)}. Fuse again with `molora fuse`."
        ) from error
    for name in FIGURES:
        if name in images:
            write_bytes(folder / f"{name}.png", images[name])
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier result
    for contributor, rows in metrics.items():
        lines = b"".join(canonical_json(dict(row)) + b"\n" for row in rows)
        write_bytes(folder / METRICS_FOLDER / f"{contributor}.jsonl", lines)
    write_bytes(folder / PAGE, page.encode())
    write_json(folder / REPORT_JSON, dict(result))
    return folder / PAGE


def _check_result(result: Any, where: str) -> None:
    """Check that every required part is there; docs/report.schema.json has the whole schema.

    Raises:
        ConfigError: Naming all that is missing.
    """
    missing = [k for k in _REQUIRED if not isinstance(result, Mapping) or k not in result]
    if missing:
        raise ConfigError(
            f"Cannot write report '{where}': expected a result with {', '.join(_REQUIRED)}, got "
            f"one without {', '.join(missing)}. Fuse again with `molora fuse`."
        )


def find_report(folder: Path) -> Path:
    """The report.json in a folder: of a report, a cooperative, a contributor, a fusion, a demo.

    Args:
        folder: Folder that holds report.json itself, in report/ or in result/report/; or the file.

    Raises:
        ConfigError: If there is none.
    """
    names = (REPORT_JSON, f"report/{REPORT_JSON}", f"result/report/{REPORT_JSON}")
    for candidate in (folder, *(folder / name for name in names)):
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"Cannot find a report in '{folder}': expected one of {', '.join(names)}, got "
        f"{'none' if folder.exists() else 'no such folder'}. "
        "Make one with `molora fuse` or `molora demo`."
    )


def load_report(path: Path) -> dict[str, Any]:
    """Read report.json.

    Raises:
        ConfigError: If it is too large, not JSON, or lacks a required part.
    """
    try:
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise ConfigError(
                f"Cannot read report '{path}': expected at most {MAX_REPORT_BYTES} bytes, got "
                f"{path.stat().st_size}. Check that this is the right file."
            )
        result = parse_json(path.read_bytes(), max_bytes=MAX_REPORT_BYTES)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"Cannot read report '{path}': expected JSON, got {clean(error)}. Fuse again."
        ) from error
    _check_result(result, str(path))
    return dict(result)


def read_metrics(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Training metrics kept beside a report: `metrics/<contributor>.jsonl`; empty without them.

    Raises:
        ConfigError: If a file is malformed.
    """
    metrics: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((folder / METRICS_FOLDER).glob("*.jsonl")):
        metrics[path.stem] = read_metrics_file(path)
    return metrics


def read_metrics_file(path: Path) -> list[dict[str, Any]]:
    """Rows of one metrics.jsonl.

    Raises:
        ConfigError: If it is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [parse_json(line, max_bytes=MAX_ROW_BYTES) for line in lines]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Cannot read training metrics '{path}': expected one JSON object a line, got "
            f"{clean(error)}. Remove the file."
        ) from error
