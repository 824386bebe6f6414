"""The page of bench/traffic_test.py: one column for each federation that was searched."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["build_page"]

_DECOY = "decoy of "
_ONE_OF_SEVERAL = "sums of one of several members"
_ATTACKS = (
    "The attacker has all experts and 600 documents of the member's domain that are not the "
    "member's. Told a total, it says which of ten documents, of which it has the figures, is in "
    'it: the likeliest one by a normal density. "Without" is the same guess from a total of as '
    "many of the member's other documents. The totals hold, by document, n, n² and x, x², x n of "
    "each expert's loss and of the difference of any two; or n and x alone. Tokens are ranked by "
    "how far a total of losses moves their expected counts; the area compares those that are there "
    "with others as likely. 400 and 100 draws from the same documents; 95 % intervals by draw. "
    "Last come the totals that the coordinator really has of a member that is alone in its domain: "
    "the sums of its calibration losses, and its held-out sums, of which the attacker uses what it "
    "can compute of a document (base, specialists, oracle, equal gates, the published router, and "
    "their differences; not the merge and the other routers). Every document of the total is shown "
    '25 times among nine others; "without" shows those of its other split; 95 % intervals by '
    "document. The other documents are cut as a sample cuts the member's: uncut, at first, sizes "
    "alone gave away whose a document is, with and without (0.74 to 0.83, 0.72 to 0.83). Sums that "
    "routers are fitted by are not attacked.",
)


_NOTHING = (
    "No text, no run of token ids, no row of hidden states and no run of losses was found, in any "
    "form or packing, anywhere."
)


def _name(part: Mapping[str, Any]) -> str:
    return f"private, {part['summing']}" if part["summing"] else str(part["privacy"])


def _head(first: str, names: Sequence[str]) -> list[str]:
    return [f"| {first} | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]


def _split(kind: str) -> tuple[str, str]:
    name, _, split = kind.partition(", ")
    return name, split


def _add_up(table: Mapping[str, Any]) -> int:
    """Sum over a table of tables of numbers."""
    return sum(_add_up(one) if isinstance(one, Mapping) else int(one) for one in table.values())


def _list_captured(parts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    lines = _head("bytes searched", names)
    places = dict.fromkeys(place for part in parts for place in part["searched"])
    for place in places:
        cells = [f"{part['searched'].get(place, 0):,}" for part in parts]
        lines.append(f"| {place} | {' | '.join(cells)} |")
    totals: dict[str, dict[int, int]] = {}
    for column, part in enumerate(parts):
        for way, count in part["unpacked"].items():
            row = totals.setdefault(way.split(" > ")[0], {})
            row[column] = row.get(column, 0) + count
    totals.pop("raw")
    for way, row in sorted(totals.items()):
        cells = [f"{row.get(column, 0):,}" for column in range(len(parts))]
        lines.append(f"| … unpacked from {way} | {' | '.join(cells)} |")
    return lines


def _list_kinds(part: Mapping[str, Any]) -> list[str]:
    """Strings looked for, dropped and found, by kind over splits; decoys behind a stroke."""
    places = list(part["searched"])
    lines = _head("kind", ["strings", "dropped", *places])
    rows: dict[str, list[int]] = {}
    for kind, forms in part["needles"].items():
        name = _split(kind)[0]
        row = rows.setdefault(name, [0] * (2 + len(places)))
        row[0] += _add_up(forms)
        row[1] += _add_up(part["dropped"].get(kind, {}))
        for column, place in enumerate(places, 2):
            row[column] += _count_distinct(part["found"].get(place, {}).get(kind, {}))
    for name, row in rows.items():
        if not name.startswith(_DECOY):
            false = rows.get(_DECOY + name)
            cells = [f"{cell:,}" for cell in row]
            if false is not None:
                cells = [f"{cell} / {other:,}" for cell, other in zip(cells, false, strict=True)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _conclude(part: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    if part["problems"]:
        return f"**not as it should be**: {'; '.join(part['problems'])}."
    if part["privacy"] == "private":
        sums = sum(
            _count_distinct(forms)
            for table in part["found"].values()
            for kind, forms in table.items()
            if kind.startswith(_ONE_OF_SEVERAL)
        )
        told = "are told, and found" if part["summing"] == "robust" else f"are found {sums} times"
        return (
            f"{_NOTHING} Single figures: {_count_figures(part)}. Sums over all documents of one of "
            f"several members of a domain {told if sums else 'are not found'}."
        )
    rows = part["samples"]["wire, from members"]
    found = sum(got for split, (got, _) in rows.items() if split != "beyond")
    return (
        f"the positive control. All {found:,} runs of token ids inside the samples are found on "
        "the wire, in the coordinator's home and in its memory."
    )


def _count_figures(part: Mapping[str, Any]) -> str:
    """Losses of a token, block or document that are found, beside decoys, by place."""
    said = []
    for place, table in part["found"].items():
        own, false = (
            sum(_count_distinct(forms) for kind, forms in table.items() if kind.startswith(start))
            for start in ("loss of", f"{_DECOY}loss of")
        )
        said += [f"{own} and {false} decoys in '{place}'"] * (own + false > 0)
    return f"{'; '.join(said)}, none elsewhere" if said else "none"


def _list_aligned(part: Mapping[str, Any]) -> list[str]:
    """Figures of double precision in memory, and whether they lie as doubles do."""
    lines = _head(
        "figures of double precision in memory",
        ["found", "at a multiple of 8 bytes", "decoys found", "at a multiple of 8 bytes"],
    )
    rows: dict[str, list[int]] = {}
    for kind, counts in part["aligned in memory"].items():
        name = _split(kind)[0]
        row = rows.setdefault(name.removeprefix(_DECOY), [0] * 4)
        start = 2 * name.startswith(_DECOY)
        row[start : start + 2] = [a + b for a, b in zip(row[start:], counts, strict=False)]
    lines += [f"| {name} | {' | '.join(map('{:,}'.format, row))} |" for name, row in rows.items()]
    said = (
        "An array or an object has a double at a multiple of eight bytes, the buffer of a message "
        "anywhere. What lies elsewhere and is no sum reaches over two words of something else, "
        "pointers mostly."
    )
    return [*lines, "", said, ""] if rows else []


def _list_samples(part: Mapping[str, Any]) -> list[str]:
    """Runs of ids inside blocks that a pooled fusion asks for, found of all."""
    splits = [split for split in next(iter(part["samples"].values())) if split != "beyond"]
    lines = _head("runs of ids inside a fusion's samples, found of all", splits)
    lines = [lines[0] + " found beyond the samples |", lines[1] + "---:|"]
    for place, row in part["samples"].items():
        cells = [f"{got:,} of {of:,}" for got, of in (row[split] for split in splits)]
        lines.append(f"| {place} | {' | '.join(cells)} | {row['beyond'][0]:,} |")
    return [
        *lines,
        "",
        "Runs of train and validation text that are found are such as the samples hold, too.",
    ]


def _count_distinct(forms: Mapping[str, Mapping[str, int]]) -> int:
    """Strings found by the packing that shows the most of each form."""
    return sum(max(ways.values()) for ways in forms.values())


def _list_forms(part: Mapping[str, Any]) -> list[str]:
    """Where what was found lay, with form and packing; not of single figures."""
    lines = ["| place | kind | form: packing (strings) |", "|---|---|---|"]
    for place, table in part["found"].items():
        for kind, forms in table.items():
            if kind.startswith(_DECOY) or _DECOY + kind in part["needles"]:
                continue
            cells = [
                f"{form}: {', '.join(f'{how} ({count:,})' for how, count in ways.items())}"
                for form, ways in forms.items()
            ]
            lines.append(f"| {place} | {kind} | {'; '.join(cells)} |")
    return lines if len(lines) > 2 else [_NOTHING]


def _list_planted(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the search finds what it is shown; a table only of what it misses."""
    ways = list(parts[0]["planted"]["text"])
    missed = [
        f"- {_name(part)}, {kind} in {way}: {got} of {of}"
        for part in parts
        for kind, row in part["planted"].items()
        for way, (got, of) in row.items()
        if got < of
    ]
    few = min(row["raw"][1] for part in parts for row in part["planted"].values())
    return [
        f"The search itself: of each kind and form at least {few} strings, planted among random "
        f"bytes as {', '.join(ways)}, are {'not all' if missed else 'all'} found.",
        *missed,
        "",
    ]


