"""What left contributors' machines, and whose figures these are: the same on page and terminal."""

from collections.abc import Mapping
from typing import Any

__all__ = [
    "CLAIM_COLUMNS",
    "SENT_COLUMNS",
    "describe_privacy",
    "list_claims",
    "list_senders",
    "list_sent",
]

SENT_COLUMNS = {
    "adapter": "adapter",
    "manifest": "manifest",
    "samples": "samples of text",
    "statistics": "statistics of hidden states",
    "counts": "counts of text, losses of others' adapters",
    "overlap": "8-grams, blinded or as tags",
    "masks": "keys, shares and agreements of masked sums",
    "sums": "sums over text",
    "evolution": "populations and sums of an evolution",
}
"""What is sent, by kind, in words."""
CLAIM_COLUMNS = ("adapter of", "measured by", "on text of", "base", "with the adapter", "documents")


def list_sent(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each kind of thing that was sent: what, messages and bytes of each contributor.

    Args:
        result: Content of report.json.

    Returns:
        In words; none where nobody counted. The last row is the sum.
    """
    sent = result.get("sent", {})
    names = sorted(sent)
    rows = []
    for kind, words in SENT_COLUMNS.items():
        cells = [sent[name].get(kind) for name in names]
        if any(cells):
            rows.append((words, *map(_show, cells)))
    if rows:
        totals = [sum(row["bytes"] for row in sent[name].values()) for name in names]
        rows.append(("in all", *(f"{total:,}" for total in totals)))
    return rows


def list_senders(result: Mapping[str, Any]) -> list[str]:
    """Contributors in the order of the cells of `list_sent`."""
    return sorted(result.get("sent", {}))


def _show(row: Mapping[str, int] | None) -> str:
    if not row:
        return "-"
    messages = f" in {row['messages']}" if row["messages"] > 1 else ""
    return f"{row['bytes']:,}{messages}"


def describe_privacy(result: Mapping[str, Any]) -> str:
    """Where the texts lay, and whose own figures a domain's are; empty where texts were pooled.

    Args:
        result: Content of report.json.
    """
    if "sums" not in result or result.get("privacy_mode") == "pooled":
        return ""
    members = result["sums"]["members"]
    parts = ["Texts stayed with their contributors, who answered with sums over their documents."]
    if result["privacy_mode"] == "statistics":
        parts.append(
            "Routers were made from statistics of hidden states that came with the adapters: no "
            "guard judged them on calibration text."
        )
    few = [domain for domain, count in sorted(members.items()) if count < 3]
    if few:
        parts.append(
            f"Figures of {', '.join(few)} are those of fewer than three members: of one alone they "
            "are its own."
        )
    clusters = ", ".join(f"{d} {n:,}" for d, n in sorted(result["sums"]["clusters"].items()))
    parts.append(f"Document clusters: {clusters}.")
    if "shortlist" in result["sums"]:
        parts.append(_describe_shortlist(result["sums"]["shortlist"], result["router"]))
    return " ".join(parts)


def _describe_shortlist(found: Mapping[str, Any], router: str) -> str:
    passes, cost = found["block_passes"], found["cost_nats"][router]
    saved = 1 - passes["shortlist"] / passes["all"]
    return (
        f"Each member measured {found['experts']} of {found['of']} experts on all of its text, "
        f"chosen on {found['choice_blocks']} calibration blocks; losses of the others are the "
        f"base's ({saved:.0%} of the passes saved). On {found['cost_blocks']} held-out blocks a "
        f"member, where all were measured, {router} lost {cost['point']:+.4f} nats "
        f"[{cost['low']:+.4f}, {cost['high']:+.4f}] more with these shortlists than with all."
    )


def list_claims(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What members measured of one another's adapters, a row each; see `CLAIM_COLUMNS`.

    Args:
        result: Content of report.json.
    """
    return [
        (
            whom,
            name,
            one["domain"],
            f"{one['base']:.4f}",
            f"{one['loss']:.4f}",
            f"{one['clusters']:,}",
        )
        for whom, found in sorted(result.get("claims", {}).items())
        for name, one in sorted(found.items())
    ]
