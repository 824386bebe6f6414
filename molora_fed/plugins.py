"""Finds, loads and freezes plugins; the result is a `Plugins` object, never a module global.

`MOLORA_LOAD_PLUGINS=a,b` restricts loading to the entry points named a and b (the core and
the command line are always loaded); `MOLORA_TRACE_HOOKS=1` prints every hook call to standard
error.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from molora_fed import contracts, hookspecs
from molora_fed.errors import PluginError
from molora_fed.hookspecs import GROUP, Register
from molora_fed.registry import Entry, Registry

__all__ = [
    "Plugins",
    "build_register",
    "describe_failure",
    "find_entry_points",
    "get_plugins",
    "hookimpl",
    "import_entry_point",
    "load_plugins",
]

hookimpl = pluggy.HookimplMarker(GROUP)
"""Marks a function of a plugin as the implementation of the hook of the same name."""

BUILT_IN = ("molora_fed.builtin", "molora_cli.commands")
"""Entry points that are always loaded, and first, by the module they name."""


@dataclass
class Plugins:
    """All registered things, one registry per hook.

    Attributes:
        failures: Plugins that could not be loaded, each with its one-line reason.
    """

    routers: Registry = field(default_factory=lambda: Registry("router", contracts.check_router))
    gain_predictors: Registry = field(
        default_factory=lambda: Registry("gain predictor", contracts.check_callable)
    )
    admission_checks: Registry = field(
        default_factory=lambda: Registry("admission check", contracts.check_callable)
    )
    domains: Registry = field(default_factory=lambda: Registry("domain", contracts.check_callable))
    adapter_kinds: Registry = field(
        default_factory=lambda: Registry("adapter kind", contracts.check_adapter_kind)
    )
    merges: Registry = field(default_factory=lambda: Registry("merge", contracts.check_callable))
    adapter_routers: Registry = field(
        default_factory=lambda: Registry("adapter router", contracts.check_adapter_router)
    )
    fitness_scopes: Registry = field(
        default_factory=lambda: Registry("fitness scope", contracts.check_callable)
    )
    lifecycle_operators: Registry = field(
        default_factory=lambda: Registry("lifecycle operator", contracts.check_operator)
    )
    extractors: Registry = field(
        default_factory=lambda: Registry("extractor", contracts.check_callable)
    )
    judges: Registry = field(default_factory=lambda: Registry("judge", contracts.check_callable))
    escalation_policies: Registry = field(
        default_factory=lambda: Registry("escalation policy", contracts.check_policy)
    )
    task_families: Registry = field(
        default_factory=lambda: Registry("task family", contracts.check_callable)
    )
    commands: Registry = field(
        default_factory=lambda: Registry("command", contracts.check_callable)
    )
    failures: list[PluginError] = field(default_factory=list)

    def registries(self) -> dict[str, Registry]:
        """The registries by hook suffix, e.g. "routers" for `register_routers`."""
        return {n: v for n, v in vars(self).items() if isinstance(v, Registry)}


def build_register(registry: Registry, origin: str) -> Register:
    """What a plugin's hook is handed to add entries of one origin to a registry."""

    def register(name: str, target: object, *, summary: str, source: str) -> None:
        registry.add(Entry(name, target, summary, source, origin))

    return register


def _load_one(manager: pluggy.PluginManager, plugins: Plugins, module: Any, origin: str) -> None:
    """Load one plugin whole or not at all.

    Raises:
        PluginError: If a hook is misspelled or has wrong arguments, or registering fails.
    """
    try:
        if manager.register(module, name=origin) is None:
            raise PluginError(f"the plugin '{origin}' is blocked")
        manager.check_pending()
        implemented = {caller.name for caller in manager.get_hookcallers(module) or []}
        # A subset caller per plugin: `register` must know the origin, which pluggy does not pass.
        others = [p for p in manager.get_plugins() if p is not module]
        for suffix, registry in plugins.registries().items():
            hook = f"register_{suffix}"
            if hook in implemented:
                caller = manager.subset_hook_caller(hook, remove_plugins=others)
                caller(register=build_register(registry, origin))
    except Exception as error:
        if manager.is_registered(module):
            manager.unregister(module)
        for registry in plugins.registries().values():
            registry.remove_origin(origin)
        raise describe_failure(error, origin) from error


def load_plugins(extra: Iterable[tuple[str, Any]] = ()) -> Plugins:
    """Load all installed plugins, then freeze every registry.

    A plugin that fails is left out whole and listed in `Plugins.failures`; a failure of the core's
    or the command line's own registration is an error.

    Args:
        extra: Further plugins as (origin, module or object), for tests and one-file plugins;
            a failure of one of these raises.

    Returns:
        A fresh `Plugins`.

    Raises:
        PluginError: If the core, the command line or an `extra` plugin cannot be loaded.
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    if os.environ.get("MOLORA_TRACE_HOOKS"):
        manager.trace.root.setwriter(lambda text: print(text, end="", file=sys.stderr))
        manager.enable_tracing()
    plugins = Plugins()
    for point, origin in find_entry_points(GROUP):
        try:
            _load_one(manager, plugins, import_entry_point(point, origin), origin)
        except PluginError as error:
            if point.value in BUILT_IN:
                raise
            plugins.failures.append(error)
    for origin, module in extra:
        _load_one(manager, plugins, module, origin)
    for registry in plugins.registries().values():
        registry.freeze()
    return plugins


def find_entry_points(group: str) -> Iterator[tuple[EntryPoint, str]]:
    """Entry points of a group that `MOLORA_LOAD_PLUGINS` allows, each with its origin for people.

    Args:
        group: Entry-point group, e.g. "molora_fed".
    """
    wanted = os.environ.get("MOLORA_LOAD_PLUGINS")
    names = None if wanted is None else {n.strip() for n in wanted.split(",") if n.strip()}
    for point in sorted(entry_points(group=group), key=_load_order):
        if names is None or point.name in names or point.value in BUILT_IN:
            version = point.dist.version if point.dist else "?"
            distribution = point.dist.name if point.dist else "?"
            yield point, f"{point.name} ({distribution} {version})"


def import_entry_point(point: EntryPoint, origin: str) -> Any:
    """Import what an entry point names.

    Raises:
        PluginError: If that fails.
    """
    try:
        return point.load()
    except Exception as error:
        raise PluginError(
            f"Cannot load plugin {origin}: importing '{point.value}' failed with "
            f"{type(error).__name__}: {error}. Correct or uninstall it, or leave it out "
            "with MOLORA_LOAD_PLUGINS."
        ) from error


def describe_failure(error: Exception, origin: str) -> PluginError:
    """The error of a plugin whose registration failed, in one line."""
    reason = error.args[0] if error.args else type(error).__name__
    text = " ".join(str(reason).split()).rstrip(".") + "."
    return PluginError(
        f"Cannot load plugin {origin}: {text} Correct or uninstall it, or leave it out with "
        "MOLORA_LOAD_PLUGINS."
    )


def _load_order(point: EntryPoint) -> tuple[int, str, str]:
    """The built-in ones first, then by name: clashes are reported alike on every machine."""
    place = BUILT_IN.index(point.value) if point.value in BUILT_IN else len(BUILT_IN)
    return (place, point.name, point.value)


@cache
def get_plugins() -> Plugins:
    """The installed plugins of this process, loaded once.

    Pass a `Plugins` explicitly wherever a function takes one; this is the default for the
    command line. Tests call `load_plugins()` for a fresh set.
    """
    return load_plugins()
