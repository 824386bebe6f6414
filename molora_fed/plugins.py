"""Finds, loads and freezes plugins; the result is a `Plugins` object, never a module global.

`MOLORA_LOAD_PLUGINS=a,b` restricts loading to the entry points named a and b (the core and
the command line are always loaded); `MOLORA_TRACE_HOOKS=1` prints every hook call to standard
error.
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from molora_fed import hookspecs
from molora_fed.errors import PluginError, UnknownNameError
from molora_fed.hookspecs import GROUP, Register

__all__ = [
    "DISTRIBUTION",
    "Contract",
    "Entry",
    "Plugins",
    "Registry",
    "build_register",
    "check_adapter_kind",
    "check_adapter_router",
    "check_callable",
    "check_function",
    "check_operator",
    "check_policy",
    "check_router",
    "describe_failure",
    "find_entry_points",
    "get_plugins",
    "hookimpl",
    "import_entry_point",
    "load_plugins",
]


_ROUTER_METHODS = (
    "reads", "fit", "scores", "gates", "init_state", "step", "reorder", "state_tensors",
)  # fmt: skip
_KIND_METHODS = ("prepare", "export", "load")


def check_callable(target: Any) -> str | None:
    """Describe why a function, or a class with options that is called once made, cannot be used.

    See `molora_fed.options.Configurable`; None if it can.
    """
    if not inspect.isclass(target):
        return check_function(target)
    # Not by `callable`: every class can be called itself.
    if not any("__call__" in vars(base) for base in target.__mro__):
        return "expected a class whose instances can be called, got one without '__call__'"
    return _check_class(target, ())


def check_function(target: Any) -> str | None:
    """Describe why a target cannot be called, or return None."""
    return None if callable(target) else f"expected a callable, got {type(target).__name__}"


def check_router(target: Any) -> str | None:
    """Describe what a router class lacks, or return None."""
    return _check_class(target, _ROUTER_METHODS)


def check_adapter_kind(target: Any) -> str | None:
    """Describe what an adapter kind lacks, or return None."""
    problem = _check_methods(target, _KIND_METHODS)
    if problem is None and not isinstance(getattr(target, "narrow_learning_rate", None), float):
        return "expected the class attribute 'narrow_learning_rate', a float, got none"
    return problem


def check_adapter_router(target: Any) -> str | None:
    """Describe what an adapter router class lacks, or return None."""
    return _check_class(target, ("build", "reads", "forward", "set_progress", "reset_slot"))


def check_operator(target: Any) -> str | None:
    """Describe what a lifecycle operator class lacks, or return None."""
    return _check_class(target, ("apply",))


def check_policy(target: Any) -> str | None:
    """Describe what an escalation policy class lacks, or return None."""
    return _check_class(target, ("choose",))


def _check_methods(target: Any, methods: tuple[str, ...]) -> str | None:
    if not inspect.isclass(target):
        return f"expected a class, got {type(target).__name__}"
    missing = [name for name in methods if not callable(getattr(target, name, None))]
    if missing:
        return f"expected the methods {', '.join(methods)}, got none named {', '.join(missing)}"
    if inspect.isabstract(target):
        abstract = ", ".join(sorted(getattr(target, "__abstractmethods__", ())))
        return f"expected a class without abstract methods, got {abstract}"
    return None


def _check_class(target: Any, methods: tuple[str, ...]) -> str | None:
    """The same for a class with options."""
    problem = _check_methods(target, methods)
    if problem is not None:
        return problem
    options = getattr(target, "Options", None)
    if not inspect.isclass(options) or not hasattr(options, "model_validate"):
        return "expected a pydantic model as attribute 'Options'"
    if getattr(options, "model_config", {}).get("extra") != "forbid":
        return "expected 'Options' to refuse unknown keys (extra='forbid')"
    return None


def _check_name(target: Any, name: str) -> str | None:
    """A class that says its own name says the registered one."""
    own = getattr(target, "name", "") if inspect.isclass(target) else ""
    if not isinstance(own, str) or own in ("", name):
        return None
    return f"expected the class attribute name = '{name}' as it is registered, got '{own}'"


DISTRIBUTION = "molora-fed"
"""The core's own distribution: its plugins load before any other's."""

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
    def is_own(self) -> bool:
        """Whether the core's own distribution registered it."""
        return self.distribution == DISTRIBUTION


