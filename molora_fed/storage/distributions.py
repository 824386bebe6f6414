"""What of a distribution is installed here: its version, and one hash over its files.

The hash is alike wherever the same code lies, however it was installed: it is over the files of the
distribution's packages and over its entry points, not over what installers and build tools write.
"""

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from molora_fed.errors import PluginError
from molora_fed.storage.files import canonical_json, hash_bytes, hash_file

__all__ = ["Installed", "find_documentation", "find_installed"]

MAX_FILES = 10_000
MAX_BYTES = 2**29
"""Of one distribution that is hashed."""
_LEFT_OUT = (".pyc", ".pyo")


@dataclass(frozen=True)
class Installed:
    """A distribution that is installed here.

    Attributes:
        name: As its metadata has it.
        version: Likewise.
    """

    name: str
    version: str

    def hash(self) -> str:
        """SHA-256 over its files, lower-case hex; computed once a process.

        Raises:
            PluginError: If files are missing, or there are too many.
        """
        return _hash_distribution(self.name)


def find_installed(name: str) -> Installed | None:
    """The distribution of a name, however it is spelled; None if there is none.

    Args:
        name: Of the distribution, e.g. "molora-mine".
    """
    try:
        found = distribution(name)
    except (PackageNotFoundError, ValueError):
        return None
    return Installed(found.name, found.version)


def find_documentation(name: str) -> str | None:
    """Address of a distribution's documentation, or of its home page, if it states one.

    Args:
        name: Of the distribution.
    """
    try:
        metadata = distribution(name).metadata
    except (PackageNotFoundError, ValueError):
        return None
    pairs = [text.partition(",") for text in metadata.get_all("Project-URL") or ()]
    known = {label.strip().lower(): address.strip() for label, _, address in pairs}
    for label in ("documentation", "docs", "readme", "homepage", "source", "repository"):
        if known.get(label):
            return known[label]
    home = metadata.get_all("Home-page") or ()
    return str(home[0]) if home and home[0] != "UNKNOWN" else None


@cache
def _hash_distribution(name: str) -> str:
    found = distribution(name)
    hashes: dict[str, str] = {}
    total = 0
    for relative, path in _list_files(found):
        try:
            total += path.stat().st_size
            if len(hashes) >= MAX_FILES or total > MAX_BYTES:
                raise _refuse(found, f"at most {MAX_FILES} files and {MAX_BYTES} bytes", "more")
            hashes[relative] = hash_file(path)
        except OSError as error:
            raise _refuse(found, f"the file {relative}", error.strerror) from error
    if not hashes:
        raise _refuse(found, "files of its packages", "none")
    points = sorted([point.group, point.name, point.value] for point in found.entry_points)
    return hash_bytes(canonical_json([sorted(hashes.items()), points]))


def _refuse(found: Distribution, expected: str, got: str | None) -> PluginError:
    return PluginError(
        f"Cannot hash the plugin {found.name} {found.version}: expected {expected}, got "
        f"{got or 'an unreadable one'}. Install it again."
    )


def _list_files(found: Distribution) -> Iterator[tuple[str, Path]]:
    """Files of a distribution's packages: path below the folder of packages, and where it lies."""
    recorded = [] if _is_editable(found) else list(found.files or ())
    code = [
        each
        for each in recorded
        # Outside of the folder of packages lie scripts, which name this machine's interpreter.
        if ".." not in each.parts
        and not each.is_absolute()
        and not each.parts[0].endswith((".dist-info", ".egg-info", ".data"))
        and each.suffix not in _LEFT_OUT
    ]
    if code:
        for each in code:
            yield each.as_posix(), Path(str(each.locate()))
    else:
        for module in _list_modules(found):
            yield from _walk_module(found, module)


def _is_editable(found: Distribution) -> bool:
    """Whether its record lists no code, which lies elsewhere."""
    try:
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        return bool(origin.get("dir_info", {}).get("editable"))
    except (ValueError, AttributeError):
        return False


def _list_modules(found: Distribution) -> list[str]:
    """Names of a distribution's top-level modules."""
    named = (found.read_text("top_level.txt") or "").split()
    return sorted(named or {point.module.partition(".")[0] for point in found.entry_points})


def _walk_module(found: Distribution, module: str) -> Iterator[tuple[str, Path]]:
    """Files of a module or a package, in their order; nothing is imported."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise _refuse(found, f"the module {module}", "none")
    folders = sorted(spec.submodule_search_locations or ())
    if not folders and spec.origin is not None:
        yield Path(spec.origin).name, Path(spec.origin)
    for folder in map(Path, folders):
        for parent, names, files in os.walk(folder):
            names[:] = sorted(name for name in names if name != "__pycache__")
            for path in (Path(parent) / name for name in sorted(files)):
                if path.suffix not in _LEFT_OUT:
                    yield f"{module}/{path.relative_to(folder).as_posix()}", path
