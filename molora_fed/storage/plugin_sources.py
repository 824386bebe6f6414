"""Where plugins come from, in which order they load, and which of them the user left out.

Installed ones have entry points; `MOLORA_PLUGINS` names files of one plugin each. The file
`plugins.toml` in the user's folder of settings holds what `molora plugins disable` wrote.
"""

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import tomli_w

from molora_fed.errors import ConfigError, PluginError
from molora_fed.storage.files import hash_file, write_bytes
from molora_fed.storage.toml import parse_toml
from molora_fed.storage.values import find_settings_folder

__all__ = [
    "BUILT_IN",
    "DISTRIBUTION",
    "FILES",
    "FILE_SUFFIX",
    "LOAD",
    "DisabledPlugin",
    "FoundPlugin",
    "PluginFile",
    "describe_failure",
    "find_plugin_file",
    "find_plugin_names",
    "import_entry_point",
    "list_plugin_files",
    "read_disabled",
    "survey",
    "write_disabled",
]

DISTRIBUTION = "molora-fed"
"""The core's own distribution: its plugins load before any other's."""
BUILT_IN = ("molora_fed.builtin", "molora_cli.commands")
"""Entry points that are always loaded, and first, by the module they name."""

LOAD = "MOLORA_LOAD_PLUGINS"
"""Variable with the names of the only plugins to load, whatever is disabled."""
FILES = "MOLORA_PLUGINS"
"""Variable with the paths of one-file plugins; processes that molora starts have it, too."""
_MAX_BYTES = 1_000_000
FILE_SUFFIX = " (file)"
"""What the origin of a one-file plugin ends with."""
_HEADER = "# Written by `molora plugins disable` and `enable`.\n\n"


@dataclass(frozen=True)
class FoundPlugin:
    """A plugin that is there, loaded or not.

    Attributes:
        name: Of its entry point, or of its file without the ending.
        origin: Plugin, distribution and version, for people.
        distribution: Name of the distribution; empty for a file.
        version: Of the distribution; empty for a file.
        state: What came of it.
        reason: Why it is not enabled, or what enables it.
        is_built_in: Whether the core or the command line is nothing without it.
    """

    name: str
    origin: str
    distribution: str = ""
    version: str = ""
    state: Literal["enabled", "disabled", "failed"] = "enabled"
    reason: str = ""
    is_built_in: bool = False


def survey(points: Iterable[EntryPoint]) -> Iterator[tuple[EntryPoint, FoundPlugin]]:
    """Entry points in the order in which they load, and whether they are to be loaded.

    Left out is what `MOLORA_LOAD_PLUGINS` does not name, or without it what the user disabled.

    Args:
        points: All of a group.

    Raises:
        ConfigError: If it cannot be read what the user disabled.
    """
    wanted = os.environ.get(LOAD)
    names = None if wanted is None else {n.strip() for n in wanted.split(",") if n.strip()}
    disabled = read_disabled() if names is None else {}
    for point in sorted(points, key=_load_order):
        distribution = point.dist.name if point.dist else "?"
        version = point.dist.version if point.dist else "?"
        is_built_in = point.value in BUILT_IN and _is_own(point)
        reason = ""
        if is_built_in:
            pass
        elif names is not None and point.name not in names:
            reason = f"{LOAD} does not name it"
        elif point.name in disabled:
            reason = f"enable it with `molora plugins enable {point.name}`"
        yield (
            point,
            FoundPlugin(
                point.name,
                f"{point.name} ({distribution} {version})",
                distribution,
                version,
                "disabled" if reason else "enabled",
                reason,
                is_built_in,
            ),
        )


