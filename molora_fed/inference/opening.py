"""Opening a model from its folder, whatever it is: fused, evolved, a specialist or a base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from molora_fed.adapters.files import CONFIG_FILE as ADAPTER_CONFIG_FILE
from molora_fed.adapters.files import check_adapter_fits, load_adapter
from molora_fed.adapters.updates import Adapter
from molora_fed.errors import ConfigError
from molora_fed.models.base import Base, load_base
from molora_fed.models.runtime import choose_placement
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.population.bundle import EvolvedModel, find_evolved, load_evolved
from molora_fed.routing.bundle import find_fused, has_fused, load_fused
from molora_fed.routing.fused import FusedModel
from molora_fed.storage.compute import Compute

__all__ = ["Model", "ModelKind", "PlainModel", "open_model"]


@dataclass(frozen=True, eq=False)
class PlainModel:
    """A base checkpoint, or a specialist of it.

    Attributes:
        base: The base, or any checkpoint loaded as one.
        adapter: What the specialist adds to it; None for the base itself.
    """

    base: Base
    adapter: Adapter | None = None


Model = PlainModel | FusedModel | EvolvedModel
"""Everything that writes text."""

ModelKind = Literal["fused", "evolved", "specialist", "base"]

_COMMANDS: dict[ModelKind, str] = {
    "fused": "molora fuse",
    "evolved": "molora evolve",
    "specialist": "molora train",
    "base": "molora coop create",
}


def open_model(
    folder: Path,
    *,
    kinds: Sequence[ModelKind] = ("fused", "evolved", "specialist", "base"),
    base_folder: Path | None = None,
    compute: Compute | None = None,
    plugins: Plugins | None = None,
) -> Model:
    """Open the model in a folder: its own, a cooperative's, a contributor's home or a run's.

    Args:
        folder: Where it is.
        kinds: What is accepted; of several models in one folder, the first kind here is opened.
        base_folder: Where its base is; the recorded relative path if None, which a specialist
            does not have.
        compute: Where to run, and in which dtype; if it says none, in the dtype it was made in.
        plugins: Where routers and adapter kinds are registered; the installed ones if None.

    Raises:
        ConfigError: If there is no model of these kinds, or a specialist's base is not named.
        MoloraError: Whatever loading it refuses.
    """
    plugins = plugins or get_plugins()
    for kind in kinds:
        found = _find(folder, kind)
        if found is not None:
            return _load(found, kind, base_folder, compute or Compute(), plugins)
    commands = " or ".join(f"`{_COMMANDS[kind]}`" for kind in kinds)
    raise ConfigError(
        f"Cannot open a model in '{folder}': expected one of {', '.join(kinds)}, got none. "
        f"Make one with {commands}."
    )


def _find(folder: Path, kind: ModelKind) -> Path | None:
    """Where in a folder there is a model of a kind."""
    match kind:
        case "fused":
            return find_fused(folder) if has_fused(folder) else None
        case "evolved":
            return find_evolved(folder)
        case "specialist":
            files = [inner / ADAPTER_CONFIG_FILE for inner in (folder / "adapter", folder)]
        case "base":
            files = [inner / "config.json" for inner in (folder, folder / "base")]
    return next((file.parent for file in files if file.is_file()), None)


def _load(
    folder: Path,
    kind: ModelKind,
    base_folder: Path | None,
    compute: Compute,
    plugins: Plugins,
) -> Model:
    match kind:
        case "fused":
            return load_fused(folder, base_folder=base_folder, compute=compute, plugins=plugins)
        case "evolved":
            return load_evolved(folder, base_folder=base_folder, compute=compute, plugins=plugins)
        case "base":
            return PlainModel(load_base(folder, choose_placement(compute)))
    if base_folder is None:
        raise ConfigError(
            f"Cannot open the specialist in '{folder}': expected the folder of its base, got none. "
            "Say where the base is."
        )
    base = load_base(_find(base_folder, "base") or base_folder, choose_placement(compute))
    adapter = load_adapter(folder, model=base.model, tokenizer=base.tokenizer, plugins=plugins)
    check_adapter_fits(adapter, base.model)
    return PlainModel(base, adapter)
