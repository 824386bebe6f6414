"""Finds, loads and freezes plugins; the result is a `Plugins` object, never a module global.

`MOLORA_LOAD_PLUGINS=a,b` restricts loading to the entry points named a and b (the core and
the command line are always loaded), whatever the user disabled; `MOLORA_PLUGINS` names files of
one plugin each; `MOLORA_TRACE_HOOKS=1` prints every hook call to standard error.
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from molora_fed import hookspecs
from molora_fed.errors import PluginError, UnknownNameError
from molora_fed.hookspecs import (
    GROUP,
    Register,
    check_adapter_kind,
    check_adapter_router,
    check_callable,
    check_function,
    check_operator,
    check_policy,
    check_router,
)
from molora_fed.storage.plugin_sources import (
    DISTRIBUTION,
    FILE_SUFFIX,
    FoundPlugin,
    describe_failure,
    find_plugin_names,
    import_entry_point,
    list_plugin_files,
    survey,
)

__all__ = [
    "DISTRIBUTION",
    "Contract",
    "Entry",
    "FoundPlugin",
    "Plugins",
    "Registry",
    "build_register",
    "describe_failure",
    "find_entry_points",
    "get_plugins",
    "hookimpl",
    "import_entry_point",
    "load_plugins",
]


def _check_name(target: Any, name: str) -> str | None:
    """A class that says its own name says the registered one."""
    own = getattr(target, "name", "") if inspect.isclass(target) else ""
    if not isinstance(own, str) or own in ("", name):
        return None
    return f"expected the class attribute name = '{name}' as it is registered, got '{own}'"


_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

_ORIGIN = re.compile(r".+ \((?P<distribution>\S+) (?P<version>\S+)\)")

Contract = Callable[[Any], str | None]
"""Describes what a resolved target lacks, or returns None."""


@dataclass(frozen=True)
class Entry:
    """One registered thing.

    Attributes:
        name: Unique within its registry.
        target: The object, or a "module:attr" string.
        summary: One line for people.
        source: Citation.
        origin: Plugin, distribution and version that registered it, for people.
        kind: Noun of its registry, e.g. "router".
    """

    name: str
    target: object
    summary: str
    source: str
    origin: str
    kind: str = ""

    @property
    def title(self) -> str:
        """What a message calls it, e.g. "Router 'arrow' of mine (molora-mine 0.1.0)"."""
        return f"{self.kind.capitalize() or 'Plugin'} '{self.name}' of {self.origin}"

    @property
    def distribution(self) -> str:
        """Name of the distribution; of a plugin that was not installed, its origin."""
        found = _ORIGIN.fullmatch(self.origin)
        return found["distribution"] if found else self.origin

    @property
    def version(self) -> str:
        """Version of the distribution; empty of a plugin that was not installed."""
        found = _ORIGIN.fullmatch(self.origin)
        return found["version"] if found else ""

    def describe(self) -> dict[str, str]:
        """Who it is from, for results: its name, the distribution and its version."""
        return {"name": self.name, "plugin": self.distribution, "version": self.version}

    @property
    def is_file(self) -> bool:
        """Whether a one-file plugin registered it."""
        return self.origin.endswith(FILE_SUFFIX)

    @property
    def is_own(self) -> bool:
        """Whether the core's own distribution registered it."""
        return self.distribution == DISTRIBUTION


