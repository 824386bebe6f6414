"""Finds studies: entry-point group `molora_studies`, one module a distribution or paper.

Such a module has a function `register_studies(register)`; `register` is called as in every hook of
molora_fed: `register(name, target, *, summary, source)`, `target` a `Study` or a "module:attr"
string that is imported on first use only.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from molora_fed.errors import PluginError
from molora_fed.plugins import (
    Registry,
    build_register,
    describe_failure,
    find_entry_points,
    import_entry_point,
)

__all__ = ["GROUP", "Studies", "check_study", "get_studies", "load_studies"]

GROUP = "molora_studies"


def check_study(target: Any) -> str | None:
    """Return an error description of a study class, or None."""
    if not inspect.isclass(target):
        return f"expected a class, got {type(target).__name__}"
    missing = [n for n in ("plan", "summarise") if not callable(getattr(target, n, None))]
    if missing:
        return f"expected the class methods {', '.join(missing)}, got none of these"
    options = getattr(target, "Options", None)
    if not inspect.isclass(options) or not hasattr(options, "model_validate"):
        return "expected a pydantic model as attribute 'Options'"
    return None


@dataclass(frozen=True)
class Studies:
    """All registered studies.

    Attributes:
        registry: The studies by name.
        failures: Modules whose studies could not be registered, each with its one-line reason.
    """

    registry: Registry = field(default_factory=lambda: Registry("study", check_study))
    failures: list[PluginError] = field(default_factory=list)


def load_studies(extra: Iterable[tuple[str, Any]] = ()) -> Studies:
    """Load the studies of all installed distributions, then end registration.

    A module that fails is left out whole and listed in `Studies.failures`. `MOLORA_LOAD_PLUGINS`
    restricts these entry points by name, as it does plugins.

    Args:
        extra: Further modules as (origin, module), for tests; a failure of one of these raises.

    Raises:
        PluginError: If an `extra` module fails.
    """
    studies = Studies()
    for point, origin in find_entry_points(GROUP):
        try:
            _load_one(studies, import_entry_point(point, origin), origin)
        except PluginError as error:
            studies.failures.append(error)
    for origin, module in extra:
        _load_one(studies, module, origin)
    studies.registry.freeze()
    return studies


def _load_one(studies: Studies, module: Any, origin: str) -> None:
    try:
        module.register_studies(build_register(studies.registry, origin))
    except Exception as error:
        studies.registry.remove_origin(origin)
        raise describe_failure(error, origin) from error


@cache
def get_studies() -> Studies:
    """The installed studies of this process, loaded once."""
    return load_studies()
