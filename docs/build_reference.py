"""Writes the reference pages that follow from the code: commands, charter keys, hooks.

    python docs/build_reference.py          # write them anew, after a command or a key has changed
    python docs/build_reference.py --check  # say which are not as the code is; nothing is written

`make docs` and a test run the check, so that a command, a key of the charter or a hook without a
word of description fails.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

FOLDER = Path(__file__).parent / "reference"
NOTE = "Written by `python docs/build_reference.py`; a test compares it with the code."


class MissingDescriptionError(Exception):
    """Something that a user meets has no word of description."""


def build_commands_page() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    from molora_cli.commands import GROUPS
    from molora_cli.main import app
    from typer.main import get_command

    root: Any = get_command(app)
    context = click.Context(root, info_name="molora")
    lines = ["# Commands", "", NOTE, "", "Options of `molora` itself:", ""]
    lines += list(_describe_options(root))
    for title, commands in GROUPS.items():
        lines += ["", f"## {title}"]
        for name, _, _ in commands:
            command = root.get_command(context, name)
            lines += list(_describe_command(command, f"molora {name}", context))
    return "\n".join(lines) + "\n"


def _describe_command(command: Any, path: str, parent: click.Context) -> Iterator[str]:
    """Heading, usage, help and options of a command, and of those below it."""
    context = click.Context(command, info_name=path.rpartition(" ")[2], parent=parent)
    yield from ("", f"### {path}", "")
    yield _need(f"command '{path}'", inspect.cleandoc(command.help or ""))
    pieces = " ".join(command.collect_usage_pieces(context))
    yield from ("", "```text", f"{path} {pieces}".rstrip(), "```")
    rows = list(_describe_options(command))
    if rows:
        yield from ("", *rows)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from _describe_command(
                command.get_command(context, name), f"{path} {name}", context
            )


def _describe_options(command: click.Command) -> Iterator[str]:
    """A table of arguments and options; `--help` is left out."""
    shown = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    if not shown:
        return
    yield from ("| argument or option | default | what it is |", "|---|---|---|")
    for parameter in shown:
        names = parameter.opts + parameter.secondary_opts
        if isinstance(parameter, click.Argument):
            label = parameter.make_metavar(click.Context(command))
        else:
            label = ", ".join(names)
        text = _need(f"option '{label}' of '{command.name}'", getattr(parameter, "help", "") or "")
        yield f"| `{_cell(label)}` | {_cell(_show_default(parameter))} | {_cell(text)} |"


def _show_default(parameter: click.Parameter) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    is_none = default is None or default is False or default in ((), [], "")
    if is_none or callable(default) or "Sentinel" in type(default).__name__:
        return ""
    return f"`{getattr(default, 'value', default)}`"


def build_charter_page() -> str:
    """Every key of a charter, with its type and its default."""
    from molora_fed.charter import Charter

    lines = ["# Keys of a charter", "", NOTE, ""]
    lines += [
        "`[identity]` never changes; `[amendment]` does by a higher number, with "
        "`molora coop amend --set KEY=VALUE`. A key that is left out has its default. See "
        "[protocol](../protocol.md)."
    ]
    for name in Charter.model_fields:
        lines += list(_describe_model(_find_model(Charter.model_fields[name].annotation), name))
    return "\n".join(lines) + "\n"


def _describe_model(model: Any, path: str) -> Iterator[str]:
    """A section for a table of the charter, then one for every table in it."""
    described = _read_attributes(model)
    summary = inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    yield from ("", f"## [{path}]", "", _need(f"table '{path}'", summary), "")
    yield from ("| key | type | default | what it is |", "|---|---|---|---|")
    below = []
    for name, field in model.model_fields.items():
        inner = _find_model(field.annotation)
        if inner is not None:
            below.append((inner, f"{path}.{name}"))
            if field.annotation is inner:
                continue
        text = _need(f"key '{path}.{name}'", described.get(name, ""))
        row = (_name_type(field.annotation), _show_value(field), text)
        yield f"| `{name}` | {' | '.join(map(_cell, row))} |"
    for inner, place in below:
        yield from _describe_model(inner, place)


def _read_attributes(model: Any) -> dict[str, str]:
    """What a docstring's "Attributes" say, by name; those of the classes below it, too."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        text = inspect.cleandoc(vars(each).get("__doc__") or "")
        _, _, attributes = text.partition("Attributes:\n")
        for match in re.finditer(r"^ {4}(\w+): ((?:.+\n?)(?:^ {8}.+\n?)*)", attributes, re.M):
            found[match[1]] = " ".join(match[2].split())
    return found


