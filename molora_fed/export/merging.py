"""Specialists merged at chosen weights: one adapter, or a whole checkpoint.

Sums are over the products `scale * B @ A`, never over factors. The adapter is that sum exactly,
its rank the sum of all ranks; the checkpoint is rounded to its own dtype once, when all is added.
"""

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.errors import AdapterError
from molora_fed.export.subject import Specialist, Subject
from molora_fed.models.base import Base
from molora_fed.models.base_files import find_file, load_json_file, quiet_transformers
from molora_fed.models.layout import bias_of, weight_of
from molora_fed.models.runtime import check_memory
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.types import TOKENIZER_FILES, Progress

__all__ = ["DTYPES", "concatenate", "file_dtype", "write_checkpoint"]

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Dtypes that exports are written in, by name."""
_GENERATION = "generation_config.json"


def concatenate(specialists: Sequence[Specialist], weights: Mapping[str, float]) -> Adapter:
    """The weighted sum of low-rank adapters as one: their factors side by side.

    `sum_i w_i s_i B_i A_i` is `B @ A` of A's rows one below the other and B's columns beside each
    other, with `w_i s_i` multiplied into B_i, each number of it rounded to float32 once.

    Args:
        specialists: Of one base, all of them low-rank; ranks may differ.
        weights: Of each by name; those of weight 0 are left out.

    Returns:
        An adapter of kind "lora", float32 and scale 1, whose ranks are the sums of all ranks.

    Raises:
        AdapterError: If one has a dense difference, or changes a bias.
    """
    chosen = [each for each in specialists if weights[each.name]]
    for each in chosen:
        if not each.is_low_rank:
            raise AdapterError(
                f"Cannot merge '{each.name}' into one adapter: expected factors alone, got dense "
                "differences (kind delta). Use --as checkpoint, or --rank R for factors that "
                "come near."
            )
    updates: dict[str, LinearUpdate] = {}
    for module in dict.fromkeys(module for each in chosen for module in each.adapter.updates):
        rows: list[Tensor] = []
        columns: list[Tensor] = []
        for each in chosen:
            update = each.adapter.updates.get(module)
            if update is not None and update.a is not None and update.b is not None:
                rows.append(update.a.float())
                factor = weights[each.name] * update.scale
                columns.append((update.b.double() * factor).float())
        updates[module] = LinearUpdate(a=torch.cat(rows), b=torch.cat(columns, dim=1))
    recipe = [[each.adapter.hash, weights[each.name]] for each in chosen]
    return Adapter(
        name="merged",
        kind="lora",
        frozen_depth=min(each.adapter.frozen_depth for each in chosen),
        updates=updates,
        hash=hash_bytes(canonical_json(["concatenated", recipe])),
        num_bytes=sum(t.nbytes for update in updates.values() for t in update.tensors().values()),
        base_weights=next((e.adapter.base_weights for e in chosen if e.adapter.base_weights), ""),
    )


def file_dtype(base: Base) -> str:
    """The dtype a base's files are in, as its config says; float32 if it does not say."""
    config = load_json_file(base.folder / "config.json")
    name = str(config.get("dtype", config.get("torch_dtype", "float32"))).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def write_checkpoint(
    subject: Subject,
    weights: Mapping[str, float],
    target: Path,
    *,
    progress: Progress | None = None,
) -> None:
    """Write the base with the weighted sum of its specialists in its weights.

    Products and sums are computed in float64, and rounded to the dtype of the base's files once.
    What was tied stays tied; tokenizer, chat template and generation config are
    the base's own files.

    Args:
        subject: Base and specialists, of any kind.
        weights: Of each specialist by name.
        target: An existing folder.
        progress: Told the modules that are done.

    Raises:
        ComputeError: If there is too little memory for a copy of the base.
        OSError: On I/O errors.
    """
    base = subject.base
    check_memory(
        sum(values.numel() for values in base.model.parameters()) * torch.float32.itemsize,
        torch.device("cpu"),
        what=f"Cannot merge into a copy of base '{base.folder}'",
        fix="Use --as adapter, or a machine with more memory.",
    )
    merged = copy.deepcopy(base.model).to(DTYPES[file_dtype(base)])
    chosen = [each for each in subject.specialists if weights[each.name]]
    modules = list(dict.fromkeys(name for each in chosen for name in each.adapter.updates))
    with torch.no_grad():
        for number, module in enumerate(modules, 1):
            terms = [
                (each.adapter.updates[module], weights[each.name])
                for each in chosen
                if module in each.adapter.updates
            ]
            _add(base.model.get_submodule(module), merged.get_submodule(module), terms)
            if progress is not None:
                progress(number, len(modules))
    merged.config._name_or_path = ""  # it would be a path of this machine
    with quiet_transformers():
        merged.save_pretrained(target)
    for path in target.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors leaves them closed to others
    for name in (*TOKENIZER_FILES, _GENERATION):
        found = find_file(base.folder, name)
        if found is not None:
            shutil.copyfile(found, target / name)


def _multiply(update: LinearUpdate) -> Tensor:
    """The weight difference, (D_out, D_in) float64."""
    if update.a is not None and update.b is not None:
        return update.scale * (update.b.double() @ update.a.double())
    return torch.as_tensor(update.dense).double()


def _add(base: Any, merged: Any, terms: Sequence[tuple[LinearUpdate, float]]) -> None:
    """Write the base's weight and bias plus the terms into a module of the merged model."""
    total = weight_of(base).double()
    for update, weight in terms:
        total += weight * _multiply(update)
    weight_of(merged).copy_(total)
    biases = [(update.bias, weight) for update, weight in terms if update.bias is not None]
    bias, target = bias_of(base), bias_of(merged)
    if biases and bias is not None and target is not None:
        total = bias.double()
        for change, weight in biases:
            total = total + weight * change.double()
        target.copy_(total)
