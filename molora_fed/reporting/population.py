"""The page of an evolution: held-out losses, fitness by slot and generation, gates, lineage."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from molora_fed.errors import ConfigError
from molora_fed.population.lineage import Lineage, read_lineage
from molora_fed.reporting.figures import PALETTE, draw_cells, draw_losses, save_figure, tidy_axes
from molora_fed.reporting.lineage import draw_lineage
from molora_fed.reporting.methods import (
    MALFORMED,
    as_label,
    describe_choice,
    list_methods,
    mask_controls,
)
from molora_fed.reporting.overlap import OVERLAP_COLUMNS, describe_overlap, list_overlap
from molora_fed.storage.files import write_bytes
from molora_fed.storage.untrusted import clean, parse_json

__all__ = [
    "RESULT_FILE",
    "draw_fitness",
    "draw_slot_gates",
    "find_evolution",
    "write_population_report",
]

RESULT_FILE = "evolution.json"
LINEAGE_FILE = "lineage.jsonl"
MAX_RESULT_BYTES = 64 * 2**20


def draw_fitness(lineage: Lineage) -> bytes:
    """Fitness of every slot's adapter at the start of each generation, with its standard error.

    Args:
        lineage: What the file says, with measurements.

    Returns:
        PNG bytes.
    """
    figure, axes = _new(8.0, 4.0)
    series: dict[int, list[tuple[int, float, float]]] = {}
    for measurement in lineage.measurements:
        for slot, one in enumerate(measurement.slots):
            series.setdefault(slot, []).append((measurement.generation, one.value, one.error))
    for slot, points in series.items():
        generations, values, errors = zip(*points, strict=True)
        axes.errorbar(
            generations,
            values,
            yerr=errors,
            color=PALETTE[slot % len(PALETTE)],
            linestyle=("-", "--", "-.", ":")[slot // len(PALETTE) % 4],
            marker="o",
            markersize=4,
            capsize=2,
            label=f"slot {slot}",
        )
    for member in lineage.members.values():
        if member.kept and member.birth.generation > 0:
            axes.axvline(member.birth.generation + 0.5, color="#DDDDDD", linewidth=1, zorder=0)
    axes.axhline(0.0, color="#999999", linewidth=1)
    axes.set_xticks(sorted({m.generation for m in lineage.measurements}))
    axes.set_xlabel("generation (grey line: newborns were kept)", fontsize=9)
    axes.set_ylabel("fitness, nats per token (bar: standard error)", fontsize=9)
    figure.legend(fontsize=8, frameon=False, loc="outside upper right", ncols=6)
    return save_figure(figure)


def draw_slot_gates(generation: Mapping[str, Any]) -> bytes:
    """Mean gate of every slot by domain.

    Args:
        generation: One of `generations` of evolution.json.

    Returns:
        PNG bytes.
    """
    gates, slots = generation["gates"], list(generation["slots"])
    domains = list(gates)
    values = np.array([gates[domain] for domain in domains], dtype=float)
    figure, axes = _new(2.6 + min(0.9, 12.0 / len(slots)) * len(slots), 1.6 + 0.45 * len(domains))
    labels = [[f"{value:.2f}" for value in row] for row in values]
    image = draw_cells(axes, values, {"cmap": "Blues", "vmin": 0.0, "vmax": 1.0}, labels)
    axes.set_xticks(range(len(slots)), map(as_label, slots), rotation=35, ha="right")
    axes.set_yticks(range(len(domains)), map(as_label, domains))
    axes.set_xlabel("slot, by its adapter", fontsize=9)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label("mean gate", fontsize=9)
    return save_figure(figure)


def _new(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tidy_axes(axes)
    return figure, axes


def find_evolution(folder: Path) -> Path | None:
    """The folder with an evolution's result: this one, or a cooperative's; None if neither is."""
    for candidate in (folder, folder / "evolution"):
        if (candidate / RESULT_FILE).is_file():
            return candidate
    return None


def write_population_report(folder: Path) -> Path:
    """Write page and figures of an evolution into its `report/`.

    Args:
        folder: With `evolution.json` and `lineage.jsonl`.

    Returns:
        Path of the page.

    Raises:
        ConfigError: If the result is missing, too large or malformed.
        PopulationError: If the lineage cannot be read.
        StorageError: On I/O errors.
    """
    path = folder / RESULT_FILE
    try:
        if path.stat().st_size > MAX_RESULT_BYTES:
            raise ValueError(f"more than {MAX_RESULT_BYTES} bytes")
        result = parse_json(path.read_bytes(), max_bytes=MAX_RESULT_BYTES)
        lineage = read_lineage(folder / LINEAGE_FILE)
        images = _draw(result, lineage)
        page = _render(result, images)
    except (OSError, *MALFORMED) as error:
        raise ConfigError(
            f"Cannot write the report of evolution '{folder}': expected what `molora evolve` "
            f"wrote, got {clean(error)}. Evolve again."
        ) from error
    for name, data in images.items():
        write_bytes(folder / "report" / f"{name}.png", data)
    write_bytes(folder / "report" / "population.html", page.encode())
    return folder / "report" / "population.html"


def _draw(result: Mapping[str, Any], lineage: Lineage) -> dict[str, bytes]:
    drawn = {
        "losses": draw_losses(result),
        "slot_gates": draw_slot_gates(result["generations"][-1]),
        "lineage": draw_lineage(lineage),
    }
    if lineage.measurements:
        drawn["fitness"] = draw_fitness(lineage)
    return drawn


def _render(result: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("molora_fed.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clean"] = mask_controls
    environment.filters["describe_choice"] = describe_choice
    inlined = {name: base64.b64encode(data).decode() for name, data in images.items()}
    generations: Sequence[Mapping[str, Any]] = result["generations"]
    return environment.get_template("population.html.j2").render(
        result=result,
        methods=list_methods(result),
        overlap_columns=OVERLAP_COLUMNS,
        overlap=list_overlap(result),
        overlap_text=describe_overlap(result),
        generations=generations[1:],
        gain=result["gain_percent"][result["router"]]["vs_best_alone"],
        interval=result["gain_interval_percent"][result["router"]]["vs_best_alone"],
        images=inlined,
    )