@dataclass
class Registry:
    """The entries of one hook, e.g. all routers.

    Attributes:
        kind: Singular noun for messages, e.g. "router".
        contract: Checked when an entry is first resolved.
        disabled: Which disabled plugin registers a name, by name, as far as is known.
    """

    kind: str
    contract: Contract
    disabled: Mapping[str, str] = field(default_factory=dict)
    _entries: dict[str, Entry] = field(default_factory=dict)
    _resolved: dict[str, Any] = field(default_factory=dict)
    _failures: tuple[str, ...] = ()
    _frozen: bool = False

    def add(self, entry: Entry) -> None:
        """Add an entry.

        Raises:
            PluginError: If frozen, or name, target, summary or source is malformed, or the name
                is taken; a clash names both origins.
        """
        where = f"Cannot register {self.kind} '{entry.name}' of {entry.origin}"
        if self._frozen:
            raise PluginError(f"{where}: registration has ended. Register in the hook only.")
        if not isinstance(entry.name, str) or not _NAME.fullmatch(entry.name):
            raise PluginError(
                f"{where}: expected a name of lower-case words joined by dashes. Rename it."
            )
        if entry.target is None or (
            isinstance(entry.target, str) and not _TARGET.fullmatch(entry.target)
        ):
            raise PluginError(
                f"{where}: expected an object or a 'module:attr' string as target, "
                f"got {entry.target!r}. Correct the target."
            )
        for label, text in (("summary", entry.summary), ("source", entry.source)):
            if not isinstance(text, str) or not text.strip() or "\n" in text:
                raise PluginError(f"{where}: expected one line as {label}, got {text!r}. Add it.")
        other = self._entries.get(entry.name)
        if other is not None:
            raise PluginError(
                f"{where}: the name is taken by {other.origin}. Rename one of the two, or leave "
                "one plugin out with MOLORA_LOAD_PLUGINS."
            )
        self._entries[entry.name] = replace(entry, kind=self.kind)

    def freeze(
        self, failures: Iterable[PluginError] = (), disabled: Mapping[str, str] | None = None
    ) -> None:
        """End registration.

        Args:
            failures: Errors of plugins that could not be loaded; listed in the error of an unknown
                name.
            disabled: Which disabled plugin registers a name; named in the error of that name.
        """
        self._failures = tuple(str(failure) for failure in failures)
        self.disabled = disabled or {}
        self._frozen = True

    def remove_origin(self, origin: str) -> None:
        """Forget all entries of one origin, after its plugin failed to load."""
        self._entries = {n: e for n, e in self._entries.items() if e.origin != origin}

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def entry(self, name: str) -> Entry:
        """The entry of a name.

        Raises:
            UnknownNameError: If nobody registered it; lists near names.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(
                self.kind, name, self._entries, self._failures, self.disabled.get(name, "")
            ) from None

    def resolve(self, name: str) -> Any:
        """The target of a name, imported and checked against the contract on first use.

        Raises:
            UnknownNameError: If nobody registered it.
            PluginError: If the import fails or the target breaks the contract.
        """
        if name in self._resolved:
            return self._resolved[name]
        entry = self.entry(name)
        where = f"Cannot use {self.kind} '{name}' of {entry.origin}"
        target = entry.target
        if isinstance(target, str):
            module_name, _, path = target.partition(":")
            try:
                target = importlib.import_module(module_name)
                for part in path.split("."):
                    target = getattr(target, part)
            except (Exception, SystemExit) as error:
                raise PluginError(
                    f"{where}: importing '{entry.target}' failed with "
                    f"{type(error).__name__}: {error}. Correct or uninstall the plugin."
                ) from error
        try:
            problem = self.contract(target) or _check_name(target, name)
        except Exception as error:  # attributes of a stranger's class may be properties that raise
            problem = f"looking at it failed with {type(error).__name__}: {error}"
        if problem is not None:
            raise PluginError(f"{where}: {problem}. Correct or uninstall the plugin.")
        self._resolved[name] = target
        return target

    def __iter__(self) -> Iterator[Entry]:
        return (self._entries[name] for name in self.names())


hookimpl = pluggy.HookimplMarker(GROUP)
"""Marks a function of a plugin as the implementation of the hook of the same name."""


@dataclass
class Plugins:
    """All registered things, one registry per hook.

    Attributes:
        failures: Plugins that could not be loaded, each with its one-line reason.
        found: All plugins that are there, in the order of loading.
    """

    routers: Registry = field(default_factory=lambda: Registry("router", check_router))
    gain_predictors: Registry = field(
        default_factory=lambda: Registry("gain predictor", check_callable)
    )
    admission_checks: Registry = field(
        default_factory=lambda: Registry("admission check", check_callable)
    )
    domains: Registry = field(default_factory=lambda: Registry("domain", check_callable))
    adapter_kinds: Registry = field(
        default_factory=lambda: Registry("adapter kind", check_adapter_kind)
    )
    carried_files: Registry = field(
        default_factory=lambda: Registry("carried file", check_callable)
    )
    merges: Registry = field(default_factory=lambda: Registry("merge", check_callable))
    adapter_routers: Registry = field(
        default_factory=lambda: Registry("adapter router", check_adapter_router)
    )
    fitness_scopes: Registry = field(
        default_factory=lambda: Registry("fitness scope", check_callable)
    )
    lifecycle_operators: Registry = field(
        default_factory=lambda: Registry("lifecycle operator", check_operator)
    )
    extractors: Registry = field(default_factory=lambda: Registry("extractor", check_function))
    judges: Registry = field(default_factory=lambda: Registry("judge", check_callable))
    escalation_policies: Registry = field(
        default_factory=lambda: Registry("escalation policy", check_policy)
    )
    task_families: Registry = field(default_factory=lambda: Registry("task family", check_function))
    commands: Registry = field(default_factory=lambda: Registry("command", check_function))
    failures: list[PluginError] = field(default_factory=list)
    found: list[FoundPlugin] = field(default_factory=list)

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
        _check_hooks(manager, module)
        implemented = {caller.name for caller in manager.get_hookcallers(module) or []}
        # A subset caller per plugin: `register` must know the origin, which pluggy does not pass.
        others = [p for p in manager.get_plugins() if p is not module]
        for suffix, registry in plugins.registries().items():
            hook = f"register_{suffix}"
            if hook in implemented:
                caller = manager.subset_hook_caller(hook, remove_plugins=others)
                caller(register=build_register(registry, origin))
    except (Exception, SystemExit) as error:
        if manager.is_registered(module):
            manager.unregister(module)
        for registry in plugins.registries().values():
            registry.remove_origin(origin)
        raise describe_failure(error, origin) from error


def _check_hooks(manager: pluggy.PluginManager, module: Any) -> None:
    """Refuse a plugin that implements no hook, or one that there is not.

    Raises:
        PluginError: Naming near hooks.
    """
    callers = manager.get_hookcallers(module) or []
    hooks = sorted(name for name in vars(hookspecs) if name.startswith("register_"))
    if not callers:
        unmarked = [name for name in hooks if callable(getattr(module, name, None))]
        got = f"{', '.join(unmarked)} without it" if unmarked else "none"
        raise PluginError(
            f"expected a function with @hookimpl, such as register_routers, got {got}"
        )
    for caller in callers:
        if caller.name not in hooks and not all(
            one.optionalhook for one in caller.get_hookimpls() if one.plugin is module
        ):
            near = get_close_matches(caller.name, hooks, n=2, cutoff=0.6) or hooks
            raise PluginError(
                f"unknown hook '{caller.name}': expected one such as {', '.join(near)}; or mark "
                "it with @hookimpl(optionalhook=True) if another version of molora-fed has it"
            )


def load_plugins(extra: Iterable[tuple[str, Any]] = ()) -> Plugins:
    """Load all installed plugins and those of `MOLORA_PLUGINS`, then freeze every registry.

    A plugin that fails is left out whole and listed in `Plugins.failures`; a failure of the core's
    or the command line's own registration is an error.

    Args:
        extra: Further plugins as (origin, module or object); a failure of one of these raises.

    Returns:
        A fresh `Plugins`.

    Raises:
        PluginError: If the core, the command line, a file or an `extra` plugin cannot be loaded.
        ConfigError: If it cannot be read what the user disabled.
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    if os.environ.get("MOLORA_TRACE_HOOKS"):
        manager.trace.root.setwriter(lambda text: print(text, end="", file=sys.stderr))
        manager.enable_tracing()
    plugins = Plugins()
    for point, found in survey(entry_points(group=GROUP)):
        if found.state == "enabled":
            try:
                module = import_entry_point(point, found.origin)
                _load_one(manager, plugins, module, found.origin)
            except PluginError as error:
                if found.is_built_in:
                    raise
                plugins.failures.append(error)
                found = replace(found, state="failed", reason=str(error))
        plugins.found.append(found)
    files = ((file.origin, file.load()) for file in list_plugin_files())
    for origin, module in (*files, *extra):
        _load_one(manager, plugins, module, origin)
        plugins.found.append(FoundPlugin(origin.partition(" ")[0], origin))
    disabled = [one.name for one in plugins.found if one.state == "disabled"]
    for registry in plugins.registries().values():
        registry.freeze(plugins.failures, find_plugin_names(registry.kind, disabled))
    return plugins


def find_entry_points(group: str) -> Iterator[tuple[EntryPoint, str]]:
    """Entry points of a group that are to be loaded, each with its origin for people.

    Left out is what `MOLORA_LOAD_PLUGINS` does not name, or without it what the user disabled.

    Args:
        group: Entry-point group, e.g. "molora_fed".

    Raises:
        ConfigError: If it cannot be read what the user disabled.
    """
    for point, found in survey(entry_points(group=group)):
        if found.state == "enabled":
            yield point, found.origin


@cache
def get_plugins() -> Plugins:
    """The installed plugins of this process, loaded once.

    Pass a `Plugins` explicitly wherever a function takes one; this is the default for the
    command line. Tests call `load_plugins()` for a fresh set.
    """
    return load_plugins()
