"""`molora plugins`: what is installed."""

from typing import Annotated

import typer

from molora_cli.output import print_columns
from molora_cli.plugin_new import new

app = typer.Typer(help="Installed plugins.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Installed plugins."""


app.command("new")(new)


@app.command("list")
def list_plugins(
    check: Annotated[
        bool, typer.Option("--check", help="Import everything and hold it against its contract.")
    ] = False,
) -> None:
    """List everything that plugins register; those that could not be loaded are told of first."""
    from molora_fed.errors import PluginError
    from molora_fed.plugins import get_plugins

    plugins = get_plugins()
    failures = []
    rows = []
    for registry in plugins.registries().values():
        for entry in registry:
            status = "ok"
            if check:
                try:
                    registry.resolve(entry.name)
                except PluginError as error:
                    failures.append(str(error))
                    status = "FAILED"
            row = (entry.name, registry.kind, entry.summary, entry.origin)
            rows.append((*row, status) if check else row)
    print_columns(("name", "type", "summary", "origin", *(["check"] if check else [])), rows)
    failures += [str(failure) for failure in plugins.failures]
    if check and failures:
        raise PluginError(" ".join(failures))
