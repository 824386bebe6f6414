"""One table of registered things per hook: names checked at load, targets resolved on first use."""

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from molora_fed.errors import PluginError, UnknownNameError

__all__ = ["Contract", "Entry", "Registry"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

Contract = Callable[[Any], str | None]
"""Says what is wrong with a resolved target, or None."""


@dataclass(frozen=True)
class Entry:
    """One registered thing.

    Attributes:
        name: Unique within its registry.
        target: The object, or a "module:attr" string.
        summary: One line for people.
        source: Citation.
        origin: Distribution and version that registered it.
    """

    name: str
    target: object
    summary: str
    source: str
    origin: str


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
        self._entries[entry.name] = entry

    def freeze(self) -> None:
        """End registration."""
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
            raise UnknownNameError(self.kind, name, self._entries) from None

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
            except Exception as error:
                raise PluginError(
                    f"{where}: importing '{entry.target}' failed with "
                    f"{type(error).__name__}: {error}. Correct or uninstall the plugin."
                ) from error
        problem = self.contract(target)
        if problem is not None:
            raise PluginError(f"{where}: {problem}. Correct or uninstall the plugin.")
        self._resolved[name] = target
        return target

    def __iter__(self) -> Iterator[Entry]:
        return (self._entries[name] for name in self.names())