def _show(one: Mapping[str, float]) -> str:
    low, high = max(0.0, one["low"]), min(1.0, one["high"])
    return f"{one['point']:.3f} ({low:.3f} to {high:.3f})"


def _list_attacks(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Attacks on totals of any size, once where all federations give the same, and on real ones."""
    shown: dict[str, list[str]] = {}
    for part in parts:
        lines = _list_sizes(part["attack"])
        shown.setdefault("\n".join(lines), []).append(_name(part))
    lines = []
    for text, names in shown.items():
        lines += [f"### By size of the total: {'; '.join(names)}", "", text]
    lines += [
        "### Totals that the coordinator has of a member alone in its domain",
        "",
        "| federation | member | sums over | documents | numbers told | used "
        "| which of 10 documents | without |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    apart = 0.0
    for part in parts:
        for member, found in part["attack"].items():
            for split, one in found.get("what the coordinator has", {}).items():
                counts = (one[name] for name in ("documents", "numbers told", "numbers used"))
                rates = (_show(one["which document"][name]) for name in ("told", "chance"))
                cells = [_name(part), member, split, *map(str, counts), *rates]
                lines.append(f"| {' | '.join(cells)} |")
                apart = max(apart, one["apart"])
    return [
        *lines,
        "",
        "In pooled the coordinator has the texts. The totals read from its home differ from the "
        f"sums of the member's own documents by {apart:.0e} of them at most.",
        "",
    ]


def _conclude_attacks(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """How often the held-out totals of a private fusion name a document."""
    rates = [
        found["what the coordinator has"]["held-out"]
        for part in parts
        for found in part["attack"].values()
        if "what the coordinator has" in found
    ]
    if not rates:
        return []
    told, chance = (
        " to ".join(
            f"{end([one['which document'][name]['point'] for one in rates]):.2f}"
            for end in (min, max)
        )
        for name in ("told", "chance")
    )
    return [
        "- **What the totals tell**: hardly which tokens a text has; but of ten documents that "
        f"somebody holds, the one that is among a member's {rates[0]['documents']} is named with a "
        f"rate of {told}, by chance {chance}, where the member is alone in its domain ([attacks]"
        "(#attacks), [what protects](../private_fusion.md#what-can-be-told-from-it))."
    ]


def _list_sizes(attack: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for member, found in attack.items():
        single = found["tokens by single figures"]
        lines += [
            f"**{member}**, alone in its domain; {found['documents']} documents that no model was "
            f"trained on, {found['columns']} sums. From the loss of each token under every expert, "
            f"{single['rate']:.3f} of {single['tried']} tokens are named; the commonest token is "
            f"{single['chance']:.3f} of them.",
            "",
            "| documents or blocks in a total | which of 10 documents | without | … from sizes and "
            "losses alone | without | which tokens, area under the curve | without |",
            f"|{'---:|' * 7}",
        ]
        kinds = ("which document", "which document, sizes and losses alone", "which tokens")
        for count in sorted(found["which tokens"], key=int):
            each = (found[kind].get(count) for kind in kinds)
            cells = [_show(one[name]) if one else "" for one in each for name in ("told", "chance")]
            lines.append(f"| {count} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def build_page(parts: Sequence[Mapping[str, Any]]) -> str:
    """The page as Markdown.

    Args:
        parts: What `bench/traffic_test.py` wrote, one for each federation.
    """
    names = [_name(part) for part in parts]
    lines = ["# Traffic test", ""]
    for part in parts:
        lines.append(
            f"- **{_name(part)}**, `{part['command']}`: {_conclude(part)} Memory was read at "
            f"{len(part['snapshots']) - 1} moments; federation {part['seconds']:.0f} s, search and "
            f"attacks {part['search seconds']:.0f} s, on a machine busy with other work. "
            f"`traffic-{_name(part).replace(', ', '-')}.json`."
        )
    lines += _conclude_attacks(parts)
    versions = ", ".join(f"{name} {one}" for name, one in parts[0]["versions"].items())
    lines += [
        "",
        f"{versions}. Four contributors, each a process tree of its own behind a line that keeps "
        "every byte; two are alone in their domains, two share one. Base with random weights, "
        f"blocks of {parts[0]['block size']} tokens. Memory is what the coordinator's processes "
        "may write to, whenever the coordinator says that it begins something else, from its first "
        "pass to the published model; what happened in between is not seen. A page that an earlier "
        "moment had is searched once, and again where a page beside it is new.",
        "",
        *_list_captured(parts, names),
        "",
        "Strings are looked for at every offset, in the streams, in the bodies of their HTTP "
        "messages (Flower sends protobuf and compresses nothing), and in all that can be unpacked "
        "from them, three times over. Not looked for: strings that are public (base, tokenizer, "
        "charter, program, the coordinator's memory and home before anybody joined), of several "
        "members, or too plain. Bare deflate, which has no mark, is tried at every offset of "
        "streams of up to 256 KiB, not of memory. zstd and Brotli are not undone; no reader of "
        "them is installed on either side.",
        "",
        *_list_planted(parts),
        "Memory is not random, and a loss in single precision has 29 bits of zero in double: "
        "behind a stroke are decoys, each figure changed in its last bits or digits, which nobody "
        "has. More finds than decoys, p < 0.001 for a place and kind, are a problem; so where some "
        "are found by chance, as in memory, a few figures that were told would not be noticed. "
        "This rule was made after a first search of a masked federation, which counted every find: "
        "there it was short numbers and ends of longer ones, in 'ledger', 'mailbox' and on the "
        "wire as often as decoys. Since then a number needs eight digits and to begin where it is "
        "found. "
        "Sums over all documents of a member are what a private fusion asks for: of "
        "a member alone in its domain they are the domain's, of one of several the coordinator has "
        "them under robust sums only.",
        "",
    ]
    for part, name in zip(parts, names, strict=True):
        lines += [
            f"## {name}",
            "",
            *_list_kinds(part),
            "",
            f"Random bytes would hold {part['by chance']:.1e} of these strings.",
            "",
            *_list_forms(part),
            "",
            *_list_aligned(part),
            *(_list_samples(part) if part["privacy"] == "pooled" else ()),
            "",
        ]
    lines += ["## Attacks", "", *_ATTACKS, "", *_list_attacks(parts)]
    text = "\n".join(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"