def _find_model(annotation: Any) -> Any:
    """The model that an annotation is, or holds; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_find_model, get_args(annotation))), None)


def _name_type(annotation: Any) -> str:
    """A type in words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "none"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join(map(_name_type, inside))
    if origin is tuple:
        return f"list of {_name_type(inside[0])}"
    if origin is dict:
        return "table"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    if hasattr(annotation, "__metadata__"):
        return _name_type(inside[0] if inside else annotation.__origin__)
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    name = getattr(annotation, "__name__", str(annotation))
    return words.get(name, name)


def _show_value(field: Any) -> str:
    """A default as TOML has it."""
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else ""
    if field.default is None:
        return ""
    return f"`{_to_toml(field.default)}`"


def _to_toml(value: Any) -> str:
    if isinstance(value, BaseModel):
        return _to_toml(value.model_dump(mode="json"))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_to_toml, value))}]"
    if isinstance(value, dict):
        inside = ", ".join(f"{key} = {_to_toml(each)}" for key, each in value.items())
        return f"{{{inside}}}"
    return str(value)


def build_hooks_page() -> str:
    """Every hook with what it registers, who does, and where its page is."""
    from molora_fed import hookspecs
    from molora_fed.plugins import load_plugins

    lines = ["# Hooks and what is registered", "", NOTE, ""]
    for suffix, registry in load_plugins().registries().items():
        hook = f"register_{suffix}"
        text = _need(f"hook '{hook}'", inspect.getdoc(getattr(hookspecs, hook)) or "")
        page = _find_page(hook)
        lines += ["", f"## {hook}", "", f"{text} [Its page]({page}).", ""]
        lines += ["| name | what it does | source | plugin |", "|---|---|---|---|"]
        lines += [
            f"| `{e.name}` | {_cell(e.summary)} | {_cell(e.source)} | {e.origin.split(' ')[0]} |"
            for e in registry
            if e.is_own
        ]
    return "\n".join(lines) + "\n"


def _find_page(hook: str) -> str:
    """The page whose heading names the hook, relative to the reference."""
    for page in sorted(FOLDER.parent.rglob("*.md")):
        if FOLDER not in page.parents and re.search(
            rf"^#+ {hook}\(", page.read_text(encoding="utf-8"), re.M
        ):
            place = page.relative_to(FOLDER.parent)
            return f"../{place.as_posix()}"
    raise MissingDescriptionError(f"hook '{hook}' has no page: expected a heading '{hook}(...)'")


def _need(what: str, text: str) -> str:
    """The text.

    Raises:
        MissingDescriptionError: If there is none.
    """
    if not text.strip():
        raise MissingDescriptionError(f"{what} has no description")
    return text


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {
    "commands.md": build_commands_page,
    "charter.md": build_charter_page,
    "hooks.md": build_hooks_page,
}


def find_stale() -> list[str]:
    """Names of pages that are not as the code is."""
    return [
        name
        for name, build in PAGES.items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_text(encoding="utf-8") != build()
    ]


def main() -> None:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    if parser.parse_args().check:
        stale = find_stale()
        if stale:
            sys.exit(
                f"Stale reference pages: expected them as the code is, got {', '.join(stale)}. "
                "Run `python docs/build_reference.py`."
            )
        return
    for name, build in PAGES.items():
        (FOLDER / name).write_text(build(), encoding="utf-8")


if __name__ == "__main__":
    main()
