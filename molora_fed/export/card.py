"""The README of an export: how it is loaded, what is in it, what was measured and what was not.

It is Markdown with the front matter of a model card. Names and sentences of others pass through
`clean`, and nothing of them is markup.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.adapters.files import WEIGHTS_FILE
from molora_fed.export.gguf_lora import build_command, build_request
from molora_fed.export.subject import Subject, Weights
from molora_fed.reporting.headline import list_headline
from molora_fed.reporting.methods import MALFORMED, list_methods
from molora_fed.storage.files import write_bytes
from molora_fed.storage.untrusted import clean

__all__ = ["Card", "write_card"]

_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|!~])")


@dataclass(frozen=True)
class Card:
    """What a README is made from.

    Attributes:
        subject: What was exported.
        to: "peft", "merged" or "gguf".
        merge: Of "merged": "adapter" or "checkpoint".
        rows: Name of each file or folder, and what it is.
        weights: Of a merge or a mixture; None of PEFT folders.
        notes: What to know, a line each.
        trace_root: Merkle root of the cooperative's trace, hex; "" without one.
    """

    subject: Subject
    to: str
    merge: str
    rows: tuple[tuple[str, str], ...]
    weights: Weights | None
    notes: tuple[str, ...]
    trace_root: str


def write_card(card: Card, folder: Path) -> None:
    """Write README.md into a folder.

    Args:
        card: What it says.
        folder: An existing folder.

    Raises:
        StorageError: On I/O errors.
    """
    sections = [
        _front_matter(card),
        _title(card),
        _use(card),
        _contents(card),
        _mixing(card),
        _members(card),
        _losses(card),
        _forecast(card),
        _origin(card),
        _untested(card),
    ]
    text = "\n\n".join("\n".join(lines) for part in sections if (lines := list(part)))
    write_bytes(folder / "README.md", f"{text}\n".encode())


def _plain(value: object, limit: int = 200) -> str:
    """Text of anybody, as text of a Markdown page."""
    return _MARKUP.sub(r"\\\1", clean(value, limit))


def _front_matter(card: Card) -> Iterator[str]:
    library = {"gguf": "gguf", "peft": "peft"}.get(card.to)
    if card.to == "merged":
        library = "peft" if card.merge == "adapter" else "transformers"
    yield "---"
    yield f"base_model: {json.dumps(clean(card.subject.base.id))}"
    yield f"library_name: {library}"
    yield "tags: [molora-fed]"
    yield "---"


def _title(card: Card) -> Iterator[str]:
    subject = card.subject
    what = {"base": "Base", "specialist": "Specialist"}.get(subject.kind, "Specialists")
    yield f"# {what} of {_plain((subject.report or {}).get('cooperative', subject.base.id))}"
    if subject.specialists:
        yield ""
        yield (
            f"{len(subject.specialists)} adapter(s) of one base, {_plain(subject.base.id)}, "
            "exported by molora-fed."
        )


def _use(card: Card) -> Iterator[str]:
    yield "## Use"
    yield ""
    if card.to == "gguf":
        if not card.subject.specialists:
            yield from ("```", "llama-server -m base.gguf", "```")
            return
        values = card.weights.values if card.weights else {}
        yield from ("```", build_command(card.subject, values), "```", "")
        yield "A request without `lora` gets the scales of the command. Any other chooses its own"
        yield "mixture, which holds for all of its text; adapters it does not name have scale 0:"
        body = {"prompt": "TEXT", "lora": build_request(card.subject, values)}
        yield from ("", "```", "curl http://127.0.0.1:8080/completion -d \\")
        yield f"  '{json.dumps(body)}'"
        yield "```"
        yield ""
        yield 'The base alone is `"lora": [{"id": 0, "scale": 0}]`; an empty list counts as none.'
        if card.subject.gates:
            yield ""
            yield "`mixture.json` has such a list for each domain: the router's mean gates there."
        return
    place, is_whole = _find_place(card)
    yield "```python"
    if is_whole:
        yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
        yield ""
        yield f'model = AutoModelForCausalLM.from_pretrained("{place}")'
        yield f'tokenizer = AutoTokenizer.from_pretrained("{place}")'
    else:
        yield "from peft import PeftModel"
        yield "from transformers import AutoModelForCausalLM"
        yield ""
        yield 'base = AutoModelForCausalLM.from_pretrained("BASE_FOLDER")'
        yield f'model = PeftModel.from_pretrained(base, "{place}")'
    yield "```"


def _find_place(card: Card) -> tuple[str, bool]:
    """The folder that the example loads, and whether it is a whole checkpoint."""
    if card.to == "merged":
        return "THIS_FOLDER", card.merge == "checkpoint"
    if card.rows[0][0] == WEIGHTS_FILE:  # the README of one adapter
        return "THIS_FOLDER", False
    low_rank = [each.name for each in card.subject.specialists if each.is_low_rank]
    return f"THIS_FOLDER/{(low_rank or [card.rows[0][0]])[0]}", not low_rank


def _contents(card: Card) -> Iterator[str]:
    yield "## Contents"
    yield ""
    yield "| name | what it is |"
    yield "|---|---|"
    yield from (f"| `{name}` | {_plain(what)} |" for name, what in card.rows)
    for note in card.notes:
        yield ""
        yield f"- {_plain(note, 500)}"


def _mixing(card: Card) -> Iterator[str]:
    """What the weights are, and what they are not."""
    if card.weights is None:
        return
    yield "## Weights"
    yield ""
    shown = ", ".join(f"{name} {value:.4g}" for name, value in card.weights.values.items())
    yield f"{shown}: {_plain(card.weights.source, 500)}."
    yield ""
    if card.subject.kind == "fused":
        yield (
            "This adds the specialists' changes to one set of weights, the same for all of a "
            "text. The fused model is another thing: it runs every expert and mixes their "
            f"distributions ({card.subject.mixture}) with gates that its router "
            f"{_plain(card.subject.router)} chooses token by token. The fused model's losses "
            "below are not this export's."
        )
    elif card.subject.kind == "evolved":
        yield (
            "The evolved model scales the same changes in the same layers, with gates that its "
            f"router {_plain(card.subject.router)} chooses token by token; here they are the same "
            "for all of a text. Its losses are not this export's."
        )


def _members(card: Card) -> Iterator[str]:
    if not card.subject.specialists:
        return
    yield "## Members"
    yield ""
    yield "| name | domain | kind | rank | adapter, SHA-256 |"
    yield "|---|---|---|---:|---|"
    for each in card.subject.specialists:
        adapter = each.adapter
        rank = adapter.max_rank or "dense"
        domain = _plain(each.domain) if each.domain else "not known"
        yield (
            f"| {_plain(each.name)} | {domain} | {_plain(adapter.kind)} | {rank} "
            f"| `{adapter.hash[:16]}` |"
        )


def _losses(card: Card) -> Iterator[str]:
    report = card.subject.report
    if report is None:
        return
    try:
        domains = [str(domain) for domain in report["domains"]]
        rows = [
            "| "
            + " | ".join(
                [
                    _plain(method.label),
                    *(f"{method.losses[domain]:.3f}" for domain in domains),
                    f"{method.point:.4f}",
                    _interval(method.low, method.high),
                ]
            )
            + " |"
            for method in list_methods(report)
        ]
    except MALFORMED:
        yield from ("## Losses", "", "The report beside the model is malformed; nothing is shown.")
        return
    yield "## Losses"
    yield ""
    yield (
        "Of the cooperative's report, on held-out text: nats per token, the mean over domains "
        "with its 95 % interval by document."
    )
    yield ""
    names = ("method", *map(_plain, domains), "mean", "95 % interval")
    yield f"| {' | '.join(names)} |"
    yield f"|---{'|---:' * (len(names) - 1)}|"
    yield from rows


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _forecast(card: Card) -> Iterator[str]:
    report = card.subject.report
    if report is None:
        return
    try:
        lines = list_headline(report)
    except MALFORMED:
        return
    if lines:
        yield "## Forecast"
        yield ""
        yield "Of the fused model's gain, recorded before it was measured:"
        yield ""
        yield from (f"- {_plain(line, 1_000)}" for line in lines)


def _origin(card: Card) -> Iterator[str]:
    base = card.subject.base
    yield "## Origin"
    yield ""
    yield f"- base: {_plain(base.id)} {_plain(base.revision)}, weights `{base.weights[:16]}`"
    report = card.subject.report
    if report is not None:
        yield f"- report of {_plain(report.get('created', 'a time that is not known'))}"
        charter = report["fingerprints"].get("charter")
        if charter:
            yield f"- charter `{clean(charter, 64)}`"
    if card.trace_root:
        yield f"- trace of the cooperative's decisions, last signed root `{card.trace_root}`"
    elif card.subject.kind in ("fused", "evolved"):
        yield "- trace: none was recorded, or it is not beside the model"


def _untested(card: Card) -> Iterator[str]:
    yield "## What was not tested"
    yield ""
    report: Any = card.subject.report
    if report is None:
        yield "- losses of anything here: no report of these adapters is beside the model"
    else:
        yield "- text of other domains, languages or forms than the held-out text"
        if card.weights is not None:
            yield "- the loss of this mixture of weights: the report's figures are of other models"
        try:
            for kind, entries in report.get("not_measured", {}).items():
                for name, why in entries.items():
                    yield f"- {_plain(kind)} {_plain(name)}: {_plain(why, 500)}"
        except MALFORMED:
            yield "- what the report says was not measured, which is malformed"
    if card.to == "gguf":
        yield "- quantised copies of these files, and accelerators"
    yield "- safety, truth and bias of what it writes, and whether it repeats its training text"
