"""The page and the figure of bench/serve.py."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from molora_studies.framework.contract import Figure
from molora_studies.framework.render import draw_figure
from serve_limits import Need
from serve_quality import BEST, OWN_DOMAIN, WAYS
from serve_sides import BASES, BLENDED, DENSE, DRAWN, ROWS, SIDES, SPARSE

__all__ = ["Ratio", "build_page", "compare", "draw_page", "find_base"]

Cells = Mapping[str, Mapping[str, Any]]

BARS = {
    (DENSE, 4): 1.4,
    (DENSE, 8): 1.8,
    **{(side, experts): 1.1 for side in (SPARSE, BLENDED) for experts in (4, 8)},
}
QUALITY_BAR = 0.02
_TITLES = {"smollm2": "SmolLM2-135M", "builtin": "the built-in base's size"}
_OPENED = {
    "smollm2": "The first training of study `real-base`",
    "builtin": "The demo's fused model at seed 42",
}
_QUALITY = (
    "Each text is the beginning of a held-out document of its own: the first half is the prompt, "
    "the second half is scored, in nats a token. Above dense: mean and 95 % interval over "
    "documents. 'Gates held' runs all experts with the gates they had after the prompt; two "
    "experts are those with the largest, one is who predicted the prompt best; merged is one model "
    "of all experts' changes by these gates; its domain's expert was trained on the text's domain, "
    "and the best expert in hindsight is what no choice of one expert can beat. In 'changing "
    "domain' the scored half is another domain's."
)
_MIB = 2**20


@dataclass(frozen=True)
class Ratio:
    """A ratio of two sides: median, 10th and 90th percentile over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


def compare(sides: Mapping[str, Any], over: str, under: str, what: str) -> Ratio:
    """One side's seconds over another's, within each round.

    Args:
        sides: Of a cell.
        over: The side.
        under: What it is compared with.
        what: "prefill" or "token".
    """
    ratios = np.array(sides[over][what]) / np.array(sides[under][what])
    low, median, high = np.quantile(ratios, (0.1, 0.5, 0.9))
    return Ratio(float(median), float(low), float(high))


def find_base(sides: Mapping[str, Any], what: str = "token") -> str:
    """The faster of the two bases, by the median over rounds."""
    return min(BASES, key=lambda name: float(np.median(sides[name][what])))


def judge(ratio: Ratio, bar: float) -> str:
    """Whether a ratio is at most a bar: over the whole spread, in the median alone, or not."""
    if ratio.high <= bar:
        return "yes"
    return "in the median" if ratio.median <= bar else "no"


