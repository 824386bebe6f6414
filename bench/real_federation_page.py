"""The page of bench/real_federation.py."""

import platform
from importlib.metadata import version
from typing import Any

__all__ = ["build_page"]


def _list_losses(report: dict[str, Any]) -> list[str]:
    """Rows of losses by domain: base, specialists, fused; held-out, nats per token."""
    losses, router, domains = report["losses"], report["router"], report["domains"]
    rows = {"base": losses["base"]}
    rows |= {f"{name}'s specialist": one for name, one in losses["specialists"].items()}
    rows["fused"] = losses["fused"][router]
    lines = [f"| | {' | '.join(domains)} | mean |", f"|---|{'---:|' * (len(domains) + 1)}"]
    for name, one in rows.items():
        cells = [one[domain] for domain in domains]
        cells.append(sum(cells) / len(cells))
        lines.append(f"| {name} | {' | '.join(f'{cell:.4f}' for cell in cells)} |")
    gain = report["gain_percent"][router]["vs_best_alone"]
    span = report["gain_interval_percent"][router]["vs_best_alone"]
    best = report["best_alone"]
    return [
        *lines,
        "",
        f"Best alone: {best['name']}, {best['loss']:.4f}. The fused model ({router}) is "
        f"{gain:+.2f} % below it (95 % interval by document {span['low']:+.2f} to "
        f"{span['high']:+.2f}).",
    ]


def _list_bytes(found: dict[str, Any]) -> list[str]:
    """Rows of bytes by member."""
    copies = {"alice": "a folder", "bob": found["bob's copy"], "carol": "none"}
    lines = [
        "| member | own copy | wire, received | wire, sent | files from the server | of these: the "
        "checkpoint | … what describes it | … model and report | files to the server |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in found["members"].items():
        received, sent = found["wire"][name]
        described = found["base"]["describing"]
        counts = (received, sent, one["sent"], one["checkpoint"], described)
        cells = [f"{count:,}" for count in (*counts, found["result bytes"], one["received"])]
        lines.append(f"| {name} | {copies[name]} | {' | '.join(cells)} |")
    return lines


def _list_phases(found: dict[str, Any]) -> list[str]:
    """Rows of seconds by phase and side."""
    names = list(dict.fromkeys(name for one in found["phases"].values() for name in one))
    lines = [f"| side | {' | '.join(names)} | worker's memory |"]
    lines.append(f"|---|{'---:|' * (len(names) + 1)}")
    for side, one in found["phases"].items():
        cells = [f"{one[name]:.0f}" if name in one else "" for name in names]
        peak = f"{found['worker peaks'][side] / 1e6:,.0f} MB"
        lines.append(f"| {side} | {' | '.join([*cells, peak])} |")
    return lines


def build_page(found: dict[str, Any], problems: list[str], command: str) -> str:
    """The Markdown page.

    Args:
        found: What was measured.
        problems: What is not as it should be.
        command: The command that measured it.
    """
    base, refusal, codes = found["base"], found["refusal"], found["codes"]
    names = ("flwr", "gguf", "molora-fed", "peft", "torch", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    peaks = ", ".join(f"{name} {peak / 1e6:,.0f} MB" for name, peak in found["peaks"].items())
    lines = [
        "# A federation on a real base",
        "",
        f"`{command}`, as root; Python {platform.python_version()}, {versions}.",
        "",
        f"Base: {base['id']}, {base['files']} files of {base['bytes']:,} bytes in bfloat16. One "
        "machine of two cores without an accelerator, busy with other work; a network namespace, a "
        "user and a home for each side, a link from each contributor to the server, TLS and "
        f"invitations. {found['training']}. Text: Python's own modules (sources), docstrings of "
        "other modules, and its language reference. The figures show that it works at this size; "
        "so few steps say nothing about how good fusing is.",
        "",
        "; ".join(problems) or "Everything was as it should be.",
        "",
        "## Steps",
        "",
        "| step | seconds |",
        "|---|---:|",
        *(f"| {what} | {seconds:.0f} |" for what, seconds in found["steps"]),
        "",
        f"Exit codes: {', '.join(f'{name} {code}' for name, code in codes.items())} (`serve` was "
        "told to end once all had the model). Seconds in each phase, all three at once:",
        "",
        *_list_phases(found),
        "",
        f"Largest memory of the server's processes: {peaks}.",
        "",
        "## Bytes",
        "",
        *_list_bytes(found),
        "",
        "Wire: all bytes of the contributor's network interface, frames, TLS and questions without "
        "news included; alice's with the refused attempt. Files: what the server counts by member "
        "(`molora status`). The checkpoint's bytes are those less what describes the base "
        "(`base.json`) and less model and report, exactly: none for alice and bob, all "
        f"{base['parts']} parts of it for carol.",
        "",
        "## Losses",
        "",
        *_list_losses(found["result"]),
        "",
        f"The report's {found['report']['files']} files are "
        + ("the same, byte by byte, " if found["report"]["same"] else "NOT the same ")
        + "on the server and at all three contributors. bob's fused model goes on with "
        "`def read(path):` as",
        "",
        "```",
        found["text"],
        "```",
        "",
        "## The wrong copy",
        "",
        f"alice's checkpoint with one other value in `{found['changed']}`: exit code "
        f"{refusal['code']}, nothing of it kept, nothing contributed; {refusal['wire'][0]:,} bytes "
        f"received and {refusal['wire'][1]:,} sent on the wire until then. With the right copy and "
        "the same home she then joined.",
        "",
        "```",
        *refusal["lines"],
        "```",
    ]
    return "\n".join(lines) + "\n"
