"""`molora plugins`: what is installed, what of it is loaded, and what it registers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora_cli.output import note, print_columns
from molora_cli.plugin_check import check_plugin, find_kind
from molora_cli.plugin_new import new

if TYPE_CHECKING:
    from molora_fed.plugins import Entry, FoundPlugin, Plugins, Registry

app = typer.Typer(help="Installed plugins.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(metavar="NAME", help="A plugin's name, as listed.")]


@app.callback()
def _group() -> None:
    """Installed plugins."""


app.command("check")(check_plugin)
app.command("new")(new)


@app.command("list")
def list_plugins(
    kind: Annotated[
        str, typer.Option(help="List what is registered of a kind, e.g. router or merge.")
    ] = "",
    only: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="List what one plugin registers, or what has a registered name."
        ),
    ] = "",
    check: Annotated[
        bool,
        typer.Option("--check", help="Import what is listed and hold it against its contract."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List plugins; with --kind or --only list what they register."""
    from molora_fed.errors import PluginError
    from molora_fed.plugins import get_plugins

    plugins = get_plugins()
    is_whole = not (kind or only)
    entries = choose_entries(plugins, kind=kind, only=only)
    problems = _check(plugins, entries) if check else {}
    results = {_key(one): "FAILED" if _key(one) in problems else "ok" for one in entries if check}
    origins = {entry.origin for entry in entries}
    found = [
        one
        for one in plugins.found
        if is_whole or one.origin in origins or only in (one.name, one.distribution)
    ]
    if as_json:
        print(json.dumps(_describe(plugins, found, entries, results), indent=2))
    elif is_whole:
        _print_plugins(plugins, found, results)
    else:
        header = ("name", "type", "summary", "origin", *(["check"] if check else []))
        rows = [(one.name, one.kind, one.summary, one.origin) for one in entries]
        cells = [[results[_key(one)]] if check else [] for one in entries]
        print_columns(header, [(*row, *cell) for row, cell in zip(rows, cells, strict=True)])
    failures = list(plugins.failures) if is_whole else []
    failures += [PluginError(one.reason) for one in found if not is_whole and one.state == "failed"]
    if check and (problems or failures):
        raise PluginError(" ".join([*problems.values(), *map(str, failures)]))


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A plugin's or a registered name.")],
) -> None:
    """Show where a plugin comes from, its options, and how a charter or a command names it."""
    from molora_cli.plugin_show import describe_entry, describe_plugin
    from molora_fed.plugins import get_plugins

    plugins = get_plugins()
    found = [one for one in plugins.found if name in (one.name, one.distribution)]
    named = [one for registry in plugins.registries().values() for one in registry]
    entries = [one for one in named if one.name == name]
    if not found and not entries:
        choose_entries(plugins, kind="", only=name)  # says that there is none
    texts = [describe_plugin(one, plugins) for one in found]
    texts += [describe_entry(one, plugins) for one in entries]
    print("\n\n".join(texts))


@app.command()
def disable(name: Name) -> None:
    """Leave an installed plugin out from now on, in every command of this user."""
    from molora_fed.errors import PluginError
    from molora_fed.plugins import get_plugins
    from molora_fed.storage.plugin_sources import (
        LOAD,
        DisabledPlugin,
        read_disabled,
        write_disabled,
    )

    plugins = get_plugins()
    one = _find_plugin(plugins, name)
    if one.is_built_in or not one.distribution:
        raise PluginError(
            f"Cannot disable plugin '{one.name}': expected an installed plugin that molora can do "
            f"without, got {'one it cannot' if one.is_built_in else 'a file'}. "
            + ("Leave it enabled." if one.is_built_in else "Leave --plugin out.")
        )
    disabled = read_disabled()
    if one.name in disabled:
        print(f"{one.origin} is disabled already.")
        return
    registers = {
        kind: tuple(entry.name for entry in entries)
        for kind, entries in _group_by_kind(plugins, one.origin).items()
    }
    path = write_disabled({**disabled, one.name: DisabledPlugin(one.origin, registers)})
    print(f"disabled     {one.origin}: {_count(plugins, one.origin)}")
    print(f"kept in      {path}; undo it with `molora plugins enable {one.name}`")
    _warn_of_restriction(LOAD)


@app.command()
def enable(name: Name) -> None:
    """Load a disabled plugin again."""
    from molora_fed.plugins import get_plugins
    from molora_fed.storage.plugin_sources import LOAD, read_disabled, write_disabled

    disabled = read_disabled()
    if name not in disabled:
        one = _find_plugin(get_plugins(), name)
        name = one.name
        if name not in disabled:
            print(f"{one.origin} is not disabled.")
            return
    origin = disabled.pop(name).origin
    write_disabled(disabled)
    print(f"enabled      {origin}")
    _warn_of_restriction(LOAD)


