"""A tournament as files: JSON, a page with tables, a figure."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from molora_fed import __version__
from molora_fed.models.runtime import describe_environment
from molora_fed.storage.files import write_bytes, write_json
from molora_studies.framework.contract import Figure
from molora_studies.framework.render import draw_figure, render_table
from molora_studies.tournament.matches import Player, Tournament
from molora_studies.tournament.standings import REFERENCE, Estimate, Standing, rank

__all__ = ["ALL", "COLUMNS", "list_row", "rank_all", "write_tournament"]

FORMAT_VERSION = 1
NAME = "tournament"

ALL = "All cooperatives"
"""Title of the standings over several."""

COLUMNS = (
    "rank", "router", "loss, nats", "above the domain oracle", "less the first",
    f"less `{REFERENCE}`", "worst domain", "worst document", "untrained domains", "fit, s",
    "step, ms a token",
)  # fmt: skip


_NAMED_DOMAINS = 2  # over several cooperatives there are many


def list_row(standing: Standing) -> Sequence[str]:
    """Cells of a standing's row; a router that failed says why."""
    if standing.failed is not None:
        return ("-", standing.router, standing.failed, *([""] * (len(COLUMNS) - 3)))
    return (
        "-" if standing.rank is None else str(standing.rank),
        standing.router,
        _show(standing.loss, sign=False),
        _show(standing.gap),
        "" if standing.rank == 1 else _show(standing.to_first),
        "" if standing.router == REFERENCE else _show(standing.to_reference),
        _show_worst_domain(standing),
        _show(standing.worst_document, digits=2, sign=False),
        _show(standing.unseen),
        f"{standing.fit_seconds:.2g}",
        _show_step(standing),
    )


def _show(found: Estimate | None, *, digits: int = 4, sign: bool = True) -> str:
    return "not measured" if found is None else found.show(digits, sign=sign)


def _show_worst_domain(standing: Standing) -> str:
    names = standing.worst_domains if len(standing.worst_domains) <= _NAMED_DOMAINS else ()
    return ", ".join([_show(standing.worst_domain), *names])


def _show_step(standing: Standing) -> str:
    if standing.step_seconds is None or not standing.base_seconds:
        return "cannot decode"
    share = standing.step_seconds / standing.base_seconds
    return f"{1000 * standing.step_seconds:.2f} ({100 * share:.0f} % of the base's pass)"


def rank_all(tournament: Tournament) -> dict[str, list[Standing]]:
    """Standings over all arenas, if there are several cooperatives, then by cooperative."""
    names = list(dict.fromkeys(match["cooperative"] for match in tournament.matches))
    by_name = {
        name: rank([m for m in tournament.matches if m["cooperative"] == name]) for name in names
    }
    if len(names) == 1:
        return by_name
    return {ALL: rank(tournament.matches), **by_name}


def write_tournament(tournament: Tournament, out: Path, command: str) -> list[Path]:
    """Write `tournament.json`, `tournament.md` and `tournament.svg`.

    Args:
        tournament: What was played.
        out: Folder.
        command: What made it, for the page.

    Returns:
        The files, JSON first.

    Raises:
        StorageError: On I/O errors.
    """
    standings = rank_all(tournament)
    document = {
        "format_version": FORMAT_VERSION,
        "command": command,
        "versions": {"molora-fed": __version__, **describe_environment("cpu")},
        "routers": [_describe_player(player) for player in tournament.players],
        "arenas": [dict(arena) for arena in tournament.arenas],
        "standings": {
            name: [standing.to_json() for standing in found] for name, found in standings.items()
        },
        "matches": [dict(match) for match in tournament.matches],
    }
    data, page, drawn = (out / f"{NAME}.{ending}" for ending in ("json", "md", "svg"))
    write_json(data, document)
    write_bytes(page, ("\n".join(_render(document, standings)) + "\n").encode())
    figure = Figure(NAME, _CAPTION, lambda canvas: _draw(canvas, standings))
    write_bytes(drawn, draw_figure(figure))
    return [data, page, drawn]


def _describe_player(player: Player) -> dict[str, Any]:
    return {
        **player.entry.describe(),
        "summary": player.entry.summary,
        "reads": sorted(player.readings),
        "options": None if player.options is None else player.options.model_dump(mode="json"),
        "code": {} if player.router is None else player.code,
    }


_CAPTION = (
    "Left: loss above the domain oracle. Right: loss less the base's on domains that nobody "
    "trained on. Lower is better; bars are 95 % intervals over independent trainings."
)