def _is_own(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == DISTRIBUTION


def _load_order(point: EntryPoint) -> tuple[int, str, str]:
    """The core's own distribution first, then by name.

    So a clash is reported alike on every machine, and the newcomer is the one that is left out.
    """
    if point.value in BUILT_IN and _is_own(point):
        place = BUILT_IN.index(point.value)
    else:
        place = len(BUILT_IN) + (not _is_own(point))
    return (place, point.name, point.value)


@dataclass(frozen=True)
class DisabledPlugin:
    """An installed plugin that is not loaded.

    Attributes:
        origin: Plugin, distribution and version when it was disabled, for people.
        registers: Names it registered then, by kind, e.g. {"router": ("mine",)}.
    """

    origin: str
    registers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_disabled() -> dict[str, DisabledPlugin]:
    """The plugins that the user disabled, by the name of their entry point.

    Raises:
        ConfigError: If the file cannot be read or is malformed.
    """
    path = find_settings_folder() / "plugins.toml"
    try:
        if not path.exists():
            return {}
        raw = parse_toml(path.read_text(encoding="utf-8"), max_bytes=_MAX_BYTES)
        return {
            name: DisabledPlugin(
                str(one["origin"]),
                {kind: tuple(map(str, names)) for kind, names in one["registers"].items()},
            )
            for name, one in raw.get("disabled", {}).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"Cannot read the disabled plugins in '{path}': expected what `molora plugins "
            f"disable` wrote, got {type(error).__name__}: {error}. Correct or delete the file."
        ) from error


def write_disabled(disabled: Mapping[str, DisabledPlugin]) -> Path:
    """Keep which plugins are disabled, whole or not at all.

    Args:
        disabled: By the name of their entry point.

    Returns:
        The file.

    Raises:
        StorageError: On I/O errors.
    """
    path = find_settings_folder() / "plugins.toml"
    content = {
        "disabled": {
            name: {
                "origin": one.origin,
                "registers": {kind: list(names) for kind, names in sorted(one.registers.items())},
            }
            for name, one in sorted(disabled.items())
        }
    }
    write_bytes(path, (_HEADER + tomli_w.dumps(content)).encode())
    return path


@dataclass(frozen=True)
class PluginFile:
    """A plugin that is one file.

    Attributes:
        path: Absolute.
    """

    path: Path

    @property
    def name(self) -> str:
        """The file's name, which charters pin it by."""
        return self.path.name

    @property
    def origin(self) -> str:
        """What messages call it, e.g. "my_router.py (file)"."""
        return f"{self.name}{FILE_SUFFIX}"

    def hash(self) -> str:
        """SHA-256 of the file, lower-case hex.

        Raises:
            PluginError: If it cannot be read.
        """
        try:
            return hash_file(self.path)
        except OSError as error:
            raise _refuse(self.path, "a readable file", f"{error.strerror}", "Check it") from error

    def _is_at(self, place: str | None) -> bool:
        return place is not None and Path(place).is_file() and self.path.samefile(place)

    def load(self) -> ModuleType:
        """Import the file, as a module that "module:attr" strings in it can name.

        Raises:
            PluginError: If it raises, or its name is another module's.
        """
        name = self.path.stem
        loaded = sys.modules.get(name)
        if loaded is not None and self._is_at(getattr(loaded, "__file__", None)):
            return loaded
        found = None if loaded is not None else importlib.util.find_spec(name)
        if loaded is not None or (found is not None and not self._is_at(found.origin)):
            raise _refuse(
                self.path, "a name that no module has", f"that of {name}", "Rename the file"
            )
        spec = importlib.util.spec_from_file_location(name, self.path)
        assert spec is not None and spec.loader is not None  # its name ends with .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            got = " ".join(f"{type(error).__name__}: {error}".split())
            where = _find_line(error, self.path)
            raise _refuse(
                self.path, "a file that can be imported", f"{got}{where}", "Correct it"
            ) from error
        return module


def list_plugin_files() -> list[PluginFile]:
    """The one-file plugins of this process, in the order in which `MOLORA_PLUGINS` names them.

    Raises:
        PluginError: If one is no file of Python code, or two have one name.
    """
    given = [text for text in os.environ.get(FILES, "").split(os.pathsep) if text]
    files = list(dict.fromkeys(map(find_plugin_file, given)))
    names = [file.name for file in files]
    for file in files:
        if names.count(file.name) > 1:
            raise _refuse(
                file.path, "files of different names", "two of one name", "Rename one of them"
            )
    return files


def find_plugin_file(given: str) -> PluginFile:
    """The plugin in a file.

    Args:
        given: Path of a file whose name is that of a Python module.

    Raises:
        PluginError: If there is no such file, or it is a folder or something else.
    """
    path = Path(os.path.abspath(Path(given).expanduser()))
    if path.is_dir():
        advice = "Name the file that has the hooks"
        if any((path / name).is_file() for name in ("pyproject.toml", "setup.py", "setup.cfg")):
            advice = f"Install the package with `pip install -e {given}`"
        raise _refuse(path, "one file", "a folder", advice)
    if not path.is_file():
        raise _refuse(path, "a file", "nothing there", "Check the path")
    if path.suffix != ".py" or not (path.stem.isidentifier() and path.stem.isascii()):
        raise _refuse(
            path,
            "a file named like a module, such as my_router.py",
            path.name,
            "Rename it",
        )
    return PluginFile(path)


def _refuse(path: Path, expected: str, got: str, advice: str) -> PluginError:
    return PluginError(
        f"Cannot load the plugin '{path}': expected {expected}, got {got.rstrip('.')}. {advice}."
    )


def _find_line(error: BaseException, path: Path) -> str:
    """The file's own line that raised, for the message."""
    lines = []
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            lines.append(traceback.tb_lineno)
        traceback = traceback.tb_next
    if isinstance(error, SyntaxError):  # its text names the line
        return ""
    return f", at {path.name}:{lines[-1]}" if lines else ""


def find_plugin_names(kind: str, plugins: Iterable[str]) -> dict[str, str]:
    """Which disabled plugin registers a name, by name, as far as is known.

    Args:
        kind: Noun of the registry, e.g. "router".
        plugins: Names of installed plugins that are disabled.
    """
    if LOAD in os.environ:  # enabling one would not load it
        return {}
    kept, names = read_disabled(), set(plugins)
    return {
        name: plugin
        for plugin, one in kept.items()
        if plugin in names
        for name in one.registers.get(kind, ())
    }


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
    is_file = origin.endswith(FILE_SUFFIX)
    advice = "Correct it." if is_file else f"Correct or uninstall it, or leave it out with {LOAD}."
    return PluginError(f"Cannot load plugin {origin}: {text} {advice}")
