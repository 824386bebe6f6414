"""What `molora plugins show` says of a plugin, and of one thing that it registers."""

import inspect
import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from molora_cli.output import MAX_LINE
from molora_fed.storage.untrusted import clean

if TYPE_CHECKING:
    from molora_fed.plugins import Entry, FoundPlugin, Plugins

__all__ = ["describe_entry", "describe_plugin"]

_AMEND = "molora coop amend COOPERATIVE --set"
# By hook: the line of a charter or another file, then the command that uses it.
_USES = {
    "routers": (
        '[amendment.fusion] router = "{name}"',
        f"{_AMEND} fusion.router={{name}}",
    ),
    "gain_predictors": (
        '[amendment.fusion] headline = ["{name}"]; every fusion has its forecast anyhow',
        f"{_AMEND} fusion.headline={{name}}",
    ),
    "admission_checks": (
        '[amendment.admission] checks = ["{name}"]',
        f"{_AMEND} admission.checks={{name}}",
    ),
    "domains": ("", "molora train --cooperative COOPERATIVE --domain {name} --out FOLDER"),
    "adapter_kinds": (
        '[identity.adapters] kinds = ["{name}"], when a cooperative is founded',
        "molora train --cooperative COOPERATIVE --domain DOMAIN --out FOLDER --kind {name}",
    ),
    "carried_files": (
        '[amendment.fusion] carried = ["{name}"]',
        f"{_AMEND} fusion.carried={{name}}",
    ),
    "merges": ('[amendment.fusion] merges = ["{name}"]', f"{_AMEND} fusion.merges={{name}}"),
    "adapter_routers": (
        '[amendment.population] router = "{name}"',
        f"{_AMEND} population.router={{name}}",
    ),
    "fitness_scopes": (
        '[amendment.population] scope = "{name}"',
        f"{_AMEND} population.scope={{name}}",
    ),
    "lifecycle_operators": (
        '[[amendment.population.lifecycle]] name = "{name}"',
        f"{_AMEND} 'population.lifecycle=[{{{{name = \"{{name}}\"}}}}]'",
    ),
    "extractors": ('a line of a tasks file: "extractor": "{name}"', ""),
    "judges": ('[cascade] judge = "{name}"', "molora cascade run CONFIG"),
    "escalation_policies": ('[cascade] policy = "{name}"', "molora cascade run CONFIG"),
    "task_families": ("", "molora cascade tasks --families {name} --out FILE"),
    "commands": ("", "molora {name} --help"),
}
_OWN_CHECK = "always runs: the core's own checks need no line"


def describe_plugin(plugin: "FoundPlugin", plugins: "Plugins") -> str:
    """A plugin in a few lines.

    Args:
        plugin: Which.
        plugins: What is registered.
    """
    from molora_fed.storage.distributions import find_documentation

    grouped = {
        suffix.replace("_", " "): [one.name for one in registry if one.origin == plugin.origin]
        for suffix, registry in plugins.registries().items()
    }
    state = f"{plugin.state}: {plugin.reason}" if plugin.reason else plugin.state
    rows = [
        ("plugin", plugin.origin),
        ("state", state),
        *((kind, ", ".join(names)) for kind, names in grouped.items() if names),
        ("docs", find_documentation(plugin.distribution) if plugin.distribution else None),
        ("check", f"molora plugins check {plugin.name}" if plugin.state == "enabled" else None),
    ]
    return _format(rows)


def describe_entry(entry: "Entry", plugins: "Plugins") -> str:
    """One registered thing, with its options and how it is used; it is imported for that.

    Args:
        entry: What.
        plugins: Where it is registered.
    """
    from molora_fed.errors import PluginError
    from molora_fed.storage.distributions import find_documentation

    suffix, registry = next(
        (suffix, one) for suffix, one in plugins.registries().items() if one.kind == entry.kind
    )
    line, command = (text.format(name=entry.name) for text in _USES.get(suffix, ("", "")))
    if suffix == "admission_checks" and entry.is_own:
        line, command = _OWN_CHECK, ""
    failure = ""
    options: list[tuple[str, str | None]] = []
    try:
        options = list(_list_options(registry.resolve(entry.name)))
    except PluginError as error:
        failure = str(error)
    if options and suffix == "domains":
        command += " --domain-option KEY=VALUE"
    rows: list[tuple[str, str | None]] = [
        (entry.kind, entry.name),
        ("summary", entry.summary),
        ("source", entry.source),
        ("origin", entry.origin),
        ("docs", find_documentation(entry.distribution) if entry.version else None),
        ("options", "none" if not (options or failure) else None),
        *((f"option {name}", text) for name, text in options),
        ("charter" if line.startswith(("[id", "[am", "[[am")) else "named in", line),
        ("command", command),
        ("check", f"molora plugins check {entry.name}"),
        ("failed", failure),
    ]
    return _format(rows)


def _format(rows: list[tuple[str, str | None]]) -> str:
    width = max(len(label) for label, text in rows if text) + 2
    return "\n".join(
        f"{clean(label, 80).ljust(width)}{clean(text, MAX_LINE)}" for label, text in rows if text
    )


def _list_options(target: Any) -> Iterator[tuple[str, str]]:
    """Options of a registered target: name, then type, default and description."""
    options = getattr(target, "Options", None)
    for name, field in getattr(options, "model_fields", {}).items():
        bounds = [
            f"{sign} {getattr(one, key)}"
            for one in field.metadata
            for key, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
            if getattr(one, key, None) is not None
        ]
        default = "required" if field.is_required() else f"default {field.get_default()!r}"
        described = field.description or _read_attributes(options).get(name, "")
        shown = [_name_type(field.annotation), *bounds, default]
        yield name, f"{', '.join(shown)}. {described}".rstrip(" .") + "."


def _name_type(annotation: Any) -> str:
    """A type as people write it, without what only pydantic reads."""
    if annotation is Ellipsis:
        return "..."
    if annotation is NoneType:
        return "None"
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _name_type(inner[0])
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " | ".join(map(_name_type, inner))
    name = getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(_name_type, inner))}]" if inner else name


def _read_attributes(options: Any) -> dict[str, str]:
    """Descriptions of fields from the docstrings of a class and those it is made from."""
    found: dict[str, str] = {}
    for each in reversed(getattr(options, "__mro__", ())):
        _, _, section = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        name = ""
        for line in section.splitlines():
            match = re.fullmatch(r" {4}(\w+): (.*)", line)
            if match:
                name = match[1]
                found[name] = match[2]
            elif name and line.startswith(" " * 8):
                found[name] += f" {line.strip()}"
            elif line.strip():
                break
    return found
