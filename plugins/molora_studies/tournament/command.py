"""`molora tournament`: every registered router on the same frozen adapters and banks, ranked."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from molora_cli.output import show
from molora_cli.progress import reporting

if TYPE_CHECKING:
    from molora_studies.tournament.arena import ArenaSource
    from molora_studies.tournament.matches import Tournament

UNSEEN = "docstrings-sympy,headers-python,man-es,man-it"
"""Two domains near to what cooperatives here are trained on, two in other languages."""

UNSEEN_TOKENS = 4096


def tournament(
    cooperatives: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of cooperatives with admitted contributions."),
    ] = None,
    study: Annotated[
        list[str] | None,
        typer.Option(help="A study whose trained specialists take part; may be given again."),
    ] = None,
    routers: Annotated[
        str, typer.Option(help="Routers, separated by commas; every registered one if not given.")
    ] = "",
    unseen: Annotated[
        str, typer.Option(help="Registered domains to measure where nobody trained on them.")
    ] = UNSEEN,
    unseen_tokens: Annotated[
        int, typer.Option(min=1, help="Held-out tokens of each of these, in whole blocks.")
    ] = UNSEEN_TOKENS,
    out: Annotated[
        Path, typer.Option(help="Folder for tournament.json, its page and its figure.")
    ] = Path("tournament"),
) -> None:
    """Fit every registered router on the same frozen adapters and banks, and rank them.

    Nothing is trained. Stopped and called again, it goes on: finished matches are kept in the
    cache until the router's code, or what it is measured on, changes.
    """
    from molora_fed.errors import ConfigError
    from molora_fed.plugins import get_plugins
    from molora_fed.storage.values import find_cache_folder, parse_names
    from molora_studies.tournament.arena import TournamentSettings
    from molora_studies.tournament.matches import hold_tournament
    from molora_studies.tournament.page import write_tournament

    sources = _find_sources(cooperatives or [], study or [])
    if not sources:
        raise ConfigError(
            "Cannot hold a tournament: expected a cooperative's folder or --study NAME, got none. "
            "Name one, e.g. `molora tournament demo/cooperative`."
        )
    plugins = get_plugins()
    settings = TournamentSettings(
        folder=find_cache_folder() / "tournament",
        plugins=plugins,
        routers=parse_names(routers) if routers else tuple(plugins.routers.names()),
        unseen=parse_names(unseen) if unseen else (),
        unseen_tokens=unseen_tokens,
    )
    with reporting() as progress:
        held = hold_tournament(settings, sources, on_arena=progress.phase, progress=progress)
    given = {
        "routers": routers,
        "unseen": unseen if unseen != UNSEEN else "",
        "unseen_tokens": unseen_tokens if unseen_tokens != UNSEEN_TOKENS else 0,
        "out": out,
    }
    written = write_tournament(held, out, _describe_command(cooperatives or [], study or [], given))
    _show_standings(held)
    for path in written:
        print(f"wrote  {path}")


def _find_sources(folders: list[Path], studies: list[str]) -> "list[ArenaSource]":
    from molora_fed.storage.values import find_cache_folder
    from molora_studies.framework.registry import get_studies
    from molora_studies.framework.results import plan_study
    from molora_studies.tournament.sources import find_cooperative, list_study_arenas

    found = [find_cooperative(folder) for folder in folders]
    for name in studies:
        planned = plan_study(name, get_studies().registry, find_cache_folder())
        found += list_study_arenas(planned)
    return found


def _describe_command(
    cooperatives: list[Path], studies: list[str], given: dict[str, object]
) -> str:
    """The command that was given, for the page; options that were left out stay out."""
    words = [str(folder) for folder in cooperatives]
    words += [f"--study {name}" for name in studies]
    words += [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value]
    return " ".join(["molora tournament", *words])


def _show_standings(held: "Tournament") -> None:
    from rich.table import Table

    from molora_studies.tournament.page import COLUMNS, list_row, rank_all

    name, found = next(iter(rank_all(held).items()))
    table = Table(title=name, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for standing in found:
        table.add_row(*list_row(standing))
    show(table)
