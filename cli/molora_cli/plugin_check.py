"""`molora plugins check`: the conformance kits of what a plugin registers, as ticks."""

import importlib
import json
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora_cli.output import MAX_LINE, show
from molora_cli.progress import Reporter, reporting
from molora_fed.errors import ConfigError, PluginError, UnknownNameError
from molora_fed.plugins import Entry, Plugins, Registry, get_plugins, load_plugins
from molora_fed.storage.plugin_sources import find_plugin_file
from molora_fed.storage.untrusted import clean

if TYPE_CHECKING:
    from molora_fed.testing.findings import CheckResult

__all__ = ["check_plugin", "find_kind"]


@dataclass(frozen=True)
class _Checked:
    """What was found of one registered thing."""

    entry: Entry
    results: Sequence["CheckResult"]

    @property
    def broken(self) -> int:
        return sum(result.problem is not None for result in self.results)


def check_plugin(
    what: Annotated[
        str,
        typer.Argument(help="Registered name, plugin, distribution, file or package folder."),
    ],
    kind: Annotated[
        str | None, typer.Option("--kind", help="Only what is registered as this, e.g. router.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Option to check it with, KEY=VALUE; repeatable."),
    ] = None,
    on: Annotated[
        Path | None,
        typer.Option("--on", help="Cooperative to try it on, too; nothing is written there."),
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option("--beside", help="Router to compare the cost of routers with."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that what a plugin registers keeps its contract, on made-up data.

    WHAT is a registered name, a plugin, a distribution, a one-file plugin, or a package folder. The
    exit code is 1 if anything is broken.
    """
    origin, plugins = _open(what)
    chosen = list(_choose(what, origin, kind, plugins))
    options = _read_options(option, what, chosen)
    rival = None if beside is None else plugins.routers.resolve(beside)
    checked = []
    with reporting(transient=True) as progress:
        for suffix, entry in chosen:
            progress.phase(f"{entry.kind} '{entry.name}'")
            results = list(_examine(suffix, entry, plugins, options))
            if suffix == "routers" and rival is not None:
                results.append(_compare_cost(entry, plugins, str(beside), rival))
            checked.append(_Checked(entry, results))
        if on is not None:
            checked = _try_on(on, chosen, checked, plugins, options, progress)
    if as_json:
        print(json.dumps([_describe(each) for each in checked], indent=2))
    else:
        _show(what, checked)
    if any(each.broken for each in checked):
        raise typer.Exit(1)


# What is checked ----------------------------------------------------------------------------------


def _open(what: str) -> tuple[str | None, Plugins]:
    """The plugins with what a path holds among them; its origin, or None of what is installed.

    Raises:
        PluginError: If the path holds no plugin, or one that cannot be loaded.
    """
    path = Path(what)
    if not path.exists() or (path.is_dir() and not (path / "pyproject.toml").is_file()):
        return None, get_plugins()
    if path.is_file():
        file = find_plugin_file(what)
        return file.origin, load_plugins([(file.origin, file.load())])
    name, distribution, target = _read_entry_point(path)
    for origin in _list_origins(get_plugins()):
        if origin.startswith(f"{name} ({distribution} "):
            return origin, get_plugins()  # installed already, as what is edited in place is
    roots = [path.resolve() / "src", path.resolve()]
    sys.path[:0] = [str(root) for root in roots if root.is_dir()]
    origin = f"{name} ({distribution} {_FOLDER})"
    module, _, attribute = target.partition(":")
    try:
        plugin: Any = importlib.import_module(module)
        for part in filter(None, attribute.split(".")):
            plugin = getattr(plugin, part)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"Cannot load plugin '{what}': importing '{target}' failed with "
            f"{type(error).__name__}: {error}. Correct it."
        ) from error
    return origin, load_plugins([(origin, plugin)])


_FOLDER = "0+folder"
"""Stands for the version of a package that is not installed."""


def _read_entry_point(folder: Path) -> tuple[str, str, str]:
    """Name, distribution and target of a package folder's plugin."""
    path = folder / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
        points = project.get("entry-points", {}).get("molora_fed", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PluginError(f"Cannot read '{path}': {error}. Correct it.") from error
    if len(points) != 1:
        raise PluginError(
            f"Cannot check '{folder}': expected one entry point in the group molora_fed of "
            f"pyproject.toml, got {len(points)}. Name the plugin's module there."
        )
    ((name, target),) = points.items()
    return str(name), str(project.get("name", folder.name)), str(target)


def _choose(
    what: str, origin: str | None, kind: str | None, plugins: Plugins
) -> Iterator[tuple[str, Entry]]:
    """Hook's suffix and entry of everything that is asked for.

    Raises:
        PluginError: If nothing is registered under the name.
        UnknownNameError: If there is no such kind.
    """
    registries = plugins.registries()
    if kind is not None:
        suffix = find_kind(kind, registries)
        registries = {suffix: registries[suffix]}
    entries = [(suffix, entry) for suffix, registry in registries.items() for entry in registry]
    if origin is not None:
        found = [(suffix, entry) for suffix, entry in entries if entry.origin == origin]
    else:
        found = [(suffix, entry) for suffix, entry in entries if entry.name == what]
        found = found or [(s, e) for s, e in entries if what in (e.distribution, _name_plugin(e))]
    if found:
        yield from found
        return
    if origin is not None:
        what_kind = "anything" if kind is None else kind
        raise PluginError(
            f"Cannot check '{what}': expected a plugin that registers {what_kind}, got one that "
            "registers nothing. Mark its functions with @hookimpl."
        )
    known = {e.name for _, e in entries} | {_name_plugin(e) for _, e in entries}
    near = get_close_matches(what, sorted(known), n=3)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "See `molora plugins list`."
    said = " ".join(str(failure) for failure in plugins.failures)
    of_kind = f" {registries.popitem()[1].kind}" if kind is not None else ""
    raise PluginError(
        f"Cannot check '{what}': expected the name of a registered{of_kind or ' thing'}, a plugin, "
        f"a distribution, a file or a package folder, got none of these. {hint} {said}".rstrip()
    )


def _read_options(
    given: Sequence[str] | None, what: str, chosen: Sequence[tuple[str, Entry]]
) -> dict[str, Any]:
    """Options of the one thing that is checked.

    Raises:
        ConfigError: If they are malformed, or several things are checked.
    """
    from molora_fed.storage.values import parse_options

    if given and len(chosen) > 1:
        raise ConfigError(
            f"Cannot check '{what}' with options: expected one registered thing, got "
            f"{len(chosen)}. Name one of them, or say which --kind."
        )
    return parse_options(given) if given else {}


def find_kind(kind: str, registries: dict[str, Registry]) -> str:
    """The hook's suffix that somebody means: "router", "gain-predictor", "predictor", "merges".

    Args:
        kind: What was asked for.
        registries: By suffix.

    Raises:
        UnknownNameError: If there is no such kind.
    """
    asked = kind.strip().lower().replace("-", " ").replace("_", " ")
    for suffix, registry in registries.items():
        if asked in (registry.kind, suffix.replace("_", " ")):
            return suffix
    short = [s for s, registry in registries.items() if registry.kind.split()[-1] == asked]
    if len(short) == 1:
        return short[0]
    kinds = [registry.kind.replace(" ", "-") for registry in registries.values()]
    raise UnknownNameError("kind", kind, kinds)


def _name_plugin(entry: Entry) -> str:
    """The name of the entry point that registered it."""
    return entry.origin.partition(" (")[0]


def _list_origins(plugins: Plugins) -> set[str]:
    return {entry.origin for registry in plugins.registries().values() for entry in registry}


# Checking -----------------------------------------------------------------------------------------


def _examine(
    suffix: str, entry: Entry, plugins: Plugins, options: dict[str, Any]
) -> Iterator["CheckResult"]:
    """Whether it can be used at all, then what its kit finds."""
    from molora_fed.testing.findings import CheckResult, describe_raised
    from molora_fed.testing.kits import open_kit

    name = "can be imported and used"
    try:
        target = plugins.registries()[suffix].resolve(entry.name)
    except PluginError as error:
        yield CheckResult(name, str(error))
        return
    yield CheckResult(name)
    try:
        kit = open_kit(suffix)
    except PluginError as error:
        yield CheckResult("has a conformance kit", None, str(error))
        return
    try:
        chosen = _open_options(suffix, target, options)
        # What a command loads before it is invoked is part of its contract.
        yield from kit(entry.target if suffix == "commands" else target, chosen)
    except ConfigError as error:
        yield CheckResult("takes its options", str(error))
    except (Exception, SystemExit) as error:
        yield CheckResult("goes through its kit", f"expected an end, got {describe_raised(error)}")


def _open_options(suffix: str, target: Any, options: dict[str, Any]) -> Any:
    """What a kit takes as options; None takes the defaults.

    Raises:
        ConfigError: If a key is unknown or a value out of range, or it has no options.
    """
    from molora_fed.storage.settings import check_options

    if not options:
        return None
    model = getattr(target, "Options", None)
    if model is None:
        raise ConfigError(
            f"Cannot use options {', '.join(options)}: expected a class with Options, got none. "
            "Leave them out."
        )
    what, fix = "Cannot use these options", "Correct or remove these."
    checked = check_options(model, options, what=what, error=ConfigError, fix=fix)
    return options if suffix == "adapter_kinds" else checked  # a kind opens them itself


def _compare_cost(entry: Entry, plugins: Plugins, beside: str, rival: Any) -> "CheckResult":
    """What a router costs as a multiple of another."""
    from molora_fed.testing.findings import CheckResult, describe_raised
    from molora_fed.testing.router_costs import measure_router

    name = f"cost beside '{beside}'"
    try:
        own = measure_router(plugins.routers.resolve(entry.name))
        ratios = own.relative_to(measure_router(rival))
    except (Exception, SystemExit) as error:
        return CheckResult(
            name, f"expected a router that can be fitted, got {describe_raised(error)}"
        )
    labels = {"fit_seconds": "to fit", "token_seconds": "a token", "peak_bytes": "memory"}
    said = ", ".join(f"{label} x {ratios[figure]:.2f}" for figure, label in labels.items())
    figures = f"{own.fit_seconds:.2f} s, {1e6 * own.token_seconds:.0f} us, {own.peak_bytes:,} bytes"
    return CheckResult(name, None, f"{said} ({figures})")


def _try_on(
    folder: Path,
    chosen: Sequence[tuple[str, Entry]],
    checked: Sequence[_Checked],
    plugins: Plugins,
    options: dict[str, Any],
    progress: Reporter,
) -> list[_Checked]:
    """Use what kept its contract once on a cooperative."""
    from molora_cli.plugin_trial import Trial
    from molora_fed.cooperative.cooperative import open_cooperative

    sound = [pair for pair, each in zip(chosen, checked, strict=True) if not each.broken]
    trial = Trial(open_cooperative(folder), sound, plugins, options, progress)
    found = []
    for (suffix, entry), each in zip(chosen, checked, strict=True):
        tried = [] if each.broken else list(trial.run(suffix, entry))
        found.append(_Checked(entry, [*each.results, *tried]))
    return found


# Showing ------------------------------------------------------------------------------------------


def _describe(checked: _Checked) -> dict[str, Any]:
    entry = checked.entry
    return {
        "kind": entry.kind,
        **entry.describe(),
        "is_sound": not checked.broken,
        "checks": [asdict(result) for result in checked.results],
    }


def _show(what: str, checked: Sequence[_Checked]) -> None:
    from rich.text import Text

    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    tick, cross = ("✓", "✗") if is_unicode else ("ok", "NO")
    kinds = {each.entry.kind for each in checked}
    if len(kinds) > 1 and all(each.entry.name == what for each in checked):
        show(f"'{what}' is registered as {' and as '.join(sorted(kinds))}; all are checked.")
    for each in checked:
        parts = [Text(clean(each.entry.title, MAX_LINE), style="bold")]
        for result in each.results:
            is_sound = result.problem is None
            mark = Text(f"  {tick} " if is_sound else f"  {cross} ", "green" if is_sound else "red")
            parts.append(mark.append(clean(result.name, MAX_LINE), ""))
            said = result.remark if is_sound else result.problem
            if said:
                parts.append(Text(f"      {clean(said, MAX_LINE)}", "dim" if is_sound else "red"))
        show(*parts)
    count = sum(len(each.results) for each in checked)
    broken = sum(each.broken for each in checked)
    show(f"{count} checks, {broken} broken." if broken else f"{count} checks, nothing is broken.")
