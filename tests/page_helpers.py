"""Blocks of code on a page of the documentation, and the commands in them."""

import re
import shlex
from pathlib import Path

import click
from molora_cli.main import app
from typer.main import get_command

from molora_fed.plugins import Plugins

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHAINED = re.compile(r" (?:&&|\||>>?|<) ")


def read_page(name: str) -> str:
    """A page by its path in the checkout, or in docs/."""
    path = ROOT / name
    return (path if path.is_file() else ROOT / "docs" / name).read_text(encoding="utf-8")


def list_blocks(text: str) -> list[tuple[str, str]]:
    """Language and code of every fenced block, in their order."""
    return FENCE.findall(text)


def find_blocks(text: str, *languages: str) -> list[str]:
    """Code of the blocks in these languages."""
    return [code for language, code in list_blocks(text) if language in languages]


def list_commands(block: str) -> list[str]:
    """Lines that a shell is given: those after a `$` where there are any, else all.

    Lines that go on after a backslash are one; comments at the end are cut.
    """
    lines = block.replace("\\\n", " ").splitlines()
    given = [line[2:] for line in lines if line.startswith("$ ")]
    cut = (re.sub(r"\s+# .*", "", line).strip() for line in given or lines)
    return [line for line in cut if line and not line.startswith("#")]


def check_command(line: str, plugins: Plugins) -> None:
    """Refuse a line of `molora` whose command, arguments or options there are not."""
    first, *words = shlex.split(CHAINED.split(line, maxsplit=1)[0])
    assert first.rpartition("/")[2] == "molora"
    if words[0] == "--plugin":
        words = words[2:]
    assert words[0] in plugins.commands.names(), f"{line}: no command '{words[0]}'"
    command: click.Command = get_command(app)
    context = click.Context(command)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        names = command.list_commands(context)
        if words[0] not in names and "run" not in names:
            return  # an example's own command
        found = command.get_command(context, words.pop(0) if words[0] in names else "run")
        assert found is not None
        command, context = found, click.Context(found, parent=context, info_name=found.name)
    try:
        _, rest, _ = command.make_parser(context).parse_args(words)
    except click.UsageError as error:
        raise AssertionError(f"{line}: {error.format_message()}") from error
    assert not rest, f"{line}: {command.name} has no argument for {rest}"
