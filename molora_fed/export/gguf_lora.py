"""Specialists as GGUF LoRA files, and the requests that mix them in llama-server."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from molora_fed.export.gguf_base import write_tensors
from molora_fed.export.gguf_layout import GgufLayout
from molora_fed.export.subject import Specialist, Subject, Weights
from molora_fed.models.base import Base
from molora_fed.storage.files import write_json

__all__ = ["build_command", "build_request", "write_lora", "write_mixture"]


def write_lora(specialist: Specialist, base: Base, layout: GgufLayout, file: Path) -> None:
    """Write a low-rank adapter as a GGUF LoRA in float32.

    llama.cpp scales every module by `alpha / R` of that module, with one alpha a file. Where one
    alpha gives all scales it is written so; otherwise scales are multiplied into B.

    Args:
        specialist: Low-rank in all modules; `GgufLayout.check_adapter` accepts it.
        base: The base it is for.
        layout: The base's layout.
        file: Target, in a folder that is whole or not there later.

    Raises:
        OSError: On I/O errors.
    """
    import gguf

    updates = specialist.adapter.updates
    alphas = {update.scale * (update.rank or 0) for update in updates.values()}
    alpha = alphas.pop() if len(alphas) == 1 else float(specialist.adapter.max_rank)
    writer = gguf.GGUFWriter(file, layout.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(specialist.name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base.id)
    tensors: dict[str, tuple[Tensor, str]] = {}
    for module, update in updates.items():
        if update.a is None or update.b is None or not update.rank:
            continue
        b = update.b.float()
        if update.scale * update.rank != alpha:
            b = (update.b.double() * (update.scale * update.rank / alpha)).float()
        name = layout.find_name(f"{module}.weight")
        tensors[f"{name}.lora_a"] = (update.a.float(), "float32")
        tensors[f"{name}.lora_b"] = (layout.order_rows(module, b), "float32")
    write_tensors(writer, tensors)


def build_request(subject: Subject, weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """The `lora` field of a request: an id for each specialist in order, and its scale."""
    return [
        {"id": index, "scale": weights.get(each.name, 0.0)}
        for index, each in enumerate(subject.specialists)
    ]


def build_command(subject: Subject, weights: Mapping[str, float]) -> str:
    """The command that serves the files, run in their folder; ids follow the order of the list.

    A request that names no adapter gets the scales of the command: of `--lora` they would be 1,
    all adapters added up in full, with `--lora-init-without-apply` too.

    Args:
        subject: Base and specialists.
        weights: Scale of each specialist by name; missing ones get 0.
    """
    files = [f"{each.name}.gguf:{weights.get(each.name, 0.0)!r}" for each in subject.specialists]
    return f"llama-server -m base.gguf --lora-scaled {','.join(files)}"


def write_mixture(subject: Subject, weights: Weights, file: Path) -> None:
    """Write down how a server is started, and what requests for a mixture hold.

    Args:
        subject: Base and specialists.
        weights: The mixture to begin with.
        file: Target.

    Raises:
        StorageError: On I/O errors.
    """
    content: dict[str, Any] = {
        "adapters": [
            {"id": index, "name": each.name, "file": f"{each.name}.gguf", "domain": each.domain}
            for index, each in enumerate(subject.specialists)
        ],
        "command": build_command(subject, weights.values),
        "weights": weights.source,
        "request": {"lora": build_request(subject, weights.values)},
    }
    if subject.gates:
        content["requests_by_domain"] = {
            domain: {"lora": build_request(subject, gates)}
            for domain, gates in sorted(subject.gates.items())
        }
    write_json(file, content)
