"""An adapter router by name, and as one safetensors file that is safe to read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from molora_fed.errors import MoloraError, PopulationError
from molora_fed.guard import guarded, refuse
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins
from molora_fed.population.contract import AdapterRouter, AdapterRouterOptions
from molora_fed.population.router_probes import check_built
from molora_fed.storage.files import canonical_json, write_bytes
from molora_fed.storage.settings import open_options

__all__ = ["load_router", "open_router", "pack_router", "parse_router_options", "save_router"]

MAX_ROUTER_BYTES = 256 * 2**20
_ENTRY = "router"


class _Card(BaseModel):
    """What a router's file says beside its tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = Field(default=1, ge=1, le=1)
    name: str
    options: dict[str, Any]
    num_slots: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=2**17)


def parse_router_options(
    name: str, options: Mapping[str, Any], plugins: Plugins
) -> tuple[type[AdapterRouter], AdapterRouterOptions]:
    """Find a registered adapter router and check its options.

    Raises:
        UnknownNameError: If no plugin registers it.
        PopulationError: If its options are wrong; all of them are named.
    """
    fix = "Correct the router's options."
    return open_options(plugins.adapter_routers, name, options, error=PopulationError, fix=fix)


def open_router(
    name: str,
    options: Mapping[str, Any],
    *,
    base: Base,
    num_slots: int,
    seed: int,
    plugins: Plugins,
) -> AdapterRouter:
    """A fresh router by its registered name, for a base's states.

    Args:
        name: Registered name.
        options: Its options.
        base: The base whose states it reads.
        num_slots: P.
        seed: Of its start.
        plugins: Where the name is looked up.

    Raises:
        UnknownNameError: If no plugin registers it.
        PopulationError: If its options are wrong, there is no slot, or what it reads has several
            widths.
        PluginError: If it fails, or breaks its contract on made-up states.
    """
    router, chosen = parse_router_options(name, options, plugins)
    if num_slots < 1:
        raise PopulationError(
            f"Cannot build adapter router '{name}': expected one slot at least, got {num_slots}. "
            "Fill the population first."
        )
    of_reading = {
        "base_hidden": base.hidden_size,
        "embeddings": int(base.model.get_input_embeddings().weight.shape[1]),
    }
    entry = plugins.adapter_routers.entry(name)
    with guarded(entry, "reads"):
        reads = frozenset(router.reads(chosen))
    if not reads <= of_reading.keys():
        raise refuse(
            entry,
            "reads",
            expected=f"columns among {', '.join(sorted(of_reading))}",
            got=", ".join(sorted(map(str, reads - of_reading.keys()))),
        )
    widths = {of_reading[reading] for reading in reads} or {base.hidden_size}
    if len(widths) > 1:
        raise PopulationError(
            f"Cannot build adapter router '{name}': expected states and embeddings of one width, "
            f"got {sorted(widths)}. Let it read one of them."
        )
    with guarded(entry, "build"):
        built = router.build(num_slots, widths.pop(), chosen, seed)
    if not isinstance(built, AdapterRouter):
        raise refuse(entry, "build", expected="an AdapterRouter", got=type(built).__name__)
    built.entry = entry
    check_built(entry, built)
    return built


def pack_router(router: AdapterRouter, name: str) -> bytes:
    """The file's bytes; equal routers have equal ones.

    Args:
        router: The router.
        name: The name it is registered under.
    """
    card = _Card(
        name=name,
        options=router.options.model_dump(mode="json"),
        num_slots=router.num_slots,
        width=router.width,
    )
    tensors = {n: t.detach().cpu().contiguous() for n, t in router.state_dict().items()}
    # One entry only: safetensors writes several in an order that differs from call to call.
    return save(tensors, metadata={_ENTRY: canonical_json(card.model_dump()).decode()})


def save_router(router: AdapterRouter, name: str, path: Path) -> None:
    """Write a router's file, whole or not at all.

    Args:
        router: The router.
        name: The name it is registered under.
        path: Target.

    Raises:
        StorageError: On I/O errors.
    """
    write_bytes(path, pack_router(router, name))


def load_router(path: Path, plugins: Plugins) -> AdapterRouter:
    """Read a router whose sender is not trusted, on the CPU.

    Args:
        path: File written by `save_router`.
        plugins: Where its name is looked up.

    Raises:
        PopulationError: If the file is missing, too large, malformed, holds numbers that are not
            finite, or is not of a router that is known here.
    """
    what = f"Cannot read adapter router '{path}'"
    again = "Copy the file again."
    try:
        size = path.stat().st_size
        if size > MAX_ROUTER_BYTES:
            raise PopulationError(
                f"{what}: expected at most {MAX_ROUTER_BYTES} bytes, got {size}. {again}"
            )
        with safe_open(path, framework="pt") as file:
            card = _Card.model_validate_json((file.metadata() or {})[_ENTRY])
            if 4 * card.num_slots * card.width > MAX_ROUTER_BYTES:  # before `build` allocates
                raise PopulationError(
                    f"{what}: expected at most {MAX_ROUTER_BYTES} bytes of weights, got "
                    f"{card.num_slots} slots of width {card.width}. {again}"
                )
            router, options = parse_router_options(card.name, card.options, plugins)
            entry = plugins.adapter_routers.entry(card.name)
            with guarded(entry, "build"):
                built = router.build(card.num_slots, card.width, options, 0)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except PopulationError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, MoloraError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PopulationError(
            f"{what}: expected a file that `save_router` wrote, got {reason}. {again}"
        ) from error
    _check_tensors(tensors, built.state_dict(), what)
    built.load_state_dict(tensors)
    built.entry = entry
    return built.eval()


def _check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    offenders = [
        f"'{name}' {_describe(found.get(name))} instead of {_describe(wanted.get(name))}"
        for name in sorted({*found, *wanted})
        if _describe(found.get(name)) != _describe(wanted.get(name))
    ]
    offenders += [
        f"'{name}' with NaN or infinity"
        for name, tensor in found.items()
        if not bool(torch.isfinite(tensor).all())
    ]
    if offenders:
        raise PopulationError(
            f"{what}: expected the finite numbers of its router, got {'; '.join(offenders[:5])}. "
            "Copy the file again."
        )


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