def find_limit(limit: Mapping[str, Any], side: str) -> float:
    """Seconds that one token takes at least, at the speeds measured beside it."""
    need = {name: value for name, value in limit["sides"][side].items() if name != "calls"}
    return Need(**need).limit(**limit["machine"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _section(title: str, text: str, table: Sequence[str]) -> list[str]:
    return [f"## {title}", "", text, "", *table] if len(table) > 3 else []


def _find(cells: Cells, kind: str) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
    """Cells of a kind, by base, dtype, E and B, with the parts of their names."""
    names = [name.split("/") for name in cells if name.split("/")[0] == kind]

    def order(parts: list[str]) -> tuple[Any, ...]:
        base, dtype, *numbers = parts[1:]
        return base != "smollm2", dtype != "float32", *(int(number[1:]) for number in numbers)

    for parts in sorted(names, key=order):
        yield parts, cells["/".join(parts)]


def _list_bars(cells: Cells) -> list[str]:
    rows = []
    for (_, base, dtype, experts, batch), cell in _find(cells, "speed"):
        for side in (DENSE, SPARSE, BLENDED):
            bar, sides = BARS.get((side, int(experts[1:]))), cell["sides"]
            if base != "smollm2" or batch != "B1" or bar is None or side not in sides:
                continue
            ratio = compare(sides, side, find_base(sides), "token")
            cost = [""] * 2
            limit = cells.get(f"limit/{base}/{dtype}/{experts}")
            if limit is not None and side in limit["sides"]:
                seconds = [find_limit(limit, name) for name in (side, find_base(sides))]
                share = seconds[0] / float(np.median(sides[side]["token"]))
                cost = [f"{seconds[0] / seconds[1]:.2f}x", f"{100 * share:.0f} %"]
            verdict = judge(ratio, bar)
            fastest = sides[side]["fastest"] / min(sides[name]["fastest"] for name in BASES)
            shown = [experts, str(ratio), f"{fastest:.2f}x", f"{bar:.1f}x", verdict, *cost]
            rows.append([f"{side}, {dtype}", *shown])
    header = ["side", "E", "time of a token, to the base", "fastest tokens", "bar", "held"]
    return _table([*header, "least possible", "of the limit"], rows)


def _list_costs(cells: Cells) -> list[str]:
    rows = []
    for (_, base, dtype, experts), cell in _find(cells, "limit"):
        speed = cells.get(f"speed/{base}/{dtype}/{experts}/B1")
        for side, need in cell["sides"].items():
            least, measured = find_limit(cell, side), ["", ""]
            if speed is not None:
                seconds = float(np.median(speed["sides"][side]["token"]))
                measured = [f"{1e3 * seconds:.2f}", f"{100 * least / seconds:.0f} %"]
            names = ("weight_bytes", "factor_bytes", "cache_bytes")
            rows.append([
                f"{base}, {dtype}, {experts}: {side}",
                *(f"{need[name] / 1e6:.1f}" for name in names),
                f"{need['operations'] / 1e9:.3f}",
                str(need["calls"]),
                f"{1e3 * least:.2f}",
                *measured,
            ])  # fmt: skip
    header = ["side", "weights MB", "factors MB", "keys and values MB", "GFLOP", "calls"]
    return _table([*header, "limit ms", "measured ms", "of the limit"], rows)


def _list_machine(cells: Cells) -> str:
    speeds: dict[str, list[tuple[float, float]]] = {}
    for (_, _, dtype, _), cell in _find(cells, "limit"):
        machine = cell["machine"]
        pair = machine["bytes_per_second"], machine["operations_per_second"]
        speeds.setdefault(dtype, []).append(pair)
    parts = []
    for dtype, pairs in speeds.items():
        spans = [
            f"{min(each) / 1e9:.0f} to {max(each) / 1e9:.0f}" for each in zip(*pairs, strict=True)
        ]
        parts.append(f"{dtype} {spans[0]} GB/s and {spans[1]} GFLOP/s")
    return "; ".join(parts)


def _list_speeds(cells: Cells, kind: str, what: str) -> list[str]:
    """A row a cell: tokens in a second of the base, and of each side the ratio to it."""
    others = [side for side in (*SIDES, DRAWN) if side not in BASES]
    found = list(_find(cells, kind))
    used = [side for side in others if any(side in cell["sides"] for _, cell in found)]
    rows = []
    for (_, base, dtype, experts, batch), cell in found:
        sides, texts = cell["sides"], int(batch[1:])
        reference = find_base(sides, what)
        tokens = texts * (cell["prompt"] if what == "prefill" else 1)
        row = [f"{base}, {dtype}, {experts}, {batch}"]
        for side in BASES:
            speed = f"{tokens / float(np.median(sides[side][what])):,.1f}"
            row.append(f"**{speed}**" if side == reference else speed)
        row += [
            str(compare(sides, side, reference, what)) if side in sides else "-" for side in used
        ]
        row.append(f"{tokens / float(np.median(sides[DENSE][what])):,.1f}")
        row.append(f"{tokens / float(np.median(sides[SPARSE][what])):,.1f}")
        row.append(f"{len(sides[DENSE][what])}, {cell['load']:.0f}")
        rows.append(row)
    header = ["", *(f"{side}, tokens/s" for side in BASES), *used]
    return _table([*header, "dense tokens/s", "sparse tokens/s", "rounds, load"], rows)


def _list_memory(cells: Cells) -> list[str]:
    rows = []
    for (_, base, dtype, experts, batch), cell in _find(cells, "memory"):
        peaks = [cell["sides"].get(side) for side in SIDES]
        shown = ["" if peak is None else f"{peak / _MIB:,.0f}" for peak in peaks]
        rows.append([f"{base}, {dtype}, {experts}, {batch}", *shown])
    return _table(["", *SIDES], rows)


def _list_quality(cell: Mapping[str, Any]) -> list[str]:
    columns = [*list(WAYS)[1:], OWN_DOMAIN, BEST]
    rows = []
    for kind in sorted(cell["rows"], key=lambda kind: (kind.startswith("changing"), kind)):
        ways = cell["rows"][kind]
        row = [kind, str(ways["texts"]), f"{ways['dense']['loss'][0]:.4f}"]
        for way in columns:
            if way in ways:
                mean, low, high = ways[way]["above_dense"]
                row.append(f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]")
            else:
                row.append("-")
        rows.append(row)
    return _table(["texts", "number", "dense, nats", *columns], rows)


def _judge_quality(cell: Mapping[str, Any]) -> str:
    """Whether what goes on alone after the prompt is within the bar on texts of one domain."""
    ways = cell["rows"]["one domain, all"]
    said = [
        f"{way}: {judge(Ratio(*ways[way]['above_dense']), QUALITY_BAR)}"
        for way in ("one expert", "merged")
        if way in ways
    ]
    return f"Bar on texts of one domain, {QUALITY_BAR} nats, held by {', by '.join(said)}."


def _list_served(load: Mapping[str, Any] | None) -> list[str]:
    """Phases of bench/api_load.py: requests at a time, tokens in a second, and waiting times."""
    rows = []
    for phase, found in (load or {}).items():
        if not isinstance(found, Mapping) or "tokens_per_second" not in found:
            continue
        first = found.get("first_token_seconds") or {}
        waits = [f"{1e3 * first[key]:.0f}" if key in first else "" for key in ("median", "p99")]
        speed, errors = f"{found['tokens_per_second']:,.1f}", str(found.get("errors", ""))
        rows.append([phase.replace("_", " "), str(found["streams"]), speed, *waits, errors])
    header = [
        "phase",
        "requests at a time",
        "tokens/s",
        "first token ms, median",
        "99th percentile",
    ]
    return _table([*header, "errors"], rows)


def build_page(
    report: Mapping[str, Any], load: Mapping[str, Any] | None, figure: str | None
) -> str:
    """The Markdown page.

    Args:
        report: What bench/serve.py keeps.
        load: What bench/api_load.py keeps; None where there is none.
        figure: The figure's file name, if there is one.
    """
    cells, settings = report["cells"], report["settings"]
    environment = settings["environment"]
    versions = ", ".join(f"{n} {environment[n]}" for n in ("torch", "transformers", "peft"))
    lines = [
        "# Serving: a fused model beside its base, PEFT and plain loops",
        "",
        "Made by `python bench/serve.py`, whose head says what each figure is; "
        f"docs/results/README.md has the whole command. Device: {environment['device']} "
        f"({environment['hardware']}), {settings['cores']} cores, {settings['threads']} threads; "
        f"{versions}." + (" Small sizes (`--quick`)." if settings["quick"] else ""),
        "",
        "Ratios are times to the faster of the two bases (bold) within a round, all sides in one "
        "process: median, and 10th to 90th percentile over rounds; below 1 is faster than the "
        "base. E counts the base as an expert. Load: programs that wanted to run as a cell began.",
        "",
    ]  # fmt: skip
    lines += _section(
        "Bars",
        f"One text, {_TITLES['smollm2']}. A bar is held if the whole spread is at or below it. The "
        "least possible is the ratio of the two limits below, the last column the share of the "
        "side's own limit in its time. Sparse keeps one expert after the prompt, merged into "
        "weights of its own after 32 tokens: the median token of 96 is one of those. Merged after "
        "the prompt are all experts, by the gates at its end, into one model, whose weights are "
        "made after 32 tokens, too: it reads what the base reads.",
        _list_bars(cells),
    )
    if figure is not None:
        lines += [f"![Time of a token against the base's]({figure})", ""]
    lines += _section(
        "What a token needs",
        "One text. Bytes: numbers that must be read from memory; operations: two for each "
        "multiplication, every adapter's own rows only; calls: operators of torch, nested ones "
        "too. The limit is the longer of reading and multiplying at the speeds of one large "
        f"product, measured beside: {_list_machine(cells)}. A base that fits into the caches can "
        "be read faster.",
        _list_costs(cells),
    )  # fmt: skip
    lines += _section(
        "Decoding",
        "Time of a token of all texts, to the base's. PEFT's passes in turn and merged models have "
        "keys and values of each expert and mix as our model does; all adapters added up is one "
        f"output without gates; '{ROWS}' is left out where its prompts' logits exceed 2 GiB.",
        _list_speeds(cells, "speed", "token"),
    )
    lines += _section(
        "Sampling", "Temperature 0.8, top_p 0.95.", _list_speeds(cells, "sampling", "token")
    )
    lines += _section(
        "Prefill",
        "Time to the first token, to the base's.",
        _list_speeds(cells, "speed", "prefill"),
    )
    lines += _section(
        "Memory",
        "MiB at the peak, above imports, of a process that serves this side alone. What does not "
        "depend on E is in the rows of E1. Ours keeps the base's weights a second time, packed "
        "([FusedForCausalLM.packed_bytes](../../molora_fed/inference/fused_lm.py)). Empty: not "
        "measured.",
        _list_memory(cells),
    )
    for base, opened in _OPENED.items():
        quality = cells.get(f"quality/{base}")
        if quality is not None:
            lines += _section(
                f"Loss of deciding once, {_TITLES[base]}",
                f"{opened}: {quality['experts']} experts, {quality['dtype']}, router "
                f"`{quality['router']}`, texts of {quality['tokens']} tokens. {_QUALITY} "
                f"{_judge_quality(quality)}",
                _list_quality(quality),
            )
    lines += _section(
        "Served throughput",
        "`molora api` under load ([api_load.json](api_load.json)).",
        _list_served(load),
    )
    return "\n".join(lines).rstrip() + "\n"


def draw_page(report: Mapping[str, Any]) -> bytes | None:
    """Time of a token against the base's by E at batch 1, as SVG; None without such cells."""
    series: dict[str, dict[str, dict[int, Ratio]]] = {}
    for (_, base, dtype, experts, batch), cell in _find(report["cells"], "speed"):
        if batch != "B1":
            continue
        sides = cell["sides"]
        panel = series.setdefault(f"{_TITLES[base]}, {dtype}", {})
        for side in sides:
            if side not in BASES:
                ratio = compare(sides, side, find_base(sides), "token")
                panel.setdefault(side, {})[int(experts[1:])] = ratio
    if not series:
        return None

    def draw(canvas: Any) -> None:
        # Two panels a row, all on one scale.
        columns = min(2, len(series))
        count = -(-len(series) // columns)
        canvas.set_size_inches(4.5 * columns, 3.2 * count + 0.8)
        panels = canvas.subplots(count, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (title, lines) in zip(panels.flat, series.items(), strict=False):
            for side in SIDES:
                if side not in lines:
                    continue
                counts = sorted(lines[side])
                ratios = [lines[side][count] for count in counts]
                middle = np.array([ratio.median for ratio in ratios])
                ends = [[r.low for r in ratios], [r.high for r in ratios]]
                bars = np.abs(np.array(ends) - middle)
                is_own = side in (DENSE, SPARSE, BLENDED)
                axes.errorbar(
                    counts, middle, yerr=bars, label=side, marker="o", capsize=2,
                    linestyle="-" if is_own else "--", linewidth=2 if is_own else 1,
                )  # fmt: skip
            axes.set_title(title)
            axes.set_yscale("log")
            axes.set_xticks((2, 4, 8))
            axes.axhline(1.0, color="#222222", linewidth=0.8)
            axes.set_xlabel("experts, the base among them")
            axes.set_ylabel("time of a token, to the base's")
        handles, labels = panels.flat[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=3)

    return draw_figure(Figure("serve", "", draw))
