"""One page from the results of many studies: published claims beside our figures."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molora_fed.errors import StudyError
from molora_studies.framework.render import render_claims, render_table

__all__ = ["collect_claims"]


def _read_documents(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
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
    found = list(_read_documents(folder))
    if not found:
        raise StudyError(
            f"Cannot collect '{folder}': expected results of studies, got none. "
            "Run `molora study NAME --out` into it."
        )
    verdicts = Counter(c["verdict"] for _, d in found for c in d["summary"]["claims"])
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    lines = [
        "# Published claims beside our figures",
        "",
        f"Gathered by `molora study --collect` from {len(found)} studies"
        + (f": {counts}." if counts else "."),
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