def choose_entries(plugins: "Plugins", *, kind: str, only: str) -> list["Entry"]:
    """What is registered of a kind, by one plugin or under one name.

    Args:
        plugins: All that is registered.
        kind: Noun or plural of a registry; empty takes all.
        only: Name of a plugin, of its distribution, or registered; empty takes all.

    Raises:
        UnknownNameError: If there is no such kind, or nobody has the name.
    """
    from molora_fed.errors import UnknownNameError

    registries = plugins.registries()
    chosen: Mapping[str, Registry] = registries
    if kind:
        suffix = find_kind(kind, registries)
        chosen = {suffix: registries[suffix]}
    entries = [entry for registry in chosen.values() for entry in registry]
    if not only:
        return entries
    of_plugin = {one.origin for one in plugins.found if only in (one.name, one.distribution)}
    found = [one for one in entries if one.origin in of_plugin or one.name == only]
    if not found and not of_plugin:
        known = [*(one.name for one in plugins.found), *_list_near(only, entries)]
        raise UnknownNameError("plugin or registered name", only, known)
    return found


def _list_near(name: str, entries: Iterable["Entry"]) -> list[str]:
    from difflib import get_close_matches

    return get_close_matches(name, [one.name for one in entries], n=3, cutoff=0.5)


def _find_plugin(plugins: "Plugins", name: str) -> "FoundPlugin":
    """The plugin of a name, or the only one of a distribution.

    Raises:
        UnknownNameError: If there is none.
    """
    from molora_fed.errors import UnknownNameError

    by_name = [one for one in plugins.found if one.name == name]
    by_distribution = [one for one in plugins.found if one.distribution == name]
    found = by_name or (by_distribution if len(by_distribution) == 1 else [])
    if not found:
        raise UnknownNameError("plugin", name, [one.name for one in plugins.found])
    return found[0]


def _key(entry: "Entry") -> tuple[str, str]:
    return entry.kind, entry.name


def _check(plugins: "Plugins", entries: Iterable["Entry"]) -> dict[tuple[str, str], str]:
    """Import entries, and say of each that cannot be used why."""
    from molora_fed.errors import PluginError

    by_kind = {registry.kind: registry for registry in plugins.registries().values()}
    problems = {}
    for entry in entries:
        try:
            by_kind[entry.kind].resolve(entry.name)
        except PluginError as error:
            problems[_key(entry)] = str(error)
    return problems


def _group_by_kind(plugins: "Plugins", origin: str) -> dict[str, list["Entry"]]:
    """What one plugin registers, by the noun of its kind."""
    grouped = {
        registry.kind: [entry for entry in registry if entry.origin == origin]
        for registry in plugins.registries().values()
    }
    return {kind: entries for kind, entries in grouped.items() if entries}


def _count(plugins: "Plugins", origin: str) -> str:
    """How many of each kind a plugin registers, e.g. "2 routers, 1 merge"."""
    plural = {one.kind: suffix.replace("_", " ") for suffix, one in plugins.registries().items()}
    grouped = _group_by_kind(plugins, origin)
    counts = (
        f"{len(entries)} {kind if len(entries) == 1 else plural[kind]}"
        for kind, entries in grouped.items()
    )
    return ", ".join(counts) or "nothing"


def _print_plugins(
    plugins: "Plugins", found: Sequence["FoundPlugin"], results: Mapping[tuple[str, str], str]
) -> None:
    rows = []
    for one in found:
        registers = _count(plugins, one.origin) if one.state == "enabled" else one.reason
        row = [one.name, one.distribution or "a file", one.version or "-", one.state]
        if results:
            own = [entry for kind in _group_by_kind(plugins, one.origin).values() for entry in kind]
            failed = sum(results[_key(entry)] == "FAILED" for entry in own)
            is_ok = one.state == "enabled" and not failed
            row.append("ok" if is_ok else f"{failed} FAILED" if failed else "-")
        rows.append([*row, registers])
    columns = ("name", "distribution", "version", "state", *(["check"] if results else []))
    print_columns((*columns, "registers"), rows)


def _describe(
    plugins: "Plugins",
    found: Iterable["FoundPlugin"],
    entries: Sequence["Entry"],
    results: Mapping[tuple[str, str], str],
) -> dict[str, list[dict[str, Any]]]:
    """Plugins and what they register, for programs."""
    return {
        "plugins": [
            {
                "name": one.name,
                "origin": one.origin,
                "distribution": one.distribution,
                "version": one.version,
                "state": one.state,
                "reason": one.reason,
                "registers": {
                    kind: len(own) for kind, own in _group_by_kind(plugins, one.origin).items()
                },
            }
            for one in found
        ],
        "registered": [
            {
                "name": one.name,
                "kind": one.kind,
                "summary": one.summary,
                "source": one.source,
                "origin": one.origin,
                **({"check": results[_key(one)]} if results else {}),
            }
            for one in entries
        ],
    }


def _warn_of_restriction(variable: str) -> None:
    import os

    if variable in os.environ:
        note(f"note: {variable} is set: it alone decides which plugins are loaded.")
