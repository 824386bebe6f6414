"""A lineage as a tree for the terminal and as a figure for a page."""

import io
from collections.abc import Iterator
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.text import Text
from rich.tree import Tree

from molora_fed.population.lineage import Lineage, LineageMember
from molora_fed.reporting.figures import PALETTE
from molora_fed.reporting.methods import as_label

__all__ = ["build_lineage_tree", "draw_lineage"]

MAX_DEPTH = 12  # of the tree: deeper ones would be squeezed out of a terminal
_REJECTED = "#999999"


def build_lineage_tree(lineage: Lineage) -> Tree:
    """All adapters below their first parent, with operator, seed and fitness before and after.

    Every twelfth descendant in a line starts a tree of its own, which says whose child it is.

    Args:
        lineage: What the file says.
    """
    members = lineage.members
    root = Tree(Text(f"{len(members)} adapters, generations 0 to {_last(lineage)}"))
    branches: dict[str, tuple[Tree, int]] = {}
    for name, member in members.items():
        parent = next((p for p in member.birth.parents[:1] if p in branches), None)
        above, depth = (root, 0) if parent is None else branches[parent]
        if depth == MAX_DEPTH:
            above, depth = root, 0
        branch = above.add(_describe(member, parent if above is root else None))
        branches[name] = (branch, depth + 1)
    return root


def _last(lineage: Lineage) -> int:
    return max((line.generation for line in lineage.lines), default=0)


def _describe(member: LineageMember, parent: str | None) -> Text:
    """One adapter in one line; with its parent if that stands elsewhere."""
    birth = member.birth
    origin = birth.operator
    if birth.operator == "admitted" and birth.parents:
        origin += f" {birth.parents[0]}"
    elif len(birth.parents) > 1:
        origin += f" with {', '.join(birth.parents[1:])}"
    if parent is not None:
        origin += f" of {parent}"
    parts = [f"  slot {member.slot}, {member.domain or 'no domain'}: {origin}, seed {birth.seed}"]
    values = [member.fitness_after]
    if birth.fitness_before is not None:
        values = [birth.fitness_before, *values]
    if values != [None]:
        shown = " → ".join("?" if value is None else f"{value:+.4f}" for value in values)
        parts.append(f"fitness {shown} nats")
    if not member.kept:
        parts.append("not kept")
    elif member.death is not None:
        parts.append(f"dies in generation {member.death}")
    text = Text(_clean(birth.id), style="bold" if member.kept else "dim")
    return text.append(_clean(", ".join(parts)), style="not bold")


def _clean(text: str) -> str:
    """Names come from files: nothing in them may steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def draw_lineage(lineage: Lineage) -> bytes:
    """Lives of all adapters by slot over generations, and who came from whom.

    Args:
        lineage: What the file says.

    Returns:
        PNG bytes.
    """
    members = lineage.members
    end = _last(lineage)
    slots = 1 + max((member.slot for member in members.values()), default=0)
    figure = Figure(figsize=(max(6.0, 2.5 + 0.7 * end), 1.6 + 0.5 * slots), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    domains = list(dict.fromkeys(member.domain for member in members.values()))
    colours = {domain: PALETTE[index % len(PALETTE)] for index, domain in enumerate(domains)}
    for member in members.values():
        start = member.birth.generation
        if member.kept:
            stop = end + 0.5 if member.death is None else member.death
            axes.plot([start, stop], [member.slot] * 2, color=colours[member.domain], linewidth=4)
        marker, colour = ("o", colours[member.domain]) if member.kept else ("X", _REJECTED)
        edge: dict[str, Any] = {"markeredgecolor": "white", "markersize": 9, "zorder": 5}
        axes.plot(start, member.slot, marker, color=colour, **edge)
    for child, parent in _list_arrows(lineage):
        generation = child.birth.generation
        if child.slot != parent.slot:
            style = {"arrowstyle": "->", "color": "#222222" if child.kept else _REJECTED}
            axes.annotate(
                "", (generation, child.slot), (generation - 0.5, parent.slot), arrowprops=style
            )
    for domain, colour in colours.items():
        axes.plot([], [], color=colour, linewidth=4, label=as_label(domain or "no domain"))
    axes.plot([], [], "X", color=_REJECTED, label="not kept")
    _label(axes, end, slots)
    figure.legend(fontsize=8, frameon=False, loc="outside upper right", ncols=4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _list_arrows(lineage: Lineage) -> Iterator[tuple[LineageMember, LineageMember]]:
    """Children born after the start with each of their parents."""
    members = lineage.members
    for child in members.values():
        if child.birth.generation > 0:
            for parent in child.birth.parents:
                yield child, members[parent]


def _label(axes: Any, end: int, slots: int) -> None:
    axes.set_xticks(range(0, end + 1, max(1, end // 20)))
    axes.set_yticks(range(slots))
    axes.set_ylim(slots - 0.5, -0.5)
    axes.set_xlabel("generation (dot: a birth; arrow: from its parent)", fontsize=9)
    axes.set_ylabel("slot", fontsize=9)
    axes.tick_params(labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
