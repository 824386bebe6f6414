"""Contamination of held-out text in words and rows, the same on a terminal and on a page."""

from collections.abc import Mapping
from typing import Any

__all__ = ["OVERLAP_COLUMNS", "describe_overlap", "list_overlap"]

OVERLAP_COLUMNS = (
    "in own train text", "in anyone's", "in the base's", "blocks left out", "in any, of those kept",
)  # fmt: skip


def list_overlap(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each domain: its name, then the cells of `OVERLAP_COLUMNS`.

    Args:
        result: Content of report.json or evolution.json.
    """
    own, overlap = result.get("contamination", {}), result.get("overlap", {"domains": {}})
    rows = []
    for domain in sorted({*own, *overlap["domains"]}):
        found = overlap["domains"].get(domain, {})
        left_out = f"{found['left_out']} of {found['blocks']}" if found else "-"
        shares = (own.get(domain), found.get("union"), found.get("base"))
        after = None if found and found["left_out"] == found["blocks"] else found.get("after")
        rows.append((domain, *map(_show, shares), left_out, _show(after)))
    return rows


def _show(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def describe_overlap(result: Mapping[str, Any]) -> str:
    """What held-out blocks were compared with, and when one is left out, in sentences.

    Args:
        result: Content of report.json; of one from before there was a comparison, that it is none.
    """
    overlap = result.get("overlap")
    if overlap is None:
        return "Compared with each contributor's own train text only; nothing was left out."
    compared = overlap["compared"]
    texts = [
        *([f"train text of {', '.join(compared['train'])}"] if compared["train"] else []),
        "calibration blocks" if "sums" in result else "the samples that were sent",
        *(["the base's train text"] if compared["base"] else []),
    ]
    elsewhere = [] if "not_compared" in overlap else overlap["absent"]
    absent = [
        *([f"train text of {', '.join(elsewhere)}"] if elsewhere else []),
        *([] if compared["base"] else ["the base's train text"]),
    ]
    sentences = [f"Compared with {'; '.join(texts)}."]
    if absent:
        sentences.append(f"Not here, so not compared: {'; '.join(absent)}.")
    for name, others in overlap.get("not_compared", {}).items():
        sentences.append(
            f"Held-out text of {name} was not compared with train text of {', '.join(others)}."
        )
    share = 100 * overlap["max_block_overlap"]
    sentences.append(
        f"Blocks with more than {share:.0f} % in any of it are left out of every figure."
    )
    over = [name for name, found in overlap["domains"].items() if found["after"] > overlap["limit"]]
    if over:
        limit = 100 * overlap["limit"]
        sentences.append(f"More than {limit:.0f} % stays in {', '.join(over)}.")
    gone = [n for n, found in overlap["domains"].items() if found["left_out"] == found["blocks"]]
    if gone:
        sentences.append(f"No block is left of {', '.join(gone)}: no figure counts it.")
    return " ".join(sentences)