@dataclass
class Registry:
    """The entries of one hook, e.g. all routers.

    Attributes:
        kind: Singular noun for messages, e.g. "router".
        contract: Checked when an entry is first resolved.
    """

    kind: str
    contract: Contract
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

    def freeze(self, failures: Iterable[PluginError] = ()) -> None:
        """End registration.

        Args:
            failures: Errors of plugins that could not be loaded; listed in the error of an unknown
                name.
        """
        self._failures = tuple(str(failure) for failure in failures)
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
            raise UnknownNameError(self.kind, name, self._entries, self._failures) from None

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

BUILT_IN = ("molora_fed.builtin", "molora_cli.commands")
"""Entry points that are always loaded, and first, by the module they name."""


@dataclass
class Plugins:
    """All registered things, one registry per hook.

    Attributes:
        failures: Plugins that could not be loaded, each with its one-line reason.
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
    judges: Registry = field(default_factory=lambda: Registry("judge", check_function))
    escalation_policies: Registry = field(
        default_factory=lambda: Registry("escalation policy", check_policy)
    )
    task_families: Registry = field(default_factory=lambda: Registry("task family", check_function))
    commands: Registry = field(default_factory=lambda: Registry("command", check_function))
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
    except (Exception, SystemExit) as error:
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
            if _is_built_in(point):
                raise
            plugins.failures.append(error)
    for origin, module in extra:
        _load_one(manager, plugins, module, origin)
    for registry in plugins.registries().values():
        registry.freeze(plugins.failures)
    return plugins


def find_entry_points(group: str) -> Iterator[tuple[EntryPoint, str]]:
    """Entry points of a group that `MOLORA_LOAD_PLUGINS` allows, each with its origin for people.

    Args:
        group: Entry-point group, e.g. "molora_fed".
    """
    wanted = os.environ.get("MOLORA_LOAD_PLUGINS")
    names = None if wanted is None else {n.strip() for n in wanted.split(",") if n.strip()}
    for point in sorted(entry_points(group=group), key=_load_order):
        if names is None or point.name in names or _is_built_in(point):
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
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"Cannot load plugin {origin}: importing '{point.value}' failed with "
            f"{type(error).__name__}: {error}. Correct or uninstall it, or leave it out "
            "with MOLORA_LOAD_PLUGINS."
        ) from error


def describe_failure(error: BaseException, origin: str) -> PluginError:
    """The error of a plugin whose registration failed, in one line."""
    reason = error.args[0] if error.args else type(error).__name__
    text = " ".join(str(reason).split()).rstrip(".") + "."
    return PluginError(
        f"Cannot load plugin {origin}: {text} Correct or uninstall it, or leave it out with "
        "MOLORA_LOAD_PLUGINS."
    )


def _is_own(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == DISTRIBUTION


def _is_built_in(point: EntryPoint) -> bool:
    return point.value in BUILT_IN and _is_own(point)


def _load_order(point: EntryPoint) -> tuple[int, str, str]:
    """The core's own distribution first, then by name.

    So a clash is reported alike on every machine, and the newcomer is the one that is left out.
    """
    if _is_built_in(point):
        place = BUILT_IN.index(point.value)
    else:
        place = len(BUILT_IN) + (not _is_own(point))
    return (place, point.name, point.value)


@cache
def get_plugins() -> Plugins:
    """The installed plugins of this process, loaded once.

    Pass a `Plugins` explicitly wherever a function takes one; this is the default for the
    command line. Tests call `load_plugins()` for a fresh set.
    """
    return load_plugins()
