"""Studies for people: Markdown pages and SVG figures, the same bytes for the same results.

Also one page from the results of many studies: published claims beside our figures.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from molora_fed.errors import StudyError
from molora_studies.framework.contract import Figure

__all__ = [
    "collect_claims",
    "draw_figure",
    "read_documents",
    "render_claims",
    "render_study",
    "render_table",
]

_STYLE = {
    "axes.edgecolor": "#222222",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "grid.color": "#E5E5E5",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.markersize": 5,
    "svg.hashsalt": "molora",
    "text.color": "#222222",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def draw_figure(figure: Figure) -> bytes:
    """A figure as SVG in the reports' style; a study only draws what it shows."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure as Canvas

    from molora_fed.reporting.figures import PALETTE

    style = {**_STYLE, "axes.prop_cycle": cycler(color=PALETTE)}
    buffer = io.BytesIO()
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(8.0, 4.5), layout="constrained")
        figure.draw(canvas)
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _escape(text: object) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def render_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| " + " | ".join(map(_escape, columns)) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(map(_escape, row)) + " |"


def render_claims(claims: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of the table of published claims beside our figures.

    Results from before claims named their unit of replication say so.
    """
    rows = [
        [
            each["claim"], each["published"], each["measured"], each["verdict"],
            each.get("unit", "not named"), each["reason"],
        ]
        for each in claims
    ]  # fmt: skip
    yield from render_table(("claim", "published", "ours", "verdict", "over", "why"), rows)


def render_study(document: Mapping[str, Any]) -> str:
    """The Markdown page of a study's JSON document."""
    name, summary = document["study"], document["summary"]
    lines = [f"# {document['title']}", ""]
    if summary["claims"]:
        lines += ["## Claims", "", *render_claims(summary["claims"]), ""]
    for table in summary["tables"]:
        lines += [f"## {table['title']}", "", *render_table(table["columns"], table["rows"]), ""]
    for figure in summary["figures"]:
        caption = _escape(figure["caption"])
        lines += [f"![{caption}]({name}-{figure['name']}.svg)", "", caption, ""]
    if summary["notes"]:
        lines += ["## Notes", "", *(f"- {_escape(note)}" for note in summary["notes"]), ""]
    lines += ["## How it was made", "", *_render_making(document)]
    return "\n".join(lines) + "\n"


_UNCOUNTED = ("by construction", "not tuned")


def _count_verdicts(documents: Sequence[Mapping[str, Any]]) -> str:
    """Verdicts by number; what is no verdict stands apart."""
    found = Counter(claim["verdict"] for d in documents for claim in d["summary"]["claims"])
    parts = [
        ", ".join(f"{found[verdict]} {verdict}" for verdict in sorted(found) if verdict in chosen)
        for chosen in (set(found) - set(_UNCOUNTED), set(_UNCOUNTED))
    ]
    return (f": {parts[0]}" if parts[0] else "") + (
        f"; without a verdict: {parts[1]}" if parts[1] else ""
    )


def _render_making(document: Mapping[str, Any]) -> Iterator[str]:
    seconds = sum(document["seconds"]["tasks"].values())
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    yield (
        f"`molora study {document['study']}`: {len(document['cells'])} cells, "
        f"{len(document['seconds']['tasks'])} tasks, {seconds / 60:.1f} core-minutes in all; "
        f"seeds {', '.join(map(str, document['seeds']))}."
    )
    yield ""
    yield f"Options: `{json.dumps(document['options'], sort_keys=True)}`"
    yield ""
    yield f"Versions: {versions}."
    if "judged" in document:
        yield ""
        yield (
            "Summed up and judged from the kept cells by later code than made them "
            "(`molora study --rejudge`)."
        )


def read_documents(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Results of studies in a folder, by file; other JSON files are passed over.

    Raises:
        StudyError: If a file is not JSON.
    """
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise StudyError(
                f"Cannot collect '{path}': expected JSON, got {error}. Run its study again."
            ) from error
        if isinstance(content, dict) and {"study", "summary"} <= content.keys():
            yield path, content


def collect_claims(folder: Path, page_folder: Path) -> str:
    """Markdown with all claims of a folder's studies, one section each.

    Args:
        folder: Holds studies' JSON files; other JSON files are passed over.
        page_folder: Where the page will be, for its links.

    Raises:
        StudyError: If there is no result, or one is not JSON.
    """
    found = list(read_documents(folder))
    if not found:
        raise StudyError(
            f"Cannot collect '{folder}': expected results of studies, got none. "
            "Run `molora study NAME --out` into it."
        )
    lines = [
        "# Published claims beside our figures",
        "",
        f"Gathered by `molora study --collect` from {len(found)} "
        f"{'study' if len(found) == 1 else 'studies'}{_count_verdicts([d for _, d in found])}.",
        "",
    ]
    for path, document in found:
        page = os.path.relpath(path.with_suffix(".md"), page_folder)
        summary = document["summary"]
        lines += [f"## {document['study']}", "", f"[{document['title']}]({page})", ""]
        if summary["claims"]:
            lines += [*render_claims(summary["claims"]), ""]
        for table in summary["tables"][:1]:
            rows = render_table(table["columns"], table["rows"])
            lines += [f"**{table['title']}**", "", *rows, ""]
        if summary["notes"]:
            lines += [*(f"- {' '.join(note.split())}" for note in summary["notes"]), ""]
    return "\n".join(lines).rstrip() + "\n"
