"""Opening a model from its folder, whatever it is: fused, evolved, a specialist or a base."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from molora_fed.adapters.files import CONFIG_FILE as ADAPTER_CONFIG_FILE
from molora_fed.adapters.files import load_adapter
from molora_fed.errors import ConfigError
from molora_fed.inference.engines import Model, PlainModel
from molora_fed.models.base import Base, load_base
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.population.bundle import find_evolved, load_evolved
from molora_fed.routing.bundle import find_fused, has_fused, load_fused

__all__ = ["ModelKind", "open_model"]

ModelKind = Literal["fused", "evolved", "specialist", "base"]


@dataclass(frozen=True)
class _Opener:
    """How models of one kind are found, opened and made.

    Attributes:
        find: Where in a folder there is one; None if there is none.
        load: Opens it, with the folder of its base where that is not beside it.
        command: What makes one.
    """

    find: Callable[[Path], Path | None]
    load: Callable[[Path, Path | None, Plugins], Model]
    command: str


def _find_fused(folder: Path) -> Path | None:
    return find_fused(folder) if has_fused(folder) else None


def _load_fused(folder: Path, base_folder: Path | None, plugins: Plugins) -> Model:
    return load_fused(folder, base_folder=base_folder, plugins=plugins)


def _load_evolved(folder: Path, base_folder: Path | None, plugins: Plugins) -> Model:
    return load_evolved(folder, base_folder=base_folder, plugins=plugins)


def _find_adapter(folder: Path) -> Path | None:
    for inner in (folder / "adapter", folder):
        if (inner / ADAPTER_CONFIG_FILE).is_file():
            return inner
    return None


def _load_specialist(folder: Path, base_folder: Path | None, plugins: Plugins) -> Model:
    if base_folder is None:
        raise ConfigError(
            f"Cannot open the specialist in '{folder}': expected the folder of its base, got none. "
            "Say where the base is."
        )
    return PlainModel(_load_base(base_folder), load_adapter(folder, plugins=plugins))


def _find_base(folder: Path) -> Path | None:
    """A checkpoint, or that of a cooperative."""
    for inner in (folder, folder / "base"):
        if (inner / "config.json").is_file():
            return inner
    return None


def _load_base(folder: Path) -> Base:
    return load_base(_find_base(folder) or folder)


_OPENERS: dict[ModelKind, _Opener] = {
    "fused": _Opener(_find_fused, _load_fused, "molora fuse"),
    "evolved": _Opener(find_evolved, _load_evolved, "molora evolve"),
    "specialist": _Opener(_find_adapter, _load_specialist, "molora train"),
    "base": _Opener(
        _find_base, lambda folder, *_: PlainModel(_load_base(folder)), "molora coop create"
    ),
}


def open_model(
    folder: Path,
    *,
    kinds: Sequence[ModelKind] = ("fused", "evolved", "specialist", "base"),
    base_folder: Path | None = None,
    plugins: Plugins | None = None,
) -> Model:
    """Open the model in a folder: its own, a cooperative's, a contributor's home or a run's.

    Args:
        folder: Where it is.
        kinds: What is accepted; of several models in one folder, the first kind here is opened.
        base_folder: Where its base is; the recorded relative path if None, which a specialist
            does not have.
        plugins: Where routers and adapter kinds are registered; the installed ones if None.

    Raises:
        ConfigError: If there is no model of these kinds, or a specialist's base is not named.
        MoloraError: Whatever loading it refuses.
    """
    for kind in kinds:
        opener = _OPENERS[kind]
        found = opener.find(folder)
        if found is not None:
            return opener.load(found, base_folder, plugins or get_plugins())
    commands = " or ".join(f"`{_OPENERS[kind].command}`" for kind in kinds)
    raise ConfigError(
        f"Cannot open a model in '{folder}': expected one of {', '.join(kinds)}, got none. "
        f"Make one with {commands}."
    )