_READING = (
    "Every registered router with its default options, fitted on the same calibration banks under "
    "the collapse guard and measured on the same held-out banks; no specialist was trained. Files "
    "that contributions carry for a router were computed here, for each specialist of a study from "
    "its own train text, by the plugin's defaults.",
    "The unit of replication is a training of the specialists. Brackets are 95 % intervals over "
    "trainings: Student's for one cooperative; for several the mean of their means, with "
    "Satterthwaite's degrees of freedom. Documents, domains and cooperatives are the same ones in "
    "all of them.",
    f"Differences in loss to the first and to `{REFERENCE}` are paired by training, in nats per "
    "token; below 0 is better than the other. That the first is first favours it.",
    "The domain oracle takes, for each domain, the best of base and specialists. The worst domain "
    "is the one furthest above its best expert, per token; the worst document the part of a "
    "document in a block that cost most above its best expert, in all of its tokens.",
    "Untrained domains are registered ones that no specialist was trained on: the loss there less "
    "the base's, nats per token. Held-out blocks that lie in anybody's train text, or in the "
    "base's, are in no figure.",
    "Times are processor time, of all threads together, so that other work on the machine changes "
    "them little; ranks do not rest on them. A fit includes the guard's judgement and refits. A "
    "step is the router alone, one token at batch 1, beside one pass of the base over that token "
    "with a cache, in the same process.",
    "A router without a rank cannot decode, as it reads the whole block, or failed.",
)


def _render(
    document: Mapping[str, Any], standings: Mapping[str, Sequence[Standing]]
) -> Iterator[str]:
    yield from ("# Tournament of routers", "", *_sum_up(standings), "")
    yield from (f"- {line}" for line in _READING)
    yield ""
    for name, found in standings.items():
        yield from (f"## {name}", "")
        yield from _describe_arenas([a for a in document["arenas"] if a["cooperative"] == name])
        yield from render_table(COLUMNS, [list_row(standing) for standing in found])
        yield ""
    yield from (f"![{_CAPTION}]({NAME}.svg)", "", _CAPTION, "", "## Routers", "")
    yield from render_table(
        ("router", "summary", "reads", "from"),
        [
            (r["name"], r["summary"], ", ".join(r["reads"]), f"{r['plugin']} {r['version']}")
            for r in document["routers"]
        ],
    )
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    yield from ("", "## How it was made", "")
    yield f"`{document['command']}`; every match with all its figures: [{NAME}.json]({NAME}.json)."
    yield from ("", f"Versions: {versions}.")


def _sum_up(standings: Mapping[str, Sequence[Standing]]) -> Iterator[str]:
    """A line a table: who is first, and who is as good by the interval of the difference."""
    for name, found in standings.items():
        ranked = [standing for standing in found if standing.rank is not None]
        failed = sum(standing.failed is not None for standing in found)
        parts = [f"{name}: "]
        parts.append(f"`{ranked[0].router}` is first of {len(ranked)}" if ranked else "none ranked")
        spans = {s.router: s.to_first.span for s in ranked[1:] if s.to_first is not None}
        if any(span.low is None for span in spans.values()):
            parts.append("; one training gives no intervals")
        else:
            near = [f"`{each}`" for each, s in spans.items() if s.low is not None and s.low <= 0]
            parts.append(f"; not clearly worse: {', '.join(near)}" if near else "")
        parts.append(f"; {failed} failed" if failed else "")
        yield f"- {''.join(parts)}."


def _describe_arenas(arenas: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a cooperative's arenas are; nothing for all of them together."""
    if not arenas:
        return
    one = arenas[0]
    yield f"Base {one['base']['id']}; experts {', '.join(one['experts'])}."
    trainings = ", ".join(arena["training"] for arena in arenas)
    yield f"Trainings ({len(arenas)}): {trainings}."
    for key, title in (("held_out", "Held-out blocks"), ("unseen", "Blocks nobody trained on")):
        counts = ", ".join(f"{domain} {count}" for domain, count in one[key].items())
        yield f"{title}: {counts or 'none'}."
    for domain, why in one["unseen_left_out"].items():
        yield f"Not measured: {domain}, {why.rstrip('.')}."
    yield ""


def _draw(figure: Any, standings: Mapping[str, Sequence[Standing]]) -> None:
    """Gap and untrained domains by router, a colour for each cooperative."""
    order = [s.router for s in next(iter(standings.values())) if s.failed is None][::-1]
    cooperatives = {name: found for name, found in standings.items() if name != ALL}
    panels = figure.subplots(1, 2, sharey=True)
    for number, (name, found) in enumerate(cooperatives.items()):
        shift = 0.22 * (number - (len(cooperatives) - 1) / 2)
        for axes, figures in (
            (panels[0], {s.router: s.gap for s in found}),
            (panels[1], {s.router: s.unseen for s in found}),
        ):
            _draw_one(axes, order, figures, shift, name)
    for axes, label in zip(
        panels,
        ("above the domain oracle, nats", "untrained domains, less the base, nats"),
        strict=True,
    ):
        axes.axvline(0.0, color="#222222", linewidth=0.8)
        axes.set_xlabel(label)
    panels[0].set_yticks(range(len(order)), order, fontsize=8)
    panels[0].legend()


def _draw_one(
    axes: Any,
    order: Sequence[str],
    figures: Mapping[str, Estimate | None],
    shift: float,
    label: str,
) -> None:
    shown = [(place, figures[name]) for place, name in enumerate(order) if figures.get(name)]
    points = [(place + shift, found) for place, found in shown if found is not None]
    low, high = (
        [abs(getattr(found.span, end) - found.mean) if found.span.low is not None else 0.0
         for _, found in points]
        for end in ("low", "high")
    )  # fmt: skip
    axes.errorbar(
        [found.mean for _, found in points],
        [place for place, _ in points],
        xerr=[low, high],
        fmt="o",
        markersize=3,
        capsize=2,
        label=label,
    )
