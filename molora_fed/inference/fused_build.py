"""Making the causal language model of a fused or evolved model, a specialist or a base."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from molora_fed.adapters.compatibility import applied, check_adapter_fits
from molora_fed.adapters.updates import Adapter
from molora_fed.errors import RoutingError
from molora_fed.inference.expert_layers import plan_layers, share_weights
from molora_fed.inference.fused_config import FusedConfig, find_config
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.inference.opening import Model, ModelKind, PlainModel, open_model
from molora_fed.models.base import Base
from molora_fed.models.runtime import choose_placement
from molora_fed.plugins import Plugins
from molora_fed.population.bundle import EvolvedModel
from molora_fed.population.files import fingerprint_population
from molora_fed.population.router_files import pack_router
from molora_fed.population.slots import slot_adapter
from molora_fed.routing.bundle import BaseEntry, load_recorded_base
from molora_fed.routing.fused import FusedModel
from molora_fed.routing.top_k import TopKRouter
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.settings import describe_offenders

__all__ = ["build_causal_lm", "open_causal_lm", "open_saved"]


def open_causal_lm(
    folder: Path,
    *,
    kinds: Sequence[ModelKind] = ("fused", "evolved", "specialist", "base"),
    base_folder: Path | None = None,
    compute: Compute | None = None,
    plugins: Plugins | None = None,
) -> FusedForCausalLM:
    """Open the model in a folder, saved by `save_pretrained` or not.

    See `open_model` for arguments and errors.
    """
    config = find_config(folder)
    sort = None if config is None else (config.made_from or [None])[0]
    if config is not None and sort in kinds:
        if config.base_path is not None:
            return open_saved(folder, config, base_folder, compute or Compute())
        dtype = str(config.dtype or torch.float32).removeprefix("torch.")
        place = choose_placement(compute or Compute(), dtype)
        opened = FusedForCausalLM.from_pretrained(folder, dtype=place.dtype)
        opened.to(place.device)
        return opened
    model = open_model(
        folder, kinds=kinds, base_folder=base_folder, compute=compute, plugins=plugins
    )
    return build_causal_lm(model)


def open_saved(
    folder: Path, config: FusedConfig, base_folder: Path | None, compute: Compute
) -> FusedForCausalLM:
    """Open what `FusedForCausalLM.save_pretrained` wrote without the base.

    Args:
        folder: The folder.
        config: What it says.
        base_folder: Where the base is; the recorded path if None.
        compute: Where to run, and in which dtype; as it was saved where it says none.

    Raises:
        RoutingError: If the tensors are not those it needs.
        BaseCheckpointError: If the base is not there, or is another one.
    """
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    described = {"path": config.base_path, "dtype": dtype, "identity": config.base_identity}
    try:
        entry = BaseEntry.model_validate(described)
    except ValidationError as error:
        raise RoutingError(
            f"Cannot open '{folder}': expected a valid config.json, got "
            f"{describe_offenders(error, whole='config.json')}. Save it again."
        ) from error
    base = load_recorded_base(folder, entry, base_folder, compute)
    config.base_path = None
    model = FusedForCausalLM(config, model=share_weights(base.model), base=base)
    expected = model.list_own_tensors()
    try:
        found = load_file(folder / "model.safetensors")
        if found.keys() != expected.keys():
            raise ValueError(f"{len(found.keys() ^ expected.keys())} names that differ")
        for name, tensor in expected.items():
            tensor.copy_(found[name])
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise RoutingError(
            f"Cannot open '{folder}': expected the tensors its config.json describes, got "
            f"{' '.join(str(error).split())[:200]}. Save it again."
        ) from error
    return model


def build_causal_lm(model: Model) -> FusedForCausalLM:
    """The causal language model of a fused or evolved model, a specialist or a base.

    It holds the base's own weights, not a copy of them; a specialist's are its own.

    Args:
        model: The model.

    Raises:
        IncompatibleAdapterError: If an adapter does not fit the base.
        RoutingError: If the router reads the future of a text.
    """
    match model:
        case PlainModel():
            return _build_plain(model)
        case FusedModel():
            return _build_fused(model)
        case EvolvedModel():
            return _build_evolved(model)


def _build_plain(plain: PlainModel) -> FusedForCausalLM:
    own = plain.base.model
    title, digest = "base", ""
    if plain.adapter is not None:
        check_adapter_fits(plain.adapter, own)
        with applied(own, plain.adapter):
            own = share_weights(own)
            for module_name in plain.adapter.updates:
                module = own.get_submodule(module_name)
                for name, parameter in module.named_parameters(recurse=False):
                    # Another parameter: the base's gets its numbers back in a moment.
                    changed = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                    setattr(module, name, changed)
        title, digest = plain.adapter.name, plain.adapter.hash
    else:
        own = share_weights(own)
    made_from = ["specialist", digest] if digest else ["base"]
    experts = [{"name": title, "adapter": digest}]
    config = _describe(plain.base, experts, {}, made_from=made_from)
    return FusedForCausalLM(config, model=own, base=plain.base)


def _build_fused(fused: FusedModel) -> FusedForCausalLM:
    router = fused.router
    experts = [
        {
            "name": expert.name,
            "domain": expert.domain,
            "contribution": expert.contribution,
            "adapter": "" if expert.adapter is None else expert.adapter.hash,
        }
        for expert in fused.experts
    ]
    described = {
        "name": fused.router_name,
        "options": router.options.model_dump(mode="json"),
        "top_k": router.top_k if isinstance(router, TopKRouter) else None,
        "shapes": {name: list(t.shape) for name, t in router.state_tensors().items()},
    }
    adapters = [expert.adapter for expert in fused.experts]
    learned = {
        key: hash_bytes(tensor.detach().cpu().float().numpy().tobytes())
        for key, tensor in router.state_tensors().items()
    }
    made_from = [
        "fused",
        [[e.name, None if e.adapter is None else e.adapter.hash] for e in fused.experts],
        fused.router_name,
        described["options"],
        learned,
        described["top_k"],
        fused.mixture,
    ]
    config = _describe(
        fused.base,
        experts,
        _describe_layers(adapters),
        router=described,
        mixture=fused.mixture,
        frozen_depth=fused.frozen_depth,
        made_from=made_from,
    )
    return _fill(config, fused.base, adapters, router, fused.entry)


def _build_evolved(evolved: EvolvedModel) -> FusedForCausalLM:
    population, router = evolved.population, evolved.router
    adapters = [slot_adapter(population, slot) for slot in range(population.num_slots)]
    described = {
        "name": evolved.router_name,
        "options": router.options.model_dump(mode="json"),
        "top_k": None,
        "shapes": {name: list(t.shape) for name, t in router.state_dict().items()},
    }
    experts = [{"name": adapter.name, "adapter": adapter.hash} for adapter in adapters]
    packed = hash_bytes(pack_router(router, evolved.router_name))
    made_from = ["evolved", fingerprint_population(population), evolved.router_name, packed]
    config = _describe(
        evolved.base,
        experts,
        _describe_layers(adapters),
        mixes="updates",
        router=described,
        frozen_depth=population.frozen_depth,
        made_from=made_from,
    )
    return _fill(config, evolved.base, adapters, router, router.entry)


def _fill(
    config: FusedConfig, base: Base, adapters: Sequence[Adapter | None], router: Any, entry: Any
) -> FusedForCausalLM:
    for adapter in adapters:
        if adapter is not None:
            check_adapter_fits(adapter, base.model, finite=False)
    model = FusedForCausalLM(
        config, model=share_weights(base.model), base=base, router=router, entry=entry
    )
    model.fill([None if adapter is None else adapter.updates for adapter in adapters])
    return model


def _describe_layers(adapters: Sequence[Adapter | None]) -> dict[str, dict[str, Any]]:
    return {
        name: {"ranks": list(plan.ranks), "biases": plan.has_biases}
        for name, plan in plan_layers(adapters).items()
    }


def _describe(
    base: Base, experts: list[dict[str, Any]], layers: dict[str, Any], **others: Any
) -> FusedConfig:
    return FusedConfig(
        base_config=base.model.config.to_dict(),
        experts=experts,
        layers=layers,
        document_end=base.tokenizer.eos_token_id,
        base_identity=base.identity().model_dump(mode="json"),
        dtype=base.model.dtype,
        **others,
    )
