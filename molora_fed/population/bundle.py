"""An evolved model as a folder that can be moved or sent, and says which base it is for.

The folder holds `evolved.json`, `router.safetensors` and `population/`.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from molora_fed.errors import PopulationError, describe_mismatch
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.population.contract import AdapterRouter, AdapterRouterOptions, Population
from molora_fed.population.evolution import POPULATION_FOLDER, ROUTER_FILE, Branch
from molora_fed.population.files import fingerprint_population, load_population, save_population
from molora_fed.population.router_files import load_router, pack_router
from molora_fed.population.slots import check_population
from molora_fed.routing.bundle import BaseEntry, describe_base, load_recorded_base
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import hash_bytes, hash_file, replace_folder, write_bytes, write_json
from molora_fed.storage.settings import read_model

__all__ = ["EvolvedModel", "find_evolved", "load_evolved", "save_evolved"]

MANIFEST_FILE = "evolved.json"
MAX_MANIFEST_BYTES = 1_000_000


class _Manifest(BaseModel):
    """Content of `evolved.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = Field(default=1, ge=1, le=1)
    base: BaseEntry
    router_name: str
    router: str = Field(pattern=r"^[0-9a-f]{64}$")
    population: str = Field(pattern=r"^[0-9a-f]{64}$")


@dataclass(frozen=True, eq=False)
class EvolvedModel:
    """A population inside its base.

    Attributes:
        base: The base checkpoint.
        population: The slots.
        router: Their router, on the model's device.
        router_name: The name it is registered under.
    """

    base: Base
    population: Population
    router: AdapterRouter
    router_name: str

    @property
    def slot_names(self) -> tuple[str, ...]:
        """Ids of the slots' adapters, in order."""
        return tuple(slot.birth.id for slot in self.population.slots)


def save_evolved(base: Base, branch: Branch, router_name: str, folder: Path) -> None:
    """Write an evolved model; its folder is replaced whole or not at all.

    Args:
        base: Its base.
        branch: The population and its router.
        router_name: The name the router is registered under.
        folder: Target.

    Raises:
        PopulationError: If the population cannot be written.
        StorageError: On I/O errors.
    """
    packed = pack_router(branch.router, router_name)
    with replace_folder(folder) as target:
        manifest = _Manifest(
            base=BaseEntry.model_validate(describe_base(base, folder)),
            router_name=router_name,
            router=hash_bytes(packed),
            population=save_population(branch.population, target / POPULATION_FOLDER),
        )
        write_bytes(target / ROUTER_FILE, packed)
        write_json(target / MANIFEST_FILE, manifest.model_dump(mode="json"))


def find_evolved(folder: Path) -> Path | None:
    """The evolved model in a folder: the folder itself or one in it; None if there is none."""
    for inner in (folder, folder / "evolved", folder / "evolution" / "evolved"):
        if (inner / MANIFEST_FILE).is_file():
            return inner
    return None


def load_evolved(
    folder: Path,
    *,
    base_folder: Path | None = None,
    compute: Compute | None = None,
    plugins: Plugins | None = None,
) -> EvolvedModel:
    """Read an evolved model whose sender is not trusted.

    Args:
        folder: Folder written by `save_evolved`, here or wherever it was moved to.
        base_folder: Where the base is; the recorded relative path if None.
        compute: Where to run, and in which dtype; the dtype it was made in where it says none.
        plugins: Where the router is registered; the installed ones if None.

    Raises:
        PopulationError: If a file is malformed, not the one recorded, or does not fit the base.
        AdapterError: If the population's files are malformed.
        BaseCheckpointError: If the base is not there, or is another one.
    """
    plugins = plugins or get_plugins()
    manifest = _read_manifest(folder)
    population = load_population(folder / POPULATION_FOLDER)
    router = load_router(folder / ROUTER_FILE, plugins)
    found = {
        "router": (hash_file(folder / ROUTER_FILE), manifest.router),
        "population": (fingerprint_population(population), manifest.population),
    }
    for what, (got, wanted) in found.items():
        if got != wanted:
            raise PopulationError(
                describe_mismatch(
                    f"Cannot load evolved model '{folder}', {what}",
                    expected=f"SHA-256 {wanted[:12]}",
                    got=got[:12],
                    fix="Copy the folder again, whole.",
                )
            )
    base = load_recorded_base(folder, manifest.base, base_folder, compute)
    check_population(population, base.model)
    _check_router(folder, router, population, base)
    return EvolvedModel(base, population, router.to(base.model.device).eval(), manifest.router_name)


def _check_router(folder: Path, router: AdapterRouter, population: Population, base: Base) -> None:
    """Refuse a router for other slots or other states than these."""
    options: AdapterRouterOptions = router.options
    widths = {
        "base_hidden": base.hidden_size,
        "embeddings": int(base.model.get_input_embeddings().weight.shape[1]),
    }
    read = {widths[reading] for reading in type(router).reads(options)}
    if router.num_slots != population.num_slots or not read <= {router.width}:
        raise PopulationError(
            f"Cannot load evolved model '{folder}': expected a router of {population.num_slots} "
            f"slots and width {sorted(read)}, got {router.num_slots} and {router.width}. "
            "Copy the folder again, whole."
        )


def _read_manifest(folder: Path) -> _Manifest:
    return read_model(
        folder / MANIFEST_FILE,
        _Manifest,
        what=f"Cannot load evolved model '{folder}'",
        error=PopulationError,
        fix="Evolve again, or copy the folder again.",
        max_bytes=MAX_MANIFEST_BYTES,
    )
